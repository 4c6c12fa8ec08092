"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that help and mistakes are
quick."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from shoestring.errors import ConfigError, NonFiniteError, ShoestringError

if TYPE_CHECKING:
    from shoestring.config.run import RunConfig
    from shoestring.evaluation.evaluate import EvalSettings
    from shoestring.evaluation.evaluator import Judge
    from shoestring.memory.plan import Plan
    from shoestring.model.load import ModelSettings
    from shoestring.model.policy import Policy
    from shoestring.tasks.base import Task

app = typer.Typer(
    help="Reinforcement learning of LLM reasoning on one memory-constrained GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Argument(help="A TOML recipe (or none), then KEY=VALUE overrides.")]
Target = Annotated[
    list[str] | None,
    typer.Argument(help="A run's folder or a model, then KEY=VALUE settings of the task."),
]


@app.command()
def train(
    arguments: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="The folder of a run to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and exit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write trace.json.gz (for Perfetto) and profile.json into the run's folder."),
    ] = False,
) -> None:
    """Train a model: [RECIPE] [KEY=VALUE ...]. Without a recipe: the embedded default."""
    from shoestring.config import run as configs
    from shoestring.model import load as models

    recipe, overrides = _split(arguments)
    if dry_run:
        values = configs.read(recipe, overrides)
        print(configs.dump(_resolved(resume, values)), end="")
        return
    values = configs.read(recipe, overrides) if recipe or overrides or not resume else None
    if not resume:  # a mistake is reported before transformers is loaded
        models.locate(configs.settle(values or {}).model.name)

    from shoestring.run.loop import carried_out, where_it_lies

    run = carried_out(values, resume=resume, quiet=quiet, profile=profile)
    if not quiet:
        print(where_it_lies(run))
    if run.stopped_by:
        raise SystemExit(128 + run.stopped_by)


def _resolved(resume: str | None, values: dict[str, Any]) -> Any:
    from shoestring.config import run as configs
    from shoestring.run import folder as runs

    return runs.resumed_config(Path(resume), values or None) if resume else configs.settle(values)


@app.command()
def plan(
    arguments: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """What a run will take of the card, before it starts: [RECIPE] [KEY=VALUE ...]. Loads no weights."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # what is on this machine has to do

    from shoestring.config import run as configs
    from shoestring.memory.plan import predict

    recipe, overrides = _split(arguments)
    config = configs.load(recipe, overrides)
    found = predict(config)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        _print_plan(config, found)


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


@app.command()
def sft(
    arguments: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="The folder of a warm start to go on with.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and exit.")] = False,
) -> None:
    """A short supervised warm start on a task's worked solutions; writes an ordinary model folder."""
    from shoestring.config import run as configs
    from shoestring.config.settings import build
    from shoestring.run.sft import SftConfig, resumed
    from shoestring.run.sft import sft as run_sft

    values = configs.read(*_split(arguments))
    config = resumed(Path(resume), values) if resume else build(SftConfig, values, "")
    if dry_run:
        print(configs.dump(config), end="")
    else:
        run_sft(config, resume=resume)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[
        str | None, typer.Option(help="The file to write; default: report.html in the run's folder.")
    ] = None,
) -> None:
    """Write a run as one HTML page: its curves, completions with the credit of their tokens, its settings."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the tokenizer that is on this machine has to do

    from shoestring.records.html_report import write_page

    print(f"report: {write_page(run, out)}")


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="A run's folder, a checkpoint of one, or a PEFT adapter folder.")],
    out: Annotated[str, typer.Argument(help="The model folder to write.")],
) -> None:
    """Write a run's model with the adapter added into its weights."""
    from shoestring.run.sft import merge as run_merge

    print(f"model: {run_merge(run, out)}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="tasks, algorithms, adapters, samplers, trackers or gym.")] = None,
) -> None:
    """List what there is, from the tables themselves."""
    from shoestring.adapters import ADAPTERS
    from shoestring.algorithms import ALGORITHMS
    from shoestring.errors import nearest
    from shoestring.samplers import SAMPLERS
    from shoestring.tasks import TASKS, gym
    from shoestring.trackers import TRACKERS

    tables = {"tasks": TASKS, "algorithms": ALGORITHMS, "adapters": ADAPTERS, "samplers": SAMPLERS}
    tables |= {"trackers": TRACKERS}
    if kind == "gym":
        print("\n".join(f"gym:{name}" for name in gym.available()))
        print("\n".join(f"(left out: {name}: {reason})" for name, reason in gym.EXCLUDED.items()))
        return
    if kind is not None and kind not in tables:
        raise ConfigError(f'the list is "{kind}"', "there is none of that name", nearest(kind, [*tables, "gym"]))
    for name, table in tables.items():
        if kind in (None, name):
            print(f"{name}:")
            for key, cls in table.items():
                print(f"  {key:<16}{(cls.__doc__ or '').strip().splitlines()[0]}")


@app.command()
def env() -> None:
    """Versions, for a bug report."""
    from shoestring.records.environment import describe

    for name, value in describe().items():
        print(f"{name:<16}{value}")


# --- shared by the commands -----------------------------------------------------------------------------------------


def _split(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The first argument, if it is no KEY=VALUE, and the rest, which must be."""
    given = list(arguments or [])
    first = given.pop(0) if given and "=" not in given[0] else None
    for argument in given:
        if "=" not in argument:
            raise ConfigError(f'an argument is "{argument}"', "it is no KEY=VALUE", "write one, such as optim.lr=1e-4")
    return first, given


def _ints(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f'{name} is "{text}"', "it is no list of whole numbers", "write one, such as 1,4,16"
        ) from None


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
    from shoestring.config import run as configs
    from shoestring.config.settings import build, pick
    from shoestring.model import load as models
    from shoestring.run import folder as runs
    from shoestring.tasks import TASKS

    model = runs.model_settings(target or models.TINY)
    models.locate(model.name)
    run = models.run_of(Path(target)) if target else None
    saved = runs.saved(run) if run and (run / "config.toml").is_file() else {}
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
        tables = configs.overridden(tables, override if known else f"task.{override}")
    model = build(models.ModelSettings, tables["model"], "model")
    asked = pick(TASKS, "task", tables["task"])
    trained_on = pick(TASKS, "task", saved["task"]) if "task" in saved else asked
    tokens, truncated = saved.get("sampling", {}).get("max_new_tokens"), saved.get("allow_truncated_prompts", False)
    return _Asked(asked, model, tokens, truncated, trained_on, saved)


def _policy(model: ModelSettings) -> Policy:
    from shoestring.model.policy import load_policy

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


def _print_plan(config: RunConfig, plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from shoestring.memory.budget import size_text

    console, work = Console(soft_wrap=False), plan.work
    kind = "nf4" if work.nf4 else f"{8 * work.itemsize} bits"
    where = "a GPU" if work.gpu else "the CPU (for a GPU: execution.device=cuda)"
    table = Table(title=f"{config.model.name}, {work.shape.parameters:,} parameters, {kind}, on {where}")
    for heading in ("part", "bytes", ""):
        table.add_column(heading, justify="right" if heading == "bytes" else "left")
    for phase in plan.phases:
        note = "outside the budget" if phase.phase == "context" else ""
        table.add_row(
            phase.phase, f"{phase.bytes:,}", note or size_text(phase.bytes), end_section=phase.phase == "head"
        )
    console.print(table)
    budget = f" of a budget of {size_text(plan.budget)}" if plan.budget is not None else ""
    needed = (
        f' It does not fit, with what is kept free for the allocator: write memory = "{plan.least_memory}" or more.'
    )
    fits = "" if plan.fits else needed
    console.print(f"Peak of a step: {size_text(plan.peak)}{budget}.{fits}", highlight=False)
    recomputed = ", layers recomputed in the backward pass" if plan.sizes.checkpointing else ""
    console.print(
        f"{work.rows} completions in {plan.waves} wave{'s' if plan.waves > 1 else ''}; training in micro-batches of "
        f"{plan.micro_batch:,} tokens{recomputed}; prompts of {work.prompt} tokens.",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"Note: {note}.", highlight=False)
    now = "" if plan.budget is None else f" (as it is: {plan.least_memory})"
    table = Table(title=f"with one setting changed{now}")
    least = "peak" if plan.budget is None else "least budget"
    for heading in ("setting", least):
        table.add_column(heading, justify="right" if heading == least else "left")
    for alternative in plan.alternatives:
        table.add_row(alternative.change, size_text(alternative.peak))
    console.print(table)


def _print_evaluation(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    samples = values.get("samples", 1)
    kind = f"{samples} completions each, " if samples > 1 else ""
    kind += "greedy" if not values.get("temperature") else f"temperature {values['temperature']:g}"
    table = Table(
        title=f"{values['model']} on {values['task']}, {values['split']}: {values['problems']} problems, {kind}"
    )
    for heading in ("figure", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    if "reward" in values:
        table.add_row("mean reward", f"{values['reward']:.3f}", f"{values['low']:.3f} to {values['high']:.3f}")
    for name, part in (("greedy accuracy", values.get("greedy")), ("accuracy", values)):
        if part and "accuracy" in part:
            table.add_row(name, f"{part['accuracy']:.1%}", f"{part['low']:.1%} to {part['high']:.1%}")
    for name in ("pass", "maj"):
        for key, value in values[f"{name}_at_k"].items() if samples > 1 else ():
            low, high = values[f"{name}_at_k_interval"][key]
            table.add_row(f"{name}@{key}", f"{value:.1%}", f"{low:.1%} to {high:.1%}")
    if values.get("unscored"):
        table.add_row("not scored", f"{values['unscored']} more", "")
    table.add_row("cut off", f"{values['truncated']:.1%}", "")
    Console(soft_wrap=False).print(table)


def _print_sweep(found: dict[str, Any], swept: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from shoestring.run.sweep import figure_of, in_words

    tasks = dict.fromkeys(f"{row['task']}, {row['split']}" for row in found["rows"])
    names = " or ".join(sorted({figure_of(row) for row in found["rows"]}))
    table = Table(title=f"Greedy {names} on {'; '.join(tasks)}")
    for heading in (*swept, names, "95 % interval", "before", "seeds", "tokens trained", "peak GiB", "seconds"):
        table.add_column(heading, justify="left" if heading in swept else "right")
    for means in found["combinations"]:
        table.add_row(
            *(str(means[key]) for key in swept),
            in_words(means),
            in_words(means, "interval") if means["interval"] else "single seed",
            in_words(means, "base"),
            " ".join(map(str, means["seeds"])),
            f"{means['tokens_trained']:,.0f} of {means['tokens_sampled']:,.0f}",
            f"{means['peak_allocated_gib']:.2f}",
            f"{means['seconds']:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("Means over seeds, with Student's t; intervals over the problems are in the rows.")
    if any(row["chosen_on"] == row["split"] for row in found["rows"]):
        print("Checkpoints were chosen on these very problems, which flatters them: --split test judges by others.")
    if any((row["overlap"] or {}).get("shared") for row in found["rows"]):
        print("Some of these problems are training problems too: see overlap in the rows.")


def main() -> None:
    """Runs the command line; a user's mistake is printed without a traceback and exits with 2."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own word for Ctrl-C
            _fail("interrupted", 130)
        raise SystemExit(code or 0)
    except ShoestringError as error:
        _fail(f"{type(error).__name__}: {error}", 2)
    except NonFiniteError as error:
        _fail(str(error), 1)
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(f"Error: {error.format_message()}", 2)  # type: ignore[attr-defined]
        raise


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)
