"""A small vocabulary: every byte, and the words of a closed set of texts as one token each.

The words are merged from their first letter on, a letter at a time, so the tokens are the beginnings of the words (a trie) and a
text with other words falls into bytes where it leaves the trie. Printed capitals and digits are always single bytes, so that
reading is spelling.
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
# Qwen2's: a word takes the character before it along, digits stand alone (transformers: models/qwen2, PRETOKENIZE_REGEX).
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = re.compile(r"([^A-Za-z0-9][A-Z]?|[A-Z])[a-z]+| ?[^\sA-Za-z0-9]+")
# Words with no sign or capital before them, which template and functions are made of. Their merges may cut into one another's,
# so this order matters: a test holds each to one token.
BARE_WORDS = (
    "assistant system user string function parameters properties description object integer type name value "
    "shape colour count place text pick move save report tools"
).split()
NUM_SCENES = 1000  # scenes whose texts are looked through
MIN_COUNT = 3  # a word that comes so often is one token

Merge = tuple[str, str]


def bytes_to_unicode() -> list[str]:
    """GPT-2's printable letter for each byte: itself where it prints, else one of those from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in prints else next(stand_ins)) for byte in range(BYTES)]


def scene_words() -> list[str]:
    """The words of the scenes' conversations that begin with a sign or capital; then the others."""
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    found: dict[str, int] = {}
    for text in _texts():
        for word, _ in split.pre_tokenize_str(text):
            if WORD.fullmatch(word):
                found[word] = found.get(word, 0) + 1
    return [*sorted(word for word, count in found.items() if count >= MIN_COUNT), *BARE_WORDS]


def _texts() -> Iterable[str]:
    """Each scene as one conversation about all its questions, and what announces the functions."""
    template = jinja2.Environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    even = dict.fromkeys(scenes.KINDS, 1.0)
    for seed in range(NUM_SCENES):
        scene = scenes.draw(seed, mix=even)
        tools = [json.loads(tool) for tool in scene.tools]
        for turn in scene.turns:
            spoken = scenes.messages(dataclasses.replace(scene, media=()), [turn])
            yield re.sub(r"<\|\w+\|>", "\n", template.render(messages=spoken, tools=tools))


def merges(words: Iterable[str]) -> list[Merge]:
    """What spells the words: the beginnings of each, once; and a pair of line breaks."""
    letters = bytes_to_unicode()
    out: dict[Merge, None] = {}
    for word in words:
        spelt = [letters[byte] for byte in word.encode()]
        for end in range(1, len(spelt)):
            out["".join(spelt[:end]), spelt[end]] = None
    newline = letters[ord("\n")]
    return [*out, (newline, newline)]
