"""From a chat request to the steps of its answers; all routes that answer go through here.

Everything that can be wrong with a request is found before its answers start, so that it gets a status of its own. Preparing
(JSON, pictures, tokens) runs in threads, decoding in the engine's.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.processing.messages import check_overrides
from serve.api.common.errors import ApiError, user_mistakes
from serve.api.common.field_names import Names, renamed
from serve.api.common.media_limits import check_media
from serve.api.common.middleware import RequestRecord, read_body, request_record
from serve.api.common.output_stream import OutputStep, steps
from serve.api.common.prompt import opens_thinking
from serve.api.common.schema import FIELDS, ChatRequest, StreamOptions
from serve.api.common.service import Service
from serve.api.common.thinking import ThinkingBudget
from serve.engine.engine_client import RequestHandle
from serve.parsers import OutputParser
from serve.structured_output.request import compile_constraint

log = logging.getLogger("serve")

SAME_NAMES = (  # here and in `minicpmv46_jax.generation.options`
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop stop_token_ids ignore_eos"
).split()


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """A chat request, and the client's names for its fields where they are others."""

    request: ChatRequest
    names: Names = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """How the client wants its answers. All of a request that outlives its preparation: the rest may be megabytes of base64."""

    n: int
    stream: bool
    stream_options: StreamOptions
    logprobs: bool
    functions: dict[str, dict[str, Any]]
    parallel: bool
    include_reasoning: bool
    restore_newlines: bool
    thinking_budget: int | None

    @classmethod
    def of(cls, request: ChatRequest, restore_newlines: bool) -> "Form":
        """What the request says about it; the server's wish for newlines counts where it says none."""
        return cls(
            request.n,
            request.stream,
            request.stream_options or StreamOptions(),
            request.logprobs,
            request.functions,
            request.parallel_tool_calls,
            request.include_reasoning,
            restore_newlines if request.restore_newlines is None else request.restore_newlines,
            request.thinking_token_budget,
        )


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the engine. `thinking`: whether the prompt ends inside `<think>`."""

    form: OutputOptions
    inputs: Inputs
    options: GenerationOptions
    thinking: bool


class ActiveRequest:
    """A request that has been submitted."""

    def __init__(self, service: Service, record: RequestRecord, prepared: PreparedRequest, jobs: list[RequestHandle]):
        self.service, self.record, self.form, self.stop = service, record, prepared.form, prepared.options.stop
        form = prepared.form
        self._parsers = [
            OutputParser(prepared.thinking, form.functions, form.parallel, form.restore_newlines) for _ in range(form.n)
        ]
        self._jobs = jobs[: form.n]
        self._deltas = [
            self._submit(prepared, i, job, reserve)
            for i, (job, reserve) in enumerate(zip(self._jobs, jobs[form.n :] or self._jobs, strict=True))
        ]

    def _submit(self, prepared: PreparedRequest, index: int, job: RequestHandle, reserve: RequestHandle) -> AsyncIterator:
        """Each answer has a seed and a constraint of its own, the first one the request's."""
        options, budget = prepared.options, self.form.thinking_budget
        if options.seed is not None and index:
            options = dataclasses.replace(options, seed=(options.seed + index + 2**63) % 2**64 - 2**63)
        if options.constraint is not None and index:
            options = dataclasses.replace(options, constraint=options.constraint.copy_from_start())
        job.submit(prepared.inputs, options)
        if budget is None:
            return job.deltas()
        limit = ThinkingBudget(self.service.model, prepared.inputs, options, budget, prepared.thinking)
        return limit.deltas(job, reserve)

    async def steps(self, index: int = 0) -> AsyncIterator[OutputStep]:
        """One answer's."""
        detokenizer = self.service.model.detokenizer
        async for step in steps(self._deltas[index], self._parsers[index], detokenizer, self.form.include_reasoning):
            self.record.completion_tokens += len(step.tokens)
            self.record.reasoning_tokens += step.thought
            yield step
        self._jobs[index].close()  # which stops an answer whose rest nobody wants


async def submit_request(http: Request, cleanup: AsyncExitStack, make: Callable[[bytes], ParsedRequest]) -> ActiveRequest:
    """Takes places, prepares and submits.

    Args:
      http: the request, its body not read yet.
      cleanup: where the places are given back.
      make: a chat request from the body; runs in a thread. Raises ApiError.
    """
    service, record = http.app.state.service, request_record(http)
    body = await read_body(http, service.max_body_bytes)
    jobs: list[RequestHandle] = []
    _reserve(service, cleanup, jobs, 1)
    cleanup.callback(_cancel_on_disconnect(http, jobs).cancel)
    prepared = await service.in_thread(lambda: prepare(service, make(body)))
    del body  # an answer may take far longer than its pictures are needed
    _reserve(service, cleanup, jobs, prepared.form.n * (1 if prepared.form.thinking_budget is None else 2))
    record.prompt_tokens = len(prepared.inputs.token_ids)
    if service.log_prompts:
        prompt = service.model.detokenizer.decode(prepared.inputs.token_ids.tolist(), skip_special_tokens=False)
        log.info("%s prompt %r", record.id, prompt, extra={"fields": {"request_id": record.id, "prompt": prompt}})
    return ActiveRequest(service, record, prepared, jobs)


def _reserve(service: Service, cleanup: AsyncExitStack, jobs: list[RequestHandle], number: int) -> None:
    """Takes places until there are so many, all to be given back."""
    while len(jobs) < number:
        jobs.append(service.engine.reserve())
        cleanup.callback(jobs[-1].close)


def _cancel_on_disconnect(request: Request, jobs: list[RequestHandle]) -> asyncio.Task:
    """Watches the connection once the body has been read, when nothing but its end can come."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for job in jobs:
            job.cancel()

    return asyncio.create_task(watch())


def prepare(service: Service, wanted: ParsedRequest) -> PreparedRequest:
    """All that comes before the engine. Raises ApiError for the client's mistakes."""
    with renamed(wanted.names):
        try:
            return _prepare(service, wanted.request)
        except RecursionError:  # of a template or schema, over what JSON itself could still hold
            raise ApiError(400, "the body is nested too deeply") from None


def _prepare(service: Service, request: ChatRequest) -> PreparedRequest:
    check_model(service, request.model)
    for token in request.logit_bias:
        if int(token) >= service.vocabulary:
            fault = f"logit_bias is for token {token[:50]}, but the vocabulary has {service.vocabulary} tokens"
            raise ApiError(400, fault, "logit_bias")
    with user_mistakes(FIELDS):
        check_overrides(request.mm_processor_kwargs, "mm_processor_kwargs")
        options = service.model.options(**generation_kwargs(request))
    inputs = make_prompt(service, request)
    check_context(len(inputs.token_ids), request, service.context)
    thinking = opens_thinking(service.model, inputs)
    options = dataclasses.replace(options, constraint=compile_constraint(request, service.grammar_compiler, thinking))
    return PreparedRequest(OutputOptions.of(request, service.restore_newlines), inputs, options, thinking)


def check_model(service: Service, name: str) -> None:
    """Refuses a request to a model that is not here."""
    if name not in service.names:
        message = f"the model {name[:200]!r} does not exist here; this server has {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def make_prompt(service: Service, request: ChatRequest) -> Inputs:
    """The request's conversation as tokens and pictures."""
    check_media(request.messages, service.media_limits)
    with user_mistakes(FIELDS, "messages"):
        return service.model.process(_messages(request.messages), **prompt_kwargs(request))


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's and vLLM's newer words in the template's: a developer is the system, `reasoning` is reasoning_content."""
    plain = []
    for message in messages:
        message = {**message, "role": "system"} if message.get("role") == "developer" else message
        if "reasoning" in message and "reasoning_content" not in message:
            message = {**message, "reasoning_content": message["reasoning"]}
        plain.append(message)
    return plain


def generation_kwargs(request: ChatRequest) -> dict[str, Any]:
    """The library's decoding options."""
    return {
        **{name: getattr(request, name) for name in SAME_NAMES},
        "max_new_tokens": request.max_new_tokens,
        "logit_bias": {int(token): bias for token, bias in request.logit_bias.items()},
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
    }


def prompt_kwargs(request: ChatRequest) -> dict[str, Any]:
    """The library's options for making a prompt."""
    opening = not request.continue_final_message if request.add_generation_prompt is None else request.add_generation_prompt
    return {
        "tools": None if request.tool_choice == "none" else request.tools or None,
        "add_generation_prompt": opening,
        "continue_final_message": request.continue_final_message,
        "chat_template_kwargs": request.template_variables,
        **request.mm_processor_kwargs,
    }


def check_context(prompt: int, request: ChatRequest, context: int) -> None:
    """Refuses, as OpenAI and vLLM do, what would not fit."""
    answer = request.max_new_tokens
    if prompt >= context:
        fault = f"your prompt has {prompt} tokens, pictures included, which leaves no room for an answer"
        raise ApiError(400, f"the context holds {context} tokens, but {fault}", "messages", "context_length_exceeded")
    if answer is not None and prompt + answer > context:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        fault = f"your prompt has {prompt} tokens and {name} is {answer}, together {prompt + answer}"
        raise ApiError(400, f"the context holds {context} tokens, but {fault}", name, "context_length_exceeded")
