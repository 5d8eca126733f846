"""A run's state on disk, by orbax: written beside the training, the newest few kept, and complete or not there at all.

A checkpoint holds what the run cannot get elsewhere: the trained parameters, the optimiser's state, the step, and where the data
stands. Frozen parameters are those of the model that the run began with.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from minicpmv46_jax import sharding
from minicpmv46_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of a run, in one folder."""

    def __init__(self, folder: str | Path, keep: int = 2):
        """`keep`: how many of the newest stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handlers)

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Copies the state off the device and writes it while training goes on.

        `data`: JSON, the state of this host's data iterator.
        """
        where = {"hosts": sharding.gather_json(data)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_leaves(state)), data=ocp.args.JsonSave(where))
        self.manager.save(int(state.step), args=args)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint, lying on devices as `state` does and with its frozen parameters; None where there is none.

        Raises ValueError where it is not of this run's parameters and optimiser, or of another number of hosts.
        """
        newest = self.manager.latest_step()
        if newest is None:
            return None
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _leaves(state))
        self._check(newest, wanted)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore())
        found = self.manager.restore(newest, args=args)
        hosts = found["data"]["hosts"]
        if len(hosts) != jax.process_count():
            raise ValueError(
                f"{self.manager.directory}: {len(hosts)} hosts wrote the checkpoint of step {newest}, and there are "
                f"{jax.process_count()}: their data would not go on where it was"
            )
        return _CheckpointItems(state).rebuilt(found["state"]), hosts[jax.process_index()]

    def close(self) -> None:
        """Waits until all is written."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _check(self, newest: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        found = {name: tuple(leaf.shape) for name, leaf in self.manager.item_metadata(newest)["state"].tree.items()}
        shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        if differ := sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)):
            name = differ[0]
            raise ValueError(
                f"{self.manager.directory}: the checkpoint of step {newest} is of another run: {name} is {found.get(name)} there "
                f"and {shapes.get(name)} here"
            )


class _CheckpointItems:
    """The parts of a state that a checkpoint holds, by name, and the way back."""

    def __init__(self, state: TrainState):
        self.frozen = state.frozen
        self.held = state.step, state.trained, state.optimizer

    def named(self) -> dict[str, jax.Array]:
        return {jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(self.held)[0]}

    def rebuilt(self, named: dict[str, jax.Array]) -> TrainState:
        leaves = [named[name] for name in self.named()]
        step, trained, optimizer = jax.tree.unflatten(jax.tree.structure(self.held), leaves)
        return TrainState(step, trained, self.frozen, optimizer)


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    return _CheckpointItems(state).named()
