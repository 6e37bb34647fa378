# pyright: reportMissingImports=false
"""Transformers' continuous batching on a CPU: paged attention over torch tensors."""

import os
from collections.abc import Sequence

from benchmarks.peers.worker import Job, Request, serve

NUM_BLOCKS = 128  # without a number it takes most of the memory
MAX_BATCH_TOKENS = 512
TIMEOUT_S = 60.0  # for the next answer


class Transformers:
    """The model behind a manager, which lives as long as a wave."""

    process_ids = ()

    def __init__(self, job: Job) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers
        from transformers.generation.configuration_utils import (
            ContinuousBatchingConfig,
        )

        torch.set_num_threads(os.cpu_count() or 1)
        transformers.logging.set_verbosity_error()
        self.version = transformers.__version__
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
        ).eval()
        self._options = {
            "generation_config": transformers.GenerationConfig(
                do_sample=False,
                max_new_tokens=job["max_model_len"],
                eos_token_id=-1,
                pad_token_id=0,
            ),
            "continuous_batching_config": ContinuousBatchingConfig(
                use_cuda_graph=False, num_blocks=NUM_BLOCKS, max_batch_tokens=MAX_BATCH_TOKENS
            ),
        }

    def reset(self) -> None:
        """Nothing: a manager's cache goes with it."""

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """All answers, as they end."""
        found: dict[str, list[int]] = {}
        with self._model.continuous_batching_context_manager(**self._options) as manager:
            for index, (prompt, count) in enumerate(wave):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=count)
            while len(found) < len(wave):
                result = manager.get_result(timeout=TIMEOUT_S)
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
        return [found[str(index)] for index in range(len(wave))]


if __name__ == "__main__":
    serve(Transformers)
