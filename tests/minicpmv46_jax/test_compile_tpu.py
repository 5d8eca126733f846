"""Ahead-of-time compilation of whole steps for TPUs: memory, donation and kernels.

The steps are those of the released size and of the demo model. libtpu's compiler needs no TPU, but a process
of its own, because its settings and mesh differ from the other tests'. Nothing runs.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests import ROOT

HBM = {"v5e": 16e9, "v6e": 32e9, "v5p": 95e9}
KERNELS = {
    "decode": {"gated_delta_recurrent", "paged_attention"},
    "prefill": {"gated_delta_chunked", "paged_attention"},
    "encode": {"packed_attention"},
}
TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: EXTRA=compile")


def compiled(*arguments):
    command = [sys.executable, "-m", "tests.minicpmv46_jax.compile_steps", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_steps_compile_and_fit(chip):
    steps = compiled(TOPOLOGIES[chip])
    assert {name: set(step["kernels"]) for name, step in steps.items()} == KERNELS
    for name, step in steps.items():
        print(chip, name, step)
        assert step["arguments"] + step["temporary"] < HBM[chip], name
    for name in ("decode", "prefill"):
        assert steps[name]["aliased"] >= steps[name]["state"], f"{name} copies the state that it was given"


def test_demo_steps_compile():
    """The demo model's heads are too narrow for the text's kernels, so only the tower has one."""
    steps = compiled(TOPOLOGIES["v5e"], "demo")
    assert {name: set(step["kernels"]) for name, step in steps.items()} == {
        "decode": set(),
        "prefill": set(),
        "encode": {"packed_attention"},
    }
