# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Ask a saved model one question, in the layout of its tokenizer's chat template, which is that of its training:

coe-generate --model runs/smoke \\
    --question "Mia has 5 apples. Mia buys 4 more. Mia gives away 2. How many apples does Mia have now?"
"""

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_coe  # noqa: F401, registers CoE with the Auto classes
from modeling_coe.folders import require_model
from modeling_coe.train.arguments import command_line, parse, require_least, require_weights
from modeling_coe.train.data import PROMPT, turn_dial
from modeling_coe.train.report import keep_output_short


@dataclass
class GenerateArguments:
    """The checkpoint, the question, and the longest answer."""

    question: str = field(metadata={"help": "One problem in words."})
    model: str = field(default="runs/smoke", metadata={"help": "Checkpoint folder or Hub id."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    expert_budget: float | None = field(
        default=None, metadata={"help": "Experts a token and iteration, on average, of a model with null experts."}
    )

    def __post_init__(self):
        require_model("model", self.model)
        require_weights(self.model)
        require_least(self, {"max_new_tokens": 1})


@command_line
def main(arguments: list[str] | None = None):
    (options,) = parse(GenerateArguments, arguments=arguments, description=__doc__)
    keep_output_short()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    turn_dial(model, options.expert_budget)
    has_template, text = tokenizer.chat_template is not None, PROMPT.format(options.question)
    if has_template:
        question = [{"role": "user", "content": options.question}]
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=not has_template, return_tensors="pt", return_token_type_ids=False)
    prompt, context = inputs.input_ids.shape[1], model.config.max_position_embeddings
    if prompt + options.max_new_tokens > context:
        raise ValueError(
            f"The prompt has {prompt} tokens, and `max_new_tokens={options.max_new_tokens}` is for those after them; "
            f"the model's context is {context} in all. Shorten the question, or lower `max_new_tokens`."
        )
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
