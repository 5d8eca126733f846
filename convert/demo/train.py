"""The demo model's recipe: draws scenes, trains, examines on held-out scenes, exports. One GPU and 16 cores, 8 minutes a run.

    python -m convert.train_demo --out first --minutes 8
    python -m convert.train_demo --out trained --minutes 8.6 --start first/model --peak-rate 0.02 --seed 1
    python -m convert.train_demo --out finished --minutes 7 --start trained/model --peak-rate 0.012 --seed 2 --share-16x 2

`finished/model` is the folder to serve, written again every two minutes, so that a run that is cut short leaves a model too;
`scores.json` says how many held-out questions it answered exactly, by group; `log.jsonl` how it went.
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

MAX_VIEW_PATCHES = 320  # patches of a view; 224 x 224 has 256, other aspects a few more
SHAPES = {  # a batch of each mode holds 120 to 180 conversations
    "4x": BatchShape(rows=48, tokens=640, patches=57344, views=240, longest=MAX_VIEW_PATCHES, downsample_mode="4x"),
    "16x": BatchShape(rows=48, tokens=512, patches=65536, views=272, longest=MAX_VIEW_PATCHES),
}
SHARE_16X = 8  # one worker in so many draws for "16x"
PEAK_RATE, WARMUP, WEIGHT_DECAY = 0.03, 300, 0.01  # of matrices; steps
ADAM_RATE, PATCH_EMBED_RATE = (
    0.1,
    0.05,
)  # of what is no matrix, against the matrices' rate; of the patches' embedding, against that
RAMP_SCENES, EASY_SHARE = 150_000, 0.1  # scenes over which the easy ones give way; what is left of them
WHITENING_SCENES, WHITENING_SIDE, MIN_PATCH_RANGE, NOISE_VARIANCE = (
    300,
    224,
    100,
    0.03,
)  # scenes, pixels a side, least range of bytes, variance that counts as none
REPLAY_BYTES = 8 * 2**30  # of batches on the device, to be gone over again
EVAL_SCENES = 1000  # held-out scenes, one question each
EVAL_EVERY, SAVE_EVERY, LOG_EVERY = 90.0, 120.0, 10.0  # seconds
RESERVED_SECONDS = 25.0  # seconds for the last exam and the export


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
      seconds: from the start of the program to its end.
      workers: processes that draw.
      mix: kinds of scenes.
      shapes: of the batches of each mode; exams are in the first.
      peak_rate: of matrices; see `muon`.
      start: a folder to begin from, past the easy scenes; None for random weights.
      share_16x: one worker in so many draws for the second mode.
      steps: no more than so many; None for as many as there is time for.
    """

    seconds: float
    workers: int
    mix: Mapping[str, float]
    shapes: Mapping[str, BatchShape]
    peak_rate: float = PEAK_RATE
    start: Path | None = None
    share_16x: int = SHARE_16X
    steps: int | None = None
    exam: int = EVAL_SCENES
    seed: int = 0
    dtype: Any = jnp.bfloat16


def initial_params(config: ModelConfig, mean: Sequence[float], seed: int) -> Params:
    """Fresh float32 parameters, drawn by numpy.

    Matrices keep the size of what they multiply; those that write to a residual stream are shrunk by its depth; the table of
    positions starts as waves over rows and columns (arXiv:2010.11929 learns such ones), so that neighbours are alike at once; the
    embedding of patches starts by whitening those of the scenes, so that a stroke counts as much as a ground's colour.

    Args:
      config: the model's.
      mean: each channel's, which is taken from pixels of 0 to 1 (`image_mean`).
      seed: of the dice.
    """
    random = np.random.default_rng(seed)
    embedding = whitening_embedding(config.vision, mean)
    depth = {"text": config.text.num_hidden_layers, "vision": config.vision.num_hidden_layers}

    def draw(keys: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = names.tree_path(keys)
        if path[-1] == "A_log":
            return np.log(random.uniform(1.0, 16.0, leaf.shape)).astype(np.float32)
        if path[-1] == "dt_bias":
            # Steps of 0.001 to 0.1 (arXiv:2312.00752): a memory of tokens to hundreds; at 1, of less than one.
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
    """A sine and cosine table of positions, float32 [positions, D]: half the width for rows, half for columns."""
    side, quarter = vision.positions_per_side, vision.hidden_size // 4
    angle = np.arange(side)[:, None] * np.exp(np.linspace(math.log(math.pi / 2), math.log(math.pi / side), quarter))[None]
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [side, D/2]
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    return 0.5 * np.concatenate([rows, columns], axis=1).astype(np.float32)


def whitening_embedding(vision: VisionConfig, mean: Sequence[float]) -> dict[str, np.ndarray]:
    """Weight and bias that give patches of scenes, where there is something in them, unit variance in their main directions."""
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
    """Muon for matrices and Adam for the rest; the rate is set from outside: the run is as long as its time.

    Colours of single shapes in 56 x 56 pixels, 11 lessons a step, exact after 1,000 of 1,200 steps: 84 %; by AdamW at 1e-3, 26 %.
    """

    def chain(learning_rate: jax.Array) -> optax.GradientTransformation:
        adam = optax.adam(ADAM_RATE * learning_rate, b1=0.9, b2=0.98)
        rest = optax.chain(adam, optax.stateless(slow_patch_embed))
        return optax.chain(optax.clip_by_global_norm(1.0), muon(learning_rate, WEIGHT_DECAY, rest))

    return optax.inject_hyperparams(chain)(learning_rate=0.0)


def slow_patch_embed(updates: Params, params: Params | None) -> Params:
    """The patches' embedding learns slowly: the pixels of a patch are alike, so that its weights all move the same way."""
    del params

    def slowed(keys: Any, update: jax.Array) -> jax.Array:
        return update * (PATCH_EMBED_RATE if names.tree_path(keys)[1] == "patch_embed" else 1.0)

    return jax.tree_util.tree_map_with_path(slowed, updates)


def learning_rate_at(step: int, progress: float, peak: float) -> float:
    """A warm-up by steps, then down a cosine to a fiftieth by `progress` from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min((step + 1) / WARMUP, 1.0) * (0.02 + 0.98 * cosine)


def set_learning_rate(state: TrainState, value: float) -> TrainState:
    """The same state, to learn at that rate in the next step."""
    hyperparams = {"learning_rate": jnp.asarray(value, jnp.float32)}
    return dataclasses.replace(state, optimizer=state.optimizer._replace(hyperparams=hyperparams))


def correct_tokens(graph: Schema, trained: Params, batch: TrainBatch, dtype: Any) -> jax.Array:
    """Where the likeliest next token is the right one: bool [R, L]. All of an answer's: it is what greedy decoding says."""
    params, own = cast_for_compute(trained, dtype), jax.tree.map(lambda x: x[0, 0], batch)
    identity = lambda part, path: part  # noqa: E731
    features = forward.encode(graph.vision, params["vision"], own.views, remat="layer", gather=identity)
    x = model.embed(params["text"]["embed"], own.ids.reshape(-1), own.feature_rows.reshape(-1), features)
    hidden = forward.hidden_states(graph.text, params["text"], x, PackedBatch(own.segments), remat="layer", gather=identity)
    logits = jnp.einsum("td,vd->tv", hidden, params["text"]["embed"]["weight"], preferred_element_type=jnp.float32)
    return logits.argmax(-1).reshape(own.labels.shape) == own.labels


EvalSet = list[tuple[TrainBatch, list[list[str]]]]  # batches, and the group of each conversation of each row


def draw_eval_set(task: DataConfig) -> EvalSet:
    """Held-out questions in batches; runs in a process of its own."""
    config = ModelConfig.from_folder(task.folder)
    groups = {}
    conversations = []
    for group, conversation in drawing.eval_conversations(task):
        groups[id(conversation)] = group
        conversations.append(conversation)
    filled = list(drawing.fill(conversations, task.shape))
    return [
        (drawing.stack([drawing.pack(rows, task.shape, config.vision)]), [[groups[id(c)] for c in row] for row in rows])
        for rows in filled
    ]


def accuracy_by_group(mark_correct: Callable[[Params, TrainBatch], jax.Array], params: Params, exam: EvalSet) -> dict[str, float]:
    """The share of each group's answers that are right to the last token."""
    right, asked = collections.Counter(), collections.Counter()
    for batch, groups in exam:
        hit = np.asarray(mark_correct(params, batch)) | (batch.weights[0, 0] == 0)
        for r, row in enumerate(groups):
            for number, group in enumerate(row, start=1):
                asked[group] += 1
                right[group] += bool(hit[r][batch.segments[0, 0, r] == number].all())
    return {group: right[group] / asked[group] for group in sorted(asked)}


def mode_index(worker: int, share_16x: int) -> int:
    """Which mode a worker draws for: the second of a run if it is the second of so many workers, so that two are enough."""
    return int(worker % share_16x == 1)


class Trainer:
    """One training run; `go` returns the parameters and the scores."""

    def __init__(self, settings: Settings, out: Path):
        self.settings, self.out, self.begun = settings, out, time.monotonic()
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
        self.exam: EvalSet = []

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.begun

    def say(self, **values: Any) -> None:
        """A line to the log and the console."""
        values = {"seconds": round(self.elapsed, 1), **values}
        print(json.dumps(values), flush=True)
        self.log.write(json.dumps(values) + "\n")
        self.log.flush()

    def tasks(self) -> list[DataConfig]:
        """What each worker draws; each has seeds of its own."""
        n, ramp = self.settings.workers, RAMP_SCENES if self.settings.start is None else 0
        common = {"mix": dict(self.settings.mix), "step": n, "ramp": ramp, "easy": EASY_SHARE}
        first, shapes = self.settings.seed * drawing.SEEDS_PER_RUN, list(self.settings.shapes.values())
        return [
            DataConfig(self.files, shapes[mode_index(i, self.settings.share_16x) % len(shapes)], first=first + i, **common)
            for i in range(n)
        ]

    def start_state(self) -> TrainState:
        """Random weights, or those of a folder."""
        if self.settings.start is None:
            params = initial_params(self.config, IMAGE_MEAN, self.settings.seed)
        else:
            params = checkpoint.load_params(self.settings.start, self.config, jnp.float32)
        return jax.device_put(new_state(*split(params, lambda path: True), self.optimizer))

    def programs(self, state: TrainState, pool: ThreadPoolExecutor) -> dict[str, Future]:
        """The step for each mode, and the exam's marking, being compiled."""
        step = jax.jit(
            make_step(
                self.config,
                self.optimizer,
                dtype=self.settings.dtype,
                z_loss=1e-4,
                remat="none",
                scan_layers=False,  # which halves the bytes a step moves: a scan copies what its layers keep
                backend="reference",
            ),
            donate_argnums=0,
        )
        mark_correct = jax.jit(lambda params, batch: correct_tokens(self.graph, params, batch, self.settings.dtype))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        blank = {
            mode: drawing.stack([drawing.pack([], shape, self.config.vision)]) for mode, shape in self.settings.shapes.items()
        }
        jobs = {}
        for mode, batch in blank.items():  # lowered one by one, the first first: threads would only share the interpreter
            jobs[mode] = pool.submit(step.lower(abstract, batch).compile)
        return jobs | {"mark": pool.submit(mark_correct.lower(abstract.trained, next(iter(blank.values()))).compile)}

    def go(self) -> dict[str, float]:
        """Trains until the time or the steps are over, then examines and exports."""
        settings = self.settings
        first = next(iter(settings.shapes.values()))
        exam_task = DataConfig(self.files, first, dict(settings.mix), held_out=True, count=settings.exam)
        batch_bytes = sum(x.nbytes for x in jax.tree.leaves(drawing.pack([], first, self.config.vision)))
        spawn = multiprocessing.get_context("spawn")
        with (
            ThreadPoolExecutor(3) as pool,
            ProcessPoolExecutor(1, mp_context=spawn) as examiner,
            BatchLoader(self.tasks(), self.config, max(REPLAY_BYTES // batch_bytes, 1)) as batches,
        ):
            exam = examiner.submit(draw_eval_set, exam_task)
            state = self.start_state()
            programs = self.programs(state, pool)
            next(iter(programs.values())).result()
            self.say(event="compiled", parameters=sum(x.size for x in jax.tree.leaves(state.trained)))
            state = self.loop(state, programs, batches, exam)
            self.exam = exam.result()
            scores = accuracy_by_group(programs["mark"].result(), state.trained, self.exam)
            self.say(event="held out", **scores)
            self.save(state.trained, scores)
        return scores

    def loop(self, state: TrainState, programs: dict[str, Future], batches: BatchLoader, exam: Future) -> TrainState:
        """The steps, with a line every ten seconds."""
        start, limit = self.elapsed, self.settings.seconds - RESERVED_SECONDS
        said = saved = examined = start
        pending: collections.deque = collections.deque()
        step = sum_steps = 0
        while self.elapsed < limit and (self.settings.steps is None or step < self.settings.steps):
            batch = batches.take()
            program = programs[batch.views.downsample_mode]
            if not program.done():
                time.sleep(0.05)  # only at the start, while the second mode's step compiles
                continue
            of_time = (self.elapsed - start) / (limit - start)
            progress = of_time if self.settings.steps is None else max(of_time, step / self.settings.steps)
            state, metrics = program.result()(
                set_learning_rate(state, learning_rate_at(step, progress, self.settings.peak_rate)), batch
            )
            step += 1
            pending.append(metrics)
            if len(pending) > 4:
                last = jax.device_get(pending.popleft())
                if self.elapsed - said > LOG_EVERY:
                    speed = (step - sum_steps) / (self.elapsed - said)
                    said, sum_steps = self.elapsed, step
                    self.say(
                        step=step,
                        loss=round(float(last.loss), 4),
                        grad=round(float(last.grad_norm), 3),
                        steps_per_second=round(speed, 2),
                        fresh=batches.fresh,
                        repeated=batches.repeated,
                    )
            if self.elapsed - examined > EVAL_EVERY and exam.done() and programs["mark"].done():
                self.say(
                    event="held out", step=step, **accuracy_by_group(programs["mark"].result(), state.trained, exam.result())
                )
                examined = self.elapsed
            if self.elapsed - saved > SAVE_EVERY:
                self.save(state.trained, {})
                saved = self.elapsed
        jax.block_until_ready(state)
        self.say(event="trained", steps=step, fresh=batches.fresh, repeated=batches.repeated)
        return state

    def save(self, trained: Params, scores: Mapping[str, float]) -> None:
        """Writes the folder in bfloat16, in the place of an earlier one, and the scores."""
        params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), trained)
        with tempfile.TemporaryDirectory(dir=self.out) as beside:
            written = export_hf(params, self.files, Path(beside) / "model")
            shutil.rmtree(self.out / "model", ignore_errors=True)
            os.rename(written, self.out / "model")
        (self.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m convert.train_demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the scores and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="from start to end (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="drawing processes (default: %(default)s)"
    )
    parser.add_argument("--start", type=Path, help="a folder to go on from")
    parser.add_argument("--peak-rate", type=float, default=PEAK_RATE, help="of learning (default: %(default)s)")
    parser.add_argument(
        "--share-16x", type=int, default=SHARE_16X, help="one drawing process in so many draws for 16x (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and scenes: another one, other scenes (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if args.share_16x < 2:
        parser.error(f"--share-16x is {args.share_16x}, expected at least 2: one process in so many")
    settings = Settings(
        60 * args.minutes, args.workers, scenes.MIX, SHAPES, args.peak_rate, args.start, args.share_16x, seed=args.seed
    )
    Trainer(settings, args.out).go()
    return 0
