"""XLA's autotuning results: from a cache folder into the bundled file, and from there into another folder."""

import base64
import json

import jax
import pytest

from serve.runtime import xla_autotune_cache

READ = "AUTOTUNE_CACHE_MODE_READ"


@pytest.fixture
def device(monkeypatch):
    """Sets the name of the present device."""

    def present(name):
        monkeypatch.setattr(xla_autotune_cache, "_device_key", lambda: name)

    present("H200")
    return present


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_collected_and_written_out(tmp_path, device):
    bundled, found = tmp_path / "autotuned.json", {"ab12/first.pb": b"\x00\x01", "ab12/second.pb": b"two"}
    bundled.write_text(json.dumps({"H100": {"cd34/other.pb": "AA=="}, "H200": {"ab12/old.pb": "AA=="}}))
    for name, content in found.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert xla_autotune_cache.collect_results(tmp_path / "cache", bundled) == 2
    table = json.loads(bundled.read_text())
    assert set(table) == {"H100", "H200"} and set(table["H200"]) == set(found)

    options = xla_autotune_cache.compiler_options(tmp_path / "fresh", bundled)
    assert options == {"xla_gpu_per_fusion_autotune_cache_dir": str(tmp_path / "fresh")}
    assert contents(tmp_path / "fresh") == found


def test_command_collects_from_the_cache_folder(tmp_path, device, monkeypatch, capsys):
    bundled, cache = tmp_path / "autotuned.json", tmp_path / "minicpmv46-jax" / "autotuned"
    bundled.write_text("{}")
    monkeypatch.setattr(xla_autotune_cache, "BUNDLED_FILE", bundled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="autotuned is not there: start a server on a GPU first"):
        xla_autotune_cache.main()
    assert bundled.read_text() == "{}"
    (cache / "ab12").mkdir(parents=True)
    (cache / "ab12" / "first.pb").write_bytes(b"one")
    xla_autotune_cache.main()
    assert set(json.loads(bundled.read_text())["H200"]) == {"ab12/first.pb"}
    assert capsys.readouterr().out == f"{bundled}: 1 results for H200\n"


def test_own_results_are_not_overwritten(tmp_path, device):
    bundled, own = tmp_path / "autotuned.json", tmp_path / "cache" / "ab12" / "first.pb"
    bundled.write_text(json.dumps({"H200": {"ab12/first.pb": base64.b64encode(b"brought").decode()}}))
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    xla_autotune_cache.compiler_options(tmp_path / "cache", bundled)
    assert own.read_bytes() == b"own"


def test_unwritable_folder_is_used_read_only(tmp_path, device, monkeypatch, caplog):
    bundled, folder = tmp_path / "autotuned.json", tmp_path / "cache"
    bundled.write_text(json.dumps({"H200": {"ab12/first.pb": "AA=="}}))
    folder.mkdir()
    read_only = {"xla_gpu_per_fusion_autotune_cache_dir": str(folder), "xla_gpu_experimental_autotune_cache_mode": READ}
    monkeypatch.setattr(xla_autotune_cache.os, "access", lambda *_: False)
    assert xla_autotune_cache.compiler_options(folder, bundled) == read_only and not caplog.text
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=read_only)  # XLA accepts these options

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(xla_autotune_cache.Path, "mkdir", refused)
    monkeypatch.setattr(xla_autotune_cache.Path, "write_bytes", refused)
    (folder / "ab12" / "first.pb").unlink()
    assert xla_autotune_cache.compiler_options(folder, bundled) == read_only
    assert xla_autotune_cache.compiler_options(tmp_path / "none", bundled) == {}
    assert caplog.text.count("XLA's autotuning results are not kept: [Errno 13] Permission denied") == 2


def test_folder_that_others_may_write_is_not_used(tmp_path, device, caplog):
    bundled, folder = tmp_path / "autotuned.json", tmp_path / "cache" / "autotuned"
    bundled.write_text(json.dumps({"H200": {"ab12/first.pb": "AA=="}}))
    folder.parent.mkdir(0o755)
    options = xla_autotune_cache.compiler_options(folder, bundled)
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))} == {0o700, 0o600}
    assert options and xla_autotune_cache.compiler_options(folder, bundled) == options
    for path in (folder / "ab12" / "first.pb", folder):
        mode = path.stat().st_mode
        path.chmod(0o777)
        assert xla_autotune_cache.compiler_options(folder, bundled) == {}
        assert f"{path} has mode 0777, so other users may write to it: remove {folder}" in caplog.text
        path.chmod(mode)
    assert xla_autotune_cache.compiler_options(folder, bundled) == options


def test_other_devices_get_no_results(tmp_path, device):
    device("RTX 4090")
    assert xla_autotune_cache.compiler_options(tmp_path / "cache")
    assert not contents(tmp_path / "cache")


def test_bundled_file_has_results_by_device_and_jaxlib():
    for where, results in json.loads(xla_autotune_cache.BUNDLED_FILE.read_text()).items():
        assert where.startswith("NVIDIA ") and ", jaxlib " in where
        for name, content in results.items():
            assert name.count("/") == 1 and ".." not in name and name.endswith(".pb")
            assert base64.b64decode(content, validate=True)
