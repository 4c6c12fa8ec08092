"""Draws docs/figures/ from the files under bench/results/. Needs matplotlib.

python bench/plots.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from tables import ROOT, result

FIGURES = ROOT / "docs" / "figures"
ABLATIONS = {
    "alpha": "alpha: first tokens always taken (k 32, p 0.25)",
    "k": "k: tokens at most (alpha 0, p 0.5)",
    "p": "p: chance of a token (alpha 0, k 64)",
    "choice": "which six tokens",
    "group": "completions of a prompt (128 a step)",
    "rank": "LoRA rank (all layers)",
    "layers": "layers with LoRA",
    "replay": "T-SPMO: prefixes replayed",
}
TUNED = (
    "svamp-smollm2",
    "multiply-embedded-hard",
    "multiply-embedded-harder",
    "multiply-2x2-smollm2",
    "multiply-3x3-smollm2",
)


def ablations() -> None:
    found = result("ablations")
    shown = [name for name in ABLATIONS if any(r["ablation"] == name for r in found["rows"])]
    figure, axes = plt.subplots(2, -(-len(shown) // 2), figsize=(13, 6.2), sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, shown, strict=False):
        rows = [r for r in found["rows"] if r["ablation"] == name]
        for value in dict.fromkeys(r["value"] for r in rows):
            curves(axis, [r["curve"] for r in rows if r["value"] == value], value)
        axis.set_title(ABLATIONS[name], fontsize=9)
        axis.legend(fontsize=8, loc="lower right")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("greedy accuracy on held-back problems", fontsize=9)
    save(figure, "ablations")


def rates(name: str) -> None:
    """Curves of bench/tuned.sh: a method each, its learning rates in it."""
    rows = result(f"{name}-lr")["rows"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(1, len(methods), figsize=(11, 3.4), sharex=True, sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for r in rows:
            if r["method"] == method:
                curves(axis, [r["curve"]], f"{r['lr']:g}")
        axis.set_title(method, fontsize=9)
        axis.legend(title="learning rate", fontsize=8, title_fontsize=8)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.supxlabel("step", fontsize=9)
    figure.supylabel(f"of {rows[0]['curve_problems']} held-back problems", fontsize=9)
    save(figure, name)


def methods(name: str) -> None:
    """Curves of each method's final runs."""
    rows = result(name)["rows"]
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for method in dict.fromkeys(r["method"] for r in rows):
        curves(axis, [r["curve"] for r in rows if r["method"] == method], method)
    axis.legend(fontsize=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(f"of {rows[0]['curve_problems']} held-back problems", fontsize=9)
    save(figure, name)


def growth() -> None:
    rows = result("growth")["rows"]
    base = {"shape": "qwen2-0.5b", "group": 16, "length": 256}
    axes_of = {"group": "completions of a prompt", "length": "new tokens", "shape": "model"}
    figure, axes = plt.subplots(1, len(axes_of), figsize=(12, 3.8))
    for axis, (key, label) in zip(axes, axes_of.items(), strict=True):
        on_axis = [r for r in rows if all(r[other] == value for other, value in base.items() if other != key)]
        if key == "shape":
            order = ["smollm2-135m", "qwen2-0.5b", "qwen2-1.5b", "qwen2.5-7b"]
            on_axis.sort(key=lambda r: order.index(r["shape"]))
        else:
            on_axis.sort(key=lambda r: r[key])
        x = [str(r[key]).removeprefix("qwen2.5-").removeprefix("qwen2-").removeprefix("smollm2-") for r in on_axis]
        for phase, colour in (("sample", "tab:blue"), ("train", "tab:orange")):
            name = {"sample": "sampling", "train": "training"}[phase]
            axis.plot(x, [r[f"{phase}_s"] for r in on_axis], "o-", color=colour, label=name)
            axis.plot(x, [r[f"roofline_{phase}_s"] for r in on_axis], ":", color=colour, label=f"{name}, roofline")
        axis.set_yscale("log")
        axis.set_xlabel(label, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds a step", fontsize=9)
    axes[0].legend(fontsize=8)
    save(figure, "growth")


def curves(axis: Axes, runs: Sequence[dict[str, Any]], label: str) -> None:
    """The mean of curves by step, and where they lie."""
    steps = list(runs[0])
    at = {step: [run[step] for run in runs] for step in steps}
    x = [int(step) for step in steps]
    [line] = axis.plot(x, [statistics.mean(at[step]) for step in steps], "o-", markersize=3, label=label)
    low, high = ([pick(at[step]) for step in steps] for pick in (min, max))
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axis.grid(alpha=0.3)


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


# Of each result file a figure.
DRAWN: dict[str, Callable[[], None]] = {
    "ablations": ablations,
    "growth": growth,
    **{f"{name}-lr": partial(rates, name) for name in TUNED},
    "svamp-smollm2-longer": partial(methods, "svamp-smollm2-longer"),
}

if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "shoestring", "svg.fonttype": "none"})
    for needed, draw in DRAWN.items():
        if (ROOT / "bench" / "results" / f"{needed}.json").is_file():
            draw()
