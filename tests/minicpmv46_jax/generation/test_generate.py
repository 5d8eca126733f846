"""Generation with a cache against the cache-free forward; buckets, stop tokens, growth, seeds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax import MiniCPMV, model
from minicpmv46_jax.generation import decoding, generate
from minicpmv46_jax.generation.generate import Generator, prefill_blocks
from minicpmv46_jax.model import PrefillInput
from minicpmv46_jax.model.batch import PrefillBatch
from minicpmv46_jax.model.state import empty_state, grow_state
from minicpmv46_jax.processing import Inputs
from tests.tolerances import CACHED_FORWARD, relative_rms
from tests.variants import in_full


def prompt(demo, words, pictures=(), **options):
    parts = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": words}]
    return demo.process([{"role": "user", "content": parts}], **options)


def extended(inputs, ids):
    return Inputs(np.concatenate([inputs.token_ids, np.array(ids, np.int32)]), inputs.views)


def test_decode_equals_cache_free_forward(demo, photos):
    inputs = prompt(demo, "What is this?", [photos[0].resize((100, 80))], max_slice_nums=1)
    tokens = list(demo.generator.tokens(inputs, demo.options(max_new_tokens=24, temperature=0.0, ignore_eos=True, logprobs=20)))
    whole = demo.logits(extended(inputs, [t.id for t in tokens]))
    logprobs = np.asarray(jax.nn.log_softmax(whole, axis=-1))
    for step, token in enumerate(tokens):
        row = logprobs[len(inputs.token_ids) - 1 + step]
        ids, found = zip(*token.top, strict=True)
        assert relative_rms(found, row[list(ids)]) < CACHED_FORWARD
        assert token.id == row.argmax()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 700, *in_full(1025)])
def test_prefill_in_blocks_equals_forward(demo, length):
    ids = np.random.default_rng(length).integers(0, 256, length).astype(np.int32)
    inputs = Inputs(ids, ())
    logits, state = demo.generator.prefill(inputs)
    assert int(state.seq_lens[0]) == length
    assert relative_rms(logits[0], demo.logits(inputs)[-1]) < CACHED_FORWARD


def test_block_may_end_inside_an_image(demo, photos, monkeypatch):
    inputs = prompt(demo, "x", [photos[1]], max_slice_nums=1, downsample_mode="4x")
    view = inputs.views[0]
    monkeypatch.setattr(generate, "PREFILL_BUCKETS", (64,))
    assert view.start % 64 and view.num_tokens > 128
    logits, _ = demo.generator.prefill(inputs)
    assert relative_rms(logits[0], demo.logits(inputs)[-1]) < CACHED_FORWARD


def test_chunks_may_end_anywhere_and_share_a_batch(demo, photos):
    """Two prompts, one with an image, prefilled in odd chunks of one batch; slots and pages in no order."""
    prompts = [prompt(demo, "What is it?", [photos[0].resize((90, 70))], max_slice_nums=1), prompt(demo, "z" * 150)]
    features, firsts = demo.generator.features(prompts[0].views)
    rows = [demo.generator.feature_rows(p, firsts if p.views else []) for p in prompts]
    state = empty_state(demo.config.text, 3, 12, jnp.dtype("float32"), max_pages=5)
    tables = np.array([[7, 2, 9, 0, -1], [4, 11, 3, 1, 8]], np.int32)
    prefill = jax.jit(functools.partial(model.prefill, model.schema(demo.config).text))
    at, found = [0, 0], {}
    while any(at[i] < len(p.token_ids) for i, p in enumerate(prompts)):
        sizes = [min(n, len(p.token_ids) - a) for n, p, a in zip((37, 53), prompts, at, strict=True)]
        ids, feature_rows = np.zeros(96, np.int32), np.full(96, -1, np.int32)
        starts = np.array([0, sizes[0]], np.int32)
        for p, r, a, size, start in zip(prompts, rows, at, sizes, starts, strict=True):
            ids[start : start + size], feature_rows[start : start + size] = p.token_ids[a : a + size], r[a : a + size]
        slots = np.where(sizes, [2, 0], -1).astype(np.int32)
        before, lengths = np.array(at, np.int32), np.array(sizes, np.int32)
        nothing = np.zeros((0, 2), np.int32), np.zeros(0, np.int32)
        batch = PrefillBatch(starts, lengths, before, slots, np.where(before, slots, -1).astype(np.int32), tables, *nothing)
        logits, state = prefill(
            demo.params["text"], state, jax.tree.map(jnp.asarray, PrefillInput(ids, feature_rows, batch)), features
        )
        at = [a + size for a, size in zip(at, sizes, strict=True)]
        found |= {i: logits[i] for i, size in enumerate(sizes) if size and at[i] == len(prompts[i].token_ids)}
    assert state.seq_lens.tolist() == [len(prompts[1].token_ids), 0, len(prompts[0].token_ids)]
    for i, one in enumerate(prompts):
        assert relative_rms(found[i], demo.logits(one)[-1]) < CACHED_FORWARD


def test_prefill_blocks_cover_the_prompt():
    for total in (1, 64, 65, 256, 1000, 1024, 1025, 5000):
        cut = list(prefill_blocks(total))
        assert sum(size for _, size, _ in cut) == total
        assert [start for start, _, _ in cut] == list(np.cumsum([0] + [size for _, size, _ in cut])[:-1])
        assert all(size <= padded and padded in generate.PREFILL_BUCKETS for _, size, padded in cut)


def test_output_is_the_same_when_the_cache_grows(demo, monkeypatch):
    inputs = prompt(demo, "a" * 40)
    options = demo.options(max_new_tokens=100, temperature=0.0, ignore_eos=True)
    expected = [t.id for t in demo.generator.tokens(inputs, options)]
    monkeypatch.setattr(generate, "MIN_CAPACITY", 64)
    assert PAGE * demo.generator.pages(len(inputs.token_ids) + 1) < len(inputs.token_ids) + 100
    assert [t.id for t in demo.generator.tokens(inputs, options)] == expected


def test_grow_state_keeps_existing_pages(demo):
    _, state = demo.generator.prefill(prompt(demo, "hello"))
    bigger = grow_state(state, 32)
    assert bigger.block_tables.tolist() == [list(range(32))]
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(bigger), strict=True):
        np.testing.assert_array_equal(new[tuple(slice(0, n) for n in old.shape)], old)


def test_one_program_per_bucket(demo, photos):
    generator = Generator(demo.config, demo.params)
    options = demo.options(max_new_tokens=20, temperature=0.0, ignore_eos=True)
    for words in ("a", "ab", "abc" * 9, "b" * 70, "c" * 100, "d" * 150):
        list(generator.tokens(prompt(demo, words), options))
    programs = generator.programs()
    assert programs["prefill"] == 2  # blocks of 64 and 256, one number of pages
    assert programs["decode"] == programs["sample_first"] == 1
    for size in ((100, 100), (101, 99), (98, 102)):
        list(generator.tokens(prompt(demo, "a", [photos[0].resize(size)], max_slice_nums=1), options))
    assert generator.programs()["encode"] == 1


def test_stop_token_ends_output_and_is_excluded(demo):
    inputs = prompt(demo, "Count.")
    free = [t.id for t in demo.generator.tokens(inputs, demo.options(max_new_tokens=30, temperature=0.0, ignore_eos=True))]
    stop = next(i for i in free[5:] if i not in free[:5])
    options = demo.options(max_new_tokens=30, temperature=0.0, ignore_eos=True, stop_token_ids=[stop])
    deltas = list(demo.generate(inputs, options))
    assert [t.id for d in deltas for t in d.tokens] == free[: free.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert all(d.finish_reason is None for d in deltas[:-1])


def test_more_stop_tokens_than_the_device_compares(demo):
    inputs = prompt(demo, "Count.")
    free = [t.id for t in demo.generator.tokens(inputs, demo.options(max_new_tokens=30, temperature=0.0, ignore_eos=True))]
    stop = max(set(free))
    many = [i for i in range(stop + 1) if i not in free][: decoding.NUM_DEVICE_STOPS + 4] + [stop]
    options = demo.options(max_new_tokens=30, temperature=0.0, ignore_eos=True, stop_token_ids=many)
    assert [t.id for t in demo.generator.tokens(inputs, options)] == free[: free.index(stop) + 1]


def test_max_new_tokens_and_stop_texts(demo):
    messages = [{"role": "user", "content": "Count."}]
    greedy = {"temperature": 0.0, "ignore_eos": True}
    whole = demo.chat(messages, max_new_tokens=40, **greedy)
    inputs, options = demo.prepare(messages, {"max_new_tokens": 40, **greedy})
    assert list(demo.generate(inputs, options))[-1].finish_reason == "length"
    stop = whole[6:9]
    assert demo.chat(messages, max_new_tokens=40, stop=stop, **greedy) == whole[: whole.find(stop)]
    assert "".join(demo.stream(messages, max_new_tokens=40, **greedy)) == whole


def test_seed_gives_the_same_output_for_any_dispatch_size(demo, monkeypatch):
    inputs = prompt(demo, "Tell me.")
    options = demo.options(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
    first = [t.id for t in demo.generator.tokens(inputs, options)]
    monkeypatch.setattr(demo.generator, "steps", 3)
    assert [t.id for t in demo.generator.tokens(inputs, options)] == first
    other = demo.options(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=8, ignore_eos=True)
    assert [t.id for t in demo.generator.tokens(inputs, other)] != first


class Alternating:
    """A constraint that allows two different sets of tokens in turn."""

    def __init__(self, vocabulary, even, odd):
        self.output, self._choices, self._words = [], (even, odd), -(-vocabulary // 32)

    def mask(self):
        mask = np.zeros(self._words, np.uint32)
        for i in self._choices[len(self.output) % 2]:
            mask[i // 32] |= np.uint32(1 << (i % 32))
        return mask

    def advance(self, token):
        self.output.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constraint_masks_each_token(demo, temperature):
    constraint = Alternating(demo.config.text.vocab_size, (40, 300), (41,))
    options = demo.options(max_new_tokens=9, temperature=temperature, seed=1, constraint=constraint, ignore_eos=True)
    output = [token.id for token in demo.generator.tokens(prompt(demo, "Tell me."), options)]
    assert len(output) == 9 and set(output[::2]) <= {40, 300} and set(output[1::2]) == {41}
    assert constraint.output == output[:-1]  # not called for the last token


def test_constrained_greedy_equals_cache_free_forward(demo):
    """Each token is the best allowed one by logits computed without a cache."""
    inputs = prompt(demo, "Tell me.")
    constraint, truth = (Alternating(demo.config.text.vocab_size, range(100, 200), range(300, 316)) for _ in range(2))
    options = demo.options(max_new_tokens=6, temperature=0.0, constraint=constraint, ignore_eos=True)
    output = [token.id for token in demo.generator.tokens(inputs, options)]
    for token in output:
        scores = demo.logits(Inputs(np.concatenate([inputs.token_ids, np.array(truth.output, np.int32)]), ()))[-1]
        may = np.unpackbits(truth.mask().view(np.uint8), bitorder="little")[: len(scores)].astype(bool)
        assert token == np.where(may, scores, -np.inf).argmax()
        truth.advance(token)


def test_logit_bias_forces_and_excludes_tokens(demo):
    inputs = prompt(demo, "Tell me.")
    options = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    first = [token.id for token in demo.generator.tokens(inputs, demo.options(**options))]
    output = [token.id for token in demo.generator.tokens(inputs, demo.options(**options, logit_bias={77: 100}))]
    assert output == [77] * 6 != first
    never = [token.id for token in demo.generator.tokens(inputs, demo.options(**options, logit_bias=dict.fromkeys(first, -100)))]
    assert not set(never) & set(first)


def test_prompt_longer_than_context_is_rejected(demo):
    context = demo.config.text.max_position_embeddings
    with pytest.raises(ValueError, match=f"the prompt has {context} tokens, but the context holds {context}"):
        demo.generator.prefill(Inputs(np.zeros(context, np.int32), ()))


def test_output_ends_at_the_context_limit(demo):
    text = dataclasses.replace(demo.config.text, max_position_embeddings=300)
    generator = generate.Generator(dataclasses.replace(demo.config, text=text), demo.params)
    inputs = Inputs(np.full(300 - 5, 65, np.int32), ())
    tokens = list(generator.tokens(inputs, demo.options(temperature=0.0, ignore_eos=True)))
    assert len(tokens) == 5


def test_forward_is_differentiable(demo):
    graph = model.schema(demo.config)
    ids = np.arange(10, dtype=np.int32)
    block = jax.tree.map(jnp.asarray, generate.token_block(ids, np.full(10, -1, np.int32), 10))

    def loss(params):
        logits = model.forward(graph, params, block, jnp.zeros((1, demo.config.text.hidden_size)))
        return -jax.nn.log_softmax(logits[0, :-1])[jnp.arange(9), block.ids[0, 1:]].mean()

    gradient = jax.jit(jax.grad(loss))(demo.params)
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), gradient["text"])
    assert all(np.isfinite(n) and n > 0 for n in jax.tree.leaves(norms))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, "option 'max_tokens' is unknown; did you mean 'max_new_tokens'"),
        ({"zzz": 1}, "option 'zzz' is unknown"),
    ],
)
def test_unknown_options_are_rejected(demo, options, message):
    with pytest.raises(ValueError, match=message):
        demo.chat([{"role": "user", "content": "x"}], **options)


def test_unknown_dtype_is_rejected(demo_folder):
    with pytest.raises(ValueError, match="dtype is 'float16', expected one of bfloat16, float32"):
        MiniCPMV.from_pretrained(demo_folder, dtype="float16")
