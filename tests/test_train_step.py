"""Steps of training on the small model: what they learn, accumulate and leave alone; and which tokens count as answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minicpmv46_jax.train import (
    BatchShape,
    Marks,
    computing,
    conversation,
    fill,
    make_step,
    new_state,
    pack,
    split,
    stack,
    token_losses,
)
from tests.tolerances import relative_rms
from tests.train_compile import QUICK

SHAPE = BatchShape(rows=1, tokens=128)


def chat(*turns):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(turns), turns, strict=False)]


@pytest.fixture(scope="module")
def marks(demo):
    return Marks.of(demo.processor)


@pytest.fixture(scope="module")
def batches(demo, marks):
    chats = [
        chat("2 and 2?", "4."),
        chat("Red or blue?", "Blue."),
        chat("Hello.", "Hi!", "And you?", "Fine."),
        chat("Go.", "No."),
    ]
    return [
        pack(rows, SHAPE, demo.config.vision) for rows in fill([conversation(demo.processor, marks, c) for c in chats], SHAPE)
    ]


def learned_texts(demo, one):
    """The runs of learned tokens, as text."""
    edges = np.flatnonzero(np.diff(one.learned.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [demo.processor.tokenizer.decode(one.inputs.token_ids[a:b]) for a, b in edges]


def test_answers_are_what_generation_would_say(demo, marks):
    messages = chat("Hello.", "Hi!", "And you?", "Fine.")
    one = conversation(demo.processor, marks, messages)
    assert learned_texts(demo, one) == ["Hi!<|im_end|>", "Fine.<|im_end|>"]
    prompt = demo.processor(messages[:-1]).token_ids
    last = np.flatnonzero(one.learned)[-len("Fine.") - 1]
    np.testing.assert_array_equal(one.inputs.token_ids[:last], prompt)
    assert learned_texts(demo, conversation(demo.processor, marks, messages, last_only=True)) == ["Fine.<|im_end|>"]


def test_thoughts_are_learned_from_where_thinking_opens(demo, marks):
    messages = chat("2 + 2?")
    thought = [*messages, {"role": "assistant", "reasoning_content": "Two pairs.", "content": "4"}]
    one = conversation(demo.processor, marks, thought)
    assert learned_texts(demo, one) == ["Two pairs.\n</think>\n\n4<|im_end|>"]
    prompt = demo.processor(messages, chat_template_kwargs={"enable_thinking": True}).token_ids
    np.testing.assert_array_equal(one.inputs.token_ids[: np.flatnonzero(one.learned)[0]], prompt)


def test_conversations_that_cannot_be_learned_are_named(demo, marks):
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: there is no answer"):
        conversation(demo.processor, marks, chat("Hello."), where="a.jsonl:3")
    with pytest.raises(ValueError, match=r"1 answers, but 2 in the prompt"):
        conversation(demo.processor, marks, chat("<|im_start|>assistant\nNo<|im_end|>", "Yes"))
    long = conversation(demo.processor, marks, chat("?" * 130, "!"), where="a.jsonl:4")
    with pytest.raises(ValueError, match=r"^a\.jsonl:4: it has \d+ tokens, a row holds 128"):
        list(fill([long], SHAPE))


def test_a_step_learns_what_is_trained_alone(demo, batches):
    optimizer = optax.adamw(3e-3)
    trained, frozen = split(demo.params, lambda path: path[0] == "text")
    step = jax.jit(make_step(demo.config, optimizer, dtype=jnp.float32, chunk=128), compiler_options=QUICK)
    state, batch = new_state(trained, frozen, optimizer), stack(batches)
    assert batch.ids.shape == (2, 1, 1, 128)
    state, first = step(state, batch)
    assert first.learned == batch.weights.sum()
    for _ in range(7):
        state, metrics = step(state, batch)
    assert metrics.loss < 0.7 * first.loss and state.step == 8
    assert jax.tree.leaves(state.trained["vision"]) == []
    np.testing.assert_array_equal(state.frozen["vision"]["patch_embed"]["weight"], demo.params["vision"]["patch_embed"]["weight"])


def test_masters_are_float32_and_what_layers_use_in_float32_stays(demo):
    params = computing(demo.params, "bfloat16")
    assert params["text"]["layers"][0]["mixer"]["A_log"].dtype == params["vision"]["post_norm"]["weight"].dtype == jnp.float32
    assert params["vision"]["patch_embed"]["bias"].dtype == params["text"]["embed"]["weight"].dtype == jnp.bfloat16
    state = new_state(params, jax.tree.map(lambda x: None, params), optax.adamw(1e-3))
    assert {str(x.dtype) for x in jax.tree.leaves(state.trained)} == {"float32"}


def test_bfloat16_steps_learn_too(demo, batches):
    """The same losses as in float32, to bfloat16's three digits."""
    optimizer = optax.sgd(0.0)
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        trained, frozen = split(demo.params, lambda path: path == ("text", "norm", "weight"))
        step = jax.jit(make_step(demo.config, optimizer, dtype=dtype, remat="none"), compiler_options=QUICK)
        found.append(step(new_state(trained, frozen, optimizer), stack(batches[:1]))[1])
    assert 0 < abs(found[1].loss - found[0].loss) < 0.02 * found[0].loss
    assert 0 < abs(found[1].grad_norm - found[0].grad_norm) < 0.1 * found[0].grad_norm


def test_z_loss_is_the_squared_log_sum(demo, batches):
    """Its gradient against a plain computation from whole logits."""
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(7, 16), (50, 16)])
    labels = jnp.asarray(rng.integers(0, 50, 7), jnp.int32)

    def ours(hidden, table, chunk):
        nll, lse = token_losses(hidden, table, labels, chunk)
        return (nll + 0.1 * lse**2).sum()

    def plain(hidden, table):
        logits = hidden @ table.T
        lse = jax.nn.logsumexp(logits, axis=1)
        return (lse - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] + 0.1 * lse**2).sum()

    expected = jax.value_and_grad(plain, (0, 1))(hidden, table)
    for chunk in (1, 16, 50, None):  # the last chunk overlaps the one before
        found = jax.value_and_grad(ours, (0, 1))(hidden, table, chunk)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert relative_rms(a, b) < 2e-6, chunk
