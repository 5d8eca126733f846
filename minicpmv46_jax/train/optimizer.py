"""optax optimisers with a schedule, a rate for each part of the model, and parts that stay as they are."""

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
    """What a run's `[optimizer]` says.

    Attributes:
      name: one of `OPTIMIZERS`.
      rate: the learning rate at its highest.
      schedule: how it falls after the warm-up, to `final` times `rate` at the last step.
      warmup: steps in which it rises from 0.
      weight_decay: of matrices; vectors, filters and embeddings of position have none.
      clip: the gradient's norm is cut to this; 0 for never.
      b1, b2: of the moments ("sgd": b1 is the momentum).
      text, vision, merger: multiply the rate of each part; 0 freezes it. The merger is the last one, after the tower.
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
        """Whether the parameter at `path` is trained."""
        return getattr(self, part(path)) > 0


def part(path: TreePath) -> str:
    """Which of `PARTS` the parameter at `path` belongs to."""
    return "merger" if path[:2] == ("vision", "merger") else path[0]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step. Raises ValueError where the warm-up is longer than the run."""
    if config.warmup > steps:
        raise ValueError(f"optimizer.warmup is {config.warmup} steps, the run has {steps}")
    rest, low = max(steps - config.warmup, 1), config.final * config.rate
    fall = {
        "constant": optax.constant_schedule(config.rate),
        "linear": optax.linear_schedule(config.rate, low, rest),
        "cosine": optax.cosine_decay_schedule(config.rate, rest, alpha=config.final),
    }[config.schedule]
    rise = optax.linear_schedule(config.rate / max(config.warmup, 1), config.rate, max(config.warmup - 1, 1))
    return optax.join_schedules([rise, fall], [config.warmup]) if config.warmup else fall


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of so many steps, for a tree of trained parameters as `step.split` makes it."""
    moments = {
        "adamw": optax.scale_by_adam(config.b1, config.b2),
        "lion": optax.scale_by_lion(config.b1, config.b2),
        "sgd": optax.trace(config.b1),
    }[config.name]
    chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    chain += [moments, optax.add_decayed_weights(config.weight_decay, _decayed)] if config.weight_decay else [moments]
    return optax.chain(*chain, _by_part(config), optax.scale_by_learning_rate(make_schedule(config, steps)))


def _decayed(params: Any) -> Any:
    def matrix(keys: Any, x: jax.Array) -> bool:
        path = tree_path(keys)
        return x.ndim == 2 and path[-1] != "conv" and path[-2] != "position_embed"

    return jax.tree_util.tree_map_with_path(matrix, params)


def _by_part(config: OptimizerConfig) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: x * jnp.asarray(getattr(config, part(tree_path(keys))), x.dtype), updates
        )

    return optax.stateless(scale)
