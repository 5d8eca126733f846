"""Saves and restores a run's state with orbax. Writing is asynchronous and atomic; the newest few checkpoints
are kept.

A checkpoint holds the state that has no other source: the trained parameters, the optimiser's state, the
step and the data iterator's state. Frozen parameters come from the model that the run started from.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from minicpmv46_jax import sharding
from minicpmv46_jax.train.step import TrainState


class Checkpoints:
    """Checkpoints of a run in one folder, of which the newest `keep` are kept."""

    def __init__(self, folder: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handlers)

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Copies the state to the host and writes it while training continues.

        Args:
          state: the run's state.
          data: state of this host's data iterator, as JSON can hold it.
        """
        positions = {"hosts": sharding.gather_json(data)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_leaves(state)), data=ocp.args.JsonSave(positions))
        self.manager.save(int(state.step), args=args)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint.

        Args:
          state: a state of this run, for its shardings and its frozen parameters.

        Returns:
          (state, state of this host's data iterator), or None if there is no checkpoint.

        Raises:
          ValueError: the checkpoint has other parameters or another optimiser, or another number of hosts
            wrote it.
        """
        newest = self.manager.latest_step()
        if newest is None:
            return None
        expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _leaves(state))
        self._check(newest, expected)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(expected), data=ocp.args.JsonRestore())
        restored = self.manager.restore(newest, args=args)
        hosts = restored["data"]["hosts"]
        if len(hosts) != jax.process_count():
            raise ValueError(
                f"{self.manager.directory}: {len(hosts)} hosts wrote the checkpoint of step {newest}, and there are "
                f"{jax.process_count()}: their data cannot be resumed"
            )
        return _CheckpointItems(state).rebuild(restored["state"]), hosts[jax.process_index()]

    def close(self) -> None:
        """Closes the folder after all pending writes."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _check(self, newest: int, expected: dict[str, jax.ShapeDtypeStruct]) -> None:
        found = {name: tuple(leaf.shape) for name, leaf in self.manager.item_metadata(newest)["state"].tree.items()}
        shapes = {name: tuple(leaf.shape) for name, leaf in expected.items()}
        if differ := sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)):
            name = differ[0]
            raise ValueError(
                f"{self.manager.directory}: the checkpoint of step {newest} is of another run: {name} is {found.get(name)} there "
                f"and {shapes.get(name)} here"
            )


class _CheckpointItems:
    """The parts of a state that a checkpoint holds, as arrays by name."""

    def __init__(self, state: TrainState):
        self.frozen = state.frozen
        self.saved = state.step, state.trained, state.optimizer

    def named(self) -> dict[str, jax.Array]:
        return {jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(self.saved)[0]}

    def rebuild(self, named: dict[str, jax.Array]) -> TrainState:
        leaves = [named[name] for name in self.named()]
        step, trained, optimizer = jax.tree.unflatten(jax.tree.structure(self.saved), leaves)
        return TrainState(step, trained, self.frozen, optimizer)


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    return _CheckpointItems(state).named()
