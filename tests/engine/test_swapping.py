"""Swapping end to end: what leaves for host memory comes back, and nothing is computed twice."""

from typing import Any

import jax
import numpy as np
import pytest

from jpaged.engine import Engine
from jpaged.invariants import check
from jpaged.programs import ReadBlocks, WriteBlocks
from jpaged.requests import Request
from jpaged.swap_space import MAX_MOVED, SwapSpace, padded_ids, transfers
from tests.helpers import generated, make_prompt, make_request, tiny_engine

NUM_BLOCKS = 12  # of which the null block is one: four sequences of up to five do not fit


def requests_of(count: int = 4) -> list[Request]:
    # Nothing is shared, so that a sequence finds nothing of itself in the cache later.
    return [make_request(make_prompt(9 + i, seed=i), max_tokens=25) for i in range(count)]


def make(num_swap_blocks: int, num_blocks: int = NUM_BLOCKS) -> Engine:
    return tiny_engine(
        enable_prefix_caching=False, num_swap_blocks=num_swap_blocks, num_blocks=num_blocks
    )


def run(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.scheduler.add(request)
    run_on(engine)


def run_on(engine: Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()
        check(engine.scheduler)


def run_until_swapped(engine: Engine, requests: list[Request]) -> None:
    """Stops at the first step that leaves something in host memory."""
    for request in requests:
        engine.scheduler.add(request)
    while not engine.stats().blocks_swapped:
        engine.step()


@pytest.fixture(scope="module")
def answers() -> list[list[list[int]]]:
    requests = requests_of()
    run(make(0, num_blocks=60), requests)
    return [generated(request) for request in requests]


def test_what_was_swapped_out_is_not_computed_again(answers: list[list[list[int]]]):
    engine, requests = make(40), requests_of()
    run(engine, requests)
    stats = engine.stats()
    assert [generated(request) for request in requests] == answers
    assert stats.preemptions > 0
    assert stats.swapped_in_blocks == stats.swapped_out_blocks > 0
    # Every token but the last of each answer is computed, and each once.
    assert stats.computed_tokens == stats.prompt_tokens + stats.generated_tokens - len(requests)


def test_where_host_memory_is_full_sequences_are_computed_again(answers: list[list[list[int]]]):
    engine, requests = make(2), requests_of()
    run(engine, requests)
    stats = engine.stats()
    assert [generated(request) for request in requests] == answers
    assert stats.preemptions > 0
    assert stats.computed_tokens > stats.prompt_tokens + stats.generated_tokens


@pytest.mark.parametrize("lost", [True, False])
def test_a_failed_step_loses_what_lay_in_host_memory_and_no_text(
    answers: list[list[list[int]]], lost: bool
):
    engine, requests = make(40), requests_of()
    run_until_swapped(engine, requests)
    runner: Any = engine.runner
    step = runner.run

    def fail(*_: object) -> None:
        runner.run = step
        if lost:
            jax.tree.leaves(runner.pool)[0].delete()
        raise RuntimeError("the device is gone")

    runner.run = fail
    engine.step()
    assert engine.stats().blocks_swapped == 0
    run_on(engine)
    assert [generated(request) for request in requests] == answers


def test_an_abort_gives_host_memory_back():
    engine = make(40)
    run_until_swapped(engine, requests_of())
    for sequence in list(engine.scheduler.swapping.stored):
        engine.scheduler.abort(sequence.request.request_id)
    assert engine.stats().blocks_swapped == 0
    check(engine.scheduler)


def test_swapping_compiles_nothing_after_warm_up():
    engine = make(40)
    engine.runner.programs = {}
    engine.runner.warm_up()
    run(engine, requests_of())
    stats = engine.stats()
    assert stats.swapped_in_blocks > 0
    assert stats.lazy_compiles == 0


def test_what_comes_back_is_written_in_place():
    runner = make(40).runner
    pool_bytes = sum(leaf.nbytes for leaf in runner.pool)
    assert (written := runner.compile(WriteBlocks()).memory_analysis()) is not None
    assert (read := runner.compile(ReadBlocks()).memory_analysis()) is not None
    assert written.alias_size_in_bytes == pool_bytes
    assert read.alias_size_in_bytes == 0


def test_a_space_keeps_blocks_of_any_number_and_returns_them_by_name():
    shape = (3, 2, 1, 4)
    space = SwapSpace(90, shape, np.float32)
    blocks = np.random.default_rng(0).random((2 * MAX_MOVED, *shape), np.float32)
    moves = [(block, (7 * block) % 90) for block in range(MAX_MOVED + 5)]
    for block_ids, space_ids in transfers(moves):
        space.receive(space_ids, jax.device_put(blocks[padded_ids(block_ids, 0)]))
    space.settle()
    for space_ids, block_ids in transfers([(there, block) for block, there in moves]):
        returned = space.padded(space_ids)
        np.testing.assert_array_equal(returned[: len(block_ids)], blocks[block_ids])
        assert not returned[len(block_ids) :].any()
