"""What one core of each TPU can do in a cycle, at most."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The roofs of one core."""

    hbm_bytes: int  # a cycle
    flops: int  # a cycle, of bfloat16 products
    ghz: float


# Bytes and operations a second are those of JAX's table of TPUs, over the cores of a chip, and the
# clock. A tpu7x's clock is an assumption, that it does as many operations a cycle as a v6e, whose
# matrix unit is as wide; the estimator's own copies (1690 bytes a cycle) speak for it.
CHIPS = {
    "v5e": Chip(hbm_bytes=546, flops=131072, ghz=1.5),
    "v5p": Chip(hbm_bytes=703, flops=131072, ghz=1.75),
    "v6e": Chip(hbm_bytes=937, flops=524288, ghz=1.75),
    "tpu7x": Chip(hbm_bytes=1680, flops=524288, ghz=2.2),
}
