"""What the engine jits: a batch through the network, the pool and the sampler, and what serves it.

Nothing here has an array of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int32, PyTree

from jpaged.batch import batch_spec, packed_spec, sampling_spec, unpack
from jpaged.beams import MAX_CANDIDATES
from jpaged.buckets import Bucket
from jpaged.compilation import compiler_options
from jpaged.config import EngineConfig
from jpaged.devices import first_device
from jpaged.params import MAX_LOGPROBS
from jpaged.preparation import preparation_spec
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
)
from jpaged.sampling import TopLogprobs, sample, top_logprobs
from jpaged.shape_batch import shape_batch_spec, shape_start_spec
from jpaged.shaping import count_tokens, shape_logits, start_row, zero_shape
from jpaged.state import DeviceState, LogitShape, ShapeBatch, StepBatch
from jpaged.swap_space import MAX_MOVED
from jpaged_models import Decoder, ModelConfig, Phase, Pools, StepContext
from pallas_kernels import (
    Backend,
    PagedBatch,
    copy_blocks,
    pool_format,
    pool_shape,
    positions_of_tokens,
    read_blocks,
    rows_of_tokens,
    slots_of_tokens,
    write_blocks,
)

_NUM_TOP = {Outputs.LOGPROBS: MAX_LOGPROBS, Outputs.BEAMS: MAX_CANDIDATES}
_MOVED_IDS = jax.ShapeDtypeStruct((MAX_MOVED,), np.int32)


class StepOutput(NamedTuple):
    """A step's results on the device; rows as in the plan, padding after them."""

    tokens: Int32[Array, " B"]
    logprobs: TopLogprobs | None = None
    logits: Float[Array, "T V"] | None = None


class Step:
    """Defines the programs of one model, under one engine's limits.

    Holds no arrays: with an abstract decoder it compiles for a device that is not there.
    """

    def __init__(
        self, decoder: Decoder, config: EngineConfig, *, pool_dtype: DTypeLike, backend: Backend
    ) -> None:
        self.model: ModelConfig = decoder.config
        self.config = config
        self.pool_dtype = pool_dtype
        self.backend = backend
        # Split once: a module as a jit argument is flattened anew at each call.
        self._graph, params = nnx.split(decoder)
        leaves, self._params_tree = jax.tree.flatten(params)
        self.param_specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

    def abstract_params(self) -> PyTree:
        """The parameters' shapes and dtypes under their names; its leaves are `param_specs`."""
        return jax.tree.unflatten(self._params_tree, self.param_specs)

    @property
    def param_bytes(self) -> int:
        """Of all parameters."""
        return sum(spec.size * spec.dtype.itemsize for spec in self.param_specs)

    def zeros(self) -> tuple[Pools, DeviceState]:
        """A pool and a state that hold nothing."""
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

    def zero_shape(self) -> LogitShape:
        """What bends the logits, of rows that bend nothing."""
        return zero_shape(self.config.max_num_seqs, self.model.vocab_size)

    def define(self, program: Program) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """The jitted function of a program, and the shapes and dtypes of its arguments.

        What comes back anew is donated; only parameters and what the host sends are kept.
        """
        pools, state, shape = jax.eval_shape(lambda: (*self.zeros(), self.zero_shape()))
        layout = pool_format(self.backend)
        function: Callable[..., Any]
        kept, donated, sent, formats = [], [], [], None
        match program:
            case Zeros():
                function, formats = self.zeros, (layout, None)
            case ZeroShape():
                function = self.zero_shape
            case PlainStep(bucket, outputs):
                function = functools.partial(self._step, bucket=bucket, outputs=outputs)
                kept, donated = [self.param_specs], [pools, state]
                sent = [packed_spec(self._batch_spec(bucket))]
                formats = (layout, None, None)
            case ShapedStep(bucket, outputs):
                function = functools.partial(self._shaped_step, bucket=bucket, outputs=outputs)
                kept, donated = [self.param_specs], [pools, state, shape]
                sent = [packed_spec(self._shaped_batch_spec(bucket))]
                formats = (layout, None, None, None)
            case Prepare():
                function, donated = self._prepare, [pools, state]
                sent = [packed_spec(preparation_spec(self.config.max_num_seqs))]
                formats = (layout, None)
            case StartShape():
                function, donated = _start_shape, [shape]
                sent = [packed_spec(shape_start_spec())]
            case ReadBlocks():
                function, kept, sent = read_blocks, [pools], [_MOVED_IDS]
            case WriteBlocks():
                function = functools.partial(write_blocks, backend=self.backend)
                donated, formats = [pools], layout
                sent = [_MOVED_IDS, jax.eval_shape(read_blocks, pools, _MOVED_IDS)]
        arguments = (*kept, *donated, *sent)
        jitted = jax.jit(
            function,
            donate_argnums=tuple(range(len(kept), len(kept) + len(donated))),
            in_shardings=tuple(layout if spec is pools else None for spec in arguments),
            out_shardings=formats,
        )
        return jitted, arguments

    def lower(self, program: Program) -> jax.stages.Lowered:
        """The program, ready to be compiled."""
        jitted, specs = self.define(program)
        return jitted.lower(*specs)

    def compile(self, program: Program) -> jax.stages.Compiled:
        """The program's executable on the first device."""
        options = compiler_options(first_device().platform)
        return self.lower(program).compile(compiler_options=options)

    def _prepare(
        self, pools: Pools, state: DeviceState, packed: Int32[Array, " X"]
    ) -> tuple[Pools, DeviceState]:
        preparation = unpack(packed, preparation_spec(self.config.max_num_seqs))
        copies, count = preparation.copies, preparation.num_copies[0]
        pools = copy_blocks(pools, copies, count, backend=self.backend)
        tables = _enter(state.block_tables, preparation.table_updates)
        return pools, dataclasses.replace(state, block_tables=tables)

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
        decoder = self._decoder(params)
        batch = unpack(packed, self._batch_spec(bucket))
        hidden, pools, state = self._hidden(decoder, pools, state, batch, bucket)
        logits = decoder.logits(_last_tokens(hidden, batch, bucket))
        sampled, state = _sample(logits, state, batch)
        return pools, state, _output(decoder, hidden, logits, sampled, outputs)

    def _shaped_step(
        self,
        params: list[Array],
        pools: Pools,
        state: DeviceState,
        shape: LogitShape,
        packed: Int32[Array, " X"],
        *,
        bucket: Bucket,
        outputs: Outputs,
    ) -> tuple[Pools, DeviceState, LogitShape, StepOutput]:
        """As `_step`, but samples from bent logits, and counts what it sampled."""
        decoder = self._decoder(params)
        batch, shape_batch = unpack(packed, self._shaped_batch_spec(bucket))
        hidden, pools, state = self._hidden(decoder, pools, state, batch, bucket)
        logits = decoder.logits(_last_tokens(hidden, batch, bucket))
        sampled, state = _sample(shape_logits(logits, shape, shape_batch), state, batch)
        shape = count_tokens(shape, batch.sampled_row_ids, sampled)
        return pools, state, shape, _output(decoder, hidden, logits, sampled, outputs)

    def _batch_spec(self, bucket: Bucket) -> StepBatch:
        return batch_spec(bucket, self.config.block_size)

    def _shaped_batch_spec(self, bucket: Bucket) -> tuple[StepBatch, ShapeBatch]:
        return self._batch_spec(bucket), shape_batch_spec(bucket)

    def _decoder(self, params: list[Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._params_tree, params))

    def _hidden(
        self, decoder: Decoder, pools: Pools, state: DeviceState, batch: StepBatch, bucket: Bucket
    ) -> tuple[Float[Array, "T D"], Pools, DeviceState]:
        """The batch through the network: hidden states, the pool and the state after it."""
        state = _update_rows(state, batch)
        tokens, context = _context(
            batch, state, bucket, block_size=self.config.block_size, backend=self.backend
        )
        hidden, pools = decoder(tokens, pools, context)
        return hidden, pools, state


def _start_shape(shape: LogitShape, packed: Int32[Array, " X"]) -> LogitShape:
    return start_row(shape, unpack(packed, shape_start_spec()))


def _last_tokens(
    hidden: Float[Array, "T D"], batch: StepBatch, bucket: Bucket
) -> Float[Array, "B D"]:
    """The hidden states from which rows sample."""
    return hidden if bucket.phase is Phase.DECODE else hidden[batch.logit_tokens]


def _sample(
    logits: Float[Array, "B V"], state: DeviceState, batch: StepBatch
) -> tuple[Int32[Array, " B"], DeviceState]:
    """A token for each row, and the state that holds them."""
    rows = jax.tree.map(lambda leaf: leaf.at[batch.row_ids].get(mode="clip"), state.sampling)
    sampled = sample(logits, rows, batch.seq_lens)
    last_tokens = state.last_tokens.at[batch.sampled_row_ids].set(sampled, mode="drop")
    return sampled, dataclasses.replace(state, last_tokens=last_tokens)


def _output(
    decoder: Decoder,
    hidden: Float[Array, "T D"],
    logits: Float[Array, "B V"],
    sampled: Int32[Array, " B"],
    outputs: Outputs,
) -> StepOutput:
    num_top = _NUM_TOP.get(outputs)
    return StepOutput(
        sampled,
        None if num_top is None else top_logprobs(logits, sampled, num_top=num_top),
        decoder.logits(hidden) if outputs is Outputs.LOGITS else None,
    )


def _update_rows(state: DeviceState, batch: StepBatch) -> DeviceState:
    """The state with new rows started and new blocks entered."""
    tables = _enter(state.block_tables, batch.table_updates)
    sampling = jax.tree.map(
        lambda old, new: old.at[batch.new_row_ids].set(new, mode="drop"),
        state.sampling,
        batch.new_rows,
    )
    return dataclasses.replace(state, block_tables=tables, sampling=sampling)


def _enter(tables: Int32[Array, "R M"], updates: Int32[Array, "U 3"]) -> Int32[Array, "R M"]:
    """The tables with (row, column, block id) entries made; those of padding rows are dropped."""
    rows, columns, blocks = updates.T
    return tables.at[rows, columns].set(blocks, mode="drop")


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
