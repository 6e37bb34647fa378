"""The unpaged baseline: its cache changes nothing, its batches end when they should."""

import csv
import functools

import jax
import numpy as np
import pytest

from benchmarks import baseline_model
from benchmarks.baseline import Baseline
from benchmarks.lengths import (
    RequestLengths,
    random_prompts,
    sharegpt_lengths,
    trace_lengths,
)
from jpaged_models import ModelConfig, config_from_hf

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3-untied": {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": False},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral-window": {"architectures": ["MistralForCausalLM"], "sliding_window": 19},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}
PROMPT_LENS = (1, 70, 16, 5, 83, 75, 7)
MAX_TOKENS = (30, 4, 1, 21, 20, 9, 2)
TOLERANCE = 1e-4  # of the largest logit, float32


class RandomWeights:
    """Weights large enough that attention is not uniform and greedy text does not repeat."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def names(self) -> frozenset[str]:
        raise AssertionError("the baseline asks by name")

    def tensor(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(list(name.encode()))
        values = rng.normal(size=self._shape(name.split(".")[-2:])).astype(np.float32)
        return 1 + values / 10 if "norm" in name else values * 0.4

    def _shape(self, name: list[str]) -> tuple[int, ...]:
        config = self.config
        D, F, H = config.hidden_size, config.intermediate_size, config.head_size
        queries, keys = config.num_heads * H, config.num_kv_heads * H
        module, kind = name
        outputs = {
            "q_proj": (queries, D),
            "k_proj": (keys, D),
            "v_proj": (keys, D),
            "o_proj": (D, queries),
            "gate_proj": (F, D),
            "up_proj": (F, D),
            "down_proj": (D, F),
            "embed_tokens": (config.vocab_size, D),
            "lm_head": (config.vocab_size, D),
            "q_norm": (H,),
            "k_norm": (H,),
        }
        shape = outputs.get(module, (D,))
        return shape[:1] if kind == "bias" else shape


@functools.cache
def tiny(family: str) -> tuple[ModelConfig, baseline_model.Params]:
    config = config_from_hf({**TINY, **FAMILIES[family]})
    return config, baseline_model.load_params(RandomWeights(config))


def tiny_baseline(family: str = "llama", *, num_rows: int = 3, reserved: int = 110) -> Baseline:
    config, params = tiny(family)
    return Baseline(config, params, num_rows=num_rows, reserved=reserved)


def prompts_of(lens: tuple[int, ...]) -> list[list[int]]:
    lengths = [RequestLengths(input_tokens=n, output_tokens=1) for n in lens]
    return random_prompts(lengths, vocab_size=TINY["vocab_size"], seed=5)


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_every_cached_token_is_the_argmax_of_the_uncached_forward(family: str) -> None:
    baseline = tiny_baseline(family)
    prompts = prompts_of(PROMPT_LENS)
    outputs = baseline.generate(prompts, MAX_TOKENS, ignore_eos=True)
    assert [len(tokens) for tokens in outputs] == list(MAX_TOKENS)
    assert len({token for tokens in outputs for token in tokens}) > 20  # not one token repeated
    for prompt, tokens in zip(prompts, outputs, strict=True):
        logits_CV = baseline.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits_CV[np.arange(len(tokens)), tokens]
        assert np.all(logits_CV.max(axis=1) - chosen <= TOLERANCE * np.abs(logits_CV).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached_ones_at_every_position(family: str) -> None:
    config, params = tiny(family)
    baseline = tiny_baseline(family)
    sequences = prompts_of((83, 68, 71))
    starts = np.array([7, 16, 40], np.int32)
    caches = baseline_model.empty_caches(config, num_rows=4, reserved=90, dtype="float32")
    prefill = jax.jit(functools.partial(baseline_model.prefill, config=config))
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        padded = np.array((sequence[:start] + [0] * 41)[:41], np.int32)
        all_kv, _ = prefill(params, padded, start)
        caches = jax.jit(baseline_model.store_prompt)(caches, all_kv, row)
    expected = [baseline.logits(sequence) for sequence in sequences]
    decode = jax.jit(functools.partial(baseline_model.decode, config=config))
    ends = np.array([len(sequence) for sequence in sequences])
    for step in range(max(ends - starts)):
        lens = starts + step
        lens = np.append(np.where(lens < ends, lens, 0), 0)  # the fourth row is never used
        tokens = [s[n] if n else 0 for s, n in zip([*sequences, [0]], lens, strict=True)]
        caches, logits_BV = decode(params, caches, np.array(tokens, np.int32), lens)
        for row in np.flatnonzero(lens):
            wanted = expected[row][lens[row]]
            assert np.abs(logits_BV[row] - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_a_row_ends_at_its_own_end_of_text_token() -> None:
    prompts = prompts_of(PROMPT_LENS)
    free = tiny_baseline().generate(prompts, MAX_TOKENS, ignore_eos=True)
    eos = free[4][10]
    config, params = tiny("llama")
    config = ModelConfig(**{**vars(config), "eos_token_ids": (eos,)})
    ended = Baseline(config, params, num_rows=3, reserved=110).generate(
        prompts, MAX_TOKENS, ignore_eos=False
    )
    for tokens, wanted in zip(ended, free, strict=True):
        end = wanted.index(eos) + 1 if eos in wanted else len(wanted)
        assert tokens == wanted[:end]
    assert len(ended[4]) <= 11


def test_text_does_not_depend_on_who_shares_the_batch() -> None:
    prompts = prompts_of(PROMPT_LENS)
    alone = tiny_baseline(num_rows=1).generate(prompts, MAX_TOKENS, ignore_eos=True)
    # More rows than one walk takes, and than there are prompts.
    together = tiny_baseline(num_rows=19).generate(prompts, MAX_TOKENS, ignore_eos=True)
    assert together == alone


def test_nothing_compiles_after_warm_up(compiles: list[str]) -> None:
    baseline = tiny_baseline(num_rows=2, reserved=105)
    baseline.warm_up(70)
    assert compiles
    compiles.clear()
    prompts = prompts_of(PROMPT_LENS)
    baseline.generate(prompts, MAX_TOKENS, ignore_eos=True)
    baseline.generate(prompts, MAX_TOKENS, ignore_eos=False)
    assert compiles == []


def test_a_request_longer_than_its_row_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="1 to 110 tokens, got a prompt of 70 and max_tokens 41"):
        tiny_baseline().generate(prompts_of((5, 70)), [3, 41], ignore_eos=True)


def test_another_family_is_refused_by_name() -> None:
    config = config_from_hf({"architectures": ["GPT2LMHeadModel"], "n_layer": 1})
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        baseline_model.load_params(RandomWeights(config))


def test_the_cache_costs_what_it_reserves() -> None:
    baseline = tiny_baseline(num_rows=5, reserved=77)
    assert baseline.cache_bytes == 2 * 5 * 77 * 2 * (2 * 8) * 4


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str) -> None:
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="parity needs Transformers")
    raw = TINY | FAMILIES[family]
    model_class = getattr(transformers, raw.pop("architectures")[0])
    model = model_class(model_class.config_class(**raw)).eval().float()
    weights = RandomWeights(tiny(family)[0])
    names = {name for name, _ in model.named_parameters()}
    model.load_state_dict({n: torch.tensor(weights.tensor(n)) for n in names}, strict=False)
    model.tie_weights()
    for tokens in prompts_of((1, 150, 14)):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0].numpy()
        found = tiny_baseline(family, reserved=200).logits(tokens)
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("count", [64, 4000])
def test_drawn_lengths_have_the_published_statistics(count: int) -> None:
    lengths = sharegpt_lengths(count, seed=3)
    inputs = np.array([pair.input_tokens for pair in lengths])
    outputs = np.array([pair.output_tokens for pair in lengths])
    assert (np.mean(inputs), np.mean(outputs)) == pytest.approx((106, 295), rel=0.04)
    assert (np.median(inputs), np.median(outputs)) == pytest.approx((28, 264), rel=0.03)
    tail = 0.02 if count > 1000 else 0.12
    assert np.percentile(inputs, 99) == pytest.approx(840, rel=tail)
    assert np.percentile(outputs, 99) == pytest.approx(888, rel=tail)


def test_lengths_and_prompts_depend_on_the_seed_alone() -> None:
    first, again, other = (sharegpt_lengths(50, seed=seed) for seed in (8, 8, 9))
    assert first == again != other
    prompts = random_prompts(first, vocab_size=97, seed=1)
    assert prompts == random_prompts(again, vocab_size=97, seed=1)
    assert [len(prompt) for prompt in prompts] == [pair.input_tokens for pair in first]
    assert {token for prompt in prompts for token in prompt} == set(range(97))


def test_a_trace_gives_its_first_requests_in_order(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["arrival_s", "output_tokens", "input_tokens"], [0.1, 7, 600]])
        writer.writerows([[0.2, 0, 9], [0.3, 900, 11], [0.4, 1, 2]])
    lengths = trace_lengths(path, 2)
    assert [(pair.input_tokens, pair.output_tokens) for pair in lengths] == [(600, 7), (11, 900)]
    clipped = [pair.clipped(max_input=512, max_output=256) for pair in lengths]
    assert [(pair.input_tokens, pair.output_tokens) for pair in clipped] == [(512, 7), (11, 256)]
    with pytest.raises(ValueError, match="has 3 requests, 4 were asked for"):
        trace_lengths(path, 4)
    path.write_text("input,output\n1,2\n")
    with pytest.raises(ValueError, match="needs the columns input_tokens and output_tokens"):
        trace_lengths(path, 1)


@pytest.fixture
def compiles() -> list[str]:
    """The compilations since the fixture was asked for."""
    from benchmarks.measure import CompileLog

    return CompileLog().events
