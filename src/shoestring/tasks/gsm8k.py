"""GSM8K (arXiv 2110.14168): grade-school word problems of two to eight steps, with worked solutions."""

from __future__ import annotations

import re
from typing import Literal

from shoestring.tasks.base import check_split
from shoestring.tasks.rows import Checked, Row, checked_answer, column, hold_back, split_rows
from shoestring.types import Problem

_HUB = "openai/gsm8k@main"
_CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")


class Gsm8k(Checked):
    """Solutions come without the calculator notes of the source, and end with `#### answer`."""

    name: Literal["gsm8k"] = "gsm8k"
    prompt: str = "{question}\nThink step by step, then write the final answer as #### followed by the number."

    def problems(self, split: str) -> list[Problem]:
        check_split(split)
        rows, parted = split_rows("gsm8k", self.data, split, _HUB, self.validation)
        problems = [_problem(row, split, i) for i, row in enumerate(rows)]
        return hold_back(problems, self.validation, split) if parted and self.validation else problems


def _problem(row: Row, split: str, index: int) -> Problem:
    """From a local row (the answer is a number, the text is under `solution`) or the hub's (`answer` is the text)."""
    where = f"gsm8k {split} row {index}"
    stated = column(row, where, "answer")
    text = row.get("solution") or stated
    answer = stated if row.get("solution") else text.rpartition("####")[2].strip().replace(",", "")
    meta = {"solution": _CALCULATOR_NOTE.sub("", text)}
    identity = str(row.get("id") or f"gsm8k-{split}-{index:05d}")
    return Problem(identity, column(row, where, "question"), checked_answer(answer, where), meta)
