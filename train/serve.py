# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A small local server for one checkpoint, for OpenAI clients: chat completions, completions, models and health.

coe-serve runs/smoke --port 8000

curl localhost:8000/v1/completions --json '{"model": "runs/smoke", "prompt": "Mia has"}'      # or the `openai` client

It answers one request at a time and listens on this machine only. What it does not do it refuses with 422 and the name
of the field; it loads no other model, runs no code from a checkpoint and renders no template of a client. For many
users, and for what is refused here, serve the checkpoint with vLLM.
"""

import argparse
import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from transformers import AsyncTextIteratorStreamer, AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

import modeling_coe  # noqa: F401, registers CoE with the Auto classes
from modeling_coe.folders import require_model
from modeling_coe.train.arguments import command_line


LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 2**20  # bytes


# JSON can hold half a surrogate pair, which no tokenizer takes; `encode` raises a ValueError that says so.
Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]
Stop = Annotated[Text, Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Options(Strict):
    """What a request may set, by OpenAI's names. Left out, the checkpoint's generation settings hold.

    Where these name no `max_new_tokens`, an answer may fill the context.
    """

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | list[Stop] | None = None
    stream: bool = False
    n: Literal[1] | None = 1


class CompletionRequest(Options):
    prompt: Text


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        is_text = isinstance(self.content, str)
        return {"role": self.role, "content": self.content if is_text else "".join(part.text for part in self.content)}


class ChatRequest(Options):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class Halt(StoppingCriteria):
    """Ends a generation after its present token."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def refusal(status: int, message: str, field: str | None = None) -> Response:
    """In OpenAI's form, which its clients print."""
    error = {"message": message, "type": "invalid_request_error", "param": field, "code": None}
    return JSONResponse({"error": error}, status)


def refuse(field: str, reason: str):
    raise RequestValidationError([{"type": "value_error", "loc": ("body", field), "msg": reason}])


class Engine:
    """The model, and the one thread that it runs in."""

    def __init__(self, folder: str, device: str):
        require_model("model", folder)
        self.name, self.thread = folder, ThreadPoolExecutor(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        self.model = model.eval().to(device)

    def encode(self, request: Options) -> list[int]:
        """The token ids of the prompt, which leave room for an answer."""
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        text = self.render(request.messages) if field == "messages" else request.prompt
        ids = self.tokenizer(text, add_special_tokens=field == "prompt")["input_ids"]
        context = self.model.config.max_position_embeddings
        if not 0 < len(ids) < context:
            refuse(field, f"The prompt has {len(ids)} tokens; the model reads from 1 to {context - 1} of them.")
        return ids

    def render(self, messages: list[Message]) -> str:
        if self.tokenizer.chat_template is None:
            refuse("messages", "This checkpoint has no chat template; use /v1/completions.")
        try:
            chat = [message.plain() for message in messages]
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            refuse("messages", f"The checkpoint's chat template refuses them: {error}")

    def generate(self, ids: list[int], request: Options, streamer, halt: Halt) -> tuple[int, str]:
        """In the thread: the number of new tokens, and why there are no more."""
        settings = self.model.generation_config
        wanted = [*filter(None, (request.max_tokens, getattr(request, "max_completion_tokens", None)))]
        room = self.model.config.max_position_embeddings - len(ids)
        length = min([room, *(wanted or filter(None, [settings.max_new_tokens]))])
        options = {"max_new_tokens": length, "num_beams": 1, "num_return_sequences": 1}
        if request.temperature is not None or request.top_p is not None:
            given = (request.temperature, settings.temperature, 1.0)
            temperature = next(value for value in given if value is not None)
            # Below, the division by the temperature overflows; greedy decoding is its limit.
            options["do_sample"] = temperature > 1e-3
            if options["do_sample"]:
                # Without a `top_k` of the checkpoint's there is none, as at OpenAI; transformers would take 50.
                top_p, top_k = request.top_p or settings.top_p or 1.0, settings.top_k or 0
                options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        if request.seed is not None:
            torch.manual_seed(request.seed)
        try:
            prompt = torch.tensor([ids], device=self.model.device)
            options |= {"attention_mask": torch.ones_like(prompt), "stopping_criteria": [halt], "streamer": streamer}
            output = self.model.generate(prompt, **options)
        finally:
            streamer.end()
        ends = settings.eos_token_id
        is_ended = output[0, -1].item() in ([ends] if isinstance(ends, int) else ends or [])
        return output.shape[1] - len(ids), "stop" if is_ended else "length"

    async def answer(self, connection: Request, ids: list[int], request: Options) -> AsyncIterator[str | tuple]:
        """Pieces of text, then (number of tokens, why it ended). It ends with the client that asked for it."""
        streamer, halt = AsyncTextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True), Halt()
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        run = asyncio.get_running_loop().run_in_executor(self.thread, self.generate, ids, request, streamer, halt)
        text, sent, cut = "", 0, []
        try:
            async for piece in streamer:
                text += piece
                cut = [position for stop in stops if (position := text.find(stop)) >= 0]
                # What may be the beginning of a stop is held back.
                end = min(cut) if cut else len(text) - max((len(stop) - 1 for stop in stops), default=0)
                if end > sent:
                    yield text[sent:end]
                    sent = end
                if cut or await connection.is_disconnected():
                    break
            halt.event.set()
            count, reason = await run
            if not cut and text[sent:]:
                yield text[sent:]
            yield count, "stop" if cut else reason
        finally:
            halt.event.set()
            run.cancel()


async def respond(engine: Engine, connection: Request, request: Options, kind: str, shape) -> Response | dict:
    """The whole answer, or a stream of server-sent events; `shape(text)` is a choice's part of either."""
    if request.model != engine.name:
        raise HTTPException(404, f"`model={request.model!r}` is not served here; this is {engine.name!r}.")
    ids = await asyncio.to_thread(engine.encode, request)
    head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.name}

    def choice(text: str, reason: str | None) -> dict:
        return {"choices": [{"index": 0, **shape(text), "logprobs": None, "finish_reason": reason}]}

    async def events() -> AsyncIterator[str]:
        async for piece in engine.answer(connection, ids, request):
            text, reason = (piece, None) if isinstance(piece, str) else ("", piece[1])
            yield f"data: {json.dumps(head | choice(text, reason))}\n\n"
        yield "data: [DONE]\n\n"

    if request.stream:
        head["object"] = "chat.completion.chunk" if kind == "chatcmpl" else "text_completion"
        return StreamingResponse(events(), media_type="text/event-stream")
    try:
        *pieces, (count, reason) = [piece async for piece in engine.answer(connection, ids, request)]
    except asyncio.CancelledError as error:
        raise HTTPException(503, "The server is shutting down.") from error
    usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
    head["object"] = "chat.completion" if kind == "chatcmpl" else "text_completion"
    return head | choice("".join(pieces), reason) | {"usage": usage}


def build_app(engine: Engine, hosts: list[str]) -> FastAPI:
    responses = {status: {"description": "Refused, with a reason."} for status in (400, 404, 413, 422)}
    app = FastAPI(docs_url=None, redoc_url=None, responses=responses, max_body_size=LARGEST_BODY)
    # A web page whose name an attacker points to 127.0.0.1 sends that name.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(RequestValidationError)
    async def explain(connection: Request, error: RequestValidationError) -> Response:
        reasons = {"extra_forbidden": "this server does not do that; leave it out"}
        fields = [".".join(map(str, one["loc"][1:])) or "body" for one in error.errors()]
        said = [reasons.get(one["type"], one["msg"]) for one in error.errors()]
        message = "; ".join(f"`{field}`: {reason}" for field, reason in zip(fields, said, strict=True))
        return refusal(422, message, fields[0])

    @app.exception_handler(HTTPException)
    async def explain_status(connection: Request, error: HTTPException) -> Response:
        return refusal(error.status_code, error.detail)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.post("/v1/completions")
    async def completions(connection: Request, request: CompletionRequest):
        return await respond(engine, connection, request, "cmpl", lambda text: {"text": text})

    @app.post("/v1/chat/completions")
    async def chat(connection: Request, request: ChatRequest):
        part, has_begun = "delta" if request.stream else "message", False

        def said(text: str) -> dict:
            # The space between "Answer:" and the answer, which the chat template puts there itself.
            nonlocal has_begun
            text = text if has_begun else text.removeprefix(" ")
            has_begun = has_begun or bool(text)
            return {part: {"role": "assistant", "content": text}}

        return await respond(engine, connection, request, "chatcmpl", said)

    return app


@command_line
def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Checkpoint folder or Hub id; also the name that requests give.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 opens it to the network.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    hosts = [*LOOPBACK, options.host] if options.host in LOOPBACK else ["*"]
    app = build_app(Engine(options.model, options.device), hosts)
    # A request that is still running then is cancelled.
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
