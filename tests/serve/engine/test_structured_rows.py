"""Structured output and logit biases in the engine's batch: outputs equal those of single requests; masks
delay no other row.
"""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from serve.engine import grammar_masks
from serve.structured_output.grammar import GrammarCompiler, GrammarSpec
from tests.serve.engine.engine_client import generate, request, run, submitted, text, wait_until
from tests.serve.engine.small_engine import BUCKETS

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}
DRAWN = {"temperature": 1.0, "top_p": 0.95}


@pytest.fixture(scope="module")
def compile_grammar(demo):
    """Returns a function that compiles a constraint for the demo model."""
    tokenize = lambda words: demo.processor.tokenizer(words, add_special_tokens=False)["input_ids"]  # noqa: E731
    stops = demo.generation_config.stop_token_ids
    compiler = GrammarCompiler(demo.detokenizer, tokenize, demo.config.text.vocab_size, stops)
    return lambda thinking=False, **wanted: compiler.compile(GrammarSpec(**wanted), thinking)


@pytest.fixture(scope="module")
def steered(demo, compile_grammar, photos):
    """Grammars, a thought before one, penalties, log probabilities, seeds, an image, biases."""

    def form(words, constraint, *parts, **options):
        fields = {"ignore_eos": False, "max_new_tokens": 40, "constraint": constraint, **options}
        return request(demo, *parts, text(words), **fields)

    flower = {"type": "image", "image": photos[1].resize((120, 90))}
    return [
        form("Words.", compile_grammar(regex="[a-z ]{1,30}")),
        form("Who?", compile_grammar(schema=SCHEMA), **DRAWN, seed=3),
        form("Yes?", compile_grammar(choice=("yes", "no"))),
        form("Think.", compile_grammar(thinking=True, choice=("yes",)), max_new_tokens=12),
        form("Letters.", compile_grammar(grammar='start: ("a" | "b" | "cd"){20}'), repetition_penalty=1.5, frequency_penalty=0.7),
        form("Digits.", compile_grammar(regex="[0-9]{3,25}"), logprobs=3, **DRAWN, seed=4),
        form("What?", compile_grammar(schema=SCHEMA), flower, max_slice_nums=1),
        form("Biased.", compile_grammar(regex="[a-z]{12}"), logit_bias={demo.processor.tokenizer("q")["input_ids"][0]: 100}),
        request(demo, text("Bias alone."), logit_bias=dict.fromkeys(range(40, 90), 30), **DRAWN, seed=5),
    ]


@pytest.fixture(scope="module")
def free(demo):
    """Requests without structured output."""
    return [
        request(demo, text("Why is the sky blue? " * 30), max_new_tokens=60),
        request(demo, text("Sample this."), **DRAWN, seed=7, max_new_tokens=30),
        request(demo, text("x" * 700), max_new_tokens=9),
    ]


def fresh(one):
    """Returns the request with a fresh constraint, because a constraint serves one output."""
    inputs, options = one
    constraint = options.constraint and options.constraint.copy_from_start()
    return inputs, dataclasses.replace(options, constraint=constraint)


@pytest.fixture(scope="module")
def alone(demo):
    """Returns a request's tokens and finish reason from the plain generator."""

    def answered(one):
        inputs, options = fresh(one)
        tokens = list(demo.generator.tokens(inputs, options))
        stopped = tokens[-1].id in options.stop_token_ids
        return tokens[:-1] if stopped else tokens, "stop" if stopped else "length"

    return answered


@pytest.fixture(scope="module")
def expected(steered, free, alone):
    return [alone(one) for one in [*steered, *free]]


@pytest.fixture(autouse=True)
def everything_is_free(demo_engine):
    yield
    wait_until(lambda: demo_engine.num_reserved == 0)
    assert demo_engine.slots.num_free == demo_engine.slots.count and not demo_engine._awaiting_mask


async def together(engine, requests):
    return await asyncio.gather(*(generate(engine, *fresh(one)) for one in requests), return_exceptions=True)


def same(found, right):
    """Checks tokens, finish reason and requested log probabilities."""
    (tokens, reason), (expected, why) = found, right
    assert ([token.id for token in tokens], reason) == ([token.id for token in expected], why)
    assert [[i for i, _ in token.top] for token in tokens] == [[i for i, _ in token.top] for token in expected]
    if expected and expected[0].logprob is not None:
        np.testing.assert_allclose([t.logprob for t in tokens], [t.logprob for t in expected], rtol=1e-4, atol=1e-5)
    return True


def test_batched_outputs_equal_single_outputs(demo_engine, steered, free, expected):
    compiled = demo_engine.compilations.count
    found = run(together(demo_engine, [*steered, *free]))  # four more than slots
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    assert demo_engine.compilations.count == compiled


def test_outputs_match_their_grammars(demo, steered, expected):
    texts = [demo.detokenizer.decode([token.id for token in tokens]) for tokens, _ in expected]
    assert texts[2] in ("yes", "no") and texts[7] == "q" * 12 and set(texts[5]) <= set("0123456789")
    assert all(40 <= token.id < 90 for token in expected[8][0])


def test_preempted_requests_resume_with_the_same_output(demo, tight_engine, compile_grammar, alone):
    """19 pages for requests that need 5 to 8 each: some are preempted while their logits are held."""
    options = {"ignore_eos": False, "max_new_tokens": 200, **DRAWN}
    long = [
        request(demo, text(f"{i} " * 60), constraint=compile_grammar(regex="[a-z]{500}"), presence_penalty=0.3, seed=i, **options)
        for i in range(4)
    ]
    requests = [*long, request(demo, text("free " * 30), max_new_tokens=200)]
    preemptions = tight_engine.scheduler.preemptions
    found = run(together(tight_engine, requests))
    assert tight_engine.scheduler.preemptions > preemptions and tight_engine.pages.num_free == tight_engine.pages.count
    assert all(same(*pair) for pair in zip(found, map(alone, requests), strict=True))


class Fails:
    """A constraint that fails at once, or after some tokens."""

    def __init__(self, vocabulary, after, where):
        self._free, self._left, self._where = np.full(-(-vocabulary // 32), 0xFFFFFFFF, np.uint32), after, where

    def mask(self):
        if self._left == 0 and self._where == "mask":
            raise RuntimeError("the parser gave up")
        return self._free

    def advance(self, token):
        self._left -= 1
        if self._left == 0 and self._where == "advance":
            raise RuntimeError("the parser gave up")

    def copy_from_start(self):
        return self


@pytest.mark.parametrize(("after", "where"), [(0, "mask"), (3, "mask"), (3, "advance")])
def test_failing_constraint_fails_only_its_request(demo, demo_engine, steered, free, expected, after, where):
    broken = request(demo, text("broken"), constraint=Fails(demo.config.text.vocab_size, after, where), max_new_tokens=50)
    *found, error = run(together(demo_engine, [*steered[:3], *free, broken]))
    assert all(same(*pair) for pair in zip(found, [*expected[:3], *expected[-3:]], strict=True))
    assert isinstance(error, RuntimeError) and str(error) == "the parser gave up"


def test_failed_step_fails_only_its_own_requests(demo_engine, steered, free, expected, monkeypatch, caplog):
    sample_held, calls = demo_engine._runner.sample_held, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("device on fire")
        return sample_held(*arguments)

    monkeypatch.setattr(demo_engine._runner, "sample_held", failing)
    found = run(together(demo_engine, [*steered[:4], *free]))
    failed = [one for one in found if isinstance(one, Exception)]
    assert failed and {str(error) for error in failed} == {"device on fire"}
    rights = [*expected[:4], *expected[-3:]]
    assert all(isinstance(one, Exception) or same(one, right) for one, right in zip(found, rights, strict=True))
    assert not any(isinstance(one, Exception) for one in found[-3:])  # no held logits
    assert "device on fire" in caplog.text


class Slow(Fails):
    """A constraint whose third mask waits for the test."""

    def __init__(self, vocabulary, gate):
        super().__init__(vocabulary, -1, "never")
        self._gate, self._masks = gate, 0

    def mask(self):
        self._masks += 1
        if self._masks == 3:
            assert self._gate.wait(60)
        return super().mask()


def test_late_mask_delays_no_other_request(demo, demo_engine, alone, free, expected):
    gate = threading.Event()
    slow = request(demo, text("slow"), constraint=Slow(demo.config.text.vocab_size, gate), max_new_tokens=6)

    async def scenario():
        with submitted(demo_engine, *slow) as handle:
            deltas = handle.deltas()
            await anext(deltas)
            others = await together(demo_engine, free)
            gate.set()
            return others, [delta async for delta in deltas]

    late = demo_engine.metrics.late_masks._value.get()
    others, rest = run(scenario())
    assert all(same(*pair) for pair in zip(others, expected[-3:], strict=True))
    assert rest[-1].finish_reason == "length"
    assert demo_engine.metrics.late_masks._value.get() > late


def test_steps_are_sent_ahead_and_shared(demo, demo_engine, compile_grammar, monkeypatch):
    """Both a constrained and a free stream get a token from every dispatch, which is sent before the last
    tokens are read.
    """
    engine, events = demo_engine, []
    monkeypatch.setattr(grammar_masks, "MASK_WAIT_S", 30.0)  # masks are never late
    for name in ("decode", "sample_held"):
        call = getattr(engine._runner, name)
        monkeypatch.setattr(engine._runner, name, lambda *given, c=call, n=name: (events.append((n, given)), c(*given))[1])
    for name in ("_collect_samples", "_collect_step"):
        call = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda what, c=call, n=name: (what and events.append((n, what)), c(what))[1])
    options = {"ignore_eos": False, "max_new_tokens": 40, "temperature": 0.0}
    constrained = request(demo, text("a"), constraint=compile_grammar(regex="[a-z]{100}"), **options)
    found = run(together(engine, [constrained, request(demo, text("b"), max_new_tokens=90)]))
    assert [len(tokens) for tokens, _ in found] == [40, 90]

    decodes = [given[0] for name, given in events if name == "decode"]
    shared = [plan for plan in decodes if plan.awaiting_mask.any()]
    assert len(shared) == 39 == sum(name == "sample_held" for name, _ in events)  # a token for each dispatch
    assert sum(len(plan.rows) == 2 for plan in shared) >= 36  # except the steps between the two prompts
    assert all(plan.num_steps == 1 for plan in shared)
    assert sum(plan.num_steps for plan in decodes if not plan.awaiting_mask.all()) <= 90 + BUCKETS.decode_steps
    assert any(plan.num_steps == BUCKETS.decode_steps for plan in decodes)  # afterwards, and before
    names = [name for name, _ in events]
    ahead = ["sample_held", "decode", "_collect_samples", "_collect_step"]
    assert sum(names[i : i + 4] == ahead for i in range(len(names))) >= 36


def test_slots_do_not_inherit_biases(demo, demo_engine, alone):
    """A slot with an old bias is reused by a request whose sampling mode adds biases."""
    bias = request(demo, text("bias"), logit_bias={77: 100.0}, max_new_tokens=4)
    plain = request(demo, text("plain"), logprobs=1, max_new_tokens=4)
    rights = alone(bias), alone(plain)
    for one, right in zip((bias, plain), rights, strict=True):
        assert all(same(found, right) for found in run(together(demo_engine, [one] * demo_engine.slots.count)))
    assert {token.id for token in rights[0][0]} == {77}
