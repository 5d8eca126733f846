"""Constrained answers against a sampler that wants something else: what comes is always what was asked for."""

import json
import re

import numpy as np
import pytest

from serve.structured_output.grammar import GrammarCompiler, GrammarSpec
from tests.serve.support import FakeDetokenizer

EOS = 0


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(FakeDetokenizer(), lambda text: list(text.encode()), 256, (EOS,))


def allowed(constraint):
    mask = constraint.mask()
    return [i for i in range(256) if mask[i // 32] >> (i % 32) & 1]


def sampled(constraint, seed, wishes=b"", most=600):
    """What a model says that wishes for some bytes and else draws anything. None if it did not end."""
    draw = np.random.default_rng(seed)
    said = []
    for step in range(most):
        tokens = allowed(constraint)
        assert tokens, bytes(said)
        wish = wishes[step] if step < len(wishes) else None
        token = wish if wish in tokens else int(draw.choice(tokens))
        if step > most // 2 and EOS in tokens:
            token = EOS
        if token == EOS:
            return bytes(said).decode()
        constraint.advance(token)
        said.append(token)
    return None


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(20))
def test_a_schemas_documents(compiler, seed):
    found = json.loads(sampled(compiler.compile(GrammarSpec(schema=SCHEMA), False), seed, b"I would rather talk."))
    assert set(found) - {"tags"} == {"name", "age"} and len(found["name"]) <= 5 and 0 <= found["age"] <= 150
    assert set(found.get("tags", [])) <= {"a", "b"}


def test_the_models_own_layout_is_let_be(compiler):
    for text in ('{"name": "Ann", "age": 5}', '{"name":"Ann","age":5}', '{\n  "name": "Ann",\n  "age": 5\n}'):
        assert sampled(compiler.compile(GrammarSpec(schema=SCHEMA), False), 0, text.encode() + bytes([EOS])) == text


def test_expressions_choices_grammars(compiler):
    for seed in range(5):
        assert re.fullmatch(r"a/[0-9]{3}", sampled(compiler.compile(GrammarSpec(regex=r"a/[0-9]{3}"), False), seed))
        assert sampled(compiler.compile(GrammarSpec(choice=('say "yes"', "no\n")), False), seed) in ('say "yes"', "no\n")
        assert sampled(compiler.compile(GrammarSpec(grammar='start: "x" "y"'), False), seed) == "xy"
        assert sampled(compiler.compile(GrammarSpec(grammar='root ::= "x" | "z"'), False), seed) in "xz"


@pytest.mark.parametrize("seed", range(5))
def test_calls(compiler, seed):
    functions = {"f": SCHEMA, 'quo"ted': {}}
    wanted = GrammarSpec(functions=functions, parallel=False)
    text = sampled(compiler.compile(wanted, False), seed, b'<tool_call>\n{"name": "f"')
    call = json.loads(re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text, re.DOTALL)[1])
    assert call["name"] == "f" and {"name", "age"} <= set(call["arguments"])
    several = sampled(
        compiler.compile(GrammarSpec(functions={"f": {"type": "object", "maxProperties": 0}}), False), seed, most=4000
    )
    assert several.count("<tool_call>") == several.count("</tool_call>") >= 1


def test_an_answer_or_a_call(compiler):
    wanted = GrammarSpec(choice=("yes",), functions={"f": {"type": "object"}})
    assert sampled(compiler.compile(wanted, False), 0, b"yes" + bytes([EOS])) == "yes"
    assert sampled(compiler.compile(wanted, False), 0, b'<tool_call>\n{"name": "f", "arguments": {}}').startswith("<tool_call>")


def test_thoughts_are_free(compiler):
    constraint = compiler.compile(GrammarSpec(choice=("yes",)), thinking=True)
    for byte in b"anything at all</think>":
        assert len(allowed(constraint)) == 256
        constraint.advance(byte)
    assert allowed(constraint) == [ord("y")]
    assert len(allowed(constraint.copy_from_start())) == 256 and allowed(constraint.copy_from_start(thinking=False)) == [ord("y")]


def test_tokens_that_break_it(compiler):
    constraint = compiler.compile(GrammarSpec(choice=("yes",)), False)
    with pytest.raises(RuntimeError, match="token 110 breaks the grammar"):
        constraint.advance(ord("n"))
    with pytest.raises(RuntimeError, match="cannot be followed"):
        constraint.mask()


@pytest.mark.parametrize(
    "wanted, words",
    [
        (GrammarSpec(schema={"type": "objectt"}), "objectt"),
        (GrammarSpec(schema={"$ref": "#/nope"}), "/nope"),
        (GrammarSpec(regex="(a"), "regex"),
        (GrammarSpec(grammar="start: nothing"), "nothing"),
        (GrammarSpec(grammar="hello"), ""),
        (GrammarSpec(grammar="root ::= ("), ""),
        (GrammarSpec(schema=False), ""),
    ],
)
def test_what_no_answer_can_be(compiler, wanted, words):
    with pytest.raises(ValueError) as caught:
        compiler.compile(wanted, False)
    assert words in str(caught.value) and "\n" not in str(caught.value)
