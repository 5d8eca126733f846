"""A run from its settings to its last checkpoint: the parts of `python -m minicpmv46_jax.train`."""

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
from minicpmv46_jax.train.data import Batches, BatchIterator, RowProcessor, batches
from minicpmv46_jax.train.log import MetricsLog
from minicpmv46_jax.train.loss_mask import AnswerMarkers
from minicpmv46_jax.train.optimizer import make_optimizer, make_schedule
from minicpmv46_jax.train.settings import Settings
from minicpmv46_jax.train.step import Metrics, TrainState, cast_for_compute, join, make_step, new_state, place, split

SETTINGS = "settings.json"  # in the run's folder; `trained_params` reads it
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to start; see `prepare`."""

    settings: Settings
    state: TrainState
    step: Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
    data: Batches
    mesh: Mesh | None
    schedule: Callable[[Any], Any]


def prepare(settings: Settings, compiler_options: dict[str, Any] | None = None) -> Run:
    """Loads the model and builds the first state, the step and the data pipeline.

    Args:
      settings: the run's settings.
      compiler_options: XLA's options for the step.

    Raises:
      ValueError: a setting, the model or the data cannot be used; the message names it.
    """
    folder = checkpoint.resolve(settings.model.source, settings.model.revision)
    config = ModelConfig.from_folder(folder)
    optimizer = make_optimizer(settings.optimizer, settings.run.steps)
    devices = settings.mesh.data * settings.mesh.fsdp
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp) if devices > 1 else None
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
    """Splits parameters into (trained, frozen) by the run's adapters, or else by its optimiser's parts.

    Frozen parameters are cast to the computing dtype.

    Raises:
      ValueError: no parameter is trained.
    """
    if settings.lora is not None:
        adapters = settings.lora
        trained, frozen = lora.init_adapters(params, adapters.rank, adapters.targets, adapters.seed), params
    else:
        trained, frozen = split(params, settings.optimizer.trains)
    if not jax.tree.leaves(trained):
        raise ValueError("no parameter is trained: optimizer.text, vision and merger are all 0")
    return trained, cast_for_compute(frozen, settings.run.dtype)


def _data(settings: Settings, processor: Processor, config: ModelConfig, devices: int) -> Batches:
    data = settings.data
    root = None if data.media is None else Path(data.media)
    row_processor = RowProcessor(
        processor, AnswerMarkers.from_processor(processor), settings.batch, root, data.last_only, data.options
    )
    return batches(
        data.files,
        row_processor,
        config.vision,
        accumulation=settings.run.accumulation,
        devices=devices,
        epochs=data.epochs or None,
        seed=None if data.seed < 0 else data.seed,
        errors=data.errors,
        shard=(jax.process_index(), jax.process_count()),
        workers=data.workers,
        threads=data.threads,
    )


def train(
    settings: Settings, stop: Callable[[int], bool] = lambda step: False, compiler_options: dict[str, Any] | None = None
) -> TrainState:
    """Trains a run and returns its last state.

    The run ends at the last step, at the end of the data, or at a step for which `stop(step)` is true.

    Resumes from the newest checkpoint in the run's folder. Writes settings.json, metrics.jsonl, TensorBoard
    events, checkpoints and at the end curves.png into that folder. All hosts must see the folder. The first
    host writes everything that is not a checkpoint.

    Raises:
      ValueError: the settings, the data (the message names file and line) or an earlier checkpoint cannot be
        used.
      FloatingPointError: the loss is not finite.
    """
    run, folder = prepare(settings, compiler_options), Path(settings.run.folder)
    first_host = jax.process_index() == 0
    if first_host:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")
    checkpoints, data, state = Checkpoints(folder / CHECKPOINTS, settings.run.keep), iter(run.data), run.state
    if (restored := checkpoints.restore(state)) is not None:
        state, position = restored
        data.set_state(position)
    first = int(state.step)
    log = MetricsLog(folder, settings.run.steps, first) if first_host else None
    try:
        state, position, last_saved = _loop(run, state, data, checkpoints, log, stop)
        if int(state.step) > max(last_saved, first):
            checkpoints.save(state, position)
    finally:
        checkpoints.close()
        if log:
            log.close()
    if data.bad_rows:
        print(f"skipped {len(data.bad_rows)} rows that could not be trained on")
    return state


def _loop(
    run: Run,
    state: TrainState,
    data: BatchIterator,
    checkpoints: Checkpoints,
    log: MetricsLog | None,
    stop: Callable[[int], bool],
) -> tuple[TrainState, dict[str, Any], int]:
    """Runs the steps; returns (state, state of the data iterator, last step saved or -1).

    All hosts run a step or none does. The first host whose data ends, or that must stop, ends the run on all.
    """
    settings, step, last_saved, position = run.settings.run, int(state.step), -1, data.get_state()
    clock, tokens = time.monotonic(), 0
    with _stop_on_signals() as stop_requested:
        while step < settings.steps:
            batch = None if stop_requested() or stop(step) else next(data, None)
            if not sharding.all_true(batch is not None):
                break
            assert batch is not None
            tokens += int(np.count_nonzero(batch.segments)) * jax.process_count()
            state, metrics = run.step(state, batch if run.mesh is None else sharding.place_batch(batch, run.mesh))
            step, position = step + 1, data.get_state()
            if step % settings.log_every == 0 or step == settings.steps:
                values = _metric_values(metrics, run.schedule(step - 1), tokens / (time.monotonic() - clock))
                if log:
                    log.write(step, values)
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(f"the loss of step {step} is {values['loss']}")
                clock, tokens = time.monotonic(), 0
            if step % settings.save_every == 0:
                checkpoints.save(state, position)
                last_saved = step
    return state, position, last_saved


def _metric_values(metrics: Metrics, rate: Any, speed: float) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
    return {**values, "rate": float(rate), "tokens_per_second": speed}


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM or Ctrl-C came.

    The run then ends after the current step and saves its state.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # only the main thread may set signal handlers
        return
    earlier = {number: signal.signal(number, lambda *_: requested.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested.is_set
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def is_run(folder: str | Path) -> bool:
    """Returns whether `folder` is a run's folder."""
    return (Path(folder) / SETTINGS).is_file()


def trained_params(folder: str | Path) -> tuple[Params, Path]:
    """Returns a run's trained model.

    Returns:
      (parameters, the folder that the run started from). Adapters are merged; each parameter has its original
      dtype.

    Raises:
      ValueError: the run has no checkpoint yet.
    """
    settings = Settings.from_dict(json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8")))
    source = checkpoint.resolve(settings.model.source, settings.model.revision)
    params = checkpoint.load_params(source, ModelConfig.from_folder(source))
    trained, _ = split_trainable(params, settings)
    state = new_state(trained, None, make_optimizer(settings.optimizer, settings.run.steps))
    checkpoints = Checkpoints(Path(folder) / CHECKPOINTS)
    restored = checkpoints.restore(state)
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    frozen = params if settings.lora else split(params, settings.optimizer.trains)[1]
    merged = join(restored[0].trained, frozen, settings.lora.scale if settings.lora else 1.0)
    return jax.tree.map(lambda x, original: jnp.asarray(x, original.dtype), merged, params), source
