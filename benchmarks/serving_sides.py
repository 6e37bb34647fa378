"""The sides of the serving benchmark, all with the same bytes of keys and values."""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import jax

from benchmarks import baseline_model
from benchmarks.baseline import Baseline
from benchmarks.measure import block_nbytes
from benchmarks.open_loop import Server
from benchmarks.paged_server import PagedServer
from benchmarks.unpaged_server import Refill, UnpagedServer
from jpaged import LLM
from jpaged_models import open_named_tensors

PAGED = "paged"
UNPAGED = {
    "unpaged": Refill.WHEN_ALL_ENDED,
    "unpaged-tight": Refill.WHEN_ALL_ENDED,
    "unpaged-refilled": Refill.WHEN_ONE_ENDED,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One configuration that is measured; `start` makes a server with nothing in it."""

    name: str
    rows: int  # the most sequences that run at once
    reserved: int | None  # tokens that each row reserves, where it does
    attention: str
    cache_bytes: int
    start: Callable[[], Server]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """All of them, warmed up, and the model that they run."""

    sides: list[Side]
    llm: LLM  # of the paged side
    model_source: str
    vocab_size: int


def equal_blocks(rows: int, reserved: int, block_size: int) -> int:
    """Blocks that hold as many tokens as the baseline's rows reserve: exactly, or ValueError."""
    num_blocks, rest = divmod(rows * reserved, block_size)
    if rest or not num_blocks:
        raise ValueError(
            f"{rows} rows of {reserved} tokens are {rows * reserved} tokens, which is no whole "
            f"number of blocks of {block_size}; change --rows, --reserved or --block-size"
        )
    return num_blocks


def make_sides(options: argparse.Namespace) -> Sides:
    """The engine, and the baselines that were asked for."""
    checkpoint = open_named_tensors(options.model)
    llm = make_engine(
        options,
        block_size=options.block_size,
        enable_prefix_caching=options.shared_prefix > 0,
    )
    paged = paged_side(PAGED, llm)
    params = baseline_model.load_params(checkpoint, dtype=options.dtype)
    sides = [paged]
    for name in options.unpaged:
        rows, reserved = _rows(name, options)
        print(f"warming up {name}: {rows} rows of {reserved} tokens", file=sys.stderr)
        baseline = Baseline(
            checkpoint.config,
            params,
            num_rows=rows,
            reserved=reserved,
            cache_dtype=jax.tree.leaves(llm.engine.runner.pool)[0].dtype,
        )
        baseline.warm_up(options.max_input)
        sides.append(_unpaged(name, baseline))
        held = sides[-1].cache_bytes
        assert held <= paged.cache_bytes, f"{name} holds {held} bytes, more than the pool"
        assert held == paged.cache_bytes or reserved < options.reserved, "equal bytes"
    return Sides(
        sides=sides,
        llm=llm,
        model_source=checkpoint.source,
        vocab_size=checkpoint.config.vocab_size,
    )


def make_engine(
    options: argparse.Namespace,
    *,
    block_size: int,
    enable_prefix_caching: bool,
    swap_space: float = 0.0,
) -> LLM:
    """An engine whose pool has the bytes of the baseline's rows."""
    num_usable = equal_blocks(options.rows, options.reserved, block_size)
    print(f"warming up paged: {num_usable} blocks of {block_size}", file=sys.stderr)
    return LLM(
        options.model,
        dtype=options.dtype,
        block_size=block_size,
        num_blocks=num_usable + 1,  # the null block holds nothing
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.reserved,
        enable_prefix_caching=enable_prefix_caching,
        swap_space=swap_space,
        attention_backend=options.attention_backend,
        use_tqdm=False,
    )


def paged_side(name: str, llm: LLM) -> Side:
    """The engine under a name; every start forgets what an earlier run left in its cache."""
    config = llm.engine.scheduler.config

    def start() -> Server:
        assert llm.reset_prefix_cache(), "an earlier run left requests"
        return PagedServer(llm)

    return Side(
        name=name,
        rows=config.max_num_seqs,
        reserved=None,
        attention=llm.engine.runner.step.backend.value,
        cache_bytes=(config.num_blocks - 1) * block_nbytes(llm),
        start=start,
    )


def _rows(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """How many rows a baseline has, and how many tokens each reserves."""
    if name != "unpaged-tight":
        return options.rows, options.reserved
    longest = options.max_input + options.max_output
    return options.rows * options.reserved // longest, longest


def _unpaged(name: str, baseline: Baseline) -> Side:
    def start() -> Server:
        return UnpagedServer(baseline, UNPAGED[name])

    return Side(
        name=name,
        rows=baseline.num_rows,
        reserved=baseline.reserved,
        attention="jax.numpy",
        cache_bytes=baseline.cache_bytes,
        start=start,
    )
