"""The sampler seam: settings of sampling, and what a sampler must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from shoestring.model.sampling import Sampling
from shoestring.types import Completion, Prompt, Request

if TYPE_CHECKING:
    from shoestring.model.policy import Policy


Told = Callable[[int, tuple[Completion, ...]], None]
"""Hears of a group as soon as it is complete: the place of its prompt in the call, and its completions."""


class Engine(Protocol):
    """A sampler at work for one policy. One whose `keeps_trunk` is true is also given a `trunk_layer` in `sample` and
    `rehearse`, and keeps what enters that layer."""

    @property
    def wave_tokens(self) -> int | None:
        """Most cache slots (rows times the longest of them) that a wave may hold; None takes everything at once.
        Lowered for good when a wave runs out of memory."""
        ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        num: int,
        sampling: Sampling,
        seed: int,
        first: int = 0,
        done: Told | None = None,
    ) -> list[tuple[Completion, ...]]:
        """`num` completions of each prompt. What a completion draws depends on (seed, place of the prompt, place of the
        completion, position) and on nothing else, so neither waves nor batch sizes choose it. Places of prompts are
        counted from `first`, so that many prompts can be sampled in several calls as in one.

        `done`, where given, may be told of each group once it is complete, while others are sampled. Where sampling
        begins anew because memory ran out, it may be told again; what counts is what is returned."""
        ...

    def rehearse(self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling) -> None:
        """Takes the memory that sampling `num` full-length completions of each prompt takes at most, in little time."""
        ...

    def sync(self, policy: Policy) -> None:
        """Told after each optimizer step that the policy's weights changed. An engine with weights of its own takes the
        adapter here, and keeps it beside them: merged, it would be rounded away. Until then it samples with the one
        before."""
        ...


class RequestEngine:
    """`Engine.sample` for engines that take requests, each with a number and a noise key of its own."""

    def sample_requests(
        self,
        requests: Sequence[Request],
        *,
        sampling: Sampling,
        done: Told | None = None,
        **keeping: Any,
    ) -> list[tuple[Completion, ...]]:
        """The completions of each request, in its order; see `Engine.sample`."""
        raise NotImplementedError

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        num: int,
        sampling: Sampling,
        seed: int,
        first: int = 0,
        done: Told | None = None,
        **keeping: Any,
    ) -> list[tuple[Completion, ...]]:
        requests = [Request(prompt, num, (seed, first + place)) for place, prompt in enumerate(prompts)]
        return self.sample_requests(requests, sampling=sampling, done=done, **keeping)


def sample_requests(
    engine: Engine, requests: Sequence[Request], *, sampling: Sampling, done: Told | None = None, **keeping: Any
) -> list[tuple[Completion, ...]]:
    """The completions of each request, by whatever an engine offers.

    An engine that takes no requests is called once for each run of them with one number, one seed and consecutive
    places. It draws the completions before `first_completion` too, and they are dropped.
    """
    if isinstance(engine, RequestEngine):
        return engine.sample_requests(requests, sampling=sampling, done=done, **keeping)
    found: list[tuple[Completion, ...]] = []
    for run in _alike(requests):
        start, skipped = len(found), run[0].first_completion

        def shifted(place: int, group: tuple[Completion, ...], start: int = start, skipped: int = skipped) -> None:
            assert done is not None
            done(start + place, group[skipped:])

        seed, first = run[0].noise_key
        groups = engine.sample(
            [request.prompt for request in run],
            num=skipped + run[0].num,
            sampling=sampling,
            seed=seed,
            first=first,
            done=shifted if done is not None else None,
            **keeping,
        )
        found += [group[skipped:] for group in groups]
    return found


def _alike(requests: Sequence[Request]) -> list[list[Request]]:
    """Runs of requests that one call of `Engine.sample` serves."""
    runs: list[list[Request]] = []
    for request in requests:
        last = runs[-1][-1] if runs else None
        follows = last is not None and (
            (last.num, last.first_completion) == (request.num, request.first_completion)
            and (last.noise_key[0], last.noise_key[1] + 1) == request.noise_key
        )
        if follows:
            runs[-1].append(request)
        else:
            runs.append([request])
    return runs


class Sampler(Protocol):
    """The settings of a sampler, which opens it for a policy."""

    name: str

    @property
    def exact(self) -> bool:
        """Whether it draws from the policy itself, its log-probs being the training forward's up to rounding. Otherwise
        `objective.importance_correction` makes up for the difference."""
        ...

    def open(self, policy: Policy, wave_tokens: int | None = None) -> Engine: ...
