"""From a model's name and a caller's options to an engine that is ready to run."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from jpaged.ahead import Ahead
from jpaged.buckets import Buckets
from jpaged.compilation import enable_cache
from jpaged.config import EngineConfig
from jpaged.devices import Device, first_device
from jpaged.engine import Engine
from jpaged.memory import (
    block_bytes,
    check_room,
    pool_bytes,
    return_freed_memory,
    swap_blocks,
)
from jpaged.options import Options
from jpaged.programs import Program, ShapedStep, common_programs
from jpaged.runner import Runner
from jpaged.scheduler import Scheduler
from jpaged.step import Step
from jpaged_models import (
    Checkpoint,
    Decoder,
    Tokenizer,
    abstract_decoder,
    load_decoder,
    open_checkpoint,
)
from pallas_kernels import Backend, check_pool_of, choose_backend


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine, and what was loaded into it."""

    engine: Engine
    source: str


def build_engine(options: Options) -> BuiltEngine:
    """An engine for a checkpoint; what its files or the device refuse is told before they load."""
    device = first_device()
    enable_cache()
    backend = choose_backend(options.attention_backend, device.platform)
    with contextlib.closing(
        open_checkpoint(options.model, revision=options.revision)
    ) as checkpoint:
        plan = _plan(options, checkpoint, device, backend)
        tokenizer = checkpoint.tokenizer  # before the weights: it may be refused
        decoder, programs = _load(checkpoint, plan, options)
    engine = engine_for(
        decoder,
        tokenizer,
        plan.limits,
        pool_dtype=plan.pool_dtype,
        backend=backend,
        device=device,
        memory_fraction=plan.memory_fraction,
        programs=programs,
    )
    return BuiltEngine(engine, checkpoint.source)


def engine_for(
    decoder: Decoder,
    tokenizer: Tokenizer | None,
    limits: EngineConfig,
    *,
    pool_dtype: DTypeLike,
    backend: Backend,
    device: Device,
    memory_fraction: float | None,
    programs: Mapping[Program, jax.stages.Compiled] | None = None,
) -> Engine:
    """An engine over a decoder on `device`; sizes the pool where `memory_fraction` is given."""
    buckets = _buckets(limits)
    if memory_fraction is not None:
        step = Step(decoder, limits, pool_dtype=pool_dtype, backend=backend)
        temporaries = _temporaries(step, buckets) if device.memory_stats() else 0
        limits = _with_pool(step, device, memory_fraction, temporaries=temporaries)
    runner = Runner(
        decoder, limits, buckets, pool_dtype=pool_dtype, backend=backend, programs=programs
    )
    scheduler = Scheduler(limits, eos_token_ids=decoder.config.eos_token_ids)
    return Engine(scheduler, runner, tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is decided before the weights are loaded.

    `memory_fraction` is given where the pool's size waits for them, as an accelerator's does, whose
    memory they share. `step` is there where it does not wait, and can be compiled at once.
    """

    weights_dtype: DTypeLike
    pool_dtype: DTypeLike
    limits: EngineConfig
    memory_fraction: float | None
    step: Step | None


def _plan(options: Options, checkpoint: Checkpoint, device: Device, backend: Backend) -> _Plan:
    """Raises ValueError for what the model or the device does not allow."""
    config = checkpoint.config
    longest = config.context_length
    limits = options.limits(platform=device.platform, longest=longest)
    if limits.max_model_len > longest:
        raise ValueError(
            f"max_model_len={limits.max_model_len} exceeds the model's context of {longest} "
            "tokens; lower it, or leave it out"
        )
    weights_dtype = _weights_dtype(options.dtype, config.dtype, device)
    pool_dtype = _pool_dtype(weights_dtype, device, backend)
    check_pool_of(
        backend,
        block_size=limits.block_size,
        dtype=pool_dtype,
        head_size=config.head_size,
        queries_per_head=config.group_size,
    )
    size = block_bytes(config, block_size=limits.block_size, dtype=pool_dtype, backend=backend)
    num_swap_blocks = swap_blocks(options.swap_space, size=size)
    limits = dataclasses.replace(limits, num_swap_blocks=num_swap_blocks)
    fraction = options.memory_fraction if options.num_blocks is None else None
    if fraction is None:
        check_room(device, num_blocks=limits.num_blocks, size=size)
    dtypes = {"weights_dtype": weights_dtype, "pool_dtype": pool_dtype}
    if device.memory_stats():
        return _Plan(**dtypes, limits=limits, memory_fraction=fraction, step=None)
    decoder = abstract_decoder(config, dtype=weights_dtype)
    if fraction is not None:
        step = Step(decoder, limits, pool_dtype=pool_dtype, backend=backend)
        limits = _with_pool(step, device, fraction, to_come=step.param_bytes)
    step = Step(decoder, limits, pool_dtype=pool_dtype, backend=backend)
    return _Plan(**dtypes, limits=limits, memory_fraction=None, step=step)


def _load(
    checkpoint: Checkpoint, plan: _Plan, options: Options
) -> tuple[Decoder, dict[Program, jax.stages.Compiled]]:
    """The weights, and the programs that were compiled meanwhile, before there is a pool.

    So what the compiler takes is free again when the pool is made.
    """
    if plan.step is None or not options.warm_up:
        return load_decoder(checkpoint, dtype=plan.weights_dtype), {}
    ahead = Ahead(plan.step.compile, common_programs(plan.limits, _buckets(plan.limits)))
    decoder = None
    try:
        decoder = load_decoder(checkpoint, dtype=plan.weights_dtype)
        programs = ahead.finish(progress=options.use_tqdm)
    except BaseException:  # whoever keeps the traceback would keep the weights
        ahead.cancel()
        for leaf in jax.tree.leaves(nnx.state(decoder)) if decoder else ():
            leaf.delete()
        raise
    return_freed_memory()
    return decoder, programs


def _pool_dtype(weights_dtype: DTypeLike, device: Device, backend: Backend) -> DTypeLike:
    """The weights', but for a CPU's where XLA would write: its scatter converts the whole pool."""
    is_moved_as_it_is = backend is Backend.CPU and weights_dtype == jnp.bfloat16
    return jnp.float32 if device.platform == "cpu" and not is_moved_as_it_is else weights_dtype


def _buckets(limits: EngineConfig) -> Buckets:
    return Buckets(
        max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens
    )


def _with_pool(
    step: Step, device: Device, memory_fraction: float, *, temporaries: int = 0, to_come: int = 0
) -> EngineConfig:
    """The step's limits with as many blocks as memory allows, and no more than could be used."""
    limits = step.config
    size = block_bytes(
        step.model,
        block_size=limits.block_size,
        dtype=step.pool_dtype,
        backend=step.backend,
    )
    wanted = limits.max_num_seqs * limits.max_blocks_per_seq + 1
    granted = pool_bytes(
        device,
        memory_fraction=memory_fraction,
        temporaries=temporaries,
        least=2 * size,
        wanted=wanted * size,
        to_come=to_come,
    )
    num_blocks = granted // size
    print(
        f"jpaged: pool of {num_blocks} blocks of {limits.block_size} tokens, "
        f"{num_blocks * size / 2**30:.2f} GiB on {device.platform}",
        file=sys.stderr,
    )
    return dataclasses.replace(limits, num_blocks=num_blocks)


def _temporaries(step: Step, buckets: Buckets) -> int:
    """Bytes of the largest step beside weights and pool, whose size does not matter to it.

    It bends logits, as any request may ask for, and so holds what bends them.
    """
    analysis = step.compile(ShapedStep(buckets.all[0])).memory_analysis()
    assert analysis is not None, "every device that knows its memory analyses its programs"
    own = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    shape = jax.tree.leaves(jax.eval_shape(step.zero_shape))
    return analysis.temp_size_in_bytes + own + sum(s.size * s.dtype.itemsize for s in shape)


def _weights_dtype(name: str, own: str, device: Device) -> DTypeLike:
    """The dtype that `name` asks for; "auto" is the checkpoint's own where the device has it."""
    if name != "auto":
        return jnp.dtype(name)
    if device.platform == "cpu":
        return jnp.dtype("float32")
    wanted = jnp.dtype(own)
    if device.platform == "tpu" and wanted == jnp.float16:
        return jnp.dtype("bfloat16")  # of 16 bits the only one that a TPU computes in
    capability = getattr(device, "compute_capability", None)
    has_bfloat16 = capability is None or float(capability) >= 8.0
    if wanted == jnp.bfloat16 and not has_bfloat16:
        return jnp.dtype("float16")
    return wanted
