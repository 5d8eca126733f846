"""A run from its settings to its last checkpoint: what `python -m minicpmv46_jax.train` does, in parts."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minicpmv46_jax import checkpoint, sharding
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model import Params
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.train import lora
from minicpmv46_jax.train.batch import TrainBatch
from minicpmv46_jax.train.checkpoints import Checkpoints
from minicpmv46_jax.train.data import Batches, RowProcessor, batches
from minicpmv46_jax.train.log import Log
from minicpmv46_jax.train.loss_mask import AnswerMarkers
from minicpmv46_jax.train.optimizer import make_optimizer, make_schedule
from minicpmv46_jax.train.settings import Settings
from minicpmv46_jax.train.step import Metrics, TrainState, cast_for_compute, join, make_step, new_state, place, split

SETTINGS = "settings.json"  # in the run's folder: what `trained_params` needs to know
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything of a run, made ready by `prepare`."""

    settings: Settings
    state: TrainState
    step: Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
    data: Batches
    mesh: Mesh | None
    schedule: Callable[[Any], Any]


def prepare(settings: Settings, compiler_options: dict[str, Any] | None = None) -> Run:
    """Loads the model, and makes the first state, the step (with XLA's own options) and the data.

    Raises ValueError naming what is wrong.
    """
    folder = checkpoint.resolve(settings.model.source, settings.model.revision)
    config = ModelConfig.from_folder(folder)
    optimizer = make_optimizer(settings.optimizer, settings.run.steps)
    own, devices = settings.mesh, settings.mesh.data * settings.mesh.fsdp
    mesh = sharding.make_mesh(own.data, own.fsdp) if devices > 1 else None
    state = new_state(*split_trainable(checkpoint.load_params(folder, config, progress=True), settings), optimizer)
    step = make_step(
        config,
        optimizer,
        dtype=settings.run.dtype,
        z_loss=settings.run.z_loss,
        remat=settings.run.remat,
        scan_layers=settings.run.scan_layers,
        backend=settings.run.backend or None,
        scale=settings.lora.scale if settings.lora else 1.0,
        mesh=mesh,
    )
    return Run(
        settings,
        state if mesh is None else place(state, mesh),
        jax.jit(step, donate_argnums=0, compiler_options=compiler_options),
        _data(settings, Processor.from_folder(folder), config, devices // jax.process_count()),
        mesh,
        make_schedule(settings.optimizer, settings.run.steps),
    )


def split_trainable(params: Params, settings: Settings) -> tuple[Any, Any]:
    """(trained, frozen) of a run, by its optimiser's parts or its adapters; frozen parameters in the dtype to compute in."""
    if settings.lora is not None:
        own = settings.lora
        trained, frozen = lora.init_adapters(params, own.rank, own.targets, own.seed), params
    else:
        trained, frozen = split(params, settings.optimizer.trains)
    if not jax.tree.leaves(trained):
        raise ValueError("nothing is trained: optimizer.text, vision and merger are all 0")
    return trained, cast_for_compute(frozen, settings.run.dtype)


def _data(settings: Settings, processor: Processor, config: ModelConfig, devices: int) -> Batches:
    own = settings.data
    root = None if own.media is None else Path(own.media)
    reader = RowProcessor(processor, AnswerMarkers.from_processor(processor), settings.batch, root, own.last_only, own.options)
    return batches(
        own.files,
        reader,
        config.vision,
        accumulation=settings.run.accumulation,
        devices=devices,
        epochs=own.epochs or None,
        seed=None if own.seed < 0 else own.seed,
        errors=own.errors,
        shard=(jax.process_index(), jax.process_count()),
        workers=own.workers,
        threads=own.threads,
    )


def train(
    settings: Settings, stop: Callable[[int], bool] = lambda step: False, compiler_options: dict[str, Any] | None = None
) -> TrainState:
    """Runs to the last step, the end of the data, or `stop(step)`; goes on from the newest checkpoint in the run's folder.

    Writes settings.json, metrics.jsonl, TensorBoard's events, checkpoints, and at the end curves.png into the run's folder, which
    all hosts must see, where there are several; the first of them writes what is not a checkpoint.

    Raises:
      ValueError: naming what is wrong with the settings, the data (file and line) or an earlier checkpoint.
      FloatingPointError: the loss is no finite number any more.
    """
    run, folder = prepare(settings, compiler_options), Path(settings.run.folder)
    first_host = jax.process_index() == 0
    if first_host:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")
    saved, data, state = Checkpoints(folder / CHECKPOINTS, settings.run.keep), iter(run.data), run.state
    if (found := saved.restore(state)) is not None:
        state, position = found
        data.set_state(position)
    first = int(state.step)
    log = Log(folder, settings.run.steps, first) if first_host else None
    try:
        state, position, written = _loop(run, state, data, saved, log, stop)
        if int(state.step) > max(written, first):
            saved.save(state, position)
    finally:
        saved.close()
        if log:
            log.close()
    if data.bad_rows:
        print(f"skipped {len(data.bad_rows)} rows that could not be learned from")
    return state


def _loop(
    run: Run, state: TrainState, data: Iterator[TrainBatch], saved: Checkpoints, log: Log | None, stop: Callable[[int], bool]
) -> tuple[TrainState, dict[str, Any], int]:
    """The steps; returns the state, where the data stands, and the last step that was saved.

    All hosts take a step or none: the one whose data ends first, or that was asked to end, ends the run for all.
    """
    own, at, written, position = run.settings.run, int(state.step), -1, data.get_state()
    clock, tokens = time.monotonic(), 0
    with _until_asked() as asked:
        while at < own.steps:
            batch = None if asked() or stop(at) else next(data, None)
            if not sharding.all_true(batch is not None):
                break
            tokens += int(np.count_nonzero(batch.segments)) * jax.process_count()
            state, metrics = run.step(state, batch if run.mesh is None else sharding.place_batch(batch, run.mesh))
            at, position = at + 1, data.get_state()
            if at % own.log_every == 0 or at == own.steps:
                values = _numbers(metrics, run.schedule(at - 1), tokens / (time.monotonic() - clock))
                if log:
                    log.write(at, values)
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(f"the loss of step {at} is {values['loss']}")
                clock, tokens = time.monotonic(), 0
            if at % own.save_every == 0:
                saved.save(state, position)
                written = at
    return state, position, written


def _numbers(metrics: Metrics, rate: Any, speed: float) -> dict[str, float]:
    found = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
    return {**found, "rate": float(rate), "tokens_per_second": speed}


@contextlib.contextmanager
def _until_asked() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came: the run then ends after the step under way, and is saved."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may set handlers
        return
    earlier = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def is_run(folder: str | Path) -> bool:
    """Whether `folder` is that of a run."""
    return (Path(folder) / SETTINGS).is_file()


def trained_params(folder: str | Path) -> tuple[Params, Path]:
    """What a run has made of its model: parameters, adapters merged, each in its first dtype; and the folder it began from.

    Raises ValueError where the run has no checkpoint yet.
    """
    settings = Settings.from_dict(json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8")))
    source = checkpoint.resolve(settings.model.source, settings.model.revision)
    params = checkpoint.load_params(source, ModelConfig.from_folder(source))
    trained, _ = split_trainable(params, settings)
    state = new_state(trained, None, make_optimizer(settings.optimizer, settings.run.steps))
    saved = Checkpoints(Path(folder) / CHECKPOINTS)
    found = saved.restore(state)
    saved.close()
    if found is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    frozen = params if settings.lora else split(params, settings.optimizer.trains)[1]
    merged = join(found[0].trained, frozen, settings.lora.scale if settings.lora else 1.0)
    return jax.tree.map(lambda x, first: jnp.asarray(x, first.dtype), merged, params), source
