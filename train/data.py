# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Documents in, packed blocks out, answers scored.

documents = load_documents(data_arguments, seed)          # {"train", "validation"}: prompt + completion, or text
tokenizer = load_tokenizer(None, documents["train"], vocab_size)
blocks = pack(documents["train"], tokenizer, sequence_length)
answers = solve(model, tokenizer, documents["validation"].select(range(100)))
"""

import difflib
import glob
import re
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, load_dataset
from datasets.config import HF_DATASETS_CACHE, REPOCARD_FILENAME, REPOYAML_FILENAME
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard, HfApi
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import pack_dataset
from yaml import YAMLError

from modeling_coe.folders import read_object
from modeling_coe.train.arguments import DataArguments
from modeling_coe.train.word_problems import word_problems


PROMPT = "Question: {}\nAnswer:"
# The layout of questions and answers for chat clients and servers; what a tokenizer begins with comes in front.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'system' %}{{ content }}\n\n"
    "{% elif message['role'] == 'user' %}Question: {{ content }}\nAnswer:"
    "{% else %} {{ content }}{{ eos_token if loop.last else '\n\n' }}{% endif %}{% endfor %}"
)
# What a message can say beside its content and no layout here shows, and the values that say nothing.
UNSEEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
NOTHING = (None, [], {}, "", "[]")
SPLITS = ("train", "validation", "test")
LONGEST_CUT = 200
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_documents(
    arguments: DataArguments, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> DatasetDict:
    """The splits `train` and `validation`, with the columns `prompt` and `completion` or the one column `text`.

    A question becomes the prompt `Question: ...\\nAnswer:`, its answer the completion. Without a split called
    validation the test split takes its place; without either, the last `validation_size` of the shuffled documents do.

    Conversations are laid out by the tokenizer's chat template. A tokenizer without one is given that of questions and
    answers, and so is every tokenizer if the documents are questions and answers: whoever asks the saved model does it
    in the layout of its training.

    Raises:
        ValueError: an empty or missing split, missing columns, or a chat template that does not fit a conversation.
    """
    if arguments.dataset == "word_problems":
        counts = {"train": arguments.train_problems, "validation": arguments.validation_problems}
        splits = {
            split: Dataset.from_list(list(word_problems(split, count, arguments.problem_level, seed)))
            for split, count in counts.items()
        }
        columns = DataArguments()
    else:
        splits, columns = _set_aside(_read(arguments), arguments, seed), arguments
    limits = {"train": arguments.max_train_documents, "validation": arguments.max_validation_documents}
    for split, limit in limits.items():
        if limit is not None:
            splits[split] = splits[split].select(range(min(limit, len(splits[split]))))
        if len(splits[split]) == 0:
            raise ValueError(f"The {split} split of `dataset={arguments.dataset}` is empty; give it documents.")
        splits[split] = _lay_out(splits[split], split, columns, tokenizer)
    return DatasetDict(splits)


def _read(arguments: DataArguments) -> DatasetDict:
    path = Path(arguments.dataset)
    if not arguments.dataset:
        raise ValueError("`dataset` is empty; name a file, a folder or a dataset of the Hub.")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"`dataset={path}` is a link to {path.readlink()}, which is not there; name another file.")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise ValueError(f"`dataset={path}` is no JSON, JSONL or Parquet file; convert it to one of these.")
    if (saved := _saved_to_disk(path)) is not None:
        if arguments.dataset_config is not None:
            raise ValueError(f"`dataset_config={arguments.dataset_config}`: {path} was saved to disk and has none.")
        return saved
    if path.is_dir():
        # As deep as configuration/split/file; the root of a disk would be searched for hours.
        levels = [] if path.resolve().parent == path.resolve() else ["*", "*/*", "*/*/*"]
        if not any(file.suffix in FILE_FORMATS for level in levels for file in path.glob(level)):
            raise ValueError(
                f"`dataset={path}` holds no .json, .jsonl or .parquet file, nor do folders in it; name theirs."
            )
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FILE_FORMATS)
    if path.is_file():
        options = {"path": FILE_FORMATS[path.suffix], "data_files": {"train": glob.escape(str(path))}}
    elif files and arguments.dataset_config is None and not _declares_files(path):
        splits = _files_by_split(path)
        options = {"path": _format(path, splits), "data_files": splits}
    else:
        _require_dataset(arguments.dataset)
        options = {"path": arguments.dataset, "name": arguments.dataset_config}
    for file in files:
        _check_file(file)
    try:
        return load_dataset(**options)
    except (ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"`dataset={path}` cannot be read: {reason} Repair or remove the empty or broken file."
        ) from error


def _saved_to_disk(folder: Path) -> DatasetDict | None:
    """The splits that `save_to_disk` wrote into a folder and that are read here; None if it wrote none.

    `load_from_disk` would write what it caches beside them.
    """
    splits = read_object(folder / "dataset_dict.json").get("splits")
    is_dict = isinstance(splits, list)
    parts = {split: folder / split for split in SPLITS if split in splits} if is_dict else {"train": folder}
    files = {split: read_object(part / "state.json").get("_data_files") for split, part in parts.items()}
    if not files or not all(isinstance(names, list) for names in files.values()):
        return None
    saved = {}
    for split, names in files.items():
        paths = [glob.escape(str(parts[split] / name["filename"])) for name in names]
        saved[split] = load_dataset("arrow", data_files=paths, split="train") if paths else Dataset.from_dict({})
    return DatasetDict(saved)


def _declares_files(folder: Path) -> bool:
    """Whether the folder says which files are which split, as data sets of the Hub do.

    Raises:
        ValueError: naming a README.md whose head cannot be read.
    """
    card = folder / REPOCARD_FILENAME
    try:
        declares = card.is_file() and "configs" in DatasetCard.load(card).data.to_dict()
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{card} begins with no YAML that can be read: {reason}. Repair or remove it.") from error
    return declares or (folder / REPOYAML_FILENAME).is_file()


def _files_by_split(folder: Path) -> dict[str, list[str]]:
    """The folder's JSON or Parquet files, by the splits that `datasets` reads from their names.

    Given a folder, `datasets` reads the format that most files have, which may be that of LICENSE.txt; and it takes
    brackets and stars in the name of a folder for a pattern.
    """
    base = glob.escape(str(folder.resolve()))
    files = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base).filter(extensions=[*FILE_FORMATS])
    return {split: [glob.escape(name) for name in names] for split, names in files.items() if names}


def _format(folder: Path, splits: dict[str, list[str]]) -> str:
    """What `datasets` calls the format of the splits' files.

    Raises:
        ValueError: files of two formats, or none of them in a split.
    """
    first = {}
    for name in chain.from_iterable(splits.values()):
        first.setdefault(next(kind for suffix, kind in FILE_FORMATS.items() if suffix in Path(name).suffixes), name)
    if len(first) > 1:
        names = " and ".join(Path(name).name for name in first.values())
        raise ValueError(f"`dataset={folder}` holds {names}, of two formats; put one of them into another folder.")
    if not first:
        raise ValueError(f"`dataset={folder}` has no split with a .json, .jsonl or .parquet file; name one file.")
    return next(iter(first))


def _require_dataset(name: str):
    """Raise at once for a folder that is not there and, after one question, for a data set that the Hub has not."""
    path = Path(name)
    if path.exists():
        return
    near = difflib.get_close_matches(name, ["word_problems", *map(str, path.parent.glob("*"))], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    is_path = path.suffix in FILE_FORMATS or name.startswith((".", "~", "/")) or len(path.parts) > 2
    if is_path or (len(path.parts) == 2 and path.parent.is_dir()):
        raise ValueError(f"`dataset={name}`: no such file or folder.{hint}")
    if (Path(HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    try:
        HfApi().dataset_info(name, timeout=5)
    except Exception as error:  # from a name that cannot be to a network that is not there
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"`dataset={name}`: no such file or folder, and the Hub gives no data set of that name ({reason}).{hint}"
        ) from error


def _check_file(file: Path):
    """`datasets` reads what is not UTF-8 as other letters, without a word, and does not say which file is empty."""
    if not file.is_file():
        return
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty, so the dataset cannot be read. Repair or remove it.")
    if file.suffix == ".parquet":
        return
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {number} of {file} is not UTF-8: {error}. Save the file as UTF-8.") from error


def _set_aside(splits: DatasetDict, arguments: DataArguments, seed: int) -> dict[str, Dataset]:
    if "train" not in splits:
        raise ValueError(f"`dataset={arguments.dataset}` has the splits {list(splits)}; name one file or split train.")
    for name in ("validation", "test"):
        if name in splits:
            return {"train": splits["train"], "validation": splits[name]}
    size, total = arguments.validation_size, len(splits["train"])
    if size is None or size >= total:
        raise ValueError(
            f"`dataset={arguments.dataset}` has {total} documents and no validation or test split, and "
            f"`validation_size={size}`; set it to a number below {total}, or add a file called validation or test."
        )
    halves = splits["train"].train_test_split(test_size=size, seed=seed)
    return {"train": halves["train"], "validation": halves["test"]}


def _lay_out(
    documents: Dataset, split: str, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase | None
) -> Dataset:
    named_pair = arguments.question_column is not None or arguments.answer_column is not None
    question, answer = arguments.question_column or "question", arguments.answer_column or "answer"
    text, names = arguments.text_column or "text", documents.column_names
    if named_pair and arguments.text_column is not None:
        raise ValueError(
            f"`text_column={text}` does not go with `question_column` or `answer_column`; drop one of them."
        )

    def check(value, index):
        if not isinstance(value, str) or not value:
            raise ValueError(f"Document {index} of the {split} split holds {value!r}; every document must be a text.")
        return value

    def from_pair(row, index):
        return {"prompt": PROMPT.format(check(row[question], index)), "completion": f" {check(row[answer], index)}"}

    def from_prompt(row, index):
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            return _conversation([*row["prompt"], *row["completion"]], index, split, tokenizer)
        return {name: check(row[name], index) for name in ("prompt", "completion")}

    def from_messages(row, index):
        return _conversation(row["messages"], index, split, tokenizer)

    def from_text(row, index):
        return {"text": check(row[text], index)}

    layouts = {
        (question, answer): from_pair, ("prompt", "completion"): from_prompt, ("messages",): from_messages,
        (text,): from_text,
    }  # fmt: skip
    if arguments.text_column is not None:
        layouts = {(text,): from_text}
    elif named_pair:
        layouts = {(question, answer): from_pair}
    for columns, lay_out in layouts.items():
        if set(columns) <= set(names):
            is_chat = lay_out is from_messages or (lay_out is from_prompt and isinstance(documents[0]["prompt"], list))
            if is_chat and any(tools not in NOTHING for tools in (documents["tools"] if "tools" in names else ())):
                raise ValueError(
                    f"The {split} split has a column `tools`, and answers that call tools are not trained; remove it."
                )
            if tokenizer is not None:
                _give_template(tokenizer, replace=lay_out is from_pair, add=is_chat)
            rows = documents.map(lay_out, with_indices=True, remove_columns=names, desc=f"Reading {split}")
            # In this order, whatever that of the file's columns was.
            return rows.select_columns([name for name in ("prompt", "completion", "text") if name in rows.features])
    wanted = ", nor ".join(" and ".join(f"`{name}`" for name in columns) for columns in layouts)
    raise ValueError(
        f"The {split} split has the columns {names}, not {wanted}; name them with `text_column`, or `question_column` "
        "and `answer_column`."
    )


def _give_template(tokenizer: PreTrainedTokenizerBase, replace: bool, add: bool):
    """The layout of questions and answers, for those who ask the saved model: it is that of its training."""
    template = _beginning(tokenizer) + CHAT_TEMPLATE
    if replace and tokenizer.chat_template not in (None, template):
        print("Questions and answers have a layout of their own, which replaces the tokenizer's chat template.")
    if replace or (add and tokenizer.chat_template is None):
        tokenizer.chat_template = template


def _conversation(
    messages: list[dict[str, str]], index: int, split: str, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, str]:
    """The last answer of a conversation is the completion, the turns before it are the prompt.

    They are in the layout of the tokenizer's chat template, without a tokenizer in that of questions and answers.

    Raises:
        ValueError: a role that has no place in this layout, an empty text, no answer at the end or nothing before it,
            or a chat template that refuses the conversation or does not render the prompt as its beginning.
    """
    layouts = {"system": "{}\n\n", "user": PROMPT, "assistant": " {}\n\n"}
    for message in messages if isinstance(messages, list) and messages else [messages]:
        turn = message if isinstance(message, dict) else {}
        role, content = turn.get("role"), turn.get("content")
        if role not in layouts or not isinstance(content, str) or not content:
            raise ValueError(
                f"Document {index} of the {split} split has the message {message!r}; each must have a text as "
                f"`content` and one of {tuple(layouts)} as `role`."
            )
        if unseen := [name for name in UNSEEN if turn.get(name) not in NOTHING]:
            raise ValueError(
                f"Document {index} of the {split} split has a message with `{unseen[0]}={turn[unseen[0]]!r}`, and "
                "`role` and `content` alone are trained; remove it, or write it into the content."
            )
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"Document {index} of the {split} split ends with {messages[-1]!r}, not with an answer.")
    if messages[-1].get("weight") not in (None, 1):
        raise ValueError(
            f"Document {index} of the {split} split ends with an answer of `weight={messages[-1]['weight']}`, and it "
            "is what is trained; leave the document out."
        )
    if len(messages) == 1:
        raise ValueError(f"Document {index} of the {split} split is an answer alone; put before it what it answers.")
    if tokenizer is None:
        prompt = "".join(layouts[message["role"]].format(message["content"]) for message in messages[:-1])
        return {"prompt": prompt, "completion": f" {messages[-1]['content']}"}
    try:
        return _render([{name: message[name] for name in ("role", "content")} for message in messages], tokenizer)
    except (TemplateError, ValueError) as error:
        raise ValueError(
            f"Document {index} of the {split} split does not fit the tokenizer's chat template ({error}): change the "
            "messages, save the tokenizer with another `chat_template`, or give `prompt` and `completion` as texts."
        ) from error


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A conversation without the tokens that `_encode` puts around it.

    Raises:
        TemplateError: the template refuses the conversation.
        ValueError: what a server would ask is not the beginning of what is trained.
    """
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole, beginning = tokenizer.apply_chat_template(messages, tokenize=False), _beginning(tokenizer)
    if not prompt.startswith(beginning):
        raise ValueError(f"it begins with {prompt[:20]!r}, and the tokenizer puts {beginning!r} in front")
    if not whole.startswith(prompt):
        raise ValueError(f"the prompt {prompt!r} is not the beginning of the whole, {whole!r}")
    completion = whole.removeprefix(prompt)
    if (answer := completion.rstrip()).endswith(tokenizer.eos_token):
        completion = answer.removesuffix(tokenizer.eos_token)
    return {"prompt": prompt.removeprefix(beginning), "completion": completion}


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts in front of a text."""
    return "".join(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))


def load_tokenizer(name: str | None, documents: Dataset | None, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`, or without a name a byte-level BPE trained on `documents`; at most `vocab_size`
    tokens.

    Digits are tokens of their own. `<bos>` starts what the trained tokenizer encodes; documents end with `<eos>`.

    Raises:
        ValueError: more tokens than the model's embedding has rows, no token to end a document with, or one that the
            tokenizer puts behind every text itself, between a question and its answer too.
    """
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if len(tokenizer) > vocab_size:
            raise ValueError(
                f"`tokenizer={name}` has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows; take a "
                f"preset with `vocab_size` of at least {len(tokenizer)}."
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"`tokenizer={name}` has no eos token, which ends every document; set one and save it.")
        if len(ids := tokenizer("a").input_ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            raise ValueError(
                f"`tokenizer={name}` ends every text with {tokenizer.eos_token}, a question before its answer too; "
                "load it with `add_eos_token=False`, or another post-processor, and save it."
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.is_fast:
            # A file keeps the padding of the last call before it was saved, and a record of the run would see it.
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
        return tokenizer
    return _train_tokenizer(documents, vocab_size)


def _train_tokenizer(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (smallest := len(alphabet) + len(specials)):
        raise ValueError(f"`vocab_size={vocab_size}` must be at least {smallest}: the bytes and {specials}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet)
    bpe.train_from_iterator(("".join(row.values()) for row in documents), trainer, length=len(documents))
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # `generate` refuses token types
        chat_template="{{ bos_token }}" + CHAT_TEMPLATE,
    )


def pack(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, split_long_documents: bool = False
) -> Dataset:
    """Blocks of whole documents: `input_ids` of at most `sequence_length` tokens, `seq_lengths` of their documents.

    Raises:
        ValueError: a document longer than a block, unless it may be split.
    """
    tokens = documents.map(
        partial(_encode, tokenizer=tokenizer), batched=True, remove_columns=documents.column_names, desc="Tokenizing"
    )
    longest = max(len(ids) for ids in tokens["input_ids"])
    if longest > sequence_length and not split_long_documents:
        raise ValueError(
            f"The longest document has {longest} tokens, `sequence_length={sequence_length}` at most; raise it to "
            f"{longest}, or set `split_long_documents=true`."
        )
    return pack_dataset(tokens, sequence_length, strategy="bfd_split", map_kwargs={"desc": "Packing"})


def _encode(documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    end = [tokenizer.eos_token_id]
    starts = tokenizer(documents["text" if "text" in documents else "prompt"]).input_ids
    if "text" in documents:
        return {"input_ids": [ids + end for ids in starts]}
    completions = tokenizer(documents["completion"], add_special_tokens=False).input_ids
    return {"input_ids": [start + completion + end for start, completion in zip(starts, completions, strict=True)]}


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Packed blocks -> `input_ids`, `position_ids`, `labels`, each `[B, S]`.

    The positions restart with every document: so the attention keeps the documents of a block apart, as long as there
    is neither a cache nor an attention mask. The first token of a document and the padding are no targets.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    position_ids = torch.empty_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = labels[index, :length] = torch.tensor(row["input_ids"])
        segments = [*row["seq_lengths"], width - length]
        position_ids[index] = torch.cat([torch.arange(segment) for segment in segments])
    labels[position_ids == 0] = -100
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def as_problems(documents: Dataset, count: int) -> Dataset:
    """The first `count` documents as prompt and completion; of a plain text the first quarter is the prompt, up to
    `LONGEST_CUT` characters."""
    documents = documents.select(range(min(count, len(documents))))
    if "prompt" in documents.column_names:
        return documents

    def cut(row):
        end = min(max(1, len(row["text"]) // 4), LONGEST_CUT)
        return {"prompt": row["text"][:end], "completion": row["text"][end:]}

    return documents.map(cut, remove_columns=["text"], desc="Cutting prompts")


def final_answer(text: str) -> str | None:
    """What stands behind the last `####`, without thousands separators; None if there is none."""
    answers = re.findall(r"(?<!#)####(?!#)\s*(\S+)", text)
    return answers[-1].replace(",", "") if answers else None


@torch.no_grad()
def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Dataset, batch_size: int = 16
) -> dict[str, float]:
    """Nats per token, every token counting the same: `validation_loss` of the whole documents, as pretraining reports
    it, and `answer_loss` of the completions alone, where there are prompts.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, 2, dtype=torch.float64)
    for batch in documents.iter(batch_size):
        encoded = _encode(batch, tokenizer)["input_ids"]
        starts = [0] * len(encoded) if "text" in batch else [len(ids) for ids in tokenizer(batch["prompt"]).input_ids]
        inputs = tokenizer.pad({"input_ids": encoded}, return_tensors="pt", padding_side="right").to(model.device)
        logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False).logits
        targets = inputs.input_ids[:, 1:]
        scores = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        counted = inputs.attention_mask[:, 1:].bool()
        position = torch.arange(1, targets.shape[1] + 1, device=model.device)
        answers = counted & (position >= torch.tensor(starts, device=model.device)[:, None])
        for row, mask in enumerate((counted, answers)):
            # Apple's GPUs have no float64.
            totals[row] += torch.stack([scores[mask].cpu().double().sum(), mask.sum().cpu().double()])
    model.train(was_training)
    whole, answers = (totals[:, 0] / totals[:, 1]).tolist()
    return {"validation_loss": whole} | ({"answer_loss": answers} if "prompt" in documents.column_names else {})


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    scored_problems: int,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[dict[str, float], list[dict]]:
    """The losses of a model and, of problems with a final answer, the share solved; and all answers."""
    problems = as_problems(documents, scored_problems)
    answers = solve(model, tokenizer, problems, batch_size, max_new_tokens) if len(problems) else []
    result = losses(model, tokenizer, documents, batch_size)
    if (share := share_solved(answers)) is not None:
        result["share_solved"] = share
    return result, answers


def share_solved(answers: list[dict]) -> float | None:
    """None if there is no problem with a final answer."""
    scored = with_final_answer(answers)
    return sum(answer["solved"] for answer in scored) / len(scored) if scored else None


def with_final_answer(answers: list[dict]) -> list[dict]:
    """Those that can be solved."""
    return [answer for answer in answers if final_answer(answer["expected"]) is not None]


def short_enough(
    documents: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, length: int, drop_long_documents: bool = False
) -> Dataset:
    """The documents of the split, which have at most `length` tokens each.

    Raises:
        ValueError: longer documents, unless they may be dropped; or nothing but longer ones.
    """
    sizes = [len(ids) for batch in documents.iter(1000) for ids in _encode(batch, tokenizer)["input_ids"]]
    kept = [index for index, size in enumerate(sizes) if size <= length]
    if len(kept) < len(sizes) and not (drop_long_documents and kept):
        raise ValueError(
            f"{len(sizes) - len(kept)} of {len(sizes)} documents of the {split} split are longer than "
            f"`sequence_length={length}`, the longest has {max(sizes)} tokens; raise it up to the model's context, or "
            "set `drop_long_documents=true`."
        )
    if len(kept) < len(sizes):
        print(f"Left out of {split}: {len(sizes) - len(kept)} of {len(sizes)} documents, longer than {length} tokens.")
    return documents.select(kept)


@torch.no_grad()
def turn_dial(model: PreTrainedModel, expert_budget: float | None):
    """Let the model's tokens compute so many experts an iteration on average; None leaves it as it is.

    Raises:
        ValueError: a model that has no budget, or not this one.
    """
    if expert_budget is None:
        return
    if not hasattr(model, "set_expert_budget"):
        raise ValueError(f"`expert_budget={expert_budget}` needs a CoE with null experts, not {type(model).__name__}.")
    model.set_expert_budget(expert_budget)


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    batch_size: int = 64,
    max_new_tokens: int = 256,
) -> list[dict]:
    """Greedy answers to the prompts of `problems`: dicts of `prompt`, `expected`, `generated` and `solved`.

    A problem is solved if the generated final answer is the expected one, character for character.
    """
    was_training = model.training
    model.eval()
    answers = []
    for batch in problems.iter(batch_size):
        prompts = {"input_ids": tokenizer(batch["prompt"]).input_ids}
        inputs = tokenizer.pad(prompts, return_tensors="pt", padding_side="left").to(model.device)
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        # A chat template may end an answer with a token that is not read.
        completions = tokenizer(batch["completion"], add_special_tokens=False).input_ids
        read = tokenizer.batch_decode(completions, skip_special_tokens=True)
        for prompt, completion, right, text in zip(batch["prompt"], batch["completion"], read, texts, strict=True):
            expected, answer = final_answer(right), final_answer(text)
            solved = expected is not None and answer == expected
            answers.append({"prompt": prompt, "expected": completion, "generated": text, "solved": solved})
    model.train(was_training)
    return answers
