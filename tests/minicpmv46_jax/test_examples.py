"""The examples run on the demo model, and the client against a live server."""

import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from minicpmv46_jax.examples import client, describe_picture, loss_and_gradient
from tests import ROOT
from tests.serve.support import FakeModel, live, serving

EXAMPLES = ["client", "describe_picture", "loss_and_gradient"]


def test_describes_the_drawn_picture(capsys):
    describe_picture.main(["--dtype", "float32"])
    assert capsys.readouterr().out == "A red star and a blue circle.\n"


def test_describes_a_picture_file(tmp_path, photos, demo_folder, capsys):
    photos[0].resize((64, 48)).save(tmp_path / "china.png")
    describe_picture.main([str(demo_folder), "--picture", str(tmp_path / "china.png"), "--question", "?"])
    assert capsys.readouterr().out


def test_prints_loss_and_gradient_of_both_parts(capsys):
    loss_and_gradient.main([])
    numbers = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, value = line.rpartition(" ")
        numbers[name] = float(value)
    assert list(numbers) == ["loss", "norm of the gradient of text:", "norm of the gradient of vision:"]
    assert all(0 < value < np.inf for value in numbers.values())


class TextModel(FakeModel):
    """A fake model that answers the text of a message with pictures."""

    def plan(self, messages, **options):
        picture, text = messages[-1]["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        return super().plan([{"role": "user", "content": text["text"]}], **options)


def test_client_prints_the_whole_and_the_streamed_answer(capsys):
    with serving(TextModel()) as service, live(service) as address:
        client.main(["--url", f"{address}/v1", "--question", "what is this"])
    assert capsys.readouterr().out == "whole:    WHAT IS THIS\nstreamed: WHAT IS THIS\n"


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("as_file", [False, True])
def test_every_example_has_help(name, as_file):
    path = importlib.import_module(f"minicpmv46_jax.examples.{name}").__file__
    command = [path] if as_file else ["-m", f"minicpmv46_jax.examples.{name}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *command, "--help"], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.match(r"usage: ", result.stdout) and "--question" in result.stdout
