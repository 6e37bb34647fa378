"""The llama3 RoPE scaling behind a GGUF file's table of factors."""

import math

import numpy as np
from jaxtyping import Float

from jpaged_models.rope import RopeScaling


def llama3_from_factors(
    factors: Float[np.ndarray, " frequencies"], *, theta: float, head_size: int, original: int
) -> RopeScaling | None:
    """The scaling that divides each frequency by its factor; None where all are 1.

    A GGUF file keeps the outcome alone. The published parameters are tried first, others are
    solved for.

    Args:
        factors: what the file holds, one for each pair of a head's dimensions.
        theta: RoPE's base.
        head_size: dimensions of a head.
        original: the context length before scaling, as far as it is known.
    """
    if np.allclose(factors, 1.0):
        return None
    turns = theta ** (-np.arange(0, head_size, 2) / head_size) / (2 * math.pi)  # of each, a token
    factor = float(np.max(factors))
    if abs(factor - round(factor)) < 1e-4:
        factor = float(round(factor))
    usual = RopeScaling(kind="llama3", factor=factor, original_max_position_embeddings=original)
    if len(factors) == len(turns):
        for scaling in (usual, _solved(factors, turns, factor)):
            if scaling and np.allclose(_factors(turns, scaling), factors, rtol=1e-3):
                return scaling
    raise ValueError(
        "the file's rope_freqs are not those of llama3 scaling, the only table of factors supported"
    )


def _solved(
    factors: Float[np.ndarray, " frequencies"],
    turns: Float[np.ndarray, " frequencies"],
    factor: float,
) -> RopeScaling | None:
    """The parameters read off the line that 1/factor is, in frequency, between its two corners.

    Its slope and height fix them up to a common multiple, which changes nothing: so low is 1.
    """
    inside = (factors > 1.0 + 1e-6) & (factors < factor * (1 - 1e-6))
    if inside.sum() < 2 or factor <= 1:
        return None
    smooth = (1 / factors[inside] - 1 / factor) / (1 - 1 / factor)
    slope, height = (float(value) for value in np.polyfit(turns[inside], smooth, 1))
    if height >= 0 or slope <= 0:
        return None
    high = 1 - 1 / height
    return RopeScaling(
        kind="llama3",
        factor=factor,
        high_freq_factor=high,
        original_max_position_embeddings=max(round(slope * (high - 1)), 1),
    )


def _factors(
    turns: Float[np.ndarray, " frequencies"], scaling: RopeScaling
) -> Float[np.ndarray, " frequencies"]:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (turns * scaling.original_max_position_embeddings - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling.factor + smooth)
