"""What attention is timed at: rows, queries and contexts, and the least that they read and do."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Rows of equal context, each with its last `queries` tokens; one query a row is a decode."""

    rows: int
    queries: int
    context: int
    heads: tuple[int, int, int]
    dtype: str  # of the pool
    block_size: int

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token."""
        return self.queries == 1

    @property
    def name(self) -> str:
        """What it is called in tables."""
        if self.is_decode:
            return f"decode {self.rows}x{self.context}"
        return f"prefill {self.queries}@{self.context - self.queries}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of live keys and values: what a call must read."""
        _, K, H = self.heads
        return self.rows * self.context * K * 2 * H * jnp.dtype(self.dtype).itemsize

    @property
    def flops(self) -> int:
        """Operations of both products, over what each query sees."""
        N, _, H = self.heads
        hidden = self.queries * (self.queries - 1) // 2  # query and key pairs that the mask removes
        return 4 * N * H * self.rows * (self.queries * self.context - hidden)

    @property
    def scale(self) -> float:
        """The usual one."""
        return self.heads[2] ** -0.5
