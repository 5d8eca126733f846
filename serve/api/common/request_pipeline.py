"""The pipeline of all generating routes: body -> `ParsedRequest` -> `PreparedRequest` -> `ActiveRequest` ->
deltas or steps.

Every error of a request is found before its first token, so that it gets its own HTTP status. Preparation
(JSON, images, tokens) runs in threads; generation runs in the engine's thread.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Request

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.processing.messages import check_overrides
from serve.api.common.errors import ApiError, value_errors_as_400
from serve.api.common.field_names import Names, renamed
from serve.api.common.media_limits import check_media
from serve.api.common.middleware import RequestRecord, read_body, request_record
from serve.api.common.output_stream import OutputStep, output_steps
from serve.api.common.prompt import opens_thinking
from serve.api.common.schema import CHAT_FIELDS, ChatRequest, GenerationRequest, StreamOptions
from serve.api.common.service import Service
from serve.api.common.thinking import ThinkingBudget
from serve.engine.engine_client import RequestHandle
from serve.parsers import OutputParser
from serve.structured_output.grammar import GrammarConstraint
from serve.structured_output.request import StructuredOutputError, compile_constraint

log = logging.getLogger("serve")

GENERATION_FIELDS = (  # same names in requests and in `minicpmv46_jax.generation.options`
    "temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop stop_token_ids ignore_eos"
).split()


@dataclasses.dataclass(frozen=True)
class ParsedRequest:
    """A checked chat request, and the client's names for its fields where they differ."""

    request: ChatRequest
    names: Names = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """A request's options for its response: the part that outlives preparation, the rest may be megabytes of
    base64.

    Attributes:
      n: number of choices.
      stream: True for server-sent events.
      stream_options: options of the stream.
      logprobs: True if the response has log probabilities.
      functions: the functions that may be called: the JSON schema of each one's parameters, by name.
      parallel_tool_calls: True if a choice may have several calls.
      include_reasoning: False to leave reasoning out of the response.
      restore_newlines: True to convert literal backslash-n to line breaks.
      thinking_budget: maximum reasoning tokens per choice; None for no limit.
    """

    n: int
    stream: bool
    stream_options: StreamOptions
    logprobs: bool
    functions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    restore_newlines: bool = False
    thinking_budget: int | None = None

    @classmethod
    def from_request(cls, request: GenerationRequest) -> "OutputOptions":
        """Returns the options that chat and text completions share."""
        stream_options = request.stream_options or StreamOptions()
        return cls(request.n, request.stream, stream_options, request.num_logprobs is not None)

    @classmethod
    def from_chat(cls, request: ChatRequest, restore_newlines: bool) -> "OutputOptions":
        """Returns a chat request's options.

        Args:
          request: the request.
          restore_newlines: the server's default, for requests without the field.
        """
        return dataclasses.replace(
            cls.from_request(request),
            functions=request.functions,
            parallel_tool_calls=request.parallel_tool_calls,
            include_reasoning=request.include_reasoning,
            restore_newlines=restore_newlines if request.restore_newlines is None else request.restore_newlines,
            thinking_budget=request.thinking_token_budget,
        )

    @property
    def num_handles(self) -> int:
        """Engine handles that the request reserves: a thinking budget may submit a second request per
        choice."""
        return self.n * (1 if self.thinking_budget is None else 2)


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A request ready for the engine. `thinking` is True if the prompt ends inside `<think>`."""

    output: OutputOptions
    inputs: Inputs
    options: GenerationOptions
    thinking: bool = False


class ActiveRequest:
    """A submitted request.

    Args:
      service: the service.
      record: the request's record; token counts are added to it.
      prepared: the prepared request.
      handles: reserved handles, `prepared.output.num_handles` of them.
    """

    def __init__(self, service: Service, record: RequestRecord, prepared: PreparedRequest, handles: list[RequestHandle]):
        self.service, self.record, self.output, self.stop = service, record, prepared.output, prepared.options.stop
        self._thinking = prepared.thinking
        n = self.output.n
        self._handles = handles[:n]
        self._deltas = [
            self._submit(prepared, i, handle, reserve)
            for i, (handle, reserve) in enumerate(zip(self._handles, handles[n:] or self._handles, strict=True))
        ]

    def _submit(
        self, prepared: PreparedRequest, index: int, handle: RequestHandle, reserve: RequestHandle
    ) -> AsyncIterator[Delta]:
        """Submits one choice. Later choices get their own seed and constraint, derived from the request's."""
        options, budget = prepared.options, self.output.thinking_budget
        if options.seed is not None and index:
            options = dataclasses.replace(options, seed=(options.seed + index + 2**63) % 2**64 - 2**63)
        if options.constraint is not None and index:
            assert isinstance(options.constraint, GrammarConstraint)
            options = dataclasses.replace(options, constraint=options.constraint.copy_from_start())
        handle.submit(prepared.inputs, options)
        if budget is None:
            return handle.deltas()
        limited = ThinkingBudget(self.service.model, prepared.inputs, options, budget, prepared.thinking)
        return limited.deltas(handle, reserve)

    async def deltas(self, index: int = 0) -> AsyncIterator[Delta]:
        """Yields the deltas of one choice and counts its tokens."""
        async for delta in self._deltas[index]:
            self.record.completion_tokens += len(delta.tokens)
            yield delta

    async def steps(self, index: int = 0) -> AsyncIterator[OutputStep]:
        """Yields the parsed steps of one choice and counts its tokens."""
        output = self.output
        parser = OutputParser(self._thinking, output.functions, output.parallel_tool_calls, output.restore_newlines)
        detokenizer = self.service.model.detokenizer
        async for step in output_steps(self.deltas(index), parser, detokenizer, output.include_reasoning):
            self.record.reasoning_tokens += step.num_reasoning_tokens
            yield step
        self._handles[index].close()  # aborts a choice that the parser has ended before the engine


async def submit_request(
    http: Request, cleanup: AsyncExitStack, prepare: Callable[[Service, bytes], PreparedRequest]
) -> ActiveRequest:
    """Reserves capacity, prepares a request and submits it.

    Args:
      http: the HTTP request, its body not read yet.
      cleanup: closes the reserved handles.
      prepare: returns the prepared request from the service and the body; runs in a thread. Raises ApiError.
    """
    service, record = http.app.state.service, request_record(http)
    body = await read_body(http, service.max_body_bytes)
    handles: list[RequestHandle] = []
    _reserve(service, cleanup, handles, 1)
    cleanup.callback(_cancel_on_disconnect(http, handles).cancel)
    prepared = await service.run_in_thread(prepare, service, body)
    del body  # generation may take far longer than the body's images are needed
    _reserve(service, cleanup, handles, prepared.output.num_handles)
    record.prompt_tokens = len(prepared.inputs.token_ids)
    if service.log_prompts:
        prompt = service.model.detokenizer.decode(prepared.inputs.token_ids.tolist(), skip_special_tokens=False)
        log.info("%s prompt %r", record.id, prompt, extra={"fields": {"request_id": record.id, "prompt": prompt}})
    return ActiveRequest(service, record, prepared, handles)


def _reserve(service: Service, cleanup: AsyncExitStack, handles: list[RequestHandle], number: int) -> None:
    """Reserves handles until there are `number`; `cleanup` closes them."""
    while len(handles) < number:
        handles.append(service.engine.reserve())
        cleanup.callback(handles[-1].close)


def _cancel_on_disconnect(request: Request, handles: list[RequestHandle]) -> asyncio.Task:
    """Starts a task that cancels the handles on disconnect. After the body, the connection receives nothing
    else."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for handle in handles:
            handle.cancel()

    return asyncio.create_task(watch())


def prepare_chat(service: Service, parsed: ParsedRequest) -> PreparedRequest:
    """Prepares a chat request for the engine. Raises ApiError for errors of the client."""
    with renamed(parsed.names):
        try:
            return _prepare_chat(service, parsed.request)
        except RecursionError:  # raised by a template or schema on nesting that JSON itself still accepts
            raise ApiError(400, "the body is nested too deeply") from None


def _prepare_chat(service: Service, request: ChatRequest) -> PreparedRequest:
    check_model(service, request.model)
    with value_errors_as_400(CHAT_FIELDS):
        check_overrides(request.mm_processor_kwargs, "mm_processor_kwargs")
    options = make_options(service, request)
    inputs = make_prompt(service, request)
    check_prompt_length(len(inputs.token_ids), service.max_model_len)
    if (limit := request.max_new_tokens) is not None:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        check_context(len(inputs.token_ids), limit, service.max_model_len, name, param=name)
    thinking = opens_thinking(service.model, inputs)
    options = dataclasses.replace(options, constraint=_constraint(service, request, thinking))
    return PreparedRequest(OutputOptions.from_chat(request, service.restore_newlines), inputs, options, thinking)


def _constraint(service: Service, request: ChatRequest, thinking: bool) -> GrammarConstraint | None:
    try:
        return compile_constraint(request, service.grammar_compiler, thinking)
    except StructuredOutputError as error:
        raise ApiError(400, str(error), error.field, error.code) from None


def check_model(service: Service, name: str) -> None:
    """Raises ApiError 404 unless the service serves a model of that name."""
    if name not in service.names:
        message = f"the model {name[:200]!r} does not exist here; this server has {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def make_prompt(service: Service, request: ChatRequest) -> Inputs:
    """Returns a conversation's tokens and images. Raises ApiError for errors of the client."""
    check_media(request.messages, service.media_limits)
    with value_errors_as_400(CHAT_FIELDS, "messages"):
        return service.model.process(_template_messages(request.messages), **prompt_kwargs(request))


def _template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Converts newer names of OpenAI and vLLM to the template's: role developer to system, `reasoning` to
    `reasoning_content`."""
    converted = []
    for message in messages:
        message = {**message, "role": "system"} if message.get("role") == "developer" else message
        if "reasoning" in message and "reasoning_content" not in message:
            message = {**message, "reasoning_content": message["reasoning"]}
        converted.append(message)
    return converted


def make_options(service: Service, request: GenerationRequest) -> GenerationOptions:
    """Returns a request's generation options. Raises ApiError for errors of the client."""
    for token in request.logit_bias:
        if int(token) >= service.vocab_size:
            message = f"logit_bias is for token {token[:50]}, but the vocabulary has {service.vocab_size} tokens"
            raise ApiError(400, message, "logit_bias")
    with value_errors_as_400(type(request).model_fields):
        return service.model.options(**generation_kwargs(request))


def generation_kwargs(request: GenerationRequest) -> dict[str, Any]:
    """Returns the arguments of `MiniCPMV.options`."""
    return {
        **{name: getattr(request, name) for name in GENERATION_FIELDS},
        "max_new_tokens": request.max_new_tokens,
        "logit_bias": {int(token): bias for token, bias in request.logit_bias.items()},
        "logprobs": request.num_logprobs,
    }


def prompt_kwargs(request: ChatRequest) -> dict[str, Any]:
    """Returns the arguments of `MiniCPMV.process`."""
    opening = not request.continue_final_message if request.add_generation_prompt is None else request.add_generation_prompt
    return {
        "tools": None if request.tool_choice == "none" else request.tools or None,
        "add_generation_prompt": opening,
        "continue_final_message": request.continue_final_message,
        "chat_template_kwargs": request.template_variables,
        **request.mm_processor_kwargs,
    }


def check_prompt_length(num_prompt_tokens: int, max_model_len: int) -> None:
    """Raises ApiError 400 if a conversation leaves no room for an answer, as OpenAI and vLLM do."""
    if num_prompt_tokens >= max_model_len:
        fault = f"your prompt has {num_prompt_tokens} tokens, images included, which leaves no room for an answer"
        message = f"the context holds {max_model_len} tokens, but {fault}"
        raise ApiError(400, message, "messages", "context_length_exceeded")


def check_context(num_prompt_tokens: int, max_new_tokens: int, max_model_len: int, limit_name: str, param: str) -> None:
    """Raises ApiError 400 if a prompt and its longest answer exceed the context, as OpenAI and vLLM do.

    Args:
      num_prompt_tokens: tokens of the prompt.
      max_new_tokens: maximum tokens of the answer.
      max_model_len: tokens that the context holds.
      limit_name: the field that sets `max_new_tokens`.
      param: the field that the error names as its parameter.
    """
    total = num_prompt_tokens + max_new_tokens
    if total > max_model_len:
        fault = f"your prompt has {num_prompt_tokens} tokens and {limit_name} is {max_new_tokens}, together {total}"
        raise ApiError(400, f"the context holds {max_model_len} tokens, but {fault}", param, "context_length_exceeded")
