"""The commands that judge and sample."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from shoestring.cli.printing import _print_evaluation, _print_sweep
from shoestring.errors import ConfigError

if TYPE_CHECKING:
    from shoestring.evaluation.evaluate import EvalSettings
    from shoestring.evaluation.evaluator import Judge
    from shoestring.model.load import ModelSettings
    from shoestring.model.policy import Policy
    from shoestring.tasks.base import Task
from shoestring.cli.app import Overrides, Target, _ints, _split, app


@app.command("eval")
def evaluate(
    arguments: Target = None,
    task: Annotated[str | None, typer.Option(help="A task's name; default: the run's own.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    num: Annotated[int | None, typer.Option(help="Problems, the first of the split; default: all.")] = None,
    k: Annotated[str, typer.Option(help="The k of pass@k and maj@k, as in 1,4,16.")] = "1",
    samples: Annotated[int | None, typer.Option(help="Completions of each problem; default: the largest k.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: 0 (greedy) for k = 1, else 1.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the run's, else 256.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    batch_rows: Annotated[int, typer.Option(help="Completions sampled at once.")] = 256,
    allow_truncated_prompts: Annotated[bool, typer.Option("--allow-truncated-prompts")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    details: Annotated[
        str | None, typer.Option(help="Write how often each problem was solved, or its reward, to this JSON file.")
    ] = None,
) -> None:
    """Accuracy, pass@k and maj@k of a run or model, with 95 % intervals.

    With several completions of a problem the greedy accuracy stands beside them. A run whose own evaluations go by its
    rewards is judged by these here too.
    """
    from shoestring.evaluation import evaluator as judging
    from shoestring.evaluation.contamination import overlap
    from shoestring.evaluation.evaluate import EvalSettings, first_problems

    target, overrides = _split(arguments)
    limit = 256 if max_new_tokens is None else max_new_tokens
    settings = EvalSettings(split, num, _ints(k, "k"), samples, temperature, limit, 1.0, seed, batch_rows)
    several = settings.num_samples > 1
    settings = replace(settings, greedy=several)
    settings.check()
    if details and not Path(details).absolute().parent.is_dir():
        raise ConfigError(f"--details is {details}", "its folder is not there", "give a file in a folder that is")
    chosen, model, tokens, truncated, trained_on, saved = _target(target, task, overrides)
    settings = replace(settings, allow_truncated_prompts=allow_truncated_prompts or truncated)
    if max_new_tokens is None and tokens is not None:
        settings = replace(settings, max_new_tokens=tokens)
    judge = judging.Judge.of_run(saved, chosen) if task is None else judging.Judge(chosen)
    judge.check(settings)
    problems = first_problems(chosen, split, num)  # a wrong split or missing data is reported before the model loads
    shared = overlap(problems, trained_on)
    found = _evaluated(_policy(model), judge, settings, show=not as_json)
    values = {"model": model.name, **found.as_json(), "overlap": vars(shared) if shared else None}
    if details:
        greedy = getattr(found, "greedy", None)
        outcomes = {"outcomes": found.outcomes, **({"greedy_outcomes": greedy.outcomes} if greedy else {})}
        Path(details).write_text(json.dumps({**values, **outcomes}, indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps(values))
    else:
        _print_evaluation(values)
        if shared:
            print(f"Overlap: {shared.describe()}.")


@app.command()
def sweep(
    arguments: Overrides = None,
    over: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE,VALUE,... to run with each value; several: each combination.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="As in 0,1,2; default: the recipe's own.")] = None,
    out: Annotated[str, typer.Option(help="The folder of the runs and of sweep.json.")] = "runs/sweep",
    split: Annotated[str | None, typer.Option(help="What judges; default: the runs' own evaluation problems.")] = None,
    num: Annotated[int | None, typer.Option(help="Problems, the first of the split.")] = None,
    at_once: Annotated[int, typer.Option(help="Runs that share a GPU (or the CPU), and its memory and time.")] = 1,
) -> None:
    """Train over values and seeds, and compare: [RECIPE] [KEY=VALUE ...] --over KEY=VALUE,VALUE --seeds 0,1,2.

    Runs that are done are not repeated, and others go on where they were; so the same command resumes a sweep.
    """
    from shoestring.run import sweep as sweeps
    from shoestring.run.trials import trials

    recipe, overrides = _split(arguments)
    if num is not None and num < 1:
        raise ConfigError(f"num is {num}", "it counts problems", "use 1 or more")
    if at_once < 1:
        raise ConfigError(f"at-once is {at_once}", "it counts the runs that share a GPU", "use 1 or more")
    chosen = trials(recipe, overrides, over or [], _ints(seeds, "seeds") if seeds else None, out, split, num)
    failed, stopped = sweeps.carry_out(chosen, lambda text: print(text, flush=True), at_once)
    found = sweeps.summary(chosen, failed)
    path = Path(out) / "sweep.json"
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
    if found["rows"]:
        _print_sweep(found, list(chosen[0].swept) or ["method"])
    for label, why in failed.items():
        print(f"FAILED: {label}: {why}")
    if stopped or failed:
        print(f"{len(found['rows'])} of {len(chosen)} runs are done; the same command goes on.")
    print(f"rows: {path}")
    if stopped or failed:
        raise SystemExit(128 + stopped if stopped else 1)


@app.command()
def sample(
    arguments: Target = None,
    task: Annotated[str | None, typer.Option(help="A task's name; default: the run's own.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text of your own instead of a task's problems.")] = None,
    split: Annotated[str, typer.Option()] = "test",
    num: Annotated[int, typer.Option(help="Problems.")] = 3,
    completions: Annotated[int, typer.Option(help="Completions of each.")] = 2,
    temperature: Annotated[float, typer.Option()] = 1.0,
    max_new_tokens: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option()] = 0,
    allow_truncated_prompts: Annotated[bool, typer.Option("--allow-truncated-prompts")] = False,
) -> None:
    """Print what a run or model answers."""
    target, overrides = _split(arguments)
    for name, value in (("num", num), ("completions", completions)):
        if value < 1:
            raise ConfigError(f"{name} is {value}", "it counts what is sampled", "use 1 or more")
    chosen, model, tokens, truncated, *_ = _target(target, task, overrides)

    from shoestring.config.settings import build
    from shoestring.rollout.rollout import encode, roll_out
    from shoestring.samplers import SAMPLERS, Sampling
    from shoestring.types import Problem

    limit = max_new_tokens if max_new_tokens is not None else tokens or 256
    sampling = build(Sampling, {"max_new_tokens": limit, "temperature": temperature}, "sampling")
    problems = chosen.problems(split) if prompt is None else [Problem("prompt", prompt, "")]
    policy = _policy(model)
    asked = [problems[i] for i in range(min(num, len(problems)))]
    allowed = allow_truncated_prompts or truncated
    prompts, _ = encode(policy, chosen, asked, sampling.max_new_tokens, allow_truncated=allowed)
    engine = SAMPLERS["auto"]().open(policy)
    for rollout in roll_out(policy, engine, prompts, num=completions, sampling=sampling, seed=seed):
        problem = rollout.prompt.problem
        print(f"=== {problem.question}" + (f"   [{problem.answer}]" if problem.answer else ""))
        for text, completion in zip(rollout.texts, rollout.completions, strict=True):
            mark = "" if prompt is not None else f"  score {chosen.score(problem, text).value:g}"
            print(f"--- {len(completion.token_ids)} tokens, stopped by {completion.stop}{mark}\n{text}")


class _Asked(NamedTuple):
    task: Task
    model: ModelSettings
    max_new_tokens: int | None
    allow_truncated_prompts: bool
    trained_on: Task
    saved: dict[str, Any]


def _target(target: str | None, task: str | None, overrides: list[str]) -> _Asked:
    """The task, the model and the limit on new tokens that a run's folder or a model name stand for, the task whose
    training problems it has seen (for a model that is no run of ours: the task itself), and what the run's config.toml
    holds."""
    from shoestring.config.files import overridden, saved
    from shoestring.config.settings import build, pick
    from shoestring.model import load as models
    from shoestring.run import folder as runs
    from shoestring.tasks import TASKS

    model = runs.model_settings(target or models.TINY)
    models.locate(model.name)
    run = models.run_of(Path(target)) if target else None
    saved = saved(run) if run and (run / "config.toml").is_file() else {}
    values = saved.get("task", {"name": "multiplication"})
    values = dict(values) if isinstance(values, dict) else {"name": values}
    if task is not None and task != values["name"]:
        values = {"name": task}
    elif task is None and not saved and target is not None:
        raise ConfigError(
            f'the model is "{target}"', "it is no run here, so it names no task", "add --task, as in --task svamp"
        )
    tables: dict[str, Any] = {"task": values, "model": model.model_dump(exclude_none=True)}
    for override in overrides:
        known = override.startswith(("task.", "model."))
        tables = overridden(tables, override if known else f"task.{override}")
    model = build(models.ModelSettings, tables["model"], "model")
    asked = pick(TASKS, "task", tables["task"])
    trained_on = pick(TASKS, "task", saved["task"]) if "task" in saved else asked
    tokens, truncated = saved.get("sampling", {}).get("max_new_tokens"), saved.get("allow_truncated_prompts", False)
    return _Asked(asked, model, tokens, truncated, trained_on, saved)


def _policy(model: ModelSettings) -> Policy:
    from shoestring.run.loading import load_policy

    return load_policy(model)


def _evaluated(policy: Policy, judge: Judge, settings: EvalSettings, *, show: bool) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    from shoestring.samplers import SAMPLERS

    engine = SAMPLERS["auto"]().open(policy)
    console = Console(stderr=True)
    with Progress(console=console, disable=not (show and console.is_terminal), transient=True) as bar:
        job = bar.add_task("evaluating")
        return judge.judged(policy, engine, settings, lambda done, total: bar.update(job, completed=done, total=total))
