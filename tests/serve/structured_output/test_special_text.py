"""Text that the tokenizer would not spell with its own bytes: names of special tokens, and Unicode that is
not normalized. A client receives exactly the text that its format demands.
"""

import json
import random
import re

import numpy as np
import pytest

from minicpmv46_jax.generation.detokenize import Detokenizer
from serve.structured_output.grammar import GrammarCompiler, GrammarSpec


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="module")
def detokenizer(tokenizer):
    return Detokenizer(tokenizer)


@pytest.fixture(scope="module")
def texts(tokenizer, detokenizer):
    """Special tokens' names, two in a row, and text that NFC changes."""
    names = [detokenizer.added[i].decode() for i in sorted(detokenizer.special)]
    assert "<box>" in names and tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]
    return [*names, "<box><box>", "<ref>a</ref> <box>1 2 3 4</box>", "cafe\u0301 \u212b"]


@pytest.fixture(scope="module")
def stops(tokenizer):
    return tuple(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


@pytest.fixture(scope="module")
def answer(tokenizer, detokenizer, stops):
    """Returns a function that draws the text of an answer."""
    compiler = GrammarCompiler(
        detokenizer, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], len(tokenizer), stops
    )

    def draw(spec):
        constraint, chosen, tokens = compiler.compile(spec, False), random.Random(0), []
        while len(tokens) < 1000:
            allowed = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), count=len(tokenizer), bitorder="little"))
            token = int(chosen.choice(allowed))
            if token in stops:
                return detokenizer.decode(tokens)
            constraint.advance(token)
            tokens.append(token)
        raise AssertionError(detokenizer.decode(tokens))

    return draw


def test_choice(answer, texts):
    assert [answer(GrammarSpec(choice=(text,))) for text in texts] == texts
    assert answer(GrammarSpec(choice=tuple(texts))) in texts


def test_regex(answer, texts):
    for text in texts:
        pattern = f"{re.escape(text)}[a-z]{{1,5}}{re.escape(text)}".replace("\\ ", " ").replace("\\<", "<")
        assert re.fullmatch(pattern, answer(GrammarSpec(regex=pattern)))


@pytest.mark.parametrize("keyword", ["enum", "const"])
def test_schema(answer, texts, keyword):
    for text in texts:
        value = {"enum": [text, [text]], "const": {"x": text}}[keyword]
        found = json.loads(answer(GrammarSpec(schema={keyword: value})))
        assert found == value if keyword == "const" else found in value


def test_tool_arguments(answer, texts):
    for text in texts:
        schema = {"type": "object", "properties": {"x": {"const": text}}, "required": ["x"], "additionalProperties": False}
        call = answer(GrammarSpec(functions={"f": schema}, parallel=False))
        assert json.loads(call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))["arguments"] == {"x": text}


def test_grammar(answer, texts):
    for text in texts:
        quoted = json.dumps(text, ensure_ascii=False)
        assert re.fullmatch(f"{re.escape(text)}[0-9]", answer(GrammarSpec(grammar=f"start: {quoted} /[0-9]/")))
        assert answer(GrammarSpec(grammar=f"root ::= {quoted}")) == text
