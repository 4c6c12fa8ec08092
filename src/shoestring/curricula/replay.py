"""Prefixes worth another try: earlier completions, cut somewhere, to be continued anew."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shoestring.algorithms.base import Replay, scored_part
from shoestring.types import Group, Prompt


def choose(replay: Replay | None, groups: Sequence[Group], num_prompts: int, random: Random) -> list[Prompt]:
    """The next step's replayed prompts, from this step's groups: at most `replay.fraction * num_prompts`.

    Only groups whose rewards differ can show which completion was worth it. Algorithms without replay give none.
    """
    if replay is None:
        return []
    parts = [scored_part(group)[1] for group in groups]
    mixed = [group for group in parts if len({score.value for score in group.scores}) > 1]
    found = [prompt for group in mixed for prompt in _prefixes(group, replay, random)]
    random.shuffle(found)
    return found[: int(replay.fraction * num_prompts)]


def _prefixes(group: Group, replay: Replay, random: Random) -> list[Prompt]:
    values = [score.value for score in group.scores]
    wanted = {"success": [max(values)], "failure": [min(values)], "both": [max(values), min(values)]}[replay.source]
    prompts = []
    for value in wanted:
        index = random.choice([i for i, other in enumerate(values) if other == value])
        answer = group.prompt.prefix + group.completions[index].token_ids
        if len(answer) < 2:
            continue
        at = random.randint(1, len(answer) - 1) if replay.cut == "uniform" else len(answer) // 2
        question = group.prompt.token_ids[: group.prompt.answer_start]
        prompts.append(Prompt(group.prompt.problem, question + answer[:at], group.prompt.answer_start))
    return prompts
