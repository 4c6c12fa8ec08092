"""The plain reference: the policy's own transformers model, token by token, with a growing key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from shoestring.samplers.base import Sampling
from shoestring.samplers.draw import draw, noise
from shoestring.settings import Settings
from shoestring.types import Completion, Prompt

if TYPE_CHECKING:
    from shoestring.policy import Policy


class HfSampler(Settings):
    """Samples with the very weights that are trained; works for any causal model of transformers."""

    name: Literal["hf"] = "hf"
    max_rows: int | None = Field(default=None, ge=1)
    """Completions sampled at once (a wave); None takes all of a step. Smaller waves need less memory, and draw the
    same."""

    def open(self, policy: Policy) -> HfEngine:
        return HfEngine(policy, self.max_rows)


class HfEngine:
    def __init__(self, policy: Policy, max_rows: int | None = None):
        self._policy, self._max_rows = policy, max_rows

    def sync(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling, seed: int, first: int = 0
    ) -> list[tuple[Completion, ...]]:
        places = [(p, g) for p in range(len(prompts)) for g in range(num)]
        size = self._max_rows or max(len(places), 1)
        found: dict[tuple[int, int], Completion] = {}
        for start in range(0, len(places), size):
            for wave in self._waves(prompts, places[start : start + size]):
                found.update(zip(wave, self._sample_wave(prompts, wave, sampling, seed, first), strict=True))
        return [tuple(found[p, g] for g in range(num)) for p in range(len(prompts))]

    def _waves(self, prompts: Sequence[Prompt], places: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """One wave, or, for models whose cache is more than keys and values, one a prompt length (no padding at
        all)."""
        if _plain_attention(self._policy):
            return [places]
        lengths = sorted({len(prompts[p].token_ids) for p, _ in places})
        return [[(p, g) for p, g in places if len(prompts[p].token_ids) == length] for length in lengths]

    def _sample_wave(
        self, prompts: Sequence[Prompt], places: list[tuple[int, int]], sampling: Sampling, seed: int, first: int
    ) -> list[Completion]:
        policy = self._policy
        limit = torch.tensor([max(sampling.max_new_tokens - len(prompts[p].prefix), 1) for p, _ in places])
        uniform = torch.stack([noise(seed, first + p, g, int(limit.max())) for p, g in places]).to(policy.device)
        logits, cache, mask, position = self._prefill(prompts, [p for p, _ in places])
        limit, eos = limit.to(policy.device), torch.tensor(policy.eos_ids, device=policy.device)
        tokens = torch.zeros(uniform.shape, dtype=torch.int64, device=policy.device)
        logprobs = torch.zeros(uniform.shape, dtype=torch.float32, device=policy.device)
        length = torch.zeros_like(limit)
        active = torch.arange(len(places), device=policy.device)  # which completion each row of the batch belongs to
        for t in range(uniform.shape[1]):
            token, logprob = draw(logits, uniform[active, t], sampling)
            tokens[active, t], logprobs[active, t], length[active] = token, logprob, t + 1
            going = ~torch.isin(token, eos) & (t + 1 < limit[active])
            num_going = int(going.sum())
            if num_going == 0:
                break
            # Ended rows are carried along until a quarter of the batch has ended, since leaving copies the cache. What
            # they go on to draw is cut off by `ended` below.
            if num_going <= 0.75 * len(active):
                kept = going.nonzero().flatten()
                active, token, position = active[kept], token[kept], position[kept]
                mask = mask[kept] if mask is not None else None
                cache.batch_select_indices(kept)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = policy.decode_step(token[:, None], mask, position[:, None], cache)
            position = position + 1
        return _completions(tokens.cpu(), logprobs.cpu(), length.cpu(), limit.cpu(), policy.eos_ids)

    def _prefill(self, prompts: Sequence[Prompt], owner: list[int]) -> tuple[Tensor, Any, Tensor | None, Tensor]:
        """Runs each prompt once and gives every completion its row: logits [B, V], cache, mask [B, S], position [B].

        Prompts are padded on the right, where causal attention cannot see the padding and no row is ever masked whole.
        The cache is then shifted so that the padding lies on the left, and new keys follow the prompt without a gap.
        """
        from transformers import DynamicCache

        policy = self._policy
        used = sorted(set(owner))
        lengths = torch.tensor([len(prompts[p].token_ids) for p in used], device=policy.device)
        ids = torch.zeros(len(used), int(lengths.max()), dtype=torch.int64)
        for row, p in enumerate(used):
            ids[row, : len(prompts[p].token_ids)] = torch.tensor(prompts[p].token_ids)
        cache = DynamicCache() if _plain_attention(policy) else DynamicCache(config=policy.base.config)
        logits = policy.prefill(ids.to(policy.device), lengths - 1, cache)
        row = torch.tensor([used.index(p) for p in owner], device=policy.device)
        cache.batch_select_indices(row)
        lengths = lengths[row]
        padding = ids.shape[1] - lengths
        if not bool(padding.any()):
            return logits[row], cache, None, lengths
        slot = torch.arange(ids.shape[1], device=policy.device)
        source = (slot - padding[:, None]) % ids.shape[1]
        for layer in cast(Any, cache).layers:
            layer.keys, layer.values = (
                states.gather(2, source[:, None, :, None].expand_as(states)) for states in (layer.keys, layer.values)
            )
        return logits[row], cache, (slot >= padding[:, None]).long(), lengths


def _plain_attention(policy: Policy) -> bool:
    """Whether every layer's state is keys and values by position (not so for state-space and other recurrent
    layers)."""
    config = policy.base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds <= {"full_attention", "sliding_attention"} and not getattr(policy.base, "_is_stateful", False)


def _completions(
    tokens: Tensor, logprobs: Tensor, length: Tensor, limit: Tensor, eos_ids: tuple[int, ...]
) -> list[Completion]:
    """Cuts each row at its first end token or at its limit."""
    made = []
    for ids, values, count, most in zip(
        tokens.tolist(), logprobs.tolist(), length.tolist(), limit.tolist(), strict=True
    ):
        ids = ids[: min(count, most)]
        ended = next((t for t, token in enumerate(ids) if token in eos_ids), None)
        keep = len(ids) if ended is None else ended + 1
        made.append(Completion(tuple(ids[:keep]), tuple(values[:keep]), "length" if ended is None else "end"))
    return made
