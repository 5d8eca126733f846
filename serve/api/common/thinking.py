"""A budget for thinking: an answer that has thought long enough is told so.

The first job is ended after that many tokens of thought, and a second one goes on from its words with `</think>` behind them. The
tokens that count are the first `budget` ones whatever came joined, so that a seed still gives one answer.
"""

import dataclasses
from collections.abc import AsyncIterator

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.library import Delta
from minicpmv46_jax.processing import Inputs
from serve.api.common.prompt import extended
from serve.engine.engine_client import RequestHandle
from serve.parsers.reasoning import CLOSE, ReasoningParser

ENOUGH = f"\n{CLOSE}\n\n"


class ThinkingBudget:
    """One answer under a budget.

    Args:
      model: for its tokenizer.
      inputs, options: what the first job was given.
      budget: the most tokens to think.
      thinking: whether the prompt ends inside `<think>`.
    """

    def __init__(self, model: MiniCPMV, inputs: Inputs, options: GenerationOptions, budget: int, thinking: bool):
        self._model, self._inputs, self._options, self._budget = model, inputs, options, budget
        self._reasoning = ReasoningParser(thinking)
        self._words = model.detokenizer.stream(options.stop)
        self._ids: list[int] = []
        self._thought = 0

    async def deltas(self, first: RequestHandle, second: RequestHandle) -> AsyncIterator[Delta]:
        """The answer. `first` runs already, `second` is a place in reserve; closing both is the caller's."""
        async for delta in first.deltas():
            text, kept = self._within(delta)
            over = len(kept) < len(delta.tokens)
            reason = None if over else delta.finish_reason
            yield Delta(text + (self._words.finish() if over or reason else ""), kept, reason)
            if over:
                break
        else:
            return
        first.close()
        async for delta in self._told_enough(second):
            yield delta

    def _within(self, delta: Delta) -> tuple[str, tuple]:
        """A step's text and tokens, up to where the budget is spent."""
        text = ""
        for i, token in enumerate(delta.tokens):
            if self._reasoning.thinking:
                if self._thought == self._budget:
                    return text, delta.tokens[:i]
                self._thought += 1
            piece = self._words.push(token.id)
            self._reasoning.push(piece)
            self._ids.append(token.id)
            text += piece
        return text, delta.tokens

    async def _told_enough(self, job: RequestHandle) -> AsyncIterator[Delta]:
        closing = self._model.processor.tokenizer(ENOUGH, add_special_tokens=False)["input_ids"]
        inputs = extended(self._inputs, [*self._ids, *closing])
        most = self._options.max_new_tokens
        left = None if most is None else most - len(self._ids)
        full = len(inputs.token_ids) >= self._model.config.text.max_position_embeddings
        yield Delta(ENOUGH, (), "length" if full or left == 0 else None)
        if not full and left != 0:
            constraint = self._options.constraint and self._options.constraint.copy_from_start(thinking=False)
            job.submit(inputs, dataclasses.replace(self._options, max_new_tokens=left, constraint=constraint))
            async for delta in job.deltas():
                yield delta
