"""Attention by others from within PyTorch, at the shapes of the parts decode and prefill.

The method is the same with other means: a CUDA graph of calls over arrays that take turns,
replayed until it fills the time, between two events. What is not installed is named.
"""

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import decode, prefill
from benchmarks.gpu.decode import DecodeShape
from benchmarks.gpu.inputs import shuffled_tables
from benchmarks.gpu.prefill import PrefillShape
from benchmarks.gpu.settings import Record, Settings, describe
from benchmarks.gpu.timing import REPEATS, TARGET_S, num_turns, spread

BUILD_S = 60  # for FlashInfer to compile its kernel, while the others are measured

Attend = Callable[[int], Any]  # of which turn


def run(settings: Settings, record: Record) -> None:
    """Records each peer of each shape."""
    missing = [name for name in ("torch", "conch", "flashinfer") if not _is_installed(name)]
    for name in missing:
        record(name, {"ok": True, "error": f"{name} is not installed"})
    if "torch" in missing:
        return
    torch = _module("torch")

    torch.cuda.init()
    torch.manual_seed(settings.seed)
    shapes = decode.shapes_for(settings)
    build = threading.Thread(target=_build_flashinfer, args=(shapes,), daemon=True)
    if "flashinfer" not in missing:
        build.start()
    for shape in shapes:
        _attempt(record, f"{shape.name} sdpa", _sdpa_decode, shape, settings)
        if "conch" not in missing:
            _attempt(record, f"{shape.name} conch", _conch, shape, settings)
    for chunk in prefill.shapes_for(settings):
        _attempt(record, f"{chunk.name} sdpa", _sdpa_prefill, chunk, settings)
    if "flashinfer" not in missing:
        build.join(BUILD_S)
        for shape in shapes:
            _attempt(record, f"{shape.name} flashinfer", _flashinfer, shape, settings)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _module(name: str) -> Any:
    """One that is imported only where it is needed: torch alone takes seconds."""
    return importlib.import_module(name)


def _attempt(
    record: Record,
    name: str,
    prepare: Callable[..., tuple[Attend, int]],
    shape: DecodeShape | PrefillShape,
    settings: Settings,
) -> None:
    """A peer's time at one shape, or why it has none."""
    if not settings.lacks(name):
        return
    torch = _module("torch")

    record.begin(name)
    try:
        attend, turns = prepare(shape, settings.seed)
        samples = _time(attend, turns)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other peers still count
        record(name, {"ok": True, "error": describe(error)})
        return
    finally:
        torch.cuda.empty_cache()
    timing = spread(samples)
    if isinstance(shape, PrefillShape):
        rate = {"tflops": round(shape.causal_flops / timing["us"] / 1e6, 1)}
    else:
        rate = decode.bandwidth(shape, timing["us"], settings)
    record(name, {"ok": True, **timing, **rate})


def _time(attend: Attend, turns: int) -> list[float]:
    """Microseconds of a call, one sample a repeat."""
    torch = _module("torch")

    calls = max(16, turns)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(3):
            attend(turn % turns)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            attend(call % turns)

    def replay(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    replay(1)
    count = max(1, min(64, round(TARGET_S / replay(1))))
    return [replay(count) / (count * calls) * 1e6 for _ in range(REPEATS)]


def _random(*sizes: int) -> Any:
    torch = _module("torch")

    return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda")


def _turns_of(shape: DecodeShape) -> int:
    return num_turns(shape.kv_bytes)


def _pages(shape: DecodeShape, count: int) -> list:
    _, K, H = shape.heads
    blocks = shape.rows * -(-shape.context // shape.block_size)
    sizes = blocks, shape.block_size, K, H
    return [(_random(*sizes), _random(*sizes)) for _ in range(count)]


def _sdpa_decode(shape: DecodeShape, seed: int) -> tuple[Attend, int]:  # noqa: ARG001
    """Contiguous K and V."""
    torch = _module("torch")

    N, K, H = shape.heads
    turns = _turns_of(shape)
    q = _random(shape.rows, N, 1, H)
    sizes = shape.rows, K, shape.context, H
    caches = [(_random(*sizes), _random(*sizes)) for _ in range(turns)]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, enable_gqa=True, scale=shape.scale
    )
    return lambda turn: attend(q, *caches[turn]), turns


def _sdpa_prefill(shape: PrefillShape, seed: int) -> tuple[Attend, int]:  # noqa: ARG001
    """Contiguous K and V, the mask aligned with the end of the context."""
    torch = _module("torch")
    causal_lower_right = _module("torch.nn.attention.bias").causal_lower_right

    N, K, H = shape.heads
    q = _random(shape.rows, N, shape.queries, H)
    sizes = shape.rows, K, shape.context, H
    # Repeated to as many heads as q has: the biased path takes no groups.
    caches = [
        tuple(_random(*sizes).repeat_interleave(N // K, dim=1) for _ in range(2))
        for _ in range(prefill.TURNS)
    ]
    mask = causal_lower_right(shape.queries, shape.context)
    attend = torch.nn.functional.scaled_dot_product_attention
    return (
        lambda turn: attend(q, *caches[turn], attn_mask=mask, scale=shape.scale),
        prefill.TURNS,
    )


def _conch(shape: DecodeShape, seed: int) -> tuple[Attend, int]:
    """A paged kernel in Triton (conch-triton-kernels)."""
    torch = _module("torch")
    paged_attention = _module("conch.ops.attention.paged_attention").paged_attention

    N, _, H = shape.heads
    turns = _turns_of(shape)
    pools, q = _pages(shape, turns), _random(shape.rows, N, H)
    tables = torch.from_numpy(_tables(shape, seed)).cuda()
    lens = torch.full((shape.rows,), shape.context, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)

    def attend(turn: int) -> Any:
        return paged_attention(q, *pools[turn], tables, lens, output=out, scale=shape.scale)

    return attend, turns


def _flashinfer(shape: DecodeShape, seed: int) -> tuple[Attend, int]:
    """A paged kernel in CUDA C++ (flashinfer-python), planned once for all calls."""
    turns = _turns_of(shape)
    pools, q = _pages(shape, turns), _random(shape.rows, shape.heads[0], shape.heads[2])
    wrapper = _flashinfer_wrapper(shape, seed)
    return lambda turn: wrapper.run(q, pools[turn]), turns


def _flashinfer_wrapper(shape: DecodeShape, seed: int) -> Any:
    flashinfer = _module("flashinfer")
    torch = _module("torch")

    N, K, H = shape.heads
    columns = -(-shape.context // shape.block_size)
    indices = torch.from_numpy(_tables(shape, seed).reshape(-1)).cuda()
    starts = torch.arange(shape.rows + 1, dtype=torch.int32, device="cuda") * columns
    last = shape.context - (columns - 1) * shape.block_size
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=torch.empty_like(starts),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(starts[1:]),
    )
    wrapper.plan(
        starts,
        indices,
        torch.full_like(starts[1:], last),
        N,
        K,
        H,
        shape.block_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
        sm_scale=shape.scale,
    )
    return wrapper


def _build_flashinfer(shapes: list[DecodeShape]) -> None:
    """Compiles its kernel for each head size; what fails, fails again when it is measured."""
    for shape in {shape.heads[2]: shape for shape in shapes}.values():
        try:
            _flashinfer_wrapper(shape, seed=0)
        except Exception as error:  # noqa: BLE001
            print(f"flashinfer cannot be built: {describe(error)}", flush=True)


def _tables(shape: DecodeShape, seed: int) -> Any:
    """Without a null block."""
    return shuffled_tables(seed, shape.rows, shape.context, shape.block_size) - 1
