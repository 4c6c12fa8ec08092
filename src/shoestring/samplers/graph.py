"""The fast sampler: the policy's own weights, each prompt's cache kept once, completions that come and go, and on a GPU
the whole decode step as one CUDA graph. On the CPU the same scheduler runs the same step without a graph."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F

from shoestring.allocator import is_out_of_memory, shrinking
from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.model.draw import request_noise
from shoestring.model.fast.decoder import unsupported
from shoestring.model.fast.operations import COLUMNS, DONE, LENGTH, LIMIT, PROMPT, PROMPT_LENGTH, SLOT, Keys, Table
from shoestring.model.sampling import Sampling
from shoestring.samplers.base import RequestEngine, Told
from shoestring.samplers.capture import FIRST_ROWS, LADDER, Steps, _completion, _Prompts, prompts_at_once, side_by_side
from shoestring.samplers.hf import PREFILL_SHARE, added_tokens, no_room, prompt_chunks
from shoestring.types import Completion, Prompt, Request, Trunk

if TYPE_CHECKING:
    from shoestring.model.policy import Policy

log = logging.getLogger("shoestring")

# Steps between two looks at which completions have ended: a look waits for the GPU.
_LOOK_EVERY = 16


class GraphSampler(Settings):
    """Samples with the very weights that are trained: Qwen2, Qwen3, Llama (SmolLM) and Mistral."""

    name: Literal["graph"] = "graph"
    exact: ClassVar[bool] = True

    def open(self, policy: Policy, wave_tokens: int | None = None) -> GraphEngine:
        reason = unsupported(policy.base, policy.handle)
        if reason:
            raise ConfigError('sampler.name is "graph"', f"it cannot run this model: {reason}", 'use "auto" or "hf"')
        return GraphEngine(policy, wave_tokens)


class GraphEngine(RequestEngine):
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
    def sample_requests(  # type: ignore[override]
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling,
        done: Told | None = None,
        trunk_layer: int | None = None,
    ) -> list[tuple[Completion, ...]]:
        found: dict[int, tuple[Completion, ...]] = {}

        def take(place: int, completions: tuple[Completion, ...]) -> None:
            found[place] = completions
            if done is not None:
                done(place, completions)

        def attempt(rows: int) -> None:
            left = [place for place, request in enumerate(requests) if request.num and place not in found]
            table = self._table_for(requests, sampling)
            wave = _Wave(self._policy, self._steps, table, requests, sampling, trunk_layer)
            wave.run(left, rows, lambda place, g: request_noise(requests[place], g, wave.own_slots), take)

        if any(request.num for request in requests):
            self._fitting(requests, sampling, attempt)
        return [found.get(place, ()) for place in range(len(requests))]

    @torch.no_grad()
    def rehearse(
        self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling, trunk_layer: int | None = None
    ) -> None:
        requests = [Request(prompt, num, (0, place)) for place, prompt in enumerate(prompts)]

        def attempt(rows: int) -> None:
            table = self._table_for(requests, sampling)
            _Wave(self._policy, self._steps, table, requests, sampling, trunk_layer).rehearse(rows)

        self._fitting(requests, sampling, attempt)

    def _fitting(self, requests: Sequence[Request], sampling: Sampling, attempt: Callable[[int], None]) -> None:
        """Runs `attempt` with as many rows at once as fit, and remembers how many."""
        self._steps.look_at_weights()
        prompts = [request.prompt for request in requests]
        longest = max(len(prompt.token_ids) for prompt in prompts)
        each = longest + max(added_tokens(prompt, sampling) for prompt in prompts)
        most = min(sum(request.num for request in requests), LADDER[-1])
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

    def _table_for(self, requests: Sequence[Request], sampling: Sampling) -> Table:
        """One with places for all completions. Captured steps hold its addresses, so it only ever grows."""
        rows, width = sum(request.num for request in requests), sampling.max_new_tokens
        table = self._table
        if table is None or len(table.tokens) <= rows or table.tokens.shape[1] < width:
            self._steps.drop()
            if table is not None:
                rows, width = max(rows, len(table.tokens) - 1), max(width, table.tokens.shape[1])
            self._table = table = Table.empty(rows, width, self._steps.decoder.vocab_size, self._policy.device)
        if sampling.entropy and table.entropies is None:
            table.entropies = torch.zeros_like(table.logprobs)
        return table


class _Wave:
    """One sampling. Completions are numbered through, request by request; `rows` of them are in the cache at once, and
    as some end, others take their places. `_owner` names the request of each, `_starts` the first of each request."""

    def __init__(
        self,
        policy: Policy,
        steps: Steps,
        table: Table,
        requests: Sequence[Request],
        sampling: Sampling,
        trunk_layer: int | None,
    ):
        self._trunk_layer = trunk_layer
        self._trunks: dict[int, torch.Tensor] = {}
        self._policy, self._steps, self._decoder, self._table = policy, steps, steps.decoder, table
        self._nums, self._sampling = [request.num for request in requests], sampling
        self._owner = [p for p, num in enumerate(self._nums) for _ in range(num)]
        self._starts = [0, *accumulate(self._nums)]
        self._prompts = prompts = [request.prompt for request in requests]
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
        waiting = deque(row for place in places for row in range(self._starts[place], self._starts[place + 1]))
        active: list[int] = []
        lengths: dict[int, int] = {}
        try:
            while waiting or active:
                come = self._admit(waiting, noise_of)
                active += come
                if not come:  # those that came may have ended with their first token: a look first
                    count = 1
                    if self._steps.captured or not ends:
                        left = min(self._limits[self._owner[row]] - lengths[row] for row in active)
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
        waiting = deque(range(len(self._owner)))
        try:
            come = self._admit(waiting, lambda place, g: torch.full((self.own_slots,), 0.5, dtype=torch.float64))
            self._table.info[torch.tensor(come, device=self._policy.device), LENGTH] = max(self.own_slots - 2, 0)
            self._steps.run(come, self._table, self._sampling, 1, self._trunk_layer)
        finally:
            self._table.hold(None)

    def _open(self, num_rows: int, ends: Sequence[int]) -> None:
        """Makes room in memory for so many completions and their prompts."""
        device, decoder = self._policy.device, self._decoder
        num_prompts = prompts_at_once(num_rows, len(self._prompts), min(filter(None, self._nums)))

        make = torch.zeros if device.type == "cpu" else torch.empty  # the CPU's attention reads what it masks

        def room(count: int, slots: int) -> torch.Tensor:
            heads = decoder.heads
            shape = (2, len(decoder.layers), count, heads.kv_heads, slots, heads.head_dim)
            return make(shape, dtype=decoder.dtype, device=device)

        trunk = None
        if self._trunk_layer is not None:
            shape = (len(self._owner) + 1, self.own_slots, decoder.hidden_size)
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
        owners = [self._owner[row] for row in come]
        info = torch.zeros(len(come), COLUMNS, dtype=torch.int32)
        info[:, SLOT] = torch.tensor([self._slot[row] for row in come])
        info[:, LENGTH] = -1  # not even the token that is drawn now is in the cache
        info[:, PROMPT] = torch.tensor([self._place[p] for p in owners])
        info[:, PROMPT_LENGTH] = torch.tensor([len(self._prompts[p].token_ids) for p in owners])
        info[:, LIMIT] = torch.tensor([self._limits[p] for p in owners])
        table, device = self._table, self._policy.device
        rows = torch.tensor(come, device=device)
        uniform = torch.stack([noise_of(p, row - self._starts[p]) for p, row in zip(owners, come, strict=True)])
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
            p = self._owner[waiting[0]]
            if p not in self._place:
                if not self._free_prompts:
                    break
                self._place[p] = self._free_prompts.pop(0)
                self._going[p] = self._nums[p]
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
        return Trunk(self._trunks[self._owner[row]], keys.trunk[row, : length - 1])

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
            p = self._owner[row]
            self._free_rows.append(self._slot.pop(row))
            self._going[p] -= 1
            if self._going[p]:
                continue
            self._free_prompts.append(self._place.pop(p))
            rows = range(self._starts[p], self._starts[p + 1])
            asked = self._table.entropies if self._sampling.entropy else None
            tokens, logprobs, entropies = (
                [[]] * len(rows) if part is None else part[rows.start : rows.stop].tolist()
                for part in (self._table.tokens, self._table.logprobs, asked)
            )
            made = [_completion(tokens[g], logprobs[g], entropies[g], lengths[row], ends) for g, row in enumerate(rows)]
            take(p, tuple(replace(c, trunk=self._trunk(row, lengths[row])) for c, row in zip(made, rows, strict=True)))
