"""RoPE's frequencies (Su et al., arXiv 2104.09864), and how a config.json has them stretched."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jpaged_models.config_values import float_of, int_of, listed, object_of

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are stretched; what follows `factor` is of the kind it names.

    `attention_factor`, 1 for the other kinds, multiplies cosines and sines.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0  # llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn: turns within the original context
    beta_slow: float = 1.0
    is_truncated: bool = True  # whether the lanes between them are whole ones
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS[1:]:
            raise ValueError(f"RoPE scaling must be one of {ROPE_KINDS[1:]}, got {self.kind!r}")
        if not self.factor > 0:
            raise ValueError(f"a RoPE scaling factor must be above 0, got {self.factor}")
        if self.kind != "linear" and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"{self.kind} RoPE scaling needs original_max_position_embeddings of at least 1, "
                f"got {self.original_max_position_embeddings}"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                "llama3 RoPE scaling needs high_freq_factor > low_freq_factor > 0, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                "yarn RoPE scaling needs beta_fast > beta_slow > 0, got "
                f"{self.beta_fast} and {self.beta_slow}"
            )


def rope_of(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_theta`/`rope_scaling`, or from Transformers 5's one dict."""
    rope = object_of(raw, "rope_parameters") or object_of(raw, "rope_scaling")
    theta = float_of(rope, "rope_theta", float_of(raw, "rope_theta", 10000.0))
    partial = float_of(rope, "partial_rotary_factor", float_of(raw, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1, got {partial}: it is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float_of(rope, "factor", None))
    if kind == "yarn":
        return theta, yarn_of(rope, max_positions)
    if kind != "llama3":
        raise ValueError(f"RoPE type {kind!r} is not supported; supported are {listed(ROPE_KINDS)}")
    return theta, RopeScaling(
        kind="llama3",
        factor=float_of(rope, "factor", None),
        low_freq_factor=float_of(rope, "low_freq_factor", 1.0),
        high_freq_factor=float_of(rope, "high_freq_factor", 4.0),
        original_max_position_embeddings=int_of(
            rope, "original_max_position_embeddings", max_positions
        ),
    )


def yarn_of(rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """As Transformers reads yarn scaling: a null factor is the ratio of the two contexts."""
    original = int_of(rope, "original_max_position_embeddings", max_positions)
    factor = float_of(rope, "factor", max_positions / max(original, 1))

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    usual = magnitude(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        of_all = magnitude(float_of(rope, "mscale_all_dim", None))
        usual = magnitude(float_of(rope, "mscale", None)) / of_all
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=float_of(rope, "beta_fast", 32.0),
        beta_slow=float_of(rope, "beta_slow", 1.0),
        is_truncated=bool(rope.get("truncate", True)),
        attention_factor=float_of(rope, "attention_factor", usual),
    )


def frequencies_of(head_size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position, one for each pair of lanes.

    llama3 scaling is as Llama 3.1 defines it, yarn from Peng et al., arXiv 2309.00071.
    """
    frequencies = theta ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(head_size, theta, scaling)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow lanes, scaled; 1: fast ones, kept
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(head_size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Of each pair of lanes, how much it keeps its frequency: 1 for the fast ones, then a ramp."""

    def lane(turns: float) -> float:
        """Which pair turns so often within the original context."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_size * math.log(length) / (2 * math.log(theta))

    low, high = lane(scaling.beta_fast), lane(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low or 0.001
    return 1 - np.clip((np.arange(head_size // 2) - low) / width, 0, 1)
