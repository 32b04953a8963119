# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server for a CoE checkpoint: `transformers serve`, which by itself knows no custom class.

python train/serve.py runs/smoke --port 8000                 # any option of `transformers serve --help`
python train/serve.py runs/smoke --continuous-batching --cb-num-blocks 64 --cb-max-batch-tokens 256

transformers chat runs/smoke http://localhost:8000/v1        # in another terminal; or the `openai` client
"""

import transformers
import typer
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, Json, ValidationError
from transformers.cli.serve import Serve
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

import modeling_coe


# The server looks its model class up on this module and not among the Auto classes (transformers 5.23).
transformers.CoEForCausalLM = modeling_coe.CoEForCausalLM


class Body(BaseModel):
    """The values of a request's body that the server uses unchecked: wrong ones end in 500 (transformers 5.23)."""

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[int, float] | None = None
    generation_config: Json[dict] | None = None
    chat_template_kwargs: dict = {}
    tools: list[dict] | None = None


class Message(BaseModel):
    role: str
    content: str | list[dict] | None = None


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)


class ResponseBody(Body):
    input: str | list[dict] = Field(min_length=1)


BODIES = {ChatCompletionHandler: ChatBody, CompletionHandler: Body, ResponseHandler: ResponseBody}
check_names = BaseHandler._validate_request


def check_request(handler: BaseHandler, body: dict):
    """The server's own check, of the names in the body, and one of the values; both refuse with 422."""
    check_names(handler, body)
    try:
        BODIES[type(handler)].model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from error


BaseHandler._validate_request = check_request


def main():
    typer.run(Serve)


if __name__ == "__main__":
    main()
