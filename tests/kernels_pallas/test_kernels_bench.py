"""The kernels' benchmark without a chip: its tables, its lines, and a device without kernels."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import bench, benchmarking
from kernels_pallas.causal_attention import bench as causal
from kernels_pallas.causal_attention.shapes import CAUSAL
from kernels_pallas.gated_delta import bench as gated_delta
from kernels_pallas.gated_delta import packed_bench as packed_gated_delta
from kernels_pallas.gated_delta import shapes
from kernels_pallas.packed_attention import bench as packed
from kernels_pallas.packed_attention.shapes import PACKED
from kernels_pallas.paged_attention import bench as paged
from kernels_pallas.paged_attention.shapes import PAGED
from kernels_pallas.top_k_top_p import bench as top_k_top_p
from kernels_pallas.top_k_top_p.shapes import TOP_K_TOP_P
from tests import ROOT


def test_every_shape_is_in_the_table():
    benchmarks = {benchmark.name: benchmark for benchmark in gated_delta.benchmarks()}
    assert len(benchmarks) == 2 * len(shapes.CHUNKED) + len(shapes.RECURRENT)
    prompt = benchmarks["gated delta, 1 x 8,192"]
    assert prompt.bytes == pytest.approx(
        8192 * (6144 + 32 + 2048) * 2 + 2 * 2**20
    )  # projections in, outputs out, memory both ways
    assert prompt.flops == 8192 * 16 * 3 * 2 * 128 * 128


def test_attention_is_in_the_table():
    benchmarks = {benchmark.name: benchmark for benchmark in (*packed.benchmarks(), *paged.benchmarks())}
    assert len(benchmarks) == 2 * len(PACKED) + 1 + len(PAGED)
    photo = benchmarks["packed attention, 1 photo"]
    assert photo.flops == 4 * 16 * 72 * (1056**2 + 6 * 1008**2)
    assert benchmarks["packed attention backward, 1 photo"].flops == 2.5 * photo.flops
    decode = benchmarks["paged attention, decode 100 x 1,024"]
    assert decode.bytes == 100 * (1024 * 2048 + 2 * 4096)  # keys and values once, queries in, answers out
    prefill = benchmarks["paged attention, prefill 2,048 from nothing"]
    assert prefill.flops == 4 * 8 * 256 * 2048 * 2049 / 2


def test_backward_call_runs_the_backward_pass_alone():
    (x_bar, y_bar) = benchmarking.backward_call(lambda x, y: 2 * x + 3 * y, jnp.ones(4), jnp.ones(4))()
    np.testing.assert_allclose(3 * x_bar, 2 * y_bar, rtol=1e-6)


def test_training_is_in_the_table():
    benchmarks = {benchmark.name: benchmark for benchmark in (*causal.benchmarks(), *packed_gated_delta.benchmarks())}
    assert len(benchmarks) == 2 * len(CAUSAL) + 2
    whole = benchmarks["causal attention, 8 x 4,096"]
    assert whole.flops == 4 * 8 * 8 * 256 * 4096 * 4097 / 2
    assert benchmarks["causal attention backward, 8 x 4,096"].flops == 2.5 * whole.flops
    assert {sum(rows.lengths) for rows in CAUSAL} == {4096}


def test_sampling_is_in_the_table():
    benchmarks = {benchmark.name: benchmark for benchmark in top_k_top_p.benchmarks()}
    assert len(benchmarks) == len(TOP_K_TOP_P)
    assert benchmarks["top-k top-p, top-p, 128 rows"].bytes == 128 * 248_094 * 4
    assert benchmarks["top-k top-p, top-p, 1 row"].run("reference")().shape == (1,)


def test_reference_benchmark_runs_on_any_device():
    step = next(benchmark for benchmark in gated_delta.benchmarks() if benchmark.name == "gated delta step, 1 slot")
    assert step.run("reference")().shape == (1, 1, 16, 128)


def test_line_has_baselines_and_share_of_the_limit():
    row = {
        "name": "x",
        "us": 10.0,
        "gb_s": 1.0,
        "tflop_s": 2.0,
        "of_limit": 0.5,
        "reference_us": 40.0,
        "baselines_us": {"fla": 15.0},
    }
    assert "50% of the limit; reference 40.0 us (4.00 x), fla 15.0 us (1.50 x)" in bench.line(row)


def test_device_without_kernels_is_refused_by_name():
    command = [sys.executable, "-m", "kernels_pallas.bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there are kernels for hopper and tpu, and the device is 'cpu'" in done.stderr
