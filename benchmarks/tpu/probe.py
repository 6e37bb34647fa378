"""A probe: what to compile, and what it would do on a TPU.

A probe is a function of JSON options that returns a `Probe`, so that `estimate_for_tpu` can build
it in a process of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

KERNEL = "probed_kernel"  # its name in the HLO, whatever it is called elsewhere


class Work(NamedTuple):
    """What a run of the kernel does at these lengths."""

    rows: int
    tiles: int  # turns of the loop over keys and values: rows x (heads x) tiles of a row
    kv_bytes: int  # that it moves
    ideal_bytes: int  # that the visible tokens hold
    flops: int  # of the two products, without padding and masked logits
    runs: int = 1  # of the probed kernel, which make up all of this
    turns: int = 1  # of a loop inside a tile's turn, of which the probe has one


class Probe(NamedTuple):
    """A kernel alone, its work and how it cuts that."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # abstract
    work: Work
    tile: dict[str, int]  # that the kernel has, whoever chose it; empty where it has none


def kernel_alone(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The only Pallas call of `function`, with each of its operands an argument.

    The estimator aborts where an operand of scalar prefetch was computed in the same program, and
    on some copies into another layout.
    """
    calls = list(_pallas_calls(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert len(calls) == 1, f"expected one Pallas call, found {len(calls)}"
    (call,) = calls

    def run(*operands: Any) -> Any:
        with jax.named_scope(KERNEL):
            return call.primitive.bind(*operands, **call.params)

    operands = (operand.aval for operand in call.invars)
    return run, tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in operands)


def _pallas_calls(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in jax.tree.leaves(
                tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _pallas_calls(inner)
