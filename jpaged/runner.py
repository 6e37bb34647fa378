"""Owns what lives on the device: parameters, pool, state and the compiled programs."""

from concurrent.futures import ThreadPoolExecutor

import jax
from flax import nnx
from jaxtyping import DTypeLike, PyTree
from tqdm import tqdm

from jpaged.batch import pack_batch, table_updates
from jpaged.buckets import Bucket, Buckets
from jpaged.config import EngineConfig
from jpaged.plan import StepPlan
from jpaged.preparation import pack_preparations
from jpaged.step import Outputs, Step, StepOutput
from jpaged_models import Decoder
from pallas_kernels import Backend

COMPILE_THREADS = 4  # the compiler runs in parallel as far as there are cores


class Runner:
    """Runs plans over the device arrays.

    Pool and state are donated to every step and rebound to its results: exactly one live copy of
    each. Steps compile once per (bucket, outputs), all common ones in `warm_up`.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        buckets: Buckets,
        *,
        pool_dtype: DTypeLike,
        backend: Backend,
    ) -> None:
        self.config = config
        self.buckets = buckets
        self.model = decoder.config
        self.step = Step(decoder, config, pool_dtype=pool_dtype, backend=backend)
        self.params = jax.tree.leaves(nnx.split(decoder)[1])
        self.programs: dict[tuple[Bucket, Outputs], jax.stages.Compiled] = {}
        self.preparation: jax.stages.Compiled | None = None
        self.lazy_compiles = 0
        self.pool, self.state = jax.jit(self.step.zeros)()

    def reset(self) -> None:
        """A zero pool and an empty state in place of what is left of the old ones."""
        _delete((self.pool, self.state))  # before the new ones are made: both would not fit
        self.pool, self.state = jax.jit(self.step.zeros)()

    def run(self, plan: StepPlan, outputs: Outputs = Outputs.TOKENS) -> StepOutput:
        """The plan's results, still on the device. If it raises, pool and state may be gone."""
        bucket = self.buckets.fit(plan)
        updates = table_updates(plan)
        num_own = bucket.num_table_updates(self.config.block_size)
        self._prepare(plan.copies, updates[num_own:])
        packed = pack_batch(
            plan,
            bucket,
            updates[:num_own],
            block_size=self.config.block_size,
            padding_row=self.config.max_num_seqs,
            eos_token_ids=self.model.eos_token_ids,
        )
        program = self._program(bucket, outputs)
        self.pool, self.state, out = program(self.params, self.pool, self.state, packed)
        return out

    def warm_up(self, *, progress: bool = False) -> None:
        """Compiles every common program, on as many threads as help."""
        missing = [b for b in self.buckets.all if (b, Outputs.TOKENS) not in self.programs]
        with ThreadPoolExecutor(COMPILE_THREADS) as threads:
            compiled = threads.map(self.compile, missing)
            bar = tqdm(compiled, "compiling", len(missing), disable=not progress, leave=False)
            for bucket, program in zip(missing, bar, strict=True):
                self.programs[bucket, Outputs.TOKENS] = program
        if self.preparation is None:
            self.preparation = self.compile_preparation()

    def compile(self, bucket: Bucket, outputs: Outputs = Outputs.TOKENS) -> jax.stages.Compiled:
        """The step's executable for a bucket; its `memory_analysis()` is exact."""
        return self.step.jitted(bucket, outputs).lower(*self.step.specs(bucket)).compile()

    def compile_preparation(self) -> jax.stages.Compiled:
        """The executable that copies blocks and enters long tables before a step."""
        return self.step.preparation().lower(*self.step.preparation_specs()).compile()

    @property
    def num_programs(self) -> int:
        """Programs compiled so far."""
        return len(self.programs) + (self.preparation is not None)

    @property
    def is_lost(self) -> bool:
        """Whether a failed step took the pool or the state with it."""
        return any(array.is_deleted() for array in jax.tree.leaves((self.pool, self.state)))

    def close(self) -> None:
        """Deletes the device arrays at once, whoever still refers to them."""
        _delete((self.params, self.pool, self.state))
        self.programs.clear()
        self.preparation = None

    def _prepare(
        self, copies: tuple[tuple[int, int], ...], updates: list[tuple[int, int, int]]
    ) -> None:
        """Copies blocks and enters what the step's own batch has no room for."""
        for packed in pack_preparations(copies, updates, max_num_seqs=self.config.max_num_seqs):
            if self.preparation is None:
                self.preparation = self.compile_preparation()
                self.lazy_compiles += 1
            self.pool, self.state = self.preparation(self.pool, self.state, packed)

    def _program(self, bucket: Bucket, outputs: Outputs) -> jax.stages.Compiled:
        if (bucket, outputs) not in self.programs:
            self.programs[bucket, outputs] = self.compile(bucket, outputs)
            self.lazy_compiles += 1
        return self.programs[bucket, outputs]


def _delete(arrays: PyTree) -> None:
    for array in jax.tree.leaves(arrays):
        if not array.is_deleted():
            array.delete()
