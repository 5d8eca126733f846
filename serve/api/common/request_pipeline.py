"""The pipeline of all generating routes: body -> `ParsedRequest` -> `PreparedRequest` -> `ActiveRequest` ->
deltas or steps.

Every error of a request is found before its first token, so that it gets its own HTTP status. JSON, template
and tokenizer run in threads, media in tasks and worker processes, generation in the engine's thread. What is
cheap to check is checked first: the text's tokens before any download, sizes of media before any is decoded.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

from fastapi import Request

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs, PromptPlan, PromptTooLong
from minicpmv46_jax.processing.media_job import MediaJob
from minicpmv46_jax.processing.messages import check_overrides
from serve.api.common.errors import ApiError, value_errors_as_400
from serve.api.common.field_names import Names, rename, renamed
from serve.api.common.media_limits import check_media
from serve.api.common.middleware import RequestRecord, read_body, request_record
from serve.api.common.output_stream import OutputStep, output_steps
from serve.api.common.prompt import opens_thinking
from serve.api.common.schema import CHAT_FIELDS, ChatRequest, GenerationRequest, StreamOptions
from serve.api.common.service import Service
from serve.api.common.thinking import ThinkingBudget
from serve.engine.engine_client import Cancelled, EngineStopped, RequestHandle
from serve.multimodal.media_loader import layouts
from serve.parsers import OutputParser
from serve.runtime.budget import RequestMemory
from serve.structured_output.grammar import GrammarConstraint
from serve.structured_output.request import StructuredOutputError, compile_constraint_bounded

log = logging.getLogger("serve")

T = TypeVar("T")
Prepare = Callable[[Service, bytes, RequestMemory], Awaitable[T]]
"""Prepares a request from its body. Raises ApiError."""

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
    """A request ready for the engine. `thinking` is True if the prompt ends inside `<think>`; cached prefixes
    and images are shared only among requests with the same `cache_salt`."""

    output: OutputOptions
    inputs: Inputs
    options: GenerationOptions
    thinking: bool = False
    cache_salt: str = ""


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
        handle.submit(prepared.inputs, options, prepared.cache_salt)
        if budget is None:
            return handle.deltas()
        limited = ThinkingBudget(self.service.model, prepared.inputs, options, budget, prepared.thinking, prepared.cache_salt)
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


async def submit_request(http: Request, cleanup: AsyncExitStack, prepare: Prepare[PreparedRequest]) -> ActiveRequest:
    """Reserves capacity, prepares a request and submits it.

    Args:
      http: the HTTP request, its body not read yet.
      cleanup: closes the reserved handles.
      prepare: returns the prepared request.
    """
    service, record = http.app.state.service, request_record(http)
    prepared, handles = await prepare_body(http, cleanup, prepare)
    _reserve(service, cleanup, handles, prepared.output.num_handles)
    record.prompt_tokens = len(prepared.inputs.token_ids)
    if service.log_prompts:
        prompt = service.model.detokenizer.decode(prepared.inputs.token_ids.tolist(), skip_special_tokens=False)
        log.info("%s prompt %r", record.id, prompt, extra={"fields": {"request_id": record.id, "prompt": prompt}})
    return ActiveRequest(service, record, prepared, handles)


async def prepare_body(http: Request, cleanup: AsyncExitStack, prepare: Prepare[T]) -> tuple[T, list[RequestHandle]]:
    """Reads a request's body, reserves capacity and runs `prepare`, which ends if the client disconnects.

    Args:
      http: the HTTP request, its body not read yet.
      cleanup: frees the capacity and the memory.
      prepare: takes the service, the body and the request's memory.

    Returns:
      The result, and a list of one reserved handle.
    """
    service = http.app.state.service
    memory = service.request_memory()
    cleanup.callback(memory.close)
    body = await read_body(http, service.max_body_bytes, memory)
    handles: list[RequestHandle] = []
    _reserve(service, cleanup, handles, 1)
    preparing = asyncio.ensure_future(prepare(service, body, memory))
    service.preparing.add(preparing)
    preparing.add_done_callback(service.preparing.discard)
    cleanup.callback(_cancel_on_disconnect(http, handles, preparing).cancel)
    del body  # generation may take far longer than the body's images are needed
    try:
        prepared = await preparing
    except asyncio.CancelledError:
        if handles[0].cancelled:
            raise Cancelled from None
        if service.engine.stopping:
            raise EngineStopped from None
        raise
    memory.drop_sources()
    return prepared, handles


def _reserve(service: Service, cleanup: AsyncExitStack, handles: list[RequestHandle], number: int) -> None:
    """Reserves handles until there are `number`; `cleanup` closes them."""
    while len(handles) < number:
        handles.append(service.engine.reserve())
        cleanup.callback(handles[-1].close)


def _cancel_on_disconnect(request: Request, handles: list[RequestHandle], preparing: asyncio.Future) -> asyncio.Task:
    """Starts a task that cancels the preparation and the handles on disconnect. After the body, the
    connection receives nothing else."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for handle in handles:
            handle.cancel()
        preparing.cancel()

    return asyncio.create_task(watch())


async def prepare_chat(
    service: Service, parse: Callable[[bytes], ParsedRequest], body: bytes, memory: RequestMemory
) -> PreparedRequest:
    """Prepares a chat request for the engine. Raises ApiError for errors of the client.

    Args:
      service: the service.
      parse: checks the body; runs in a thread.
      body: the body.
      memory: counts the request's media.
    """
    size = len(body)
    parsed, options = await service.run_check(_check_chat, service, parse, body, size=size)
    del body
    request = parsed.request
    with client_errors(parsed):
        plan, thinking = await service.run_in_thread(_plan_chat, service, request, size=size)
        inputs = await build_inputs(service, plan, memory, lambda number: _check_room(service, request, number))
        options = dataclasses.replace(options, constraint=await _constraint(service, parsed, thinking))
    output = OutputOptions.from_chat(request, service.restore_newlines)
    return PreparedRequest(output, inputs, options, thinking, request.cache_salt)


def _check_chat(
    service: Service, parse: Callable[[bytes], ParsedRequest], body: bytes
) -> tuple[ParsedRequest, GenerationOptions]:
    parsed = parse(body)
    request = parsed.request
    with client_errors(parsed):
        check_model(service, request.model)
        with value_errors_as_400(CHAT_FIELDS):
            check_overrides(request.mm_processor_kwargs, "mm_processor_kwargs")
        check_media(request.messages, service.media_limits)
        return parsed, make_options(service, request)


def _plan_chat(service: Service, request: ChatRequest) -> tuple[PromptPlan, bool]:
    """Returns the prompt, and whether it ends inside `<think>`."""
    plan = plan_prompt(service, request)
    _check_room(service, request, len(plan.token_ids))
    return plan, opens_thinking(service.model, plan.token_ids)


@contextmanager
def client_errors(parsed: ParsedRequest) -> Iterator[None]:
    """Puts the client's field names into errors. Nesting that JSON accepts may be too deep for a template."""
    with renamed(parsed.names):
        try:
            yield
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None


def _check_room(service: Service, request: ChatRequest, num_prompt_tokens: int) -> None:
    """Raises ApiError 400 if the prompt and its answer exceed the context."""
    check_prompt_length(num_prompt_tokens, service.max_model_len)
    if (limit := request.max_new_tokens) is not None:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        check_context(num_prompt_tokens, limit, service.max_model_len, name, param=name)


async def _constraint(service: Service, parsed: ParsedRequest, thinking: bool) -> GrammarConstraint | None:
    """Returns the request's constraint, whose errors name the client's field."""
    try:
        constraint = await compile_constraint_bounded(parsed.request, service.grammar_compiler, thinking)
    except StructuredOutputError as error:
        raise ApiError(400, str(error), error.field, error.code) from None
    if constraint is not None and constraint.field is not None:
        constraint.field = rename(constraint.field, parsed.names)
    return constraint


def check_model(service: Service, name: str) -> None:
    """Raises ApiError 404 unless the service serves a model of that name."""
    if name not in service.names:
        message = f"the model {name[:200]!r} does not exist here; this server has {service.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def plan_prompt(service: Service, request: ChatRequest) -> PromptPlan:
    """Renders and tokenises a conversation. Raises ApiError for errors of the client."""
    with value_errors_as_400(CHAT_FIELDS, "messages"):
        try:
            options = {**prompt_kwargs(request), "max_tokens": service.max_model_len}
            return service.model.plan(_template_messages(request.messages), **options)
        except PromptTooLong as error:
            raise context_exceeded(service, str(error), "messages") from None


async def measure_prompt(
    service: Service, plan: PromptPlan, memory: RequestMemory, check: Callable[[int], None]
) -> tuple[list[MediaJob], int]:
    """Fetches and measures a prompt's media. Raises ApiError for errors of the client.

    Args:
      service: the service.
      plan: the prompt.
      memory: counts the downloads.
      check: raises ApiError if it has too many tokens; takes their number, images included.

    Returns:
      The jobs of its media, and the number of tokens.
    """
    processor = service.model.processor
    if not plan.media:
        return [], len(plan.token_ids)
    with value_errors_as_400(CHAT_FIELDS, "messages"):
        jobs = await service.media.measure(processor, plan, memory)
        num_tokens = await service.run_in_thread(processor.count_tokens, plan, [layouts(job) for job in jobs])
    check(num_tokens)
    return jobs, num_tokens


async def build_inputs(
    service: Service, plan: PromptPlan, memory: RequestMemory, check: Callable[[int], None] = lambda number: None
) -> Inputs:
    """Loads a prompt's media and returns the model's inputs. Raises ApiError; see `measure_prompt`."""
    processor = service.model.processor
    if not plan.media:
        return processor.assemble(plan, [])
    jobs, _ = await measure_prompt(service, plan, memory, check)
    with value_errors_as_400(CHAT_FIELDS, "messages"):
        images = await service.media.process(plan, jobs, memory)
    del jobs  # their sources are no longer needed
    inputs = await service.run_in_thread(processor.assemble, plan, images)
    check(len(inputs.token_ids))  # a video may have other frames than its header states
    return inputs


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


def context_exceeded(service: Service, fault: str, param: str) -> ApiError:
    """Returns status 400 for a text that is too long to be tokenised."""
    message = f"the context holds {service.max_model_len} tokens, but {fault}"
    return ApiError(400, message, param, "context_length_exceeded")


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
