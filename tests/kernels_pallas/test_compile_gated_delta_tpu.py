"""The gated delta kernels at the real shapes, compiled for TPUs that are not here: memory, donation, schedule.

What is expected stands in expected/gated_delta_tpu.json; `python -m tests.compile_gated_delta_tpu expect` writes it anew. With
the libtpu that it was written for, numbers must agree within 2 %, so that a gain is written down too; another version's compiler
schedules differently, and may take up to a quarter more.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from tests import ROOT

EXPECTED = json.loads((ROOT / "tests" / "expected" / "gated_delta_tpu.json").read_text())
STATE = {"forward": 8 * 2**20, "recurrent": 100 * (2**20 + 3 * 6144 * 2)}  # what is donated: memory, and tails in bfloat16

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: EXTRA=compile")


def said(what, chip):
    command = [sys.executable, "-m", "tests.kernels_pallas.compile_gated_delta_tpu", what, chip]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def holds(found, expected):
    same = importlib.metadata.version("libtpu") == EXPECTED["libtpu"]
    return 0.98 * expected <= found <= 1.02 * expected if same else found <= 1.25 * expected


@pytest.mark.parametrize("chip", EXPECTED["memory"])
def test_memory_and_donation(chip):
    found = said("memory", chip)
    print(chip, found)
    assert found.keys() == EXPECTED["memory"][chip].keys() == {"forward", "backward", "recurrent"}
    for name, numbers in EXPECTED["memory"][chip].items():
        assert holds(found[name]["temporary"], numbers["temporary"]), name
        assert found[name]["aliased"] >= STATE.get(name, 0), f"{name} copies the state that it was given"


@pytest.mark.parametrize("chip", EXPECTED["schedule"])
def test_bundles_and_spills(chip):
    found = said("schedule", chip)
    print(chip, found)
    assert found.keys() == EXPECTED["schedule"][chip].keys() == {"forward", "backward", "recurrent"}
    for name, numbers in EXPECTED["schedule"][chip].items():
        for what, expected in numbers.items():
            assert found[name][what] > 0, f"{name}: no {what} read from the compiler's listing"
            assert holds(found[name][what], expected), (name, what)
