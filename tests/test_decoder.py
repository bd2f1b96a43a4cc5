"""The decoding loop: its sampler draws what is asked, and its shortcuts change no response."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_rollout import SAMPLING, flat, prompts, tokens_of
from toy_forests import toy_model
from toy_runs import prepared

from models import decode as decoder
from models.config import ModelConfig
from models.decode import DecodeLoop
from models.kv_cache import KVCache
from models.shapes import published
from models.weights import find
from rmt import naive
from rmt.questions import sampling_at
from rmt.rollout import generate
from rmt.sampling import BLOCK, Sampling, sample

LAST = 1 - 2**-53  # the largest random number


def drawn(logits, uniform, temperature=1.0, vocab_size=None, **cut):
    uniform = torch.as_tensor(uniform, dtype=torch.float64).expand(len(logits))
    sampling = Sampling(1, (), vocab_size or logits.shape[1], temperature, **cut)
    return sample(logits.clone(), uniform, sampling)


def same_responses(given, expected, tolerance):
    """The same tokens; a log-probability's last bits depend on what else is in a matrix product."""
    for one, other in zip(given, expected):
        assert (one.tokens, one.finished) == (other.tokens, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


@pytest.mark.parametrize("vocabulary", [3, BLOCK, 5 * BLOCK, 5 * BLOCK + 1, 10_007])
def test_a_draw_inverts_the_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, vocabulary, generator=generator, dtype=torch.float64)
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    logprob = (logits / 0.8).log_softmax(dim=-1)
    expected = torch.searchsorted(logprob.exp().cumsum(dim=-1), uniform[:, None], right=True)[:, 0]
    tokens, scored = drawn(logits, uniform, 0.8)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(scored, logprob[range(400), tokens], rtol=0, atol=1e-12)


@pytest.mark.parametrize("uniform", [0.0, 0.5, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_probability_is_never_drawn(uniform, dtype):
    logits = torch.full((BLOCK + 3, 3 * BLOCK), -1e6, dtype=dtype)
    possible = torch.arange(BLOCK + 3) + BLOCK - 2  # the only one of each row, around the blocks
    logits[range(len(logits)), possible] = 1.0
    tokens, logprob = drawn(logits, uniform)
    assert tokens.tolist() == possible.tolist()
    assert logprob.abs().max() == 0


def test_the_ends_of_the_random_numbers_are_the_first_and_the_last_token():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1))
    assert drawn(logits, 0.0)[0].tolist() == [0] * 50
    assert drawn(logits, LAST)[0].tolist() == [999] * 50


def test_rows_of_the_head_beyond_the_vocabulary_are_never_drawn():
    logits = torch.zeros(100, 300)
    logits[:, 200:] = 50.0
    for temperature in (0, 1.0):
        tokens, logprob = drawn(logits, torch.linspace(0, LAST, 100), temperature, 200)
        assert tokens.max() == (199 if temperature else 0)
        torch.testing.assert_close(logprob, torch.full((100,), 200.0).log().neg())


def test_a_row_of_nan_has_a_token_and_a_log_probability_of_nan():
    logits = torch.zeros(2, 300)
    logits[0] = torch.nan
    tokens, logprob = drawn(logits, 0.5)
    assert 0 <= tokens[0] < 300 and logprob[0].isnan()
    assert tokens[1] == 150 and logprob[1].isfinite()


@pytest.mark.parametrize("steps", [3, 40])
def test_responses_do_not_depend_on_how_often_the_host_looks(steps, monkeypatch):
    """As on a GPU, where branches that are done are decoded on until the host looks."""
    model, few = toy_model(), replace(SAMPLING, max_branches=5)
    expected = flat(generate(model, prompts(), 2, few))
    monkeypatch.setitem(decoder.POLL, "cpu", steps)
    same_responses(flat(generate(model, prompts(), 2, few)), expected, 1e-10)


def test_one_token_takes_one_step(monkeypatch):
    """A cold start samples one token at each position: no poll of many steps for it."""
    taken, step = [], DecodeLoop._step
    monkeypatch.setitem(decoder.POLL, "cpu", 16)
    monkeypatch.setattr(DecodeLoop, "_step", lambda self, n: taken.append(n) or step(self, n))
    generate(toy_model(), prompts(), 2, replace(SAMPLING, max_new_tokens=1))
    assert len(taken) == 1


def test_idle_slots_change_no_response(monkeypatch):
    """As on a GPU, where a recorded step has a few more slots than there are branches."""
    sampling = replace(SAMPLING, max_branches=11)
    expected = tokens_of(generate(toy_model(), prompts(), 4, sampling))
    monkeypatch.setattr(DecodeLoop, "_width", lambda self: self.cache.slots)
    assert tokens_of(generate(toy_model(), prompts(), 4, sampling)) == expected


def test_the_triton_kernel_samples_the_same(monkeypatch):
    model, sampling = toy_model(torch.float32), replace(SAMPLING, max_new_tokens=2)
    expected = flat(generate(model, prompts()[:2], 1, sampling))
    monkeypatch.setenv("RMT_KERNELS", "triton")
    same_responses(flat(generate(model, prompts()[:2], 1, sampling)), expected, 1e-5)


def test_recorded_steps_come_in_few_sizes_and_have_room():
    for branches in range(1, 257):
        assert branches <= decoder._bucket(branches, 256) < branches + 16
    assert len({decoder._bucket(n, 256) for n in range(1, 257)}) == 20
    assert decoder._bucket(33, 40) == 40, "no more than there are slots"


def test_keys_and_values_of_a_token_of_qwen3_14b_are_160_kib():
    assert KVCache.bytes_per_token(published("qwen3-14b"), torch.bfloat16) == 160 * 1024


def test_the_cache_of_the_tiny_model_is_measured_in_what_it_allocates():
    config = ModelConfig.from_directory(find("tiny"))
    cache = KVCache(config, 10, 20, 3, 40, torch.device("cpu"), torch.float32)
    held = sum(x.numel() * x.itemsize for x in (cache.trunk, cache.prompt, cache.own))
    assert held == (10 + 20 + 3 * 40) * KVCache.bytes_per_token(config, torch.float32)


# ---- top-k and top-p


def kept(logits, temperature, top_p, top_k):
    """By numpy, a row at a time: probabilities of what is left (V,)."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    p = np.exp((logits[order] - logits.max()) / temperature)
    p /= p.sum()
    count = int(np.argmax(np.cumsum(p) >= top_p)) + 1 if top_p < 1 else len(p)
    left = np.zeros(len(logits))
    left[order[:count]] = p[:count] / p[:count].sum()
    return left


@pytest.mark.parametrize("top_p, top_k", [(1.0, 5), (0.6, 0), (0.6, 3), (1e-9, 0), (0.95, 250)])
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_a_draw_is_from_the_likeliest_and_scored_among_them(top_p, top_k, temperature):
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(300, 201, generator=generator, dtype=torch.float64)
    logits[:, 200] = 90.0  # padding takes no place among the k
    uniform = torch.rand(300, generator=generator, dtype=torch.float64)
    tokens, scored = drawn(logits, uniform, temperature, 200, top_p=top_p, top_k=top_k)
    for row, token, logprob, u in zip(logits[:, :200].numpy(), tokens, scored, uniform):
        left = kept(row, temperature, top_p, top_k)
        assert token == np.searchsorted(np.cumsum(left), u, side="right")
        assert logprob == pytest.approx(np.log(left[token]), abs=1e-12)


def test_top_k_of_one_is_greedy_and_greedy_cuts_nothing():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    tokens, logprob = drawn(logits, 0.5, top_k=1)
    assert tokens.tolist() == logits.argmax(dim=-1).tolist() and logprob.abs().max() == 0
    greedy = [drawn(logits, 0.5, 0.0, **cut) for cut in ({}, dict(top_k=2, top_p=0.1))]
    assert all(torch.equal(a, b) for a, b in zip(*greedy))


def test_of_equal_logits_the_first_are_kept():
    tokens, logprob = drawn(torch.zeros(9, 300), torch.linspace(0, LAST, 9), top_k=4)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    torch.testing.assert_close(logprob, torch.full((9,), 4.0).log().neg())


@pytest.mark.parametrize("cut", [dict(top_k=2), dict(top_p=0.5)])
def test_responses_are_cut_with_and_without_a_cache(cut):
    model, sampling = toy_model(), replace(SAMPLING, **cut)
    responses = generate(model, prompts(), 2, sampling)
    assert tokens_of(responses) == tokens_of(naive.generate(model, prompts(), 2, sampling))
    assert tokens_of(responses) != tokens_of(generate(model, prompts(), 2, SAMPLING))


def test_a_run_samples_the_whole_distribution(tmp_path):
    run = prepared(tmp_path)
    sampling = sampling_at(run.config, run.tokenizer, 0)
    assert (sampling.top_p, sampling.top_k) == (1.0, 0)
