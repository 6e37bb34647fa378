"""Programs compiled on threads of their own, while something else is done."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from tqdm import tqdm

from jpaged.devices import num_cores
from jpaged.programs import Program

# And no more than there are cores. XLA shares out each program's code itself, so that more threads
# take no less time, and hundreds of megabytes each; one alone leaves a core idle while a program is
# traced or comes from the cache.
MAX_THREADS = 8


class Ahead:
    """Begins to compile some programs at once, in their order."""

    def __init__(
        self, compile_one: Callable[[Program], jax.stages.Compiled], programs: Sequence[Program]
    ) -> None:
        threads = ThreadPoolExecutor(min(MAX_THREADS, num_cores()))
        self._compiled = {program: threads.submit(compile_one, program) for program in programs}
        threads.shutdown(wait=False)  # they end with the last program

    def finish(self, *, progress: bool) -> dict[Program, jax.stages.Compiled]:
        """Waits for all of them; what one failed with is raised here."""
        try:
            is_silent = not (progress and self._compiled)  # a bar of nothing never goes away
            bar = tqdm(self._compiled.items(), "compiling", disable=is_silent, leave=False)
            return {program: compiled.result() for program, compiled in bar}
        except BaseException:  # an interrupt should not wait for what has not begun
            self.cancel()
            raise

    def cancel(self) -> None:
        """Leaves out what has not begun."""
        for compiled in self._compiled.values():
            compiled.cancel()
