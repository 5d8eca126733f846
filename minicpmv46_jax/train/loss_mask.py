"""Which tokens of a conversation the model is to say: its answers, as the checkpoint's own template writes them.

An answer begins where generation would: after the turn's header, and after what the template opens thinking with (an empty
`<think></think>` where thinking is off). It ends with the token that ends a turn. How all this looks is read off the template
with probes, so that a checkpoint with other markers needs no code.
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
    """How a template marks answers: token ids of a turn's header, of all that may open an answer (longest first), and its end."""

    header: tuple[int, ...]
    openings: tuple[tuple[int, ...], ...]
    end: int

    @classmethod
    def from_processor(cls, processor: Processor) -> "AnswerMarkers":
        """Read off the processor's template. Raises ValueError where its assistant turns have no header or end."""
        question = {"role": "user", "content": "?"}

        def text(messages: Sequence[Mapping[str, str]], **options: Any) -> str:
            return processor.tokenizer.apply_chat_template(messages, tokenize=False, **options)

        def ids(part: str) -> tuple[int, ...]:
            return tuple(processor.tokenizer(part, add_special_tokens=False)["input_ids"])

        asked = text([question])
        answered = text([question, {"role": "assistant", "content": _PROBE}, question])
        header, found, rest = answered.removeprefix(asked).partition(_PROBE)
        if not (answered.startswith(asked) and found and header and rest):
            raise ValueError("the chat template puts nothing before or after an assistant's turn: answers cannot be told apart")
        openings = {text([question], add_generation_prompt=True, enable_thinking=on).removeprefix(asked) for on in (True, False)}
        by_length = sorted({ids(header), *map(ids, openings)}, key=len, reverse=True)
        return cls(ids(header), tuple(by_length), ids(rest)[0])

    def answer_mask(self, token_ids: Int32[np.ndarray, " T"]) -> tuple[Bool[np.ndarray, " T"], int]:
        """Of each token, whether it is an answer's, its end included; and how many answers there are."""
        learned, ids = np.zeros(len(token_ids), bool), token_ids.tolist()
        answers = 0
        for at in np.flatnonzero(token_ids == self.header[0]).tolist():
            opening = next((o for o in self.openings if tuple(ids[at : at + len(o)]) == o), None)
            if opening is not None and self.end in ids[at:]:
                learned[at + len(opening) : ids.index(self.end, at) + 1] = True
                answers += 1
        return learned, answers


def conversation(
    processor: Processor,
    markers: AnswerMarkers,
    messages: Sequence[Mapping[str, Any]],
    *,
    where: str = "a conversation",
    last_only: bool = False,
    **options: Any,
) -> Conversation:
    """Messages with answers, ready to learn from.

    Args:
      processor, markers: the checkpoint's.
      messages: as `processing.Processor` takes them, the assistant's turns included.
      where: its place in the data, for messages.
      last_only: learn the last answer alone.
      options: as `processing.Processor` takes them.

    Raises:
      ValueError: naming `where` and what is wrong: no answer, a medium that cannot be read, text with the template's own marks.
    """
    try:
        inputs = processor(messages, add_generation_prompt=False, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    learned, found = markers.answer_mask(inputs.token_ids)
    expected = sum(message["role"] == "assistant" for message in messages)
    if expected == 0:
        raise ValueError(f"{where}: there is no answer to learn: no message has the role assistant")
    if found != expected:
        raise ValueError(f"{where}: {expected} answers, but {found} in the prompt: some text contains the template's own marks")
    if last_only:
        learned[: np.flatnonzero(~learned & np.roll(learned, -1))[-1] + 1] = False
    return Conversation(inputs, learned, where)
