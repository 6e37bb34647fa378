"""The padded shapes for which steps are compiled: a short ladder, so that warm-up is short too."""

import dataclasses

from jpaged.plan import StepPlan
from jpaged_models import Phase

# Each program takes seconds to compile, and a padded row costs little beside reading the weights:
# on a 2-core CPU a step of 2 to 8 rows takes the same time.
_FEW_DECODE_ROWS = (1, 8, 16, 32, 48, 64)
_MANY_DECODE_ROWS = (1, 8, 16, 32, 64, 128, 256)  # there are more mixed shapes then
_MIXED_TOKENS = (64, 256, 1024)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A padded shape: T tokens of at most B rows."""

    phase: Phase
    num_tokens: int
    num_rows: int

    def num_table_updates(self, block_size: int) -> int:
        """New blocks a step of this shape may need: each row can open one more than it fills."""
        filled = 0 if self.phase is Phase.DECODE else self.num_tokens // block_size
        return filled + self.num_rows


class Buckets:
    """The ladder of an engine: decode shapes (one token a row), and mixed shapes."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        max_rows = min(max_num_seqs, max_num_batched_tokens)
        steps = _FEW_DECODE_ROWS if max_rows <= 64 else _MANY_DECODE_ROWS
        self.decode = [Bucket(Phase.DECODE, n, n) for n in _ladder(steps, max_rows)]
        self.mixed = [
            Bucket(Phase.MIXED, n, min(n, max_rows))
            for n in _ladder(_MIXED_TOKENS, max_num_batched_tokens)
        ]

    @property
    def all(self) -> list[Bucket]:
        """Every shape, those most likely to be wanted first."""
        return [*self.mixed[::-1], *self.decode[::-1]]

    def fit(self, plan: StepPlan) -> Bucket:
        """The smallest bucket that holds the plan."""
        is_decode = plan.num_decodes == len(plan.rows)
        ladder = self.decode if is_decode else self.mixed
        # Forks are rows without tokens, so that there may be more rows than tokens.
        return next(
            bucket
            for bucket in ladder
            if bucket.num_tokens >= plan.num_tokens and bucket.num_rows >= len(plan.rows)
        )


def _ladder(steps: tuple[int, ...], top: int) -> list[int]:
    """The steps below `top`, and `top` itself."""
    return [step for step in steps if step < top] + [top]
