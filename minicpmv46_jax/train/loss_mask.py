"""The loss mask of a conversation: the tokens of its answers, as the checkpoint's chat template writes them.

An answer begins at the token that generation would produce first. That is after the turn's header and after
the text that the template opens thinking with (an empty `<think></think>` if thinking is off). It ends with
the token that ends a turn. Probe conversations reveal these markers of the template, so a checkpoint with
other markers needs no code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train.batch import Conversation

_PROBE = "ANSWER"


@dataclasses.dataclass(frozen=True)
class AnswerMarkers:
    """Tokens that a chat template puts around answers.

    Attributes:
      header: token ids of the header of an assistant's turn.
      openings: token ids of every possible start of such a turn, header included, longest first.
      end: token id that ends a turn.
    """

    header: tuple[int, ...]
    openings: tuple[tuple[int, ...], ...]
    end: int

    @classmethod
    def from_processor(cls, processor: Processor) -> "AnswerMarkers":
        """Finds the markers of the processor's chat template with probe conversations.

        Raises:
          ValueError: the template puts no text before or after an assistant's turn.
        """
        question = {"role": "user", "content": "?"}

        def text(messages: Sequence[Mapping[str, str]], **options: Any) -> str:
            return processor.tokenizer.apply_chat_template(messages, tokenize=False, **options)

        def ids(part: str) -> tuple[int, ...]:
            return tuple(processor.tokenizer(part, add_special_tokens=False)["input_ids"])

        asked = text([question])
        answered = text([question, {"role": "assistant", "content": _PROBE}, question])
        header, found, rest = answered.removeprefix(asked).partition(_PROBE)
        if not (answered.startswith(asked) and found and header and rest):
            raise ValueError("the chat template puts nothing before or after an assistant's turn: answers cannot be recognised")
        openings = {text([question], add_generation_prompt=True, enable_thinking=on).removeprefix(asked) for on in (True, False)}
        by_length = sorted({ids(header), *map(ids, openings)}, key=len, reverse=True)
        return cls(ids(header), tuple(by_length), ids(rest)[0])

    def answer_mask(self, token_ids: Int32[np.ndarray, " T"]) -> tuple[Bool[np.ndarray, " T"], int]:
        """Returns (True for each token of an answer, its end included; number of answers)."""
        mask, ids = np.zeros(len(token_ids), bool), token_ids.tolist()
        answers = 0
        for at in np.flatnonzero(token_ids == self.header[0]).tolist():
            opening = next((o for o in self.openings if tuple(ids[at : at + len(o)]) == o), None)
            if opening is not None and self.end in ids[at:]:
                mask[at + len(opening) : ids.index(self.end, at) + 1] = True
                answers += 1
        return mask, answers


def conversation(
    processor: Processor,
    markers: AnswerMarkers,
    messages: Sequence[Mapping[str, Any]],
    *,
    where: str = "a conversation",
    last_only: bool = False,
    **options: Any,
) -> Conversation:
    """Returns messages with answers as a conversation to train on.

    Args:
      processor, markers: those of the checkpoint.
      messages: messages as `processing.Processor` takes them, the assistant's turns included.
      where: the conversation's place in the data, for error messages.
      last_only: True to train on the last answer only.
      options: options of `processing.Processor`.

    Raises:
      ValueError: there is no answer, a medium cannot be read, or a text contains the template's own markers.
        The message begins with `where`.
    """
    try:
        inputs = processor(messages, add_generation_prompt=False, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    mask, found = markers.answer_mask(inputs.token_ids)
    expected = sum(message["role"] == "assistant" for message in messages)
    if expected == 0:
        raise ValueError(f"{where}: there is no answer to learn: no message has the role assistant")
    if found != expected:
        raise ValueError(f"{where}: {expected} answers, but {found} in the prompt: some text contains the template's own markers")
    if last_only:
        mask[: np.flatnonzero(~mask & np.roll(mask, -1))[-1] + 1] = False
    return Conversation(inputs, mask, where)
