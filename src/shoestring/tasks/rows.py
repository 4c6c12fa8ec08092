"""Problems from rows of data: reading files and hub data sets, holding problems back, scoring against a reference."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from shoestring import answers
from shoestring.config.extras import need
from shoestring.errors import ConfigError, DataError
from shoestring.hashing import stable_hash
from shoestring.tasks.base import Asking
from shoestring.types import Problem, Score

ENDINGS = (".jsonl", ".csv", ".parquet")

Row = Mapping[str, Any]


class Checked(Asking):
    """The settings and the scoring that all tasks with a reference answer from data share."""

    validation: int = Field(default=0, ge=0)
    """Training problems held back as the split "validation" where the data have none of their own."""

    def score(self, problem: Problem, text: str) -> Score:
        right = float(answers.is_correct(text, problem.answer))
        return Score(right, {"correct": right})

    def vote(self, text: str) -> str | None:
        return answers.extract(text)

    def solution(self, problem: Problem) -> str | None:
        return problem.meta.get("solution")


def hold_back(problems: Sequence[Problem], num: int, split: str) -> list[Problem]:
    """The part of the training problems that is `split`: "validation" is the `num` with the smallest hash of their id.

    So which problems are held back depends on nothing but their ids.
    """
    if num >= len(problems):
        raise ConfigError(
            f"task.validation is {num}",
            f"there are only {len(problems)} training problems",
            "hold back fewer of them",
        )
    held = {p.id for p in sorted(problems, key=lambda p: stable_hash("validation", p.id))[:num]}
    return [p for p in problems if (p.id in held) == (split == "validation")]


def split_rows(name: str, data: str | None, split: str, hub: str, validation: int) -> tuple[Iterable[Row], bool]:
    """The rows behind a split of a named data set, and whether they are training rows that `hold_back` has to part.

    From `data` or SHOESTRING_DATA (a folder of JSONL files, or one that holds it under the data set's name), else the
    hub.
    """
    root = data or os.environ.get("SHOESTRING_DATA")
    part = "train" if split == "validation" else split
    if split == "validation" and not validation:
        raise ConfigError(
            'split is "validation"', f"{name} has no such part of its own", "set task.validation, such as 100"
        )
    if root is None:
        return hub_rows(hub, part), part == "train"
    folders = [Path(root).expanduser() / name, Path(root).expanduser()]
    for folder in folders:
        if (folder / f"{part}.jsonl").is_file():
            return read_rows(folder / f"{part}.jsonl"), part == "train"
    raise DataError(
        f"the data folder is {root}",
        f"it holds neither {name}/{part}.jsonl nor {part}.jsonl",
        "point task.data or SHOESTRING_DATA at the folder with the JSONL files",
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL, CSV or Parquet file; raises `DataError` with the line."""
    if not path.is_file():
        raise DataError(f"the data file is {path}", "there is no such file", "give the path of a data file")
    if path.suffix not in ENDINGS:
        raise DataError(f"the data file is {path}", "its kind is not known", "use " + ", ".join(ENDINGS))
    try:
        rows = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"the data file is {path}", f"it is not UTF-8 ({error})", "save it as UTF-8") from None
    if not rows:
        raise DataError(f"the data file is {path}", "it holds no rows", "give a file with at least one problem")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}", f"it is not JSON ({error})", "fix or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}", "it is not an object", 'write {"prompt": ..., "answer": ...}')
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows: list[Row] = []
        for row in reader:
            if None in row:
                names = reader.fieldnames or ()
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(names) + len(row[None])} fields",
                    f"the header names {len(names)} ({', '.join(names)})",
                    'put what holds a comma into quotes, such as "1,000"',
                )
            rows.append(row)
        return rows


def _read_parquet(path: Path) -> list[Row]:
    need("pyarrow", "data", f"{path} is a Parquet file")
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the data file is {path}", f"it is no Parquet ({error})", "give a Parquet file") from None


def column(row: Row, where: str, *names: str) -> Any:
    """The row's value under the first of the names that it has; raises `DataError` if it has none of them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(
        f"{where} has the columns {', '.join(map(str, row))}", f'"{names[0]}" is missing', "add it to every row"
    )


def hub_rows(name: str, split: str) -> Iterable[Row]:
    """The rows of a hub data set's split, through `datasets`."""
    need("datasets", "data", f'the data set "{name}" comes from the hub')
    import datasets

    repo, _, subset = name.partition("@")
    try:
        return datasets.load_dataset(repo, subset or None, split=split)  # type: ignore[return-value]
    except (
        OSError,
        ValueError,
    ) as error:  # datasets raises these for a wrong name, subset or split, and with no network
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f'the data set is "{name}", split "{split}"',
            f"the hub gave none ({first})",
            "check the id, or point task.data at a local folder",
        ) from error


def checked_answer(value: Any, where: str) -> str:
    """A reference answer as text; raises `DataError` if no completion could ever equal it."""
    text = "" if value is None else str(value).strip()
    if not answers.is_checkable(text):
        raise DataError(
            f"{where} has the answer {value!r}",
            "it is neither a number nor a formula, so no completion could be right",
            'fix the row, or write task.check = "text"',
        )
    return text
