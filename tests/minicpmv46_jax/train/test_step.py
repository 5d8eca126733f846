"""Training steps on the small model, loss masks, adapters, optimisers and the loss."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minicpmv46_jax import train
from minicpmv46_jax.checkpoint.names import tree_path
from minicpmv46_jax.train import (
    AnswerMarkers,
    BatchShape,
    cast_for_compute,
    conversation,
    fill,
    join,
    lora,
    make_step,
    new_state,
    pack,
    split,
    stack,
    summed_loss,
)
from minicpmv46_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from tests.minicpmv46_jax.train.train_compile import QUICK
from tests.tolerances import relative_rms

SHAPE = BatchShape(rows=1, tokens=128)


def chat(*turns):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(turns), turns, strict=False)]


@pytest.fixture(scope="module")
def markers(demo):
    return AnswerMarkers.from_processor(demo.processor)


@pytest.fixture(scope="module")
def batches(demo, markers):
    chats = [
        chat("2 and 2?", "4."),
        chat("Red or blue?", "Blue."),
        chat("Hello.", "Hi!", "And you?", "Fine."),
        chat("Go.", "No."),
    ]
    return [
        pack(rows, SHAPE, demo.config.vision) for rows in fill([conversation(demo.processor, markers, c) for c in chats], SHAPE)
    ]


def label_texts(demo, one):
    """Returns the texts of the runs of label tokens."""
    edges = np.flatnonzero(np.diff(one.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [demo.processor.tokenizer.decode(one.inputs.token_ids[a:b]) for a, b in edges]


def test_loss_mask_covers_the_tokens_that_generation_produces(demo, markers):
    messages = chat("Hello.", "Hi!", "And you?", "Fine.")
    one = conversation(demo.processor, markers, messages)
    assert label_texts(demo, one) == ["Hi!<|im_end|>", "Fine.<|im_end|>"]
    prompt = demo.processor(messages[:-1]).token_ids
    last = np.flatnonzero(one.loss_mask)[-len("Fine.") - 1]
    np.testing.assert_array_equal(one.inputs.token_ids[:last], prompt)
    assert label_texts(demo, conversation(demo.processor, markers, messages, last_only=True)) == ["Fine.<|im_end|>"]


def test_loss_mask_of_a_thought_starts_where_thinking_opens(demo, markers):
    messages = chat("2 + 2?")
    thought = [*messages, {"role": "assistant", "reasoning_content": "Two pairs.", "content": "4"}]
    one = conversation(demo.processor, markers, thought)
    assert label_texts(demo, one) == ["Two pairs.\n</think>\n\n4<|im_end|>"]
    prompt = demo.processor(messages, chat_template_kwargs={"enable_thinking": True}).token_ids
    np.testing.assert_array_equal(one.inputs.token_ids[: np.flatnonzero(one.loss_mask)[0]], prompt)


def test_errors_name_the_conversation(demo, markers):
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: there is no answer"):
        conversation(demo.processor, markers, chat("Hello."), where="a.jsonl:3")
    with pytest.raises(ValueError, match=r"1 answers, but 2 in the prompt"):
        conversation(demo.processor, markers, chat("<|im_start|>assistant\nNo<|im_end|>", "Yes"))
    long = conversation(demo.processor, markers, chat("?" * 130, "!"), where="a.jsonl:4")
    with pytest.raises(ValueError, match=r"^a\.jsonl:4: it has \d+ tokens, a row holds 128"):
        list(fill([long], SHAPE))


def test_step_changes_trained_parameters_only(demo, batches):
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


def test_cast_for_compute_keeps_float32_vectors_and_masters_are_float32(demo):
    params = cast_for_compute(demo.params, "bfloat16")
    assert params["text"]["layers"][0]["mixer"]["A_log"].dtype == params["vision"]["post_norm"]["weight"].dtype == jnp.float32
    assert params["vision"]["patch_embed"]["bias"].dtype == params["text"]["embed"]["weight"].dtype == jnp.bfloat16
    state = new_state(params, jax.tree.map(lambda x: None, params), optax.adamw(1e-3))
    assert {str(x.dtype) for x in jax.tree.leaves(state.trained)} == {"float32"}


@pytest.mark.full
def test_bfloat16_and_unrolled_layers_give_the_same_loss(demo, batches):
    """bfloat16 losses are close to float32's; unrolled layers give the same loss as scanned ones."""
    optimizer = optax.sgd(0.0)
    found = []
    for dtype, scan_layers in ((jnp.float32, True), (jnp.bfloat16, True), (jnp.float32, False)):
        trained, frozen = split(demo.params, lambda path: path == ("text", "norm", "weight"))
        step = make_step(demo.config, optimizer, dtype=dtype, remat="none", scan_layers=scan_layers)
        step = jax.jit(step, compiler_options=QUICK)
        found.append(step(new_state(trained, frozen, optimizer), stack(batches[:1]))[1])
    np.testing.assert_allclose(jax.tree.leaves(found[2]), jax.tree.leaves(found[0]), rtol=1e-5)
    assert 0 < abs(found[1].loss - found[0].loss) < 0.02 * found[0].loss
    assert 0 < abs(found[1].grad_norm - found[0].grad_norm) < 0.1 * found[0].grad_norm


def test_new_adapters_change_nothing_and_trained_ones_add_their_product(demo):
    tree = lora.init_adapters(demo.params, 4)
    for before, after in zip(jax.tree.leaves(demo.params), jax.tree.leaves(join(tree, demo.params, 2.0)), strict=True):
        np.testing.assert_array_equal(before, after)
    own = tree["text"]["layers"][0]["mlp"]["up_proj"]["weight"]
    assert own["a"].shape == (4, 64) and own["b"].shape == (128, 4)
    own["b"] = jnp.ones((128, 4))
    weight = demo.params["text"]["layers"][0]["mlp"]["up_proj"]["weight"]
    found = join(tree, demo.params, 2.0)["text"]["layers"][0]["mlp"]["up_proj"]["weight"]
    np.testing.assert_allclose(found, weight + 2.0 * own["a"].sum(axis=0)[None], atol=1e-6)
    names = {".".join(map(str, tree_path(keys)[:-1])) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}
    assert len(names) == 4 * 3 + 3 * 3 + 4 and not any("vision" in name or "embed" in name for name in names)
    with pytest.raises(ValueError, match="no parameter's name matches"):
        lora.init_adapters(demo.params, 4, targets="text")
    with pytest.raises(ValueError, match="cannot have an adapter of rank 65"):
        lora.init_adapters(demo.params, 65)


def test_rates_of_parts_and_schedule(demo):
    config = OptimizerConfig(name="sgd", b1=0.0, rate=0.1, warmup=2, schedule="linear", clip=0.0, vision=0.5, merger=0.0)
    found = [float(make_schedule(config, 6)(step)) for step in range(7)]
    np.testing.assert_allclose(found, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0], atol=1e-6)
    trained, _ = split(demo.params, config.trains)
    assert jax.tree.leaves(trained["vision"]["merger"]) == []
    optimizer = make_optimizer(config, 6)
    ones = jax.tree.map(jnp.ones_like, trained)
    updates, _ = jax.jit(lambda ones, params: optimizer.update(ones, optimizer.init(params), params))(ones, trained)
    np.testing.assert_allclose(updates["text"]["norm"]["weight"][0], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["vision"]["post_norm"]["weight"][0], -0.025, rtol=1e-6)
    for wrong in ({"name": "adam"}, {"rate": -1.0}, {"schedule": "step"}):
        with pytest.raises(ValueError, match=f"optimizer.{next(iter(wrong))} is"):
            OptimizerConfig(**wrong)
    with pytest.raises(ValueError, match="warmup is 2 steps, the run has 1"):
        make_schedule(config, 1)


def test_weight_decay_applies_to_matrices_only(demo):
    optimizer = make_optimizer(OptimizerConfig(name="sgd", rate=0.1, schedule="constant", clip=0.0, weight_decay=0.5), 6)
    zeros = jax.tree.map(jnp.zeros_like, demo.params)
    updates, _ = jax.jit(lambda zeros, params: optimizer.update(zeros, optimizer.init(params), params))(zeros, demo.params)
    block, own = (tree["text"]["layers"][0] for tree in (updates, demo.params))
    np.testing.assert_allclose(block["mlp"]["up_proj"]["weight"], -0.05 * own["mlp"]["up_proj"]["weight"], rtol=1e-6)
    assert not block["mixer"]["conv"].any() and not updates["text"]["norm"]["weight"].any()
    assert not updates["vision"]["position_embed"]["weight"].any()


def test_summed_loss_equals_a_plain_computation(demo, batches):
    """The loss and its gradient equal a plain computation from all logits."""
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(7, 16), (50, 16)])
    labels, weights = jnp.asarray(rng.integers(0, 50, 7), jnp.int32), jnp.asarray(rng.uniform(0, 1, 7), jnp.float32)

    def ours(hidden, table, chunk):
        return summed_loss(hidden, table, labels, weights, 0.1, chunk)[0]

    def plain(hidden, table):
        logits = hidden @ table.T
        lse = jax.nn.logsumexp(logits, axis=1)
        return (weights * (lse - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] + 0.1 * lse**2)).sum()

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, table)
    np.testing.assert_allclose(jax.jit(ours, static_argnums=2)(hidden, table, 3), expected[0], rtol=2e-6)  # without a gradient
    for chunk in (3, None):  # the last chunk is padded
        found = jax.jit(jax.value_and_grad(ours, (0, 1)), static_argnums=2)(hidden, table, chunk)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert relative_rms(a, b) < 2e-6, chunk


@pytest.mark.full
def test_docstring_example_of_the_package_runs(demo):
    """The parameters are copied, because the example donates them."""
    params = jax.tree.map(jnp.copy, demo.params)
    vlm = types.SimpleNamespace(processor=demo.processor, config=demo.config, params=params)
    names = {**vars(train), "vlm": vlm, "messages": chat("2 and 2?", "4."), "jax": jax, "jnp": jnp, "optax": optax}
    exec("\n".join(line[4:] for line in train.__doc__.splitlines() if line.startswith("    ")), names)
    assert names["metrics"].learned == 3  # "4", "." and the end of the turn
    assert jax.tree.structure(names["params"]) == jax.tree.structure(demo.params)
