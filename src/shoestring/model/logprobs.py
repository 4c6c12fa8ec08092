"""From hidden states to log-probs of chosen tokens, without ever holding the logits of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoestring.model import logit_tiles
from shoestring.model.fast import kernels
from shoestring.model.logit_tiles import tile_shape
from shoestring.model.logit_transforms import Head, _same
from shoestring.model.matmul import add_product


@overload
def selected_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    target: Int[Tensor, " N"],
    temperature: float,
    post: Head | None = None,
    *,
    entropy: Literal[False] = False,
) -> Float[Tensor, " N"]: ...


@overload
def selected_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    target: Int[Tensor, " N"],
    temperature: float,
    post: Head | None = None,
    *,
    entropy: Literal[True],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]: ...


def selected_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    target: Int[Tensor, " N"],
    temperature: float,
    post: Head | None = None,
    *,
    entropy: bool = False,
) -> Float[Tensor, " N"] | tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """log-softmax(post(hidden weight^T + bias) / temperature) at the targets, [N] in fp32; with `entropy`, also the
    entropy of each row's distribution in nats, [N].

    Logits exist one tile of rows and vocabulary at a time, in the type of `hidden` (or autocast's); what follows them
    is fp32. The backward pass recomputes each tile from `hidden` and log Z, as in arXiv 2411.09009 and 2410.10989.
    On a GPU, without `post`, two Triton kernels go over a tile instead of a dozen passes of torch.
    """
    if len(hidden) * len(weight) <= logit_tiles.KEPT:
        logits = F.linear(hidden, weight, bias)
        logits = post(logits) if post else logits
        found = gathered_logprobs(logits, target, temperature)
        return (found, full_entropy(logits, temperature)) if entropy else found
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    post = None if post is _same else post
    how = _How(temperature, post, dtype, entropy, post is None and kernels.usable(hidden.device, dtype))
    found, spread = _SelectedLogprobs.apply(hidden, weight, bias, target, how)
    return (found, spread) if entropy else found


def gathered_logprobs(
    logits: Float[Tensor, "N V"], target: Int[Tensor, " N"], temperature: float
) -> Float[Tensor, " N"]:
    """The slow, obvious form: all logits at hand."""
    scaled = _wide(logits) / temperature
    return scaled.gather(-1, target[:, None]).squeeze(-1) - scaled.logsumexp(-1)


def full_entropy(logits: Float[Tensor, "N V"], temperature: float) -> Float[Tensor, " N"]:
    """The entropy of each row in nats, with all logits at hand."""
    logprobs = torch.log_softmax(_wide(logits) / temperature, -1)
    return -(logprobs.exp() * logprobs).sum(-1)


@dataclass(frozen=True)
class _How:
    """What is done with hidden states, beside the tensors it is done with."""

    temperature: float
    post: Head | None
    dtype: torch.dtype
    """Of the matrix products."""
    entropy: bool
    kernel: bool
    """Triton kernels go over the logits."""

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, c] from hidden rows [n, H] and vocabulary rows [c, H], before `post`."""
        bias = None if bias is None else bias.to(self.dtype)
        return F.linear(hidden.to(self.dtype), weight.to(self.dtype), bias)

    def scores(self, logits: Tensor) -> Tensor:
        """post(logits) / temperature in fp32, [n, c]; in the memory of `logits` where that can be."""
        scores = _wide(self.post(logits) if self.post else logits)
        return scores if self.temperature == 1 else scores.div_(self.temperature)

    def through_post(self, logits: Tensor, grad: Tensor) -> None:
        """Turns the gradient behind `post` into that before it, in place, [n, c]; a few rows at a time, since
        autograd keeps copies."""
        size = len(logits) // 8 + 1
        for part, piece in zip(logits.split(size), grad.split(size), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                out = self.post(leaf)  # type: ignore[misc]
            piece.copy_(torch.autograd.grad(out, leaf, piece)[0])


class _Running:
    """Softmax statistics of n rows over the vocabulary tiles seen so far: the largest score m, the sum of e^(z - m),
    and, for the entropy, that of e^(z - m) (z - m)."""

    def __init__(self, like: Tensor):
        """`like`, [n], has the type and the device."""
        self.top = torch.full_like(like, -torch.inf)
        self.mass = torch.zeros_like(like)
        self.moment = torch.zeros_like(like)
        self.picked = torch.full_like(like, torch.nan)

    def read(self, logits: Tensor, target: Tensor, start: int, how: _How) -> None:
        """Takes in the tile of logits, [n, c], whose columns begin at `start`, by a kernel."""
        from shoestring.model.fast.kernels.head import add_statistics

        running = (self.top, self.mass, self.moment, self.picked)
        add_statistics(logits, target, start, how.temperature, running, entropy=how.entropy)

    def add(self, scores: Tensor, target: Tensor, start: int, entropy: bool) -> None:
        """The same in plain torch, from post(logits) / temperature in fp32; overwrites `scores`, [n, c]."""
        inside, place = _place(target, start, scores.shape[1])
        self.picked = torch.where(inside, scores.gather(1, place[:, None]).squeeze(1), self.picked)
        top = torch.maximum(self.top, scores.amax(1))
        drop = self.top - top
        decay = drop.exp()
        scores.sub_(top[:, None])
        if entropy:
            powers = scores.exp()
            drop.clamp_min_(-200.0)  # e^-200 is nothing, and 0 times it no NaN as with -inf
            self.moment = decay * (self.moment + drop * self.mass) + scores.mul_(powers).sum(1)
        else:
            powers = scores.exp_()
        self.mass = decay * self.mass + powers.sum(1)
        self.top = top


class _SelectedLogprobs(torch.autograd.Function):
    """Log-probs, [N], and entropy, [N] or None, with online sums over vocabulary tiles."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None]:
        tile = tile_shape(len(hidden), len(weight), hidden.shape[1], how.dtype.itemsize, kernel=how.kernel)
        logprob = hidden.new_empty(len(hidden), dtype=_wide_dtype(hidden))
        log_z = torch.empty_like(logprob)
        entropy = torch.empty_like(logprob) if how.entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(len(hidden), tile[0]):
                seen = _Running(logprob[rows])
                for columns in _slices(len(weight), tile[1]):
                    logits = how.logits(hidden[rows], weight[columns], _cut(bias, columns))
                    if how.kernel:
                        seen.read(logits, target[rows], columns.start, how)
                    else:
                        logits = how.scores(logits)
                        seen.add(logits, target[rows], columns.start, how.entropy)
                    del logits  # before the next tile comes
                log_mass = seen.mass.log()
                log_z[rows] = seen.top + log_mass
                logprob[rows] = seen.picked - seen.top - log_mass
                if entropy is not None:
                    entropy[rows] = log_mass - seen.moment / seen.mass
        ctx.save_for_backward(hidden, weight, bias, target, log_z, entropy)
        ctx.how, ctx.tile = how, tile
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_logprob, grad_entropy = grad_outputs
        hidden, weight, bias, target, log_z, entropy = ctx.saved_tensors
        tau = ctx.how.temperature
        pull = _Pull(
            ctx.how,
            ctx.tile,
            hidden,
            weight,
            bias,
            target,
            log_z,
            entropy,
            grad_logprob / tau,
            None if grad_entropy is None else grad_entropy / tau,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                grads = pull.to_all(*ctx.needs_input_grad[:3])
            else:
                grads = (pull.to_hidden(), None, None)
        return *grads, None, None


@dataclass(frozen=True)
class _Pull:
    """The backward pass: tiles of logits again, and their gradient's products with weight and hidden."""

    how: _How
    tile: tuple[int, int]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    log_z: Tensor
    entropy: Tensor | None
    grad_logprob: Tensor
    """[N], divided by the temperature, as is the next."""
    grad_entropy: Tensor | None

    def to_logits(self, rows: slice, columns: slice) -> Tensor:
        """The gradient of one tile's logits, [n, c], in the type of the matrix products:
        g (1[j = target] - p_j) - g_entropy p_j (log p_j + entropy)."""
        logits = self.how.logits(self.hidden[rows], self.weight[columns], _cut(self.bias, columns))
        if self.how.kernel:
            self._by_kernel(logits, rows, columns.start)
            return logits
        scores = self.how.scores(logits)
        before_post = logits if self.how.post else None
        del logits
        scores.sub_(self.log_z[rows, None])
        grad = self.grad_logprob[rows, None]
        if self.entropy is None or self.grad_entropy is None:
            scores.exp_().mul_(-grad)
        else:
            powers = scores.exp()
            scores.add_(self.entropy[rows, None]).mul_(-self.grad_entropy[rows, None]).sub_(grad).mul_(powers)
            del powers
        inside, place = _place(self.target[rows], columns.start, scores.shape[1])
        scores.scatter_add_(1, place[:, None], grad * inside[:, None])
        found = scores.to(self.how.dtype)
        del scores
        if before_post is not None:
            self.how.through_post(before_post, found)
        return found

    def _by_kernel(self, logits: Tensor, rows: slice, start: int) -> None:
        """Turns a tile of logits, [n, c], into its gradient."""
        from shoestring.model.fast.kernels.head import to_gradient

        spread = _cut(self.entropy, rows), _cut(self.grad_entropy, rows)
        given = self.log_z[rows], self.grad_logprob[rows], *spread
        to_gradient(logits, self.target[rows], start, self.how.temperature, *given)

    def to_hidden(self) -> Tensor:
        """[N, H], summed over the vocabulary in fp32 and rounded once."""
        grad_hidden = torch.zeros_like(self.hidden)
        for rows in _slices(len(self.hidden), self.tile[0]):
            total = _wide(grad_hidden[rows])
            for columns in _slices(len(self.weight), self.tile[1]):
                add_product(total, self.to_logits(rows, columns), self.weight[columns])
            grad_hidden[rows] = total
        return grad_hidden

    def to_all(self, hidden: bool, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients that are asked for. All rows meet one slice of the vocabulary before the next, so that the
        fp32 sum of the weight's gradient is that slice only."""
        wide = _wide_dtype(self.hidden)
        grad_hidden = torch.zeros_like(self.hidden, dtype=wide) if hidden else None
        grad_weight = torch.zeros_like(self.weight) if weight else None
        grad_bias = self.weight.new_zeros(len(self.weight), dtype=wide) if bias else None
        for columns in _slices(len(self.weight), self.tile[1]):
            self._slice_to_all(columns, grad_hidden, grad_weight, grad_bias)
        if grad_bias is not None and self.bias is not None:
            grad_bias = grad_bias.to(self.bias.dtype)
        return None if grad_hidden is None else grad_hidden.to(self.hidden.dtype), grad_weight, grad_bias

    def _slice_to_all(
        self, columns: slice, grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None
    ) -> None:
        """Adds what one slice of the vocabulary, [c], gives to each gradient."""
        every = _slices(len(self.hidden), self.tile[0])
        total = _cut(grad_weight, columns)
        if total is not None and len(every) > 1:
            total = _wide(total)
        for rows in every:
            grad = self.to_logits(rows, columns)
            if grad_hidden is not None:
                add_product(grad_hidden[rows], grad, self.weight[columns])
            if total is not None:
                add_product(total, grad.T, self.hidden[rows])
            if grad_bias is not None:
                grad_bias[columns] += grad.sum(0, dtype=grad_bias.dtype)
            del grad
        if grad_weight is not None and total is not None:
            grad_weight[columns] = total


def _place(target: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Which targets, [n], lie in the columns from `start`, and where there; anywhere for the others."""
    place = target - start
    inside = place.clamp(0, length - 1)
    return inside == place, inside


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]
