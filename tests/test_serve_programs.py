"""Compiled functions kept on disk: the same function again without compiling, and never another one."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpmv46_jax.trees import tree_dataclass
from serve.programs import Compilations, Programs, Store


@tree_dataclass
class Carried:
    total: jax.Array
    rest: dict


def step(carried, x):
    return dataclasses.replace(carried, total=carried.total + x), {"twice": x * 2}


def arguments():
    return Carried(jnp.zeros(3), {"a": jnp.ones(2)}), np.arange(3, dtype=np.float32)


def programs(store):
    made = Programs(store)
    made.add(("step", 3), lambda *given: step(*given), *arguments(), donate=(0,))  # a function that jax has not seen
    before = Compilations()
    made.compile(show=False)
    return made, before.count


def test_a_kept_function_is_loaded_and_not_compiled(tmp_path):
    first, compiled = programs(Store(tmp_path, "a model"))
    assert compiled == 1
    second, compiled = programs(Store(tmp_path, "a model"))
    assert compiled == 0 and len(second) == 1
    for made in (first, second):
        given, x = arguments()
        carried, more = made["step", 3](given, x)
        np.testing.assert_array_equal(carried.total, [0, 1, 2])
        np.testing.assert_array_equal(more["twice"], [0, 2, 4])
        assert isinstance(carried, Carried)
        assert given.total.is_deleted()  # donated


def test_what_a_function_depends_on_decides(tmp_path, monkeypatch):
    programs(Store(tmp_path, "a model"))
    assert programs(Store(tmp_path, "another model"))[1] == 1
    assert programs(Store(tmp_path, "a model"))[1] == 0
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag")
    assert programs(Store(tmp_path, "a model"))[1] == 1


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_a_damaged_file_is_made_anew(tmp_path, caplog, damage):
    programs(Store(tmp_path))
    (file,) = tmp_path.rglob("*.pickle")
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert programs(Store(tmp_path))[1] == 1
    assert f"{file} cannot be used and is made anew" in caplog.text
    assert programs(Store(tmp_path))[1] == 0


def test_nothing_half_written_is_left(tmp_path):
    programs(Store(tmp_path))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".pickle"]
