"""Writes the tables of README.md and docs/results.md from the files under bench/results/: no figure is typed by hand.

python bench/tables.py            rewrites what stands between <!-- table NAME --> and <!-- end -->
"""

from __future__ import annotations

import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from shoestring.evaluation.intervals import t_interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", *((ROOT / "docs" / f"{name}.md") for name in ("results", "memory", "speed")))
_BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(values: list[float], form: str) -> str:
    """The mean, and the least and greatest where there are several."""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def demo_compare() -> str:
    found = result("demo-compare")
    rows = []
    for name in ("grpo", "s-grpo", "t-spmo"):
        runs = [row for row in found["rows"] if row["algorithm"] == name]
        sampled, trained = (statistics.mean(r[key] for r in runs) for key in ("tokens_sampled", "tokens_trained"))
        rows.append(
            [
                f"`{name}`",
                f"{runs[0]['before']:.1%}",
                spread([r["after"] for r in runs], ".1%"),
                f"{sampled:,.0f}",
                f"{trained:,.0f} ({trained / sampled:.1%})",
                spread([r["seconds"] for r in runs], ".0f"),
            ]
        )
    seeds = len({row["seed"] for row in found["rows"]})
    first, versions = found["rows"][0], found["versions"]
    note = (
        f"\nGreedy accuracy on {first['problems']} held-out problems after {first['steps']} steps; means of "
        f"{seeds} seeds, with the least and the greatest. {found['device']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {found['date']}.\n"
    )
    return table(["algorithm", "before", "after", "tokens sampled", "tokens trained", "seconds"], rows) + note


_MORE = {"plain": "not refilled", "longer": "longer"}


def tuned(name: str) -> str:
    """Of bench/tuned.sh: three rates of each method, then seeds at the best of them."""
    found, tuning = result(name), result(f"{name}-lr")
    base = found["rows"][0]
    beside = [kind for kind in _MORE if (RESULTS / f"{name}-{kind}.json").is_file()]
    more = [(kind, r) for kind in beside for r in result(f"{name}-{kind}")["rows"]]
    of_all = [*found["rows"], *(r for _, r in more)]
    befores = {r["base_accuracy"]: f"{r['base_low']:.1%} to {r['base_high']:.1%}" for r in of_all}
    before = "; ".join(f"{accuracy:.1%} ({interval})" for accuracy, interval in befores.items())
    rates = sorted({r["lr"] for r in tuning["rows"]})
    held_back = {(r["method"], r["lr"]): r["accuracy"] for r in tuning["rows"]}
    others = list(found.get("base_elsewhere", {}))
    abroad = [_elsewhere([found["base_elsewhere"]], other) for other in others]
    at_first = _passes([found["base_at_temperature_1"]])
    rows = [["before", *[""] * len(rates), "", before, "", "", at_first, *abroad, *[""] * 4]]
    kinds = {f"`{r['method']}`": r["method"] for r in found["rows"]}
    runs_of = {label: [r for r in found["rows"] if r["method"] == method] for label, method in kinds.items()}
    for kind, r in more:
        size = _MORE[kind] if kind == "plain" else _size(r)
        on = "" if r["task"] == base["task"] else f", {r['task']}"
        runs_of.setdefault(f"`{r['method']}`, {size}{on}", []).append(r)
    for label, runs in runs_of.items():
        chosen, accuracy, each, *cost = _over_seeds(runs)
        gains = "; ".join(
            f"{100 * r['gain']:+.1f} ({100 * r['gain_low']:+.1f} to {100 * r['gain_high']:+.1f})" for r in runs
        )
        of_rates = [held_back.get((kinds[label], rate)) if label in kinds else None for rate in rates]
        tried = ["" if share is None else f"{share:.1%}" for share in of_rates]
        passes = _passes([r.get("at_temperature_1") for r in runs])
        peak = max(r["peak_allocated_gib"] for r in runs)
        memory = f"{peak:.2f}" if peak else ""
        abroad = [_elsewhere([r.get("elsewhere", {}) for r in runs], other) for other in others]
        rows.append([label, *tried, chosen, accuracy, each, gains, passes, *abroad, *cost[:2], memory, cost[2]])
    headings = ["method", *[f"held back, {rate:g}" for rate in rates], "rate chosen", "test (95 %)", "each seed"]
    tries = ", ".join(found["base_at_temperature_1"].get("pass_at_k", {}))
    headings += ["paired gain, points", f"pass@{tries}", *others]
    headings += ["tokens sampled", "tokens trained", "peak GiB", "seconds"]
    checkpoint = (
        f", with the checkpoint that did best on {base['curve_problems']} held-back training problems"
        if base["chosen_on"]
        else ""
    )
    later = "".join(f"; {_MORE[kind]} {result(f'{name}-{kind}')['date']}" for kind in beside)
    note = (
        f"\nGreedy accuracy on {base['problems']} problems after {base['steps']} steps of {base['prompts']} prompts x "
        f"{base['completions']} completions{checkpoint}; the rate was chosen by {tuning['rows'][0]['problems']} "
        "held-back problems, seed 0. Intervals: Student's t over three seeds, else Wilson's over problems; of a gain a "
        "bootstrap over problems. pass@k at temperature 1. Several runs shared the machine, and the seconds. "
        f"{where(found)}{later}.\n"
    )
    return table(headings, rows) + note


def svamp_short() -> str:
    found, kinds = result("svamp-smollm2"), {"": "svamp-smollm2", ", not refilled": "svamp-smollm2-plain"}
    rows = []
    for how, name in kinds.items():
        for method, runs in _by_method(result(name)["rows"]):
            _, accuracy, each, *cost = _over_seeds(runs)
            peak = max(r["peak_allocated_gib"] for r in runs)
            rows.append([f"`{method}`{how}", _befores(runs), accuracy, each, cost[1], f"{peak:.2f}"])
    headings = ["algorithm", "after sft", "after RL (95 %)", "each seed", "tokens trained", "peak GiB"]
    return table(headings, rows) + f"\n{where(found)}.\n"


def svamp_starts() -> str:
    """Every run judged by the test, whatever its warm start."""
    kinds = {
        "refilled": ("svamp-smollm2", "svamp-smollm2-refilled-earlier"),
        "not refilled": ("svamp-smollm2-plain", "svamp-smollm2-earlier"),
        "longer": ("svamp-smollm2-longer", "svamp-smollm2-longer-earlier"),
    }
    rows = []
    for kind, names in kinds.items():
        for method, runs in _by_method([r for name in names for r in result(name)["rows"]]):
            gains = [100 * r["gain"] for r in runs]
            low, high = t_interval(gains)  # never of one run
            gain = f"{statistics.mean(gains):+.1f} ({low:+.1f} to {high:+.1f})"
            least, most = f"{min(gains):+.1f}", f"{max(gains):+.1f}"
            rows.append(
                [f"`{method}`, {kind}", str(len(runs)), _befores(runs), _over_seeds(runs)[1], gain, least, most]
            )
    headings = ["method", "runs", "before", "after (95 %)", "gain, points (95 %)", "least", "most"]
    note = "\nIntervals: Student's t over runs, as if those behind one warm start were independent of each other.\n"
    return table(headings, rows) + note


def _by_method(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(method, [r for r in rows if r["method"] == method]) for method in dict.fromkeys(r["method"] for r in rows)]


def _befores(runs: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(f"{r['base_accuracy']:.1%}" for r in runs))


def svamp_warmer() -> str:
    """T-SPMO at temperature 1."""
    found = result("svamp-smollm2-t-spmo")
    rows = []
    for rate, split in dict.fromkeys((r["lr"], r["split"]) for r in found["rows"]):
        runs = [r for r in found["rows"] if (r["lr"], r["split"]) == (rate, split)]
        _, accuracy, each, *cost = _over_seeds(runs)
        passes = _passes([r.get("at_temperature_1") for r in runs]) if split == "test" else ""
        judged = "test" if split == "test" else "held back"
        rows.append([f"{rate:g}", judged, _befores(runs), accuracy, each, passes, *cost[:2]])
    headings = ["rate", "judged by", "before", "after (95 %)", "each seed", "pass@1, 4, 16", "tokens sampled"]
    return table([*headings, "tokens trained"], rows) + f"\n{where(found)}.\n"


def _passes(found: list[dict[str, Any]]) -> str:
    """pass@k, means over the runs in which it was measured."""
    measured = [f["pass_at_k"] for f in found if f]
    return (
        ", ".join(f"{statistics.mean(m[k] for m in measured):.1%}" for k in measured[0]) if measured else "not measured"
    )


def _size(row: dict[str, Any]) -> str:
    return f"{row['steps']} steps of {row['prompts']} x {row['completions']}"


def _elsewhere(found: list[dict[str, Any]], name: str) -> str:
    """Greedy accuracy on other problems, over the runs in which it was measured."""
    measured = [f[name]["accuracy"] for f in found if name in f]
    return spread(measured, ".1%") if measured else "not measured"


def where(found: dict[str, Any]) -> str:
    versions = found["versions"]
    return f"{found['device']}, torch {versions['torch']}, transformers {versions['transformers']}, {found['date']}"


def memory_grid() -> str:
    found = result("memory-grid")
    rows = [
        [
            f"{r['model']} {r['dtype']}",
            r["adapter"],
            "on" if r["checkpointing"] else "off",
            str(r["group"]),
            str(r["completion"]),
            f"{r['predicted_gib']:.2f}",
            f"{r['measured_gib']:.2f}",
            f"{r['ratio'] - 1:+.1%}",
            f"{r['ratio_above'] - 1:+.1%}",
            f"{r['reserved_gib']:.2f} ({r['reserved_ratio'] - 1:+.1%})" if r["reserved_gib"] else "not measured",
        ]
        for r in found["rows"]
    ]
    headings = ["model", "LoRA on", "checkpointing", "group", "completion", "predicted GiB", "measured GiB", "off by"]
    note = f"\nTwo prompts of up to {found['prompt']} tokens, rank 16. {where(found)}. {found.get('note', '')}\n"
    return table([*headings, "above the weights", "reserved GiB (to predicted)"], rows) + note


def on_paper() -> str:
    found = result("on-paper")
    rows = [
        [
            r["setting"],
            f"{r['predicted_gib']:.2f}",
            f"{r['peak_allocated_gib']:.2f}",
            f"{r['peak_reserved_gib']:.2f}",
            str(r["waves"]),
            f"{r['step_s']:.0f}",
        ]
        for r in found["rows"]
    ]
    note = (
        f"\nOne prompt of 256 tokens, 8 completions of 512, LoRA r=16 on q and v of the last third. "
        f"{where(found)}. {found.get('note', '')}\n"
    )
    return table(["run", "predicted GiB", "allocated GiB", "reserved GiB", "waves", "seconds a step"], rows) + note


def w1(name: str = "w1") -> str:
    found = result(name)
    rows = [
        [
            f"{r['system']}, {r['setting']}",
            f"{r['peak_allocated_gib']:.2f}",
            f"{r['peak_sample_gib']:.2f}",
            f"{r['peak_train_gib']:.2f}" if "peak_train_gib" in r else "",
            f"{r['peak_reserved_gib']:.2f}",
            f"{r['step_s']:.2f}",
            f"{r['sample_s']:.2f}",
            f"{r['train_s']:.2f}",
            str(r["runs"]) if r.get("warm", True) else "1, cold",
        ]
        for r in found["rows"]
        if r.get("completed", True)
    ]
    headings = ["system", "allocated GiB", "while sampling", "while training", "reserved GiB", "step s", "sampling s"]
    return table([*headings, "training s", "steps"], rows) + f"\n{where(found)}. {found.get('note', '')}\n"


def w1_short() -> str:
    """What a user of either gets without asking for anything."""
    found = result("w1")
    keys = ("peak_reserved_gib", "step_s", "sample_s", "train_s")
    both = [r for r in found["rows"] if r["setting"] == "no budget" or "defaults" in r["setting"]]
    rows = [[r["system"], *(f"{r[key]:.2f}" for key in keys)] for r in both]
    return table(["one step", "reserved GiB", "seconds", "sampling", "training"], rows) + f"\n{where(found)}.\n"


def decode() -> str:
    found = result("decode")
    rows = [
        [
            r["setting"],
            f"{r['tokens_per_s']:,.0f}",
            f"{r['ms_a_step']:.2f}",
            f"{r['sample_s']:.2f} ({r['sample_s_least']:.2f} to {r['sample_s_most']:.2f})",
            f"{r['first_s']:.1f}",
        ]
        for r in found["rows"]
    ]
    note = f"\nMedians of {found['rows'][0]['runs']} samplings. {where(found)}. {found.get('note', '')}\n"
    return table(["workload", "tokens/s", "ms a decode step", "seconds (least to most)", "first time"], rows) + note


def growth() -> str:
    found = result("growth")
    rows = [
        [r["shape"], str(r["group"]), str(r["length"])]
        + [f"{r[f'{phase}_s']:.2f} / {r[f'roofline_{phase}_s']:.3f}" for phase in ("sample", "train")]
        + [f"{r['times_roofline']:.1f}", f"{r['peak_allocated_gib']:.2f}", str(r["micro_batch_tokens"])]
        for r in sorted(found["rows"], key=lambda r: (r["shape"], r["length"], r["group"]))
    ]
    note = (
        f"\nMedians of {found['rows'][0]['runs']} steps, {found['prompts']} prompts of {found['prompt_tokens']} "
        f"tokens, LoRA r=16 on q and v of the last third. The card reached {found['bytes_per_s'] / 1e12:.2f} TB/s and "
        f"{found['operations_per_s'] / 1e12:.0f} TFLOP/s. {where(found)}.\n"
    )
    headings = ["model", "completions of a prompt", "new tokens", "sampling s / roofline", "training s / roofline"]
    return table([*headings, "times roofline", "allocated GiB", "micro-batch tokens"], rows) + note


def first() -> str:
    found = result("first")
    keys = ("model_there_s", "then_to_first_step_s", "first_step_s")
    rows = [[r["setting"], *(f"{r[key]:.1f}" for key in keys)] for r in found["rows"]]
    headings = ["", "until the model is there, s", "then to the end of the first step, s", "that step alone, s"]
    return table(headings, rows) + f"\nOne run each. {where(found)}.\n"


def trunk() -> str:
    found = result("trunk")
    rows = [
        [r["model"].removeprefix("random:"), str(r["seed"])]
        + [f"{r[name]:.4f}" for name in ("two_micro_batch_sizes", "cached_to_whole", "whole_to_fp32", "cached_to_fp32")]
        for r in found["rows"]
    ]
    headings = ["model", "seed", "whole, two micro-batch sizes", "cached to whole", "whole to fp32", "cached to fp32"]
    return table(headings, rows) + f"\n{where(found)}.\n"


def w3() -> str:
    found = result("w3")
    rows = [
        [r["setting"], f"{r['step_s']:.2f} ({r['step_s_least']:.2f} to {r['step_s_most']:.2f})"]
        + [f"{r[name]:.2f}" for name in ("sample_s", "train_s")]
        for r in found["rows"]
    ]
    note = f"\nMedians of {found['rows'][0]['runs']} steps. {where(found)}. {found.get('note', '')}\n"
    return table(["state of the code", "step s (least to most)", "sampling s", "training s"], rows) + note


def ablations() -> str:
    found = result("ablations")
    rows = []
    for name, value in dict.fromkeys((r["ablation"], r["value"]) for r in found["rows"]):
        runs = [r for r in found["rows"] if (r["ablation"], r["value"]) == (name, value)]
        half = list(runs[0]["curve"])[len(runs[0]["curve"]) // 2]
        rows.append([name, value, spread([r["curve"][half] for r in runs], ".0%"), *_over_seeds(runs)[1:5]])
    first = found["rows"][0]
    note = (
        f"\nGreedy accuracy: half-way on {first['curve_problems']} held-back problems (least to most of three seeds), "
        f"then on {first['problems']} test problems after {first['steps']} steps (Student's t). From "
        f"{first['base_accuracy']:.1%}. {where(found)}.\n"
    )
    headings = ["what is changed", "to", "half-way", "test (95 %)", "each seed", "tokens sampled", "tokens trained"]
    return table(headings, rows) + note


def breadth() -> str:
    found = result("multiply-embedded-breadth")
    digits, ks = list(found["rows"][0]["digits"]), list(found["rows"][0]["pass_at_k"])
    rows = []
    for method in dict.fromkeys(r["method"] for r in found["rows"]):
        runs = [r for r in found["rows"] if r["method"] == method]
        greedy = [spread([r["digits"][d]["accuracy"] for r in runs], ".1%") for d in digits]
        trained = spread([r["trained_on"]["accuracy"] for r in runs], ".1%")
        rows.append([f"`{method}`", trained, *greedy, *[spread([r["pass_at_k"][k] for r in runs], ".1%") for k in ks]])
    note = (
        f"\nOf {found['rows'][0]['problems']} test problems each, and of {found['rows'][0]['trained_on']['problems']} "
        "of the training split; means of three seeds with the least and greatest. "
        f"pass@k at temperature 1 from {found['rows'][0]['samples']} completions. {where(found)}.\n"
    )
    return (
        table(
            ["method", "trained on, 2x2, greedy", *[f"{d}, greedy" for d in digits], *[f"2x2, pass@{k}" for k in ks]],
            rows,
        )
        + note
    )


def svamp_levers() -> str:
    found = result("svamp-levers")
    rows = []
    for r in sorted(found["rows"], key=lambda r: (r["base_accuracy"], r["method"], r["lever"])):
        trained = f"{r['train_accuracy']:.0%}" if "train_accuracy" in r else "not measured"
        cost = [f"{r['tokens_sampled']:,}", f"{r['tokens_trained']:,}", f"{r['seconds']:.0f}"]
        curve = " ".join(f"{100 * value:.0f}" for value in r["curve"].values())
        after = f"{r['accuracy']:.0%} ({r['low']:.0%} to {r['high']:.0%})"
        rows.append([r["lever"], f"{r['base_accuracy']:.0%}", after, trained, curve, *cost])
    first = found["rows"][0]
    note = (
        f"\nGreedy accuracy on {first['problems']} held-back training problems, which also chose the checkpoint, and "
        f"on {first['train_problems']} of those trained on. The curve is that of the former, every 20 steps. Seed "
        f"{first['seed']}; four or eight runs shared the machine, and the seconds. {where(found)}.\n"
    )
    headings = ["lever", "before", "held back (95 %)", "trained on", "curve, %", "tokens sampled", "tokens trained"]
    return table([*headings, "seconds"], rows) + note


def hard_settings() -> str:
    found = result("multiply-embedded-hard-settings")
    rows = []
    for lever in dict.fromkeys(r["lever"] for r in found["rows"]):
        runs = [r for r in found["rows"] if r["lever"] == lever]
        steps = list(runs[0]["curve"])
        curve = " ".join(f"{100 * statistics.mean(r['curve'][step] for r in runs):.0f}" for step in steps)
        rows.append([lever, *_over_seeds(runs)[1:3], curve, *_over_seeds(runs)[3:]])
    first = found["rows"][0]
    note = (
        f"\nGreedy accuracy on {first['problems']} test problems after {first['steps']} steps (Student's t over three "
        f"seeds), from {first['base_accuracy']:.1%}; the curve, in per cent, is the mean on {first['curve_problems']} "
        f"held-back problems, every 20 steps. {where(found)}.\n"
    )
    headings = ["lever", "test (95 %)", "each seed", "curve, %", "tokens sampled", "tokens trained", "seconds"]
    return table(headings, rows) + note


def _over_seeds(runs: list[dict[str, Any]]) -> list[str]:
    """The rate, the accuracy with its interval (over seeds, or over problems where there is one), and the cost."""
    sampled, trained = (statistics.mean(r[key] for r in runs) for key in ("tokens_sampled", "tokens_trained"))
    after = [r["accuracy"] for r in runs]
    low, high = t_interval(after) or (runs[0]["low"], runs[0]["high"])
    return [
        f"{runs[0]['lr']:g}",
        f"{statistics.mean(after):.1%} ({max(low, 0):.1%} to {min(high, 1):.1%})",
        ", ".join(f"{value:.1%}" for value in after),
        f"{sampled:,.0f}",
        f"{trained:,.0f} ({trained / sampled:.1%})",
        spread([r["seconds"] for r in runs], ".0f"),
    ]


def multiply_embedded() -> str:
    found, tuned = result("multiply-embedded"), result("multiply-embedded-lr")
    rates = sorted({r["lr"] for r in tuned["rows"]})
    held_back = {(r["method"], r["lr"]): r["accuracy"] for r in tuned["rows"]}
    base = found["rows"][0]
    interval = f"{base['base_accuracy']:.1%} ({base['base_low']:.1%} to {base['base_high']:.1%})"
    rows = [["base", *[""] * len(rates), "", interval, "", "", "", ""]]
    for name in dict.fromkeys(r["method"] for r in found["rows"]):
        runs = [r for r in found["rows"] if r["method"] == name]
        tried = [f"{held_back[name, rate]:.1%}" for rate in rates]
        rows.append([f"`{name}`", *tried, *_over_seeds(runs)])
    for r in result("multiply-embedded-long")["rows"]:
        label = f"`{r['method']}`, {_size(r)}"
        rows.append([label, *[""] * len(rates), *_over_seeds([r])])
    least, most = min(r["low"] for r in found["rows"]), max(r["high"] for r in found["rows"])
    headings = ["method", *[f"held back, {rate:g}" for rate in rates], "rate chosen", "test (95 %)", "each seed"]
    first = found["rows"][0]
    note = (
        f"\nGreedy accuracy on {first['problems']} problems after {first['steps']} steps of {first['prompts']} prompts "
        f"x {first['completions']} completions. Held back: {tuned['rows'][0]['problems']} problems, seed 0. Intervals: "
        f"Student's t over three seeds, else Wilson's over problems; the latter of "
        f"the single runs lie between {least:.1%} and {most:.1%}. {where(found)}.\n"
    )
    return table([*headings, "tokens sampled", "tokens trained", "seconds"], rows) + note


def worked() -> str:
    found = result("multiply-embedded-worked")
    first = found["rows"][0]
    before = f"{first['base_accuracy']:.1%} ({first['base_low']:.1%} to {first['base_high']:.1%})"
    rows = [["before", before, "", f"{first['base_trained_on']['accuracy']:.1%}", *[""] * 4]]
    for r in found["rows"]:
        gain = f"{100 * r['gain']:+.1f} ({100 * r['gain_low']:+.1f} to {100 * r['gain_high']:+.1f})"
        curve = " ".join(f"{100 * value:.0f}" for value in r["curve"].values())
        _, accuracy, _, *cost = _over_seeds([r])
        rows.append([f"`{r['method']}`", accuracy, gain, f"{r['trained_on']['accuracy']:.1%}", curve, *cost])
    note = (
        f"\nGreedy accuracy on {first['problems']} test problems (Wilson; of the gain a bootstrap) and on "
        f"{first['trained_on']['problems']} of the training split, after {_size(first)}; the "
        f"curve, in per cent, on {first['curve_problems']} held-back problems, which chose the checkpoint. One seed; "
        f"several runs shared the machine, and the seconds. {where(found)}.\n"
    )
    headings = [
        "method",
        "test (95 %)",
        "paired gain, points",
        "trained on",
        "curve, %",
        "tokens sampled",
        "tokens trained",
    ]
    return table([*headings, "seconds"], rows) + note


TABLES = {
    "multiply-embedded-worked": worked,
    "demo-compare": demo_compare,
    "svamp-smollm2": lambda: tuned("svamp-smollm2"),
    "svamp-short": svamp_short,
    "svamp-starts": svamp_starts,
    "svamp-levers": svamp_levers,
    "multiply-embedded-hard-settings": hard_settings,
    "svamp-t-spmo": svamp_warmer,
    "memory-grid": memory_grid,
    "on-paper": on_paper,
    "w1": w1,
    "w1-h100": lambda: w1("w1-h100"),
    "w1-short": w1_short,
    "w2": lambda: w1("w2"),
    "growth": growth,
    "first": first,
    "trunk": trunk,
    "decode": decode,
    "w3": w3,
    "ablations": ablations,
    "multiply-embedded-breadth": breadth,
    "multiply-embedded": multiply_embedded,
    **{f"multiply-{name}": partial(tuned, f"multiply-{name}") for name in ("embedded-hard", "embedded-harder")},
    **{f"multiply-{name}": partial(tuned, f"multiply-{name}") for name in ("2x2-smollm2", "3x3-smollm2")},
}


def filled(text: str) -> str:
    """A page with every block's table made anew."""
    return _BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
