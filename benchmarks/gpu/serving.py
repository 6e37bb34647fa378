"""Requests of equal length through the whole engine on an 8B model's random weights.

All prompts are there at once, and every answer has as many tokens. `torch_serving` gives the same
to Transformers' continuous batching. `tokens_per_s` is of the whole, prompts included; `step_ms`
and `decode_tokens_per_s` are of the time in which every request decodes.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.parity import keep_largest_programs
from benchmarks.gpu.settings import Record, Settings
from benchmarks.gpu.step import random_decoder
from benchmarks.random_checkpoint import LLAMA_8B, TINY
from jpaged.config import EngineConfig
from jpaged.devices import first_device
from jpaged.engine import Engine
from jpaged.loading import engine_for
from jpaged.params import SamplingParams
from jpaged.requests import Request
from jpaged_models import config_from_hf
from pallas_kernels import Backend

DTYPE = jnp.bfloat16
BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The model, and the requests."""

    name: str
    config: dict
    requests: int
    prompt_len: int
    max_tokens: int
    max_num_batched_tokens: int

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids; no two prompts share a block."""
        shape = (self.requests, self.prompt_len)
        return np.random.default_rng(seed).integers(3, self.config["vocab_size"], shape).tolist()


LOADS = {
    "full": Load(
        name="Llama-8B 64 x 2048 + 160",
        config=LLAMA_8B,
        requests=64,
        prompt_len=2048,
        max_tokens=160,  # the first still decodes when the last prompt is computed
        max_num_batched_tokens=4096,
    ),
    "toy": Load(
        name="tiny 3 x 20 + 6",
        config=TINY,
        requests=3,
        prompt_len=20,
        max_tokens=6,
        max_num_batched_tokens=32,
    ),
}


def run(settings: Settings, record: Record) -> None:
    """Records the engine's rates; compiles first."""
    load = LOADS[settings.scale]
    name = f"{load.name} jpaged {settings.backend}"
    if not settings.lacks(name):
        return
    record.begin(name)
    engine = _engine(load, settings)
    _serve(engine, [prompt[:17] for prompt in load.prompts(settings.seed)], max_tokens=3)
    arrivals, seconds = _serve(engine, load.prompts(settings.seed + 1), max_tokens=load.max_tokens)
    engine.close()
    record(name, rates(arrivals, seconds))


def rates(arrivals: Sequence[Sequence[float]], seconds: float) -> dict:
    """Of the seconds at which each request's tokens came, and of the whole run's.

    Where the first request ends before the last begins, there is nothing to say of a step.
    """
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    steps = [
        later - earlier
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
        if begin <= earlier and later <= end
    ]
    joint = {}
    if steps:
        step = statistics.median(steps)
        joint = {
            "step_ms": round(step * 1e3, 2),
            "decode_tokens_per_s": round(len(arrivals) / step, 1),
        }
    return {
        "ok": True,
        **joint,
        "tokens_per_s": round(sum(map(len, arrivals)) / seconds, 1),
        "first_token_s": round(begin, 3),
        "seconds": round(seconds, 3),
    }


def _engine(load: Load, settings: Settings) -> Engine:
    longest = load.prompt_len + load.max_tokens
    limits = EngineConfig(
        block_size=BLOCK_SIZE,
        # One more for each request: as many are kept back from whoever would start in them.
        num_blocks=load.requests * (math.ceil(longest / BLOCK_SIZE) + 1) + 1,
        max_num_seqs=load.requests,
        max_num_batched_tokens=load.max_num_batched_tokens,
        max_model_len=longest,
    )
    engine = engine_for(
        random_decoder(config_from_hf(load.config), seed=settings.seed),
        None,
        limits,
        pool_dtype=DTYPE,
        backend=Backend(settings.backend),
        device=first_device(),
        memory_fraction=None,
    )
    keep_largest_programs(engine)
    engine.runner.warm_up()
    return engine


def _serve(
    engine: Engine, prompts: list[list[int]], *, max_tokens: int
) -> tuple[list[list[float]], float]:
    """Seconds from the start to each request's tokens, and to the last."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    arrivals: dict[str, list[float]] = {}
    for index, prompt in enumerate(prompts):
        request = Request(
            request_id=str(index), prompt=None, prompt_token_ids=prompt, params=params, seed=index
        )
        engine.scheduler.add(request)
        arrivals[request.request_id] = []
    while engine.scheduler.has_work:
        came = engine.step()
        now = time.perf_counter() - start
        for sequence in came:
            times = arrivals[sequence.request.request_id]
            if len(sequence.output_token_ids) > len(times):
                times.append(now)
    assert {len(times) for times in arrivals.values()} == {max_tokens}, "a request ended early"
    return list(arrivals.values()), time.perf_counter() - start
