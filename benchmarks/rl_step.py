"""Time a whole RL step: ours against TRL's GRPOTrainer.

    python -m benchmarks.rl_step --model smollm2-135m --json rl_step.json

`documents` prefixes, `group` responses of exactly `response` tokens to each: sampling, rewards,
advantages, loss, backward, clipping and AdamW, with the same model, prompts, lengths, dtype,
optimiser and threads (see benchmarks/trainers.py). TRL accumulates gradients over --micro responses
at a time, without gradient checkpointing (faster) or with it (its default, as ours).
The benchmark compares what users get, not one kernel: ours computes each prefix once, TRL once per
response, in sampling and in training. Data loading, logging and saving are off in both. No raw text
is trained on, because TRL has no such loss. TRL with vLLM, several GPUs or PEFT is not measured.

Before the contest, in fp32 and in a separate process, on the same responses: TRL's own loss and
ours must have the same log-probabilities and gradient (cosine > 0.9999, and the same norm).

mfu (on a GPU that rmt/engine/step_metrics.py knows): operations of training, without recomputation,
per second of our step after the rollouts, over the GPU's peak.
"""

import argparse

import torch

from benchmarks import inputs, machine, plots
from benchmarks.contest import OURS, Failed, Player, Unavailable, hold, take_part
from benchmarks.results import ratios, table, write
from benchmarks.trainers import CONTENDERS
from models.config import ModelConfig
from rmt.engine.step_metrics import forward_flops, peak_flops

MODULE = "benchmarks.rl_step"
DTYPES = ("bfloat16", "float32")
PEERS = (OURS, "trl", "trl-checkpointing")
LIMITS = {"logprob_difference": 1e-3, "gradient_difference": 1e-3}  # in nats; of the norm
COSINE = 0.9999


def verify(o: argparse.Namespace) -> dict:
    """Compare the two losses; SystemExit if they differ. Without TRL, return a reason."""
    few = {"documents": min(2, o.documents), "group": 2, "response": min(16, o.response),
           "micro": 4, "dtype": "float32"}  # fmt: skip
    player = Player(MODULE, "verify", inputs.flags(_one(o, **few)))
    try:
        player.answer()
        found = player.ask("turn")
    except Failed as reason:
        raise SystemExit(f"comparing the losses {reason}") from None
    except Unavailable as reason:
        return {"verified": False, "reason": str(reason)}
    finally:
        player.leave(kill=True)
    found = {name: found[name] for name in (*LIMITS, "gradient_cosine")}
    agrees = found["gradient_cosine"] > COSINE and all(
        found[n] <= limit for n, limit in LIMITS.items()
    )
    if not agrees:
        raise SystemExit(f"ours and TRL compute different losses: {found}")
    return {"verified": True, **found}


def _one(o: argparse.Namespace, **changes) -> argparse.Namespace:
    """Return the options of a contender's process."""
    without = {"dtypes": None, "contenders": None, "json": None, "no_check": None, "apart": None}
    return argparse.Namespace(**vars(o) | without | changes)


def utilisation(o: argparse.Namespace, dtype: str, ours: dict) -> dict:
    """Return TFLOP/s of our training phase, and the share of the GPU's peak if known."""
    config = ModelConfig.from_directory(inputs.directory(o))
    answers = [[[0] * o.response] * o.group] * o.documents
    needed = 3 * forward_flops(config, inputs.trees([[0] * o.prefix] * o.documents, answers))
    seconds = ours["median"] - ours["rollout_seconds"]
    rate = needed / seconds
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops(gpu, getattr(torch, dtype))
    return {"training_tflops": rate / 1e12, "mfu": rate / peak if peak else None}


def contest(o: argparse.Namespace, dtype: str, names: list[str]) -> dict:
    flags = inputs.flags(_one(o, dtype=dtype))
    rows = hold(MODULE, names, flags, o.rounds, together=not o.apart)
    rows[0] |= utilisation(o, dtype, rows[0])
    return {
        "sequences": o.documents * o.group, "documents": o.documents, "group": o.group,
        "prefix": o.prefix, "response": o.response, "micro": o.micro, "dtype": dtype,
        "interleaved": not o.apart, **ratios(rows), "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = inputs.parser_of(__doc__)
    parser.add_argument("--micro", type=int, default=8, help="responses per backward pass")
    parser.add_argument("--trl-cache", choices=("static", "dynamic"), help="of TRL's generation")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bfloat16")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--contenders", nargs="+", choices=PEERS, help="default: trl")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--no-check", action="store_true", help="do not compare the losses first")
    parser.add_argument("--apart", action="store_true", help="not in turns: memory holds one only")
    o = parser.parse_args()
    if o.contender:
        return take_part(CONTENDERS[o.contender], o)
    inputs.prepare(o)
    command = f"python -m {MODULE} {' '.join(inputs.flags(o, 'dtype'))}"
    result = {"command": command, **machine.about(machine.device_here()), "contests": []}
    print(f"{result['device']}\n{command}", flush=True)
    names = [OURS, *(n for n in o.contenders or PEERS[1:2] if n != OURS)]
    if len(names) > 1 and not o.no_check:
        result["check"] = verify(o)
        print(f"the losses, before the contest: {result['check']}", flush=True)
    for dtype in o.dtypes or ["bfloat16"]:
        found = contest(o, dtype, names)
        result["contests"].append(found)
        for key in ("ratio_time", "ratio_memory"):
            result.setdefault(key, found[key])  # of the first contest
        write(o.json, result)
        ours = found["rows"][0]
        print(
            f"\none RL step: {o.documents} prefixes of {o.prefix} × {o.group} responses of "
            f"{o.response}, {dtype}; of ours {ours['rollout_seconds']:.2f} s are sampling, training"
            f" runs at {ours['training_tflops']:.3g} TFLOP/s\n{table(found['rows'], found)}",
            flush=True,
        )
    plots.bars(o.json, result["contests"], "one RL step")


if __name__ == "__main__":
    main()
