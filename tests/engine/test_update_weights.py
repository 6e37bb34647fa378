"""Other parameters for a live engine: what it then generates, and what it refuses."""

import asyncio
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jpaged import LLM, AsyncLLM, EngineFailedError, SamplingParams, runner
from jpaged_models import Decoder, load_decoder, open_checkpoint, params_of
from jpaged_models.dense import dense_logits
from tests.models.tiny_files import V, llama_tensors, write_directory

OPTIONS: dict[str, Any] = {
    "num_blocks": 40,
    "block_size": 8,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 8,
    "warm_up": False,
    "use_tqdm": False,
}
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1], [3, 1, 4, 1, 5, 9, 2, 6, 7]]


@pytest.fixture
def folders(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return [write_directory(tmp_path / name, llama_tensors(seed)) for seed, name in enumerate("ab")]


def decoder_in(folder: pathlib.Path) -> Decoder:
    return load_decoder(open_checkpoint(folder), dtype=jnp.float32)


def params_in(folder: pathlib.Path) -> dict:
    return params_of(decoder_in(folder))


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def fresh_answers(folder: pathlib.Path) -> list[list[int]]:
    with LLM(folder, **OPTIONS) as llm:
        return answers(llm)


def test_outputs_are_a_fresh_engines_and_nothing_compiles(folders: list[pathlib.Path]):
    before, after = (fresh_answers(folder) for folder in folders)
    assert before != after
    with LLM(folders[0], **OPTIONS) as llm:
        assert answers(llm) == before
        compiles = llm.stats().compiles
        for folder, expected in ((folders[1], after), (folders[0], before)):
            llm.update_weights(nnx.state(decoder_in(folder), nnx.Param))
            assert llm.stats().blocks_cached == 0, "cached keys are the old parameters'"
            assert answers(llm) == expected
        assert llm.stats().compiles == compiles
        assert llm.stats().recoveries == 0


def test_what_runs_keeps_its_tokens_and_goes_on_as_the_new_ones_say(
    folders: list[pathlib.Path],
):
    with LLM(folders[0], **OPTIONS) as llm:
        llm.submit(PROMPTS[0], GREEDY, request_id="a")
        kept: list[int] = []
        while len(kept) < 4:
            kept = [t for output in llm.step() for t in output.outputs[0].token_ids]
        llm.update_weights(params_in(folders[1]))
        found: list[int] = []
        while llm.has_unfinished_requests:
            found = [t for output in llm.step() for t in output.outputs[0].token_ids] or found
    assert found[: len(kept)] == kept
    rest = SamplingParams(temperature=0, max_tokens=9 - len(kept), ignore_eos=True)
    with LLM(folders[1], **OPTIONS) as llm:
        (expected,) = llm.generate(PROMPTS[0] + kept, rest, use_tqdm=False)
    assert found == kept + expected.outputs[0].token_ids


def _without_norm(params: dict) -> dict:
    return {name: value for name, value in params.items() if name != "norm"}


def _with_one_column_less(params: dict) -> dict:
    return params | {"embedding": params["embedding"][:, 1:]}


def _in_words(params: dict) -> dict:
    return params | {"embedding": np.full(params["embedding"].shape, "a")}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_without_norm, ValueError, r"\['norm'\] missing"),
        (lambda params: params | {"more": 1}, ValueError, r"\['more'\] unknown"),
        (_with_one_column_less, ValueError, r"\['embedding'\] must have the shape .*another model"),
        (lambda params: params | {"embedding": 3}, TypeError, r"must be an array, got int"),
        (lambda params: params | {"norm": 3}, TypeError, r"\['norm'\] must be a dict, got int"),
        (lambda _: [3], TypeError, "nested dicts of arrays, got list"),
        (_in_words, ValueError, r"\['embedding'\] must hold floats, got <U1"),
    ],
)
def test_parameters_of_another_model_are_refused_and_nothing_changes(
    change: Any, error: type[Exception], message: str, folders: list[pathlib.Path]
):
    with LLM(folders[0], **OPTIONS) as llm:
        before = answers(llm)
        cached = llm.stats().blocks_cached
        with pytest.raises(error, match=message):
            llm.update_weights(change(params_in(folders[1])))
        assert llm.stats().blocks_cached == cached
        assert answers(llm) == before


def test_the_callers_arrays_stay_its_own_and_any_dtype_will_do(folders: list[pathlib.Path]):
    expected = fresh_answers(folders[1])
    params = params_in(folders[1])
    with LLM(folders[0], **OPTIONS) as llm:
        llm.update_weights(jax.tree.map(np.asarray, params))  # of the host
        assert answers(llm) == expected
        llm.update_weights(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
        assert answers(llm) == expected
        llm.update_weights(params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    with pytest.raises(RuntimeError, match="closed"):
        llm.update_weights(params)


def test_layers_may_be_numbered_by_text_and_a_decoder_will_do(folders: list[pathlib.Path]):
    expected = fresh_answers(folders[1])
    params = params_in(folders[1])
    named = params | {"layers": {str(i): layer for i, layer in params["layers"].items()}}
    with LLM(folders[0], **OPTIONS) as llm:
        llm.update_weights(named)
        assert answers(llm) == expected
        llm.update_weights(load_decoder(open_checkpoint(folders[0]), dtype=jnp.float32))
        assert answers(llm) != expected


def test_a_rollout_loop_makes_the_rewarded_token_likelier(folders: list[pathlib.Path]):
    # Generate, score, update, generate again: REINFORCE (Williams, 1992) over one token.
    rewarded = 7
    model: Any = load_decoder(open_checkpoint(folders[0]), dtype=jnp.float32)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    params = SamplingParams(temperature=2.0, max_tokens=6, n=3, ignore_eos=True, seed=5)

    def loss(model: Any, tokens: jax.Array, rewards: jax.Array) -> jax.Array:
        chosen = jax.nn.log_softmax(dense_logits(model, tokens[:, :-1]))
        taken = jnp.take_along_axis(chosen, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.mean(taken[:, -6:] * rewards)

    def share(llm: LLM) -> float:
        (output,) = llm.generate(
            PROMPTS[1],
            SamplingParams(temperature=1.0, max_tokens=1, logprobs=20, seed=1),
            use_tqdm=False,
        )
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        entry = logprobs[0].get(rewarded)
        return -99.0 if entry is None else entry.logprob

    with LLM(folders[0], **OPTIONS) as llm:
        first = share(llm)
        for _ in range(8):
            (output,) = llm.generate(PROMPTS[1], params, use_tqdm=False)
            rolled = np.array([PROMPTS[1] + one.token_ids for one in output.outputs])
            rewards = (rolled[:, -6:] == rewarded).astype(np.float32) + 0.01
            # What is rewarded is so rare at first that it is shown, too.
            shown = np.full_like(rolled, rewarded)
            shown[:, :3] = PROMPTS[1]
            tokens = jnp.asarray(np.concatenate([rolled, shown]))
            weights = jnp.asarray(np.concatenate([rewards, np.ones_like(rewards)]))
            optimizer.update(model, nnx.grad(loss)(model, tokens, weights))
            llm.update_weights(model)
        assert share(llm) > first + 0.5
    assert rewarded < V


def test_an_async_llm_takes_them_between_its_steps(folders: list[pathlib.Path]):
    expected = fresh_answers(folders[1])

    async def run() -> list[list[int]]:
        async with AsyncLLM(folders[0], **OPTIONS) as llm:
            await llm.update_weights(params_in(folders[1]))
            found = []
            for prompt in PROMPTS:
                outputs = [output async for output in llm.generate(prompt, GREEDY)]
                found.append(outputs[-1].outputs[0].token_ids)
            return found

    assert asyncio.run(run()) == expected


def test_deleted_parameters_are_refused_and_half_an_update_serves_nothing(
    folders: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
    params = params_in(folders[1])
    expected = fresh_answers(folders[1])
    with LLM(folders[0], **OPTIONS) as llm:
        before = answers(llm)
        given_away = params_in(folders[1])
        given_away["norm"]["weight"].delete()
        with pytest.raises(ValueError, match=r"\['norm'\]\['weight'\] was deleted, as a training"):
            llm.update_weights(given_away)
        assert answers(llm) == before
        copied, done = runner.copied, []

        def interrupted(*args: Any) -> jax.Array:
            done.append(args)
            if len(done) == 3:
                raise KeyboardInterrupt
            return copied(*args)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "copied", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.update_weights(params)
        with pytest.raises(EngineFailedError, match="update_weights was cut short; call it again"):
            answers(llm)
        llm.update_weights(params)
        assert answers(llm) == expected
