"""The fast sampler: the policy's own weights, each prompt's cache kept once, completions that come and go, and on a GPU
the whole decode step as one CUDA graph. On the CPU the same scheduler runs the same step without a graph."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.memory.budget import is_out_of_memory, shrinking
from shoestring.model.draw import noise
from shoestring.model.fast.decoder import unsupported
from shoestring.model.fast.operations import COLUMNS, DONE, LENGTH, LIMIT, PROMPT, PROMPT_LENGTH, SLOT, Keys, Table
from shoestring.samplers.base import Sampling, Told
from shoestring.samplers.hf import PREFILL_SHARE, HfEngine, added_tokens, no_room, prompt_chunks
from shoestring.types import Completion, Paths, Prompt, Trunk

if TYPE_CHECKING:
    from shoestring.model.policy import Policy

log = logging.getLogger("shoestring")

# Sizes of a batch that get a graph of their own; between them, rows that stand for none fill up.
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Completions whose first tokens are drawn at once: their logits come on top of those of the captured steps.
FIRST_ROWS = 16
# Steps between two looks at which completions have ended: a look waits for the GPU.
_LOOK_EVERY = 16


class GraphSampler(Settings):
    """Samples with the very weights that are trained: Qwen2, Qwen3, Llama (SmolLM) and Mistral."""

    name: Literal["graph"] = "graph"
    exact: ClassVar[bool] = True

    def open(self, policy: Policy, wave_tokens: int | None = None) -> GraphEngine:
        reason = unsupported(policy)
        if reason:
            raise ConfigError('sampler.name is "graph"', f"it cannot run this model: {reason}", 'use "auto" or "hf"')
        return GraphEngine(policy, wave_tokens)


class AutoSampler(Settings):
    """ "graph" for the models that it knows, else "hf"."""

    name: Literal["auto"] = "auto"
    exact: ClassVar[bool] = True

    def open(self, policy: Policy, wave_tokens: int | None = None) -> GraphEngine | HfEngine:
        reason = unsupported(policy)
        if not reason:
            return GraphEngine(policy, wave_tokens)
        log.warning('Completions are sampled through transformers (sampler "hf"), which is slower: %s.', reason)
        return HfEngine(policy, wave_tokens)


class GraphEngine:
    """See `Engine`. `wave_tokens` is counted as if every completion had its prompt for itself."""

    keeps_trunk = True

    def __init__(self, policy: Policy, wave_tokens: int | None = None):
        self.wave_tokens = wave_tokens
        self._policy = policy
        self._steps = Steps(policy)
        self._table: Table | None = None

    def sync(self, policy: Policy) -> None:
        """Weights are looked at whenever sampling begins."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        num: int,
        sampling: Sampling,
        seed: int,
        first: int = 0,
        done: Told | None = None,
        trunk_layer: int | None = None,
    ) -> list[tuple[Completion, ...]]:
        found: dict[int, tuple[Completion, ...]] = {}

        def take(place: int, completions: tuple[Completion, ...]) -> None:
            found[place] = completions
            if done is not None:
                done(place, completions)

        def attempt(rows: int) -> None:
            left = [place for place in range(len(prompts)) if place not in found]
            table = self._table_for(prompts, num, sampling)
            wave = _Wave(self._policy, self._steps, table, prompts, num, sampling, trunk_layer)
            wave.run(left, rows, lambda place, g: noise(seed, first + place, g, wave.own_slots), take)

        if prompts and num:
            self._fitting(prompts, num, sampling, attempt)
        return [found.get(place, ()) for place in range(len(prompts))]

    @torch.no_grad()
    def rehearse(
        self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling, trunk_layer: int | None = None
    ) -> None:
        def attempt(rows: int) -> None:
            table = self._table_for(prompts, num, sampling)
            _Wave(self._policy, self._steps, table, prompts, num, sampling, trunk_layer).rehearse(rows)

        self._fitting(prompts, num, sampling, attempt)

    def _fitting(self, prompts: Sequence[Prompt], num: int, sampling: Sampling, attempt: Callable[[int], None]) -> None:
        """Runs `attempt` with as many rows at once as fit, and remembers how many."""
        self._steps.look_at_weights()
        longest = max(len(prompt.token_ids) for prompt in prompts)
        each = longest + max(added_tokens(prompt, sampling) for prompt in prompts)
        most = min(len(prompts) * num, LADDER[-1])
        asked = max(min((self.wave_tokens or most * each) // each, most), 1) * each

        def undo() -> None:
            self._steps.drop()
            self._table = None

        try:
            _, fitted = shrinking(lambda wave_tokens: attempt(wave_tokens // each), asked, each, undo=undo)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise no_room(each) from None
        if fitted < asked:
            self.wave_tokens = fitted

    def _table_for(self, prompts: Sequence[Prompt], num: int, sampling: Sampling) -> Table:
        """One with places for all completions. Captured steps hold its addresses, so it only ever grows."""
        rows, width = len(prompts) * num, sampling.max_new_tokens
        table = self._table
        if table is None or len(table.tokens) <= rows or table.tokens.shape[1] < width:
            self._steps.drop()
            if table is not None:
                rows, width = max(rows, len(table.tokens) - 1), max(width, table.tokens.shape[1])
            self._table = table = Table.empty(rows, width, self._steps.decoder.vocab_size, self._policy.device)
        if sampling.entropy and table.entropies is None:
            table.entropies = torch.zeros_like(table.logprobs)
        return table


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


class _Wave:
    """One sampling. Completions are numbered through, prompt by prompt; `rows` of them are in the cache at once, and
    as some end, others take their places."""

    def __init__(
        self,
        policy: Policy,
        steps: Steps,
        table: Table,
        prompts: Sequence[Prompt],
        num: int,
        sampling: Sampling,
        trunk_layer: int | None,
    ):
        self._trunk_layer = trunk_layer
        self._trunks: dict[int, torch.Tensor] = {}
        self._policy, self._steps, self._decoder, self._table = policy, steps, steps.decoder, table
        self._prompts, self._num, self._sampling = prompts, num, sampling
        self._limits = [added_tokens(prompt, sampling) for prompt in prompts]
        self.own_slots = max(self._limits)
        self._prompt_slots = max(len(prompt.token_ids) for prompt in prompts)
        self._free_rows: list[int] = []
        self._free_prompts: list[int] = []
        self._slot: dict[int, int] = {}
        self._place: dict[int, int] = {}
        self._going: dict[int, int] = {}

    def run(
        self,
        places: Sequence[int],
        num_rows: int,
        noise_of: Callable[[int, int], torch.Tensor],
        take: Told,
    ) -> None:
        """Samples the completions of the prompts at `places`, handing over each group as it is complete."""
        ends = () if self._sampling.ignore_eos else self._policy.eos_ids
        self._open(num_rows, ends)
        waiting = deque(place * self._num + g for place in places for g in range(self._num))
        active: list[int] = []
        lengths: dict[int, int] = {}
        try:
            while waiting or active:
                come = self._admit(waiting, noise_of)
                active += come
                if not come:  # those that came may have ended with their first token: a look first
                    count = 1
                    if self._steps.captured or not ends:
                        left = min(self._limits[row // self._num] - lengths[row] for row in active)
                        count = min(left, _LOOK_EVERY) if ends else left
                    self._steps.run(active, self._table, self._sampling, count, self._trunk_layer)
                rows = torch.tensor(active, device=self._policy.device)
                seen = self._table.info[rows][:, [LENGTH, DONE]].tolist()
                for row, (length, _) in zip(active, seen, strict=True):
                    lengths[row] = length + 1
                ended = [row for row, (_, is_done) in zip(active, seen, strict=True) if is_done]
                active = [row for row, (_, is_done) in zip(active, seen, strict=True) if not is_done]
                self._leave(ended, lengths, ends, take)
                if not self._steps.captured:
                    active = self._closed_up(active, lengths)
        finally:
            self._table.hold(None)

    def rehearse(self, num_rows: int) -> None:
        """The first token of as many completions as go at once, and the last one."""
        self._open(num_rows, ())
        waiting = deque(range(len(self._prompts) * self._num))
        try:
            come = self._admit(waiting, lambda place, g: torch.full((self.own_slots,), 0.5, dtype=torch.float64))
            self._table.info[torch.tensor(come, device=self._policy.device), LENGTH] = max(self.own_slots - 2, 0)
            self._steps.run(come, self._table, self._sampling, 1, self._trunk_layer)
        finally:
            self._table.hold(None)

    def _open(self, num_rows: int, ends: Sequence[int]) -> None:
        """Makes room in memory for so many completions and their prompts."""
        device, decoder = self._policy.device, self._decoder
        num_prompts = prompts_at_once(num_rows, len(self._prompts), self._num)

        make = torch.zeros if device.type == "cpu" else torch.empty  # the CPU's attention reads what it masks

        def room(count: int, slots: int) -> torch.Tensor:
            heads = decoder.heads
            shape = (2, len(decoder.layers), count, heads.kv_heads, slots, heads.head_dim)
            return make(shape, dtype=decoder.dtype, device=device)

        trunk = None
        if self._trunk_layer is not None:
            shape = (len(self._prompts) * self._num + 1, self.own_slots, decoder.hidden_size)
            trunk = torch.empty(shape, dtype=decoder.dtype, device=device)
        row_slots = self.own_slots + (self._prompt_slots if decoder.operations.whole_rows else 0)
        self._table.hold(Keys(room(num_prompts, self._prompt_slots), room(num_rows, row_slots), trunk))
        self._table.ends.fill_(False)
        self._table.ends[torch.tensor(ends, dtype=torch.int64, device=device)] = True
        self._free_rows, self._free_prompts = list(range(num_rows)), list(range(num_prompts))
        self._first_hidden = torch.zeros(num_prompts, decoder.hidden_size, dtype=decoder.dtype, device=device)
        self._chunk_tokens = (num_prompts * self._prompt_slots + num_rows * self.own_slots) // PREFILL_SHARE

    def _admit(self, waiting: deque[int], noise_of: Callable[[int, int], torch.Tensor]) -> list[int]:
        """Gives free places to waiting completions, and draws their first tokens."""
        come, fresh = self._next(waiting)
        if not come:
            return []
        self._prefill(fresh)
        owners = [row // self._num for row in come]
        info = torch.zeros(len(come), COLUMNS, dtype=torch.int32)
        info[:, SLOT] = torch.tensor([self._slot[row] for row in come])
        info[:, LENGTH] = -1  # not even the token that is drawn now is in the cache
        info[:, PROMPT] = torch.tensor([self._place[p] for p in owners])
        info[:, PROMPT_LENGTH] = torch.tensor([len(self._prompts[p].token_ids) for p in owners])
        info[:, LIMIT] = torch.tensor([self._limits[p] for p in owners])
        table, device = self._table, self._policy.device
        rows = torch.tensor(come, device=device)
        uniform = torch.stack([noise_of(*divmod(row, self._num)) for row in come])
        table.info[rows] = info.to(device)
        table.uniform[rows, : uniform.shape[1]] = uniform.to(device)
        slot, prompt = info[:, SLOT].long().to(device), info[:, PROMPT].long().to(device)
        if self._decoder.operations.whole_rows:
            assert table.keys is not None
            table.keys.own[:, :, slot, :, : self._prompt_slots] = table.keys.prompt[:, :, prompt]
        size = FIRST_ROWS if self._steps.captured else len(come)
        for some, part in zip(rows.split(size), self._first_hidden[prompt].split(size), strict=True):
            self._decoder.draw(self._decoder.logits(part), some, table, self._sampling)
        return come

    def _next(self, waiting: deque[int]) -> tuple[list[int], list[int]]:
        """The completions that free places go to, and those of their prompts that are not in the cache yet."""
        come, fresh = [], []
        while waiting and self._free_rows:
            p = waiting[0] // self._num
            if p not in self._place:
                if not self._free_prompts:
                    break
                self._place[p] = self._free_prompts.pop(0)
                self._going[p] = self._num
                fresh.append(p)
            row = waiting.popleft()
            self._slot[row] = self._free_rows.pop(0)
            come.append(row)
        return come, fresh

    def _prefill(self, fresh: Sequence[int]) -> None:
        """Runs new prompts into the cache, and keeps what their first tokens are drawn from."""
        from shoestring.model.fast.layers import Pass, blocks_of

        assert self._table.keys is not None
        decoder, split = self._decoder, self._trunk_layer or 0
        for used in prompt_chunks(self._prompts, fresh, self._chunk_tokens):
            places = [self._place[p] for p in used]
            prompts = [self._prompts[p].token_ids for p in used]
            paths, ends = side_by_side([len(ids) for ids in prompts], self._policy.device)
            blocks = blocks_of(paths) if decoder.sees_all(paths.nodes.shape[1]) else None
            cache = _Prompts(self._table.keys.prompt, places)
            how = Pass(decoder, paths, adapted=True, blocks=blocks, cache=cache)
            tokens = torch.tensor([token for ids in prompts for token in ids], device=self._policy.device)
            x = how.run(F.embedding(tokens, decoder.embedding), decoder.layers[:split])
            if self._trunk_layer is not None:
                own = (part.clone() for part in x.split([len(ids) for ids in prompts]))
                self._trunks.update(zip(used, own, strict=True))
            x = how.run(x, decoder.layers[split:])
            self._first_hidden[torch.tensor(places, device=x.device)] = how.last_norm(x[ends])

    def _trunk(self, row: int, length: int) -> Trunk | None:
        """A completion's, without a copy."""
        keys = self._table.keys
        if keys is None or keys.trunk is None:
            return None
        return Trunk(self._trunks[row // self._num], keys.trunk[row, : length - 1])

    def _closed_up(self, active: Sequence[int], lengths: dict[int, int]) -> list[int]:
        """Moves completions into places that others have left, so that those of the batch lie side by side, in order,
        and nothing has to be gathered in each step."""
        assert self._table.keys is not None
        own = self._table.keys.own
        moved = [row for row in active if self._slot[row] >= len(active)]
        if moved:
            old = [self._slot[row] for row in moved]
            new = sorted(self._free_rows)[: len(moved)]
            used = self._prompt_slots + max(lengths[row] for row in moved)
            own[:, :, new, :, :used] = own[:, :, old, :, :used]
            self._table.info[moved, SLOT] = torch.tensor(new, dtype=torch.int32, device=own.device)
            self._slot.update(zip(moved, new, strict=True))
            self._free_rows = [place for place in self._free_rows if place not in new] + old
        self._free_rows.sort()
        return sorted(active, key=self._slot.__getitem__)

    def _leave(self, ended: Sequence[int], lengths: dict[int, int], ends: Sequence[int], take: Told) -> None:
        """Frees the places of completions that have ended, and hands over the groups that are complete."""
        for row in ended:
            p = row // self._num
            self._free_rows.append(self._slot.pop(row))
            self._going[p] -= 1
            if self._going[p]:
                continue
            self._free_prompts.append(self._place.pop(p))
            rows = range(p * self._num, (p + 1) * self._num)
            asked = self._table.entropies if self._sampling.entropy else None
            tokens, logprobs, entropies = (
                [[]] * len(rows) if part is None else part[rows.start : rows.stop].tolist()
                for part in (self._table.tokens, self._table.logprobs, asked)
            )
            made = [_completion(tokens[g], logprobs[g], entropies[g], lengths[row], ends) for g, row in enumerate(rows)]
            take(p, tuple(replace(c, trunk=self._trunk(row, lengths[row])) for c, row in zip(made, rows, strict=True)))


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
