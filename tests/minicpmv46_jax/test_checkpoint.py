"""Checkpoints: the weight map equals transformers', faulty folders are refused; a local server is the hub."""

import hashlib
import http.server
import json
import shutil
import socket
import threading
import types
from concurrent.futures import CancelledError
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoConfig, MiniCPMV4_6ForConditionalGeneration

from convert.demo.random_checkpoint import demo_config
from minicpmv46_jax import checkpoint, model
from minicpmv46_jax.checkpoint import names, orbax_folder
from minicpmv46_jax.config import ModelConfig

EMBEDDING, LM_HEAD = names.EMBEDDING, names.LM_HEAD
NORM = "model.language_model.norm.weight"
UP_PROJ = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def config(demo_folder):
    return ModelConfig.from_folder(demo_folder)


@pytest.fixture(scope="module")
def weights(demo_folder):
    """Every released tensor of the demo, read by the safetensors library."""
    return safetensors.numpy.load_file(demo_folder / "model.safetensors")


@pytest.fixture
def write(demo_folder, tmp_path):
    """Writes a released folder with the demo's config; several dicts make shards and an index."""

    def write(*shards):
        folder = tmp_path / "released"
        folder.mkdir(exist_ok=True)
        shutil.copy(demo_folder / "config.json", folder / "config.json")
        if len(shards) == 1:
            safetensors.numpy.save_file(shards[0], folder / "model.safetensors")
            return folder
        weight_map = {}
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            safetensors.numpy.save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
        write_index(folder, weight_map)
        return folder

    return write


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def halves(weights):
    cut = len(weights) // 2
    return dict(list(weights.items())[:cut]), dict(list(weights.items())[cut:])


def same_trees(a, b):
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True)
    return all(i == j and x.dtype == y.dtype and np.array_equal(x, y) for (i, x), (j, y) in pairs)


def refusal(folder, config, **options):
    with pytest.raises(ValueError) as error:
        checkpoint.load_params(folder, config, **options)
    return str(error.value)


# The weight map.


@pytest.mark.parametrize("changes", [{}, {"linear_num_value_heads": 8}, {"num_hidden_layers": 8}])
def test_weight_map_equals_transformers_tensors(changes):
    raw = demo_config()
    raw["text_config"] |= changes
    raw["text_config"]["layer_types"] *= raw["text_config"]["num_hidden_layers"] // 4
    with torch.device("meta"):
        theirs = MiniCPMV4_6ForConditionalGeneration(AutoConfig.for_model(**raw)).state_dict()
    theirs = {name: tuple(x.shape) for name, x in theirs.items() if name != LM_HEAD}
    assert {spec.hf_name: spec.hf_shape for spec in checkpoint.param_specs(ModelConfig.from_dict(raw))} == theirs


def test_weight_map_is_one_to_one(config):
    param_specs = checkpoint.param_specs(config)
    assert len({spec.hf_name for spec in param_specs}) == len({spec.path for spec in param_specs}) == len(param_specs)
    assert all(np.prod(spec.shape) == np.prod(spec.hf_shape) for spec in param_specs)


def test_weight_map_refuses_an_unknown_path():
    with pytest.raises(KeyError):
        names.hf_name(("text", "layers", 0, "mixer", "rope", "weight"))


# Loading.


def test_load_params_returns_the_files_values_in_the_models_tree(demo_folder, config, weights):
    params = checkpoint.load_params(demo_folder, config)
    assert jax.tree.structure(params) == jax.tree.structure(model.parameter_shapes(config))
    for spec, leaf in zip(checkpoint.param_specs(config), jax.tree.leaves(params), strict=True):
        assert isinstance(leaf, jax.Array)
        np.testing.assert_array_equal(leaf, weights[spec.hf_name].reshape(spec.shape), strict=True)


def test_load_params_puts_a_tensor_at_its_path(demo_folder, config, weights):
    params = checkpoint.load_params(demo_folder, config)
    mixer = params["text"]["layers"][1]["mixer"]
    np.testing.assert_array_equal(mixer["conv"], weights["model.language_model.layers.1.linear_attn.conv1d.weight"][:, 0])
    patches = weights["model.vision_tower.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(params["vision"]["patch_embed"]["weight"], patches.reshape(48, 3 * 14 * 14))


def test_load_params_keeps_each_tensors_dtype(write, config, weights):
    mixed = weights | {UP_PROJ: weights[UP_PROJ].astype(ml_dtypes.bfloat16), NORM: weights[NORM].astype(np.float16)}
    params = checkpoint.load_params(write(mixed), config)
    up_proj, norm = params["text"]["layers"][0]["mlp"]["up_proj"]["weight"], params["text"]["norm"]["weight"]
    assert (up_proj.dtype, norm.dtype) == (jnp.bfloat16, jnp.float16)
    assert np.asarray(up_proj).tobytes() == mixed[UP_PROJ].tobytes()
    assert params["text"]["embed"]["weight"].dtype == jnp.float32


def test_load_params_casts_like_torch(demo_folder, config, weights):
    params = checkpoint.load_params(demo_folder, config, dtype=jnp.bfloat16)
    for spec, leaf in zip(checkpoint.param_specs(config), jax.tree.leaves(params), strict=True):
        theirs = torch.from_numpy(weights[spec.hf_name]).to(torch.bfloat16).view(torch.int16)
        assert np.asarray(leaf).tobytes() == theirs.numpy().tobytes(), spec.hf_name


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_load_params_refuses_an_unsupported_dtype(demo_folder, config, dtype):
    assert dtype in refusal(demo_folder, config, dtype=dtype)


def test_load_params_can_be_cancelled(demo_folder, config):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CancelledError):
        checkpoint.load_params(demo_folder, config, cancelled=cancelled)


def test_shards_load_like_a_single_file(write, demo_folder, config, weights):
    assert same_trees(checkpoint.load_params(write(*halves(weights)), config), checkpoint.load_params(demo_folder, config))


# Missing and extra tensors.


def test_all_mismatches_are_reported_at_once(write, config, weights):
    wrong = {name: tensor for name, tensor in weights.items() if name != EMBEDDING}
    wrong["model.language_model.layers.9.mlp.up_proj.weight"] = weights[UP_PROJ]
    wrong[UP_PROJ] = weights[UP_PROJ][:100]
    wrong[NORM] = weights[NORM].astype(np.int32)
    lines = refusal(write(wrong), config).splitlines()
    assert len(lines) == 5 and "config.json" in lines[0]
    assert lines[1].split() == ["missing:", EMBEDDING, "[306,", "64]"]
    assert "extra: model.language_model.layers.9.mlp.up_proj.weight [128, 64]" in lines[2]
    assert f"shape: {UP_PROJ} is [100, 64], expected [128, 64]" in lines[3]
    assert f"dtype: {NORM} is I32" in lines[4]


def test_lm_head_equal_to_the_embedding_is_accepted(write, demo_folder, config, weights):
    folder = write(weights | {LM_HEAD: weights[EMBEDDING]})
    assert same_trees(checkpoint.load_params(folder, config), checkpoint.load_params(demo_folder, config))


@pytest.mark.parametrize("change", ["one value", "dtype", "rows"])
def test_untied_lm_head_is_refused(write, config, weights, change, monkeypatch):
    monkeypatch.setattr(checkpoint.hf_folder, "COMPARE_ROWS", 100)  # several blocks; the last value is in the last one
    head = weights[EMBEDDING].copy()
    head[-1, -1] += change == "one value"
    head = {"one value": head, "dtype": head.astype(np.float16), "rows": head[:-1]}[change]
    assert f"untied: {LM_HEAD} differs from {EMBEDDING}" in refusal(write(weights | {LM_HEAD: head}), config)


def test_lm_head_without_embedding_is_refused(write, config, weights):
    renamed = {LM_HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}
    message = refusal(write(renamed), config)
    assert f"missing: {EMBEDDING}" in message and f"extra: {LM_HEAD}" in message


# Damaged folders: the error is one line that names the file.


@pytest.mark.parametrize("damage", ["cut in the data", "cut in the header", "empty", "no safetensors", "longer"])
def test_damaged_file_is_named(write, config, weights, damage):
    folder = write(weights)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(
        {
            "cut in the data": data[:-1000],
            "cut in the header": data[:1000],
            "empty": b"",
            "no safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "longer": data + b"\0" * 8,
        }[damage]
    )
    message = refusal(folder, config)
    assert str(file) in message and "\n" not in message


def test_missing_shard_is_named(write, config, weights):
    folder = write(*halves(weights))
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder, config)
    assert "index.json" in message and "missing: model-00002-of-00002.safetensors" in message and "\n" not in message


@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_tensor_missing_from_its_shard(write, config, weights, shard):
    folder = write(*halves(weights))
    name = "ghost" if shard.startswith("model-00002") else list(weights)[-1]  # in no shard; in the other shard
    write_index(folder, read_index(folder) | {name: shard})
    assert f"puts tensor {name} into {shard}, which lacks it" in refusal(folder, config)


def test_tensor_missing_from_the_index(write, config, weights):
    folder = write(*halves(weights))
    write_index(folder, {name: shard for name, shard in read_index(folder).items() if name != NORM})
    message = refusal(folder, config)
    assert NORM in message and "does not name" in message


def test_tensor_in_two_shards(write, config, weights):
    first, second = halves(weights)
    name = next(iter(first))
    message = refusal(write(first, second | {name: first[name]}), config)
    assert name in message and "model-00001-of-00002" in message and "model-00002-of-00002" in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}']
)
def test_malformed_index_is_named(tmp_path, config, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    message = refusal(tmp_path, config)
    assert "model.safetensors.index.json" in message and "\n" not in message


def test_pickle_files_are_refused_with_advice(tmp_path, config):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    message = refusal(tmp_path, config)
    assert "pytorch_model.bin" in message and "only safetensors are read" in message and "save_pretrained" in message


def test_folder_without_weights_is_refused(tmp_path, config):
    assert f"{tmp_path} holds no weights" in refusal(tmp_path, config)


# Converted folders (test_convert.py has whole conversions).


def test_orbax_folder_writes_groups_and_reads_the_same_values(tmp_path, config, weights, monkeypatch):
    monkeypatch.setattr(orbax_folder, "GROUP_BYTES", 200_000)
    param_specs, saved = checkpoint.param_specs(config), []
    orbax_folder.write(
        tmp_path / "params", ((spec, weights[spec.hf_name].reshape(spec.shape)) for spec in param_specs), saved.append
    )
    assert len(saved) > 4 and sum(saved) == sum(tensor.nbytes for tensor in weights.values())
    assert [path.name for path in tmp_path.iterdir()] == ["params"]
    read = list(orbax_folder.read(tmp_path / "params", param_specs, orbax_folder.read_metadata(tmp_path / "params")))
    assert [spec for spec, _ in read] == list(param_specs)
    for spec, tensor in read:
        np.testing.assert_array_equal(tensor, weights[spec.hf_name].reshape(spec.shape), strict=True)


def test_orbax_folder_consumes_one_tensor_at_a_time(tmp_path, config, monkeypatch):
    monkeypatch.setattr(orbax_folder, "GROUP_BYTES", 1)
    param_specs, made = checkpoint.param_specs(config)[:5], []

    def tensors():
        for spec in param_specs:
            made.append(len(saved))
            yield spec, np.zeros(spec.shape, np.float32)

    saved = []
    orbax_folder.write(tmp_path / "params", tensors(), saved.append)
    assert made == [0, 1, 2, 3, 4]


def test_is_converted_needs_our_manifest(demo_folder, tmp_path):
    assert not checkpoint.is_converted(demo_folder)
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    assert not checkpoint.is_converted(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "minicpmv46-jax", "version": 99}')
    assert checkpoint.is_converted(tmp_path)


# Finding a checkpoint.


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs; owner/model has two revisions of a few small files."""

    protocol_version = "HTTP/1.1"
    files = types.MappingProxyType(
        {"config.json": b'{"a": 1}', "model.safetensors": b"weights", "chat_template.jinja": b"{{ x }}", "README.md": b"# no"}
    )

    def do_GET(self):
        revision = self.path.split("?")[0].partition("/revision/")[2] or "main"
        if "closed/model" in self.path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
        if "owner/model" not in self.path:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in self.path:
            return self.file(*self.path.split("/resolve/")[1].split("/"))
        if "/tree/" in self.path:
            return self.answer(200, json.dumps([self.entry(name) for name in self.files]).encode())
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if commit is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in self.files]
        info = {"id": "owner/model", "modelId": "owner/model", "sha": commit, "siblings": siblings, "tags": [], "private": False}
        return self.answer(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def entry(self, name):
        oid = hashlib.sha1(self.files[name]).hexdigest()
        return {"type": "file", "oid": oid, "size": len(self.files[name]), "path": name}

    def file(self, revision, name):
        data = self.files[name] + revision[:1].encode()
        etag = hashlib.sha1(data).hexdigest()
        self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMITS.get(revision, revision)})

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def online(monkeypatch):
    """The address of a local hub server. The suite sets HF_HUB_OFFLINE=1; these tests unset it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(online):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def unused_endpoint():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def unresolved(*args, **options):
    with pytest.raises(ValueError) as error:
        checkpoint.resolve(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_resolve_returns_a_folder_unchanged(tmp_path):
    assert checkpoint.resolve(tmp_path) == tmp_path == checkpoint.resolve(str(tmp_path))


def test_revision_of_a_folder_is_refused(tmp_path):
    assert "revision 'main'" in unresolved(tmp_path, revision="main")


@pytest.mark.parametrize("source", ["/no/such/folder", "checkpoint", "a/b/c", "a//b", "./here", "", "owner/mo del"])
def test_neither_a_folder_nor_an_id(source):
    assert "neither a folder nor a hub id" in unresolved(source)


@pytest.mark.parametrize("revision", [None, "v2", "b" * 40])
def test_hub_download_skips_unneeded_files(hub, tmp_path, revision):
    folder = checkpoint.resolve("owner/model", revision, endpoint=hub, cache_dir=tmp_path)
    commit = COMMITS["v2" if revision else "main"]
    assert folder.name == commit
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "chat_template.jinja"}
    assert (folder / "model.safetensors").read_bytes() == b"weights" + commit[:1].encode()


def test_downloaded_hub_id_needs_no_network(hub, tmp_path):
    folder = checkpoint.resolve("owner/model", endpoint=hub, cache_dir=tmp_path)
    assert checkpoint.resolve("owner/model", endpoint=unused_endpoint(), cache_dir=tmp_path) == folder


def test_unknown_repository(hub, tmp_path):
    message = unresolved("owner/other", endpoint=hub, cache_dir=tmp_path)
    assert "owner/other is not a folder here, and the hub has no such repository" in message


def test_unknown_revision(hub, tmp_path):
    assert "owner/model has no revision 'v9'" in unresolved("owner/model", "v9", endpoint=hub, cache_dir=tmp_path)


def test_gated_repository(hub, tmp_path):
    assert "closed/model is gated" in unresolved("closed/model", endpoint=hub, cache_dir=tmp_path)


def test_no_network(online, tmp_path):
    message = unresolved("owner/model", endpoint=unused_endpoint(), cache_dir=tmp_path)
    assert "owner/model" in message and "cannot be reached" in message and "pass a checkpoint folder" in message


def test_offline_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = unresolved("owner/model", cache_dir=tmp_path)
    assert "owner/model" in message and "HF_HUB_OFFLINE" in message


def test_unexpected_errors_are_not_hidden(monkeypatch):
    def broken(*args, **options):
        raise AttributeError("a fault in the code")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(AttributeError):
        checkpoint.resolve("owner/model")


def test_errors_have_the_given_path(tmp_path):
    assert str(Path("no/such")) in unresolved(Path("no/such/folder"))
