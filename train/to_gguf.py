# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A chain of one iteration becomes a GGUF file, for llama.cpp and the programs that are built on it:

coe-to-gguf --model runs/my_chain --llama_cpp path/to/llama.cpp --output my_chain.gguf

The checkpoint goes through `downcycle`, which makes it a Mixtral, and then through llama.cpp's own converter. That
converter tells how a BPE tokenizer splits text by a fingerprint of its token ids, so it refuses every vocabulary that
it has not seen. Here the split is read from tokenizer.json instead.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig

from modeling_coe import CoEConfig, downcycle
from modeling_coe.folders import refuse_adapter, require_model
from modeling_coe.train.arguments import command_line, parse


# What llama.cpp calls a split into single digits and then GPT-2's words: `pre_tokenizer` of train/data.py.
DIGITS_AND_WORDS = "smollm"
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


@dataclass
class GgufArguments:
    """The checkpoint, the converter, and what to write."""

    model: str = field(metadata={"help": "Folder of a CoE with num_iterations=1, and its tokenizer."})
    llama_cpp: Path = field(metadata={"help": "Source folder of llama.cpp, with convert_hf_to_gguf.py in it."})
    output: Path = field(metadata={"help": "The .gguf file to write."})
    type: str = field(default="f32", metadata={"help": "Of the weights: f32, f16, bf16 or q8_0."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output."})

    def __post_init__(self):
        if self.type not in FILE_TYPES:
            raise ValueError(f"`type={self.type}` must be one of {', '.join(FILE_TYPES)}; llama-quantize has more.")
        if not (self.llama_cpp / "conversion").is_dir():
            raise ValueError(
                f"`llama_cpp={self.llama_cpp}` has no folder `conversion`; name a source folder of llama.cpp of 2026."
            )
        if self.output.is_dir() or not self.output.parent.is_dir():
            what = "is a folder" if self.output.is_dir() else "lies in a folder that is not there"
            raise ValueError(f"`output={self.output}` {what}; name the file to write.")
        if self.output.exists() and not self.overwrite:
            raise ValueError(f"`output={self.output}` exists; choose another name or set `overwrite=true`.")


def splits_digits_and_words(tokenizer_file: Path) -> bool:
    """Whether a tokenizer.json normalises nothing and splits text as llama.cpp's `DIGITS_AND_WORDS` does."""
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Sequence", "pretokenizers": [digits, words]}
    return tokenizer["normalizer"] is None and tokenizer["pre_tokenizer"] == split


def refuse_what_llama_cpp_lacks(config: CoEConfig):
    """llama.cpp computes every Mixtral with SiLU and attends to the whole context, whatever the file says.

    Raises:
        ValueError: naming the activation, or the window.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"llama.cpp has no Mixtral with `hidden_act={config.hidden_act!r}`, it would compute SiLU; convert a "
            "chain that was trained with it."
        )
    window, context = config.sliding_window, config.max_position_embeddings
    if window is not None and window < context:
        raise ValueError(
            f"llama.cpp has no Mixtral with `sliding_window={window}`, it would attend to the whole context "
            f"(`max_position_embeddings={context}`); if yours stay within the window, set `sliding_window` to null in "
            "config.json."
        )


def convert(mixtral: Path, llama_cpp: Path, output: Path, file_type: str):
    """llama.cpp's converter, on a Mixtral in a folder."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import get_model_class

    model_class = get_model_class("MixtralForCausalLM")
    if splits_digits_and_words(mixtral / "tokenizer.json"):
        changes = {
            "model_arch": model_class.model_arch,
            "set_vocab": model_class._set_vocab_gpt2,
            "get_vocab_base_pre": lambda self, tokenizer: DIGITS_AND_WORDS,
        }
        model_class = type("MixtralWithItsOwnTokenizer", (model_class,), changes)
    with torch.inference_mode():
        model_class(mixtral, gguf.LlamaFileType[FILE_TYPES[file_type]], output).write()


@command_line
def main(arguments: list[str] | None = None):
    logging.basicConfig(level=logging.WARNING)
    (options,) = parse(GgufArguments, arguments=arguments, description=__doc__)
    require_model("model", options.model)
    refuse_adapter("model", options.model)
    if Path(options.model).is_dir() and not (Path(options.model) / "tokenizer.json").is_file():
        raise ValueError(f"`model={options.model}` has no tokenizer.json; save its tokenizer there.")
    config = AutoConfig.from_pretrained(options.model)
    if config.model_type == "coe":  # all others are refused by `downcycle`
        refuse_what_llama_cpp_lacks(config)
    partial = options.output.with_name(f".{options.output.name}.partial")
    with TemporaryDirectory() as folder:
        mixtral = downcycle(options.model, Path(folder) / "mixtral")
        convert(mixtral, options.llama_cpp.resolve(), partial.resolve(), options.type)
    partial.replace(options.output)
    print(f"GGUF written to {options.output}")


if __name__ == "__main__":
    main()
