"""Benchmark of full fine-tuning on this device: `python -m minicpmv46_jax.train.bench --model FOLDER`.

The model has the sizes of a checkpoint's config.json and random weights. AdamW trains every parameter, with
float32 masters and moments and bfloat16 computing. Two workloads are measured: rows of text, and rows with
1280x720 pictures in the text. Model FLOP utilisation is relative to the chip's bfloat16 peak. It counts the
FLOP that the model needs: three times the forward's products, half of attention's square because of
causality, and the gated delta rule as a recurrence. Recomputation does not count. A case that does not fit in
memory is skipped with a line of output.
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
from minicpmv46_jax.model.attention import Attention
from minicpmv46_jax.model.layer_kinds import LAYER_KINDS
from minicpmv46_jax.processing import Inputs
from minicpmv46_jax.train.batch import BatchShape, Conversation, TrainBatch, pack, stack
from minicpmv46_jax.train.forward import REMAT
from minicpmv46_jax.train.step import TrainState, make_step, new_state

# Dense bfloat16 FLOP a second from the vendors' data sheets, by the first words of jax.Device.device_kind.
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
WORDS = 128  # tokens of text that follow a picture


class BenchCase(NamedTuple):
    """A case to measure, on the command line REMAT:ROWS[:unrolled][:BACKEND].

    Attributes:
      remat: activations kept for the backward pass, one of `forward.REMAT`.
      rows: number of rows of a batch.
      scan_layers: see `forward.batch_loss`.
      backend: see `step.make_step`.
    """

    remat: str
    rows: int
    scan_layers: bool
    backend: str | None

    @classmethod
    def parse(cls, text: str) -> "BenchCase":
        """Parses a command-line argument.

        Raises:
          ValueError: it is not a case.
        """
        if not (found := re.fullmatch(rf"({'|'.join(REMAT)}):([1-9]\d*)(:{UNROLLED})?(?::(\w+))?", text)):
            raise ValueError(f"a case is {text!r}, expected REMAT:ROWS[:{UNROLLED}][:BACKEND], REMAT of {', '.join(REMAT)}")
        return cls(found[1], int(found[2]), found[3] is None, found[4])


def cut(config: ModelConfig, groups: int) -> ModelConfig:
    """Returns the configuration with `groups` groups of four text layers and 2 x `groups` vision layers."""
    kinds = config.text.layer_types[: 4 * groups]
    text = dataclasses.replace(config.text, num_hidden_layers=len(kinds), layer_types=kinds)
    vision = dataclasses.replace(config.vision, num_hidden_layers=2 * groups, insert_layer_id=groups - 1)
    return dataclasses.replace(config, text=text, vision=vision)


def text_flops(config: TextConfig, tokens: int) -> float:
    """Returns the FLOP of the forward over a row of `tokens` tokens, the output head included."""
    c, T = config, tokens
    mlp = 3 * c.hidden_size * c.intermediate_size
    attention = c.hidden_size * c.head_dim * (3 * c.num_attention_heads + 2 * c.num_key_value_heads)
    scores = c.num_attention_heads * c.head_dim * T  # q k^T and the product with the values, of which causality leaves half
    delta = c.hidden_size * (c.linear_conv_dim + 2 * c.linear_value_dim + 2 * c.linear_num_value_heads)
    rule = 3 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    full = sum(LAYER_KINDS[kind].mixer is Attention for kind in c.layer_types)
    a_token = c.num_hidden_layers * mlp + full * (attention + scores) + (c.num_hidden_layers - full) * (delta + rule)
    return 2.0 * T * (a_token + c.vocab_size * c.hidden_size)


def conversations(config: ModelConfig, tokens: int, pictures: bool) -> list[Conversation]:
    """Returns a row's conversations: one of text, or at most two of a 1280x720 picture and `WORDS` tokens."""
    if not pictures:
        ids = np.random.default_rng(0).integers(0, config.text.vocab_size, tokens).astype(np.int32)
        return [Conversation(Inputs(ids, ()), np.ones(tokens, bool))]
    inputs = photo_inputs(config, WORDS)
    learned = np.arange(len(inputs.token_ids)) >= len(inputs.token_ids) - WORDS
    if tokens < len(learned):
        raise ValueError(f"rows have {tokens} tokens, and a picture and its text take {len(learned)}")
    return [Conversation(inputs, learned)] * min(tokens // len(learned), 2)


def make_batch(config: ModelConfig, rows: int, tokens: int, pictures: bool) -> TrainBatch:
    """Returns a batch of `rows` equal rows; text fills the rest of a row with pictures."""
    row = conversations(config, tokens, pictures)
    if pictures:
        rest = tokens - sum(one.num_tokens for one in row)
        row = [*row, *conversations(config, rest, False)] if rest else row
    if not pictures:
        return stack([pack([row] * rows, BatchShape(rows, tokens), config.vision)])
    patches, views = sum(one.num_patches for one in row), sum(len(one.inputs.views) for one in row)
    return stack([pack([row] * rows, BatchShape(rows, tokens, rows * patches, rows * views), config.vision)])


def batch_flops(config: ModelConfig, batch: TrainBatch) -> float:
    """Returns the FLOP of a step: three times the forward's."""
    lengths = [np.count_nonzero(row == number) for row in batch.segments[0, 0] for number in np.unique(row[row > 0])]
    total = sum(text_flops(config.text, int(length)) for length in lengths)
    if batch.views is not None:
        photos = np.count_nonzero(batch.views.view_lens) // len(PHOTO_GRIDS)
        total += photos * tower_flops(config.vision, config.text.hidden_size, PHOTO_GRIDS)
    return 3 * total


def random_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns a state with random weights.

    All leaves repeat one pool of random numbers, because drawing each leaf's numbers takes longer than
    compiling.
    """
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
    """Compiles a case's step and measures it.

    Args:
      config, batch, case: the model, a step's input and the case.
      steps: number of timed steps, after one to warm up.
      kernels: True to print the device's kernels of one more step.
      compiler_options: XLA's options.

    Returns:
      Seconds to compile ("compile"), median seconds of a step ("seconds"), last loss ("loss") and bytes that
      the program holds on the device ("bytes").
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
    assert memory is not None  # only backends without memory statistics return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {"compile": compiling, "seconds": float(np.median(times[1:])), "loss": loss, "bytes": held}


def peak() -> tuple[float, str]:
    """Returns (the chip's bfloat16 FLOP a second, source of the number)."""
    kind = jax.devices()[0].device_kind
    known = next((rate for name, rate in PEAK.items() if kind.startswith(name)), None)
    return (known, "data sheet") if known else (matrix_rate(256, jnp.dtype(jnp.bfloat16)), "a product of 256 measured here")


def report(
    config: ModelConfig, name: str, case: BenchCase, batch: TrainBatch, rate: float, found: dict[str, float]
) -> dict[str, Any]:
    """Prints a case's line and returns its figures.

    Args:
      config, name, case, batch: the model, the workload's name, the case and a step's input.
      rate: the chip's peak FLOP a second.
      found: results of `measure`.
    """
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
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.train.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder; only its config.json is read")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one to warm up (default: %(default)s)")
    case = {"nargs": "*", "type": BenchCase.parse, "metavar": f"REMAT:ROWS[:{UNROLLED}][:BACKEND]"}
    parser.add_argument("--text", **case, default=[BenchCase.parse(x) for x in CASES["text"]], help="cases with rows of text")
    parser.add_argument("--pictures", **case, default=[BenchCase.parse(x) for x in CASES["pictures"]], help="cases with pictures")
    parser.add_argument("--groups", type=int, default=0, help="groups of four layers to keep (default: 0, all)")
    parser.add_argument("--kernels", action="store_true", help="also print the device's kernels of a step of each case")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
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
            print(f"{name:9s} {case.rows:3d} rows, keeps {case.remat}: does not fit in memory", flush=True)
            continue
        rows.append(report(config, name, case, batch, rate, found))
        if args.json:
            found = {"device": device, "jax": jax.__version__, "tokens": args.tokens, "peak": rate, "rows": rows}
            args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
