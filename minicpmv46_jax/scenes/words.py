"""Random words and numbers. The words mean nothing, so they must be read and cannot be guessed."""

import random
import string

from minicpmv46_jax.scenes.scene import is_held_out

CONSONANTS, VOWELS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU"


def word(rng: random.Random, held_out: bool, shortest: int = 2, longest: int = 7) -> str:
    """Returns a word of the split in capitals: a third are random letters, the others pronounceable."""
    while True:
        length = rng.randint(shortest, longest)
        text = "".join(rng.choices(string.ascii_uppercase, k=length)) if rng.random() < 0.34 else _pronounceable(rng, length)
        if is_held_out(text) == held_out:
            return text


def number(rng: random.Random, held_out: bool) -> str:
    """Returns a number of the split: three to five digits, sometimes with a decimal point."""
    while True:
        text = str(rng.randint(100, 99999))
        if rng.random() < 0.3:
            text = f"{text[:-2]}.{text[-2:]}"
        if is_held_out(text) == held_out:
            return text


def _pronounceable(rng: random.Random, length: int) -> str:
    start = rng.randrange(2)
    return "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
