"""Thinking budget: ends the reasoning of an answer after a number of tokens.

The first request ends after `budget` reasoning tokens. A second request continues its text after an appended
`</think>`. Exactly the first `budget` reasoning tokens count, whatever the size of the deltas, so a seed
still gives one answer.
"""

import dataclasses
from collections.abc import AsyncIterator

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs
from serve.api.common.prompt import append_tokens
from serve.engine.engine_client import RequestHandle
from serve.parsers.reasoning import CLOSE, ReasoningParser
from serve.structured_output.grammar import GrammarConstraint

END_OF_REASONING = f"\n{CLOSE}\n\n"


class ThinkingBudget:
    """The budget of one choice.

    Args:
      model: the model, for its tokenizer.
      inputs: prompt of the first request.
      options: generation options of the first request.
      budget: maximum number of reasoning tokens.
      thinking: True if the prompt ends inside `<think>`.
      cache_salt: of the first request; the second has the same.
    """

    def __init__(
        self, model: MiniCPMV, inputs: Inputs, options: GenerationOptions, budget: int, thinking: bool, cache_salt: str = ""
    ):
        self._model, self._inputs, self._options, self._budget = model, inputs, options, budget
        self._cache_salt = cache_salt
        self._reasoning = ReasoningParser(thinking)
        self._text = model.detokenizer.stream(options.stop)
        self._token_ids: list[int] = []
        self._num_reasoning_tokens = 0

    async def deltas(self, first: RequestHandle, second: RequestHandle) -> AsyncIterator[Delta]:
        """Yields the deltas of the choice. The caller closes both handles.

        Args:
          first: handle of the submitted request.
          second: a reserved handle, submitted if the budget is exceeded.
        """
        async for delta in first.deltas():
            text, tokens = self._take_within_budget(delta)
            exceeded = len(tokens) < len(delta.tokens)
            reason = None if exceeded else delta.finish_reason
            yield Delta(text + (self._text.finish() if exceeded or reason else ""), tokens, reason)
            if exceeded:
                break
        else:
            return
        first.close()
        async for delta in self._continue(second):
            yield delta

    def _take_within_budget(self, delta: Delta) -> tuple[str, tuple]:
        """Returns a delta's text and tokens up to the point where the budget is exceeded."""
        text = ""
        for i, token in enumerate(delta.tokens):
            if self._reasoning.thinking:
                if self._num_reasoning_tokens == self._budget:
                    return text, delta.tokens[:i]
                self._num_reasoning_tokens += 1
            piece = self._text.push(token.id)
            self._reasoning.push(piece)
            self._token_ids.append(token.id)
            text += piece
        return text, delta.tokens

    async def _continue(self, handle: RequestHandle) -> AsyncIterator[Delta]:
        """Closes the reasoning and generates the answer after it.

        Without room for an answer's first token, in the engine's context or in `max_new_tokens`, it ends with
        finish_reason "length".
        """
        closing = self._model.processor.tokenizer(END_OF_REASONING, add_special_tokens=False)["input_ids"]
        inputs = append_tokens(self._inputs, [*self._token_ids, *closing])
        limit = self._options.max_new_tokens
        tokens_left = None if limit is None else limit - len(self._token_ids)
        full = len(inputs.token_ids) >= handle.max_model_len
        yield Delta(END_OF_REASONING, (), "length" if full or tokens_left == 0 else None)
        if not full and tokens_left != 0:
            constraint = self._options.constraint
            if constraint is not None:
                assert isinstance(constraint, GrammarConstraint)
                constraint = constraint.copy_from_start(thinking=False)
            options = dataclasses.replace(self._options, max_new_tokens=tokens_left, constraint=constraint)
            handle.submit(inputs, options, self._cache_salt)
            async for delta in handle.deltas():
                yield delta
