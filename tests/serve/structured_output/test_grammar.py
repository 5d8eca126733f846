"""Grammar constraints with a sampler that prefers other tokens: the output always follows the grammar."""

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


def sampled(constraint, seed, preferred=b"", max_tokens=600):
    """Samples the preferred bytes where the mask allows them, else random ones. Returns None without an
    end."""
    draw = np.random.default_rng(seed)
    said = []
    for step in range(max_tokens):
        tokens = allowed(constraint)
        assert tokens, bytes(said)
        candidate = preferred[step] if step < len(preferred) else None
        token = candidate if candidate in tokens else int(draw.choice(tokens))
        if step > max_tokens // 2 and EOS in tokens:
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
def test_json_schema(compiler, seed):
    found = json.loads(sampled(compiler.compile(GrammarSpec(schema=SCHEMA), False), seed, b"I would rather talk."))
    assert set(found) - {"tags"} == {"name", "age"} and len(found["name"]) <= 5 and 0 <= found["age"] <= 150
    assert set(found.get("tags", [])) <= {"a", "b"}


def test_white_space_between_parts_is_free(compiler):
    for text in ('{"name": "Ann", "age": 5}', '{"name":"Ann","age":5}', '{\n  "name": "Ann",\n  "age": 5\n}'):
        assert sampled(compiler.compile(GrammarSpec(schema=SCHEMA), False), 0, text.encode() + bytes([EOS])) == text


def test_regex_choice_and_grammar(compiler):
    for seed in range(5):
        assert re.fullmatch(r"a/[0-9]{3}", sampled(compiler.compile(GrammarSpec(regex=r"a/[0-9]{3}"), False), seed))
        assert sampled(compiler.compile(GrammarSpec(choice=('say "yes"', "no\n")), False), seed) in ('say "yes"', "no\n")
        assert sampled(compiler.compile(GrammarSpec(grammar='start: "x" "y"'), False), seed) == "xy"
        assert sampled(compiler.compile(GrammarSpec(grammar='root ::= "x" | "z"'), False), seed) in "xz"


@pytest.mark.parametrize("seed", range(5))
def test_tool_calls(compiler, seed):
    functions = {"f": SCHEMA, 'quo"ted': {}}
    spec = GrammarSpec(functions=functions, parallel=False)
    text = sampled(compiler.compile(spec, False), seed, b'<tool_call>\n{"name": "f"')
    call = json.loads(re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text, re.DOTALL)[1])
    assert call["name"] == "f" and {"name", "age"} <= set(call["arguments"])
    several = sampled(
        compiler.compile(GrammarSpec(functions={"f": {"type": "object", "maxProperties": 0}}), False), seed, max_tokens=4000
    )
    assert several.count("<tool_call>") == several.count("</tool_call>") >= 1


def test_answer_or_tool_call(compiler):
    spec = GrammarSpec(choice=("yes",), functions={"f": {"type": "object"}})
    assert sampled(compiler.compile(spec, False), 0, b"yes" + bytes([EOS])) == "yes"
    assert sampled(compiler.compile(spec, False), 0, b'<tool_call>\n{"name": "f", "arguments": {}}').startswith("<tool_call>")


def test_reasoning_is_unconstrained(compiler):
    constraint = compiler.compile(GrammarSpec(choice=("yes",)), thinking=True)
    for byte in b"anything at all</think>":
        assert len(allowed(constraint)) == 256
        constraint.advance(byte)
    assert allowed(constraint) == [ord("y")]
    assert len(allowed(constraint.copy_from_start())) == 256 and allowed(constraint.copy_from_start(thinking=False)) == [ord("y")]


def test_tokens_outside_the_mask_raise(compiler):
    constraint = compiler.compile(GrammarSpec(choice=("yes",)), False)
    with pytest.raises(RuntimeError, match="token 110 breaks the grammar"):
        constraint.advance(ord("n"))
    with pytest.raises(RuntimeError, match="cannot be followed"):
        constraint.mask()


@pytest.mark.parametrize(
    "spec, words",
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
def test_invalid_specs_raise(compiler, spec, words):
    with pytest.raises(ValueError) as caught:
        compiler.compile(spec, False)
    assert words in str(caught.value) and "\n" not in str(caught.value)
