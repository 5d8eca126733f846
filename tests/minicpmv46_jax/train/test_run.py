"""Whole runs on the small model: they overfit, resume after an interruption, and export their weights."""

import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest

from convert import export_run
from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train import AnswerMarkers, log
from minicpmv46_jax.train.__main__ import main
from minicpmv46_jax.train.data import RowProcessor, batches
from minicpmv46_jax.train.run import prepare, train, trained_params
from minicpmv46_jax.train.settings import Settings
from tests import ROOT
from tests.minicpmv46_jax.train.train_compile import QUICK
from tests.oracle import Oracle
from tests.tolerances import FLOAT32_FORWARD, relative_rms

STEPS = 30


@pytest.fixture(scope="module")
def source(tmp_path_factory, demo_folder, photos):
    """Returns (folder of the small model with pictures of about 64 patches, folder of data files)."""
    folder = tmp_path_factory.mktemp("source")
    model = shutil.copytree(demo_folder, folder / "model")
    config = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(config | {"scale_resolution": 112, "max_slice_nums": 1}))
    photos[0].resize((90, 60)).save(folder / "china.png")
    rows = [
        {"conversations": [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "Red."}]},
        {
            "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "China."}],
            "images": ["china.png"],
        },
        {"conversation": [{"human": "How many?", "assistant": "Two."}, {"human": "And now?", "assistant": "Three."}]},
        {"query": "Who?", "response": "Nobody."},
    ]
    for name, own in {"text": [row for row in rows if "images" not in row], "pictures": rows}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return model, folder


def settings(source, folder, rows="text", **tables):
    model, files = source
    pictures = {"patches": 128, "views": 2, "longest": 96} if rows == "pictures" else {}
    fixed = {
        "model": {"source": str(model)},
        "data": {"files": [str(files / f"{rows}.jsonl")]},
        "batch": {"rows": 1, "tokens": 192, **pictures},
        "run": {"folder": str(folder), "steps": STEPS, "dtype": "float32", "log_every": 1, "save_every": 10},
        "optimizer": {"rate": 1e-2, "warmup": 3},
    }
    return Settings.from_dict({name: fixed.get(name, {}) | tables.get(name, {}) for name in fixed | tables})


@pytest.fixture(scope="module")
def full(source, tmp_path_factory):
    """Returns the folder of a run of full fine-tuning."""
    folder = tmp_path_factory.mktemp("run") / "full"
    train(settings(source, folder))
    return folder


@pytest.fixture(scope="module")
def with_adapters(source, tmp_path_factory):
    """Returns the folder of a run with adapters."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    train(settings(source, folder, "pictures", lora={"rank": 8}, optimizer={"rate": 5e-3}))
    return folder


def losses(folder):
    return [line["loss"] for line in log.read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", ["full", pytest.param("with_adapters", marks=pytest.mark.full)])
def test_run_overfits_and_exports_its_weights(kind, request, source, tmp_path):
    folder = request.getfixturevalue(kind)
    found = losses(folder)
    assert found[-1] < 0.2 * found[0]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir())
    exported = export_run(folder, tmp_path / "exported")
    ours = MiniCPMV.from_pretrained(exported)
    picture = {"type": "image", "image": str(source[1] / "china.png")}
    question = [{"type": "text", "text": "Who?"}] if kind == "full" else [picture, {"type": "text", "text": "Where?"}]
    inputs = ours.process([{"role": "user", "content": question}])
    logits = Oracle(exported).logits(inputs)
    assert relative_rms(ours.logits(inputs), logits) < FLOAT32_FORWARD
    assert chr(int(logits[-1].argmax())) == ("N" if kind == "full" else "C")  # the first letter of the trained answer


def test_interrupted_run_resumes_to_the_same_curve(source, full, tmp_path):
    at = random.Random(0).randrange(1, STEPS - 1)
    own = settings(source, tmp_path / "run")
    train(own, stop=lambda step: step == at)
    assert len(losses(tmp_path / "run")) == at
    train(own)
    assert losses(tmp_path / "run") == losses(full)
    newest = sorted({10, 20, at, STEPS})[-2:]
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == newest
    leaves = [jax.tree.leaves(trained_params(folder)[0]) for folder in (tmp_path / "run", full)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_two_hosts_train_and_resume_like_one(source, tmp_path):
    """Two processes of two devices each, interrupted once, against one process of four with the same data."""
    model, files = source
    (files / "many.jsonl").write_text("".join(json.dumps({"query": "?" * i, "response": f"{i:02d}"}) + "\n" for i in range(20)))
    own = settings(source, tmp_path / "run", "many", mesh={"data": 2, "fsdp": 2}, run={"steps": 3})
    for stop in (1, -1):  # after the first step; never
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        options = [json.dumps(own.to_dict()), str(stop)]
        commands = [[sys.executable, "-m", "tests.minicpmv46_jax.train.two_hosts", port, host, *options] for host in "01"]
        for host in [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
        ]:
            output, _ = host.communicate(timeout=300)
            assert host.returncode == 0, output[-3000:]
    run, expected = prepare(own, QUICK), []
    processor = Processor.from_folder(model)
    reader = RowProcessor(processor, AnswerMarkers.from_processor(processor), own.batch)
    vision = ModelConfig.from_folder(model).vision
    parts = [iter(batches(own.data.files, reader, vision, devices=2, shard=(host, 2))) for host in range(2)]
    state = run.state
    for _ in range(3):
        both = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *map(next, parts))
        state, metrics = run.step(state, both)
        expected.append(float(metrics.loss))
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)


def test_errors_name_the_setting_or_file(source, full, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nsource = "x"\n[data]\nfiles = ["a.jsonl"]\n[batch]\nrows = 1\ntokens = 64\n[run]\nfolder = "r"\nstep = 3\n'
    )
    assert main(["--config", str(path)]) == 1
    assert "run.step is unknown" in capsys.readouterr().err
    with pytest.raises(ValueError, match="checkpoint of step 30 is of another run"):
        train(settings(source, full, optimizer={"vision": 0.0}))
    with pytest.raises(ValueError, match=r"no\.jsonl does not exist"):
        train(settings(source, tmp_path / "run", data={"files": [str(tmp_path / "no.jsonl")]}))


def test_settings_of_the_readme_are_valid():
    readme = (ROOT / "minicpmv46_jax/train/README.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    found = Settings.from_dict(tomllib.loads(block))
    assert found.lora.scale == 2.0 and found.mesh.fsdp == 8 and found.batch.patches == 28416
