"""Tasks: contracts over the table, and the details of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoestring.config.settings import pick
from shoestring.errors import ConfigError, DataError
from shoestring.tasks import TASKS
from shoestring.tasks.base import SPLITS
from shoestring.tasks.multiplication import Multiplication, split_of
from shoestring.types import Problem

NONSENSE = [
    "",
    " ",
    "####",
    "#### ",
    "\\boxed{",
    "\x00\ud800",
    "1" * 5000,
    "NaN",
    "the answer is",
    "<answer>",
    "😀" * 50,
]

ROWS = [{"prompt": f"What is {a} + {a}?", "answer": str(2 * a), "topic": "sums"} for a in range(400)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of every listed task, over small data of its own kind. A new entry is met here and needs its line."""
    write_jsonl(
        Path("d/svamp/train.jsonl"), [{"id": f"a{i}", "question": f"q{i}?", "answer": str(i)} for i in range(50)]
    )
    write_jsonl(
        Path("d/svamp/test.jsonl"), [{"id": f"b{i}", "question": f"r{i}?", "answer": str(i)} for i in range(20)]
    )
    solved = [
        {"id": f"c{i}", "question": f"s{i}?", "answer": str(i), "solution": f"<<1+1=2>>so\n#### {i}"} for i in range(50)
    ]
    write_jsonl(Path("d/gsm8k/train.jsonl"), solved)
    write_jsonl(
        Path("d/gsm8k/test.jsonl"),
        [{**row, "question": "t" + row["question"], "id": "t" + row["id"]} for row in solved],
    )
    write_jsonl(Path("rows.jsonl"), ROWS)
    parts = {"train": ROWS[:300], "test": ROWS[300:]}
    monkeypatch.setattr("shoestring.tasks.file.hub_rows", lambda name, split: parts[split])
    settings: dict[str, Any] = {
        "multiplication": {},
        "svamp": {"data": "d", "validation": 10},
        "gsm8k": {"data": "d/gsm8k", "validation": 10},
        "gym": {"name": "gym:chain_sum", "num_train": 40, "num_validation": 10, "num_test": 10},
        "file": {"name": "file:rows.jsonl"},
        "hub": {"name": "hub:someone/sums", "validation": 20},
        "word-problems": {},
        "mixture": {"of": [{"name": "svamp", "data": "d", "validation": 10}, {"name": "gsm8k", "data": "d"}]},
    }
    if request.param == "gym":
        pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    return pick(TASKS, "task", {"name": request.param, **settings[request.param]})


def firsts(task: Any, split: str, num: int = 20) -> list[Problem]:
    problems = task.problems(split)
    return [problems[i] for i in range(min(num, len(problems)))]


def test_the_reference_answer_scores_1(task: Any) -> None:
    for split in SPLITS:
        for problem in firsts(task, split):
            text = f"<answer>{problem.answer}</answer>" if task.name.startswith("gym") else f"#### {problem.answer}"
            if not task.name.startswith("gym"):
                assert task.score(problem, text).value == 1.0
                assert task.vote(text) == task.vote(f"so it is #### {problem.answer}")
            solution = task.solution(problem)
            assert solution is None or task.score(problem, solution).value == 1.0


def test_no_text_raises_and_nonsense_earns_nothing(task: Any) -> None:
    [problem] = firsts(task, "train", 1)
    for text in NONSENSE:
        assert 0 <= task.score(problem, text).value < 1.0
        task.vote(text)


def test_splits_share_no_question(task: Any) -> None:
    seen = [
        {p.question for p in firsts(task, split, 10_000 if len(task.problems(split)) < 1000 else 500)}
        for split in SPLITS
    ]
    assert all(seen)
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_an_item_is_the_same_in_any_order(task: Any) -> None:
    problems = task.problems("train")
    forwards = [problems[i] for i in range(5)]
    again = task.problems("train")
    assert [again[i] for i in reversed(range(5))] == forwards[::-1]


def test_it_asks_in_messages_with_the_question_in_them(task: Any) -> None:
    [problem] = firsts(task, "train", 1)
    messages = task.ask(problem)
    assert messages[-1]["role"] == "user"
    assert problem.question in messages[-1]["content"]


def test_an_unknown_split_is_refused(task: Any) -> None:
    with pytest.raises(ConfigError, match="there is no such split"):
        task.problems("dev")


def test_system_and_prompt_text_are_settings() -> None:
    task = Multiplication(system="Be brief.", prompt="Now: {question} {really}")
    assert task.ask(Problem("1", "2*3=", "6")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Now: 2*3= {really}"},
    ]


# --- multiplication


def test_a_split_is_a_hash_of_the_sorted_factors_alone() -> None:
    assert all(split_of(a, b) == split_of(b, a) for a in range(10, 60) for b in range(10, 60))
    places = [split_of(a, b) for a in range(10, 100) for b in range(a, 100)]
    assert 0.88 < places.count("train") / len(places) < 0.92
    assert 0.04 < places.count("test") / len(places) < 0.06


def test_no_seed_brings_a_test_problem_into_training() -> None:
    held_out = {frozenset(p.question[:-1].split("*")) for p in Multiplication().problems("test")}
    for seed in range(3):
        stream = Multiplication(seed=seed).problems("train")
        assert not held_out & {frozenset(stream[i].question[:-1].split("*")) for i in range(5_000)}


def test_held_out_problems_are_distinct_and_at_least_300() -> None:
    problems = Multiplication().problems("test")
    assert len(problems) == len({p.question for p in problems}) == 300


@pytest.mark.parametrize("digits", [(2, 2), (1, 3), (3, 3), (4, 2)])
def test_factors_have_the_digits_and_solutions_are_right(digits: tuple[int, int]) -> None:
    task = Multiplication(digits=digits)
    for i in range(200):
        problem = task.problems("train")[i]
        a, b = problem.question[:-1].split("*")
        assert (len(a), len(b), int(a) * int(b)) == (*digits, int(problem.answer))
        for line in task.solution(problem).splitlines()[:-1]:
            left, right = line.split("=")
            assert eval(left) == int(right)


# --- data sets


def test_local_data_by_setting_or_environment(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real files: sizes, every reference right, solutions without calculator notes."""
    svamp = pick(TASKS, "task", {"name": "svamp", "validation": 100})
    assert [len(svamp.problems(split)) for split in SPLITS] == [600, 100, 300]
    assert all(svamp.score(p, f"#### {p.answer}").value == 1.0 for split in SPLITS for p in svamp.problems(split))
    gsm8k = pick(TASKS, "task", {"name": "gsm8k", "data": str(data_folder)})
    assert [len(gsm8k.problems(split)) for split in ("train", "test")] == [7473, 1319]
    for problem in gsm8k.problems("test"):
        assert gsm8k.score(problem, gsm8k.solution(problem)).value == 1.0
        assert "<<" not in gsm8k.solution(problem)
    with pytest.raises(ConfigError, match=r"set task\.validation"):
        gsm8k.problems("validation")


def test_the_hubs_own_columns_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_DATA", raising=False)
    svamp = [
        {"ID": "chal-1", "question_concat": "How many?", "Answer": "8.0"},
        {"ID": "x", "Body": "A.", "Question": "B?", "Answer": 3},
    ]
    gsm8k = [{"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"}]
    monkeypatch.setattr("shoestring.tasks.rows.hub_rows", lambda name, split: svamp if "SVAMP" in name else gsm8k)
    first, second = pick(TASKS, "task", "svamp").problems("train")
    assert (first.id, first.question, first.answer, second.question) == ("chal-1", "How many?", "8.0", "A. B?")
    [problem] = pick(TASKS, "task", "gsm8k").problems("test")
    assert (problem.answer, problem.meta["solution"]) == ("1002", "1+1=2\n#### 1,002")


def test_hub_data_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or ROWS)
    problems = pick(TASKS, "task", "hub:someone/sums@easy").problems("test")
    assert asked == [(("someone/sums", "easy"), {"split": "test"})]
    assert problems[3].answer == "6"

    def missing(*a: Any, **k: Any) -> None:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match="no such data set"):
        pick(TASKS, "task", "hub:someone/none").problems("test")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_files_of_each_kind(ending: str) -> None:
    path = Path(f"sums.{ending}")
    if ending == "jsonl":
        write_jsonl(path, ROWS)
    elif ending == "csv":
        path.write_text("question,answer,topic\n" + "".join(f'"What is {a} + {a}?",{2 * a},sums\n' for a in range(400)))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="the extra data is not installed")
        table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
        parquet.write_table(table, path)
    task = pick(TASKS, "task", f"file:{path}")
    found = [p for split in SPLITS for p in task.problems(split)]
    assert sorted(int(p.answer) for p in found) == [2 * a for a in range(400)]
    assert found[0].meta["columns"]["topic"] == "sums"


def test_a_file_named_for_a_split_is_that_split_and_a_folder_holds_several() -> None:
    write_jsonl(Path("f/train.jsonl"), ROWS[:50])
    write_jsonl(Path("f/test.jsonl"), ROWS[50:])
    assert len(pick(TASKS, "task", "file:f/test.jsonl").problems("test")) == 350
    task = pick(TASKS, "task", {"name": "file:f", "validation": 5})
    assert [len(task.problems(split)) for split in SPLITS] == [45, 5, 350]
    with pytest.raises(DataError, match=r"set task\.validation"):
        pick(TASKS, "task", "file:f").problems("validation")
    with pytest.raises(ConfigError, match="hold back fewer"):
        pick(TASKS, "task", {"name": "file:f", "validation": 50}).problems("train")


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_conversations_and_text_answers(column: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    write_jsonl(Path("train.jsonl"), [{column: messages, "answer": "Paris"}])
    task = pick(TASKS, "task", {"name": "file:train.jsonl", "check": "text"})
    [problem] = task.problems("train")
    assert task.ask(problem) == messages
    assert [task.score(problem, t).value for t in ("<answer>paris.</answer>", "Paris", "#### Rome", "")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no rows"),
        ("not json\n", "line 1"),
        ('{"prompt": "a", "answer": "1"}\n[1]\n', "line 2"),
        ('{"text": "a", "answer": "1"}\n', "none of them asks"),
        ('{"prompt": "a"}\n', "nothing to compare"),
        ('{"prompt": "a", "answer": "Paris"}\n', "neither a number nor a formula"),
        ('{"prompt": 5, "answer": "1"}\n', "neither text nor messages"),
    ],
)
def test_bad_rows_are_told_with_their_place(text: str, says: str) -> None:
    Path("train.jsonl").write_text(text)
    with pytest.raises(DataError, match=says):
        pick(TASKS, "task", "file:train.jsonl").problems("train")


def test_a_byte_order_mark_and_other_encodings() -> None:
    Path("train.csv").write_text("\ufeffprompt,answer\n1+1,2\n", encoding="utf-8")
    assert pick(TASKS, "task", "file:train.csv").problems("train")[0].answer == "2"
    Path("train.jsonl").write_bytes('{"prompt": "é", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        pick(TASKS, "task", "file:train.jsonl").problems("train")


def test_rows_without_ids_are_told_apart_and_missing_columns_are_told() -> None:
    write_jsonl(Path("train.jsonl"), [{"question": f"q{i}?", "answer": str(i)} for i in range(20)])
    task = pick(TASKS, "task", {"name": "svamp", "data": ".", "validation": 5})
    assert (len(task.problems("train")), len(task.problems("validation"))) == (15, 5)
    write_jsonl(Path("train.jsonl"), [{"question": "q?"}])
    for name in ("svamp", "gsm8k"):
        with pytest.raises(DataError, match='"answer" is missing'):
            pick(TASKS, "task", {"name": name, "data": "."}).problems("train")


def test_a_question_beside_the_prompt_reaches_the_rewards() -> None:
    write_jsonl(Path("train.jsonl"), [{"prompt": "What is 2*3?", "question": "2*3", "answer": 6, "level": 1}])
    [problem] = pick(TASKS, "task", "file:train.jsonl").problems("train")
    assert problem.meta["columns"] == {"question": "2*3", "answer": 6, "level": 1}
    write_jsonl(Path("train.jsonl"), [{"question": "2*3", "answer": 6, "level": 1}])
    [problem] = pick(TASKS, "task", "file:train.jsonl").problems("train")
    assert problem.meta["columns"] == {"answer": 6, "level": 1}


def test_conversations_that_end_alike_are_problems_of_their_own() -> None:
    def talk(about: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": about}, {"role": "user", "content": "Go on."}]

    write_jsonl(Path("rows.jsonl"), [{"prompt": talk(str(i)), "answer": i} for i in range(200)])
    task = pick(TASKS, "task", "file:rows.jsonl")
    parts = {split: {problem.id for problem in task.problems(split)} for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 200


@pytest.mark.parametrize(
    ("settings", "last", "says"),
    [
        ({}, "assistant", "ends with a message of the assistant"),
        ({"system": "Be brief."}, "user", "task.system is set"),
        ({"prompt": "Q: {question}"}, "user", "task.prompt is set"),
    ],
)
def test_what_cannot_be_done_with_messages_is_told(settings: dict[str, str], last: str, says: str) -> None:
    write_jsonl(Path("train.jsonl"), [{"prompt": [{"role": last, "content": "2*3="}], "answer": 6}])
    with pytest.raises((DataError, ConfigError), match=says):
        pick(TASKS, "task", {"name": "file:train.jsonl", **settings}).problems("train")


def test_missing_files_and_unknown_kinds() -> None:
    with pytest.raises(DataError, match="no such file"):
        pick(TASKS, "task", "file:none.jsonl").problems("train")
    Path("rows.txt").write_text("1*1=1\n")
    with pytest.raises(DataError, match="its kind is not known"):
        pick(TASKS, "task", "file:rows.txt").problems("train")
    with pytest.raises(DataError, match="holds neither"):
        pick(TASKS, "task", {"name": "svamp", "data": "."}).problems("train")


def problems_of(*rows: dict[str, Any], **settings: Any) -> list[Problem]:
    write_jsonl(Path("own/train.jsonl"), list(rows))
    return list(pick(TASKS, "task", {"name": "file:own", **settings}).problems("train"))


def test_content_in_parts_of_text_is_their_text() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2*3?"}]
    worked = [{"type": "text", "text": "2*3=6"}]
    [problem] = problems_of(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": worked}], "answer": 6}
    )
    assert problem.question == "What is 2*3?"
    assert problem.meta["messages"] == [{"role": "user", "content": "What is 2*3?"}]
    assert problem.meta["solution"] == "2*3=6"


@pytest.mark.parametrize("content", [None, 7, [{"type": "image_url", "image_url": "x"}], ["text"]])
def test_content_that_is_no_text_is_refused(content: Any) -> None:
    with pytest.raises(DataError, match="own row 1 has a message with the content"):
        problems_of({"prompt": [{"role": "user", "content": content}], "answer": 6})


def test_an_id_of_two_problems_is_refused() -> None:
    same = {"id": "a", "prompt": "1+1=", "answer": 2}
    assert [problem.id for problem in problems_of(same, same)] == ["a", "a"]
    with pytest.raises(DataError, match='with different prompts have the id "a"'):
        problems_of(same, {**same, "prompt": "1+2=", "answer": 3})


def test_an_empty_prompt_column_beside_a_question_asks_nothing() -> None:
    assert [p.question for p in problems_of({"prompt": None, "question": "1+1=", "answer": 2})] == ["1+1="]


def test_a_comma_too_many_in_a_csv_is_told() -> None:
    Path("sums.csv").write_text("prompt,answer\n1+1=,2\n10*100=,1,000\n")
    with pytest.raises(DataError, match=r"sums\.csv, line 3 has 3 fields.*the header names 2 \(prompt, answer\)"):
        pick(TASKS, "task", "file:sums.csv").problems("train")
    Path("sums.csv").write_text('prompt,answer\n1+1=,2\n10*100=,"1,000"\n')
    task = pick(TASKS, "task", "file:sums.csv")
    assert {p.answer for split in SPLITS for p in some(task, split)} == {"2", "1,000"}


def some(task: Any, split: str) -> list[Problem]:
    try:
        return list(task.problems(split))
    except DataError:  # none fell there
        return []
