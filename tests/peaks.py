"""Peaks of a training step with an adapter: predicted and measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.memory.test_plan import DTYPES, LARGE, built, live_peak

from shoestring.memory import footprint
from shoestring.memory import training as training_bytes


def not_short(adapter: dict[str, Any], dtype: str, *, on: bool) -> None:
    """Through transformers' layers, a step's predicted peak is no lower than the measured one, and at most three times
    as high."""
    said, found = said_and_found(adapter, dtype, on=on, own=False)
    assert found <= said <= 3 * found


def as_near_as_lora(adapter: dict[str, Any], dtype: str, *, on: bool) -> None:
    """Through our own layers, what the plan does not know of the CPU's attention is the same as with LoRA."""
    said, found = said_and_found(adapter, dtype, on=on, own=True)
    of_lora, measured = said_and_found({"name": "lora", "rank": 8}, dtype, on=on, own=True)
    assert found - said <= measured - of_lora


def said_and_found(adapter: dict[str, Any], dtype: str, *, on: bool, own: bool) -> tuple[int, int]:
    policy, work = built(6, adapter, DTYPES[dtype], **LARGE)
    policy.own_layers = own
    if own:
        policy.decoder.sync()  # made once, and counted as held
    work = replace(work, prompt=41, added=216, rows=4, group=4, prompts=1, trees=True, own_layers=own)
    batch = training_bytes.micro_batch(work, 4)
    said = training_bytes.train_peak(work, batch, on) - footprint.static(work)
    return said, live_peak(policy, work, 4, on)
