"""The plain reference: the policy's own transformers model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from shoestring.allocator import OutOfMemory, is_out_of_memory, shrinking
from shoestring.config.settings import Settings
from shoestring.model.draw import draw, entropy, request_noise
from shoestring.model.sampling import Sampling
from shoestring.samplers.base import RequestEngine, Told
from shoestring.types import Completion, Prompt, Request

if TYPE_CHECKING:
    from shoestring.model.policy import Policy

T = TypeVar("T")
Place = tuple[int, int]
"""A completion: the place of its prompt, and its own in the group."""

# Prompts are run in chunks of this part of the wave's slots: what a chunk takes is then small beside the wave's cache.
PREFILL_SHARE = 16


class HfSampler(Settings):
    """Samples with the very weights that are trained; works for any causal model of transformers."""

    name: Literal["hf"] = "hf"

    exact: ClassVar[bool] = True

    def open(self, policy: Policy, wave_tokens: int | None = None) -> HfEngine:
        return HfEngine(policy, wave_tokens)


class HfEngine(RequestEngine):
    def __init__(self, policy: Policy, wave_tokens: int | None = None):
        self._policy, self.wave_tokens = policy, wave_tokens

    def sync(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def sample_requests(  # type: ignore[override]
        self, requests: Sequence[Request], *, sampling: Sampling, done: Told | None = None
    ) -> list[tuple[Completion, ...]]:
        prompts = [request.prompt for request in requests]
        places = [(p, g) for p, request in enumerate(requests) for g in range(request.num)]
        if not places:
            return [() for _ in requests]

        def attempt(wave_tokens: int) -> dict[Place, Completion]:
            found: dict[Place, Completion] = {}
            for wave in self._waves(prompts, places, sampling, wave_tokens):
                found.update(zip(wave, self._sample_wave(requests, wave, sampling), strict=True))
                for p in dict.fromkeys(p for p, _ in wave):
                    if done is not None and all((p, g) in found for g in range(requests[p].num)):
                        done(p, tuple(found[p, g] for g in range(requests[p].num)))
            return found

        found = self._shrinking(attempt, prompts, places, sampling)
        return [tuple(found[p, g] for g in range(request.num)) for p, request in enumerate(requests)]

    @torch.no_grad()
    def rehearse(self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling) -> None:
        requests = [Request(prompt, num, (0, place)) for place, prompt in enumerate(prompts)]
        places = [(p, g) for p in range(len(prompts)) for g in range(num)]

        def attempt(wave_tokens: int) -> None:
            wave = self._waves(prompts, places, sampling, wave_tokens)[0]
            self._sample_wave(requests, wave, sampling, rehearsal=True)

        self._shrinking(attempt, prompts, places, sampling)

    def _shrinking(
        self, attempt: Callable[[int], T], prompts: Sequence[Prompt], places: list[Place], sampling: Sampling
    ) -> T:
        """Runs `attempt` with waves that fit, and remembers their size."""
        everything = _padded(prompts, places, sampling)
        least = max(_slots(prompts[p], sampling) for p, _ in places)
        asked = min(self.wave_tokens or everything, everything)
        try:
            found, fitted = shrinking(attempt, max(asked, least), least)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise no_room(least) from None
        if fitted < max(asked, least):
            self.wave_tokens = fitted
        return found

    def _waves(
        self, prompts: Sequence[Prompt], places: list[Place], sampling: Sampling, wave_tokens: int
    ) -> list[list[Place]]:
        """Runs of places whose padded slots keep within `wave_tokens` (one that is longer stands alone).

        Models whose cache is more than keys and values get waves of one prompt length each: no padding at all.
        """
        plain = _plain_attention(self._policy)
        waves: list[list[Place]] = []
        longest = added = 0
        for p, g in places if plain else sorted(places, key=lambda place: len(prompts[place[0]].token_ids)):
            length = len(prompts[p].token_ids)
            more = _slots(prompts[p], sampling) - length
            wide, deep = max(longest, length), max(added, more)
            if waves and (plain or length == longest) and (len(waves[-1]) + 1) * (wide + deep) <= wave_tokens:
                waves[-1].append((p, g))
                longest, added = wide, deep
            else:
                waves.append([(p, g)])
                longest, added = length, more
        return waves

    def _sample_wave(
        self,
        requests: Sequence[Request],
        places: list[Place],
        sampling: Sampling,
        rehearsal: bool = False,
    ) -> list[Completion]:
        """A rehearsal takes its first two tokens only, the second one at the last slot."""
        policy, prompts = self._policy, [request.prompt for request in requests]
        limit = torch.tensor([added_tokens(prompts[p], sampling) for p, _ in places])
        uniform = torch.stack([request_noise(requests[p], g, int(limit.max())) for p, g in places]).to(policy.device)
        logits, cache, mask, position = self._prefill(prompts, [p for p, _ in places], int(limit.max()))
        limit = limit.to(policy.device)
        ends = () if sampling.ignore_eos or rehearsal else policy.eos_ids
        eos = torch.tensor(ends, device=policy.device, dtype=torch.int64)
        tokens = torch.zeros(uniform.shape, dtype=torch.int64, device=policy.device)
        logprobs = torch.zeros(uniform.shape, dtype=torch.float32, device=policy.device)
        entropies = torch.zeros_like(logprobs if sampling.entropy else logprobs[:, :0])
        length = torch.zeros_like(limit)
        active = torch.arange(len(places), device=policy.device)  # which completion each row of the batch belongs to
        for t in range(uniform.shape[1]):
            token, logprob = draw(logits, uniform[active, t], sampling)
            if sampling.entropy:
                entropies[active, t] = entropy(logits, sampling)
            del logits  # before the next ones come
            tokens[active, t], logprobs[active, t], length[active] = token, logprob, t + 1
            going = ~torch.isin(token, eos) & (t + 1 < limit[active])
            num_going = int(going.sum())
            if num_going == 0 or (rehearsal and t == 1):
                break
            # Ended rows are carried along until a quarter of the batch has ended, since leaving copies the cache. What
            # they go on to draw is cut off by `ended` below.
            if num_going <= 0.75 * len(active):
                kept = going.nonzero().flatten()
                active, token, position = active[kept], token[kept], position[kept]
                mask = mask[kept] if mask is not None else None
                cache.batch_select_indices(kept)
            if rehearsal:
                mask = _to_last_slot(cache, mask, uniform.shape[1])
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = policy.decode_step(token[:, None], mask, position[:, None], cache)  # noqa: F841  (`del` hides its use)
            position = position + 1
        return _completions(tokens.cpu(), logprobs.cpu(), entropies.cpu(), length.cpu(), limit.cpu(), ends)

    def _prefill(
        self, prompts: Sequence[Prompt], owner: list[int], max_new_tokens: int
    ) -> tuple[Tensor, Any, Tensor | None, Tensor]:
        """Runs each prompt once and gives every completion its row: logits [B, V], cache, mask [B, S], position [B].

        Prompts are padded on the right, where causal attention cannot see the padding and no row is ever masked whole.
        In the cache the padding lies on the left, so that new keys follow the prompt without a gap.
        """
        policy = self._policy
        lengths = torch.tensor([len(prompts[p].token_ids) for p in owner], device=policy.device)
        if not _plain_attention(policy):
            return *_prefill_alike(policy, prompts, owner), None, lengths
        from shoestring.samplers.cache import SlotCache, Span, padding_mask

        slots = int(lengths.max())
        num_layers = policy.base.config.get_text_config().num_hidden_layers
        cache = SlotCache(num_layers, len(owner), slots + max_new_tokens, slots)
        logits = torch.empty(0)
        for used in prompt_chunks(
            prompts, dict.fromkeys(owner), len(owner) * (slots + max_new_tokens) // PREFILL_SHARE
        ):
            rows = [slice(owner.index(p), owner.index(p) + owner.count(p)) for p in used]
            sizes = [len(prompts[p].token_ids) for p in used]
            cache.prefill(Span(rows, sizes))
            found = policy.prefill(*right_padded(policy, prompts, used), cache)
            if not len(logits):
                logits = found.new_empty(len(owner), found.shape[1])
            for index, row in enumerate(rows):
                logits[row] = found[index]
        cache.decode(slots)
        return logits, cache, padding_mask(lengths, slots), lengths


def added_tokens(prompt: Prompt, sampling: Sampling) -> int:
    """Tokens that a completion may get beside a forced prefix; one at least."""
    return max(sampling.max_new_tokens - len(prompt.prefix), 1)


def no_room(tokens: int) -> OutOfMemory:
    """What is said when one completion of `tokens` tokens is too much."""
    return OutOfMemory(
        f"memory ran out while sampling one completion of {tokens} tokens, its prompt included",
        "there is no smaller piece of a step",
        'lower sampling.max_new_tokens, set model.dtype = "nf4", or give more memory',
    )


def _slots(prompt: Prompt, sampling: Sampling) -> int:
    """Cache slots of a completion: its prompt, a forced prefix included, and what it may add."""
    return len(prompt.token_ids) + added_tokens(prompt, sampling)


def _padded(prompts: Sequence[Prompt], places: Sequence[Place], sampling: Sampling) -> int:
    """Cache slots of a wave: every row has those of the longest prompt and of the longest addition."""
    longest = max(len(prompts[p].token_ids) for p, _ in places)
    added = max(_slots(prompts[p], sampling) - len(prompts[p].token_ids) for p, _ in places)
    return len(places) * (longest + added)


def prompt_chunks(prompts: Sequence[Prompt], used: Iterable[int], max_tokens: int) -> list[list[int]]:
    """The prompts of a wave, in runs of at most `max_tokens` padded tokens, or one alone."""
    chunks: list[list[int]] = []
    for p in used:
        chunk = [*chunks[-1], p] if chunks else []
        if chunk and len(chunk) * max(len(prompts[q].token_ids) for q in chunk) <= max_tokens:
            chunks[-1] = chunk
        else:
            chunks.append([p])
    return chunks


def right_padded(policy: Policy, prompts: Sequence[Prompt], used: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Token ids, [P, L], and each prompt's last place, [P]."""
    lengths = torch.tensor([len(prompts[p].token_ids) for p in used])
    ids = torch.zeros(len(used), int(lengths.max()), dtype=torch.int64)
    for row, p in enumerate(used):
        ids[row, : len(prompts[p].token_ids)] = torch.tensor(prompts[p].token_ids)
    return ids.to(policy.device), (lengths - 1).to(policy.device)


def _prefill_alike(policy: Policy, prompts: Sequence[Prompt], owner: list[int]) -> tuple[Tensor, Any]:
    """Logits and cache of prompts of one length, by the model's own kind of cache."""
    from transformers import DynamicCache

    used = sorted(set(owner))
    cache = DynamicCache(config=policy.base.config)
    logits = policy.prefill(*right_padded(policy, prompts, used), cache)
    row = torch.tensor([used.index(p) for p in owner], device=policy.device)
    cache.batch_select_indices(row)
    return logits[row], cache


def _to_last_slot(cache: Any, mask: Tensor | None, max_new_tokens: int) -> Tensor | None:
    """Pretends that all tokens but the last have been sampled. The model's own kinds of cache grow, and stay."""
    if not hasattr(cache, "slot_layers"):
        return mask
    layer = cache.slot_layers[0]
    cache.decode(layer.prompt_slots + max_new_tokens - 1)
    if mask is None:
        return None
    return torch.cat([mask, mask.new_ones(len(mask), max_new_tokens - 1)], dim=1)


def _plain_attention(policy: Policy) -> bool:
    """Whether every layer's state is keys and values by position (not so for state-space and other recurrent
    layers)."""
    config = policy.base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds <= {"full_attention", "sliding_attention"} and not getattr(policy.base, "_is_stateful", False)


def _completions(
    tokens: Tensor, logprobs: Tensor, entropies: Tensor, length: Tensor, limit: Tensor, eos_ids: tuple[int, ...]
) -> list[Completion]:
    """Cuts each row at its first end token or at its limit."""
    made = []
    for ids, values, spreads, count, most in zip(
        tokens.tolist(), logprobs.tolist(), entropies.tolist(), length.tolist(), limit.tolist(), strict=True
    ):
        ids = ids[: min(count, most)]
        ended = next((t for t, token in enumerate(ids) if token in eos_ids), None)
        keep = len(ids) if ended is None else ended + 1
        stop = "length" if ended is None else "end"
        made.append(Completion(tuple(ids[:keep]), tuple(values[:keep]), stop, entropies=tuple(spreads[:keep])))
    return made
