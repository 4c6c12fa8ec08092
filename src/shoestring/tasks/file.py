"""`file:<path>` and `hub:<id>`: the user's own rows, with `prompt` or `question` and `answer` columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from shoestring import answers
from shoestring.errors import ConfigError, DataError
from shoestring.hashing import stable_hash
from shoestring.model.chat import Messages
from shoestring.tasks.base import SPLITS, check_split
from shoestring.tasks.rows import ENDINGS, Checked, Row, checked_answer, hold_back, hub_rows, read_rows
from shoestring.types import Problem, Score


class File(Checked):
    """Rows of a JSONL, CSV or Parquet file, or of a folder with train, validation and test files.

    A file named for a split is that split; the rows of any other are parted by a hash of their question, 90/5/5. A
    `prompt` may be text or a list of chat messages; further columns reach the user's reward functions. A worked answer
    for `sft` stands under `solution`, or as TRL has it: under `completion`, or as the last of `messages`.
    """

    name: str
    check: Literal["math", "text", "none"] = "math"
    """How an answer is compared: as a number or formula, as text, or not at all (the rewards are the user's own)."""

    @field_validator("name")
    @classmethod
    def _names_something(cls, name: str) -> str:
        kind, _, rest = name.partition(":")
        if not rest:
            raise ConfigError(f'task.name is "{name}"', f"it does not say which {kind}", f'write "{kind}:..."')
        return name

    def problems(self, split: str) -> Sequence[Problem]:
        check_split(split)
        source = self.name.partition(":")[2]
        rows, how = self._rows(source, split)
        problems = [self._problem(row, i, source) for i, row in enumerate(rows)]
        _refuse_one_id_for_two(problems, source)
        if how == "hash":
            problems = [p for p in problems if _split_of(p) == split]
        elif how == "held back":
            problems = hold_back(problems, self.validation, split)
        if not problems:
            raise DataError(
                f'task.name is "{self.name}"', f'its split "{split}" is empty', "give more rows or a file for it"
            )
        return problems

    def _rows(self, source: str, split: str) -> tuple[Sequence[Row], Literal["all", "hash", "held back"]]:
        """The rows that hold a split, and how it is taken from them."""
        path, files = Path(source).expanduser(), self.files()
        if not files and not path.is_dir():
            return read_rows(path), "hash"
        if split in files and not (split == "train" and self.validation and "validation" not in files):
            return read_rows(files[split]), "all"
        if split in ("train", "validation") and "train" in files and self.validation:
            return read_rows(files["train"]), "held back"
        raise DataError(
            f'task.name is "{self.name}"',
            f'there is no "{split}" part (found: {", ".join(sorted(files)) or "none"})',
            f"add a file {split}.jsonl"
            + (", or set task.validation" if split == "validation" else "")
            + (" (from Python: give eval_data)" if split == "validation" and path.name == "data" else "")
            + (f", or ask by name for what there is: eval --split {min(files)}" if split == "test" and files else ""),
        )

    def files(self) -> dict[str, Path]:
        """The files that are named for a split, by its name; none where one file is parted."""
        path = Path(self.name.partition(":")[2]).expanduser()
        paths = sorted(path.iterdir()) if path.is_dir() else [path]
        return {p.stem: p for p in paths if p.suffix in ENDINGS and p.stem in SPLITS}

    def _problem(self, row: Row, index: int, source: str) -> Problem:
        where = f"{source} row {index + 1}"
        row = _parted(row)
        asked = "question" if row.get("prompt") is None else "prompt"
        question = row.get(asked)
        if question in ("", []):
            raise DataError(f"{where} has an empty prompt", "there is nothing to ask", "fill it in, or remove the row")
        if question is None:
            columns = ", ".join(map(str, row))
            raise DataError(
                f"{where} has the columns {columns}", "none of them asks", 'name one "prompt" or "question"'
            )
        meta: dict[str, Any] = {"columns": {k: v for k, v in row.items() if k != asked}}
        if not isinstance(question, str):
            meta["messages"] = self._messages(question, where)
            question = meta["messages"][-1]["content"]
        if solution := row.get("solution") or _text(row.get("completion")):
            meta["solution"] = str(solution)
        identity = str(row.get("id") or f"{Path(source).name}-{stable_hash(_whole(question, meta)):016x}")
        return Problem(identity, question, self._answer(row, where), meta)

    def _messages(self, value: Any, where: str) -> Messages:
        """A row's chat messages, which stand as they are."""
        if not (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
        ):
            raise DataError(
                f"{where} has the prompt {value!r}",
                "it is neither text nor messages",
                'write text or [{"role": ..., "content": ...}]',
            )
        if value[-1]["role"] == "assistant":
            raise DataError(
                f"the prompt of {where} ends with a message of the assistant",
                "the answer is a message of its own, and would stand behind it",
                "end with a message of the user",
            )
        if self.system is not None or self.prompt != type(self).model_fields["prompt"].default:
            raise ConfigError(
                f"task.{'system' if self.system is not None else 'prompt'} is set, and {where} has chat messages",
                "messages are put to the model as they are",
                "write it into the messages, or give the prompts as text",
            )
        return [{"role": str(m["role"]), "content": _content(m["content"], where)} for m in value]

    def _answer(self, row: Row, where: str) -> str:
        if self.check == "none":
            return "" if row.get("answer") is None else str(row["answer"])
        if row.get("answer") is None:
            raise DataError(
                f"{where} has no answer",
                "there is nothing to compare completions with",
                'add a column "answer", or write task.check = "none" and give rewards of your own',
            )
        return checked_answer(row["answer"], where) if self.check == "math" else str(row["answer"]).strip()

    def ask(self, problem: Problem) -> Messages:
        return problem.meta.get("messages") or super().ask(problem)

    def score(self, problem: Problem, text: str) -> Score:
        if self.check == "math":
            return super().score(problem, text)
        if self.check == "none":
            return Score(0.0, {})
        right = float(_plain(answers.marked(text) or text) == _plain(problem.answer))
        return Score(right, {"correct": right})

    def vote(self, text: str) -> str | None:
        return super().vote(text) if self.check == "math" else _plain(answers.marked(text) or text) or None


class Hub(File):
    """The same of a hub data set: `hub:<id>`, or `hub:<id>@<subset>`."""

    def files(self) -> dict[str, Path]:
        return {}

    def _rows(self, source: str, split: str) -> tuple[Sequence[Row], Literal["all", "hash", "held back"]]:
        held = split == "validation" or (split == "train" and self.validation > 0)
        if held and self.validation:
            return list(hub_rows(source, "train")), "held back"
        return list(hub_rows(source, split)), "all"


def _parted(row: Row) -> Row:
    """A row of whole conversations, under `messages`, as one with a prompt; what the assistant says last is its
    completion."""
    messages, asked = row.get("messages"), (row.get("prompt"), row.get("question"))
    if not isinstance(messages, list) or not messages or asked != (None, None):
        return row
    answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    rest = {key: value for key, value in row.items() if key not in ("messages", "prompt", "question")}
    return {"prompt": messages[:-1], "completion": messages[-1:], **rest} if answered else {"prompt": messages, **rest}


def _text(completion: Any) -> str | None:
    """What a completion says, as text or as a list of one message; None if it is neither, or says nothing."""
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = _joined_parts(completion[0].get("content"))
    return completion if isinstance(completion, str) and completion.strip() else None


def _content(content: Any, where: str) -> str:
    text = _joined_parts(content)
    if not isinstance(text, str):
        raise DataError(
            f"{where} has a message with the content {content!r}",
            "it is not text, and models here read nothing else",
            'write text, or parts such as [{"type": "text", "text": ...}]',
        )
    return text


def _joined_parts(content: Any) -> Any:
    """Content in parts of text, as OpenAI has it, is the text of these; any other is left as it is."""
    in_parts = isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content)
    return "".join(str(part.get("text", "")) for part in content) if in_parts else content


def _refuse_one_id_for_two(problems: Sequence[Problem], source: str) -> None:
    """Evaluations and what is held back go by ids."""
    asked: dict[str, str] = {}
    for problem in problems:
        whole = _whole(problem.question, problem.meta)
        if asked.setdefault(problem.id, whole) != whole:
            raise DataError(
                f'two rows of {source} with different prompts have the id "{problem.id}"',
                'a column "id" tells problems apart',
                "give each row an id of its own, or call the column something else",
            )


def _whole(question: str, meta: Mapping[str, Any]) -> str:
    """All that is asked: of a conversation every message."""
    return json.dumps(meta["messages"]) if "messages" in meta else question


def _split_of(problem: Problem) -> str:
    place = stable_hash("file", _whole(problem.question, problem.meta)) % 100
    return "train" if place < 90 else "validation" if place < 95 else "test"


def _plain(text: str) -> str:
    """Text without the differences that are none: case, space, a final full stop."""
    return " ".join(text.split()).rstrip(".").casefold()
