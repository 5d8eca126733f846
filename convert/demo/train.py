"""The demo model's recipe: draws scenes, trains, evaluates on held-out scenes and exports.

A run takes 8 minutes on one GPU and 16 cores. The demo model took three:

    python -m convert.train_demo --out first --minutes 8
    python -m convert.train_demo --out trained --minutes 8.6 --start first/model --peak-rate 0.02 --seed 1
    python -m convert.train_demo --out finished --minutes 7 --start trained/model --peak-rate 0.012 \\
        --seed 2 --share-16x 2

`finished/model` is the folder to serve. It is rewritten every two minutes, so an interrupted run leaves a
model too. `scores.json` has the share of held-out questions with an exact answer, by group. `log.jsonl` has
the run's metrics.
"""

import argparse
import collections
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.demo import drawing, vocabulary
from convert.demo.drawing import BatchLoader, DataConfig
from convert.demo.model_shape import IMAGE_MEAN, model_files
from convert.demo.muon import muon
from convert.demo.random_checkpoint import vector_mean, write_files
from convert.export import export_hf
from minicpmv46_jax import checkpoint, model, scenes
from minicpmv46_jax.checkpoint import names
from minicpmv46_jax.config import ModelConfig, VisionConfig
from minicpmv46_jax.model import Params, Schema
from minicpmv46_jax.model.batch import PackedBatch
from minicpmv46_jax.processing.images import patchify, resize_pillow
from minicpmv46_jax.train import BatchShape, TrainBatch, TrainState, cast_for_compute, forward, make_step, new_state, split

MAX_VIEW_PATCHES = 320  # a view of 224 x 224 has 256; other aspect ratios have a few more
SHAPES = {  # a batch of either mode holds 120 to 180 conversations
    "4x": BatchShape(rows=48, tokens=640, patches=57344, views=240, longest=MAX_VIEW_PATCHES, downsample_mode="4x"),
    "16x": BatchShape(rows=48, tokens=512, patches=65536, views=272, longest=MAX_VIEW_PATCHES),
}
SHARE_16X = 8  # one worker of this many draws for "16x"
PEAK_RATE, WARMUP, WEIGHT_DECAY = 0.03, 300, 0.01  # the rate and decay of matrices; steps of warm-up
ADAM_RATE = 0.1  # learning rate of parameters that are not matrices, relative to the matrices' rate
PATCH_EMBED_RATE = 0.05  # learning rate of the patch embedding, relative to ADAM_RATE's
RAMP_SCENES, EASY_SHARE = 150_000, 0.1  # scenes over which the mix replaces the easy scenes; their share afterwards
WHITENING_SCENES, WHITENING_SIDE = 300, 224  # scenes, and pixels per side, whose patches are whitened
MIN_PATCH_RANGE = 100  # patches with a smaller range of bytes are background
NOISE_VARIANCE = 0.03  # added to variances, so that directions with less count as noise
REPLAY_BYTES = 8 * 2**30  # device memory for batches to replay
EVAL_SCENES = 1000  # held-out scenes, one question each
EVAL_EVERY, SAVE_EVERY, LOG_EVERY = 90.0, 120.0, 10.0  # seconds
RESERVED_SECONDS = 25.0  # for the last evaluation and the export


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
      seconds: duration of the whole program.
      workers: number of drawing processes.
      mix: weight of each kind of scene.
      shapes: batch shape of each downsample mode; evaluation uses the first.
      peak_rate: peak learning rate of matrices; see `muon`.
      start: model folder to continue from, without the ramp of easy scenes; None for random weights.
      share_16x: one worker of this many draws for the second mode.
      steps: most steps; None for no limit but time.
      eval_scenes: number of held-out scenes.
      seed: seed of weights and scenes.
      dtype: dtype of the computation; parameters are float32.
    """

    seconds: float
    workers: int
    mix: Mapping[str, float]
    shapes: Mapping[str, BatchShape]
    peak_rate: float = PEAK_RATE
    start: Path | None = None
    share_16x: int = SHARE_16X
    steps: int | None = None
    eval_scenes: int = EVAL_SCENES
    seed: int = 0
    dtype: Any = jnp.bfloat16


def initial_params(config: ModelConfig, mean: Sequence[float], seed: int) -> Params:
    """Returns random initial parameters in float32, drawn by numpy.

    - Matrices preserve the scale of their inputs. Those that write to a residual stream are scaled down by
      its depth.
    - The position table starts as sine waves over rows and columns, so neighbours start alike.
      (arXiv:2010.11929 shows that trained tables look like this.)
    - The patch embedding starts by whitening the scenes' patches, so a stroke counts as much as a background
      colour.

    Args:
      config: the model's configuration.
      mean: `image_mean`, each channel's mean, which is subtracted from pixels of 0 to 1.
      seed: seed of the random generator.
    """
    random = np.random.default_rng(seed)
    embedding = whitening_embedding(config.vision, mean)
    depth = {"text": config.text.num_hidden_layers, "vision": config.vision.num_hidden_layers}

    def draw(keys: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = names.tree_path(keys)
        if path[-1] == "A_log":
            return np.log(random.uniform(1.0, 16.0, leaf.shape)).astype(np.float32)
        if path[-1] == "dt_bias":
            # Steps of 0.001 to 0.1 (arXiv:2312.00752): the state decays over tens to hundreds of tokens, not
            # within one.
            return np.log(np.expm1(10 ** random.uniform(-3, -1, leaf.shape))).astype(np.float32)
        if path[-2] == "position_embed":
            return sincos_positions(config.vision)
        if path[1] == "patch_embed":
            return embedding[path[-1]]
        if len(leaf.shape) == 1:
            return np.full(leaf.shape, vector_mean(path), np.float32)
        spread = 0.05 if path[-2] == "embed" else leaf.shape[-1] ** -0.5
        if path[-2] in ("o_proj", "out_proj", "down_proj", "fc2"):
            spread *= (2 * depth[path[0]]) ** -0.5
        return (spread * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.parameter_shapes(config))


def sincos_positions(vision: VisionConfig) -> np.ndarray:
    """Returns a sine and cosine position table, float32 [positions, D].

    Half of the width encodes rows, half columns.
    """
    side, quarter = vision.positions_per_side, vision.hidden_size // 4
    angle = np.arange(side)[:, None] * np.exp(np.linspace(math.log(math.pi / 2), math.log(math.pi / side), quarter))[None]
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [side, D/2]
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    return 0.5 * np.concatenate([rows, columns], axis=1).astype(np.float32)


def whitening_embedding(vision: VisionConfig, mean: Sequence[float]) -> dict[str, np.ndarray]:
    """Returns a patch embedding (weight and bias) that whitens the scenes' patches in their main directions.

    Background patches do not count.
    """
    patches = []
    for seed in range(WHITENING_SCENES):
        for medium in scenes.draw(seed, mix={"shapes": 0.3, "lines": 0.7}).media:
            pixels = patchify(resize_pillow(medium.render(), WHITENING_SIDE, WHITENING_SIDE), vision.patch_size).pixels
            patches.append(pixels[np.ptp(pixels, axis=1) > MIN_PATCH_RANGE])
    values = np.concatenate(patches).reshape(-1, vision.num_channels, vision.patch_size**2) / 255
    values = ((values - np.array(mean)[None, :, None]) / 0.5).reshape(len(values), -1)
    mean_patch = values.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(values.T))
    main = directions[:, ::-1][:, : vision.hidden_size] / np.sqrt(variances[::-1][: vision.hidden_size] + NOISE_VARIANCE)
    return {"weight": main.T.astype(np.float32), "bias": -(mean_patch @ main).astype(np.float32)}


def make_optimizer() -> optax.GradientTransformation:
    """Returns Muon for matrices and Adam for other parameters.

    The learning rate is a hyperparameter that `set_learning_rate` sets each step, because the run's length is
    in seconds. Muon is used because it learned far faster than AdamW: on single shapes of 56 x 56 pixels, 84
    % exact colours after 1,000 steps, against 26 % with AdamW at 1e-3.
    """

    def chain(learning_rate: jax.Array) -> optax.GradientTransformation:
        adam = optax.adam(ADAM_RATE * learning_rate, b1=0.9, b2=0.98)
        rest = optax.chain(adam, optax.stateless(slow_patch_embed))
        return optax.chain(optax.clip_by_global_norm(1.0), muon(learning_rate, WEIGHT_DECAY, rest))

    return optax.inject_hyperparams(chain)(learning_rate=0.0)


def slow_patch_embed(updates: Params, params: Params | None) -> Params:
    """Scales down the patch embedding's updates, because a patch's pixels, and so its weights, move alike."""
    del params

    def slowed(keys: Any, update: jax.Array) -> jax.Array:
        return update * (PATCH_EMBED_RATE if names.tree_path(keys)[1] == "patch_embed" else 1.0)

    return jax.tree_util.tree_map_with_path(slowed, updates)


def learning_rate_at(step: int, progress: float, peak: float) -> float:
    """Returns the learning rate of a step: a linear warm-up times a cosine decay.

    Args:
      step: number of the step, which decides the warm-up.
      progress: share of the run that is over, from 0 to 1; the cosine falls from 1 to 0.02.
      peak: the peak learning rate.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min((step + 1) / WARMUP, 1.0) * (0.02 + 0.98 * cosine)


def set_learning_rate(state: TrainState, value: float) -> TrainState:
    """Returns the state with the learning rate of its next step set."""
    hyperparams = {"learning_rate": jnp.asarray(value, jnp.float32)}
    return dataclasses.replace(state, optimizer=state.optimizer._replace(hyperparams=hyperparams))


def correct_tokens(graph: Schema, trained: Params, batch: TrainBatch, dtype: Any) -> jax.Array:
    """Returns whether the likeliest next token is the label, bool [R, L].

    If it is for all tokens of an answer, greedy decoding gives that answer.
    """
    params, own = cast_for_compute(trained, dtype), jax.tree.map(lambda x: x[0, 0], batch)
    identity = lambda part, path: part  # noqa: E731
    features = forward.encode(graph.vision, params["vision"], own.views, remat="layer", gather=identity)
    x = model.embed(params["text"]["embed"], own.ids.reshape(-1), own.feature_rows.reshape(-1), features)
    hidden = forward.hidden_states(graph.text, params["text"], x, PackedBatch(own.segments), remat="layer", gather=identity)
    logits = jnp.einsum("td,vd->tv", hidden, params["text"]["embed"]["weight"], preferred_element_type=jnp.float32)
    return logits.argmax(-1).reshape(own.labels.shape) == own.labels


EvalSet = list[tuple[TrainBatch, list[list[str]]]]
"""Batches, each with the group of every conversation in every row."""


def draw_eval_set(data_config: DataConfig) -> EvalSet:
    """Returns held-out questions in batches. Runs in its own process."""
    config = ModelConfig.from_folder(data_config.folder)
    groups = {}
    conversations = []
    for group, conversation in drawing.eval_conversations(data_config):
        groups[id(conversation)] = group
        conversations.append(conversation)
    filled = list(drawing.fill(conversations, data_config.shape))
    return [
        (drawing.stack([drawing.pack(rows, data_config.shape, config.vision)]), [[groups[id(c)] for c in row] for row in rows])
        for rows in filled
    ]


def accuracy_by_group(
    mark_correct: Callable[[Params, TrainBatch], jax.Array], params: Params, eval_set: EvalSet
) -> dict[str, float]:
    """Returns the share of each group's answers whose tokens are all correct.

    Args:
      mark_correct: (params, batch) -> whether each token is predicted correctly, bool [R, L].
      params: the model's parameters.
      eval_set: the questions.
    """
    right, totals = collections.Counter(), collections.Counter()
    for batch, groups in eval_set:
        correct = np.asarray(mark_correct(params, batch)) | (batch.weights[0, 0] == 0)
        for r, row in enumerate(groups):
            for number, group in enumerate(row, start=1):
                totals[group] += 1
                right[group] += bool(correct[r][batch.segments[0, 0, r] == number].all())
    return {group: right[group] / totals[group] for group in sorted(totals)}


def mode_index(worker: int, share_16x: int) -> int:
    """Returns the index of a worker's downsample mode: 1 for the second of every `share_16x` workers, else 0.

    It is the second one, so that two workers are enough for both modes.
    """
    return int(worker % share_16x == 1)


class Trainer:
    """One training run. `train` returns the scores and leaves the parameters in the `model` folder."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out, self.start_time = settings, out, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self.files = out / "files"
        self.files.mkdir(exist_ok=True)
        if settings.start is None:
            write_files(self.files, model_files(vocabulary.merges(vocabulary.scene_words())))
        else:
            for file in settings.start.iterdir():
                if file.suffix != ".safetensors":
                    shutil.copy(file, self.files)
        self.config = ModelConfig.from_folder(self.files)
        self.graph = model.schema(self.config, "reference")
        self.optimizer = make_optimizer()
        self.log = (out / "log.jsonl").open("a", encoding="utf-8")
        self.eval_set: EvalSet = []

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start_time

    def log_event(self, **values: Any) -> None:
        """Writes an event to the log file and the console."""
        values = {"seconds": round(self.elapsed, 1), **values}
        print(json.dumps(values), flush=True)
        self.log.write(json.dumps(values) + "\n")
        self.log.flush()

    def data_configs(self) -> list[DataConfig]:
        """Returns each worker's data config; no two draw the same seeds."""
        n, ramp = self.settings.workers, RAMP_SCENES if self.settings.start is None else 0
        common = {"mix": dict(self.settings.mix), "step": n, "ramp": ramp, "easy": EASY_SHARE}
        first, shapes = self.settings.seed * drawing.SEEDS_PER_RUN, list(self.settings.shapes.values())
        return [
            DataConfig(self.files, shapes[mode_index(i, self.settings.share_16x) % len(shapes)], first=first + i, **common)
            for i in range(n)
        ]

    def start_state(self) -> TrainState:
        """Returns the initial state: random weights, or those of `settings.start`."""
        if self.settings.start is None:
            params = initial_params(self.config, IMAGE_MEAN, self.settings.seed)
        else:
            params = checkpoint.load_params(self.settings.start, self.config, jnp.float32)
        return jax.device_put(new_state(*split(params, lambda path: True), self.optimizer))

    def programs(self, state: TrainState, pool: ThreadPoolExecutor) -> dict[str, Future]:
        """Starts compiling the step of each mode and the evaluation ("mark"); returns their futures."""
        step = jax.jit(
            make_step(
                self.config,
                self.optimizer,
                dtype=self.settings.dtype,
                z_loss=1e-4,
                remat="none",
                scan_layers=False,  # a scan would copy its layers' activations and double a step's memory traffic
                backend="reference",
            ),
            donate_argnums=0,
        )
        mark_correct = jax.jit(lambda params, batch: correct_tokens(self.graph, params, batch, self.settings.dtype))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        empty_batches = {
            mode: drawing.stack([drawing.pack([], shape, self.config.vision)]) for mode, shape in self.settings.shapes.items()
        }
        compiled = {}
        for mode, batch in empty_batches.items():  # lowered in sequence, because lowering holds the interpreter lock
            compiled[mode] = pool.submit(step.lower(abstract, batch).compile)
        return compiled | {"mark": pool.submit(mark_correct.lower(abstract.trained, next(iter(empty_batches.values()))).compile)}

    def train(self) -> dict[str, float]:
        """Trains until time or steps are over, then evaluates and exports. Returns the scores by group."""
        settings = self.settings
        first = next(iter(settings.shapes.values()))
        eval_config = DataConfig(self.files, first, dict(settings.mix), held_out=True, count=settings.eval_scenes)
        batch_bytes = sum(x.nbytes for x in jax.tree.leaves(drawing.pack([], first, self.config.vision)))
        spawn = multiprocessing.get_context("spawn")
        with (
            ThreadPoolExecutor(3) as pool,
            ProcessPoolExecutor(1, mp_context=spawn) as eval_process,
            BatchLoader(self.data_configs(), self.config, max(REPLAY_BYTES // batch_bytes, 1)) as batches,
        ):
            eval_set = eval_process.submit(draw_eval_set, eval_config)
            state = self.start_state()
            programs = self.programs(state, pool)
            next(iter(programs.values())).result()
            self.log_event(event="compiled", parameters=sum(x.size for x in jax.tree.leaves(state.trained)))
            state = self.train_steps(state, programs, batches, eval_set)
            self.eval_set = eval_set.result()
            scores = accuracy_by_group(programs["mark"].result(), state.trained, self.eval_set)
            self.log_event(event="held out", **scores)
            self.save(state.trained, scores)
        return scores

    def train_steps(self, state: TrainState, programs: dict[str, Future], batches: BatchLoader, eval_set: Future) -> TrainState:
        """Runs the training steps and returns the final state; logs, evaluates and saves at intervals."""
        start, limit = self.elapsed, self.settings.seconds - RESERVED_SECONDS
        last_log = last_save = last_eval = start
        pending: collections.deque = collections.deque()
        step = sum_steps = 0
        while self.elapsed < limit and (self.settings.steps is None or step < self.settings.steps):
            batch = batches.next_batch()
            assert batch.views is not None  # every conversation of the recipe has a picture
            program = programs[batch.views.downsample_mode]
            if not program.done():
                time.sleep(0.05)  # only at the start, while the second mode's step is compiling
                continue
            time_progress = (self.elapsed - start) / (limit - start)
            progress = time_progress if self.settings.steps is None else max(time_progress, step / self.settings.steps)
            state, metrics = program.result()(
                set_learning_rate(state, learning_rate_at(step, progress, self.settings.peak_rate)), batch
            )
            step += 1
            pending.append(metrics)
            if len(pending) > 4:
                last = jax.device_get(pending.popleft())
                if self.elapsed - last_log > LOG_EVERY:
                    speed = (step - sum_steps) / (self.elapsed - last_log)
                    last_log, sum_steps = self.elapsed, step
                    self.log_event(
                        step=step,
                        loss=round(float(last.loss), 4),
                        grad=round(float(last.grad_norm), 3),
                        steps_per_second=round(speed, 2),
                        fresh=batches.fresh,
                        repeated=batches.repeated,
                    )
            if self.elapsed - last_eval > EVAL_EVERY and eval_set.done() and programs["mark"].done():
                self.log_event(
                    event="held out", step=step, **accuracy_by_group(programs["mark"].result(), state.trained, eval_set.result())
                )
                last_eval = self.elapsed
            if self.elapsed - last_save > SAVE_EVERY:
                self.save(state.trained, {})
                last_save = self.elapsed
        jax.block_until_ready(state)
        self.log_event(event="trained", steps=step, fresh=batches.fresh, repeated=batches.repeated)
        return state

    def save(self, trained: Params, scores: Mapping[str, float]) -> None:
        """Writes the model folder in bfloat16, replacing an earlier one, and scores.json."""
        params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), trained)
        with tempfile.TemporaryDirectory(dir=self.out) as beside:
            written = export_hf(params, self.files, Path(beside) / "model")
            shutil.rmtree(self.out / "model", ignore_errors=True)
            os.rename(written, self.out / "model")
        (self.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert.train_demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the scores and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="duration of the whole run (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="drawing processes (default: %(default)s)"
    )
    parser.add_argument("--start", type=Path, help="model folder to continue from")
    parser.add_argument(
        "--peak-rate", type=float, default=PEAK_RATE, help="peak learning rate of matrices (default: %(default)s)"
    )
    parser.add_argument(
        "--share-16x", type=int, default=SHARE_16X, help="one drawing process of this many draws for 16x (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.share_16x < 2:
        parser.error(f"--share-16x is {args.share_16x}, expected at least 2: one process of this many")
    settings = Settings(
        60 * args.minutes, args.workers, scenes.MIX, SHAPES, args.peak_rate, args.start, args.share_16x, seed=args.seed
    )
    Trainer(settings, args.out).train()
    return 0
