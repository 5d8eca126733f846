"""Sampling against transformers' logits processors and against exact probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.decoding import sampling_mode, sampling_params
from minicpmv46_jax.generation.options import MAX_TEMPERATURE, generation_options
from minicpmv46_jax.generation.sampling import (
    MAX_LOGPROBS,
    Bias,
    apply_penalties,
    filter_scores,
    new_bias,
    new_history,
    record_prompt,
    record_token,
    sample,
)

V = 50
sample_jitted = jax.jit(sample, static_argnames="mode")
record = jax.jit(record_prompt)


def params(**options):
    options = generation_options(GenerationConfig(), **{"seed": 0, "temperature": 1.0, **options})
    return sampling_params([options], [options.seed])


def run_sample(scores, params, mode="filtered", bias=None, allowed=None):
    """Samples rows without a history."""
    rows = scores.shape[0]
    bias = new_bias(rows) if bias is None and mode == "full" else bias
    return sample_jitted(
        scores, params, new_history(*scores.shape), jnp.zeros(rows, jnp.int32), mode=mode, bias=bias, allowed=allowed
    )


def recorded(prompt, answer, fresh=True, history=None):
    """A history of one slot after these tokens; two tokens of padding follow."""
    ids = jnp.array([*prompt, *answer, 49, 49], jnp.int32)
    total = np.int32(len(prompt) + len(answer))
    return record(history or new_history(1, V), np.int32(0), ids, np.int32(len(prompt)), total, np.bool_(fresh))


def logits(seed, vocab=V):
    return np.random.default_rng(seed).standard_normal((1, vocab)).astype(np.float32) * 3


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 5, 60]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    temperature=st.sampled_from([0.2, 1.0, 1.7]),
)
def test_filters_equal_transformers(seed, top_k, top_p, min_p, temperature):
    scores = logits(seed)
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
    for warper, on in (
        (lambda: TopKLogitsWarper(top_k), top_k > 0),
        (lambda: TopPLogitsWarper(top_p), top_p < 1),
        (lambda: MinPLogitsWarper(min_p), min_p > 0),
    ):
        expected = warper()(None, expected) if on else expected
    found = jax.jit(filter_scores)(
        jnp.asarray(scores) / temperature, params(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    )
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@given(seed=st.integers(0, 1000), penalty=st.sampled_from([0.5, 1.0, 1.3]))
@settings(max_examples=10, deadline=None)
def test_repetition_penalty_equals_transformers(seed, penalty):
    scores, prompt, answer = logits(seed), [3, 7, 7, 12], [7, 20]
    history = recorded(prompt, answer)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), torch.tensor(scores))
    found = apply_penalties(jnp.asarray(scores), params(repetition_penalty=penalty), history)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_count_output_only():
    history = recorded([1, 2], [2, 2, 2])
    change = apply_penalties(jnp.zeros((1, V)), params(presence_penalty=0.5, frequency_penalty=0.25), history)
    expected = np.zeros((1, V))
    expected[0, 2] = -0.5 - 3 * 0.25
    np.testing.assert_allclose(change, expected)


@pytest.mark.parametrize("mode", ["greedy", "sampled", "filtered", "full"])
def test_temperature_zero_takes_largest_logit(mode):
    scores = jnp.asarray(logits(1))
    assert run_sample(scores, params(temperature=0.0), mode).ids[0] == scores.argmax()


def test_larger_mode_samples_the_same_tokens():
    scores = jnp.asarray(np.concatenate([logits(seed) for seed in range(4)]))
    rows = [params(seed=i, temperature=t) for i, t in enumerate([1.0, 0.7, 0.0, 1.5])]
    options = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    found = [run_sample(scores, options, mode).ids.tolist() for mode in ("sampled", "filtered", "full")]
    assert found[0] == found[1] == found[2]
    filtered = jax.tree.map(lambda *x: np.concatenate(x), *(params(seed=i, temperature=1.5, min_p=0.1 * i) for i in range(4)))
    found = [run_sample(scores, filtered, mode).ids.tolist() for mode in ("filtered", "full")]
    assert found[0] == found[1]


def test_sample_equals_jax_random_categorical():
    """The largest sum of a score and its Gumbel noise is a sample."""
    scores = jnp.asarray(np.concatenate([logits(seed) for seed in range(8)]))
    options = jax.tree.map(lambda *x: np.concatenate(x), *(params(seed=i + 2**40, temperature=0.5 + i / 4) for i in range(8)))
    keys = [jax.random.fold_in(jax.random.key(low), high) for low, high in options.seed]
    rows = zip(keys, scores / options.temperature[:, None], strict=True)
    expected = [int(jax.random.categorical(jax.random.fold_in(key, 0), row)) for key, row in rows]
    for mode in ("sampled", "filtered"):
        assert run_sample(scores, options, mode).ids.tolist() == expected


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, "greedy"),
        ({"temperature": 0.7}, "sampled"),
        ({"temperature": 0.7, "top_k": 5}, "filtered"),
        ({"temperature": 0.7, "top_p": 0.9}, "filtered"),
        ({"temperature": 0.7, "min_p": 0.1}, "filtered"),
        ({"temperature": 0.7, "presence_penalty": 1.0}, "filtered"),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, "filtered"),
        ({"temperature": 0.0, "logprobs": 0}, "full"),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, "full"),
    ],
)
def test_sampling_mode_is_the_cheapest_sufficient(options, mode):
    assert sampling_mode(generation_options(GenerationConfig(), **options)) == mode


@pytest.mark.parametrize("mode", ["greedy", "sampled", "filtered", "full"])
def test_sampling_program_has_no_conditional(monkeypatch, mode):
    """At a conditional the host waits for a GPU."""
    monkeypatch.setattr("kernels_pallas.top_k_top_p.reference.device_kind", lambda: "NVIDIA H200")
    program = jax.jit(lambda scores: run_sample(scores, params(top_k=5, top_p=0.5), mode)).lower(jnp.asarray(logits(1))).as_text()
    assert "stablehlo.case" not in program and "stablehlo.if" not in program


def test_record_prompt_adds_or_clears():
    first = recorded([3, 4], [])
    both = recorded([5], [6, 6], fresh=False, history=first)
    assert np.flatnonzero(both.in_prompt[0]).tolist() == [3, 4, 5]
    assert both.counts[0, 6] == 2 and both.counts.sum() == 2
    counted = record_token(both, jnp.array([0, 1]), jnp.array([6, 6]))  # slot 1 is past the last
    assert counted.counts[0, 6] == 3 and counted.counts.sum() == 3
    again = recorded([1], [2], history=counted)
    assert np.flatnonzero(again.in_prompt[0]).tolist() == [1] and again.counts.sum() == 1


def test_mask_excludes_tokens_and_bias_shifts_scores():
    two = np.array([[0b1010, 0]], np.uint32)  # tokens 1 and 3
    high = np.array([[0, 1 << 17]], np.uint32)  # token 49, the last
    all_ = np.full((1, 2), 0xFFFFFFFF, np.uint32)
    bias_to_three = Bias(np.array([[3, 7]], np.int32), np.array([[50.0, 90.0]], np.float32))  # the second entry is not valid
    biased = params(logit_bias={3: 50.0})
    for seed in range(20):
        own = run_sample(logits(seed), params(seed=seed))
        assert int(run_sample(logits(seed), params(seed=seed), allowed=two).ids[0]) in (1, 3)
        assert int(run_sample(logits(seed), params(seed=seed), allowed=high).ids[0]) == 49
        hottest = run_sample(logits(seed), params(seed=seed, temperature=MAX_TEMPERATURE), allowed=two)
        assert int(hottest.ids[0]) in (1, 3)
        greedy = run_sample(logits(seed), params(temperature=0.0), allowed=two)
        assert int(greedy.ids[0]) == max((1, 3), key=lambda i: logits(seed)[0, i])
        for allowed in (None, two):
            sampled = run_sample(logits(seed), biased, "full", bias=bias_to_three, allowed=allowed)
            assert int(sampled.ids[0]) == 3
            own_logprob = jax.nn.log_softmax(jnp.asarray(logits(seed)))[0, 3]
            assert float(sampled.logprob[0]) == pytest.approx(float(own_logprob), rel=1e-5)  # of the unmodified logits
        assert run_sample(logits(seed), params(seed=seed), "full", bias=bias_to_three).ids == own.ids  # a row without biases
        assert run_sample(logits(seed), params(seed=seed), allowed=all_).ids == own.ids


def test_samples_follow_the_probabilities():
    rows, vocab = 20_000, 8
    scores = jnp.broadcast_to(jnp.asarray(logits(5, vocab)), (rows, vocab))
    one = params(temperature=0.8)
    many = jax.tree.map(lambda x: np.broadcast_to(x, (rows, *x.shape[1:])), one)
    seeds = np.random.default_rng(0).integers(0, 2**32, (rows, 2), np.uint32)
    sampled = run_sample(scores, dataclasses.replace(many, seed=seeds))
    seen = np.bincount(np.asarray(sampled.ids), minlength=vocab) / rows
    expected = np.asarray(jax.nn.softmax(scores[0] / 0.8))
    assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / rows)  # five standard deviations


def test_row_does_not_depend_on_other_rows():
    scores = jnp.asarray(np.concatenate([logits(i) for i in range(3)]))
    rows = [params(seed=i, top_p=0.9) for i in range(3)]
    together = jax.tree.map(lambda *x: jnp.concatenate([jnp.asarray(y) for y in x]), *rows)
    sampled = run_sample(scores, together)
    alone = [run_sample(scores[i : i + 1], rows[i]).ids[0] for i in range(3)]
    assert sampled.ids.tolist() == [int(i) for i in alone]


def test_all_64_bits_of_a_seed_matter():
    scores = jnp.zeros((1, V))
    ids = {int(run_sample(scores, params(seed=seed)).ids[0]) for seed in [1, 1 + 2**32, 1 + 2**33, -1, 1 - 2**40]}
    assert len(ids) > 2


def test_logprobs_are_of_unmodified_logits():
    scores = jnp.asarray(logits(3))
    sampled = run_sample(scores, params(temperature=0.3, top_k=2), "full")
    expected = torch.log_softmax(torch.tensor(np.asarray(scores)), -1)[0]
    assert float(sampled.logprob[0]) == pytest.approx(float(expected[int(sampled.ids[0])]), rel=1e-5)
    top = expected.topk(MAX_LOGPROBS)
    assert sampled.top_ids[0].tolist() == top.indices.tolist()
    np.testing.assert_allclose(sampled.top_logprobs[0], top.values.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1.0, expected at least 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"top_p": 0}, "top_p is 0.0, expected above 0.0 and at most 1.0"),
        ({"min_p": 2}, "min_p is 2.0, expected at least 0.0 and at most 1.0"),
        ({"top_k": 1.5}, "top_k is 1.5, expected an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected an integer of at least 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0, expected at least 1e-06 and at most 1000000.0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40"),  # a logit divided by it is infinite
        ({"repetition_penalty": 1e38}, "repetition_penalty is 1e+38"),
        ({"temperature": 3.4e38}, "temperature is 3.4e+38"),
        ({"temperature": 1e39}, "temperature is 1e+39, expected at least 0.0 and at most 1000000.0"),  # infinite in float32
        ({"temperature": 10**400}, "temperature is inf"),
        ({"presence_penalty": 3}, "presence_penalty is 3.0, expected at least -2.0 and at most 2.0"),
        ({"logprobs": 21}, "logprobs is 21, expected an integer of at least 0 and at most 20"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": ["a", 5]}, "stop is ['a', 5], expected texts of at least one character"),
        ({"stop": ["a"] * 257}, "stop has 257 texts, expected at most 256"),
        ({"stop": ["a" * 4000, "b" * 97]}, "stop has 4097 characters in all, expected at most 4096"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids has 1025 tokens, expected at most 1024"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids is [2147483648], expected token ids"),
        ({"seed": 2**70}, "seed is"),
        ({"logit_bias": {5: 101}}, "logit_bias[5] is 101.0, expected at least -100.0 and at most 100.0"),
        ({"logit_bias": {-1: 1}}, "logit_bias is for -1, expected token ids"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 tokens, at most 1024 may have one"),
    ],
)
def test_options_out_of_range_are_rejected(options, message):
    with pytest.raises(ValueError) as error:
        generation_options(GenerationConfig(), **options)
    assert message in str(error.value)


def test_defaults_come_from_the_checkpoint():
    defaults = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, stop_token_ids=(5, 6))
    options = generation_options(defaults, stop_token_ids=[6, 7])
    assert (options.temperature, options.top_k, options.stop_token_ids) == (0.7, 20, (5, 6, 7))
    assert generation_options(dataclasses.replace(defaults, do_sample=False)).temperature == 0.0
    assert generation_options(defaults, ignore_eos=True).stop_token_ids == ()
