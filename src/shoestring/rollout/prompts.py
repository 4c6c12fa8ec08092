"""The fresh prompts of a run, encoded before they are asked for: while the device trains, a thread encodes those that
the next step takes for certain.

A prompt depends on nothing but its place in the run, so this changes no result, and a resumed run needs to know nothing
of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from shoestring.hashing import stable_hash
from shoestring.rollout.rollout import Encoded

log = logging.getLogger("shoestring")


class FreshPrompts:
    """The prompts at the places 0, 1, 2, ... of a run's endless order of problems.

    `order(start, num)` says which problems stand at the places from `start`; `encode(problem)` makes the prompt of one.
    """

    def __init__(self, order: Callable[[int, int], Sequence[int]], encode: Callable[[int], Encoded]):
        self._order, self._encode = order, encode
        self._ready: dict[int, Encoded] = {}

    def take(self, start: int, num: int) -> Encoded:
        """The prompts from place `start`, and how many of them were truncated. Raises what encoding raises."""
        found = [
            self._ready.pop(place, None) or self._encode(problem)
            for place, problem in zip(range(start, start + num), self._order(start, num), strict=True)
        ]
        return Encoded([p for one in found for p in one.prompts], sum(one.num_truncated for one in found))

    @contextmanager
    def ahead(self, start: int, num: int) -> Iterator[None]:
        """Encodes the prompts from place `start` in a thread, which ends before the context does: nothing else that
        uses the tokenizer should run inside."""
        thread = threading.Thread(target=self._prepare, args=(start, num), name="prompts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _prepare(self, start: int, num: int) -> None:
        """A prompt that cannot be encoded is left to `take`, which raises in the step that wants it."""
        try:
            for place, problem in zip(range(start, start + num), self._order(start, num), strict=True):
                if place not in self._ready:
                    self._ready[place] = self._encode(problem)
        except Exception as error:
            log.debug("A prompt was not encoded ahead: %s", error)


def order(count: int, seed: int, start: int, num: int) -> list[int]:
    """Places `start` to `start + num` of an endless order of `count` problems: each epoch a permutation of its own.

    >>> sorted(order(4, seed=0, start=4, num=4))
    [0, 1, 2, 3]
    """
    chosen: list[int] = []
    while len(chosen) < num:
        epoch, place = divmod(start + len(chosen), count)
        generator = torch.Generator().manual_seed(stable_hash(seed, "epoch", epoch) >> 1)
        permutation = torch.randperm(count, generator=generator)
        chosen += permutation[place : place + num - len(chosen)].tolist()
    return chosen
