"""Tables on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoestring.config.run import RunConfig
    from shoestring.memory.plan import Plan


def _print_plan(config: RunConfig, plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from shoestring.config.sizes import size_text

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
