"""The gated delta kernels at the real shapes, compiled for TPUs that are not here.

The tests cover memory, donation and schedule. The expected figures are in expected/gated_delta_tpu.json;
`python -m tests.kernels_pallas.compile_gated_delta_tpu expect` rewrites them. With the same libtpu, figures
must agree within 2 %, so that gains are recorded too. Another version's compiler schedules differently, and
may take up to a quarter more.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from tests import ROOT

EXPECTED = json.loads((ROOT / "tests" / "expected" / "gated_delta_tpu.json").read_text())
# Donated bytes: recurrent states, and conv states in bfloat16.
STATE_BYTES = {"forward": 8 * 2**20, "recurrent": 100 * (2**20 + 3 * 6144 * 2)}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: EXTRA=compile")


def compiler_figures(kind, chip):
    command = [sys.executable, "-m", "tests.kernels_pallas.compile_gated_delta_tpu", kind, chip]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def is_close(found, expected):
    same = importlib.metadata.version("libtpu") == EXPECTED["libtpu"]
    return 0.98 * expected <= found <= 1.02 * expected if same else found <= 1.25 * expected


@pytest.mark.parametrize("chip", EXPECTED["memory"])
def test_memory_and_donation(chip):
    found = compiler_figures("memory", chip)
    print(chip, found)
    assert found.keys() == EXPECTED["memory"][chip].keys() == {"forward", "backward", "recurrent"}
    for name, numbers in EXPECTED["memory"][chip].items():
        assert is_close(found[name]["temporary"], numbers["temporary"]), name
        assert found[name]["aliased"] >= STATE_BYTES.get(name, 0), f"{name} copies its donated state"


@pytest.mark.parametrize("chip", EXPECTED["schedule"])
def test_bundles_and_spills(chip):
    found = compiler_figures("schedule", chip)
    print(chip, found)
    assert found.keys() == EXPECTED["schedule"][chip].keys() == {"forward", "backward", "recurrent"}
    for name, numbers in EXPECTED["schedule"][chip].items():
        for kind, expected in numbers.items():
            assert found[name][kind] > 0, f"{name}: no {kind} read from the compiler's listing"
            assert is_close(found[name][kind], expected), (name, kind)
