"""Builds optax optimisers: a schedule, a learning rate for each part of the model, and frozen parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minicpmv46_jax.checkpoint.names import TreePath, tree_path

PARTS = ("text", "vision", "merger")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "lion", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of a run's `[optimizer]` table.

    Attributes:
      name: one of `OPTIMIZERS`.
      rate: the peak learning rate.
      schedule: one of `SCHEDULES`; the rate falls after the warm-up to `final` x `rate` at the last step.
      final: see `schedule`.
      warmup: number of steps in which the rate rises from 0.
      weight_decay: decay of matrices; vectors, filters and position embeddings have none.
      clip: upper bound of the gradient's norm; 0 for none.
      b1, b2: decay rates of the moments; for "sgd", b1 is the momentum.
      text, vision, merger: factors on each part's rate; 0 freezes the part. `merger` is the merger after the
        vision tower.
    """

    name: str = "adamw"
    rate: float = 1e-5
    schedule: str = "cosine"
    final: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    text: float = 1.0
    vision: float = 1.0
    merger: float = 1.0

    def __post_init__(self):
        for name, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("rate", "final", "warmup", "weight_decay", "clip", *PARTS):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, expected 0 or more")

    def trains(self, path: TreePath) -> bool:
        """Returns whether the parameter at `path` is trained."""
        return getattr(self, part(path)) > 0


def part(path: TreePath) -> str:
    """Returns the one of `PARTS` that the parameter at `path` belongs to."""
    return "merger" if path[:2] == ("vision", "merger") else str(path[0])


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    if config.warmup > steps:
        raise ValueError(f"optimizer.warmup is {config.warmup} steps, the run has {steps}")
    rest, final_rate = max(steps - config.warmup, 1), config.final * config.rate
    decay = {
        "constant": optax.constant_schedule(config.rate),
        "linear": optax.linear_schedule(config.rate, final_rate, rest),
        "cosine": optax.cosine_decay_schedule(config.rate, rest, alpha=config.final),
    }[config.schedule]
    warmup = optax.linear_schedule(config.rate / max(config.warmup, 1), config.rate, max(config.warmup - 1, 1))
    return optax.join_schedules([warmup, decay], [config.warmup]) if config.warmup else decay


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimiser of a run of `steps` steps over trained parameters (see `step.split`)."""
    moments = {
        "adamw": optax.scale_by_adam(config.b1, config.b2),
        "lion": optax.scale_by_lion(config.b1, config.b2),
        "sgd": optax.trace(config.b1),
    }[config.name]
    chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    chain += [moments, optax.add_decayed_weights(config.weight_decay, _decay_mask)] if config.weight_decay else [moments]
    return optax.chain(*chain, _scale_by_part(config), optax.scale_by_learning_rate(make_schedule(config, steps)))


def _decay_mask(params: Any) -> Any:
    def matrix(keys: Any, x: jax.Array) -> bool:
        path = tree_path(keys)
        return x.ndim == 2 and path[-1] != "conv" and path[-2] != "position_embed"

    return jax.tree_util.tree_map_with_path(matrix, params)


def _scale_by_part(config: OptimizerConfig) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: x * jnp.asarray(getattr(config, part(tree_path(keys))), x.dtype), updates
        )

    return optax.stateless(scale)
