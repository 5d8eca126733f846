"""Variants of a test that only `make test-full` runs."""

from typing import Any

import pytest


def in_full(*cases: Any) -> list[Any]:
    """Returns the cases of a parametrisation, a value or a tuple of values each, marked `full`."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]
