# pyright: reportMissingImports=false
"""OpenVINO GenAI's continuous batching on a CPU, over a model that optimum-intel exported."""

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.worker import Job, Request, serve

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
CACHE_GIB = 2


class OpenVino:
    """A pipeline; its prefix cache cannot be emptied, so that a reset makes a new one."""

    process_ids = ()

    def __init__(self, job: Job) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self.version = openvino_genai.__version__
        self._job, self._genai = job, openvino_genai
        self._tensor = lambda prompt: openvino.Tensor(np.asarray([prompt], np.int64))
        self._pipeline = self._new_pipeline()

    def _new_pipeline(self) -> Any:
        scheduler = self._genai.SchedulerConfig()
        scheduler.max_num_seqs = self._job["max_num_seqs"]
        scheduler.max_num_batched_tokens = 512
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = CACHE_GIB
        precision = PRECISIONS[self._job["dtype"]]
        properties = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return self._genai.ContinuousBatchingPipeline(
            self._job["model"], scheduler, "CPU", properties
        )

    def reset(self) -> None:
        """A new pipeline, which has met a few other requests."""
        del self._pipeline
        self._pipeline = self._new_pipeline()
        self.run([([7] * 300, 8), ([9] * 40, 8)])

    def run(self, wave: Sequence[Request]) -> list[list[int]]:
        """All answers, read as their tokens come."""
        handles = [
            self._pipeline.add_request(index, self._tensor(prompt), self._config(count))
            for index, (prompt, count) in enumerate(wave)
        ]
        answers: list[list[int]] = [[] for _ in wave]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, answer in zip(handles, answers, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        answer += output.generated_ids
        return answers

    def _config(self, count: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos = True
        config.do_sample = config.apply_chat_template = False
        return config


if __name__ == "__main__":
    serve(OpenVino)
