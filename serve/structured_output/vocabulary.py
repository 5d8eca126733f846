"""A model's vocabulary as llguidance's tokenizer."""

import dataclasses
from collections.abc import Callable

import llguidance

from minicpmv46_jax.generation.detokenize import Detokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The bytes of all tokens. It can be pickled.

    Attributes:
      tokens: each token's bytes; those of a special token never occur in UTF-8, so that no text matches it.
      special_token_ids: tokens that are not text. The detokenizer drops them, so a client never sees them.
      stop_token_ids: tokens that end an answer; llguidance takes the first as its end-of-sequence token.
    """

    tokens: list[bytes]
    special_token_ids: list[int]
    stop_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, detokenizer: Detokenizer, vocab_size: int, stop_token_ids: tuple[int, ...]) -> "Vocabulary":
        """Returns the vocabulary of a model."""
        special = detokenizer.special | set(stop_token_ids)
        tokens = [b"\xff" + str(i).encode() if i in special else detokenizer.token_bytes(i) for i in range(vocab_size)]
        return cls(tokens, sorted(special), stop_token_ids)

    def tokenizer(self, tokenize: Callable[[str], list[int]] | None = None) -> llguidance.LLTokenizer:
        """Returns llguidance's tokenizer.

        Args:
          tokenize: converts text to token ids, for bytes that a grammar forces; None takes the longest token
            at each place.
        """
        interface = _Tokenizer(self, tokenize)
        interface.greedy = llguidance.LLTokenizer(llguidance.TokenizerWrapper(interface), eos_token=list(self.stop_token_ids))
        return interface.greedy


class _Tokenizer:
    """The tokenizer interface that llguidance expects."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, tokenize: Callable[[str], list[int]] | None):
        self.tokens, self.special_token_ids = vocabulary.tokens, vocabulary.special_token_ids
        self.eos_token_id = vocabulary.stop_token_ids[0]
        self._tokenize = tokenize
        self.greedy: llguidance.LLTokenizer | None = None  # set at once; llguidance does not tokenize before

    def __call__(self, text: str) -> list[int]:
        """Returns tokens whose bytes are exactly those of the text.

        The model's tokenizer turns a special token's name into that token, which is no text, and normalizes
        Unicode. Such text is spelled with the longest tokens of its bytes.
        """
        data = text.encode()
        if self._tokenize is not None:
            token_ids = self._tokenize(text)
            if b"".join(self.tokens[i] for i in token_ids) == data:
                return token_ids
        assert self.greedy is not None
        return self.greedy.greedy_tokenize(text)
