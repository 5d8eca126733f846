"""How fast full fine-tuning runs on this device: `python -m minicpmv46_jax.train.bench --model FOLDER`.

The sizes of a checkpoint's config.json with random weights, every parameter trained by AdamW: float32 masters and moments,
bfloat16 computing. Two workloads: rows of text, and rows in which 1280x720 pictures stand among the text. Model FLOP utilisation
counts what the model needs (three times the forward products; causal attention half; the gated delta rule as its recurrence),
not what is computed twice, over the chip's own bfloat16 peak. Plans that the memory cannot hold are skipped, with a line that
says so.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minicpmv46_jax import model
from minicpmv46_jax.bench import PHOTO_GRIDS, matrix_rate, photo_inputs, print_kernel_times, tower_flops
from minicpmv46_jax.config import ModelConfig, TextConfig
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.train.batch import BatchShape, Conversation, TrainBatch, pack, stack
from minicpmv46_jax.train.forward import REMAT
from minicpmv46_jax.train.step import TrainState, make_step, new_state

# Dense bfloat16 FLOP a second, from the makers' data sheets; by the start of jax.Device.device_kind.
PEAK = {
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100": 312e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
CASES = {"text": ("none:8:unrolled", "layer:8", "layer:8:reference"), "pictures": ("layer:4",)}
UNROLLED = "unrolled"
WORDS = 128  # that follow a picture


class BenchCase(NamedTuple):
    """REMAT:ROWS[:unrolled][:BACKEND].

    What a step keeps (`forward.REMAT`), its rows, whether layers are scanned (`forward.loss`), who runs it (`model.schema`).
    """

    remat: str
    rows: int
    scan_layers: bool
    backend: str | None

    @classmethod
    def parse(cls, text: str) -> "BenchCase":
        """Raises ValueError where it is none."""
        if not (found := re.fullmatch(rf"({'|'.join(REMAT)}):([1-9]\d*)(:{UNROLLED})?(?::(\w+))?", text)):
            raise ValueError(f"a plan is {text!r}, expected REMAT:ROWS[:{UNROLLED}][:BACKEND], REMAT of {', '.join(REMAT)}")
        return cls(found[1], int(found[2]), found[3] is None, found[4])


def cut(config: ModelConfig, groups: int) -> ModelConfig:
    """With so many of the text's groups of four layers, and a tower of twice as many layers."""
    kinds = config.text.layer_types[: 4 * groups]
    text = dataclasses.replace(config.text, num_hidden_layers=len(kinds), layer_types=kinds)
    vision = dataclasses.replace(config.vision, num_hidden_layers=2 * groups, insert_layer_id=groups - 1)
    return dataclasses.replace(config, text=text, vision=vision)


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
    """A row's: one of words; or as many as fit, at most two, each a 1280x720 picture and `WORDS` words."""
    if not pictures:
        ids = np.random.default_rng(0).integers(0, config.text.vocab_size, tokens).astype(np.int32)
        return [Conversation(Inputs(ids, ()), np.ones(tokens, bool))]
    inputs = photo_inputs(config, WORDS)
    learned = np.arange(len(inputs.token_ids)) >= len(inputs.token_ids) - WORDS
    if tokens < len(learned):
        raise ValueError(f"rows have {tokens} tokens, and a picture and its words take {len(learned)}")
    return [Conversation(inputs, learned)] * min(tokens // len(learned), 2)


def make_batch(config: ModelConfig, rows: int, tokens: int, pictures: bool) -> TrainBatch:
    """`rows` equal rows; beside the pictures stand conversations of words alone."""
    row = conversations(config, tokens, pictures)
    if pictures:
        rest = tokens - sum(one.num_tokens for one in row)
        row = [*row, *conversations(config, rest, False)] if rest else row
    if not pictures:
        return stack([pack([row] * rows, BatchShape(rows, tokens), config.vision)])
    patches, views = sum(one.num_patches for one in row), sum(len(one.inputs.views) for one in row)
    return stack([pack([row] * rows, BatchShape(rows, tokens, rows * patches, rows * views), config.vision)])


def batch_flops(config: ModelConfig, batch: TrainBatch) -> float:
    """Of a step: three times the forward's."""
    lengths = [np.count_nonzero(row == number) for row in batch.segments[0, 0] for number in np.unique(row[row > 0])]
    total = sum(text_flops(config.text, int(length)) for length in lengths)
    if batch.views is not None:
        photos = np.count_nonzero(batch.views.view_lens) // len(PHOTO_GRIDS)
        total += photos * tower_flops(config.vision, config.text.hidden_size, PHOTO_GRIDS)
    return 3 * total


def random_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Weights like those a model begins with, out of one pool of numbers: drawing each leaf's took longer than compiling."""
    pool = 0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(np.zeros(leaf.shape, np.float32) if len(leaf.shape) == 1 else np.resize(pool, leaf.shape))

    params = jax.tree.map(draw, model.parameter_shapes(config))
    return new_state(params, jax.tree.map(lambda x: None, params), optimizer)


def measure(
    config: ModelConfig,
    batch: TrainBatch,
    case: BenchCase,
    steps: int,
    kernels: bool,
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Seconds to compile and of a step (median), the last loss, and the bytes that the program holds on the device.

    `kernels`: print those of one more step. `compiler_options`: XLA's.
    """
    optimizer = optax.adamw(1e-5)
    state = random_state(config, optimizer)
    step = make_step(config, optimizer, remat=case.remat, scan_layers=case.scan_layers, backend=case.backend)
    step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options)
    batch = jax.device_put(batch)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compiling = time.perf_counter() - start
    times = []

    def run() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics.loss

    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = float(run())
        times.append(time.perf_counter() - start)
    if kernels:
        print_kernel_times("a step", run, 1)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {"compile": compiling, "seconds": float(np.median(times[1:])), "loss": loss, "bytes": held}


def peak() -> tuple[float, str]:
    """The chip's FLOP a second in bfloat16, and where the number is from."""
    kind = jax.devices()[0].device_kind
    known = next((rate for name, rate in PEAK.items() if kind.startswith(name)), None)
    return (known, "data sheet") if known else (matrix_rate(256, jnp.dtype(jnp.bfloat16)), "a product of 256 measured here")


def report(
    config: ModelConfig, name: str, case: BenchCase, batch: TrainBatch, rate: float, found: dict[str, float]
) -> dict[str, Any]:
    """The figures of a plan; prints their line. `rate` is the chip's."""
    seconds, tokens = found["seconds"], int(np.count_nonzero(batch.segments))
    photos = 0 if batch.views is None else np.count_nonzero(batch.views.view_lens) // len(PHOTO_GRIDS)
    figures = {
        "workload": name,
        **case._asdict(),
        **found,
        "tokens_per_second": tokens / seconds,
        "pictures_per_second": photos / seconds,
        "mfu": batch_flops(config, batch) / seconds / rate,
    }
    speeds = f"{figures['tokens_per_second']:9,.0f} tokens/s, {figures['pictures_per_second']:6.1f} pictures/s"
    rest = f"{found['bytes'] / 2**30:5.1f} GiB, loss {found['loss']:.2f}, compiled in {found['compile']:.0f} s"
    what = (
        f"{name:9s} {case.rows:3d} rows, keeps {case.remat:6s}{'' if case.scan_layers else UNROLLED:9s} {case.backend or '':9s}"
    )
    print(f"{what}: {seconds * 1e3:8.1f} ms a step, {speeds}, MFU {figures['mfu']:6.1%}, {rest}", flush=True)
    return figures


def main(arguments: Sequence[str] | None = None, compiler_options: dict[str, Any] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.train.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder; only its config.json is read")
    parser.add_argument("--tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one to warm up")
    case = {"nargs": "*", "type": BenchCase.parse, "metavar": f"REMAT:ROWS[:{UNROLLED}][:BACKEND]"}
    parser.add_argument("--text", **case, default=[BenchCase.parse(x) for x in CASES["text"]], help="plans for rows of text")
    parser.add_argument("--pictures", **case, default=[BenchCase.parse(x) for x in CASES["pictures"]], help="plans with pictures")
    parser.add_argument("--groups", type=int, default=0, help="a model cut to so many groups of four layers; 0: the whole one")
    parser.add_argument("--kernels", action="store_true", help="print the device's kernels of a step of each plan as well")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(arguments)
    config = ModelConfig.from_folder(args.model)
    config = cut(config, args.groups) if args.groups else config
    rate, source = peak()
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.parameter_shapes(config)))
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {parameters:,} parameters; peak {rate / 1e12:.4g} TFLOP/s ({source})")
    rows = []
    for name, case in [("text", case) for case in args.text] + [("pictures", case) for case in args.pictures]:
        batch = make_batch(config, case.rows, args.tokens, name == "pictures")
        try:
            found = measure(config, batch, case, args.steps, args.kernels, compiler_options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name:9s} {case.rows:3d} rows, keeps {case.remat}: does not fit the memory", flush=True)
            continue
        rows.append(report(config, name, case, batch, rate, found))
        if args.json:
            found = {"device": device, "jax": jax.__version__, "tokens": args.tokens, "peak": rate, "rows": rows}
            args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
