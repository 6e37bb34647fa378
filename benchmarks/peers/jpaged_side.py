"""jpaged itself, in a process like its peers'."""

import importlib.metadata
from collections.abc import Sequence

from benchmarks.peers.worker import Job, Request, serve
from jpaged import LLM, SamplingParams


class Jpaged:
    """The engine with its defaults, prefix cache and all."""

    process_ids = ()

    def __init__(self, job: Job) -> None:
        self.version = importlib.metadata.version("jpaged")
        self._llm = LLM(
            job["model"] or None,
            dtype=job["dtype"],
            max_num_seqs=job["max_num_seqs"],
            max_model_len=job["max_model_len"],
            use_tqdm=False,
        )

    def reset(self) -> None:
        """Empties the prefix cache."""
        self._llm.reset_prefix_cache()

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """All answers of one call."""
        params = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in wave
        ]
        outputs = self._llm.generate([prompt for prompt, _ in wave], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Jpaged)
