"""Plots beside the JSON files, with matplotlib; none where it is not installed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def drawn(path: Path | None) -> bool:
    """Check that there is a path to plot beside, and that matplotlib is installed."""
    if path is not None and find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    return path is not None and find_spec("matplotlib") is not None


def _figure(width: float, height: float, columns: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".png"), dpi=150)
    pyplot.close(figure)


def bars(path: Path | None, contests: Sequence[dict], title: str) -> None:
    """Plot seconds (with range) and peak memory of each contender of each contest."""
    if not drawn(path):
        return
    figure, axes = _figure(10, 0.9 + 0.45 * sum(len(c["rows"]) for c in contests), columns=2)
    labels, places = [], []
    for number, contest in enumerate(contests):
        for row in contest["rows"]:
            if "median" not in row:
                continue
            place = len(labels) + 0.6 * number
            name = f"{row['contender']}, {contest['sequences']} × {contest['dtype']}"
            labels.append(name)
            places.append(place)
            colour = "tab:orange" if row["contender"] == "ours" else "tab:grey"
            off = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
            axes[0, 0].barh(place, row["median"], xerr=off, color=colour, capsize=3)
            axes[0, 1].barh(place, row["peak_bytes"] / 1e9, color=colour)
    axes[0, 0].set(yticks=places, yticklabels=labels, xlabel="seconds: median and range")
    axes[0, 1].set(yticks=places, yticklabels=[], xlabel="peak memory, GB")
    for axis in axes[0]:
        axis.invert_yaxis()
    figure.suptitle(title)
    _save(figure, path)


def lines(path: Path | None, panels: Sequence[dict], title: str) -> None:
    """Plot a panel per swept quantity: `x`, `series` of name -> y; `level` is a dashed line."""
    if not drawn(path):
        return
    figure, axes = _figure(3.4 * len(panels), 3.2, columns=len(panels))
    for axis, panel in zip(axes[0], panels):
        for name, y in panel["series"].items():
            axis.plot(panel["x"], y, marker="o", label=name)
        if "level" in panel:
            axis.axhline(panel["level"], color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=panel["label"], ylabel=panel["unit"])
        if panel.get("log"):
            axis.set_xscale("log", base=2)
            axis.set_xticks(panel["x"], [str(x) for x in panel["x"]])
        else:
            axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    _save(figure, path)
