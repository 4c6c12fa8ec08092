"""The draw of one token, which every sampler must match: its random number, the filters, the token, its log-prob, and
the entropy of what it was drawn from."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shoestring.hashing import stable_hash
from shoestring.model.sampling import Sampling
from shoestring.types import Request

# Logits that are drawn from at once: the fp32 and fp64 copies of all rows would be the largest thing in a decode step.
DRAW_TILE = 2**21


def noise(seed: int, prompt: int, completion: int, length: int) -> Float[Tensor, " T"]:
    """The uniform numbers of one completion, one a position, the same on every device."""
    generator = torch.Generator().manual_seed(stable_hash(seed, prompt, completion) >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)


def request_noise(request: Request, completion: int, length: int) -> Float[Tensor, " T"]:
    """The uniform numbers of a request's completion, counted from 0 in the request."""
    seed, place = request.noise_key
    return noise(seed, place, request.first_completion + completion, length)


def draw(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], sampling: Sampling
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One token a row by inverse transform of one uniform number each, and its log-prob before any filter.

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [draw(logits, torch.tensor([u], dtype=torch.float64), Sampling())[0].item() for u in (0.1, 0.6, 0.9)]
    [0, 1, 2]
    """
    size = max(DRAW_TILE // logits.shape[-1], 1)
    if len(logits) > size:
        parts = [draw(rows, u, sampling) for rows, u in zip(logits.split(size), uniform.split(size), strict=True)]
        return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts])
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, _logprob(logits.float(), token)
    scaled = logits.float() / sampling.temperature
    cumulative = filtered(scaled.softmax(-1), sampling).cumsum(-1, dtype=torch.float64)
    # u < 1, so the wanted mass stays below the total, and a token without mass is never the first to exceed it.
    wanted = uniform[:, None].to(cumulative.device) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    token = token.clamp(max=logits.shape[-1] - 1)  # only where logits are not finite, which the log-prob then shows
    return token, _logprob(scaled, token)


def entropy(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, " B"]:
    """The entropy of each row in nats, at the sampling temperature and before any filter; greedy decoding counts as
    temperature 1.

    >>> round(entropy(torch.tensor([[0.5, 0.3, 0.2]]).log(), Sampling()).item(), 4)
    1.0297
    """
    tiles = logits.split(max(DRAW_TILE // logits.shape[-1], 1))
    temperature = sampling.temperature or 1.0
    return torch.cat([torch.special.entr((rows.float() / temperature).softmax(-1)).sum(-1) for rows in tiles])


def filtered(probs: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Probabilities with what top-k, top-p and min-p shut out at 0 (not renormalised). The likeliest token always
    stays."""
    vocab_size = probs.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        probs = probs.where(probs >= probs.topk(sampling.top_k).values[:, -1:], 0)
    if sampling.top_p < 1:
        ordered, index = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass of likelier tokens: the one that crosses top_p stays
        ordered = ordered.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), 0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.max(-1, keepdim=True).values, 0)
    return probs


def _logprob(scaled: Tensor, token: Tensor) -> Tensor:
    return scaled.gather(-1, token[:, None]).squeeze(-1) - scaled.logsumexp(-1)
