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
from serve.runtime import program_cache
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


def flipped(content):
    return content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"short", lambda content: content[:-200], flipped])
def test_damaged_program_is_compiled_again_and_not_unpickled(tmp_path, caplog, monkeypatch, damage):
    programs(ProgramStore(tmp_path))
    (file,) = tmp_path.rglob("*.program")
    file.write_bytes(damage(file.read_bytes()))
    monkeypatch.setattr(program_cache.pickle, "loads", None)
    with caplog.at_level(logging.WARNING):
        assert programs(ProgramStore(tmp_path))[1] == 1
    assert f"{file} cannot be loaded and is compiled again: its checksum does not match" in caplog.text
    monkeypatch.undo()
    assert programs(ProgramStore(tmp_path))[1] == 0


def test_save_leaves_no_temporary_files(tmp_path):
    programs(ProgramStore(tmp_path))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".program"]


@pytest.fixture
def store_folder(tmp_path):
    """A store's folder whose parent other users may enter, with one program in it."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o755)
    programs(ProgramStore(tmp_path / "cache" / "programs"))
    return tmp_path / "cache" / "programs"


def test_new_folders_and_files_are_private(store_folder):
    modes = {path.stat().st_mode & 0o777 for path in (store_folder, *store_folder.rglob("*"))}
    assert modes == {0o700, 0o600}
    assert programs(ProgramStore(store_folder))[1] == 0


@pytest.mark.parametrize("target", ["..", ".", "*", "*/*"])
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_folder_that_others_may_write_is_not_used(store_folder, caplog, target, mode):
    (path,) = [store_folder / ".."] if target == ".." else [store_folder] if target == "." else store_folder.glob(target)
    path.chmod(mode)
    before = {path: path.read_bytes() for path in store_folder.rglob("*.program")}
    with caplog.at_level(logging.WARNING):
        assert programs(ProgramStore(store_folder))[1] == 1
        assert programs(ProgramStore(store_folder, "another model"))[1] == 1  # neither loaded nor stored
    assert f"has mode 0{mode:o}, so other users may write to it: remove {store_folder}" in caplog.text
    assert {path: path.read_bytes() for path in store_folder.rglob("*.program")} == before


def test_folder_of_another_user_is_not_used(store_folder, caplog, monkeypatch):
    for path in (store_folder.parent, store_folder, *store_folder.rglob("*")):
        os.chown(path, 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with caplog.at_level(logging.WARNING):
        assert programs(ProgramStore(store_folder))[1] == 1
    assert "stored programs are not used" in caplog.text and "belongs to user" in caplog.text


def test_private_parent_protects_what_is_inside(store_folder):
    (path,) = store_folder.rglob("*.program")
    path.chmod(0o664)  # as a umask of 002 makes it
    store_folder.parent.chmod(0o700)
    assert programs(ProgramStore(store_folder))[1] == 0


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
