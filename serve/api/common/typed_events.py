"""Base of the routes whose streams are typed events about blocks of output: /v1/messages and
/v1/responses."""

import abc
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any, ClassVar

from serve.api.common.output_stream import CollectedOutput, OutputStep
from serve.api.common.request_pipeline import ActiveRequest
from serve.parsers import Part, Reasoning, ToolCall

Event = dict[str, Any]


class BlockBuilder(abc.ABC):
    """A builder of an answer's blocks, called content blocks or output items, and of the events about them.

    Attributes:
      done: the completed blocks.
      finish_reason: None until the answer ends.
      text_type: the `type` of a block of text.
      reasoning_type: the `type` of a block of reasoning.
    """

    text_type: ClassVar[str]
    reasoning_type: ClassVar[str]

    def __init__(self):
        self.done: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self._open: dict[str, Any] | None = None

    def add(self, step: OutputStep) -> Iterator[Event]:
        """Appends a step and yields its events."""
        for part in step.parts:
            yield from self._add_part(part)
        if step.finish_reason is not None:
            self.finish_reason = step.finish_reason
            yield from self._close()

    def _add_part(self, part: Part) -> Iterator[Event]:
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self.call_events(part)
            return
        kind = self.reasoning_type if isinstance(part, Reasoning) else self.text_type
        if self._open is not None and self._open["type"] != kind:
            yield from self._close()
        if self._open is None:
            self._open = self.new_block(kind)
            yield from self.start_events(self._open)
        yield self.text_event(self._open, part.text)

    def _close(self) -> Iterator[Event]:
        if self._open is not None:
            block, self._open = self._open, None
            yield from self.end_events(block)

    @abc.abstractmethod
    def new_block(self, kind: str) -> dict[str, Any]:
        """Returns an empty block of text or reasoning."""

    @abc.abstractmethod
    def start_events(self, block: dict[str, Any]) -> Iterator[Event]:
        """Yields the events that start a block."""

    @abc.abstractmethod
    def text_event(self, block: dict[str, Any], text: str) -> Event:
        """Appends text to a block and returns its event."""

    @abc.abstractmethod
    def end_events(self, block: dict[str, Any]) -> Iterator[Event]:
        """Appends a block to `done` and yields the events that end it."""

    @abc.abstractmethod
    def call_events(self, call: ToolCall) -> Iterator[Event]:
        """Appends a tool call to `done` and yields its events."""


class TypedStream(abc.ABC):
    """The output of a submitted request with one choice, as one object or as typed events.

    Args:
      request: the submitted request.
      blocks: builds the output's blocks.
    """

    def __init__(self, request: ActiveRequest, blocks: BlockBuilder):
        self._request, self._blocks, self._output = request, blocks, CollectedOutput()

    async def collect(self) -> dict[str, Any]:
        """Returns the response as one object."""
        async for step in self._request.steps():
            for _ in self._add(step):
                pass
        return self.response()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields the response as events; the first comes with the engine's first delta."""
        started = False
        async for step in self._request.steps():
            if not started:
                started = True
                for event in self.start_events():
                    yield event
            for event in self._add(step):
                yield event
        for event in self.end_events():
            yield event

    def _add(self, step: OutputStep) -> Iterator[Event]:
        self._output.add(step)
        return self._blocks.add(step)

    @abc.abstractmethod
    def response(self) -> dict[str, Any]:
        """Returns the response object as of now."""

    @abc.abstractmethod
    def start_events(self) -> Iterable[Event]:
        """Returns the events before the first block."""

    @abc.abstractmethod
    def end_events(self) -> Iterable[Event]:
        """Returns the events after the last block."""
