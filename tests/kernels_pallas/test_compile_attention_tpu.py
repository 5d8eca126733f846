"""The attention kernels at the real shapes, compiled for TPUs that are not here: memory and schedule.

expected/attention_tpu.json holds the expected figures; `python -m tests.kernels_pallas.compile_attention_tpu
expect` writes it. test_compile_gated_delta_tpu.py explains the tolerances. One chip is compiled by default,
and all of them, which takes minutes, in `make test-full`.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from kernels_pallas.packed_attention.shapes import HEADS
from tests import ROOT

EXPECTED = json.loads((ROOT / "tests" / "expected" / "attention_tpu.json").read_text())
PROGRAMS = ["decode", "prompts", "merged views", "gradient"]
SCORES = 7 * HEADS * 4 * 1088**2  # bytes of the float32 scores of a photo's views, which the reference keeps

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: EXTRA=compile")


def compiler_figures(chip, programs):
    command = [sys.executable, "-m", "tests.kernels_pallas.compile_attention_tpu", chip, *programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def within_tolerance(found, expected):
    same = importlib.metadata.version("libtpu") == EXPECTED["libtpu"]
    return 0.98 * expected <= found <= 1.02 * expected if same else found <= 1.25 * expected


@pytest.mark.parametrize(
    ("chip", "programs"),
    [
        ("v5e", PROGRAMS[:3]),
        pytest.param("v5e", PROGRAMS[3:], marks=pytest.mark.full),
        pytest.param("v6e", PROGRAMS, marks=pytest.mark.full),
        pytest.param("v5p", PROGRAMS, marks=pytest.mark.full),
    ],
)
def test_memory_bundles_and_spills(chip, programs):
    found = compiler_figures(chip, programs)
    print(chip, found)
    assert found.keys() == set(programs)
    assert EXPECTED["chips"].keys() == {"v5e", "v6e", "v5p"}
    for program in programs:
        expected = EXPECTED["chips"][chip][program]
        assert within_tolerance(found[program]["temporary"], expected["temporary"]), program
        assert found[program]["temporary"] < SCORES / 4, f"{program}: scores may be in memory"
        assert found[program]["kernels"].keys() == expected["kernels"].keys()
        for kernel, numbers in expected["kernels"].items():
            assert found[program]["kernels"][kernel]["bundles"] > 0, f"{kernel}: the compiler's listing has no bundles"
            for what in ("bundles", "spills"):
                assert within_tolerance(found[program]["kernels"][kernel][what], numbers[what]), (program, kernel, what)
