"""Problems -> prompts -> completions -> texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from shoestring.errors import DataError
from shoestring.model.chat import Reader
from shoestring.model.policy import Policy
from shoestring.model.sampling import Sampling
from shoestring.rewards.base import Row
from shoestring.samplers.base import Engine
from shoestring.tasks.base import Task
from shoestring.types import Completion, Problem, Prompt


def rows(rollouts: Iterable[Rollout]) -> list[Row]:
    """Their completions one by one, to be scored."""
    return [
        Row(rollout.prompt.problem, text, completion.token_ids)
        for rollout in rollouts
        for text, completion in zip(rollout.texts, rollout.completions, strict=True)
    ]


class Encoded(NamedTuple):
    prompts: list[Prompt]
    num_truncated: int


def encode(
    policy: Policy | Reader,
    task: Task,
    problems: Iterable[Problem],
    max_new_tokens: int,
    *,
    max_prompt_tokens: int | None = None,
    allow_truncated: bool = False,
) -> Encoded:
    """The prompts of some problems. One that is longer than the limit, or leaves no room for an answer in the model's
    context, is refused or cut from the left."""
    in_context = (policy.context or 2**31) - max_new_tokens
    room = min(in_context, max_prompt_tokens or in_context)
    prompts, truncated = [], 0
    for problem in problems:
        ids = policy.encode(task.ask(problem), task.format, task.chat)
        if len(ids) > room:
            if not allow_truncated or room < 1:
                raise _too_long(problem, len(ids), room, in_context, policy.context, max_new_tokens)
            ids, truncated = ids[-room:], truncated + 1
        prompts.append(Prompt(problem, ids, len(ids)))
    return Encoded(prompts, truncated)


_CUT = "have it cut from the left: allow_truncated_prompts = true, for eval and sample --allow-truncated-prompts"


def _too_long(
    problem: Problem, count: int, room: int, in_context: int, context: int | None, max_new_tokens: int
) -> DataError:
    if room < in_context:
        return DataError(
            f"the prompt of {problem.id} has {count} tokens",
            "that is more than sampling.max_prompt_tokens",
            f"raise that, shorten the prompt, or {_CUT}",
        )
    return DataError(
        f"the prompt of {problem.id} has {count} tokens",
        f"with {max_new_tokens} new ones it is longer than the model's context of {context}",
        "lower sampling.max_new_tokens" + (f", shorten the prompt, or {_CUT}" if room > 0 else ""),
    )


class Rollout(NamedTuple):
    """A prompt with its completions and their texts, forced prefix included; not scored yet."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]


def roll_out(
    policy: Policy,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    num: int,
    sampling: Sampling,
    seed: int,
    first: int = 0,
    done: Callable[[Rollout], None] | None = None,
    trunk_layer: int | None = None,
) -> list[Rollout]:
    """`num` completions of each prompt, decoded; the prompts' places are counted from `first`. `done` may be told of
    each rollout while others are sampled, and more than once. `trunk_layer` is for engines that keep what enters it."""
    if not prompts:
        return []

    def decoded(prompt: Prompt, group: tuple[Completion, ...]) -> Rollout:
        return Rollout(prompt, group, tuple(policy.decode(prompt.prefix + c.token_ids) for c in group))

    told = None if done is None else lambda place, group: done(decoded(prompts[place], group))
    keeping: dict[str, Any] = {} if trunk_layer is None else {"trunk_layer": trunk_layer}
    completions = engine.sample(prompts, num=num, sampling=sampling, seed=seed, first=first, done=told, **keeping)
    return [decoded(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]
