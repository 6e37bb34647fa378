"""A step plan in the making."""

import operator

from jpaged.plan import PoolUse, ScheduledRow, StepPlan
from jpaged.requests import Sequence


class Draft:
    """The rows and copies so far, what is left of the budget, and who can be forked.

    `leads` are the rows that end a prompt: others of their request may begin from what they have.
    Of the sequences that start, `num_queried` tokens were looked up and `num_hit` found. Whoever
    is added is at once what the step will have made of it.
    """

    def __init__(self, budget: int) -> None:
        self.num_left = budget
        self.rows: list[ScheduledRow] = []
        self.copies: list[tuple[int, int]] = []
        self.preempted: list[Sequence] = []
        self.swap_outs: list[tuple[int, int]] = []
        self.swap_ins: list[tuple[int, int]] = []
        self.leads: list[ScheduledRow] = []
        self.num_queried = self.num_hit = 0
        self.is_awaited = False

    def add(
        self,
        sequence: Sequence,
        num_tokens: int,
        new_blocks: list[tuple[int, int]],
        *,
        is_new: bool = False,
    ) -> None:
        """Gives `sequence` some tokens of the step; its blocks hold them already."""
        assert sequence.row is not None, "a row is assigned first"
        if sequence.is_forked:
            is_new, new_blocks = True, list(enumerate(sequence.block_ids))
            sequence.is_forked = False
        start = sequence.num_computed_tokens
        samples = start + num_tokens == len(sequence.token_ids) + sequence.num_in_flight
        feeds_back = sequence.last_token_on_device and num_tokens == 1
        # By position: every step makes one for each row, and by name it takes twice as long.
        row = ScheduledRow(
            sequence,
            sequence.row,
            start,
            num_tokens,
            samples,
            tuple(new_blocks),
            is_new,
            feeds_back,
        )
        self.num_left -= num_tokens
        self._append(row)
        if samples and not feeds_back and not sequence.num_output_tokens:
            self.leads.append(row)

    def fork(self, sequence: Sequence, lead: ScheduledRow) -> None:
        """Lets `sequence` sample from the logits of `lead`, without a token of its own."""
        assert sequence.row is not None, "a row is assigned first"
        row = ScheduledRow(
            sequence=sequence,
            row=sequence.row,
            start=lead.seq_len,
            num_tokens=0,
            samples=True,
            new_blocks=tuple(enumerate(sequence.block_ids)),
            is_new=True,
            feeds_back=False,
            forked=lead.row,
        )
        self._append(row)

    def _append(self, row: ScheduledRow) -> None:
        sequence = row.sequence
        self.rows.append(row)
        sequence.num_computed_tokens = row.start + row.num_tokens
        if row.samples and sequence.request.search is None:  # whose tokens the host picks
            sequence.num_in_flight += 1
            sequence.last_token_on_device = True
        if sequence.request.needs_known_tokens:
            self.is_awaited = True

    def plan(self, use: PoolUse) -> StepPlan:
        """The step, with the rows that have one token in front."""
        short = [row for row in self.rows if row.num_tokens == 1]
        # Attention walks a group of rows as far as its longest: rows of a length go together.
        short.sort(key=operator.attrgetter("start"), reverse=True)
        long = [row for row in self.rows if row.num_tokens > 1]
        forks = [row for row in self.rows if row.num_tokens == 0]
        return StepPlan(
            rows=(*short, *long, *forks),
            num_tokens=sum(row.num_tokens for row in self.rows),
            num_decodes=len(short),
            copies=tuple(self.copies),
            preempted=tuple(self.preempted),
            swap_outs=tuple(self.swap_outs),
            swap_ins=tuple(self.swap_ins),
            num_queried=self.num_queried,
            num_hit=self.num_hit,
            is_awaited=self.is_awaited,
            use=use,
        )
