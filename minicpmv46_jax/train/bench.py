"""How fast full fine-tuning runs on this device: `python -m minicpmv46_jax.train.bench`.

The released sizes with random weights, every parameter trained by AdamW: float32 masters and moments, bfloat16 computing. Two
workloads: rows of text, and rows in which 1280x720 pictures stand among the text. Model FLOP utilisation counts what the model
needs (three times the forward products; causal attention half; the gated delta rule as its recurrence), not what is computed
twice, over the chip's own bfloat16 peak. Sizes that the memory cannot hold are skipped, with a line that says so.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minicpmv46_jax import model
from minicpmv46_jax.bench import PHOTO, matrix_rate, photo_inputs, tower_flops
from minicpmv46_jax.config import ModelConfig, TextConfig, VisionConfig
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.train.batch import BatchShape, Conversation, TrainBatch, pack, stack
from minicpmv46_jax.train.step import TrainState, make_step, new_state

RELEASED = ModelConfig(  # config.json of openbmb/MiniCPM-V-4_6
    text=TextConfig(
        vocab_size=248094,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        layer_types=("linear_attention", "linear_attention", "linear_attention", "full_attention") * 6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        rope_theta=1e7,
        rotary_dim=64,
        rms_norm_eps=1e-6,
        max_position_embeddings=262144,
        linear_conv_kernel_dim=4,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    vision=VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_channels=3,
        patch_size=14,
        image_size=980,
        layer_norm_eps=1e-6,
        insert_layer_id=6,
    ),
    image_token_id=248056,
    video_token_id=248057,
)
# Dense bfloat16 FLOP a second, from the makers' data sheets; by the start of jax.Device.device_kind.
PEAK = {
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100": 312e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
PLANS = {"text": ("layer:16", "dots:8", "layer:32"), "pictures": ("layer:8", "layer:4", "layer:2")}  # remat:rows


def cut(layers: int) -> ModelConfig:
    """The released sizes with so many groups of four text layers, and a tower of twice as many layers."""
    text = dataclasses.replace(RELEASED.text, num_hidden_layers=4 * layers, layer_types=RELEASED.text.layer_types[: 4 * layers])
    vision = dataclasses.replace(RELEASED.vision, num_hidden_layers=2 * layers, insert_layer_id=layers - 1)
    return dataclasses.replace(RELEASED, text=text, vision=vision)


def text_flops(config: TextConfig, tokens: int) -> float:
    """Multiply-adds x 2 of reading a row of so many tokens, the head included."""
    c, T = config, tokens
    mlp = 3 * c.hidden_size * c.intermediate_size
    attention = c.hidden_size * c.head_dim * (3 * c.num_attention_heads + 2 * c.num_key_value_heads)
    scores = c.num_attention_heads * c.head_dim * T  # q k^T and the weights' product, half of them in the past
    delta = c.hidden_size * (c.linear_conv_dim + 2 * c.linear_value_dim + 2 * c.linear_num_value_heads)
    rule = 3 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    full = c.layer_types.count("full_attention")
    a_token = c.num_hidden_layers * mlp + full * (attention + scores) + (c.num_hidden_layers - full) * (delta + rule)
    return 2.0 * T * (a_token + c.vocab_size * c.hidden_size)


def conversations(config: ModelConfig, tokens: int, pictures: bool) -> list[Conversation]:
    """A row's: one of words; or as many as fit, each a 1280x720 picture and 128 words."""
    if not pictures:
        ids = np.random.default_rng(0).integers(0, config.text.vocab_size, tokens).astype(np.int32)
        return [Conversation(Inputs(ids, ()), np.ones(tokens, bool))]
    inputs = photo_inputs(config, 128)
    learned = np.arange(len(inputs.token_ids)) >= len(inputs.token_ids) - 128
    return [Conversation(inputs, learned)] * min(tokens // len(learned), 2)


def make_batch(config: ModelConfig, rows: int, tokens: int, pictures: bool) -> TrainBatch:
    """`rows` equal rows; beside the pictures stand conversations of words alone."""
    row = conversations(config, tokens, pictures)
    if pictures:
        rest = tokens - sum(one.tokens for one in row)
        row = [*row, *conversations(config, rest, False)] if rest else row
    views, patches = (len(row) - 1) * len(PHOTO), (len(row) - 1) * sum(h * w for h, w in PHOTO)
    shape = BatchShape(rows, tokens, rows * patches, rows * views) if pictures else BatchShape(rows, tokens)
    return stack([pack([row] * rows, shape, config.vision)])


def batch_flops(config: ModelConfig, batch: TrainBatch) -> float:
    """Of a step: three times the forward's."""
    lengths = [np.count_nonzero(row == number) for row in batch.segments[0, 0] for number in np.unique(row[row > 0])]
    total = sum(text_flops(config.text, int(length)) for length in lengths)
    if batch.views is not None:
        photos = np.count_nonzero(batch.views.lengths) // len(PHOTO)
        total += photos * tower_flops(config.vision, config.text.hidden_size, PHOTO)
    return 3 * total


def random_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Weights as a model begins with; drawn leaf by leaf."""
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.key(random.integers(2**31))
        return jnp.zeros(leaf.shape) if len(leaf.shape) == 1 else 0.02 * jax.random.normal(key, leaf.shape)

    params = jax.tree.map(draw, model.parameter_shapes(config))
    return new_state(params, jax.tree.map(lambda x: None, params), optimizer)


def measure(config: ModelConfig, batch: TrainBatch, remat: str, steps: int, profile: str | None = None) -> dict[str, float]:
    """Seconds to compile and of a step (median), the loss, and the most bytes that the device held (0: not known).

    `profile`: a folder for a profile of one more step.
    """
    optimizer = optax.adamw(1e-5)
    state = random_state(config, optimizer)
    step = jax.jit(make_step(config, optimizer, remat=remat), donate_argnums=0)
    batch = jax.device_put(batch)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compiling = time.perf_counter() - start
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics.loss)
        times.append(time.perf_counter() - start)
    if profile:
        with jax.profiler.trace(profile):
            jax.block_until_ready(compiled(state, batch))
    held = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {"compile": compiling, "seconds": float(np.median(times[1:])), "loss": loss, "bytes": held}


def peak() -> tuple[float, str]:
    """The chip's FLOP a second in bfloat16, and where the number is from."""
    kind = jax.devices()[0].device_kind
    known = next((rate for name, rate in PEAK.items() if kind.startswith(name)), None)
    return (known, "data sheet") if known else (matrix_rate(1024, jnp.dtype(jnp.bfloat16)), "a product of 1,024 measured here")


def report(config: ModelConfig, name: str, plan: str, tokens: int, steps: int, rate: float, profile: str | None = None) -> bool:
    """Measures one plan and prints its line, `rate` being the chip's; False where the memory cannot hold it."""
    remat, rows = plan.split(":")
    batch = make_batch(config, int(rows), tokens, name == "pictures")
    try:
        found = measure(config, batch, remat, steps, profile and f"{profile}/{name}-{remat}-{rows}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{name:9s} {rows:>3s} x {tokens}, keeps {remat:5s}: does not fit the memory", flush=True)
        return False
    read = int(np.count_nonzero(batch.segments))
    seconds, utilised = found["seconds"], batch_flops(config, batch) / found["seconds"] / rate
    photos = 0 if batch.views is None else np.count_nonzero(batch.views.lengths) // len(PHOTO)
    print(
        f"{name:9s} {rows:>3s} x {tokens}, keeps {remat:5s}: {seconds * 1e3:8.1f} ms a step, {read / seconds:9,.0f} tokens/s, "
        f"{photos / seconds:6.1f} pictures/s, MFU {utilised:6.1%}, {found['bytes'] / 2**30:5.1f} GiB held, "
        f"loss {found['loss']:.2f}, compiled in {found['compile']:.0f} s",
        flush=True,
    )
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.train.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one to warm up")
    parser.add_argument("--text", nargs="*", default=PLANS["text"], metavar="REMAT:ROWS", help="plans for rows of text")
    parser.add_argument("--pictures", nargs="*", default=PLANS["pictures"], metavar="REMAT:ROWS", help="plans with pictures")
    parser.add_argument("--all", action="store_true", help="try all plans; else pictures stop at the first that fits")
    parser.add_argument("--groups", type=int, default=0, help="a model cut to so many groups of four layers; 0: the whole one")
    parser.add_argument("--profile", metavar="DIR", help="write a profile of one more step of each plan")
    args = parser.parse_args(arguments)
    config = cut(args.groups) if args.groups else RELEASED
    rate, source = peak()
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.parameter_shapes(config)))
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {parameters:,} parameters; peak {rate / 1e12:.4g} TFLOP/s ({source})")
    for name, plans in (("text", args.text), ("pictures", args.pictures)):
        for plan in plans:
            if report(config, name, plan, args.tokens, args.steps, rate, args.profile) and name == "pictures" and not args.all:
                break


if __name__ == "__main__":
    sys.exit(main())
