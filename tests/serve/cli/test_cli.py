"""`python -m serve`: mistakes in one line, a first start with empty caches, a clean stop."""

import contextlib
import dataclasses
import gc
import importlib.util
import inspect
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from kernels_pallas import backends
from minicpmv46_jax import demo, library
from minicpmv46_jax.evaluate import read_questions
from minicpmv46_jax.library import ModelLoader
from minicpmv46_jax.scenes.__main__ import write
from serve.__main__ import _parser, bind, check_tls, listen, main, read_api_keys
from serve.cli import batch
from serve.cli.args import BACKEND_ALIASES, BACKENDS, media_limits
from serve.cli.build_service import build_cors, build_media_fetcher, build_service, default_model_name
from serve.engine.engine import QueuePolicy
from serve.engine.memory_plan import EngineConfig
from serve.runtime import cache_dir, startup
from serve.runtime import server as server_module
from serve.runtime.program_cache import ProgramCache
from serve.runtime.server import Server, TlsConfig, socket_url
from serve.runtime.startup import DeviceConfig
from tests import ROOT
from tests.serve.engine.serial_engine import SerialEngine
from tests.serve.multimodal.test_image_workers import data_url
from tests.serve.support import FakeModel, serving


def environment(**changes):
    """Returns the environment without pytest's settings: one device, and no platform chosen."""
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def run(*arguments, **changes):
    command = [sys.executable, "-m", "serve", *map(str, arguments)]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=120)


def startup_error(capsys, *arguments):
    """Returns the one line of an error that is found before the model is loaded."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_help_imports_no_jax():
    done = run("--help")
    assert done.returncode == 0
    assert "--allowed-local-media-path" in done.stdout
    imported = subprocess.run(
        [sys.executable, "-c", "import serve.__main__, sys; print('jax' in sys.modules)"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert imported.stdout.strip() == "False"


@pytest.mark.parametrize(
    "arguments",
    ["--cpu --tpu", "--port 70000", "--port x", "--dtype int8", "--prot 1", "--api 1", "--max-model-length 5", "folder"],
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert "usage: python -m serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--served-model 5", "--served-model is not a flag of this server; did you mean --served-model-name?"),
        ("--alowed-media-domains x", "did you mean --allowed-media-domains?"),
        ("--tool-call-parser=hermes", "--tool-call-parser is not a flag of this server, and not needed: both formats"),
        ("--limit-mm-per-prompt x", "'x' is not like"),
        ("--limit-mm-per-prompt [5]", "'[5]' is not like"),
        ('--limit-mm-per-prompt {"audio":1}', "'audio' is none of image, video"),
        ("--limit_mm_per_prompt image=-1", "image is -1, expected 0 or more"),
        ("--allowed-media-networks 10.0.0.1/8", "host bits set"),
        ("--max-pixels 0", "0 is less than 1"),
        ("--backend cuda", "'cuda' is none of reference, hopper, tpu"),
    ],
)
def test_invalid_flags_are_explained(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ['{"image": 5, "video": 2}', "image=5,video=2"])
def test_media_limits_are_parsed(text):
    assert media_limits(text) == {"image": 5, "video": 2}


def test_media_flags_configure_the_fetcher():
    arguments = "--allowed-media-domains Good.test. other.test --allowed-media-networks 10.0.0.0/8 ::1 --max-media-bytes 5"
    fetch = build_media_fetcher(_parser().parse_args(arguments.split()))
    assert fetch._network_policy.domains == {"good.test", "other.test"}
    assert [str(network) for network in fetch._network_policy.networks] == ["10.0.0.0/8", "::1/128"]
    assert fetch._limits.max_bytes == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--memory-fraction 1.5", "1.5 is not between 0 and 1"),
        ("--max-running 0", "0 is less than 1"),
        ("--max-wait 0", "0.0 is not more than 0"),
    ],
)
def test_engine_flags_out_of_range(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert message in capsys.readouterr().err


def test_port_in_use_is_refused(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = startup_error(capsys, "--port", port)
    assert "'127.0.0.1'" in line and str(port) in line and "in use" in line


def test_foreign_hosts_are_refused(capsys):
    assert "'no.such.host.invalid'" in startup_error(capsys, "--host", "no.such.host.invalid")
    assert "'192.0.2.1'" in startup_error(capsys, "--host", "192.0.2.1")  # a documentation address


def test_port_taken_while_loading_is_refused():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:  # allowed while neither socket listens
            listen(first)
            with pytest.raises(ValueError, match=f"port {port}: .*in use"):
                listen(second)


def test_contradictory_flags_are_refused(capsys, tmp_path):
    assert "--revision" in startup_error(capsys, "--revision", "main")
    every = ["--allowed-origins", '["*"]', "--allow-credentials"]
    assert "--allowed-origins '*' would let every page" in startup_error(capsys, *every)
    assert "--api-key is empty" in startup_error(capsys, "--api-key", "")
    assert f"{tmp_path / 'none'}, which is not a folder" in startup_error(capsys, "--allowed-local-media-path", tmp_path / "none")


def test_backend_names_are_those_of_the_kernels():
    assert set(BACKENDS) == {backends.REFERENCE, *backends.DEVICE_KIND_PREFIXES} and BACKEND_ALIASES == backends.ALIASES
    assert _parser().parse_args(["--backend", "gpu"]).backend == "hopper"
    assert _parser().parse_args([]).backend is None


@pytest.mark.parametrize("backend", ["tpu", "hopper"])
def test_backend_for_another_device_is_refused_before_loading(capsys, monkeypatch, tmp_path, backend):
    monkeypatch.setattr(startup, "choose_platform", lambda *_: "cpu")
    monkeypatch.setattr(backends, "mosaic_unsupported_reason", lambda: None)
    line = startup_error(capsys, "--port", 0, "--backend", backend, "--model", tmp_path / "none")
    assert line.startswith(f"error: backend '{backend}' is for ")
    assert line.endswith("and the device is 'cpu'; backend 'reference' runs on it\n")


def test_backend_that_jax_is_too_old_for_is_refused_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(startup, "choose_platform", lambda *_: "gpu")
    monkeypatch.setattr(backends, "mosaic_unsupported_reason", lambda: "jax is 0.10")
    assert startup_error(capsys, "--port", 0, "--backend", "gpu") == (
        "error: backend 'hopper': jax is 0.10; backend 'reference' serves it\n"
    )


def test_requested_backend_reaches_the_runner_and_the_model(demo_folder, tmp_path, monkeypatch):
    requested = {}

    class Runner(SimpleNamespace):
        def __init__(self, config, shapes, sizes, backend, store):
            requested["runner"] = backend
            super().__init__(compile=lambda **_: None, load=lambda _: None)

    monkeypatch.setattr(startup, "ModelRunner", Runner)
    monkeypatch.setattr(startup, "Engine", lambda model, runner, policy: None)
    monkeypatch.setattr(
        ModelLoader,
        "model",
        lambda self, backend: requested.update(model=backend) or SimpleNamespace(params={}),
    )
    with ModelLoader(demo_folder, "float32") as loader:
        startup.load_engine(loader, DeviceConfig("cpu", 0.9, tmp_path, "reference"), EngineConfig(), QueuePolicy())
    assert requested == {"runner": "reference", "model": "reference"}


def test_backend_that_does_not_serve_the_model_is_one_line(demo_folder, tmp_path, monkeypatch):
    def unsupported(*_, **__):
        raise NotImplementedError("backend 'hopper': heads are 64 wide; backend 'reference' serves it")

    monkeypatch.setattr(ProgramCache, "compile", unsupported)
    config = DeviceConfig("cpu", 0.9, tmp_path, "reference")
    for device_config, error in ((config, ValueError), (dataclasses.replace(config, backend=None), NotImplementedError)):
        with pytest.raises(error, match="heads are 64 wide"), ModelLoader(demo_folder, "float32") as loader:
            startup.load_engine(loader, device_config, EngineConfig(), QueuePolicy())


def test_api_keys_are_read_from_flag_and_file(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text("# a comment\n two \n\nthree\n")
    assert read_api_keys(["one"], file) == ("one", "two", "three")
    assert read_api_keys([], None) == ()
    file.write_text("# a comment\n")
    assert f"--api-key-file is {file}, which has no key" in startup_error(capsys, "--api-key-file", file)
    assert "nothing.txt" in startup_error(capsys, "--api-key-file", tmp_path / "nothing.txt")


def test_invalid_certificates_are_refused(tmp_path, capsys):
    assert "--ssl-keyfile needs an --ssl-certfile" in startup_error(capsys, "--ssl-keyfile", "x")
    file = tmp_path / "cert.pem"
    assert "cannot be used" in startup_error(capsys, "--ssl-certfile", file)
    file.write_text("hello")
    assert f"{file} cannot be used" in startup_error(capsys, "--ssl-certfile", file)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_server_answers_over_https(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *subject]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    check_tls(_parser().parse_args(["--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]))
    with serving(FakeModel()) as service, bind("127.0.0.1", 0) as listening:
        server = Server(service, TlsConfig(str(cert), str(key)))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            url = f"{socket_url(listening, 'https')}/health"
            trusted = ssl.create_default_context(cafile=cert)
            for _ in range(200):
                with contextlib.suppress(httpx.ConnectError):
                    assert httpx.get(url, verify=trusted).json() == {"status": "ok"}
                    break
                time.sleep(0.05)
            else:
                pytest.fail("no answer over https")
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.mark.parametrize("restore", [True, False])
def test_restore_newlines_flag_reaches_the_service(monkeypatch, demo_folder, restore):
    model = FakeModel()
    for name, value in {"choose_platform": "cpu", "load_engine": (model, SerialEngine(model))}.items():
        monkeypatch.setattr(startup, name, lambda *_, value=value: value)
    service = build_service(_parser().parse_args(["--model", str(demo_folder), *["--restore-newlines"] * restore]))
    assert service.restore_newlines == restore
    service.close()


@pytest.mark.parametrize("parser", [_parser, batch._parser])
@pytest.mark.parametrize("skip", [False, True])
def test_skip_checksums_flag_reaches_the_loader(monkeypatch, demo_folder, parser, skip):
    passed = []

    class Loader(ModelLoader):
        def __init__(self, *arguments):
            passed.append(inspect.signature(ModelLoader).bind(*arguments).arguments["verify_checksums"])
            raise ValueError("that is all")

    monkeypatch.setattr(library, "ModelLoader", Loader)
    positional = ["in", "out"] if parser is batch._parser else []
    with pytest.raises(ValueError, match="that is all"):
        build_service(parser().parse_args([*positional, "--model", str(demo_folder), *["--skip-checksums"] * skip]))
    assert passed == [not skip]


def test_cors_flags():
    assert build_cors(_parser().parse_args([])) is None
    found = build_cors(_parser().parse_args(["--allowed-origins", '["https://a.example"]', "--allow-credentials"]))
    assert (found.allow_origins, found.allow_methods, found.allow_credentials) == (("https://a.example",), ("*",), True)


def test_bind_supports_ipv4_and_ipv6():
    for host in ("127.0.0.1", "::1"):
        with bind(host, 0) as listening:
            assert listening.getsockname()[0] == host


@pytest.mark.parametrize("kind, plugin", [("gpu", "jax_cuda13_plugin"), ("tpu", "libtpu")])
def test_missing_platform_is_one_line(kind, plugin, tmp_path):
    if importlib.util.find_spec(plugin) is not None:
        pytest.skip(f"with {plugin} installed there may be one")
    done = run(f"--{kind}", "--port", 0, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: --{kind}: jax finds no {kind.upper()} here, it found: ")
    assert f'pip install "minicpmv46-jax[{kind}]"' in line
    assert "Traceback" not in done.stderr


def test_missing_model_is_one_line(tmp_path):
    done = run("--cpu", "--port", 0, "--model", tmp_path / "none", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and str(tmp_path / "none") in line
    assert "Traceback" not in done.stderr


def test_first_start_answers_correctly_and_stops_cleanly(tmp_path):
    """Starts the demo model with empty caches, and asks about an image outside of its training data."""
    (question,) = read_questions(write(tmp_path / "scene", 1, held_out=True, kinds=("shapes",), first=10**6))
    words, picture = question.messages[0]["content"][-1]["text"], next((tmp_path / "scene").glob("*.png"))
    command = [sys.executable, "-m", "serve", "--cpu", "--port", "0", "--api-key", "k", "--served-model-name", "mine"]
    command += ["--picture-processes", "1"]
    caches = tmp_path / "caches"
    with subprocess.Popen(
        command, env=environment(XDG_CACHE_HOME=str(caches)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        ready = server.stdout.readline()  # the first line on stdout
        assert ready.startswith("ready: http://127.0.0.1:") and ready.endswith('/v1 serves "mine"\n')
        with httpx.Client(base_url=ready.split()[1], headers={"Authorization": "Bearer k"}, timeout=60) as http:
            parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": words}]
            content = {"model": "mine", "messages": [{"role": "user", "content": parts}], "max_tokens": 32}
            answer = http.post("chat/completions", json=content)
        assert answer.json()["choices"][0]["message"]["content"] in question.answers
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    assert server.returncode == 0, err
    assert out == ""
    assert f"loading {demo.FOLDER}" in err and "compiling" in err
    assert err.endswith("stopped\n") and "Traceback" not in err
    (cache,) = caches.iterdir()
    assert [path.name for path in cache.iterdir()] == ["jax"]
    assert any((cache / "jax").iterdir())


def test_objects_of_the_start_are_frozen_before_serving(monkeypatch):
    """A garbage collection over all of them would stall every stream for 0.2 s."""
    frozen, interval = [], sys.getswitchinterval()
    served = SimpleNamespace(status=0, run=lambda sockets: frozen.append(gc.get_freeze_count()))
    monkeypatch.setattr(server_module, "Server", lambda *_: served)
    monkeypatch.setattr(server_module.logs, "configure", lambda _: None)
    try:
        server_module.run(SimpleNamespace(close=lambda: None), None)
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)
    assert frozen[0] > 10_000


def test_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir.cache_folder() == tmp_path / "xdg" / "minicpmv46-jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # its specification says to ignore it
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_dir.cache_folder() == tmp_path / ".cache" / "minicpmv46-jax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_dir.cache_folder() == tmp_path / "Library" / "Caches" / "minicpmv46-jax"
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")} == {0o700}


def test_compilation_cache_that_others_may_write_is_not_used(tmp_path, monkeypatch, caplog):
    chosen = {}
    monkeypatch.setattr(startup.jax, "config", SimpleNamespace(jax_compilation_cache_dir=None, update=chosen.__setitem__))
    (tmp_path / "cache" / "jax").mkdir(parents=True)
    (tmp_path / "cache" / "jax").chmod(0o777)
    (tmp_path / "cache").chmod(0o755)
    startup.enable_compilation_cache(DeviceConfig("cpu", 0.9, tmp_path / "cache"))
    assert chosen == {} and "jax's compilation cache is not used" in caplog.text
    (tmp_path / "cache").chmod(0o700)
    startup.enable_compilation_cache(DeviceConfig("cpu", 0.9, tmp_path / "cache"))
    assert chosen["jax_compilation_cache_dir"] == str(tmp_path / "cache" / "jax")


@pytest.mark.parametrize(
    "file, message", [("tokenizer.json", "the tokenizer cannot be read"), ("model.safetensors", "model.safetensors")]
)
def test_damaged_checkpoint_ends_the_start_during_compilation(demo_folder, tmp_path, monkeypatch, file, message):
    folder = shutil.copytree(demo_folder, tmp_path / "model")
    (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    compile_and_store, over, late = ProgramCache._compile_and_store, threading.Event(), []

    def slow(self, key, *rest):
        if key != "empty state" and not over.wait(60):
            late.append(key)
        return compile_and_store(self, key, *rest)

    monkeypatch.setattr(ProgramCache, "_compile_and_store", slow)
    with pytest.raises(ValueError, match=message), ModelLoader(folder, "float32") as loading:
        startup.load_engine(loading, DeviceConfig("cpu", 0.9, tmp_path), EngineConfig(), QueuePolicy())
    assert not late
    over.set()


def test_model_larger_than_device_memory_is_refused(demo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "free_memory", lambda device_config: 2**20)
    message = r"take \d\.\d\d GiB in float32, and .* has 0\.00 GiB free"
    with pytest.raises(ValueError, match=message), ModelLoader(demo_folder, "float32") as loading:
        startup.load_engine(loading, DeviceConfig("gpu", 0.9, tmp_path), EngineConfig(), QueuePolicy())


def test_default_model_name(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert default_model_name(None, "demo") == "demo"
    assert default_model_name(str(tmp_path / "my-model") + "/", "demo") == "my-model"
    assert default_model_name("openbmb/MiniCPM-V-4.6", "demo") == "openbmb/MiniCPM-V-4.6"
