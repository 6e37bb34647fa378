"""What a training run keeps in its folder: its state every so often, and what it was begun with."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jaxtyping import Array

BEGUN_FILE = "begun.json"


class TrainState(NamedTuple):
    """What a step changes."""

    params: nnx.State
    moments: optax.OptState


class KeptSteps:
    """The states of one run, the last two of them, kept by Orbax in `folder`."""

    def __init__(
        self, folder: pathlib.Path, begun_with: Mapping[str, Any], *, save_every: int
    ) -> None:
        """Opens the folder, or begins it.

        Raises ValueError where it holds a run that was begun with something else: the end of
        that one would not be what a whole run finds.
        """
        import orbax.checkpoint as ocp

        _check_same_run(folder, json.loads(json.dumps(begun_with)))
        options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=save_every)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def last(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The number of the last step that was kept and its state, laid out as `like`."""
        import orbax.checkpoint as ocp

        number = self._manager.latest_step()
        if number is None:
            return None
        plain = self._manager.restore(number, args=ocp.args.StandardRestore(_plain(like)))
        return number, jax.tree.unflatten(jax.tree.structure(like), list(plain))

    def save(self, number: int, state: TrainState, *, is_last: bool) -> None:
        """Keeps the state if it is its turn, or if it is the last."""
        import orbax.checkpoint as ocp

        self._manager.save(number, args=ocp.args.StandardSave(_plain(state)), force=is_last)

    def close(self) -> None:
        """Waits until what is being written is there."""
        self._manager.close()


def _check_same_run(folder: pathlib.Path, begun_with: dict[str, Any]) -> None:
    path = folder / BEGUN_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(begun_with, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(
        name
        for name in before.keys() | begun_with.keys()
        if before.get(name) != begun_with.get(name)
    )
    if names:
        changes = ", ".join(
            f"{name} was {before.get(name)!r} and is {begun_with.get(name)!r}" for name in names
        )
        raise ValueError(
            f"{folder} holds a run that was begun with something else: {changes}; pass what it was "
            "begun with, or name another folder"
        )


def _plain(state: TrainState) -> list[Array]:
    """Its arrays in order, so that a checkpoint does not depend on Optax's classes."""
    return jax.tree.leaves(state)
