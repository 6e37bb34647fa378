# pyright: reportMissingImports=false
"""Transformers' continuous batching on a CPU: paged attention over torch tensors."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.worker import WARM_UP, Job, Request, serve

NUM_BLOCKS = 128  # without a number it takes most of the memory
MAX_BATCH_TOKENS = 512
TIMEOUT_S = 120.0  # for the next answer


class Transformers:
    """The model behind a manager of requests, whose cache lives as long as it does."""

    process_ids = ()

    def __init__(self, job: Job) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers
        from transformers.generation.configuration_utils import (
            ContinuousBatchingConfig,
        )

        torch.set_num_threads(len(os.sched_getaffinity(0)))
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

        self._num_waves = 0
        self._life = contextlib.ExitStack()
        self._manager = self._new_manager()

    def _new_manager(self) -> Any:
        manager = self._model.continuous_batching_context_manager(**self._options)
        return self._life.enter_context(manager)

    def reset(self) -> None:
        """A new manager, which has met a few other requests."""
        self._life.close()
        self._manager = self._new_manager()
        self.run(WARM_UP)

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """All answers, as they end."""
        found: dict[str, list[int]] = {}
        self._num_waves += 1
        names = [f"{self._num_waves}-{index}" for index in range(len(wave))]
        for name, (prompt, count) in zip(names, wave, strict=True):
            self._manager.add_request(prompt, request_id=name, max_new_tokens=count)
        while len(found) < len(wave):
            result = self._manager.get_result(timeout=TIMEOUT_S)
            if result is None:
                raise TimeoutError(f"{len(wave) - len(found)} answers do not come")
            if result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        return [found[name] for name in names]


if __name__ == "__main__":
    serve(Transformers)
