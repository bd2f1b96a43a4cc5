"""Time sampling: ours against transformers' generate, and vLLM and nano-vllm on a GPU.

    python -m benchmarks.rollout --model smollm2-135m --json rollout.json

`documents` prefixes of `prefix` tokens, `group` responses of exactly `response` tokens to each, at
temperature 1 from the whole vocabulary, in the same dtype and with as many threads. --sequences 32
is 4 prefixes times 8 responses, 1 is one response to one prefix. The time from token ids to token
ids counts: caches, prefill and decoding. Loading and tokenising do not.

Before the contest, transformers' greedy tokens must equal ours (fp32), and our sampled tokens must
have the log-probabilities that we report (teacher-forced by transformers; both dtypes). Our sampler
computes the prefix once per group; generate repeats it with either cache, as it does for any
caller. transformers' continuous batching is not measured.

--profile also measures the share of our decode steps outside matrix products.
`roofline` of ours: the time at the machine's ceilings (measured in this run) to read weights,
trunks and own keys in every step, plus the arithmetic of the prefill, over the measured time.
"""

import argparse

import torch

from benchmarks import inputs, machine, plots
from benchmarks.contest import OURS, Player, Unavailable, hold, take_part
from benchmarks.profiling import report
from benchmarks.results import ratios, table, write
from benchmarks.samplers import CONTENDERS, absent
from models.config import ModelConfig
from rmt.engine.step_metrics import forward_flops

MODULE = "benchmarks.rollout"
# Of ours against transformers, teacher-forced. bf16 rounds logits around 20 by 0.06.
LIMITS = {"float32": (1e-4, 5e-3), "bfloat16": (0.06, 1.0)}  # mean, largest


def check(dtype: str):
    """Return a check of a peer against ours: transformers only, the others give no log p."""

    def agree(ours: Player, peer: Player) -> dict:
        if not peer.name.startswith("transformers"):
            return {"agrees": True, "checked": False}
        found = peer.ask("verify", ours.ask("reference"))
        mean, largest = LIMITS[dtype]
        agrees = found["logprob_mean"] <= mean and found["logprob_max"] <= largest
        # In bf16, rounding decides between almost equally likely tokens.
        agrees = agrees and (dtype != "float32" or found["greedy_equal"] == 1)
        return {"agrees": agrees, "checked": True, **found}

    return agree


def ideal_seconds(o: argparse.Namespace, roof: dict[str, float]) -> float:
    """Return the time at the ceilings: arithmetic of the prefill, reads of every decode step."""
    place, dtype = inputs.directory(o), inputs.dtype_of(o)
    c = ModelConfig.from_directory(place)
    trees = inputs.trees([[0] * o.prefix] * o.documents)
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    layer = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)
    weights = c.num_hidden_layers * layer + c.vocab_size * c.hidden_size
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    own = o.documents * o.group * o.response * (o.response + 1) // 2  # over all steps
    trunks = o.response * o.documents * o.prefix
    moved = (o.response * weights + (own + trunks) * per_token) * dtype.itemsize
    return forward_flops(c, trees) / roof["flops"] + moved / roof["bytes"]


def profile_ours(o: argparse.Namespace, flags: list[str]) -> dict:
    player = Player(MODULE, OURS, flags)
    try:
        player.answer()
        player.ask("turn")  # warm-up
        return player.ask("profile")
    except Unavailable as reason:
        raise SystemExit(f"ours failed: {reason}") from None
    finally:
        player.leave(kill=True)


def contest(
    o: argparse.Namespace, sequences: int, dtype: str, names: list[str], roof: dict[str, float]
) -> dict:
    """Measure one number of sequences in one dtype."""
    group = min(o.group, sequences)
    one = argparse.Namespace(
        **vars(o) | {"dtype": dtype, "group": group, "documents": max(1, sequences // group),
                     "sequences": None, "dtypes": None, "contenders": None, "profile": None,
                     "json": None}
    )  # fmt: skip
    flags = inputs.flags(one)
    rows = hold(MODULE, names, flags, o.rounds, check(dtype), absent())
    rows[0]["roofline"] = ideal_seconds(one, roof) / rows[0]["median"]
    found = {
        "sequences": one.documents * group, "documents": one.documents, "group": group,
        "prefix": o.prefix, "response": o.response, "dtype": dtype, "ceilings": roof,
        **ratios(rows), "rows": rows,
    }  # fmt: skip
    if o.profile:
        found["profile"] = profile_ours(one, flags)
    return found


def main() -> None:
    parser = inputs.parser_of(__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", help="default: 32 and 1")
    parser.add_argument("--dtypes", nargs="+", choices=LIMITS, help="default: bfloat16")
    parser.add_argument("--dtype", choices=LIMITS, default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="and where our decoding spends")
    o = parser.parse_args()
    if o.contender:
        return take_part(CONTENDERS[o.contender], o)
    inputs.prepare(o)
    command = f"python -m {MODULE} {' '.join(inputs.flags(o, 'dtype'))}"
    result = {"command": command, **machine.about(machine.device_here()), "contests": []}
    print(f"{result['device']}\n{command}", flush=True)
    names = [OURS, *(n for n in o.contenders or CONTENDERS if n != OURS)]
    for dtype in o.dtypes or ["bfloat16"]:
        where = machine.device_here(), getattr(torch, dtype)
        roof = machine.known(*where) or machine.ceilings(*where)
        for sequences in o.sequences or [32, 1]:
            found = contest(o, sequences, dtype, names, roof)
            result["contests"].append(found)
            for key in ("ratio_time", "ratio_memory"):
                result.setdefault(key, found[key])  # of the first contest
            write(o.json, result)
            print(
                f"\n{found['sequences']} sequences, {found['documents']} prefixes of {o.prefix}, "
                f"{o.response} new tokens, {dtype}; ours at {found['rows'][0]['roofline']:.0%} of "
                f"the roofline\n{table(found['rows'], found)}", flush=True
            )  # fmt: skip
            if "profile" in found:
                print(report(found["profile"]))
    plots.bars(o.json, result["contests"], "sampling of responses")


if __name__ == "__main__":
    main()
