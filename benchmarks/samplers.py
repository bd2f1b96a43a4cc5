"""The contenders of benchmarks/rollout.py: ours, transformers' generate, vLLM and nano-vllm.

All have weights of the same dtype, sample from the whole distribution at temperature 1, and
generate exactly `response` tokens: nothing ends a response. Ours also returns the log-probability
of each token, which RL needs; the peers do not. Each is a function that loads its model and then
takes turns (benchmarks/contest.py).

vLLM and nano-vllm need a GPU and reserve most of it for their caches, so their peak is not
comparable. Their calls are written from their sources (vLLM 0.10, nano-vllm 0.2), never run here.
"""

import argparse
import os
from importlib.util import find_spec

import torch

from benchmarks import inputs, machine
from benchmarks.contest import Turns, Unavailable
from benchmarks.profiling import matrix_share
from models.config import ModelConfig
from models.weights import build
from rmt.rollout import generate
from rmt.sampling import Sampling

CHECKED = 16  # tokens of each response that is compared before the contest
SAMPLES = 2  # such responses to each prefix


def given(o: argparse.Namespace) -> tuple:
    """Return directory, token ids of the prefixes, dtype and device: the same for all."""
    place = inputs.directory(o)
    prefixes = [ids for _, ids in inputs.prompts(place, o.documents, o.prefix)]
    return place, prefixes, inputs.dtype_of(o), machine.device_here()


def ours(o: argparse.Namespace, turns: Turns) -> None:
    place, prefixes, dtype, device = given(o)
    model = build(place, device, dtype).requires_grad_(False)
    trees, vocabulary = inputs.trees(prefixes), ModelConfig.from_directory(place).vocab_size

    def sample(samples: int, tokens: int, temperature: float = 1.0, step: int = 0):
        branches = max(256, samples * len(prefixes))
        sampling = Sampling(tokens, (), vocabulary, temperature, branches, step=step)
        return generate(model, trees, samples, sampling)

    def reference() -> dict:
        """Return greedy tokens, and sampled ones with log-probabilities, for peers to check."""
        sampled = [r for group in sample(SAMPLES, CHECKED) for r in group]
        return {
            "greedy": [group[0].tokens for group in sample(1, CHECKED, temperature=0)],
            "tokens": [r.tokens for r in sampled],
            "logprobs": [r.logprobs for r in sampled],
        }

    turns.actions["reference"] = reference
    turns.actions["profile"] = lambda: matrix_share(lambda n: sample(o.group, n), o.response)
    number = 0
    while turns.begin():
        groups = sample(o.group, o.response, step=number)
        number += 1
        turns.end(sum(len(r.tokens) for group in groups for r in group))


def transformers(o: argparse.Namespace, turns: Turns, cache: str) -> None:
    """Run generate() with its dynamic or static cache; on a GPU the latter compiles (default)."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise Unavailable(str(error)) from None
    place, prefixes, dtype, device = given(o)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # nothing ends a response
    model.generation_config.pad_token_id = 0
    ids = torch.tensor(prefixes, device=device)

    def sample(samples: int, tokens: int, **how):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            num_return_sequences=samples, cache_implementation=cache, **how,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    @torch.no_grad()
    def verify(reference: dict) -> dict:
        """Compare our greedy tokens and the log-probabilities of our samples with its own."""
        greedy = sample(1, CHECKED, do_sample=False).tolist()
        same = sum(a == b for x, y in zip(greedy, reference["greedy"]) for a, b in zip(x, y))
        said = torch.tensor(reference["tokens"], device=device)
        sequences = torch.cat((ids.repeat_interleave(SAMPLES, dim=0), said), dim=1)
        logits = model(sequences, logits_to_keep=CHECKED + 1).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, said[..., None])[..., 0].cpu()
        off = (logprobs - torch.tensor(reference["logprobs"])).abs()
        return {
            "greedy_equal": same / (len(greedy) * CHECKED),
            "logprob_mean": float(off.mean()), "logprob_max": float(off.max()),
        }  # fmt: skip

    turns.actions["verify"] = verify
    number = 0
    while turns.begin():
        torch.manual_seed(number)
        number += 1
        out = sample(o.group, o.response, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        turns.end(out.numel())


def absent() -> dict[str, str]:
    """Return contender -> reason why it cannot take part here."""
    found = {}
    for name in ("vllm", "nanovllm"):
        if not torch.cuda.is_available():
            found[name] = "measured on a GPU only, and there is none"
        elif find_spec(name) is None:
            found[name] = "not installed"
    return found


def vllm(o: argparse.Namespace, turns: Turns) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to measure its memory in this process
    from vllm import LLM, SamplingParams

    place, prefixes, _, _ = given(o)
    engine = LLM(
        model=str(place), dtype=o.dtype, max_model_len=o.prefix + o.response,
        gpu_memory_utilization=0.3, enable_prefix_caching=True,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in prefixes]
    number = 0
    while turns.begin():
        how = SamplingParams(
            n=o.group, temperature=1.0, max_tokens=o.response, ignore_eos=True, detokenize=False,
            seed=number,
        )  # fmt: skip
        out = engine.generate(prompts, how, use_tqdm=False)
        number += 1
        turns.end(sum(len(answer.token_ids) for request in out for answer in request.outputs))
        engine.reset_prefix_cache()  # or the cache would skip the next prefill


def nanovllm(o: argparse.Namespace, turns: Turns) -> None:
    """Send each prefix G times, as it has no n; its prefix cache shares them.

    The cache cannot be emptied from outside, so only the warm-up pays for the prefill.
    """
    from nanovllm import LLM, SamplingParams

    place, prefixes, _, _ = given(o)
    engine = LLM(
        str(place), max_model_len=o.prefix + o.response, gpu_memory_utilization=0.3,
        max_num_seqs=max(256, o.group * o.documents),
    )  # fmt: skip
    how = SamplingParams(temperature=1.0, max_tokens=o.response, ignore_eos=True)
    prompts = [ids for ids in prefixes for _ in range(o.group)]
    while turns.begin():
        out = engine.generate(prompts, how, use_tqdm=False)
        turns.end(sum(len(answer["token_ids"]) for answer in out))


CONTENDERS = {
    "ours": ours,
    "transformers-dynamic": lambda o, turns: transformers(o, turns, "dynamic"),
    "transformers-static": lambda o, turns: transformers(o, turns, "static"),
    "vllm": vllm,
    "nanovllm": nanovllm,
}
