"""What else could be set, and what that would take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from shoestring.config import run as configs
from shoestring.config.files import overridden
from shoestring.config.run import RunConfig
from shoestring.errors import ConfigError
from shoestring.memory import footprint
from shoestring.memory.footprint import Work
from shoestring.memory.sizes import Sizes, _least_budget, _peak
from shoestring.memory.work import work_of


class Alternative(NamedTuple):
    change: str
    peak: int


def _alternatives(config: RunConfig, work: Work, sizes: Sizes, budget: int | None) -> tuple[Alternative, ...]:
    """What other settings would take: without a budget the peak of the same pieces; under one, which pieces are chosen
    to fill, the least budget."""
    found = []
    for overrides, note, pieces in _changes(config, work, sizes):
        if budget is not None and pieces != sizes:
            continue
        values: dict[str, Any] = config.model_dump(
            exclude_none=True, exclude={"rewards"}
        )  # Python functions have no name
        for override in overrides:
            values = overridden(values, override.replace(" = ", "=", 1))
        changed = configs.settle(values)
        prompt = min(work.prompt, changed.sampling.max_prompt_tokens or work.prompt)
        step = replace(work_of(changed, work.shape, prompt, gpu=work.gpu), padded=work.padded)
        peak = _peak(step, pieces) if budget is None else _least_budget(changed, step)
        found.append(Alternative(", ".join(overrides) + note, peak))
    return tuple(found)


def _changes(config: RunConfig, work: Work, sizes: Sizes) -> Iterator[tuple[list[str], str, Sizes]]:
    """What could be set otherwise: the settings, a note, and the pieces."""
    adapter, whole = config.adapter, work.trained.whole
    if not work.nf4 and not whole:
        yield ['model.dtype = "nf4"'], "", sizes
    kept = footprint.kept_layers(work)
    third = max(work.shape.layers // 3, 1)
    if hasattr(adapter, "layers") and kept > 1:
        yield ['adapter.layers = "last-third"' if kept > third else f"adapter.layers = {kept // 2}"], "", sizes
    if whole:
        yield ['adapter.name = "lora"', *([] if _takes_an_adapter(config) else ['optim.name = "adamw"'])], "", sizes
    if config.optim.name == "adamw":
        yield ['optim.name = "adamw-8bit"' if whole else 'optim.name = "adamw-cpu"'], "", sizes
    if sizes.wave_rows > 1:
        half = -(-sizes.wave_rows // 2)
        note = f" ({-(-work.rows // half)} waves)"
        yield [f"execution.wave_tokens = {half * work.slots}"], note, sizes._replace(wave_rows=half)
    if not sizes.checkpointing or config.execution.checkpointing is False:
        yield ["execution.checkpointing = true"], "", sizes._replace(checkpointing=True)
    if sizes.micro_rows > 1:
        yield [f"execution.micro_batch_tokens = {work.row_tokens}"], " (one row)", sizes._replace(micro_rows=1)
    if work.added > 1:
        yield [f"sampling.max_new_tokens = {work.added // 2}"], "", sizes
    if work.prompt > 1:
        cut = config.allow_truncated_prompts or config.sampling.max_prompt_tokens is not None
        more = [] if cut else ["allow_truncated_prompts = true"]
        yield [f"sampling.max_prompt_tokens = {work.prompt // 2}", *more], "", sizes
    if getattr(adapter, "rank", 1) > 1:
        yield [f"adapter.rank = {adapter.rank // 2}"], "", sizes


def _takes_an_adapter(config: RunConfig) -> bool:
    """Whether the optimizer is made for an adapter's weights too."""
    try:
        config.optim.check_trained(whole=False)
    except ConfigError:
        return False
    return True
