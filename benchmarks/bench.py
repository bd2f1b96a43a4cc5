"""`make bench`: all side-by-side benchmarks on a CPU within half an hour, and one table.

    python -m benchmarks.bench               as much as fits into 30 minutes on two cores
    python -m benchmarks.bench --full        both dtypes and more rounds, about two hours
    python -m benchmarks.bench rollout       one part alone
    python -m benchmarks.bench --table       the table of earlier measurements

Each part is a separate command, printed as it starts; numbers and plots go to runs/bench after each
contest. When the time is up, the running part is stopped, the rest is skipped, and the table says
so. Leave the machine otherwise idle: OpenMP's threads wait for each other.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

OUT = Path("runs/bench")
# Most important first. A step of TRL takes one to two minutes on two cores.
PARTS = {
    "rl_step": "--rounds 5 --dtypes bfloat16",
    "rollout": "--rounds 3 --dtypes bfloat16 --sequences 32 1 --profile",
    "forest": "--rounds 3 --dtypes bfloat16 --sweep-rounds 1",
    "scaling": "--rounds 1 --largest 64",
}
FULL = {
    "rl_step": "--rounds 5 --dtypes bfloat16 float32 --contenders trl trl-checkpointing",
    "rollout": "--rounds 7 --dtypes bfloat16 float32 --sequences 32 1 --profile",
    "forest": "--rounds 5 --dtypes bfloat16 float32 --sweep-rounds 3",
    "scaling": "--rounds 5",
}
LINE = "{:9}{:52}{:>21}  {:21}{:>21}{:>8}{:>8}{:>6}"
HEAD = ("", "", "ours, s (range)", "peer", "s (range)", "faster", "memory", "runs")


def run(name: str, flags: list[str], seconds: float) -> str:
    """Run one part in its own process; return a remark if it failed, else an empty string."""
    file = OUT / f"{name}.json"
    file.unlink(missing_ok=True)  # remove an older run's result
    command = ["-m", f"benchmarks.{name}", *flags, "--json", str(file)]
    print(f"\n=== python {' '.join(command)}", flush=True)
    try:
        status = subprocess.run([sys.executable, *command], timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return "stopped when the time was over"
    return f"failed with exit status {status}" if status else ""


def table(names: list[str], remarks: dict[str, str]) -> str:
    lines = [LINE.format(*HEAD)]
    for name in names:
        file = OUT / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for contest in found.get("contests", ()):
            lines += compared(name, contest)
        for quantity, row in found.get("summary", {}).items():
            lines.append(f"{name:9}{straight(quantity, row)}")
        if remarks.get(name):
            lines.append(f"{name:9}{remarks[name]}")
    lines.append(
        "faster: theirs / ours. memory: ours / theirs, at the peak. runs: of each, in turns"
    )
    return "\n".join(lines)


def compared(name: str, contest: dict) -> list[str]:
    """Return a line for each peer of a contest."""
    ours, lines = contest["rows"][0], []
    many = contest.get("branches") or f"{contest['documents']}×{contest['group']}"
    setting = f"{many} responses of {contest['response']} after {contest['prefix']}"
    setting += f", {contest['dtype']}"
    seconds = lambda row: f"{row['median']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
    for peer in contest["rows"][1:]:
        if ratio := contest["each"].get(peer["contender"]):
            lines.append(LINE.format(
                name, setting, seconds(ours), peer["contender"], seconds(peer),
                f"{1 / ratio['ratio_time']:.2f}", f"{ratio['ratio_memory']:.2f}",
                len(peer["times"]),
            ))  # fmt: skip
        else:
            lines.append(f"{name:9}{setting:52}{peer['contender']}: {peer['reason']}")
    if "profile" in contest:
        share = contest["profile"]["outside"]
        lines.append(f"{'':9}of our decode steps {share:.0%} are spent outside matrix products")
    return lines


def straight(quantity: str, row: dict) -> str:
    """Format how well a straight line in response tokens fits, and the shared rows."""
    said = []
    for phase, fit in row["fit"].items():
        if fit:
            said.append(f"{phase} {1e3 * fit['slope']:.2f} ms/token, R² {fit['r2']:.3f}")
    values, rows = (" ".join(map(str, row[key])) for key in ("values", "shared_rows"))
    return f"{quantity} {values}: {'; '.join(said)}; rows without responses: {rows}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all of them")
    parser.add_argument("--full", action="store_true", help="as often as the README's numbers")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--minutes", type=float, help="default: 30; with --full 180")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--flags", default="", help="more flags for every part, in one string")
    o = parser.parse_args()
    names = o.parts or list(PARTS)
    ends = time.monotonic() + 60 * (o.minutes or (180 if o.full else 30))
    remarks = {}
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names if not o.table else ():
        left = ends - time.monotonic()
        if left <= 0:
            remarks[name] = "not begun: the time was over"
            continue
        flags = ["--model", o.model, *(FULL if o.full else PARTS)[name].split(), *o.flags.split()]
        remarks[name] = run(name, flags, left)
    print("\n" + table(names, remarks))
    sys.exit(any(remarks.values()))


if __name__ == "__main__":
    main()
