"""Gradients of the training forward: equal to transformers', and to those of unpacked conversations."""

import dataclasses
import functools
import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from minicpmv46_jax import MiniCPMV, model
from minicpmv46_jax.checkpoint import param_specs
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train import AnswerMarkers, BatchShape, Conversation, pack
from minicpmv46_jax.train import loss_mask as answers
from minicpmv46_jax.train.chat_formats import read_row
from minicpmv46_jax.train.forward import batch_loss
from tests.minicpmv46_jax.train.train_compile import QUICK
from tests.oracle import Oracle, write_checkpoint
from tests.tolerances import FLOAT32_FORWARD, relative_rms

SHAPE = BatchShape(rows=2, tokens=320, patches=256, views=4, longest=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_folder):
    from convert.demo.random_checkpoint import demo_config

    return write_checkpoint(tmp_path_factory.mktemp("train") / "model", demo_config(), demo_folder)


# Subtracted from every A_log. Where a token's decay is 1e-6, transformers' float32 gradient of A_log is off
# by 4e-3.
A_LOG_SHIFT = 3.0


@pytest.fixture(scope="module")
def ours(folder):
    ours = MiniCPMV.from_pretrained(folder, dtype="float32")
    for layer in ours.params["text"]["layers"].values():
        if "A_log" in layer["mixer"]:
            layer["mixer"]["A_log"] -= A_LOG_SHIFT
    return ours


@pytest.fixture(scope="module")
def conversations(ours, photos):
    """Returns conversations with and without pictures, whose second halves count in the loss.

    They are shorter and longer than a chunk of the gated delta rule.
    """

    small = dataclasses.replace(ours.processor.image_config, scale_resolution=112)  # some 64 patches a picture
    processor = Processor(ours.processor.tokenizer, small, ours.processor.video_config)

    def conversation(*parts):
        inputs = processor([{"role": "user", "content": list(parts)}], max_slice_nums=1)
        return Conversation(inputs, np.arange(len(inputs.token_ids)) > len(inputs.token_ids) // 2)

    pictures = [
        {"type": "image", "image": photo.resize(size)} for photo, size in zip(photos, [(120, 90), (64, 160)], strict=True)
    ]
    words = [{"type": "text", "text": text} for text in ("Why is the sky blue?", "What is this? " * 8, "and")]
    return [
        conversation(words[0]),
        conversation(pictures[0], words[1]),
        conversation(pictures[1], words[2], pictures[0]),
        conversation(words[1]),
    ]


@pytest.fixture(scope="module")
def gradient(ours):
    """Returns a function: rows -> ((summed loss, loss by token), gradients)."""
    graph = model.schema(ours.config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, batch):
        def total(params):
            total, nll, _ = batch_loss(graph, params, batch, chunk=100)
            return total, nll

        return jax.value_and_grad(total, has_aux=True)(params)

    return lambda rows: run(ours.params, pack(rows, SHAPE, ours.config.vision))


def torch_gradients(folder, conversations, wanted):
    """Returns transformers' summed loss and its gradient for every released name."""
    oracle = Oracle(folder)
    named = dict(oracle.model.named_parameters())
    with torch.no_grad():
        for name in named:
            if name.endswith("A_log"):
                named[name] -= A_LOG_SHIFT
    total = 0.0
    for conversation in conversations:
        logits = oracle.model(**oracle.arguments(conversation.inputs), use_cache=False).logits[0]
        labels = torch.tensor(conversation.inputs.token_ids[1:].astype(np.int64))
        nll = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none")
        total = total + (nll * torch.tensor(conversation.loss_mask[1:])).sum()
    total.backward()
    return total.item(), {spec.dotted: named[spec.hf_name].grad.reshape(spec.shape).numpy() for spec in wanted}


def test_gradients_equal_transformers(folder, ours, conversations, gradient):
    wanted = param_specs(ours.config)
    expected_loss, expected = torch_gradients(folder, conversations, wanted)
    (loss, _), found = gradient([conversations[:2], conversations[2:]])
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    check_gradients(found, expected, wanted)


def check_gradients(found, expected, wanted):
    for spec, grad in zip(wanted, jax.tree.leaves(found), strict=True):
        if spec.dotted.endswith("k_proj.bias"):  # 0 up to rounding: a constant on all keys does not change a softmax
            assert max(np.abs(grad).max(), np.abs(expected[spec.dotted]).max()) < 1e-8
        else:
            assert relative_rms(grad, expected[spec.dotted]) <= FLOAT32_FORWARD, spec.dotted


def test_gradients_of_a_video_equal_transformers(folder, ours, gradient, photos, tmp_path):
    """A row of a data file, with a video of three frames; only its answer counts in the loss."""
    with av.open(tmp_path / "clip.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for side in range(3):
            frame = av.VideoFrame.from_image(photos[side % 2].resize((96, 64)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    row = {"query": "<video>What moved?", "response": "Nothing.", "videos": ["clip.mp4"]}
    messages = read_row(json.dumps(row), tmp_path).messages
    small = dataclasses.replace(ours.processor.video_config, scale_resolution=112)
    processor = Processor(ours.processor.tokenizer, ours.processor.image_config, small)
    one = answers.conversation(processor, AnswerMarkers.from_processor(processor), messages, max_num_frames=3)
    assert len(one.inputs.views) == 3
    words = processor.tokenizer.decode(one.inputs.token_ids[one.loss_mask])
    assert words == "Nothing.<|im_end|>"
    wanted = param_specs(ours.config)
    expected_loss, expected = torch_gradients(folder, [one], wanted)
    (loss, _), found = gradient([[one]])
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    check_gradients(found, expected, wanted)


def test_packed_rows_give_the_gradients_of_separate_conversations(conversations, gradient):
    (loss, nll), packed = gradient([[conversations[3], conversations[0]], [conversations[2], conversations[1]]])
    apart = [gradient([[conversation]]) for conversation in conversations]
    assert abs(loss - sum(found[0][0] for found in apart)) < 1e-5 * loss
    first, second = conversations[3].num_tokens, conversations[0].num_tokens
    assert relative_rms(nll[0, first : first + second - 1], apart[0][0][1][0, : second - 1]) < 1e-5
    summed = jax.tree.map(lambda *grads: jnp.stack(grads).sum(axis=0), *(grads for _, grads in apart))
    for found, expected in zip(jax.tree.leaves(packed), jax.tree.leaves(summed), strict=True):
        assert relative_rms(found, expected) < 5e-6 or np.abs(expected).max() < 1e-8
