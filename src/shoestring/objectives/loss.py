"""The objective over selected tokens: a sum of terms from the table, and L2 on the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from torch import Tensor

from shoestring.config.settings import Settings, pick
from shoestring.objectives import TERMS
from shoestring.objectives.base import Figure, Metrics, Term, Tokens
from shoestring.objectives.importance import Corrected, Correction
from shoestring.types import TokenColumns

_CLIPS = ("clip_low", "clip_high")


def _of_role(role: str, default: str, value: Any) -> Any:
    terms = {name: term for name, term in TERMS.items() if term.role == role}
    return pick(terms, f"objective.{role}", value, default)


class Objective(Settings):
    """`[objective]` with every value settled (an algorithm's own defaults stand where the user said nothing)."""

    policy: Annotated[Any, BeforeValidator(lambda value: _of_role("policy", "ppo", value))] = Field(
        default={"name": "ppo"}
    )
    """The policy term: a name from the table of terms or "package.module:Class", or a table with its settings."""
    kl: Annotated[Any, BeforeValidator(lambda value: _of_role("kl", "k3", value))] = Field(default={"name": "k3"})
    """The KL term, which beta weighs."""
    beta: float
    clip_low: float | None = Field(default=None, exclude=True)
    """Short for `objective.policy.clip_low`, as `clip_high` is; None where the policy term has no such setting."""
    clip_high: float | None = Field(default=None, exclude=True)
    updates: int
    """Passes over the step's completions."""
    mini_batches: int = Field(default=1, ge=1)
    """Optimizer steps in each of these passes, each over its own share of the completions."""
    update: str = "backward"
    """How a step changes the weights: a name from the table of updates."""
    l2: float
    importance_correction: Correction = "none"
    """How a token's policy part is weighed when the sampler is not quite the policy; see `importance_weights`. Left out
    or "auto": "none" for a sampler that draws from the policy itself, else "token-truncate"."""
    importance_cap: float = Field(default=3.0, ge=1)
    """The largest such weight."""

    @model_validator(mode="before")
    @classmethod
    def _clips_belong_to_the_policy_term(cls, values: Any) -> Any:
        """Lay `clip_low` and `clip_high` over the policy term's settings, and show what the term has."""
        if not isinstance(values, Mapping):
            return values
        clips = {key: values[key] for key in _CLIPS if values.get(key) is not None}
        term = _of_role("policy", "ppo", {**as_table(values.get("policy", "ppo")), **clips})
        return {**values, "policy": term} | {key: getattr(term, key, None) for key in _CLIPS}

    def parts(self) -> Iterator[Part]:
        """The terms with their weights, the policy's first."""
        policy: Term = self.policy
        if self.importance_correction != "none":
            policy = Corrected(policy, self.importance_correction, self.importance_cap)
        yield Part(policy, "weight")
        if self.beta:
            yield Part(self.kl, "kl_weight", self.beta, figure="kl")


class Part(NamedTuple):
    """A term of the sum: which column and which factor weigh it, and the figure that reports it unscaled."""

    term: Term
    column: Literal["weight", "kl_weight"]
    factor: float = 1.0
    figure: str = ""


def as_table(value: Any) -> Any:
    """A term by its bare name, or built already, as a table of settings."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    return {"name": value} if isinstance(value, str) else value


def over_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the given keys over an algorithm's defaults, whose clips are those of "ppo" alone.

    >>> over_defaults({"policy": "other"}, {"beta": 0.0, "clip_low": 0.2})
    {'beta': 0.0, 'policy': 'other'}
    """
    policy = as_table(given.get("policy", "ppo"))
    own = policy if isinstance(policy, Mapping) else {}
    hidden = set(_CLIPS) if own.get("name", "ppo") != "ppo" else own.keys() & set(_CLIPS)
    return {key: value for key, value in defaults.items() if key not in hidden} | dict(given)


def objective_loss(tokens: Tokens, columns: TokenColumns, objective: Objective) -> tuple[Tensor, Metrics]:
    """Return the micro-batch's part of the step's loss, a scalar with gradient, and the figures of its terms.

    The loss is a sum over the N tokens, so that any cut gives the same gradient. Importance weights act on the policy
    term alone.
    """
    metrics: Metrics = {}
    parts = []
    for part in objective.parts():
        loss_N, own = part.term.loss(tokens, columns)
        total = (getattr(columns, part.column) * loss_N).sum()
        metrics |= own
        if part.figure:
            metrics[part.figure] = Figure(total.detach(), mean=False)
        parts.append(total if part.factor == 1 else part.factor * total)
    loss = sum(parts[1:], parts[0])
    return loss, metrics | {"loss": Figure(loss.detach(), mean=False)}


def l2_loss(parameters: Iterable[Tensor], l2: float) -> Tensor:
    """Return l2 times the sum of squares of the trained weights: a part of the loss, not a decay of the weights.

    >>> l2_loss([torch.tensor([0.1, -0.2])], 0.01).item()  # doctest: +ELLIPSIS
    0.0005...
    """
    return l2 * torch.stack([p.float().square().sum() for p in parameters]).sum()
