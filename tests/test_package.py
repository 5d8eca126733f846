"""The built wheel contains only our packages, shadows no other package and runs outside the checkout."""

import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"minicpmv46_jax", "kernels_pallas", "convert", "serve"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_contains_only_our_packages_and_their_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == OURS
    assert not [name for name in names if name.endswith(("conftest.py", "test.py")) or "/test_" in name]
    packaged = {path.relative_to(ROOT).as_posix() for top in OURS for path in (ROOT / top).rglob("*") if path.is_file()}
    assert {path for path in packaged if "__pycache__" not in path} == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_other_package_is_shadowed():
    claimed = {name: set(owners) - {"minicpmv46-jax"} for name, owners in packages_distributions().items()}
    assert {name: owners for name, owners in claimed.items() if name in OURS and owners} == {}
    assert not OURS & set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", ["convert", "serve"])
def test_wheel_runs_outside_the_checkout(wheel, module, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    # PYTHONPATH comes before the editable install that the tests run from.
    show = f"import {module}, runpy, sys; print({module}.__file__); sys.argv = ['x', '--help']"
    code = f"{show}; runpy.run_module('{module}', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target)) and f"python -m {module}" in done.stdout
