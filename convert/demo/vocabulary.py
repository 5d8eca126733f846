"""A small vocabulary: every byte, and one token for each word of a closed set of texts.

A word is merged letter by letter from its first letter on, so the tokens are the prefixes of words (a trie).
Other words fall into bytes where they leave the trie. Printed capitals and digits are always single bytes, so
the model reads print letter by letter.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

import jinja2
from tokenizers import Regex, pre_tokenizers

from minicpmv46_jax import scenes

TEMPLATE = Path(__file__).with_name("demo.jinja")
BYTES = 256
# Qwen2's pattern: a word includes the character before it; each digit is its own piece (transformers:
# models/qwen2, PRETOKENIZE_REGEX).
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = re.compile(r"([^A-Za-z0-9][A-Z]?|[A-Z])[a-z]+| ?[^\sA-Za-z0-9]+")
# Words of template and functions that have no sign or capital before them. The merges of one may split
# another, so their order matters; a test checks that each is one token.
BARE_WORDS = (
    "assistant system user string function parameters properties description object integer type name value "
    "shape colour count place text pick move save report tools"
).split()
NUM_SCENES = 1000  # scenes whose texts are searched for words
MIN_COUNT = 3  # occurrences from which a word becomes a token

Merge = tuple[str, str]


def bytes_to_unicode() -> list[str]:
    """Returns GPT-2's letter for each byte: the byte if it is printable, else a code point from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in prints else next(stand_ins)) for byte in range(BYTES)]


def scene_words() -> list[str]:
    """Returns the conversations' frequent words that begin with a sign or capital, then `BARE_WORDS`."""
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    found: dict[str, int] = {}
    for text in _texts():
        for word, _ in split.pre_tokenize_str(text):
            if WORD.fullmatch(word):
                found[word] = found.get(word, 0) + 1
    return [*sorted(word for word, count in found.items() if count >= MIN_COUNT), *BARE_WORDS]


def _texts() -> Iterable[str]:
    """Yields each question's rendered conversation and tools, with line breaks for special tokens."""
    template = jinja2.Environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    even = dict.fromkeys(scenes.KINDS, 1.0)
    for seed in range(NUM_SCENES):
        scene = scenes.draw(seed, mix=even)
        tools = [json.loads(tool) for tool in scene.tools]
        for turn in scene.turns:
            spoken = scenes.messages(dataclasses.replace(scene, media=()), [turn])
            yield re.sub(r"<\|\w+\|>", "\n", template.render(messages=spoken, tools=tools))


def merges(words: Iterable[str]) -> list[Merge]:
    """Returns the merges that build every prefix of the words, each once, and a pair of line breaks."""
    letters = bytes_to_unicode()
    out: dict[Merge, None] = {}
    for word in words:
        spelt = [letters[byte] for byte in word.encode()]
        for end in range(1, len(spelt)):
            out["".join(spelt[:end]), spelt[end]] = None
    newline = letters[ord("\n")]
    return [*out, (newline, newline)]
