"""A part's results as a few short lines."""

_FIGURES = (  # of a result, in this order, where it has them
    ("us", "{:.1f} us"),
    ("gbps", "{:.0f} GB/s"),
    ("of_ceiling", "{:.1%} of read"),
    ("tflops", "{:.0f} TFLOP/s"),
    ("ms", "{:.2f} ms"),
    ("floor_ms", "floor {:.2f} ms"),
    ("of_floor", "{:.2f}x floor"),
    ("step_ms", "{:.2f} ms a step"),
    ("decode_tokens_per_s", "{:.0f} tokens/s then"),
    ("tokens_per_s", "{:.0f} tokens/s"),
    ("same_tokens", "{:.1%} same"),
    ("busy_ms", "{:.2f} ms busy"),
    ("kernels", "in {:.0f} kernels"),
    ("kinds", "{}"),
    ("config", "{}"),
)


def part_lines(part: str, found: dict) -> list[str]:
    """A headline, then a line for each figure; what only passed is counted."""
    results = found["results"]
    seconds = f", {found['seconds']:.0f} s" if "seconds" in found else ""
    failed = {name: result for name, result in results.items() if not result.get("ok", True)}
    headline = f"-- {part}: {found['status']}{seconds}, {len(results) - len(failed)} ok"
    lines = [headline + (f", {len(failed)} FAILED" if failed else "")]
    if "error" in found:
        lines.append(f"   {found['error'][:300]}")
    for name, result in results.items():
        if name in failed:
            lines.append(f"   FAILED {name}: {_reason(result)}{_age(result)}")
        elif figures := _figures(result):
            lines.append(f"   {name}: {figures}{_age(result)}")
        elif "error" in result:
            lines.append(f"   {name}: none: {result['error'][:90]}")
    errors = [result["error_norm"] for result in results.values() if "error_norm" in result]
    if errors:
        lines.append(f"   largest error {max(map(float, errors)):.1e} of the norm")
    return lines


def _age(result: dict) -> str:
    """Of what a result is that an earlier run left."""
    origin = result.get("origin")
    return "" if origin is None else f" (of {origin['commit']}, {origin['date']})"


def _figures(result: dict) -> str:
    figures = [form.format(result[name]) for name, form in _FIGURES if name in result]
    if result.get("us"):
        figures.append(f"+-{(result['max_us'] - result['min_us']) / result['us'] / 2:.1%}")
    return " ".join(figures)


def _reason(result: dict) -> str:
    numbers = {k: v for k, v in result.items() if k in ("error_norm", "worst_token", "bound")}
    return f"{result.get('error', '')} {numbers or ''}".strip()[:300]
