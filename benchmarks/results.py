"""Result rows of benchmarks: numbers of each contender, and ours against the others.

A row has `contender`, and either a `reason` why there are no numbers, or `times` in seconds, their
`median`, `low` and `high`, `tokens` of one turn, `tokens_per_second` and `peak_bytes`. The first
row is ours. Ratios are ours / theirs, of medians and of peaks: below 1 ours is better.
"""

import json
import statistics
from pathlib import Path
from typing import Any


def spread(times: list[float], tokens: float) -> dict:
    median = statistics.median(times)
    return {
        "times": times, "median": median, "low": min(times), "high": max(times),
        "tokens": tokens, "tokens_per_second": tokens / median,
    }  # fmt: skip


def ratios(rows: list[dict]) -> dict:
    """Return ratio_time and ratio_memory of ours to the first, the best and each peer."""
    ours, peers = rows[0], [row for row in rows[1:] if "median" in row]
    found: dict[str, Any] = {"ratio_time": None, "ratio_memory": None, "peer": None, "each": {}}
    for peer in peers:
        time_, memory = (ours[k] / peer[k] for k in ("median", "peak_bytes"))
        found["each"][peer["contender"]] = {"ratio_time": time_, "ratio_memory": memory}
    if peers:
        found |= {"peer": peers[0]["contender"], **found["each"][peers[0]["contender"]]}
        best = max(found["each"].items(), key=lambda item: item[1]["ratio_time"])
        found |= {"best_peer": best[0], "ratio_time_best": best[1]["ratio_time"]}
        found["ratio_memory_best"] = max(r["ratio_memory"] for r in found["each"].values())
    return found


def table(rows: list[dict], compared: dict) -> str:
    lines = [
        f"{'':22}{'seconds (range)':>24}{'tokens/s':>10}{'peak GB':>9}  ours / it: time memory"
    ]
    for row in rows:
        if "reason" in row:
            lines.append(f"{row['contender']:22}not here: {row['reason']}")
            continue
        spread = f"{row['median']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
        line = f"{row['contender']:22}{spread:>24}{row['tokens_per_second']:10.1f}"
        line += f"{row['peak_bytes'] / 1e9:9.2f}"
        if ratio := compared["each"].get(row["contender"]):
            line += f"{ratio['ratio_time']:17.3f}{ratio['ratio_memory']:7.2f}"
            line += f"   ours {1 / ratio['ratio_time']:.1f} times as fast"
        lines.append(line)
    return "\n".join(lines)


def write(path: Path | None, result: dict) -> None:
    """Save the results so far, to keep them if the run is cut off."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
