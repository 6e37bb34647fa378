"""From a model's name and a caller's options to an engine that is ready to run."""

import contextlib
import dataclasses
import sys

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from jpaged.buckets import Buckets
from jpaged.compilation import enable_cache
from jpaged.config import EngineConfig
from jpaged.devices import Device, first_device
from jpaged.engine import Engine
from jpaged.memory import block_bytes, check_room, pool_bytes, swap_blocks
from jpaged.options import Options
from jpaged.programs import ShapedStep
from jpaged.runner import Runner
from jpaged.scheduler import Scheduler
from jpaged.step import Step
from jpaged_models import Checkpoint, Decoder, Tokenizer, load_decoder, open_checkpoint
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
        config, source = checkpoint.config, checkpoint.source
        longest = config.max_position_embeddings
        limits = options.limits(platform=device.platform, longest=longest)
        if limits.max_model_len > longest:
            raise ValueError(
                f"max_model_len={limits.max_model_len} exceeds the model's context of {longest} "
                "tokens; lower it, or leave it out"
            )
        weights_dtype = _dtype(options.dtype, checkpoint, device)
        # A bfloat16 scatter on a CPU converts the whole pool (JAX 0.10), so it stays float32.
        pool_dtype = jnp.float32 if device.platform == "cpu" else weights_dtype
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
        if options.num_blocks is not None:
            check_room(device, num_blocks=limits.num_blocks, size=size)
        tokenizer = checkpoint.tokenizer  # before the weights: it may be refused
        decoder = load_decoder(checkpoint, dtype=weights_dtype)
    engine = engine_for(
        decoder,
        tokenizer,
        limits,
        pool_dtype=pool_dtype,
        backend=backend,
        device=device,
        memory_fraction=options.memory_fraction if options.num_blocks is None else None,
    )
    return BuiltEngine(engine, source)


def engine_for(
    decoder: Decoder,
    tokenizer: Tokenizer | None,
    limits: EngineConfig,
    *,
    pool_dtype: DTypeLike,
    backend: Backend,
    device: Device,
    memory_fraction: float | None,
) -> Engine:
    """An engine over a decoder on `device`; sizes the pool where `memory_fraction` is given."""
    buckets = Buckets(
        max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens
    )
    if memory_fraction is not None:
        step = Step(decoder, limits, pool_dtype=pool_dtype, backend=backend)
        limits = _with_pool(step, buckets, device, memory_fraction)
    runner = Runner(decoder, limits, buckets, pool_dtype=pool_dtype, backend=backend)
    scheduler = Scheduler(limits, eos_token_ids=decoder.config.eos_token_ids)
    return Engine(scheduler, runner, tokenizer)


def _with_pool(
    step: Step, buckets: Buckets, device: Device, memory_fraction: float
) -> EngineConfig:
    """The step's limits with as many blocks as memory allows, and no more than could be used."""
    limits = step.config
    temporaries = _temporaries(step, buckets) if device.memory_stats() else 0
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
    analysis = step.lower(ShapedStep(buckets.all[0])).compile().memory_analysis()
    assert analysis is not None, "every device that knows its memory analyses its programs"
    own = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    shape = jax.tree.leaves(jax.eval_shape(step.zero_shape))
    return analysis.temp_size_in_bytes + own + sum(s.size * s.dtype.itemsize for s in shape)


def _dtype(name: str, checkpoint: Checkpoint, device: Device) -> DTypeLike:
    """The dtype of the weights; "auto" depends on the device and the checkpoint."""
    if name != "auto":
        return jnp.dtype(name)
    if device.platform == "cpu":
        return jnp.dtype("float32")
    wanted = jnp.dtype("bfloat16" if checkpoint.quantized else checkpoint.config.dtype)
    if device.platform == "tpu" and wanted == jnp.float16:
        return jnp.dtype("bfloat16")  # of 16 bits the only one that a TPU computes in
    capability = getattr(device, "compute_capability", None)
    has_bfloat16 = capability is None or float(capability) >= 8.0
    if wanted == jnp.bfloat16 and not has_bfloat16:
        return jnp.dtype("float16")
    return wanted
