"""Formats that a client may send to harm the server: each is refused or served, and none costs the server's
process more than a second of processor time.
"""

import asyncio
import dataclasses
import gc
import os
import random
import re
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from serve.structured_output import grammar as grammar_module
from serve.structured_output.grammar import ConstraintFailed, GrammarCompiler, GrammarSpec
from serve.structured_output.limits import MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES, MAX_SPEC_BYTES
from serve.structured_output.request import StructuredOutputError, StructuredRequest, compile_constraint_bounded
from serve.structured_output.trial import start_trial_workers
from serve.structured_output.vocabulary import Vocabulary
from tests.serve.support import FakeDetokenizer

STOPS = (0,)


@pytest.fixture(scope="module")
def workers():
    workers = start_trial_workers(Vocabulary.of(FakeDetokenizer(), 256, STOPS))
    yield workers
    workers.close()


@pytest.fixture
def compiler(workers):
    compiler = GrammarCompiler(FakeDetokenizer(), lambda text: list(text.encode()), 256, STOPS, workers)
    compiler.warm_up()
    return compiler


def bounded(compiler, spec):
    """Compiles after a trial, and checks the processor time of this process, without other tests' objects."""
    gc.freeze()
    begun = time.process_time()
    try:
        return asyncio.run(compiler.compile_bounded(spec, False))
    finally:
        taken = time.process_time() - begun
        gc.unfreeze()
        assert taken < 1


def tokens(constraint):
    return np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))


def answer(constraint, seed=0, max_tokens=2000):
    """Returns the bytes of random allowed tokens up to an end."""
    draw, said = random.Random(seed), bytearray()
    while (token := int(draw.choice(tokens(constraint)))) != 0:
        constraint.advance(token)
        said.append(token)
        assert len(said) < max_tokens
    return bytes(said)


def schema_chain(length, link):
    definitions = {f"r{i}": link({"$ref": f"#/$defs/r{i + 1}"}) for i in range(length)}
    return GrammarSpec(schema={"$defs": {**definitions, f"r{length}": {"type": "null"}}, "$ref": "#/$defs/r0"})


def any_of(reference):
    return {"anyOf": [reference, {"type": "null"}]}


def rule_chain(length, head, body, first="start: r0", last='"a"', case=str):
    rules = [f"{case(f'r{i}')} {head} {body.replace('r', case(f'r{i + 1}'))}" for i in range(length)]
    return GrammarSpec(
        grammar="\n".join([case(first) if case is str else "start: R0", *rules, f"{case(f'r{length}')} {head} {last}"])
    )


def nested_list(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return GrammarSpec(schema=schema)


def properties(number):
    return GrammarSpec(schema={"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(number)}})


TOO_LARGE = "precomputation failed|its trial|cannot be followed"
SMALL_BODY = {"type": "object", "properties": {"a": {"type": "integer"}}}
REFUSED = {
    "1500 references": (schema_chain(1500, any_of), "Current row has"),
    "1000 properties": (properties(1000), "Current row has"),
    "2001 properties": (properties(2001), "has 2001 properties, at most 2000"),
    "deep schema": (nested_list(50_000), "has 101 levels, at most 100 are allowed"),
    "deep schema of a tool": (GrammarSpec(functions={"f": nested_list(50_000).schema}), "has 101 levels"),
    "large schema": (GrammarSpec(schema={"enum": ["x" * 100] * 20_000}), f"at most {MAX_SPEC_BYTES}|more than {MAX_SPEC_BYTES}"),
    "long enum": (GrammarSpec(schema={"enum": list(range(20_001))}), "has 20001 values, at most 20000"),
    "wide schema": (GrammarSpec(schema={"enum": [[[]] * 20_000] * 20_000}), f"more than {MAX_SPEC_BYTES} bytes"),
    "large tools": (GrammarSpec(functions={f"f{i}" * 50: SMALL_BODY for i in range(2000)}), f"more than {MAX_SPEC_BYTES} bytes"),
    "choice of 100,000": (GrammarSpec(choice=tuple(map(str, range(100_000)))), "has 100000 texts, at most 20000"),
    "long choice": (GrammarSpec(choice=("x" * 300_000,)), f"has 300000 bytes, at most {MAX_SPEC_BYTES}"),
    "long grammar": (GrammarSpec(grammar='start: "' + "x" * 70_000 + '"'), f"at most {MAX_GRAMMAR_BYTES} are"),
    "3,000 rules": (rule_chain(3000, ":", "r"), "has 3002 rules, at most 2000"),
    "3,000 terminals": (rule_chain(3000, ":", "r", case=str.upper), "has 3002 rules, at most 2000"),
    "12,000 rules of GBNF": (rule_chain(12_000, "::=", "r", "root ::= r0"), "at most 65536"),
    "a regex of 20,000 a?": (GrammarSpec(regex="a?" * 20_000), f"has 40000 bytes, at most {MAX_REGEX_BYTES}"),
    "a pattern of 20,000 a?": (GrammarSpec(schema={"pattern": "a?" * 20_000}), "a pattern of the schema has 40000 bytes"),
    "a?, in a grammar": (GrammarSpec(grammar="start: A\nA: /" + "a?" * 20_000 + "/"), TOO_LARGE),
    "a*b*, in a grammar": (GrammarSpec(grammar="start: A\nA: /" + "a*b*" * 15_000 + "/"), TOO_LARGE),
    "a reference to itself": (GrammarSpec(schema={"$ref": "#"}), "cannot be followed"),
    "a rule of itself": (GrammarSpec(grammar='root ::= root "a" | root'), "cannot be followed"),
    "nested repetitions": (GrammarSpec(regex="((a{1,100}){1,100}){1,100}"), "cannot be followed"),
    "doubled rules": (rule_chain(40, ":", "r r"), "cannot be followed"),
    "doubled terminals": (rule_chain(40, ":", "r r", case=str.upper), "too big|its trial"),
    "deep groups of GBNF": (GrammarSpec(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "the GBNF notation|its trial"),
    "deep groups of Lark": (GrammarSpec(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    "empty lines": (GrammarSpec(grammar="\n" * 60_000), "GBNF|root"),
    "half a surrogate pair": (GrammarSpec(choice=("\ud800",)), "surrogates not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_format_is_refused(compiler, name):
    spec, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        bounded(compiler, spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_server_answers_after_all_of_them(compiler):
    assert answer(bounded(compiler, GrammarSpec(choice=("yes", "no")))) in (b"yes", b"no")


SELF = {"$ref": "#"}
WAYS = {
    "response_format": {"response_format": {"type": "json_schema", "json_schema": {"schema": SELF}}},
    "structured_outputs.json": {"structured_outputs": {"json": SELF}},
    "structured_outputs.regex": {"structured_outputs": {"regex": "((a{1,100}){1,100}){1,100}"}},
    "structured_outputs.grammar": {"structured_outputs": {"grammar": 'root ::= root "a" | root'}},
    "guided_json": {"guided_json": SELF},
    "guided_choice": {"guided_choice": ["x"] * 20_001},
    "guided_grammar": {"guided_grammar": "start: r0"},
    "tool_choice": {"functions": {"f": SELF}, "tool_choice": "required"},
}


@pytest.mark.parametrize("field", WAYS)
def test_refusal_names_the_field(compiler, field):
    absent = dict.fromkeys(StructuredRequest.__annotations__) | {"functions": {}}
    request = SimpleNamespace(**absent | WAYS[field])
    with pytest.raises(StructuredOutputError, match=f"{re.escape(field)} cannot be compiled: ") as caught:
        asyncio.run(compile_constraint_bounded(request, compiler, False))  # pyright: ignore[reportArgumentType]
    assert caught.value.field == field


def test_constraint_knows_its_field(compiler):
    request = SimpleNamespace(**dict.fromkeys(StructuredRequest.__annotations__) | {"functions": {}, "guided_regex": "ab"})
    constraint = asyncio.run(compile_constraint_bounded(request, compiler, False))  # pyright: ignore[reportArgumentType]
    assert constraint is not None and constraint.field == constraint.copy_from_start().field == "guided_regex"


CHAINS = {
    "rules": rule_chain(1990, ":", "r"),
    "terminals": rule_chain(1990, ":", "r", case=str.upper),
    "terminals in groups": rule_chain(1990, ":", '("a" | ("b" r)?)+', case=str.upper),
    "GBNF": rule_chain(1990, "::=", "r", "root ::= r0"),
    "references": schema_chain(1990, lambda reference: reference),
    "items": schema_chain(1990, lambda reference: {"type": "array", "items": reference}),
    "alternatives": schema_chain(1990, any_of),
    "allOf": schema_chain(1990, lambda reference: {"allOf": [reference, {"type": ["array", "null"]}]}),
}


@pytest.mark.parametrize("name", CHAINS)
def test_longest_chains_fit_the_stack(compiler, name):
    """Checks the process's own compilation, because a trial would only lose a worker."""
    try:
        constraint = compiler.compile(CHAINS[name], False)
        for _ in range(3):
            constraint.advance(int(tokens(constraint)[-1]))
    except ValueError:
        pass  # a limit of llguidance


def test_deep_references_in_several_objects_fit_the_stack(compiler):
    """Definitions may be spread over objects, up to the bound on bytes."""
    links = [f"#/$defs/g{i // 1800}/r{i % 1800}" for i in range(5401)]
    groups = {f"g{g}": {} for g in range(4)}
    for i, target in enumerate(links[1:]):
        groups[f"g{i // 1800}"][f"r{i % 1800}"] = {"allOf": [{"$ref": target}]}
    groups["g3"]["r0"] = {"type": "null"}
    schema = {"$defs": groups, "$ref": links[0]}
    assert answer(compiler.compile(GrammarSpec(schema=schema), False)) == b"null"


@pytest.mark.parametrize("number", [2001, 20_000])
def test_large_choices_are_served(compiler, number):
    texts = tuple(f"text {i}" for i in range(number))
    constraint = bounded(compiler, GrammarSpec(choice=texts))
    assert {answer(constraint.copy_from_start(), seed).decode() for seed in range(3)} <= set(texts)


def test_repeated_formats_are_tried_once(compiler, workers, monkeypatch):
    good, bad = GrammarSpec(choice=("a", "b")), GrammarSpec(schema={"$ref": "#"})
    asyncio.run(compiler.compile_bounded(good, False))
    with pytest.raises(ValueError) as first:
        asyncio.run(compiler.compile_bounded(bad, False))
    monkeypatch.setattr(workers, "run", None)
    assert answer(asyncio.run(compiler.compile_bounded(dataclasses.replace(good), False))) in (b"a", b"b")
    with pytest.raises(ValueError, match=re.escape(str(first.value))):
        asyncio.run(compiler.compile_bounded(bad, False))


def test_killed_worker_costs_no_request(compiler, workers):
    for pid in workers.pids:
        os.kill(pid, signal.SIGKILL)
    assert answer(asyncio.run(compiler.compile_bounded(GrammarSpec(choice=("killed",)), False))) == b"killed"


def test_slow_trial_delays_no_other_format(compiler):
    async def both():
        slow = asyncio.create_task(
            compiler.compile_bounded(GrammarSpec(schema={"type": "integer", "multipleOf": 999_979}), False)
        )
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await compiler.compile_bounded(GrammarSpec(choice=("quick",)), False)
        seconds, was_running = time.monotonic() - begun, not slow.done()
        with pytest.raises(ValueError, match="its trial took more than 2 seconds of processor time"):
            await slow
        return seconds, was_running

    seconds, was_running = asyncio.run(both())
    assert was_running, seconds


def test_constraint_fails_with_its_field(compiler):
    constraint = compiler.compile(GrammarSpec(regex="((a{1,100}){1,100}){1,100}"), False)
    constraint.field = "guided_regex"
    constraint = constraint.copy_from_start()
    with pytest.raises(ConstraintFailed, match=r"the grammar cannot be followed: .*too many") as caught:
        for _ in range(100):
            constraint.mask()
            constraint.advance(ord("a"))
    assert caught.value.field == "guided_regex"


def test_slow_masks_fail_the_constraint(compiler, monkeypatch):
    monkeypatch.setattr(grammar_module, "MASK_CPU_S", 0.2)
    monkeypatch.setattr(grammar_module, "MASK_CPU_S_PER_TOKEN", 1e-3)
    constraint = compiler.compile(GrammarSpec(grammar='start: e\ne: e e | "a" | "b"'), False)
    begun = time.process_time()
    with pytest.raises(ConstraintFailed, match="seconds of processor time a token"):
        for _ in range(10_000):
            constraint.mask()
            constraint.advance(ord("a"))
    assert time.process_time() - begun < 5


def test_copies_are_cheap_and_independent(compiler):
    constraint = compiler.compile(GrammarSpec(schema={"enum": [f"text {i}" for i in range(20_000)]}), False)
    begun = time.process_time()
    first, *others = [constraint.copy_from_start() for _ in range(128)]
    assert time.process_time() - begun < 0.2
    said = answer(first)
    assert said.startswith(b'"text ') and all(answer(other, seed).startswith(b'"text') for seed, other in enumerate(others[:3]))


def test_threads_keep_their_stack_size(compiler):
    before = threading.stack_size()
    compiler.compile(GrammarSpec(choice=("a",)), False)
    assert threading.stack_size() == before
