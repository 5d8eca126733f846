"""Speed of one conversation on this device: `python -m minicpmv46_jax.bench --model FOLDER`.

Weights are random unless `--load` is given: speed does not depend on them, and only config.json is read.
Times are medians of the host's clock around work that is waited for. The device's own limits are measured
first: a large copy for bandwidth, a large product for arithmetic. On an accelerator both are in bfloat16 by
its profiler, as in `kernels_pallas.bench`.
"""

import argparse
import collections
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.benchmarking import device_limits, device_microseconds, kernel_times
from kernels_pallas.paged_attention import PAGE
from minicpmv46_jax import checkpoint, model
from minicpmv46_jax.config import GenerationConfig, ModelConfig, TextConfig, VisionConfig
from minicpmv46_jax.generation.generate import Generator
from minicpmv46_jax.generation.options import generation_options
from minicpmv46_jax.model import packing
from minicpmv46_jax.model.attention import Attention, KeyValues, write_pages
from minicpmv46_jax.model.packing import MERGES
from minicpmv46_jax.processing import Inputs, View

PHOTO_GRIDS = [(24, 44)] + [(28, 36)] * 6  # patch grids of a 1280 x 720 image: its source view and 2 x 3 slices


def median_seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Measures the median time of `run` to a ready result, after two warm-up runs."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def copy_bandwidth(size: int) -> float:
    """Measures bytes per second, read plus written, of copying `size` bytes on the device."""
    x = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
    copy = jax.jit(lambda x: -x)
    return 2 * x.nbytes / median_seconds(lambda: copy(x))


def matrix_rate(n: int, dtype: jnp.dtype) -> float:
    """Measures FLOP per second of an n x n x n product of random numbers."""
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * n**3 / median_seconds(lambda: product(a))


def tower_flops(config: VisionConfig, text_width: int, grids: list[tuple[int, int]]) -> float:
    """Counts multiply-adds x 2 of encoding these views in "16x", without padding."""
    D, F = config.hidden_size, config.intermediate_size
    total = 0.0
    for h, w in grids:
        n = h * w
        for layer in range(config.num_hidden_layers):
            rows = n if layer <= config.insert_layer_id else n // 4
            total += rows * 2 * (4 * D * D + 2 * D * F) + 4 * rows * rows * D
        windows = n // 4
        total += n * 2 * 4 * D * D + n * 4 * 4 * D + windows * 2 * (4 * D * 4 * F + 4 * F * D)
        total += windows // 4 * 2 * (4 * D * 4 * D + 4 * D * text_width) + n * 2 * config.patch_dim * D
    return total


def photo_inputs(config: ModelConfig, words: int) -> Inputs:
    """Makes a prompt of a random 1280 x 720 image and `words` random tokens."""
    rng = np.random.default_rng(0)
    views, at = [], 0
    for h, w in PHOTO_GRIDS:
        tokens = h * w // 4 ** MERGES["16x"]
        pixels = rng.integers(0, 256, (h * w, config.vision.patch_dim), np.uint8)
        table = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(config.vision.num_channels, axis=0)
        views.append(View(pixels, (h, w), table, at, tokens, "16x"))
        at += tokens
    ids = np.concatenate([np.full(at, config.image_token_id), rng.integers(0, 1000, words)]).astype(np.int32)
    return Inputs(ids, tuple(views))


def decode_seconds(generator: Generator, inputs: Inputs, tokens: int = 257) -> tuple[float, float]:
    """Measures the time to the first token, and the time per token after it."""
    options = generation_options(GenerationConfig(), max_new_tokens=tokens, temperature=0.0)
    firsts, rests = [], []
    for _ in range(5):
        start = time.perf_counter()
        stream = generator.tokens(inputs, options)
        next(stream)
        first = time.perf_counter()
        count = sum(1 for _ in stream)
        firsts.append(first - start)
        rests.append((time.perf_counter() - first) / count)
    return statistics.median(firsts[1:]), statistics.median(rests[1:])


def encode_seconds(generator: Generator, pictures: int) -> float:
    """Measures the tower on `pictures` 1280 x 720 images in one pass, with the patches on the device."""
    views, side = photo_inputs(generator.config, 1).views * pictures, generator.config.vision.positions_per_side
    ((_, packed),) = packing.pack(views, side, limit=sum(h * w for h, w in PHOTO_GRIDS) * pictures)
    packed, graph = jax.device_put(packed), model.schema(generator.config).vision
    encode = jax.jit(functools.partial(model.encode, graph))
    return median_seconds(lambda: encode(generator.params["vision"], packed))


def attention_overhead(config: TextConfig, tokens: int, dtype: jnp.dtype) -> float:
    """Measures one layer's work beside paged attention: norms, rotary and page writes (microseconds).

    It is an upper bound of the time that fusing them into the kernel could save.
    """
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jnp.ones(x.shape, dtype), shapes)
    projected = (N, 2 * H), (K, H), (K, H)
    q, k, v = (jax.random.normal(jax.random.key(0), (tokens, *shape), dtype) for shape in projected)
    empty = jnp.zeros((-(-tokens // PAGE), PAGE, K * H), dtype)
    places = jnp.arange(tokens, dtype=jnp.int32)

    @functools.partial(jax.jit, donate_argnums=3)
    def run(q: jax.Array, k: jax.Array, v: jax.Array, state: KeyValues) -> tuple[jax.Array, KeyValues]:
        q, k = nnx.merge(graph, params).norm_and_rotate(q[..., :H], k, places)
        return q, write_pages(state, k, v, places, places // PAGE)

    state = KeyValues(empty, empty + 0)

    def call() -> jax.Array:
        nonlocal state
        turned, state = run(q, k, v, state)
        return turned

    return device_microseconds(call)


def print_kernel_times(title: str, run: Callable[[], object], parts: int) -> None:
    """Prints the device's kernels of one of `parts` equal parts of the run: their number and times."""
    times = collections.defaultdict(list)
    for name, us in kernel_times(run, 1):
        times[name].append(us)
    total, count = sum(map(sum, times.values())), sum(map(len, times.values()))
    print(f"{title}: {count / parts:.1f} kernels, {total / parts:.1f} us")
    for name, runs in sorted(times.items(), key=lambda item: -sum(item[1]))[:40]:
        print(f"  {len(runs) / parts:7.2f} x {sum(runs) / len(runs):8.1f} us = {sum(runs) / parts:8.1f} us  {name[:100]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint folder; without --load only its config.json is read"
    )
    parser.add_argument("--load", action="store_true", help="load the checkpoint's weights instead of random ones")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", action="store_true", help="also print the device's kernels of each part")
    args = parser.parse_args(arguments)
    config, dtype = ModelConfig.from_folder(args.model), jnp.dtype(args.dtype)
    on_cpu = jax.default_backend() == "cpu"
    bandwidth, rate = (copy_bandwidth(2**26), matrix_rate(1024, dtype)) if on_cpu else device_limits()
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {args.dtype}: copies {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s"
    )

    params = checkpoint.load_params(args.model, config, dtype) if args.load else model.init_params(config, dtype=dtype)
    generator = Generator(config, params)
    text_bytes = sum(x.nbytes for x in jax.tree.leaves(params["text"]))
    inputs = photo_inputs(config, 128)
    words = Inputs(inputs.token_ids[-128:], ())
    long_words = Inputs(np.random.default_rng(1).integers(0, 1000, 2048).astype(np.int32), ())

    rows = []
    first, rest = decode_seconds(generator, words)
    rows.append(("text, 128 tokens: first token", first * 1e3, "ms", ""))
    limit = text_bytes / bandwidth
    rows.append(("decode, one conversation: a token", rest * 1e3, "ms", f"{limit / rest:.0%} of reading the weights once"))
    prefill = median_seconds(lambda: generator.prefill(long_words)[0])
    flops = 2 * (text_bytes / dtype.itemsize) * len(long_words.token_ids)
    rows.append(("prefill of 2,048 tokens", prefill * 1e3, "ms", f"{flops / prefill / rate:.0%} of the matrix rate"))
    encode = median_seconds(lambda: generator.features(inputs.views)[0])
    flops = tower_flops(config.vision, config.text.hidden_size, PHOTO_GRIDS)
    rows.append(("encode a 1280x720 picture", encode * 1e3, "ms", f"{flops / encode / rate:.0%} of the matrix rate"))
    if not on_cpu:
        many = encode_seconds(generator, 16)
        rows.append(("tower, 16 of them in one pass", many * 1e3, "ms", f"{16 * flops / many / rate:.0%} of the matrix rate"))
        for tokens in (100, 2048):
            name, us = f"beside paged attention, {tokens:,} tokens", attention_overhead(config.text, tokens, dtype)
            rows.append((name, us / 1e3, "ms", "norms, rotary and page writes of one layer"))
    first, _ = decode_seconds(generator, inputs, tokens=2)
    rows.append(("picture and 128 tokens: first token", first * 1e3, "ms", "without decoding and slicing of the file"))
    for name, value, unit, note in rows:
        print(f"{name:38s} {value:9.2f} {unit}  {note}")
    if args.kernels:
        options = generation_options(GenerationConfig(), max_new_tokens=65, temperature=0.0)
        print_kernel_times("a token, with its share of a prefill of 128", lambda: list(generator.tokens(words, options)), 65)
        print_kernel_times("prefill of 2,048 tokens", lambda: generator.prefill(long_words)[0], 1)
        print_kernel_times("encode a 1280x720 picture", lambda: generator.features(inputs.views)[0], 1)


if __name__ == "__main__":
    sys.exit(main())
