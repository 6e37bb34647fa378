"""The device's side of a step: parameters, pool, state, and the one jitted function over them."""

import dataclasses
import enum
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32

from jpaged.batch import pack_batch, packed_size, sampling_spec, unpack_batch
from jpaged.buckets import Bucket, Buckets
from jpaged.config import EngineConfig
from jpaged.plan import StepPlan
from jpaged.sampling import TopLogprobs, sample, top_logprobs
from jpaged.state import DeviceState, StepBatch
from jpaged_models import Decoder, Phase, Pools, StepContext
from pallas_kernels import (
    Backend,
    PagedBatch,
    pool_shape,
    positions_of_tokens,
    rows_of_tokens,
    slots_of_tokens,
)


class Outputs(enum.Enum):
    """What a step returns beside the tokens; all but TOKENS are compiled when asked for."""

    TOKENS = "tokens"
    LOGPROBS = "logprobs"
    LOGITS = "logits"  # of every token, for tests: [T, V]


class StepOutput(NamedTuple):
    """A step's results on the device; rows as in the plan, padding after them."""

    tokens: Int32[Array, " B"]
    logprobs: TopLogprobs | None = None
    logits: Float[Array, "T V"] | None = None


class Runner:
    """Owns the device arrays, and runs plans.

    Pool and state are donated to every step and rebound to its results: exactly one live copy of
    each. Steps compile once per (bucket, outputs), all common ones in `warm_up`.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        buckets: Buckets,
        *,
        pool_dtype: DTypeLike,
        backend: Backend,
    ) -> None:
        self.config = config
        self.buckets = buckets
        self.backend = backend
        self.model = decoder.config
        self.pool_dtype = pool_dtype
        # Split once: a module as a jit argument is flattened anew at each call.
        self._graph, params = nnx.split(decoder)
        self.params, self._params_tree = jax.tree.flatten(params)
        self.programs: dict[tuple[Bucket, Outputs], jax.stages.Compiled] = {}
        self.lazy_compiles = 0
        self.reset()

    def reset(self) -> None:
        """A zero pool and an empty state in place of whatever was there."""
        self.pool = self.state = None  # free the old before making the new
        self.pool, self.state = jax.jit(self._zeros)()

    def run(self, plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        """The plan's results, still on the device. If it raises, pool and state may be gone."""
        bucket = self.buckets.fit(plan)
        packed = pack_batch(
            plan,
            bucket,
            block_size=self.config.block_size,
            padding_row=self.config.max_num_seqs,
            eos_token_ids=self.model.eos_token_ids,
        )
        program = self._program(bucket, outputs)
        self.pool, self.state, out = program(self.params, self.pool, self.state, packed)
        return out

    def warm_up(self, *, progress: bool = False) -> None:
        """Compiles every common program, on as many threads as help."""
        from tqdm import tqdm

        missing = [b for b in self.buckets.all if (b, Outputs.TOKENS) not in self.programs]
        with ThreadPoolExecutor(max_workers=4) as threads:
            compiled = threads.map(lambda bucket: self.compile(bucket), missing)
            bar = tqdm(compiled, "compiling", len(missing), disable=not progress, leave=False)
            for bucket, program in zip(missing, bar, strict=True):
                self.programs[bucket, Outputs.TOKENS] = program

    def compile(self, bucket: Bucket, outputs: Outputs = Outputs.TOKENS) -> jax.stages.Compiled:
        """The step's executable for a bucket; its `memory_analysis()` is exact."""
        size = packed_size(bucket, self.config.block_size)
        pool, state = jax.eval_shape(self._zeros)
        packed = jax.ShapeDtypeStruct((size,), np.int32)
        return self._jitted(bucket, outputs).lower(self.params, pool, state, packed).compile()

    @property
    def is_lost(self) -> bool:
        """Whether a failed step took the pool or the state with it."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.pool, self.state)))

    def close(self) -> None:
        """Deletes the device arrays at once, whoever still refers to them."""
        for leaf in jax.tree.leaves((self.params, self.pool, self.state)):
            leaf.delete()
        self.programs.clear()

    def _program(self, bucket: Bucket, outputs: Outputs) -> jax.stages.Compiled:
        if (bucket, outputs) not in self.programs:
            self.programs[bucket, outputs] = self.compile(bucket, outputs)
            self.lazy_compiles += 1
        return self.programs[bucket, outputs]

    def _jitted(self, bucket: Bucket, outputs: Outputs) -> jax.stages.Wrapped:
        step = functools.partial(self._step, bucket=bucket, outputs=outputs)
        return jax.jit(step, donate_argnums=(1, 2))

    def _zeros(self) -> tuple[Pools, DeviceState]:
        config, model = self.config, self.model
        R = config.max_num_seqs
        shape = pool_shape(
            num_blocks=config.num_blocks,
            num_kv_heads=model.num_kv_heads,
            block_size=config.block_size,
            head_size=model.head_size,
        )
        pools = tuple(jnp.zeros(shape, self.pool_dtype) for _ in range(model.num_layers))
        sampling = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sampling_spec(R))
        tables = jnp.zeros((R, config.max_blocks_per_seq), jnp.int32)
        return pools, DeviceState(tables, jnp.zeros(R, jnp.int32), sampling)

    def _step(
        self,
        params: list[Array],
        pools: Pools,
        state: DeviceState,
        packed: Int32[Array, " X"],
        *,
        bucket: Bucket,
        outputs: Outputs,
    ) -> tuple[Pools, DeviceState, StepOutput]:
        """One step. Compiles once per (bucket, outputs)."""
        decoder = nnx.merge(self._graph, jax.tree.unflatten(self._params_tree, params))
        batch = unpack_batch(packed, bucket, self.config.block_size)
        state = _update_rows(state, batch)
        tokens, context = _context(
            batch,
            state,
            bucket,
            block_size=self.config.block_size,
            backend=self.backend,
        )
        hidden, pools = decoder(tokens, pools, context)
        last_B = jnp.maximum(batch.query_starts[1:] - 1, 0)
        logits = decoder.logits(hidden if bucket.phase is Phase.DECODE else hidden[last_B])
        rows = jax.tree.map(
            lambda x: jnp.take(x, batch.row_ids, axis=0, mode="clip"), state.sampling
        )
        sampled = sample(logits, rows, batch.seq_lens)
        last_tokens = state.last_tokens.at[batch.sampled_row_ids].set(sampled, mode="drop")
        state = dataclasses.replace(state, last_tokens=last_tokens)
        out = StepOutput(
            sampled,
            top_logprobs(logits, sampled) if outputs is Outputs.LOGPROBS else None,
            decoder.logits(hidden) if outputs is Outputs.LOGITS else None,
        )
        return pools, state, out


def _update_rows(state: DeviceState, batch: StepBatch) -> DeviceState:
    """The state with new rows started and new blocks entered."""
    tables = state.block_tables.at[batch.new_row_ids].set(0, mode="drop")
    rows, columns, blocks = batch.table_updates.T
    tables = tables.at[rows, columns].set(blocks, mode="drop")
    sampling = jax.tree.map(
        lambda old, new: old.at[batch.new_row_ids].set(new, mode="drop"),
        state.sampling,
        batch.new_rows,
    )
    return dataclasses.replace(state, block_tables=tables, sampling=sampling)


def _context(
    batch: StepBatch,
    state: DeviceState,
    bucket: Bucket,
    *,
    block_size: int,
    backend: Backend,
) -> tuple[Int32[Array, " T"], StepContext]:
    """The step's tokens, those that the device sampled filled in, and where each one belongs."""
    tables = state.block_tables.at[batch.row_ids].get(mode="fill", fill_value=0)
    paged = PagedBatch(tables, batch.query_starts, batch.seq_lens, batch.num_decodes[0])
    rows = rows_of_tokens(paged, bucket.num_tokens)
    positions = positions_of_tokens(paged, rows)
    slots = slots_of_tokens(paged, rows, positions, block_size=block_size)
    last_B = state.last_tokens.at[batch.row_ids].get(mode="fill", fill_value=0)
    last_T = last_B.at[rows].get(mode="fill", fill_value=0)
    tokens = jnp.where(batch.tokens < 0, last_T, batch.tokens)
    return tokens, StepContext(paged, positions, slots, bucket.phase, backend)
