"""The memory plan: what a run will take, before it starts, and into how many pieces a budget cuts its steps.

Made from the config and the model's config.json alone; `footprint` holds the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from shoestring.config import run as configs
from shoestring.config.run import RunConfig
from shoestring.config.sizes import size_text
from shoestring.errors import ConfigError
from shoestring.memory import footprint
from shoestring.memory.alternatives import Alternative, _alternatives
from shoestring.memory.budget import budget_bytes
from shoestring.memory.footprint import Work
from shoestring.memory.prompt_length import _prompt_tokens
from shoestring.memory.sampling import decode, kv_cache, prefill, sample_peak
from shoestring.memory.sizes import Sizes, _choose, _fits, _least_budget, _peak, _train_peak
from shoestring.memory.training import activations, head, micro_batch
from shoestring.memory.work import on_gpu, work_of
from shoestring.model.shapes import read_shape

# What is not missed: without a budget training may take so much even where sampling needs less. On a host it is so many
# bytes beside the weights, on a GPU this share of the card.
_HOST_FLOOR, _CARD_FLOOR = 128 * 2**20, 0.025


class Phase(NamedTuple):
    phase: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Predicted bytes of a run's steps. `peak` is of allocated memory, without the CUDA context."""

    work: Work
    sizes: Sizes
    budget: int | None
    peak: int
    smallest: int
    """The least budget under which the run as configured completes."""
    phases: tuple[Phase, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return _fits(self.work, self.peak, self.budget)

    @property
    def least_memory(self) -> str:
        """The smallest budget as `memory` takes it."""
        return f"{-(-self.smallest // 2**20)}MiB"

    @property
    def waves(self) -> int:
        return -(-self.work.rows // self.sizes.wave_rows)

    @property
    def wave_tokens(self) -> int:
        """Cache slots of a wave."""
        return self.sizes.wave_rows * self.work.slots

    @property
    def micro_batch(self) -> int:
        """Padded tokens of a micro-batch."""
        return self.sizes.micro_rows * self.work.row_tokens

    def as_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "peak": self.peak,
            "fits": self.fits,
            "smallest_budget": self.smallest,
            "phases": [phase._asdict() for phase in self.phases],
            "waves": self.waves,
            "micro_batch": self.micro_batch,
            "alternatives": [alternative._asdict() for alternative in self.alternatives],
            "notes": list(self.notes),
        }


def predict(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    prompt_tokens: int | None = None,
    room: int | None = None,
    total: int | None = None,
) -> Plan:
    """The plan of a config (or a nested mapping, a recipe's path, None for the embedded default).

    `prompt_tokens` is the longest prompt (default: the setting, the data, or an assumption that the notes tell). `room`
    are the bytes that can be had where no budget is set, `total` those of the card or machine that a share refers to,
    and without a budget what training may take of it (default: those found here). Raises `ConfigError` for a model
    whose shape is not known.
    """
    if not isinstance(config, RunConfig):
        config = configs.settle(dict(config)) if isinstance(config, Mapping) else configs.load(config)
    shape = read_shape(config.model.name, family=config.model.family, revision=config.model.revision)
    prompt, note = (prompt_tokens, "") if prompt_tokens else _prompt_tokens(config)
    gpu = on_gpu(config)
    work = work_of(config, shape, prompt, gpu=gpu)
    total = total if total is not None else _total(gpu)
    floor = int((total or 0) * _CARD_FLOOR) if gpu else footprint.static(work) + _HOST_FLOOR
    notes = [note] if note else []
    if total is None and config.memory is None:
        notes.append(f"There is no card here. On one, training may take {_CARD_FLOOR:.1%} of it, if that is more.")
    return _planned(config, work, budget_bytes(config.memory, total), room, floor, tuple(notes))


def check(plan: Plan) -> None:
    """Raises `ConfigError` if the budget is below what the run needs in its smallest pieces."""
    if plan.budget is None or plan.fits:
        return
    best = min(plan.alternatives, key=lambda alternative: alternative.peak, default=None)
    more = f"; or set {best.change}, with which {size_text(best.peak)} would do" if best else ""
    raise ConfigError(
        f"memory is {size_text(plan.budget)}",
        f"with one completion sampled and one row trained at a time this run needs {size_text(plan.smallest)}",
        f'write memory = "{plan.least_memory}"{more}',
    )


# --- choosing the pieces --------------------------------------------------------------------------------------------


def _planned(
    config: RunConfig, work: Work, budget: int | None, room: int | None, floor: int, notes: tuple[str, ...]
) -> Plan:
    sizes = _choose(config, work, budget, room, floor)
    without = replace(work, trunk_rows=0)
    if work.trunk_rows and config.execution.trunk_cache == "auto" and (budget is not None or room is not None):
        plainly = _choose(config, without, budget, room, floor)
        cramped = sizes.wave_rows < plainly.wave_rows or not _fits(work, _peak(work, sizes), budget)
        work, sizes = (without, plainly) if cramped else (work, sizes)
    smallest = _least_budget(config, work)
    return Plan(
        work,
        sizes,
        budget,
        _peak(work, sizes),
        smallest,
        _phases(work, sizes),
        _alternatives(config, work, sizes, budget),
        notes,
    )


def _phases(work: Work, sizes: Sizes) -> tuple[Phase, ...]:
    """The parts. The two peaks are of what is held at the same time; the context is not in them."""
    batch = micro_batch(work, sizes.micro_rows)
    return tuple(
        Phase(name, int(count))
        for name, count in (
            ("weights", footprint.weights(work)),
            ("adapter, gradient and optimizer", footprint.held(work) + footprint.gradient(work)),
            ("workspace and pages", footprint.workspace(work) + footprint.pages(work)),
            ("trunk cache", footprint.trunk_cache(work)),
            ("KV cache", kv_cache(work, sizes.wave_rows)),
            ("prefill", prefill(work, sizes.wave_rows)),
            ("decode", decode(work, sizes.wave_rows)),
            ("log-prob and reference pass", footprint.forward_token(work) * batch.nodes),
            ("training activations", activations(work, batch, sizes.checkpointing)),
            ("head", head(work, batch.scored)),
            ("peak while sampling", sample_peak(work, sizes.wave_rows)),
            ("peak while training", _train_peak(work, sizes)),
            ("context", footprint.CONTEXT if work.gpu else 0),
        )
    )


# --- what else could be set -----------------------------------------------------------------------------------------


# --- how long prompts are -------------------------------------------------------------------------------------------


def _total(gpu: bool) -> int | None:
    """The memory of the card here, or of the machine; None where the run's card is not here."""
    import torch

    from shoestring.allocator import total_bytes

    if gpu and not torch.cuda.is_available():
        return None
    return total_bytes(torch.device("cuda" if gpu else "cpu"))
