"""The README's Python, run as it stands but for the model, the picture and the server's address."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", [b for b in BLOCKS if "openai" not in b], ids=["answer", "functional core"])
def test_examples_run(block, demo_folder, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos[0].resize((200, 150)).save("photo.jpg")
    names = {}
    exec(compile(block.replace("openbmb/MiniCPM-V-4.6", str(demo_folder)), "README.md", "exec"), names)
    assert names["logits"].shape[1] == 306 if "logits" in names else set(names["gradients"]) == {"text", "vision"}


def test_what_it_names_exists():
    root = Path(__file__).parent.parent
    for path in re.findall(r"`((?:minicpmv46_jax|convert|serve|kernels_pallas|tests)/[\w/.]*)`", README):
        assert (root / path).exists(), path
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert target in ("are",) or f"\n{target}:" in makefile, target
