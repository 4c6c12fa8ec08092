"""The page of a run: its numbers are those of the logs, its colours those of the credit, and text cannot break it."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.run.test_loop import config

from shoestring import ConfigError, train
from shoestring.config import files as config_files
from shoestring.config import run as configs
from shoestring.records.html_report import pieces, write_page
from shoestring.records.svg import HEIGHT, line_chart, ticks

VOID = {"meta", "line", "polyline", "circle"}


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps the text and attributes of what is named."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        if tag not in VOID or tag == "polyline":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(path: Path) -> tuple[str, Tags]:
    text, tags = path.read_text(encoding="utf-8"), Tags()
    tags.feed(text)
    assert not tags.open
    return text, tags


def samples(folder: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_a_runs_page_holds_its_figures_and_needs_nothing_else() -> None:
    run = train(config(steps=3, eval_every=1, evaluation={"num": 10}), quiet=True)
    text, tags = read(write_page("run"))
    evaluations = [json.loads(line) for line in Path("run/evals.jsonl").read_text().splitlines()]
    best = max(evaluations, key=lambda line: line["accuracy"])
    assert f"{evaluations[0]['accuracy']:.1%} &rarr; {evaluations[-1]['accuracy']:.1%}" in text
    assert f"(best: {best['accuracy']:.1%}, step {best['step']})" in text
    trained, sampled = (sum(getattr(r, f"tokens_{name}") for r in run.reports) for name in ("trained", "sampled"))
    assert f"{trained:,} of {sampled:,}" in text
    assert tags.names.count("figure") == tags.names.count("svg") == 7
    assert html.escape('name = "s-grpo"') in text
    assert not re.search(r"https?:|src=|@import|<script", text)


@pytest.mark.parametrize("algorithm", ["t-spmo", "s-grpo"])
def test_colours_are_the_credit(algorithm: str) -> None:
    """With the colour taken off, a text is what was sampled; coloured are as many tokens as were trained, each with its
    advantage."""
    train(config(steps=3, algorithm=algorithm), quiet=True)
    text, _ = read(write_page("run"))
    shown = re.findall(
        r'(?s)<div class="dim">score (\S+), (\d+) tokens, (\d+) of[^<]*</div><div class="text">(.*?)</div>', text
    )
    assert shown
    by_text = {(s["text"], s["score"], s["tokens"]): s for s in reversed(samples())}
    for score, tokens, num, body in shown:
        plain = html.unescape(re.sub(r"<[^>]*>", "", body)).removesuffix("⏎")
        key = (float(score), int(tokens))
        sample = by_text[plain, *key]
        coloured = re.findall(r'background:rgba\((\d+),[^>]*title="([^"]*)">([^<]*)<', body)
        assert len(coloured) == int(num)
        letters = [html.escape(letter) for letter in sample["text"]] + ["&#x23CE;"]  # here a letter is a token
        credits = [s["credit"] for s in samples() if (s["text"], s["score"], s["tokens"]) == (plain, *key)]
        expected = [[(f"{a:+.3f}", letters[i]) for i, a in sorted(credit) if a] for credit in credits]
        assert [(told, letter) for _, told, letter in coloured] in expected
        assert all((red == "46") == (told[0] == "+") for red, told, _ in coloured)


def test_texts_cannot_break_the_page_and_an_unknown_tokenizer_leaves_them_plain() -> None:
    Path("run").mkdir()
    settled = configs.settle({"model": "nobody/has-this", "task": "file:<b>x.jsonl"})
    Path("run/config.toml").write_text(config_files.dump(settled))
    train(config(steps=1, out="other"), quiet=True)
    line = json.loads(Path("other/metrics.jsonl").read_text())
    Path("run/metrics.jsonl").write_text(json.dumps({**line, "loss": None, "grad_norm": None}) + "\n")
    evil = "</div><script>alert('&amp;')</script>\u2028\U0001f600"
    record = {**samples("other")[0], "question": evil, "answer": evil, "text": evil, "prefix_tokens": 0}
    record["credit"] = [[0, 0.5], [1, -0.5]]
    Path("run/samples.jsonl").write_text(json.dumps(record) + "\n")
    text, tags = read(write_page("run", "out.html"))
    assert "script" not in tags.names
    assert text.count(html.escape(evil)) == 3
    assert "cannot be had here" in text


def test_a_run_without_credit_or_samples_has_a_page() -> None:
    train(config(steps=1), rewards=[lambda completions, **_: [0.0] * len(completions)], quiet=True)
    assert "None in which completions" in read(write_page("run"))[0]
    Path("run/samples.jsonl").unlink()
    assert "None in which completions" in read(write_page("run"))[0]


def test_torn_lines_of_a_killed_run_are_passed_over_and_it_can_go_on() -> None:
    train(config(steps=2, save_every=1, eval_every=1, evaluation={"num": 5}), quiet=True)
    whole, _ = read(write_page("run"))
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
        with Path("run", name).open("ab") as file:
            file.write(b'{"step": 2, "problem": "\xe2\x8f')
    assert read(write_page("run"))[0] == whole
    assert len(train({"steps": 3}, resume="run", quiet=True).reports) == 3


def test_groups_of_one_problem_are_kept_apart() -> None:
    """Two rows for six prompts a step: a group's completions have the credit of their own group."""
    rows = [{"prompt": "2*3=", "answer": "6"}, {"prompt": "12*13=", "answer": "156"}]
    train(config(steps=1, sampling={"num_prompts": 6, "num_completions": 4}, algorithm="grpo"), data=rows, quiet=True)
    groups: dict[int, list[dict[str, Any]]] = {}
    for sample in samples():
        groups.setdefault(sample["group"], []).append(sample)
    assert [len(group) for group in groups.values()] == [4] * 6
    text, _ = read(write_page("run"))
    telling = [group for group in groups.values() if any(a for s in group for _, a in s["credit"])]
    assert text.count(" of them trained") == (4 if telling else 0)


def test_the_page_goes_where_it_is_asked_for() -> None:
    train(config(steps=1), quiet=True)
    Path("there").mkdir()
    for out, expected in (("there", "there/report.html"), ("new/deep/x.html", "new/deep/x.html"), (".", "report.html")):
        assert write_page("run", out) == Path(expected)
        assert Path(expected).is_file()
    assert not list(Path().rglob(".draft-*"))


def test_a_folder_without_a_run_or_without_a_step_is_told() -> None:
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no config\.toml"):
        write_page("empty")
    Path("empty/config.toml").write_text(config_files.dump(configs.settle({})))
    with pytest.raises(ConfigError, match="no step of it is done"):
        write_page("empty")
    assert not Path("empty/report.html").exists()


def byte_level(*merged: str) -> Any:
    """A tokenizer of single bytes, and of some whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", clean_up_tokenization_spaces=False)
    found.add_tokens(list(merged))
    return found


@given(st.text(max_size=30))
def test_pieces_are_the_text_in_order_and_a_letter_goes_with_its_last_byte(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = pieces([*ids, tokenizer.eos_token_id], text, tokenizer)
    assert "".join(found) == text
    assert len(found) == len(ids) + 1
    if "\ufffd" not in text:
        assert [piece for piece in found if piece] == list(text)
        assert found[-1] == ""
    for i, piece in enumerate(found):
        if piece and ord(piece[0]) < 128:
            assert tokenizer.decode([ids[i]]) == piece


def test_what_does_not_fit_the_tokenizer_is_one_piece() -> None:
    assert pieces([1, 2], "other", byte_level()) == ["other"]
    assert pieces([], "of an older run", byte_level()) == ["of an older run"]
    assert pieces([1], "text", None) == ["text"]


# --- charts ---------------------------------------------------------------------------------------------------------


def placed(chart: str) -> list[tuple[float, float]]:
    [points] = re.findall(r'<polyline points="([^"]*)"', chart)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_points_lie_where_the_axis_says() -> None:
    """Read back by two labels of the axis, the heights are the values."""
    values = [0.0, 12.5, 40.0, 33.0]
    chart = line_chart({"a": list(enumerate(values))}, unit="%")
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)%', chart)
    (y0, v0), (y1, v1) = ((float(y) - 3, float(v)) for y, v in (labels[0], labels[-1]))
    assert (v0, v1) == (0.0, 40.0)
    for (_, y), value in zip(placed(chart), values, strict=True):
        assert v0 + (y - y0) / (y1 - y0) * (v1 - v0) == pytest.approx(value, abs=0.1)
    xs = [x for x, _ in placed(chart)]
    assert xs == sorted(xs)
    assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], abs=0.2)


def test_what_lies_below_0_alone_fills_the_chart() -> None:
    heights = [y for _, y in placed(line_chart({"a": [(0, -5.7), (1, -5.5), (2, -5.6)]}))]
    assert max(heights) - min(heights) > HEIGHT / 3


def test_what_is_not_finite_is_a_gap() -> None:
    chart = line_chart({"a": [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, 1.0), (5, math.inf)]})
    assert chart.count("<polyline") == 2
    assert "nan" not in chart
    assert "inf" not in chart


@given(
    st.lists(
        st.tuples(st.integers(0, 10_000), st.floats(-1e12, 1e12) | st.sampled_from([math.nan, math.inf, 0.0, 1e-9])),
        max_size=20,
    )
)
def test_any_points_make_a_chart_and_stay_in_it(points: list[tuple[int, float]]) -> None:
    chart = line_chart({"a": sorted(points)})
    for _, y in re.findall(r"([-\d.]+),([-\d.]+)[ \"]", "".join(re.findall(r'points="[^"]*"', chart))):
        assert -0.1 <= float(y) <= HEIGHT + 0.1


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_hold_all(low: float, width: float) -> None:
    found = ticks(low, low + width)
    slack = 1e-6 * max(abs(low), width)
    assert found[0] <= low + slack
    assert found[-1] >= low + width - slack
    assert 2 <= len(found) <= 8
