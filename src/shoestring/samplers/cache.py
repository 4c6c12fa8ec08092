"""The keys and values of a wave, in buffers of their final size.

Nothing grows while sampling, so what a wave takes is known before it starts, and no two sizes of a buffer are ever held
at once. Imported when sampling begins, since it needs transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Span:
    """Where the prompts of a prefill go: prompt i, its first `lengths[i]` places, to the rows `rows[i]`."""

    def __init__(self, rows: Sequence[slice], lengths: Sequence[int]):
        self.rows, self.lengths = rows, lengths


class SlotLayer(DynamicLayer):
    """One layer's keys and values, [rows, kv heads, slots, head size]; `length` slots of each row are filled.

    Prompts end at slot `prompt_slots`, with their padding on the left, so that new keys follow without a gap.
    """

    def __init__(self, rows: int, slots: int, prompt_slots: int):
        super().__init__()
        self.rows, self.slots, self.prompt_slots = rows, slots, prompt_slots
        self.length = 0
        self.span: Span | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self._allocate(key_states, value_states)
        if self.span is not None:
            self._fill(self.span, key_states, value_states)
            return key_states, value_states  # a prompt sees itself only
        end = self.length + key_states.shape[2]
        self._keys[: self.rows, :, self.length : end] = key_states
        self._values[: self.rows, :, self.length : end] = value_states
        self.length = end
        return self._keys[: self.rows, :, :end], self._values[: self.rows, :, :end]

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        # Zeros, not whatever lay there: masked places are multiplied by 0, which mends no NaN.
        self._keys = keys.new_zeros(self.rows, keys.shape[1], self.slots, keys.shape[3])
        self._values = values.new_zeros(self.rows, values.shape[1], self.slots, values.shape[3])
        self.is_initialized = True

    def _fill(self, span: Span, keys: Tensor, values: Tensor) -> None:
        for index, (rows, length) in enumerate(zip(span.rows, span.lengths, strict=True)):
            places = slice(self.prompt_slots - length, self.prompt_slots)
            self._keys[rows, :, places] = keys[index, None, :, :length]
            self._values[rows, :, places] = values[index, None, :, :length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows (ascending), moved to the front of the same buffers."""
        count = len(indices)
        self._keys[:count] = self._keys[indices]
        self._values[:count] = self._values[indices]
        self.rows = count


class SlotCache(Cache):
    """A `SlotLayer` for each layer of the model."""

    def __init__(self, num_layers: int, rows: int, slots: int, prompt_slots: int):
        self.slot_layers = [SlotLayer(rows, slots, prompt_slots) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def prefill(self, span: Span) -> None:
        """What comes next is a prompt each row of `span`."""
        for layer in self.slot_layers:
            layer.span = span

    def decode(self, length: int) -> None:
        """What comes next is one token a row, at slot `length`."""
        for layer in self.slot_layers:
            layer.span, layer.length = None, length


def padding_mask(lengths: Tensor, slots: int) -> Tensor | None:
    """Which of the prompt slots are real, [rows, slots] (1 or 0); None where all are."""
    padding = slots - lengths
    if not bool(padding.any()):
        return None
    return (torch.arange(slots, device=lengths.device) >= padding[:, None]).long()
