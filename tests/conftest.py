"""Stricter settings than use: strict dtypes, no rank promotion, checked annotations, eight devices."""

import functools
import importlib.util
import os
import random
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "cuda" in os.environ["JAX_PLATFORMS"]:
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"  # what runs once is not worth the tuning
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker has one core, and torch's threads spin while they wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# The API's rooms take stand-ins for the model, so only the rooms of serve that hold arrays are checked.
CHECKED = ["kernels_pallas", "minicpmv46_jax", "serve.engine", "serve.multimodal"]

install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import jax  # noqa: E402 (the hook comes first)
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Workers compile the same programs: each waits for a compilation once.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

HAVE_TORCH = importlib.util.find_spec("torch") is not None
NEEDS_TORCH = re.compile(r"^\s*(import|from) (torch|tests\.oracle)\b", re.MULTILINE)

# Where the oracle is not installed, the files that compare with it are left out, and the header says so.
collect_ignore = [
    path.relative_to(Path(__file__).parent).as_posix()
    for path in Path(__file__).parent.rglob("test_*.py")
    if not HAVE_TORCH and NEEDS_TORCH.search(path.read_text())
]


# The rooms and files of `--fast`: their tests compile no program.
FAST = (
    "test_imports.py",
    "test_style.py",
    "minicpmv46_jax/generation/test_detokenize.py",
    "minicpmv46_jax/processing/test_chat.py",
    "minicpmv46_jax/test_config.py",
    "serve/api/test_chat.py",
    "serve/api/test_errors.py",
    "serve/api/test_messages.py",
    "serve/api/test_output.py",
    "serve/api/test_responses.py",
    "serve/api/test_routes.py",
    "serve/cli/test_bench_suite.py",
    "serve/cli/test_sse_client.py",
    "serve/cli/test_terminal_chat.py",
    "serve/engine/test_encoder_cache.py",
    "serve/engine/test_memory_plan.py",
    "serve/engine/test_scheduler.py",
    "serve/parsers",
    "serve/structured_output/test_grammar.py",
)
ENGINES = {"demo_engine", "tight_engine", "demo_address"}  # fixtures that take minutes, once a process
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only tests that compile no program; one that does fails")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        here = Path(__file__).parent
        fast = [item for item in items if item.path.relative_to(here).as_posix().startswith(FAST)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(fast)])
        items[:] = fast
    # Each worker begins with a half of the list and takes from the end of the other's: one compiles engines.
    items.sort(key=lambda item: not (ENGINES & {*item.fixturenames} or item.path.name == "test_readme.py"))


@pytest.fixture(autouse=True)
def nothing_compiles(request):
    """Fails a test of `--fast` that compiles a program."""
    if not request.config.getoption("--fast"):
        yield
        return
    compiled = []

    def listen(event, duration, **_):
        compiled.extend([event] if event == COMPILED else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, "a test of --fast compiled a program"


def pytest_report_header():
    return f"without torch: not run are {', '.join(sorted(collect_ignore))}" if collect_ignore else None


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The project's own small checkpoint, in the released format."""
    from convert.demo.random_checkpoint import write_demo_checkpoint

    return write_demo_checkpoint(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="session")
def demo(demo_folder):
    """The small checkpoint, loaded."""
    from minicpmv46_jax import MiniCPMV

    return MiniCPMV.from_pretrained(demo_folder, dtype="float32")


@pytest.fixture(scope="session")
def demo_engine(demo):
    """An engine over the small checkpoint."""
    from serve.engine.engine import Engine, QueuePolicy
    from tests.serve.engine.small_engine import SMALL_PLAN, make_runner

    with Engine(demo, make_runner(demo, SMALL_PLAN), QueuePolicy(prefix_host_bytes=64 * 2**20)) as engine:
        yield engine


@pytest.fixture(scope="session")
def tight_engine(demo):
    """Another, in which pages run out."""
    from serve.engine.engine import Engine
    from tests.serve.engine.small_engine import FEW_PAGES, make_runner

    with Engine(demo, make_runner(demo, FEW_PAGES)) as engine:
        yield engine


@pytest.fixture(scope="session")
def demo_address(demo, demo_engine):
    """Where the small model is served over HTTP."""
    from serve.api import Service
    from tests.serve.support import NAME, live

    service = Service(demo, demo_engine, NAME)
    with live(service) as address:
        yield address
    service.media.close()


@pytest.fixture
def model():
    """A model whose answers are known beforehand."""
    from tests.serve.support import FakeModel

    return FakeModel()


@pytest.fixture
def service(model):
    """A service around it; every place has been given back at the end."""
    from tests.serve.support import serving

    with serving(model) as service:
        yield service
    assert service.engine.num_reserved == 0


@pytest.fixture(scope="session")
def full_size_folder(tmp_path_factory, demo_folder):
    """A checkpoint of the released size: MINICPMV46_CHECKPOINT's, or one with random weights (2.6 GB)."""
    if given := os.environ.get("MINICPMV46_CHECKPOINT"):
        return Path(given)
    import torch

    from tests.oracle import write_checkpoint
    from tests.released import released_config

    folder = tmp_path_factory.mktemp("full") / "model"
    return write_checkpoint(folder, released_config(), demo_folder, dtype=torch.bfloat16)


@pytest.fixture
def rng():
    """Random numbers, new in each run; a failure prints the seed, MINICPMV46_SEED sets it."""
    seed = int(os.environ.get("MINICPMV46_SEED") or random.SystemRandom().randrange(2**32))
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def tpu(monkeypatch):
    """Runs the kernels of a function as if there were a TPU; `mode` is when transfers are made."""
    from jax.experimental.pallas import tpu as pltpu

    from kernels_pallas import backends

    monkeypatch.setattr(backends, "device_kind", lambda: "TPU v5 lite")

    def run(f, *args, mode="on_wait"):
        params = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan")
        with pltpu.force_tpu_interpret_mode(params):
            lowered = jax.jit(functools.partial(f, backend="tpu")).lower(*args)
            return jax.block_until_ready(lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*args))

    yield run
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture(scope="session")
def photos():
    """Two real photographs, 640 x 427, that scikit-learn ships: (china, flower) as PIL images."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]
