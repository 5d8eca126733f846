"""What is printed: words that mean nothing, so that they must be read and cannot be guessed; and numbers."""

import random
import string

from minicpmv46_jax.scenes.scene import is_held_out

CONSONANTS, VOWELS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU"


def word(dice: random.Random, held_out: bool, shortest: int = 2, longest: int = 7) -> str:
    """Capitals: a third of the words any letters, the others such as can be said. Held-out words are never in training."""
    while True:
        length = dice.randint(shortest, longest)
        text = "".join(dice.choices(string.ascii_uppercase, k=length)) if dice.random() < 0.34 else _sayable(dice, length)
        if is_held_out(text) == held_out:
            return text


def number(dice: random.Random, held_out: bool) -> str:
    """Three to five digits, sometimes with a decimal point."""
    while True:
        text = str(dice.randint(100, 99999))
        if dice.random() < 0.3:
            text = f"{text[:-2]}.{text[-2:]}"
        if is_held_out(text) == held_out:
            return text


def _sayable(dice: random.Random, length: int) -> str:
    start = dice.randrange(2)
    return "".join(dice.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
