"""Other parameters for an engine that is alive: checked whole before the first of them is moved."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jpaged.devices import first_device
from jpaged_models import Decoder, params_of


def checked_params(params: Any, abstract: nnx.State) -> nnx.State:
    """The parameters in the place of `abstract`'s shapes and dtypes; nothing is copied yet.

    Args:
        params: a decoder, its `nnx.state(decoder, nnx.Param)`, or nested dicts of arrays as
            `params_of` gives them; layers may be numbered by text, as in a checkpoint.
        abstract: what the engine's programs take.

    Raises:
        ValueError: a parameter is missing, unknown, deleted, of another shape or no floats.
        TypeError: it is no such thing.
    """
    if isinstance(params, nnx.Module):
        params = params_of(cast(Decoder, params))
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a decoder or nested dicts of arrays, got {type(params).__name__}"
        )
    placed = _checked(nnx.to_pure_dict(abstract), params, path="")
    nnx.replace_by_pure_dict(abstract, placed)
    return abstract


def copied(param: Any, spec: jax.ShapeDtypeStruct) -> Array:
    """One of them on the default device, in the engine's dtype and an array of its own.

    The caller may go on training with what it passed, and donate it.
    """
    own = jnp.array(param, dtype=spec.dtype, copy=True)  # where it lay, on a mesh perhaps
    return jax.device_put(own, jax.sharding.SingleDeviceSharding(first_device()))


def _checked(wanted: dict, given: Mapping, path: str) -> dict:
    by_name = {str(key): value for key, value in given.items()}
    names = {str(key) for key in wanted}
    if names != set(by_name):
        where = f"params{path}"
        missing, unknown = sorted(names - set(by_name)), sorted(set(by_name) - names)
        raise ValueError(
            f"{where} must have the keys {sorted(names)}: {missing} missing, {unknown} unknown"
        )
    checked = {}
    for key, spec in wanted.items():
        value, where = by_name[str(key)], f"{path}[{key!r}]"
        if isinstance(spec, dict):
            if not isinstance(value, Mapping):
                raise TypeError(f"params{where} must be a dict, got {type(value).__name__}")
            checked[key] = _checked(spec, value, where)
            continue
        if not isinstance(value, jax.Array | np.ndarray):
            raise TypeError(f"params{where} must be an array, got {type(value).__name__}")
        if isinstance(value, jax.Array) and value.is_deleted():
            raise ValueError(
                f"params{where} was deleted, as a training step that is given it may do; pass the "
                "parameters that it gave back"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"params{where} must hold floats, got {value.dtype}")
        if value.shape != spec.shape:
            raise ValueError(
                f"params{where} must have the shape {spec.shape}, got {value.shape}; "
                "these are parameters of another model"
            )
        checked[key] = value
    return checked
