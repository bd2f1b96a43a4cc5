"""Draw the pictures of the docs: python -m experiments.pictures

docs/mask.png   a small forest and its attention mask, by the rule of the code (Eq. 11)
docs/step.png   the data flow of a training step
docs/head.png   the loop over chunks of tokens and slices of the head
docs/tiles.png  programs and warps of a kernel over rows of logits
docs/products.png  products with the head of each implementation, and what it takes on an H200
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

from rmt.forest import pack
from rmt.trees import Branch, Tree

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {"trunk": "#4c78a8", "stem": "#f2a65a", "branch": "#6aa84f", "other": "#9a8fc4"}


def example() -> tuple[list[Tree], list[tuple[str, str]]]:
    """Make two trees, and the name and kind of each of their tokens in the packed row."""
    one = Tree(0, range(5), (
        Branch(0, 3, (7,), (8, 9)), Branch(1, 3, (7,), (8,)), Branch(2, 5, (6,), (8, 9)),
    ))  # fmt: skip
    two = Tree(1, range(4), targets=[True] * 4)
    names = [(f"τ{i}", "trunk") for i in range(5)]
    names += [("p", "stem"), ("a₁", "branch"), ("a₂", "branch"), ("b₁", "branch")]
    names += [("q", "stem"), ("c₁", "branch"), ("c₂", "branch")]
    return [one, two], names + [(f"σ{i}", "other") for i in range(4)]


def draw_mask(path: Path) -> None:
    """Draw the trees on the left; on the right, where row i sees column j."""
    trees, names = example()
    forest = pack(trees)
    n = len(forest)
    sees = forest.sees(*torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")).numpy()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 5), width_ratios=(1.1, 1), constrained_layout=True
    )
    _draw_trees(left)
    kinds = list(COLOURS)
    shown = np.where(sees, [[1 + kinds.index(kind) for _, kind in names]] * n, 0)
    right.imshow(shown, cmap=ListedColormap(["white", *COLOURS.values()]), vmin=0, vmax=4)
    labels = [name for name, _ in names]
    right.set_xticks(range(n), labels)
    right.set_yticks(range(n), labels)
    right.set_xticks(np.arange(-0.5, n), minor=True)
    right.set_yticks(np.arange(-0.5, n), minor=True)
    right.grid(which="minor", color="#dddddd", linewidth=0.6)
    right.tick_params(which="minor", length=0)
    right.set(xlabel="seen token j", ylabel="token i", title="sees(i, j), the packed row")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_trees(axis) -> None:
    place = lambda x, y, name, kind: (
        axis.add_patch(FancyBboxPatch((x - 0.32, y - 0.27), 0.64, 0.54, facecolor=COLOURS[kind],
                                      edgecolor="none", boxstyle="round,pad=0.05")),
        axis.text(x, y, name, ha="center", va="center", color="white", fontsize=11),
    )  # fmt: skip
    rows = {
        0: [(i, f"τ{i}", "trunk") for i in range(5)],
        -1.2: [(3, "p", "stem"), (4, "a₁", "branch"), (5, "a₂", "branch")],
        -2.2: [(4, "b₁", "branch")],
        1.2: [(5, "q", "stem"), (6, "c₁", "branch"), (7, "c₂", "branch")],
        -3.9: [(i, f"σ{i}", "other") for i in range(4)],
    }
    for (x0, y0), (x1, y1) in (((2.3, -0.15), (2.7, -1.1)), ((3.3, -1.35), (3.7, -2.1)),
                               ((4.3, 0.15), (4.7, 1.1))):  # fmt: skip
        axis.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="->", color="#777777"))
    for y, tokens in rows.items():
        for x, name, kind in tokens:
            place(x, y, name, kind)
    axis.text(-0.4, 1.2, "trunk: a document τ", color=COLOURS["trunk"])
    axis.text(-0.4, -1.25, "stem: a question at τ3", color=COLOURS["stem"])
    axis.text(-0.4, -2.25, "branches: two responses a, b", color=COLOURS["branch"])
    axis.text(-0.4, -3.2, "another tree: raw text σ, targets from σ1 on", color=COLOURS["other"])
    axis.set(xlim=(-0.8, 7.7), ylim=(-4.6, 2), title="a forest of two trees: 16 tokens")
    axis.axis("off")


STEP = (  # x, y, text, colour
    (0.0, 2.0, "documents\nentropies, tiers", "trunk"),
    (2.2, 2.0, "1 draw\n2 budget B_t", "trunk"),
    (4.4, 2.0, "3 prompts\ntrunk + stems", "stem"),
    (6.6, 2.0, "4 rollouts\n(P, G) responses", "branch"),
    (6.6, 0.4, "5 rewards\n(P, G)", "branch"),
    (4.4, 0.4, "6 advantages\n(P, G)", "branch"),
    (2.2, 0.4, "7 loss, one forest\n−J_RL + λ·L_NTP", "stem"),
    (0.0, 0.4, "8 update\nAdamW", "trunk"),
)


def draw_step(path: Path) -> None:
    """Draw the statements of train_step and the data flow between them."""
    figure, axis = pyplot.subplots(figsize=(10, 3.4), constrained_layout=True)
    for x, y, text, kind in STEP:
        axis.add_patch(
            FancyBboxPatch((x, y), 1.7, 0.8, boxstyle="round,pad=0.05", facecolor=COLOURS[kind],
                           edgecolor="none")
        )  # fmt: skip
        axis.text(x + 0.85, y + 0.4, text, ha="center", va="center", color="white", fontsize=10)
    arrow = lambda a, b, **more: axis.add_patch(
        FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=14, color="#555555", **more)
    )
    for x in (1.78, 3.98, 6.18):
        arrow((x, 2.4), (x + 0.36, 2.4))
        arrow((x + 0.36, 0.8), (x, 0.8))
    arrow((7.45, 1.92), (7.45, 1.28))
    arrow((0.85, 1.28), (7.3, 1.92), connectionstyle="arc3,rad=-0.05", linestyle="--")
    axis.text(3.4, 1.62, "the same weights sample and learn", color="#555555", fontsize=9)
    arrow((0.5, 1.92), (2.4, 1.28), connectionstyle="arc3,rad=0.1")
    axis.text(0.15, 1.5, "raw text", color="#555555", fontsize=9)
    axis.set(xlim=(-0.2, 8.5), ylim=(0.1, 3.1))
    axis.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_head(path: Path) -> None:
    """Draw the (N, V) logits in chunks and slices, and the parts that exist at one time."""
    figure, axis = pyplot.subplots(figsize=(9, 4.2), constrained_layout=True)
    chunks, slices = 3, 6
    for i in range(chunks):
        for j in range(slices):
            now, kept = i == 1 and j == 3, i == 1 and j < 3
            colour = COLOURS["branch"] if now else COLOURS["stem"] if kept else "#eeeeee"
            axis.add_patch(Rectangle((j * 1.2, -i * 1.1), 1.15, 1.05, facecolor=colour))
    axis.text(3 * 1.2 + 0.57, -0.58, "z", ha="center", va="center", color="white", fontsize=13)
    axis.text(0.57 + 1.2, -0.58, "exp(z − max)", ha="center", va="center", color="white")
    axis.annotate("", (7.2, 1.35), (0, 1.35), arrowprops=dict(arrowstyle="<->"))
    axis.text(3.6, 1.5, "V rows of the head, a slice of 4,096 at a time", ha="center")
    axis.annotate("", (-0.25, -2.2), (-0.25, 1.05), arrowprops=dict(arrowstyle="<->"))
    axis.text(-0.4, -0.6, "N tokens, a chunk at a time", rotation=90, ha="right", va="center")
    notes = (
        (0.9, "for each chunk of tokens:", "#333333"),
        (0.5, "  for each slice: z = hidden @ headᵀ, fp32", COLOURS["branch"]),
        (0.1, "     its max, sum and exp(z − max) are kept", COLOURS["stem"]),
        (-0.3, "  log p and entropy from the sums", "#333333"),
        (-0.7, "  loss of the chunk, its slopes g and h", "#333333"),
        (-1.1, "  for each slice: dz from exp(z − max), g, h", COLOURS["branch"]),
        (-1.5, "     grad_hidden += dz @ head", "#333333"),
        (-1.9, "     grad_head += dzᵀ @ hidden", "#333333"),
    )
    for y, text, colour in notes:
        axis.text(7.6, y, text, color=colour, fontsize=10, family="monospace")
    axis.set(xlim=(-1, 13.2), ylim=(-2.5, 1.9))
    axis.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_tiles(path: Path) -> None:
    """Draw rows of logits in tiles, one of them as its warps."""
    figure, axis = pyplot.subplots(figsize=(10, 3), constrained_layout=True)
    rows, tiles, warps = 5, 4, 8
    for i in range(rows):
        for j in range(tiles):
            own = (i, j) == (2, 1)
            colour, last = COLOURS["branch" if own else "trunk"], 1.35 if j == tiles - 1 else 2.0
            axis.add_patch(Rectangle((2.1 * j, -i), 2, 0.85, facecolor="#eeeeee"))
            axis.add_patch(Rectangle((2.1 * j, -i), last, 0.85, facecolor=colour))
            axis.text(2.1 * j + last / 2, 0.43 - i, f"program ({i}, {j})", ha="center",
                      va="center", color="white", fontsize=8)  # fmt: skip
    axis.text(
        2.1 * tiles - 0.1, -rows + 0.55, "grey: columns that are not there, masked", ha="right"
    )
    axis.text(0, 1.1, "a row of V logits, cut into tiles of 4,096 columns", fontsize=10)
    for k in range(warps):
        axis.add_patch(Rectangle((9.2 + 0.5 * k, -2), 0.46, 0.85, facecolor=COLOURS["branch"]))
        axis.text(9.43 + 0.5 * k, -1.57, str(k), ha="center", va="center", color="white")
    axis.annotate("", (9.15, -1.57), (8.45, -1.57), arrowprops=dict(arrowstyle="->"), zorder=0)
    axis.text(9.2, -0.9, "one program: 8 warps of 32 threads,\n16 columns to a thread", va="bottom")
    axis.text(9.2, -2.15, "stores m, r, s: three numbers", va="top")
    axis.set(xlim=(-0.2, 13.6), ylim=(-rows + 0.3, 1.5))
    axis.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


MEASURED = DOCS.parent / "benchmarks/results/h200-2026-11-26.json"
PRODUCTS = {  # part of the file, operation -> contender -> its name here, products with the head
    ("kernels, after the rewritten head", "objective"): {
        "ours triton one pass": ("ours", 3), "ours triton recompute": ("ours, any loss", 4),
        "torch.compile": ("torch.compile, whole logits", 3), "eager": ("eager, whole logits", 3),
    },
    ("kernels", "cross-entropy"): {
        "ours triton one pass": ("ours, before it was tuned", 3), "Liger": ("Liger-Kernel", 3),
        "Liger, fp32 sums": ("Liger-Kernel, fp32 sums", 3), "CCE": ("cut-cross-entropy", 4),
        "torch.compile": ("torch.compile, whole logits", 3), "eager": ("eager, whole logits", 3),
    },
}  # fmt: skip
TITLES = {"objective": "loss with entropy", "cross-entropy": "cross-entropy"}


def draw_products(path: Path) -> None:
    """Draw the least time of the products with the head, and the times measured on an H200."""
    parts = json.loads(MEASURED.read_text(encoding="utf-8"))["parts"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 2.6), constrained_layout=True)
    for axis, ((part, operation), names) in zip(axes, PRODUCTS.items()):
        shape = parts[part]["results"]["qwen3-14b"]
        flops = 2 * shape["tokens"] * shape["vocabulary"] * shape["hidden"]
        product = 1e3 * flops / shape["ceilings"]["flops"]
        rows = {r["contender"]: r for r in shape["rows"] if r["operation"] == operation}
        for y, (contender, (_, products)) in enumerate(names.items()):
            row, colour = rows[contender], COLOURS["branch" if "ours" in contender else "trunk"]
            for k in range(products):
                axis.barh(-y, product - 0.6, left=k * product, color=colour, alpha=0.45)
            middle, low, high = (1e3 * row[name] for name in ("median", "low", "high"))
            axis.errorbar(middle, -y, xerr=[[middle - low], [high - middle]], fmt="o",
                          color="black", markersize=4, capsize=3)  # fmt: skip
        axis.set_yticks([-y for y in range(len(names))], [name for name, _ in names.values()])
        axis.set(xlabel="ms", title=f"{TITLES[operation]}, both gradients", xlim=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    draw_tiles(DOCS / "tiles.png")
    draw_products(DOCS / "products.png")
    draw_mask(DOCS / "mask.png")
    draw_step(DOCS / "step.png")
    draw_head(DOCS / "head.png")


if __name__ == "__main__":
    main()
