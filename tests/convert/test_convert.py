"""Conversion and export: byte-identical round trip, atomic folders, and one line for every mistake."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, MiniCPMV4_6ForConditionalGeneration

from convert import convert, export_converted, export_hf, folder
from convert.__main__ import main
from convert.convert import default_out
from minicpmv46_jax import MiniCPMV, checkpoint
from minicpmv46_jax.checkpoint import checksums, manifest, orbax_folder
from minicpmv46_jax.config import ModelConfig
from tests import ROOT

A_LOG = "model.language_model.layers.0.linear_attn.A_log"


@pytest.fixture(scope="module")
def mixed_folder(demo_folder, tmp_path_factory):
    """The demo in bfloat16, except for one float16 and some float32 tensors."""
    out = tmp_path_factory.mktemp("mixed") / "released"
    shutil.copytree(demo_folder, out)
    tensors = safetensors.numpy.load_file(out / "model.safetensors")
    for i, (name, tensor) in enumerate(tensors.items()):
        dtype = np.float32 if name.endswith("A_log") else np.float16 if i == 20 else ml_dtypes.bfloat16
        tensors[name] = tensor.astype(dtype)
    safetensors.numpy.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def converted(demo_folder, tmp_path_factory):
    return convert(demo_folder, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture
def damaged(converted, tmp_path):
    """A copy of the converted folder, which a test may damage."""
    return shutil.copytree(converted, tmp_path / "damaged")


def raw_tensors(file):
    """Parses a safetensors file by the format's definition: name -> dtype, shape and bytes."""
    data = Path(file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = data[8 + size :]
    return {name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for name, t in header.items()}


def file_bytes(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir() if file.name != "model.safetensors"}


def no_leftovers(parent, *expected):
    return sorted(path.name for path in parent.iterdir()) == sorted(expected)


# Round trip.


@pytest.mark.parametrize("which", ["demo_folder", "mixed_folder"])
def test_round_trip_is_byte_identical(which, request, tmp_path):
    source = request.getfixturevalue(which)
    back = export_converted(convert(source, tmp_path / "converted"), tmp_path / "back")
    assert raw_tensors(back / "model.safetensors") == raw_tensors(source / "model.safetensors")
    assert file_bytes(back) == file_bytes(source)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert no_leftovers(tmp_path, "converted", "back")


def test_shards_and_a_tied_lm_head_are_exported_as_one_file(demo_folder, tmp_path):
    source = shutil.copytree(demo_folder, tmp_path / "shards")
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    (source / "model.safetensors").unlink()
    items = list(tensors.items())
    weight_map = {}
    for i, part in enumerate((items[::2], items[1::2])):
        safetensors.numpy.save_file(dict(part), source / f"part{i}.safetensors")
        weight_map |= {name: f"part{i}.safetensors" for name, _ in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    back = export_converted(convert(source, tmp_path / "converted"), tmp_path / "back")
    assert raw_tensors(back / "model.safetensors") == raw_tensors(demo_folder / "model.safetensors")
    recorded = manifest.Manifest.read(tmp_path / "converted").files
    assert {"part0.safetensors", "part1.safetensors"} <= set(recorded)


def test_converted_folder_loads_like_its_source(mixed_folder, tmp_path):
    config = ModelConfig.from_folder(mixed_folder)
    out = convert(mixed_folder, tmp_path / "converted")
    for dtype in (None, jnp.float32):
        ours, theirs = checkpoint.load_params(out, config, dtype), checkpoint.load_params(mixed_folder, config, dtype)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
            assert isinstance(a, jax.Array)


def test_plain_orbax_restores_the_weights(converted, demo_folder):
    tree = ocp.StandardCheckpointer().restore(converted / "params")
    weights = safetensors.numpy.load_file(demo_folder / "model.safetensors")
    assert len(jax.tree.leaves(tree)) == len(weights)
    up_proj = tree["text"]["layers"]["2"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(up_proj, weights["model.language_model.layers.2.mlp.up_proj.weight"], strict=True)


def test_plain_orbax_restores_onto_chosen_devices(converted):
    """The weights restore sharded over eight devices, because the checkpoint names no device."""
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        ocp.StandardCheckpointer().restore(converted / "params"),
    )
    tree = ocp.StandardCheckpointer().restore(converted / "params", shapes)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(tree))


def test_transformers_loads_an_export(converted, demo_folder, tmp_path):
    back = export_converted(converted, tmp_path / "back")
    ours, report = MiniCPMV4_6ForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(report.values()), report
    theirs = AutoModelForImageTextToText.from_pretrained(demo_folder).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    assert AutoTokenizer.from_pretrained(back).encode("abc<|im_end|>") == [97, 98, 99, 258]


# Dtypes.


def test_dtype_casts_every_tensor(mixed_folder, tmp_path):
    back = export_converted(convert(mixed_folder, tmp_path / "converted", "float32"), tmp_path / "back")
    source = safetensors.numpy.load_file(mixed_folder / "model.safetensors")
    for name, tensor in safetensors.numpy.load_file(back / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, source[name].astype(np.float32), strict=True)


def test_transformers_keeps_the_dtype_of_a_cast_checkpoint(demo_folder, tmp_path):
    """transformers casts to config.json's dtype, so a cast checkpoint must not contain the old one."""
    source = shutil.copytree(demo_folder, tmp_path / "source")
    raw = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    raw["text_config"]["dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(raw))
    back = export_converted(convert(source, tmp_path / "converted", "bfloat16"), tmp_path / "back")
    assert MiniCPMV4_6ForConditionalGeneration.from_pretrained(back).dtype == torch.bfloat16
    raw["dtype"] = raw["text_config"]["dtype"] = "bfloat16"
    assert json.loads((back / "config.json").read_text()) == raw
    same = convert(source, tmp_path / "same", "float32")
    assert (same / "config.json").read_bytes() == (source / "config.json").read_bytes()


# The manifest.


def test_manifest_records_source_files_and_tensors(converted, demo_folder):
    held = manifest.Manifest.read(converted)
    source = raw_tensors(demo_folder / "model.safetensors")
    assert held.files == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in demo_folder.iterdir()}
    assert (held.source, held.revision, held.dtype) == (str(demo_folder), None, None)
    assert (held.jax, held.orbax) == (jax.__version__, ocp.__version__)
    assert held.parameters == sum(int(np.prod(shape)) for _, shape, _ in source.values())
    assert {row["released"]: row["sha256"] for row in held.tensors.values()} == {
        name: hashlib.sha256(data).hexdigest() for name, (_, _, data) in source.items()
    }


# Parameters in memory.


def test_export_hf_writes_parameters_unchanged(demo_folder, tmp_path):
    config = ModelConfig.from_folder(demo_folder)
    params = checkpoint.load_params(demo_folder, config)
    params["text"]["layers"][0]["mixer"]["A_log"] = (params["text"]["layers"][0]["mixer"]["A_log"] + 1).astype(jnp.bfloat16)
    out = export_hf(params, demo_folder, tmp_path / "trained")
    ours, theirs = raw_tensors(out / "model.safetensors"), raw_tensors(demo_folder / "model.safetensors")
    assert [name for name in ours if ours[name] != theirs[name]] == [A_LOG]
    again = checkpoint.load_params(out, config)["text"]["layers"][0]["mixer"]["A_log"]
    np.testing.assert_array_equal(again, params["text"]["layers"][0]["mixer"]["A_log"], strict=True)


def test_weights_have_the_file_mode_of_config_json(demo_folder, converted, tmp_path):
    """safetensors makes files that only their owner may read; the export changes that."""
    out = export_converted(converted, tmp_path / "back")
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_export_hf_refuses_parameters_of_another_model(demo_folder, tmp_path):
    params = checkpoint.load_params(demo_folder, ModelConfig.from_folder(demo_folder))
    del params["text"]["norm"]
    params["vision"]["post_norm"]["bias"] = jnp.zeros(3)
    params["text"]["step"] = jnp.zeros((), jnp.int32)
    with pytest.raises(ValueError) as error:
        export_hf(params, demo_folder, tmp_path / "out")
    for fault in ("missing: text.norm.weight", "shape: vision.post_norm.bias is [3], expected [48]", "extra: text.step"):
        assert fault in str(error.value)
    assert no_leftovers(tmp_path)


# Atomic folders.


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_out_is_not_changed(demo_folder, tmp_path, kind, capsys):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "precious").write_text("data")
    elif kind == "file":
        out.write_text("data")
    else:
        out.symlink_to("nowhere")
    assert main(["--hf", str(demo_folder), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {out} exists")
    assert no_leftovers(tmp_path, "out")
    assert kind != "folder" or (out / "precious").read_text() == "data"


def test_empty_out_folder_is_used(demo_folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert checkpoint.is_converted(convert(demo_folder, tmp_path / "out"))
    assert no_leftovers(tmp_path, "out")


@pytest.mark.parametrize("command", ["convert", "export"])
def test_unexpected_error_leaves_no_files(demo_folder, converted, tmp_path, command, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a fault in the code")

    monkeypatch.setattr(orbax_folder.partial, "finalize", broken)
    monkeypatch.setattr(safetensors.numpy, "save_file", broken)
    words = ["--hf", str(demo_folder), "--out"] if command == "convert" else ["--model", str(converted), "--export-hf"]
    with pytest.raises(RuntimeError):
        main([*words, str(tmp_path / "out")])
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_is_reported_in_one_line(demo_folder, tmp_path, monkeypatch, capsys, wrapped):
    def full(*args, **options):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ValueError("RESOURCE_EXHAUSTED") if wrapped else error from error

    monkeypatch.setattr(orbax_folder.partial, "save", full)
    assert main(["--hf", str(demo_folder), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: no space left on the disk of {tmp_path}: nothing was written\n"
    assert no_leftovers(tmp_path)


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_disk_that_fills_up_is_reported_in_one_line(demo_folder, converted, tmp_path, command):
    """The disk fills up during the write; the check before it is disabled here."""
    words = ["--hf", demo_folder, "--out"] if command == "convert" else ["--model", converted, "--export-hf"]
    script = "import runpy, shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**9)"
    script += "; runpy.run_module('convert', run_name='__main__')"
    with small_disk(tmp_path / "disk", "1m") as disk:
        command = [sys.executable, "-c", script, *map(str, words), str(disk / "out")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.stderr == f"error: no space left on the disk of {disk}: nothing was written\n"
        assert done.returncode == 1
        assert no_leftovers(disk)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_small_disk_is_reported_before_writing(demo_folder, converted, tmp_path, monkeypatch, capsys, command):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(orbax_folder, "write", None)
    words = ["--hf", str(demo_folder), "--out"] if command == "convert" else ["--model", str(converted), "--export-hf"]
    assert main([*words, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} takes 3 MB, but its disk has 2 MB left\n"
    assert no_leftovers(tmp_path)


def test_ctrl_c_waits_for_the_write_and_leaves_no_files(demo_folder, tmp_path, monkeypatch, capsys):
    save, finished = orbax_folder.partial.save, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)
        finished.append(True)

    monkeypatch.setattr(orbax_folder.partial, "save", interrupted)
    assert main(["--hf", str(demo_folder), "--out", str(tmp_path / "out")]) == 130
    assert finished == [True]
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert no_leftovers(tmp_path)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_only_partial_folders_of_killed_runs_are_removed(demo_folder, tmp_path):
    here = socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = tmp_path / f"out.partial-{here}-{dead.pid}"
    others = [f"out.partial-{here}-{os.getppid()}", f"out.partial-elsewhere-{dead.pid}", f"another.partial-{here}-{dead.pid}"]
    for path in (stale, *(tmp_path / name for name in others)):
        path.mkdir()
        (path / "half").write_text("")
    convert(demo_folder, tmp_path / "out")
    assert no_leftovers(tmp_path, "out", *others)


def test_unwritable_out_folder(demo_folder, tmp_path, monkeypatch, capsys):
    def refused(self, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(folder.Path, "mkdir", refused)  # simulated, because tests may run as root
    assert main(["--hf", str(demo_folder), "--out", str(tmp_path / "out")]) == 1
    assert "may not be written" in capsys.readouterr().err


# Damaged converted folders.


def refusal(function, *args):
    with pytest.raises(ValueError) as error:
        function(*args)
    return str(error.value)


def load(folder):
    return checkpoint.load_params(folder, ModelConfig.from_folder(folder))


def test_missing_data_file_is_reported(damaged):
    biggest = max((damaged / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    biggest.unlink()
    message = refusal(load, damaged)
    assert str(damaged / "params") in message and "\n" not in message


def test_missing_params_folder_is_reported(damaged):
    shutil.rmtree(damaged / "params")
    assert f"{damaged / 'params'} is not an Orbax checkpoint" in refusal(load, damaged)


def test_export_detects_changed_values(damaged, tmp_path):
    raw = json.loads((damaged / "manifest.json").read_text())
    raw["tensors"]["text.norm.weight"]["sha256"] = "0" * 64
    (damaged / "manifest.json").write_text(json.dumps(raw))
    message = refusal(export_converted, damaged, tmp_path / "back")
    assert "tensor text.norm.weight has sha256" in message and "manifest.json records 000000000000" in message
    assert no_leftovers(tmp_path, "damaged")


def flip_byte(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def places(converted, demo_folder):
    """The data files that contain tensors: each one's path, a tensor's name and where its values begin."""
    weights = safetensors.numpy.load_file(demo_folder / "model.safetensors")
    specs = checkpoint.param_specs(ModelConfig.from_folder(converted))
    found = []
    for file in (converted / "params").glob("ocdbt.process_*/d/*"):
        data = file.read_bytes()
        held = {spec.dotted: data.find(weights[spec.hf_name].tobytes()) for spec in specs if weights[spec.hf_name].any()}
        found += [(file.relative_to(converted), name, at) for name, at in held.items() if at >= 0][:1]
    assert len(found) > 1
    return found


def test_flipped_byte_of_a_tensor_is_refused_with_its_name(converted, places, tmp_path):
    for i, (file, name, at) in enumerate(places):
        folder = shutil.copytree(converted, tmp_path / str(i))
        flip_byte(folder / file, at)
        found = re.fullmatch(
            r".*: tensor (\S+) has sha256 (\w{12}), but manifest.json records (\w{12}): .*", refusal(load, folder)
        )
        assert found and found[1] == name and found[2] != found[3]


def test_unverified_load_takes_a_flipped_byte(damaged, places):
    file, _, at = places[0]
    flip_byte(damaged / file, at)
    with pytest.raises(ValueError, match=r"tensor .* has sha256"):
        MiniCPMV.from_pretrained(damaged)
    MiniCPMV.from_pretrained(damaged, verify_checksums=False)


def test_any_flipped_byte_is_refused_or_harmless(converted, tmp_path):
    whole = jax.tree.leaves(load(converted))
    for i, path in enumerate(path for path in sorted((converted / "params").rglob("*")) if path.is_file()):
        folder = shutil.copytree(converted, tmp_path / str(i))
        flip_byte(folder / path.relative_to(converted))
        try:
            leaves = jax.tree.leaves(load(folder))
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            assert all(np.array_equal(a, b) for a, b in zip(whole, leaves, strict=True))


def test_flipped_byte_in_the_vocabulary_is_refused(damaged):
    flip_byte(damaged / "tokenizer.json")
    assert f"{damaged / 'tokenizer.json'} has sha256" in refusal(load, damaged)


def test_edited_settings_load(damaged):
    (damaged / "generation_config.json").write_text("{}")
    load(damaged)


def test_tensor_without_a_record_is_refused(damaged):
    raw = json.loads((damaged / "manifest.json").read_text())
    del raw["tensors"]["text.norm.weight"]
    (damaged / "manifest.json").write_text(json.dumps(raw))
    assert "manifest.json has no record of tensor text.norm.weight" in refusal(load, damaged)


def test_few_bytes_wait_for_their_checksum(converted, monkeypatch):
    """Loads equal values with a bound so small that every tensor waits for its own checksum."""
    monkeypatch.setattr(checksums, "MAX_PENDING_BYTES", 0)
    assert len(jax.tree.leaves(load(converted))) == len(manifest.Manifest.read(converted).tensors)


def test_tensors_of_another_model_than_config_json(damaged):
    raw = json.loads((damaged / "config.json").read_text())
    raw["text_config"]["intermediate_size"] = 64
    (damaged / "config.json").write_text(json.dumps(raw))
    assert refusal(load, damaged).count("shape: ") == 3 * 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": 2}, "format version is 2"),
        ({"extra": 1}, "extra"),
        ({"format": "x"}, "format"),
        ({"tensors": []}, "field 'tensors' is a list"),
    ],
)
def test_manifest_of_another_format(damaged, change, words):
    raw = json.loads((damaged / "manifest.json").read_text()) | change
    (damaged / "manifest.json").write_text(json.dumps(raw))
    assert words in refusal(manifest.Manifest.read, damaged)


# The command line.


def run(*words, **options):
    command = [sys.executable, "-m", "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def test_command_line_converts_and_exports_quietly(mixed_folder, tmp_path):
    done = run("--hf", mixed_folder, "--out", tmp_path / "converted")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {tmp_path / 'converted'}\n", "")
    done = run("--export-hf", tmp_path / "back", "--model", tmp_path / "converted")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {tmp_path / 'back'}\n", "")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (mixed_folder / "model.safetensors").read_bytes()


def test_command_line_reports_a_mistake_in_one_line(tmp_path):
    done = run("--hf", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'nothing'} is neither a folder nor a hub id of the form owner/name\n"


def test_default_out_is_derived_from_the_source_and_printed(demo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--hf", str(demo_folder)]) == 0
    assert capsys.readouterr().out == "wrote model-jax\n"
    assert checkpoint.is_converted(tmp_path / "model-jax")
    assert default_out("openbmb/MiniCPM-V-4_6", "float32") == Path("MiniCPM-V-4_6-jax-float32")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--demo", "x", "--dtype", "float32"], "--dtype does not go with --demo"),
        (["--hf", "x", "--model", "y"], "--model does not go with --hf"),
        (["--export-hf", "x", "--model", "y", "--out", "z"], "--out does not go with --export-hf"),
        (["--export-hf", "x"], "--export-hf needs --model"),
    ],
)
def test_unused_option_is_refused(words, expected, capsys):
    assert main(words) == 1
    assert expected in capsys.readouterr().err


def test_folders_of_the_wrong_kind_are_refused(demo_folder, converted, tmp_path, capsys):
    assert main(["--hf", str(converted), "--out", str(tmp_path / "a")]) == 1
    assert "converted already" in capsys.readouterr().err
    assert main(["--export-hf", str(tmp_path / "b"), "--model", str(demo_folder)]) == 1
    assert "is not a converted folder" in capsys.readouterr().err
    assert no_leftovers(tmp_path)


def test_checkpoint_of_another_model_is_refused(demo_folder, tmp_path, capsys):
    other = shutil.copytree(demo_folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["--hf", str(other), "--out", str(tmp_path / "out")]) == 1
    assert "llama" in capsys.readouterr().err


# The released model's size.


@pytest.mark.full
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_full_size_round_trip_and_peak_memory(full_size_folder, tmp_path, dtype):
    """Peak memory is at most 1.3 times the weights, imports included."""
    source = full_size_folder
    weights = source / "model.safetensors"
    options = [] if dtype is None else ["--dtype", dtype]
    peak = peak_of("--hf", source, "--out", tmp_path / "converted", *options)
    print(f"convert {dtype}: peak {peak / weights.stat().st_size:.3f} x the checkpoint")
    assert peak <= 1.3 * weights.stat().st_size
    if dtype is None:
        peak = peak_of("--export-hf", tmp_path / "back", "--model", tmp_path / "converted")
        print(f"export: peak {peak / weights.stat().st_size:.3f} x the checkpoint")
        assert peak <= 1.3 * weights.stat().st_size
        assert manifest.file_sha256(tmp_path / "back" / "model.safetensors") == manifest.file_sha256(weights)


def peak_of(*words):
    """Returns the command line's peak memory in bytes, measured as the only child of a subprocess."""
    command = json.dumps([sys.executable, "-m", "convert", *map(str, words)])
    script = f"import resource, subprocess; subprocess.run({command}, check=True, stdout=2)"
    script += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
