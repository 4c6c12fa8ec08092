"""Credit for a whole step: RLOO and REINFORCE++ by worked numbers, memory, and draws that groups do not share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.run.test_loop import config, metrics, same_weights

from shoestring import train
from shoestring.algorithms import ALGORITHMS
from shoestring.algorithms.base import Memory, ObjectiveDefaults, StepGenerator, is_informative
from shoestring.config.settings import Settings
from shoestring.training.credit import credit_step
from shoestring.types import Completion, Credit, Group, Problem, Prompt, Score


def group(rewards: Sequence[float], lengths: Sequence[int], unscored: Sequence[int] = ()) -> Group:
    completions = tuple(Completion(tuple(range(10 * i, 10 * i + n)), (-1.0,) * n, "end") for i, n in enumerate(lengths))
    scores = tuple(Score(r, {"unscored": 1.0} if i in unscored else {}) for i, r in enumerate(rewards))
    return Group(Prompt(Problem("1", "?", "1"), (1, 2), 2), completions, scores)


def step(algorithm: Any, groups: Sequence[Group], seeds: Sequence[int] = ()) -> list[Credit]:
    generator = StepGenerator.seeded(0, seeds or range(len(groups)))
    return credit_step(algorithm, groups, {}, generator)[0]


def by_row(credit: Credit) -> list[float]:
    """The advantage of each completion, which all its tokens share."""
    return [float(credit.advantage[credit.row == row][0]) for row in credit.row.unique()]


def test_rloo_compares_with_the_others() -> None:
    [credit] = step(ALGORITHMS["rloo"](), [group([1, 0, 0], [2, 1, 3])])
    assert by_row(credit) == pytest.approx([1.0, -0.5, -0.5])
    assert credit.weight.tolist() == pytest.approx([1 / 3] * 6)


def test_reinforce_pp_standardises_over_all_tokens_of_the_step() -> None:
    groups = [group([1, 0], [2, 4]), group([1, 1], [3, 1])]
    found = step(ALGORITHMS["reinforce++"](baseline="group"), groups)
    assert [value for credit in found for value in by_row(credit)] == pytest.approx(
        [1.521278, -1.014185, 0.253546, 0.253546], abs=1e-6
    )
    plain = torch.cat([credit.advantage for credit in step(ALGORITHMS["reinforce++"](), groups)]).double()
    tokens = torch.tensor([1.0] * 2 + [0.0] * 4 + [1.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(plain, (tokens - tokens.mean()) / tokens.std(), atol=1e-6, rtol=0)


def test_equal_rewards_in_the_whole_step_teach_nothing() -> None:
    for credit in step(ALGORITHMS["reinforce++"](), [group([0.1, 0.1], [2, 3]), group([0.1, 0.1], [1, 1])]):
        assert not credit.advantage.any()


def test_a_group_of_one_is_enough_without_a_baseline() -> None:
    first, second = step(ALGORITHMS["reinforce++"](), [group([1], [2]), group([0], [2])])
    assert first.advantage[0] > 0 > second.advantage[0]
    assert ALGORITHMS["reinforce++"](baseline="group").least_completions == 2


@pytest.mark.parametrize("name", ["s-grpo", "grpo", "rloo", "reinforce++"])
def test_completions_without_a_score_are_no_part_of_it(name: str) -> None:
    whole = group([1, 0, 9], [2, 3, 2], unscored=[2])
    credit, alone = step(ALGORITHMS[name](), [whole])[0], step(ALGORITHMS[name](), [group([1, 0], [2, 3])])[0]
    assert set(credit.row.tolist()) <= {0, 1}
    torch.testing.assert_close(credit.advantage, alone.advantage)
    torch.testing.assert_close(credit.weight, alone.weight * 2 / 3)


def test_what_a_group_draws_does_not_depend_on_the_others() -> None:
    algorithm = ALGORITHMS["s-grpo"](alpha=1, k=2)
    first, second = group([1, 0], [9, 9]), group([0, 1], [9, 9])
    together = step(algorithm, [first, second], seeds=[5, 7])
    assert torch.equal(step(algorithm, [second], seeds=[7])[0].col, together[1].col)


def test_rewards_say_whether_a_group_is_informative() -> None:
    assert is_informative(group([1, 0], [1, 1]))
    assert not is_informative(group([1, 1], [1, 1]))
    assert not is_informative(group([1, 0], [1, 1], unscored=[1]))


class Counting(Settings):
    """Remembers how many steps it has seen, and weighs them by it."""

    name: str = "tests.algorithms.test_step_credit:Counting"
    objective: ClassVar = ObjectiveDefaults()
    least_completions: ClassVar[int] = 2
    normalise: ClassVar[str] = "groups"
    replay: ClassVar[None] = None

    def credit_step(
        self, groups: Sequence[Group], memory: Memory, generator: torch.Generator
    ) -> tuple[Sequence[Credit], Memory]:
        steps = memory.get("steps", 0) + 1
        credits, _ = ALGORITHMS["rloo"]().credit_step(groups, {}, generator)
        return [Credit(c.row, c.col, c.advantage * steps, c.weight) for c in credits], {"steps": steps}


def test_memory_is_saved_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run equals one that was never stopped, bit for bit."""
    name = {"name": Counting.model_fields["name"].default}
    train(config(out="whole", algorithm=name), quiet=True)
    train(config(out="parts", algorithm=name, steps=2), quiet=True)
    train({"steps": 4}, resume="parts", quiet=True)
    assert metrics("whole") == metrics("parts")
    assert same_weights("whole", "parts")
    state = json.loads(Path("parts/checkpoints/step-4/state.json").read_text())
    assert state["memory"] == {"steps": 4}


@pytest.mark.parametrize("name", ["rloo", "reinforce++"])
def test_a_run_trains_and_is_resumed_bit_for_bit(name: str) -> None:
    train(config(out="whole", algorithm={"name": name}), quiet=True)
    train(config(out="parts", algorithm={"name": name}, steps=2), quiet=True)
    train({"steps": 4}, resume="parts", quiet=True)
    assert metrics("whole") == metrics("parts")
    assert same_weights("whole", "parts")
    assert any(line["applied"] for line in metrics("whole"))
