"""Owns what lives on the device: parameters, pool, state and the compiled programs."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike, PyTree

from jpaged.ahead import Ahead
from jpaged.batch import pack_batch, table_updates
from jpaged.buckets import Bucket, Buckets
from jpaged.config import EngineConfig
from jpaged.new_weights import copied
from jpaged.plan import ScheduledRow, StepPlan
from jpaged.preparation import pack_preparations
from jpaged.programs import (
    Outputs,
    PlainStep,
    Prepare,
    Program,
    ReadBlocks,
    ShapedStep,
    StartShape,
    WriteBlocks,
    Zeros,
    ZeroShape,
    common_programs,
)
from jpaged.shape_batch import pack_shape_batch, pack_shape_starts, shaping_rows
from jpaged.state import LogitShape
from jpaged.step import Step, StepOutput
from jpaged.swap_space import SwapSpace, padded_ids, transfers
from jpaged_models import Decoder
from pallas_kernels import NULL_BLOCK, Backend


class Runner:
    """Runs plans over the device arrays.

    Pool and state are donated to every step and rebound to its results: exactly one live copy of
    each. Programs compile once, the common ones in `warm_up`. `shape`, what bends the logits, and
    the programs that read it come into being with the first request for them.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        buckets: Buckets,
        *,
        pool_dtype: DTypeLike,
        backend: Backend,
        programs: Mapping[Program, jax.stages.Compiled] | None = None,
    ) -> None:
        self.config = config
        self.buckets = buckets
        self.model = decoder.config
        self.step = Step(decoder, config, pool_dtype=pool_dtype, backend=backend)
        self.params = jax.tree.leaves(nnx.split(decoder)[1])
        self.programs: dict[Program, jax.stages.Compiled] = dict(programs or {})
        self.shape: LogitShape | None = None
        self.lazy_compiles = 0
        self._is_mixed = False
        self._zeros = self.compile(Zeros())
        self.pool, self.state = self._zeros()
        self.swap_space = self._empty_space()

    def reset(self) -> None:
        """A zero pool and an empty state in place of what is left of the old ones."""
        # Before the new ones are made: both would not fit.
        _delete((self.pool, self.state, self.shape))
        self.shape = None  # until a request needs it again
        self.swap_space = self._empty_space()  # nobody will come back for what lay there
        self.pool, self.state = self._zeros()

    def replace_params(self, params: nnx.State) -> None:
        """Takes copies of other parameters, which have been checked, in place of its own.

        Whatever ends it early, no step runs until it is done again: half of them are the old ones.
        """
        self._is_mixed = True
        for i, (leaf, spec) in enumerate(
            zip(jax.tree.leaves(params), self.step.param_specs, strict=True)
        ):
            old, self.params[i] = self.params[i], copied(leaf, spec)
            old.delete()  # one by one: all of both might not fit
        self._is_mixed = False

    def run(self, plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        """The plan's results, still on the device. If it raises, pool and state may be gone."""
        if self._is_mixed:
            raise RuntimeError("update_weights was cut short; call it again, to its end")
        bucket = self.buckets.fit(plan)
        updates = table_updates(plan)
        num_own = bucket.num_table_updates(self.config.block_size)
        self._swap_out(plan)
        self._prepare(plan.copies, updates[num_own:])
        self._swap_in(plan)
        packed = pack_batch(
            plan,
            bucket,
            updates[:num_own],
            block_size=self.config.block_size,
            padding_row=self.config.max_num_seqs,
            eos_token_ids=self.model.eos_token_ids,
        )
        if rows := shaping_rows(plan):
            self._start_shapes(rows)
            return self._run_shaped(plan, bucket, packed, outputs)
        program = self._program(PlainStep(bucket, outputs))
        self.pool, self.state, out = program(self.params, self.pool, self.state, packed)
        return out

    def warm_up(self, *, progress: bool = False) -> None:
        """Compiles every common program that is not there yet, on as many threads as help."""
        common = common_programs(self.config, self.buckets)
        missing = [program for program in common if program not in self.programs]
        self.programs |= Ahead(self.compile, missing).finish(progress=progress)

    def compile(self, program: Program) -> jax.stages.Compiled:
        """The executable of a program; its `memory_analysis()` is exact."""
        return self.step.compile(program)

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self.programs)

    @property
    def is_lost(self) -> bool:
        """Whether a failed step took the pool or any state with it; waits for the device."""
        arrays = jax.tree.leaves((self.pool, self.state, self.shape))
        if any(array.is_deleted() for array in arrays):
            return True
        try:
            jax.block_until_ready(arrays)
        except jax.errors.JaxRuntimeError:  # of the step that should have brought them
            return True
        return False

    def close(self) -> None:
        """Deletes the device arrays at once, whoever still refers to them."""
        _delete((self.params, self.pool, self.state, self.shape))
        self.programs.clear()

    def _empty_space(self) -> SwapSpace:
        _, *block_shape = self.pool[0].shape
        shape = (len(self.pool), *block_shape)
        return SwapSpace(self.config.num_swap_blocks, shape, self.pool[0].dtype)

    def _swap_out(self, plan: StepPlan) -> None:
        """Reads the blocks that leave, before anything writes to them."""
        self.swap_space.settle()
        for block_ids, space_ids in transfers(plan.swap_outs):
            read = self._program(ReadBlocks())
            blocks = read(self.pool, padded_ids(block_ids, NULL_BLOCK))
            self.swap_space.receive(space_ids, blocks)

    def _swap_in(self, plan: StepPlan) -> None:
        """Writes the blocks that come back. What leaves in the same step is not here yet."""
        for space_ids, block_ids in transfers(plan.swap_ins):
            write = self._program(WriteBlocks())
            ids = padded_ids(block_ids, self.config.num_blocks)  # which is out of range: dropped
            self.pool = write(self.pool, ids, self.swap_space.padded(space_ids))

    def _prepare(
        self, copies: tuple[tuple[int, int], ...], updates: list[tuple[int, int, int]]
    ) -> None:
        """Copies blocks and enters what the step's own batch has no room for."""
        for packed in pack_preparations(copies, updates, max_num_seqs=self.config.max_num_seqs):
            prepare = self._program(Prepare())
            self.pool, self.state = prepare(self.pool, self.state, packed)

    def _start_shapes(self, rows: list[ScheduledRow]) -> None:
        """Enters what bends the logits of rows that start, of all where there was no state yet."""
        is_late = self.shape is None
        if self.shape is None:
            self.shape = self._program(ZeroShape())()
        start = self._program(StartShape())
        limits = {"padding_row": self.config.max_num_seqs, "vocab_size": self.model.vocab_size}
        for row in rows:
            if is_late or row.is_new:
                for packed in pack_shape_starts(row, **limits):
                    self.shape = start(self.shape, packed)

    def _run_shaped(
        self, plan: StepPlan, bucket: Bucket, packed: np.ndarray, outputs: Outputs
    ) -> StepOutput:
        """The plan's results where some of its rows have their logits bent."""
        program = self._program(ShapedStep(bucket, outputs))
        beside = pack_shape_batch(plan, bucket, padding_row=self.config.max_num_seqs)
        self.pool, self.state, self.shape, out = program(
            self.params, self.pool, self.state, self.shape, np.concatenate([packed, beside])
        )
        return out

    def _program(self, program: Program) -> jax.stages.Compiled:
        """The executable, compiled now if it is one of the rare ones."""
        if program not in self.programs:
            self.programs[program] = self.compile(program)
            self.lazy_compiles += 1
        return self.programs[program]


def _delete(arrays: PyTree) -> None:
    for array in jax.tree.leaves(arrays):
        if not array.is_deleted():
            array.delete()
