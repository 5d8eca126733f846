"""Programs stored on disk: loaded without compilation, and only for the same sources, settings and device."""

import dataclasses
import itertools
import logging
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minicpmv46_jax.trees import tree_dataclass
from serve.runtime.program_cache import CompilationCounter, ProgramCache, ProgramStore


@tree_dataclass
class State:
    total: jax.Array
    rest: dict


def step(state, x):
    return dataclasses.replace(state, total=state.total + x), {"twice": x * 2}


def arguments():
    return State(jnp.zeros(3), {"a": jnp.ones(2)}), np.arange(3, dtype=np.float32)


def programs(store):
    made = ProgramCache(store)
    made.add(("step", 3), lambda *args: step(*args), *arguments(), donate=(0,))  # a new function, which jax has not cached
    before = CompilationCounter()
    made.compile(show=False)
    return made, before.count


def test_stored_program_is_loaded_and_not_compiled(tmp_path):
    first, compiled = programs(ProgramStore(tmp_path, "a model"))
    assert compiled == 1
    second, compiled = programs(ProgramStore(tmp_path, "a model"))
    assert compiled == 0 and len(second) == 1
    for made in (first, second):
        state, x = arguments()
        new_state, more = made["step", 3](state, x)
        np.testing.assert_array_equal(new_state.total, [0, 1, 2])
        np.testing.assert_array_equal(more["twice"], [0, 2, 4])
        assert isinstance(new_state, State)
        assert state.total.is_deleted()  # donated


def test_stored_programs_depend_on_model_and_flags(tmp_path, monkeypatch):
    programs(ProgramStore(tmp_path, "a model"))
    assert programs(ProgramStore(tmp_path, "another model"))[1] == 1
    assert programs(ProgramStore(tmp_path, "a model"))[1] == 0
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag")
    assert programs(ProgramStore(tmp_path, "a model"))[1] == 1


def test_store_options_apply_to_compilation_only(tmp_path):
    options = {"xla_gpu_per_fusion_autotune_cache_dir": str(tmp_path / "autotuned")}
    assert programs(ProgramStore(tmp_path / "kept", options=options))[1] == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_unheard_of'"):
        programs(ProgramStore(tmp_path / "other", options={"xla_unheard_of": "1"}))
    assert programs(ProgramStore(tmp_path / "kept", options={"xla_unheard_of": "1"}))[1] == 0  # loaded, not compiled


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_damaged_program_is_compiled_again(tmp_path, caplog, damage):
    programs(ProgramStore(tmp_path))
    (file,) = tmp_path.rglob("*.pickle")
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert programs(ProgramStore(tmp_path))[1] == 1
    assert f"{file} cannot be loaded and is compiled again" in caplog.text
    assert programs(ProgramStore(tmp_path))[1] == 0


def test_save_leaves_no_temporary_files(tmp_path):
    programs(ProgramStore(tmp_path))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".pickle"]


def test_unwritable_folder_does_not_stop_the_start(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        made, compiled = programs(ProgramStore(tmp_path / "file"))
    assert compiled == 1 and len(made) == 1
    assert "('step', 3) is not stored" in caplog.text


def test_folders_unused_for_long_are_deleted(tmp_path):
    programs(ProgramStore(tmp_path, "an old model"))
    (old,) = tmp_path.iterdir()
    programs(ProgramStore(tmp_path, "a model"))
    assert old.is_dir()
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    assert programs(ProgramStore(tmp_path, "a model"))[1] == 0  # its own folder stays, at any age
    assert not old.exists()


def test_first_of_an_autotune_group_is_compiled_before_the_others():
    order = []

    class Noted(ProgramCache):
        def _compile_and_store(self, key, lowered, behind):
            compiled = super()._compile_and_store(key, lowered, behind)
            order.append(key)
            return compiled

    made = Noted()
    for size in (3, 4):
        for name in "abc":
            made.add((name, size), lambda x, name=name: x + ord(name), jnp.zeros(size), autotune_group=size)
    made.add("alone", lambda x: x * 2, jnp.zeros(5))
    made.compile(show=False)
    assert len(made) == len(order) == 7
    for size in (3, 4):
        assert min(["a", "b", "c"], key=lambda name: order.index((name, size))) == "a"
    assert made["c", 4](jnp.ones(4))[0] == 100


@pytest.mark.parametrize("at", [0, 1, 5])
def test_error_of_check_ends_compilation(at):
    calls, raised = itertools.count(), threading.Event()

    def check():
        if next(calls) == at:
            raised.set()
            raise ValueError("a mistake")

    class Slow(ProgramCache):
        def _compile_and_store(self, key, lowered, behind):
            raised.wait(60)
            return super()._compile_and_store(key, lowered, behind)

    made = Slow()
    for key in range(4):
        made.add(key, lambda x, key=key: x + key, jnp.zeros(3))
    with pytest.raises(ValueError, match="a mistake"):
        made.compile(False, check)
    assert next(calls) == at + 1 and len(made) == 0
