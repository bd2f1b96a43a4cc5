"""Define the panels of curves in the report, and draw the first of them as a picture."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmt.curriculum import TIERS
from rmt.system.records import write_whole

SMOOTHING = 0.8  # of the drawn curves: weight of the past
PICTURE = 4  # panels of curves.png; report.html has all

Series = dict[str, list[tuple[int, float]]]  # metric -> (step, value), in the order of steps


@dataclass(frozen=True)
class Panel:
    """Metrics that are drawn together; targets, to follow or to beat, are wide and pale."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    targets: tuple[str, ...] = ()
    healthy: str = ""
    low: float | None = 0.0  # ends of the axis; None: those of the data
    high: float | None = None
    smooth: bool = True


def by_tier(name: str) -> tuple[str, ...]:
    return tuple(f"{name}/{tier}" for tier in TIERS)


PANELS = (
    Panel("Next token named", "share of responses", (*by_tier("match"), "reward/mean"), high=1.0,
          healthy="All rise. The reward is the match and a little for the length."),
    Panel("Thinking length", "tokens", ("length/thinking",), ("budget",),
          healthy="Follows the budget, the wide pale line."),
    Panel("Raw text", "nats per token", ("loss/ntp", "held-out/ntp"), low=None,
          healthy="Does not rise: the text is not forgotten."),
    Panel("Responses", "share", ("share/well_formed", "share/zero_variance_groups",
                                 "share/advantage_from_length", "share/cut_off"), high=1.0,
          healthy="Well-formed near 1, cut off near 0. The other two are what does not teach the "
          "token: low, until little is left to learn."),
    Panel("Policy loss", "", ("loss/rl",), low=None,
          healthy="Near 0 and noisy: advantages have mean 0."),
    Panel("Tiers drawn", "share of positions", by_tier("draw"), by_tier("planned"), high=1.0,
          healthy="Follow the curriculum's plan, the wide pale lines."),
    Panel("Held-out accuracy", "share of positions", by_tier("held-out"), by_tier("held-out-plain"),
          high=1.0, smooth=False,
          healthy="Rises, the hard tier most. Wide pale lines: the likeliest token, no thought."),
    Panel("Speed", "tokens per second", ("speed/tokens_per_second",
          "speed/rollout_tokens_per_second", "speed/train_tokens_per_second"),
          healthy="Steady, or rising as the budget falls."),
    Panel("Memory", "GB", ("memory/peak_gb",), smooth=False,
          healthy="Constant after the first steps."),
)  # fmt: skip


def draw_curves(series: Series, path: Path) -> bool:
    """Draw the first panels in one picture; return False when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    for axis, panel in zip(axes.flat, PANELS[:PICTURE]):
        for name in (n for n in (*panel.metrics, *panel.targets) if series.get(n)):
            steps, values = zip(*series[name])
            style = "k--" if name in panel.targets else "-"
            axis.plot(steps, smoothed(values), style, label=name, linewidth=1.6)
        axis.set(title=panel.title, xlabel="step", ylabel=panel.unit)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    write_whole(path, drawn.getvalue())
    pyplot.close(figure)
    return True


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential mean, without a bias towards 0 at the start."""
    smooth, weight, total = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        smooth.append(total / weight)
    return smooth
