"""Sharing where it counts: the jitted code moves the right bytes, and no output changes."""

import contextlib
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Bool

from benchmarks.oracle import Oracle, WatchedScheduler
from jpaged import preparation
from jpaged.config import EngineConfig
from jpaged.engine import Engine
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.requests import Request
from jpaged.requests import Sequence as TokenSequence
from jpaged.swap_space import SwapSpace, padded_ids, transfers
from jpaged_models import Decoder, load_decoder, open_checkpoint
from pallas_kernels import (
    copy_blocks,
    default_backend,
    read_blocks,
    write_blocks,
    write_kv,
)
from tests.helpers import (
    TOLERANCES,
    assert_close,
    computed_logits,
    generated,
    make_engine,
    make_prompt,
    make_request,
    run_to_end,
    teacher_forced,
    tiny_decoder,
    tiny_engine,
)
from tests.host.test_broken_builds import busy_run


class OracleOnDevice(Oracle):
    """The oracle's pool written and copied by the code that the engine jits."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._write, self._copy, self._put = (
            jax.jit(functools.partial(change, backend=default_backend("cpu")), donate_argnums=0)
            for change in (write_kv, copy_blocks, write_blocks)
        )
        self._read = jax.jit(read_blocks)
        block_shape = (1, 1, config.block_size, 2)
        self._space = SwapSpace(config.num_swap_blocks, block_shape, np.float32)
        shape = (config.num_blocks, 1, config.block_size, 2)
        self.device_pool = jnp.zeros(shape, jnp.float32)

    def move(self, plan: StepPlan) -> None:
        self._space.settle()
        for block_ids, space_ids in transfers(plan.swap_outs):
            leaving = self._read((self.device_pool,), padded_ids(block_ids, 0))
            self._space.receive(space_ids, leaving)
        padded = np.zeros((16, 2), np.int32)
        padded[: len(plan.copies)] = np.reshape(plan.copies, (-1, 2))
        (self.device_pool,) = self._copy((self.device_pool,), padded, np.int32(len(plan.copies)))
        for space_ids, block_ids in transfers(plan.swap_ins):
            ids = padded_ids(block_ids, len(self.pool))
            (self.device_pool,) = self._put((self.device_pool,), ids, self._space.padded(space_ids))
        self.pool = np.asarray(self.device_pool)[:, 0, :, 0].astype(np.int64)

    def write(self, row: ScheduledRow) -> None:
        positions = np.arange(row.start, row.seq_len)
        blocks = self.tables[row.row, positions // self.block_size]
        slots = np.zeros(64, np.int32)  # the rest is padding, which goes to the null block
        slots[: len(positions)] = blocks * self.block_size + positions % self.block_size
        values = np.zeros((64, 1, 1), np.float32)
        values[: len(positions), 0, 0] = self.history(row.sequence, row.seq_len)[positions]
        self.device_pool = self._write(self.device_pool, values, -values, slots)
        self.pool = np.asarray(self.device_pool)[:, 0, :, 0].astype(np.int64)

    def history(self, sequence: TokenSequence, num_tokens: int) -> np.ndarray:
        """Numbers that float32 holds exactly."""
        return super().history(sequence, num_tokens) % 2**23


@pytest.mark.parametrize("num_swap_blocks", [0, 40])
def test_the_jitted_writes_copies_and_swaps_keep_every_history(num_swap_blocks: int):
    config = EngineConfig(
        block_size=8,
        num_blocks=11,
        max_num_seqs=5,
        max_num_batched_tokens=40,
        max_model_len=70,
        num_swap_blocks=num_swap_blocks,
    )
    scheduler = WatchedScheduler(config)
    scheduler.oracle = OracleOnDevice(config)
    busy_run(scheduler)
    assert scheduler.counters.copied_blocks > 0
    assert (scheduler.counters.swapped_in_blocks > 0) == (num_swap_blocks > 0)


PREFIX = make_prompt(29, seed=5)
STORY = "Once upon a time there was a little girl named Lily. She loved to play in the park and to"
STORIES = pathlib.Path(__file__).parents[3] / "shared" / "models" / "stories260k"


class Case(NamedTuple):
    """A model and five prompts, of which four begin alike; what is cached of each differs."""

    decoder: Decoder
    prompts: list[list[int]]

    def engine(self, **limits: Any) -> Engine:
        return make_engine(self.decoder, **limits)

    def requests(self, n: int = 1) -> list[Request]:
        return requests_of(self.prompts, n)


@pytest.fixture(scope="module", params=["tiny", "stories260k"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "tiny":
        tails = [make_prompt(length, seed=seed) for seed, length in enumerate((6, 4, 11, 13), 1)]
        return Case(tiny_decoder(seed=3), prompts_around(PREFIX, *tails))
    if not STORIES.is_dir():
        pytest.skip(f"no trained model in {STORIES}")
    with contextlib.closing(open_checkpoint(STORIES)) as checkpoint:
        assert checkpoint.tokenizer is not None
        prefix, *tails = (
            checkpoint.tokenizer.encode(text)
            for text in (STORY, " sing a song", " eat", " run with her big dog Max", "One day, Tom")
        )
        return Case(load_decoder(checkpoint, dtype=np.float32), prompts_around(prefix[:29], *tails))


def prompts_around(prefix: list[int], *tails: list[int]) -> list[list[int]]:
    first, second, third, other = tails
    return [
        [*prefix, *first],
        prefix[:24],  # whole blocks: the last is copied
        [*prefix[:21], *second],  # a block of which most begins alike
        [*prefix, *third],
        other,
    ]


def requests_of(prompts: Sequence[list[int]], n: int = 1) -> list[Request]:
    return [make_request(prompt, max_tokens=25, n=n) for prompt in prompts]


@pytest.fixture(scope="module")
def unshared(case: Case) -> tuple[list[np.ndarray], list[list[list[int]]]]:
    """Logits and tokens of each prompt when it runs alone, and nothing is cached."""
    engine = case.engine(enable_prefix_caching=False)
    logits, tokens = [], []
    for request in case.requests():
        logits += teacher_forced(engine, [request])
        tokens.append(generated(request))
    return logits, tokens


@pytest.mark.parametrize(
    ("num_blocks", "num_swap_blocks"),
    [(60, 0), (11, 0), (11, 40)],
    ids=["roomy", "preempting", "swapping"],
)
def test_cold_warm_and_preempted_outputs_are_those_of_prompts_alone(
    case: Case,
    unshared: tuple[list[np.ndarray], list[list[list[int]]]],
    num_blocks: int,
    num_swap_blocks: int,
):
    logits, tokens = unshared
    engine = case.engine(num_blocks=num_blocks, num_swap_blocks=num_swap_blocks)
    poison_between_steps(engine)
    for round_ in ("cold", "warm"):
        hits_before = engine.stats().hit_rate
        requests = case.requests()
        found = computed_logits(engine, requests)
        assert [generated(r) for r in requests] == tokens, round_
        for rows, expected in zip(found, logits, strict=True):
            for position, row in rows.items():
                assert_close(row, expected[position], TOLERANCES["float32"].logits, round_)
        assert engine.stats().hit_rate > hits_before
    stats = engine.stats()
    assert stats.copied_blocks > 0
    assert (stats.preemptions > 0) == (num_blocks == 11)
    assert (stats.swapped_in_blocks > 0) == (num_swap_blocks > 0)
    assert stats.blocks_swapped == 0


def test_forks_of_greedy_sampling_all_say_what_one_alone_says(
    case: Case,
    unshared: tuple[list[np.ndarray], list[list[list[int]]]],
):
    _, tokens = unshared
    engine = case.engine()
    poison_between_steps(engine)
    requests = case.requests(n=3)
    run_to_end(engine, requests)
    for request, (alone,) in zip(requests, tokens, strict=True):
        assert generated(request) == [alone] * 3
    assert engine.stats().copied_blocks > 0


def test_forks_draw_what_siblings_drew_without_sharing():
    drawn = []
    # With one row no sibling can begin when the prompt ends.
    for limits in ({}, {"max_num_seqs": 1, "enable_prefix_caching": False}):
        engine = tiny_engine(**limits)
        request = make_request(PREFIX, temperature=0.9, n=4, max_tokens=11, seed=8)
        run_to_end(engine, [request])
        drawn.append(generated(request))
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn[0]}) == 4


def test_a_long_cached_prefix_enters_its_table_in_several_goes(monkeypatch: pytest.MonkeyPatch):
    """More entries than a step's own batch and than one preparation hold."""
    monkeypatch.setattr(preparation, "MAX_UPDATES", 128)
    num_tokens = 8 * (128 + 90)
    engine = make_engine(
        tiny_decoder(seed=3),
        num_blocks=128 + 120,
        max_model_len=num_tokens + 100,
        max_num_batched_tokens=256,
    )
    prompt = make_prompt(num_tokens, seed=9)
    cold, warm = requests_of([prompt, prompt])
    run_to_end(engine, [cold])
    steps = engine.stats().steps
    run_to_end(engine, [warm])
    assert engine.stats().steps - steps == 25
    assert generated(cold) == generated(warm)


def poison_between_steps(engine: Engine) -> None:
    """Fills every slot that nobody owns with NaN, now and after each step: none may be seen."""
    step = engine.step

    def step_and_poison() -> list[TokenSequence]:
        ended = step()
        engine.runner.pool = poisoned(engine.runner.pool, ~owned_slots(engine))
        return ended

    engine.runner.pool = poisoned(engine.runner.pool, ~owned_slots(engine))
    engine.step = step_and_poison


def owned_slots(engine: Engine) -> np.ndarray:
    """Whether each slot, `[P, S]`, is cached or holds a token of a sequence that runs."""
    scheduler, size = engine.scheduler, engine.scheduler.config.block_size
    owned = np.zeros((scheduler.pool.num_blocks, size), bool)
    owned[[block for block in range(len(owned)) if block in scheduler.pool.cache]] = True
    for sequence in scheduler.running:
        positions = np.arange(sequence.num_computed_tokens)
        blocks = np.array(sequence.block_ids, np.int32)[positions // size]
        owned[blocks, positions % size] = True
    return owned


@functools.partial(jax.jit, donate_argnums=0)
def poisoned(pool: tuple[jax.Array, ...], unowned: Bool[jax.Array, "P S"]) -> tuple[jax.Array, ...]:
    """The pool with NaN in unowned slots. Compiles once per pool."""
    return jax.tree.map(lambda leaf: jnp.where(unowned[:, None, :, None], jnp.nan, leaf), pool)
