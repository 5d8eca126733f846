"""Code blocks and links of every README; the model, the image and the address are replaced."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import ROOT

READMES = sorted(
    path.relative_to(ROOT) for path in ROOT.rglob("*.md") if not {".venv", ".venv-newer", ".pytest_cache"} & set(path.parts)
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODEL, ADDRESS, IMAGE = "openbmb/MiniCPM-V-4.6", "http://127.0.0.1:8000", "https://.../photo.jpg"


def blocks(language):
    """Returns (file, code) of each block in a language, with readable ids."""
    found = [(path, code) for path in READMES for kind, code in BLOCK.findall((ROOT / path).read_text()) if kind == language]
    return [pytest.param(path, code, id=f"{path}-{i}") for i, (path, code) in enumerate(found)]


def commands():
    """Returns each line of the shell blocks, without its comment."""
    lines = [line for block in blocks("bash") for line in block.values[1].splitlines()]
    return list(dict.fromkeys(shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))))


@pytest.mark.parametrize(("path", "code"), blocks("python"))
def test_python_runs(path, code, request, demo_folder, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos[0].resize((200, 150)).save("photo.jpg")
    if "OpenAI(" in code:
        from tests.serve.multimodal.test_image_workers import data_url
        from tests.serve.support import NAME

        address = request.getfixturevalue("demo_address")
        code = code.replace(ADDRESS, address).replace(IMAGE, data_url(Path("photo.jpg"))).replace(MODEL, NAME)
    if "Offline(" in code:  # the session's engine, which stays open, in place of one that fills the memory
        from serve.offline import Offline

        engine = request.getfixturevalue("demo_engine")
        monkeypatch.setattr(Offline, "_make_engine", lambda *_: engine)
        monkeypatch.setattr(engine, "close", lambda: None)
    names = {}
    exec(compile(code.replace(MODEL, str(demo_folder)), str(path), "exec"), names)
    if "logits" in names:
        assert names["logits"].shape[1] == 306
    if "gradients" in names:
        import jax

        squares = {part: sum(float((x**2).sum()) for x in jax.tree.leaves(tree)) for part, tree in names["gradients"].items()}
        assert squares["text"] > 0 and squares["vision"] > 0
    if "stream" in names:
        assert [chunk for chunk in names["stream"] if chunk.choices and chunk.choices[0].finish_reason]
    if "answers" in names:
        assert len(names["answers"]) == 2


@pytest.mark.parametrize(("path", "code"), blocks("json"))
def test_json_parses(path, code):
    assert all(json.loads(line) for line in code.splitlines())


@pytest.mark.parametrize(("path", "code"), blocks("nginx"))
def test_nginx_takes_it(path, code, tmp_path):
    assert code.count("{") == code.count("}") and "proxy_pass" in code
    if (nginx := shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")) is not None:
        config = tmp_path / "nginx.conf"
        config.write_text(f"pid {tmp_path}/pid;\nerror_log {tmp_path}/log;\nevents {{}}\nhttp {{\naccess_log off;\n{code}}}\n")
        done = subprocess.run([nginx, "-t", "-p", str(tmp_path), "-c", str(config)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which the commands run one after another."""
    return tmp_path_factory.mktemp("readme")


@functools.cache
def usage(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_command(command, request, demo_folder, work):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "curl":
        address = request.getfixturevalue("demo_address")
        from tests.serve.support import NAME

        body = {**json.loads(words[words.index("-d") + 1]), "model": NAME}
        httpx.post(words[1].replace(ADDRESS, address), json=body, timeout=60).raise_for_status()
    elif words[:2] == ["bash", ".ci/run"]:
        assert (ROOT / ".ci/run").exists()
    else:
        assert words[:2] == ["python", "-m"], command
        check_module(words[2], words[3:], demo_folder, work)


def check_module(module, arguments, demo_folder, work):
    """Runs conversions; of other commands compares the options with the usage."""
    if module == "pytest":
        assert all((ROOT / path).exists() for path in arguments)
    elif module == "convert":
        given = [str(demo_folder) if word == MODEL else word for word in arguments]
        if "--model" in given and not (work / given[given.index("--model") + 1]).exists():
            given[given.index("--model") + 1] = "minicpmv46"
        done = subprocess.run(
            [sys.executable, "-m", "convert", *given], cwd=work, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    elif module == "serve.autotuned":
        assert (ROOT / "serve" / "autotuned.py").exists()
    else:
        known = usage(module) + (usage("serve") if module == "serve.table" else "")
        for option in (word for word in arguments if word.startswith("--")):
            assert re.search(rf"{option}\b", known), f"{module} has no {option}"


def environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("path", READMES, ids=str)
def test_links_and_paths_exist(path):
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / path.parent / target).exists(), target
    for named in re.findall(r"`((?:minicpmv46_jax|convert|serve|kernels_pallas|tests)/[\w/.]*)`", text):
        assert (ROOT / named).exists() or named.endswith("blackwell.py"), named


@pytest.mark.parametrize("path", READMES, ids=str)
def test_anchors_exist(path):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([\w-]+)\)", (ROOT / path).read_text()):
        page = (ROOT / path.parent / target if target else ROOT / path).read_text()
        titles = [line.lstrip("# ").lower() for line in page.splitlines() if line.startswith("#")]
        headings = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
        assert anchor in headings, f"{target}#{anchor}"


def test_the_map_names_rooms():
    (text,) = [code for kind, code in BLOCK.findall((ROOT / "README.md").read_text()) if not kind]
    assert all((ROOT / line.split()[0]).is_dir() for line in text.splitlines())
