"""A run as one HTML page: its curves, completions with the credit of their tokens, its settings. Needs nothing else."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoestring.config import run as configs
from shoestring.config.files import dump, saved
from shoestring.config.run import RunConfig
from shoestring.errors import ConfigError
from shoestring.model import load as models
from shoestring.records import reporter as report
from shoestring.records.svg import Points, line_chart
from shoestring.types import StepReport

_MOST_SHOWN = 4  # completions of a group

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #69707d; --line: #e3e6ea; --page: #fff; --box: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --dim: #9aa1ad; --line: #343a45; --page: #16191f; --box: #1e222a; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1240px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.dim, figcaption, .key { color: var(--dim); font-size: .85rem; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2.2rem; margin: 1.2rem 0; }
.figures b { display: block; font-size: 1.25rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: 6px; }
svg { width: 100%; height: auto; } svg text { font-size: 10px; fill: var(--dim); }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.grid { stroke: var(--line); } .interval { stroke: var(--dim); stroke-width: 1.2; }
.faint { opacity: .3; } .completions { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.key { margin-right: 1rem; } .key::before { content: "\\2014 "; }
.group { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: .8rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; margin: .2rem 0 .9rem; }
.text span { border-radius: 2px; } pre { background: var(--box); padding: 1rem; overflow-x: auto; border-radius: 6px; }
"""


def write_page(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run's folder, by default `report.html` in it, into a file or folder; returns its path.

    Raises `ConfigError` for a folder that holds no run, or one without any step.
    """
    folder = Path(run)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"the run is {folder}", "it holds no config.toml", "give the folder of a run")
    config = configs.settle(saved(folder))
    steps = report.read_metrics(folder)
    if not steps:
        raise ConfigError(f"the run is {folder}", "no step of it is done", "train first")
    target = Path(out) if out else folder
    target = target / "report.html" if target.is_dir() else target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".draft-{target.name}")
    draft.write_text(page(folder, config, steps), encoding="utf-8", errors="replace")
    os.replace(draft, target)
    return target


def page(folder: Path, config: RunConfig, steps: Sequence[StepReport]) -> str:
    """The whole page as text."""
    evaluations = list(report.read_lines(folder / "evals.jsonl"))
    title = html.escape(folder.absolute().name)
    about = f"{config.algorithm.name} on {config.task.name}, {config.model.name}: {len(steps)} of {config.steps} steps"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<h1>{title}</h1><div class="dim">{html.escape(about)}</div>'
        f'<div class="figures">{"".join(_figures(steps, evaluations))}</div>'
        f'<div class="charts">{"".join(_charts(steps, evaluations))}</div>'
        f"<h2>Completions</h2>{_completions(folder, config, len(steps))}"
        f"<h2>Settings</h2><pre>{html.escape(dump(config))}</pre></html>\n"
    )


def _figures(steps: Sequence[StepReport], evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a reader asks first."""

    def figure(value: str, name: str) -> str:
        return f'<div><b>{value}</b><span class="dim">{html.escape(name)}</span></div>'

    if evaluations:
        kind, form = ("accuracy", ".1%") if "accuracy" in evaluations[0] else ("reward", ".3f")
        first, last, best = evaluations[0], evaluations[-1], max(evaluations, key=lambda line: line[kind])
        yield figure(
            f"{first[kind]:{form}} &rarr; {last[kind]:{form}}",
            f"{last['split']} {kind} after steps {first['step']} and {last['step']} "
            f"(best: {best[kind]:{form}}, step {best['step']})",
        )
    tenth = max(len(steps) // 10, 1)
    means = [sum(step.reward for step in part) / tenth for part in (steps[:tenth], steps[-tenth:])]
    yield figure(f"{means[0]:.3f} &rarr; {means[1]:.3f}", "reward, first and last tenth of the steps")
    sampled, trained = (sum(getattr(step, f"tokens_{name}") for step in steps) for name in ("sampled", "trained"))
    yield figure(f"{trained:,} of {sampled:,}", f"tokens trained ({trained / max(sampled, 1):.1%})")
    yield figure(f"{sum(sum(step.seconds.values()) for step in steps):,.0f} s", "in steps")
    if peak := max(step.peak_bytes for step in steps):
        yield figure(f"{peak / 2**30:.2f} GiB", "most memory allocated")


def _charts(steps: Sequence[StepReport], evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def chart(title: str, series: Mapping[str, Points], **how: Any) -> str:
        return f"<figure><figcaption>{html.escape(title)}</figcaption>{line_chart(series, **how)}</figure>"

    def over_steps(name: str, scale: float = 1.0) -> Points:
        return [(step.step + 1, scale * getattr(step, name)) for step in steps]

    if evaluations:
        kind = "accuracy" if "accuracy" in evaluations[0] else "reward"
        scale, unit = (100, "%") if kind == "accuracy" else (1, "")
        points = [(line["step"], scale * line[kind]) for line in evaluations]
        ends = [(line["step"], scale * line["low"], scale * line["high"]) for line in evaluations]
        title = f"{evaluations[0]['split']} {kind}, with its 95 % interval"
        yield chart(title, {kind: points}, unit=unit, intervals=ends)
    reward = over_steps("reward")
    if len(steps) > 20:
        yield chart("reward", {"a step": reward, "mean of ten": _smooth(reward)}, faint="a step")
    else:
        yield chart("reward", {"a step": reward})
    yield chart("tokens a completion", {"mean": over_steps("length_mean"), "longest": over_steps("length_max")})
    yield chart("groups", {"with signal": over_steps("groups_with_signal"), "in the step": over_steps("groups")})
    yield chart("tokens trained", {"tokens": over_steps("tokens_trained")})
    yield chart("norm of the gradient", {"norm": over_steps("grad_norm")})
    phases = dict.fromkeys(phase for step in steps for phase in step.seconds)
    yield chart(
        "seconds of a step", {p: [(step.step + 1, step.seconds.get(p, math.nan)) for step in steps] for p in phases}
    )
    if any(step.peak_bytes for step in steps):
        memory = {"allocated": over_steps("peak_bytes", 2**-30), "reserved": over_steps("reserved_bytes", 2**-30)}
        yield chart("GiB of memory, at most", memory)
    if any(step.kl for step in steps):
        yield chart("KL to the base model", {"kl": over_steps("kl")})


def _smooth(points: Points, window: int = 10) -> Points:
    """The mean of the last `window` values at each point."""
    found = []
    for i, (x, _) in enumerate(points):
        last = [y for _, y in points[max(i - window + 1, 0) : i + 1]]
        found.append((x, sum(last) / len(last)))
    return found


# --- completions with their credit ----------------------------------------------------------------------------------


def _completions(folder: Path, config: RunConfig, num_steps: int) -> str:
    """A group with signal of the first, the middle and the last step, if they have one."""
    groups = _telling_groups(folder / "samples.jsonl", {0, num_steps // 2, num_steps - 1})
    if not groups:
        return '<p class="dim">None in which completions of a prompt differ in their credit.</p>'
    tokenizer = _tokenizer(config)
    note = (
        "Coloured tokens were trained: green for more, red for less. Hover for their advantage. An algorithm that "
        "credits what completions share only once has it coloured in one of them."
        if tokenizer
        else "The tokenizer cannot be had here, so tokens are not coloured."
    )
    return f'<p class="dim">{note}</p>' + "".join(_group(group, tokenizer) for group in groups)


def _telling_groups(path: Path, steps: Collection[int]) -> list[list[dict[str, Any]]]:
    """Of each of these steps some completions of the first group whose credit differs, if there is one."""
    groups: dict[tuple[int, Any], list[dict[str, Any]]] = {}
    for record in report.read_lines(path):
        if record["step"] in steps and not record["prefix_tokens"]:
            groups.setdefault((record["step"], record.get("group", record["problem"])), []).append(record)
    telling: dict[int, list[dict[str, Any]]] = {}
    for (step, _), group in groups.items():
        if step not in telling and any(advantage for record in group for _, advantage in record["credit"]):
            telling[step] = _best_and_worst(group)
    return [telling[step] for step in sorted(telling)]


def _best_and_worst(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of a group, the best first; of those that score alike the ones with more credit."""

    def order(record: dict[str, Any], sign: int) -> tuple[float, int]:
        return sign * record["score"], -sum(bool(advantage) for _, advantage in record["credit"])

    best = sorted(group, key=lambda record: order(record, -1))[: _MOST_SHOWN // 2]
    rest = [record for record in group if not any(record is other for other in best)]
    worst = sorted(rest, key=lambda record: order(record, 1))[: _MOST_SHOWN - len(best)]
    return best + worst[::-1]


def _tokenizer(config: RunConfig) -> Any:
    """The model's; None where it cannot be had."""
    try:
        return models.load_tokenizer(config.model)
    except (ConfigError, OSError, ValueError):
        return None


def _group(group: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    first = group[0]
    answer = f' <span class="dim">[{html.escape(first["answer"])}]</span>' if first["answer"] else ""
    parts = [f'<div class="group"><b>Step {first["step"] + 1}</b><div class="text">']
    parts.append(f'{html.escape(first["question"])}{answer}</div><div class="completions">')
    most = max(abs(advantage) for record in group for _, advantage in record["credit"]) or 1.0
    for record in group:
        trained = sum(bool(advantage) for _, advantage in record["credit"])
        told = f"score {record['score']:g}, {record['tokens']} tokens, {trained} of them trained"
        text = _coloured(record, tokenizer, most)
        parts.append(f'<div><div class="dim">{told}</div><div class="text">{text}</div></div>')
    return "".join([*parts, "</div></div>"])


def _coloured(record: Mapping[str, Any], tokenizer: Any, most: float) -> str:
    """The text with the tokens that have credit in colour."""
    credit, parts, ids = dict(record["credit"]), [], record.get("token_ids", ())
    for i, piece in enumerate(pieces(ids, record["text"], tokenizer)):
        shown = html.escape(piece)
        if advantage := credit.get(i):
            nothing = "&#x23CE;" if i == len(ids) - 1 else "&middot;"
            colour = f"rgba({'46,158,107' if advantage > 0 else '214,69,65'},{0.25 + 0.5 * abs(advantage) / most:.2f})"
            shown = f'<span style="background:{colour}" title="{advantage:+.3f}">{shown or nothing}</span>'
        parts.append(shown)
    return "".join(parts)


def pieces(token_ids: Sequence[int], text: str, tokenizer: Any) -> list[str]:
    """What each token adds to the text; a letter of several tokens belongs to its last, and one that ends the text adds
    nothing. The whole text as one piece where tokenizer and text do not fit together."""
    if not tokenizer or tokenizer.decode(token_ids, skip_special_tokens=True) != text:
        return [text]
    ends = [0]
    for i in range(len(token_ids)):
        so_far = tokenizer.decode(token_ids[: i + 1], skip_special_tokens=True)
        ends.append(max(len(so_far) if text.startswith(so_far) else 0, ends[-1]))
    ends[-1] = len(text)
    return [text[start:end] for start, end in pairwise(ends)]
