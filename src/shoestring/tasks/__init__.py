"""The tasks: one file each. The table is the list; a task's key is the part of its name before the colon."""

from __future__ import annotations

from typing import Any

from shoestring.tasks.file import File, Hub
from shoestring.tasks.gsm8k import Gsm8k
from shoestring.tasks.gym import Gym
from shoestring.tasks.mixture import TABLE, Mixture
from shoestring.tasks.multiplication import Multiplication
from shoestring.tasks.svamp import Svamp
from shoestring.tasks.word_problems import WordProblems

TASKS: dict[str, type[Any]] = {
    "multiplication": Multiplication,
    "svamp": Svamp,
    "gsm8k": Gsm8k,
    "word-problems": WordProblems,
    "gym": Gym,
    "file": File,
    "hub": Hub,
    "mixture": Mixture,
}
TABLE |= TASKS
