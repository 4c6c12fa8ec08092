"""SVAMP (arXiv 2103.07191), the paper's first task: word problems of one or two steps, in the hub's 700 / 300 split."""

from __future__ import annotations

from typing import Literal

from shoestring.tasks.base import check_split
from shoestring.tasks.rows import Checked, Row, checked_answer, column, hold_back, split_rows
from shoestring.types import Problem

_HUB = "ChilleD/SVAMP"


class Svamp(Checked):
    """Local rows hold `id`, `question`, `answer`; the hub's `ID`, `question_concat`, `Answer`. No worked solutions."""

    name: Literal["svamp"] = "svamp"
    prompt: str = "{question}\nThink step by step, then write the final answer as #### followed by the number."

    def problems(self, split: str) -> list[Problem]:
        check_split(split)
        rows, parted = split_rows("svamp", self.data, split, _HUB, self.validation)
        problems = [_problem(row, split, i) for i, row in enumerate(rows)]
        return hold_back(problems, self.validation, split) if parted and self.validation else problems


def _problem(row: Row, split: str, index: int) -> Problem:
    where = f"svamp {split} row {index}"
    question = row.get("question") or row.get("question_concat") or f"{row.get('Body', '')} {row.get('Question', '')}"
    identity = row.get("id") or row.get("ID") or f"svamp-{split}-{index:04d}"
    answer = checked_answer(column(row, where, "answer", "Answer"), where)
    return Problem(str(identity), question.strip() or column(row, where, "question"), answer, {})
