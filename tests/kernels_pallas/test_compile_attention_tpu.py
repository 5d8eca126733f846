"""The attention kernels at the real shapes, compiled for TPUs that are not here: memory and schedule.

What is expected stands in expected/attention_tpu.json; `python -m tests.compile_attention_tpu expect` writes it anew. How
close it must be is told in test_compile_gated_delta_tpu.py. One chip by default; all of it, some minutes, in `make test-full`.
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
SCORES = 7 * HEADS * 4 * 1088**2  # bytes of a photo's views' scores, float32, as the reference keeps them

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: EXTRA=compile")


def said(chip, programs):
    command = [sys.executable, "-m", "tests.kernels_pallas.compile_attention_tpu", chip, *programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def holds(found, expected):
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
    found = said(chip, programs)
    print(chip, found)
    assert found.keys() == set(programs)
    assert EXPECTED["chips"].keys() == {"v5e", "v6e", "v5p"}
    for program in programs:
        expected = EXPECTED["chips"][chip][program]
        assert holds(found[program]["temporary"], expected["temporary"]), program
        assert found[program]["temporary"] < SCORES / 4, f"{program}: are there scores in memory?"
        assert found[program]["kernels"].keys() == expected["kernels"].keys()
        for kernel, numbers in expected["kernels"].items():
            assert found[program]["kernels"][kernel]["bundles"] > 0, f"{kernel}: no bundles read from the compiler's listing"
            for what in ("bundles", "spills"):
                assert holds(found[program]["kernels"][kernel][what], numbers[what]), (program, kernel, what)
