"""Decode steps, captured once for each size of batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from shoestring.model.fast.operations import Table
from shoestring.model.sampling import Sampling
from shoestring.types import Completion, Paths

if TYPE_CHECKING:
    from shoestring.model.policy import Policy

# Sizes of a batch that get a graph of their own; between them, rows that stand for none fill up.
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


# Completions whose first tokens are drawn at once: their logits come on top of those of the captured steps.
FIRST_ROWS = 16


class Steps:
    """Decode steps of one policy: captured as graphs on a GPU, one for each size of a batch and way to draw."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self.decoder = policy.decoder
        self.captured = policy.device.type == "cuda"
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = {}
        self._rows: dict[int, torch.Tensor] = {}
        self._pool: object = None

    def look_at_weights(self) -> None:
        """Takes over the adapter as it is now. Weights that have been moved are joined again."""
        decoder = self._policy.decoder
        if decoder is not self.decoder:
            self.drop()
            self.decoder = decoder
        decoder.sync()

    def drop(self) -> None:
        """Forgets every graph, and gives back what they hold: all at once, since they share memory."""
        self._graphs.clear()
        self._rows.clear()
        self._pool = None

    def run(
        self, rows: Sequence[int], table: Table, sampling: Sampling, count: int, trunk_layer: int | None = None
    ) -> None:
        """`count` tokens more for each of these completions."""
        if not self.captured:
            places = torch.tensor(rows, device=self._policy.device)
            with torch.inference_mode():  # a tenth of a small step
                for _ in range(count):
                    self.decoder.step(places, table, sampling, trunk_layer)
            return
        size = next(size for size in LADDER if size >= len(rows))
        none = len(table.tokens) - 1
        if size not in self._rows:
            self._rows[size] = torch.full((size,), none, device=self._policy.device)
        self._rows[size].copy_(torch.tensor([*rows, *[none] * (size - len(rows))]))
        graph = self._graph(size, table, sampling, trunk_layer)
        for _ in range(count):
            graph.replay()

    def _graph(self, size: int, table: Table, sampling: Sampling, trunk_layer: int | None) -> torch.cuda.CUDAGraph:
        how = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.entropy)
        key = (size, *how, trunk_layer)
        if key not in self._graphs:
            self._graphs[key] = self._capture(self._rows[size], table, sampling, trunk_layer)
        return self._graphs[key]

    def _capture(
        self, rows: torch.Tensor, table: Table, sampling: Sampling, trunk_layer: int | None
    ) -> torch.cuda.CUDAGraph:
        """One step as a graph. It is run once before, on rows that stand for none: what is compiled or set up at first
        use must not be captured."""
        current = torch.cuda.current_stream()
        own = current != torch.cuda.default_stream()  # a run has a stream of its own; the default one captures nothing
        stream = current if own else _capture_stream(self._policy.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.decoder.step(torch.full_like(rows, len(table.tokens) - 1), table, sampling, trunk_layer)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # as where memory runs out at its beginning
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):  # type: ignore[arg-type]
                self.decoder.step(rows, table, sampling, trunk_layer)
        current.wait_stream(stream)
        return graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: each stream that products run on gets a workspace of its own from cuBLAS, 32 MiB on an H100."""
    return torch.cuda.Stream(device)


class _Prompts:
    """The places of some prompts in the cache, [2, L, prompts, kv heads, slots, D], filled layer by layer."""

    def __init__(self, keys: torch.Tensor, places: Sequence[int]):
        self._keys, self._places, self._layer = keys, torch.tensor(places, device=keys.device), 0

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for kind, given in enumerate((keys, values)):
            self._keys[kind, self._layer].narrow(2, 0, given.shape[2])[self._places] = given
        self._layer += 1


def side_by_side(lengths: Sequence[int], device: torch.device) -> tuple[Paths, torch.Tensor]:
    """Rows of these lengths as paths that share nothing, and the last node of each, [R]."""
    ends = torch.tensor(lengths).cumsum(0)
    longest = max(lengths)
    within = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    starts = ends - torch.tensor(lengths)
    nodes = torch.minimum(starts[:, None] + torch.arange(longest), ends[:, None] - 1)
    place = within.flatten().nonzero().flatten()
    return Paths(nodes, place, place % longest).to(device), (ends - 1).to(device)


def prompts_at_once(rows: int, prompts: int, num: int) -> int:
    """Prompts that can be in the cache beside so many completions: one more than these need, for those that come while
    a long one stays."""
    return min(prompts, -(-rows // num) + 1, rows)


def _completion(
    tokens: list[int], logprobs: list[float], entropies: list[float], length: int, ends: Sequence[int]
) -> Completion:
    ids = tuple(tokens[:length])
    stop = "end" if ids[-1] in ends else "length"
    return Completion(ids, tuple(logprobs[:length]), stop, entropies=tuple(entropies[:length]))
