"""The sizes in which a step is carried out: limits, waves, micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from shoestring.config.run import RunConfig
from shoestring.memory.footprint import Work
from shoestring.memory.sampling import sample_peak
from shoestring.memory.training import micro_batch, train_peak

# Where a budget has room, training takes more than sampling does for micro-batches of so many tokens.
_ENOUGH_TOKENS = 2_048


# A layer's pass forward and back over so many tokens times its weights takes an H100 as long as the host takes to
# launch it: some 2 ms for our own layers, 10,000 tokens of a 0.5B model.
_LAUNCHED = 1.5e11


_MOST_TOKENS = 16_384


_ERROR = 2**24


class Sizes(NamedTuple):
    """The pieces in which a step is carried out."""

    wave_rows: int
    """Completions sampled at once."""
    micro_rows: int
    """Full-length rows trained at once."""
    checkpointing: bool


def margin(work: Work, budget: int) -> int:
    """What a budget must leave free: its cap lies a page lower, and a prediction may err."""
    return 20 * 2**20 + budget // 100 if work.gpu else 0


def _fits(work: Work, peak: int, budget: int | None) -> bool:
    return budget is None or peak + margin(work, budget) <= budget


def _peak(work: Work, sizes: Sizes) -> int:
    return max(
        sample_peak(work, sizes.wave_rows),
        _train_peak(work, sizes),
    )


def _train_peak(work: Work, sizes: Sizes) -> int:
    batch = micro_batch(work, sizes.micro_rows)
    return train_peak(work, batch, sizes.checkpointing, sizes.wave_rows)


def _choose(config: RunConfig, work: Work, budget: int | None, room: int | None, floor: int) -> Sizes:
    """As few waves as fit, and micro-batches that take no more than sampling or, without a budget, the floor, whichever
    is more; yet more, up to the budget, only where they would be too small to keep a card busy."""
    most = room
    if budget is not None:
        most = budget - margin(work, budget)
        spare = max(most - _least_peak(config, work), 0)  # some of it is left to the allocator
        most -= min(budget // 40, spare // 2) if work.gpu else 0
    execution = config.execution
    wave_limit = max(execution.wave_tokens // work.slots, 1) if execution.wave_tokens else work.rows
    least = [choice for choice in (True, False) if execution.checkpointing in ("auto", choice)]

    def goes(rows: int) -> bool:
        """What sampling leaves behind has to leave room for training."""
        train = min(_train_peak(work, Sizes(rows, 1, choice)) for choice in least)
        return most is None or max(sample_peak(work, rows), train) <= most

    wave_rows = _evenly(work.rows, _largest(goes, min(wave_limit, work.rows)))
    if execution.micro_batch_tokens:
        limit = min(max(execution.micro_batch_tokens // work.row_tokens, 1), work.rows)
        return _micro(config, work, wave_rows, limit, budget and most)
    limit = min(max(_most_tokens(work) // work.row_tokens, 1), work.rows)
    # What sampling takes for certain, prompts of one length or not, or the floor; less what a prediction may err by.
    allowed = sample_peak(replace(work, padded=False), wave_rows)
    if budget is None:
        allowed = max(allowed, floor if most is None else min(floor, most))
    beside = _micro(config, work, wave_rows, limit, allowed - _ERROR * work.gpu)
    if budget is None or beside.micro_rows >= min(limit, _ENOUGH_TOKENS // work.row_tokens):
        return beside
    busy = min(limit, max(_ENOUGH_TOKENS // work.row_tokens, 1))
    return _micro(config, work, wave_rows, busy, most)


def _most_tokens(work: Work) -> int:
    """Beyond these a micro-batch gains nothing: it keeps a card busy for twice as long as it takes to launch it."""
    return max(_MOST_TOKENS, int(2 * _LAUNCHED / _matrices(work)) * work.gpu)


def _matrices(work: Work) -> int:
    """Weights of a layer."""
    return sum(linear.inputs * linear.outputs for linear in work.shape.linears)


def _micro(config: RunConfig, work: Work, wave_rows: int, limit: int, allowed: int | None) -> Sizes:
    """The largest micro-batch of at most `limit` rows within `allowed` bytes; with checkpointing if that makes small
    ones larger."""

    def sized(checkpointing: bool) -> Sizes:
        def trains(rows: int) -> bool:
            return allowed is None or _train_peak(work, Sizes(wave_rows, rows, checkpointing)) <= allowed

        return Sizes(wave_rows, _evenly(work.rows, _largest(trains, limit)), checkpointing)

    if config.execution.checkpointing != "auto":
        return sized(config.execution.checkpointing)
    plain, recomputed = sized(False), sized(True)
    if allowed is not None and _train_peak(work, recomputed) > allowed:  # neither may fit
        return min(plain, recomputed, key=lambda sizes: _train_peak(work, sizes))
    fits = allowed is None or _train_peak(work, plain) <= allowed
    return plain if fits and _layer_time(work, plain) <= _layer_time(work, recomputed) else recomputed


def _layer_time(work: Work, sizes: Sizes) -> float:
    """What a step's micro-batches take for one layer, in launches of its pass forward and back, which count on a GPU
    only. Recomputing adds a quarter to the launches and a third to the products."""
    launched, busy = float(work.gpu), sizes.micro_rows * work.row_tokens * _matrices(work) / _LAUNCHED
    if sizes.checkpointing:
        launched, busy = launched * 1.25, busy * 4 / 3
    return -(-work.rows // sizes.micro_rows) * max(launched, busy)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 1 where none does."""
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _evenly(count: int, most: int) -> int:
    """The size of equal parts of at most `most`: no more parts than needed, and no larger than that asks for.

    >>> _evenly(64, 54)
    32
    """
    return -(-count // -(-count // most))


def _least_peak(config: RunConfig, work: Work) -> int:
    """Of the smallest pieces."""
    checkpointing = config.execution.checkpointing
    if config.execution.trunk_cache == "auto":
        work = replace(work, trunk_rows=0)
    choices = (True, False) if checkpointing == "auto" else (checkpointing,)
    return min(_peak(work, Sizes(1, 1, choice)) for choice in choices)


def _least_budget(config: RunConfig, work: Work) -> int:
    """The smallest pieces, and the margin on top."""
    peak = _least_peak(config, work)
    if not work.gpu:
        return peak
    return int((peak + margin(work, 0)) / 0.99) + 1
