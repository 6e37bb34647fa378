"""Figures that sentences quote are those of the result files, rounded as they stand."""

from collections.abc import Callable

import pytest

from benchmarks.gpu_figures import microseconds
from benchmarks.tabulate import RESULTS, Results, newest
from tests.docs.markdown import ROOT

Quote = Callable[[Results], str]


def attention(results: Results) -> str:
    ours, jnp, sdpa = (
        microseconds(results.h100, f"32/8/128 64 x 4096 {side}")
        for side in ("pallas-gpu", "contiguous", "sdpa")
    )
    return (
        f"takes {ours:.0f} microseconds paged. Over contiguous memory, on the same card in the "
        f"same run, `jax.numpy` takes {jnp:.0f} and PyTorch's SDPA {sdpa:.0f}: paged runs at "
        f"{jnp / ours:.2f} and {sdpa / ours:.2f} of their speed."
    )


def one_row(results: Results) -> str:
    ours, jnp = (
        microseconds(results.h100, f"32/8/128 1 x 1024 {side}")
        for side in ("pallas-gpu", "contiguous")
    )
    return f"one row of 1024 tokens takes {ours:.1f} microseconds a layer paged, and {jnp:.1f} by"


def alike_prompts(results: Results) -> str:
    sharing, not_sharing = rates_of(results, "system prompt")
    return (
        f"With one system prompt of 512 tokens, {sharing:.0f} tokens/s in place of "
        f"{not_sharing:.0f}."
    )


def several_answers(results: Results) -> str:
    rates = [rates_of(results, f"n = {n}") for n in (2, 4, 6)]
    times = sorted(with_it / without for with_it, without in rates)
    (chats,) = (
        found["sharing"]
        for found in results.cpu["memory", "float32"]["reports"]
        if "first_turn" in found["lengths"]
    )
    saved = [100 * found["measured"] for found in chats]
    return (
        f"{times[0]:.1f} to {times[-1]:.1f} times the tokens/s, and {saved[0]:.0f} to "
        f"{saved[-1]:.0f} % fewer blocks on first turns of chats."
    )


def arrivals(results: Results) -> str:
    sides = results.cpu["serving_sim", "float32"]["sides"]
    paged, unpaged = (sides[side]["highest_rate"] for side in ("paged", "unpaged"))
    most = [
        max(found["request_goodput"] for found in sides[side]["results"])
        for side in ("paged", "unpaged")
    ]
    return (
        f"was {paged:.2g} requests/s, against {unpaged:.3g} unpaged. There were only 32 requests, "
        "so at that rate no queue had time to grow: what was finished levels off at "
        f"{most[0]:.1f} requests/s, against {most[1]:.1f}."
    )


def one_user(results: Results) -> str:
    single = results.cpu["compare", "float32"]["sets"]["single"]
    theirs, ours = (single[side]["output_throughput"] for side in ("llama.cpp", "jpaged"))
    return f"llama.cpp made {theirs:.0f} tokens/s of one request in float32, jpaged {ours:.0f}."


def many_requests(results: Results) -> str:
    shares = [
        found["vllm"]["jpaged_of_it"]
        for report in results.beside_vllm.values()
        for name, found in report["sets"].items()
        if name != "single"
    ]
    return f"jpaged reaches {min(shares):.2f} to {max(shares):.2f} of its tokens/s"


def of_vllm(results: Results) -> str:
    low, high = [], []
    for dtype in ("float32", "bfloat16"):
        sets = results.beside_vllm["compare", dtype]["sets"].values()
        shares = [found["vllm"]["jpaged_of_it"] for found in sets]
        low.append(min(shares))
        high.append(max(shares))
    return (
        f"makes {low[0]:.2f} to {high[0]:.2f} of vLLM's tokens/s in float32 and {low[1]:.2f} to "
        f"{high[1]:.2f} in bfloat16"
    )


def plain_xla(results: Results) -> str:
    sides = results.cpu["throughput", "float32"]["sides"]
    ratio = sides["paged xla"]["tokens_per_s"] / sides["unpaged"]["tokens_per_s"]
    return f"With plain XLA attention jpaged is {ratio:.1f} times as fast as the baseline"


def whole_step(results: Results) -> str:
    found = gpu_result(results, "step", "Llama-8B 64 x 2048 pallas-gpu")
    return f"takes {found['whole_ms']:.1f} ms ({found['tokens_per_s']:,.0f} tokens/s;"


def smol_step(results: Results) -> str:
    found = gpu_result(results, "step", "SmolLM2-135M 64 x 1024 pallas-gpu")
    return f"a step takes {found['whole_ms']:.1f} ms, {found['ms']:.1f} of them the device's."


def served(results: Results) -> str:
    ours = gpu_result(results, "serving", "Llama-8B 64 x 2048 + 160 jpaged pallas-gpu")
    other = gpu_result(results, "torch_serving", "Llama-8B 64 x 2048 + 160 transformers 5.17.0")
    return (
        f"it makes {ours['tokens_per_s']:,.0f} tokens/s, and once all decode "
        f"{ours['decode_tokens_per_s']:,.0f}; Transformers 5.17's continuous batching, on that "
        f"card in the same run, {other['tokens_per_s']:.0f} and "
        f"{other['decode_tokens_per_s']:.0f}."
    )


def loading(results: Results) -> str:
    ratios = [found["ratio"] for found in results.cpu["load_memory", "float32"]["rows"]]
    return f"{min(ratios):.2f} to {max(ratios):.2f} times its weights of host memory"


def memory(results: Results) -> str:
    traces = results.cpu["memory", "float32"]["reports"]
    waste = [100 * found["waste"] for found in traces]
    slabs = [100 * found["maximum_wastes"] for found in traces]
    sharing, not_sharing = rates_of(results, "system prompt")
    return (
        f"blocks of 16 waste {min(waste):.1g} to {max(waste):.2g} % of their slots; slabs of the "
        f"longest request waste {min(slabs):.0f} to {max(slabs):.0f} %. One system prompt of 512 "
        f"tokens, cached, makes {sharing / not_sharing:.1f} times the tokens/s."
    )


QUOTES: list[tuple[str, Quote]] = [
    *(("README.md", quote) for quote in (of_vllm, plain_xla, memory)),
    *(("README.md", quote) for quote in (whole_step, smol_step, served)),
    *(("docs/when.md", quote) for quote in (attention, one_row, alike_prompts, several_answers)),
    *(("docs/when.md", quote) for quote in (arrivals, one_user, many_requests)),
    ("docs/benchmarks.md", served),
    ("docs/howto/weights.md", loading),
]


def rates_of(results: Results, work: str) -> list[float]:
    (pair,) = (pair for pair in results.cpu["savings", "float32"]["pairs"] if pair["work"] == work)
    return [side["tokens_per_s"] for side in pair["sides"].values()]


def gpu_result(results: Results, part: str, name: str) -> dict:
    return results.h100[-1]["parts"][part]["results"][name]


@pytest.mark.parametrize(("page", "quote"), QUOTES)
def test_a_sentence_quotes_the_newest_result(page: str, quote: Quote):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert quote(newest(RESULTS)) in text
