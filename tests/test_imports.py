"""The imports of the packages: one direction, no circles, function-level imports included."""

import ast
import subprocess
import sys

import pytest

from tests import ROOT

BELOW = {  # package: the packages that it may import
    "kernels_pallas": set(),
    "minicpmv46_jax": {"kernels_pallas"},
    "convert": {"kernels_pallas", "minicpmv46_jax"},
    "serve": {"kernels_pallas", "minicpmv46_jax"},
}


def modules(root=ROOT, packages=tuple(BELOW)):
    """Returns the path of each module by its name; a package's is that of its `__init__`."""
    found = {}
    for path in (path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path, known):
    """Returns the modules among `known` that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return found & set(known)


def circle(graph):
    """Returns a circle of a graph, as the list of its modules, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for other in sorted(graph[module]):
            if (found := visit(other)) is not None:
                return found
        path.pop()
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := visit(module)) is not None), None)


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {module: imported(path, known) for module, path in known.items()}


def test_no_import_circle(graph):
    assert circle(graph) is None


def test_imports_run_one_way(graph):
    for module, others in graph.items():
        package = module.partition(".")[0]
        assert {other.partition(".")[0] for other in others} <= BELOW[package] | {package}, module


def test_a_circle_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("")
    (tmp_path / "p" / "a.py").write_text("from p import b\n")
    (tmp_path / "p" / "b.py").write_text("def f():\n    import p.c\n")
    (tmp_path / "p" / "c.py").write_text("from p.a import f\n")
    known = modules(tmp_path, ("p",))
    assert circle({module: imported(path, known) for module, path in known.items()}) == ["p.a", "p.b", "p.c", "p.a"]


@pytest.mark.parametrize(
    "module",
    [
        "minicpmv46_jax.processing",
        "serve.engine.scheduler",
        "serve.engine.page_pool",
        "serve.engine.prefix_cache",
        "serve.engine.host_prefix_cache",
        "serve.engine.encoder_cache",
    ],
)
def test_it_imports_no_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
