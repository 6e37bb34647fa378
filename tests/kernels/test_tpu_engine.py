"""The whole engine over the TPU kernels, simulated: the same tokens as over `xla`."""

import contextlib

import pytest

from jpaged.params import SamplingParams
from pallas_kernels import Backend
from tests.helpers import (
    compile_quickly,
    llm_over,
    make_engine,
    make_prompt,
    start_without_reserve,
    tiny_config,
    tiny_decoder,
)
from tests.kernels.simulator import strictly_simulated

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def test_tokens_equal_those_of_xla_through_a_preemption_and_a_prefix_hit(
    monkeypatch: pytest.MonkeyPatch,
):
    start_without_reserve(monkeypatch)
    heads = {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "hidden_size": 48}
    decoder = tiny_decoder(tiny_config(**heads, layer_windows=(21, None)))
    shared = make_prompt(24, seed=7)
    prompts = [make_prompt(3), shared, [*shared, 5], make_prompt(31, seed=1), make_prompt(17)]
    answers = []
    modes = {
        Backend.XLA: contextlib.nullcontext(),
        Backend.PALLAS_TPU_INTERPRET: strictly_simulated(),
    }
    for backend, mode in modes.items():
        llm = llm_over(compile_quickly(make_engine(decoder, backend=backend, num_blocks=13)))
        with mode, llm.trace() as steps:
            answers.append(llm.generate(prompts, GREEDY, use_tqdm=False))
        stats = llm.stats()
        assert stats.preemptions > 0
        assert stats.hit_rate > 0
        assert any(step["decodes"] and step["prefills"] for step in steps)
        assert any(not step["prefills"] for step in steps)
    by_xla, by_kernels = ([one.outputs[0].token_ids for one in each] for each in answers)
    assert by_kernels == by_xla
    assert len({tuple(tokens) for tokens in by_xla}) == len(prompts)
