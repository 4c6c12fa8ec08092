"""The budget: how it is written, what is refused and how, and the second try in smaller pieces."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoestring import ConfigError, allocator, train
from shoestring.allocator import OutOfMemory, capped, free_bytes, give_back, is_out_of_memory, shrinking, total_bytes
from shoestring.config.files import dump
from shoestring.config.run import load, settle
from shoestring.config.sizes import parse_size, size_text
from shoestring.errors import ShoestringError
from shoestring.memory.budget import budget_bytes, check_room, context_bytes
from shoestring.run import preflight as budgets

GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * GIB),
        ("6 GiB", 6 * GIB),
        ("  1.5GiB ", 3 * GIB // 2),
        (".5GiB", GIB // 2),
        ("6gib", 6 * GIB),
        ("6GB", 6_000_000_000),
        ("512MiB", 2**29),
        ("512 MB", 512_000_000),
        ("3KiB", 3072),
        ("3kB", 3000),
        ("12345B", 12345),
        ("50%", 0.5),
        ("12.5 %", 0.125),
        ("100%", 1.0),
    ],
)
def test_sizes_as_people_write_them(text: str, size: float) -> None:
    found = parse_size(text)
    assert found == size
    assert isinstance(found, float) == text.endswith("%")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("6", "this is not a size"),
        ("", "this is not a size"),
        ("GiB", "this is not a size"),
        ("6GiB6", "this is not a size"),
        ("6,5GiB", "this is not a size"),
        ("1e3MiB", "this is not a size"),
        ("all", "this is not a size"),
        ("inf GiB", "this is not a size"),
        ("6TB", '"TB" is no unit of memory'),
        ("6G", '"G" is no unit of memory'),
        ("6 gigabytes", '"gigabytes" is no unit of memory'),
        ("0GiB", "more than nothing"),
        ("0.0%", "more than nothing"),
        ("-6GiB", "more than nothing"),
        ("-5%", "more than nothing"),
        ("101%", "no more than 100 %"),
    ],
)
def test_what_is_no_size_is_told_with_what_to_write(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse_size(text)
    assert told.value.given == f'memory is "{text}"'
    assert why in told.value.why
    assert '"6GiB"' in told.value.write
    assert '"50%"' in told.value.write


def test_a_size_below_a_byte_is_nothing() -> None:
    with pytest.raises(ConfigError, match="more than nothing"):
        parse_size("0.1B")


@pytest.mark.parametrize(
    ("text", "total", "budget"),
    [(None, 24 * GIB, None), ("50%", 24 * GIB, 12 * GIB), ("24GiB", 24 * GIB, 24 * GIB), ("6GiB", None, 6 * GIB)],
)
def test_the_budget_in_bytes(text: str | None, total: int | None, budget: int | None) -> None:
    found = budget_bytes(text, total)
    assert found == budget
    assert found is None or isinstance(found, int)


def test_a_budget_larger_than_the_card_or_a_share_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there are 24\.00 GiB in all; write no more than that"):
        budget_bytes("25GiB", 24 * GIB)
    with pytest.raises(ConfigError, match='no card here to take a share of; write "6GiB"'):
        budget_bytes("50%", None)


def test_sizes_in_words() -> None:
    assert [size_text(n) for n in (0, 2**19, 2**30 - 2**20, 2**30, 5 * 2**29)] == [
        *("0.0 MiB", "0.5 MiB", "1023.0 MiB", "1.00 GiB", "2.50 GiB")
    ]


# --- the setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [6, 6.5, True, ["6GiB"], {"size": "6GiB"}])
def test_a_number_without_a_unit_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="it has no unit; write a size with its unit") as told:
        settle({"memory": value})
    assert told.value.given == f"memory is {value!r}"


def test_the_setting_is_kept_as_it_was_written() -> None:
    config = load(None, ["memory=1.5 GiB"])
    assert config.memory == "1.5 GiB"
    Path("again.toml").write_text(dump(config))
    assert load("again.toml") == config
    assert load(None, ["memory=50%"]).memory == "50%"
    assert settle({}).memory is None


@pytest.mark.parametrize("memory", ["6", "6TB", "0GiB", "200%", "900000GiB", "1MiB"])
def test_a_budget_that_cannot_be_is_told_before_any_model_loads(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(budgets, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="memory is "):
        train({"memory": memory, "out": "run", "execution": {"device": "cpu"}}, quiet=True)
    assert not Path("run").exists()


def test_the_command_line_tells_it_without_a_traceback_and_ends_with_2() -> None:
    """Without loading what a model needs, too."""
    code = (
        "import sys; from shoestring.cli import main as cli\n"
        "try: cli.main()\n"
        "finally: print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "memory=6", "out=run"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: memory is 6; it has no unit; write a size with its unit")
    assert "Traceback" not in done.stderr
    assert "transformers" not in done.stdout
    assert not Path("run").exists()


def test_out_of_memory_is_an_error_that_the_user_can_mend() -> None:
    assert issubclass(OutOfMemory, ShoestringError)


# --- a second try ---------------------------------------------------------------------------------------------------

ALLOCATION = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ValueError("CUDA out of memory"),
    OutOfMemory("a", "b", "c"),
    KeyError("CUBLAS_STATUS_ALLOC_FAILED"),
]


def test_which_errors_say_that_memory_ran_out() -> None:
    assert all(map(is_out_of_memory, ALLOCATION))
    assert not any(map(is_out_of_memory, OTHERS))
    assert not is_out_of_memory(KeyboardInterrupt())


@pytest.mark.parametrize("error", ALLOCATION, ids=lambda error: str(error)[:24])
def test_an_attempt_that_does_not_fit_is_made_again_from_its_start_at_half_the_size(error: Exception) -> None:
    done: list[Any] = []

    def attempt(size: int) -> str:
        done.append(size)
        if size > 20:
            raise error
        return "made"

    assert shrinking(attempt, 100, 3, undo=lambda: done.append("undone")) == ("made", 12)
    assert done == [100, "undone", 50, "undone", 25, "undone", 12]


def test_what_fits_at_once_is_neither_undone_nor_made_again() -> None:
    assert shrinking(lambda size: size, 100, 3, undo=lambda: pytest.fail("undone")) == (100, 100)


@pytest.mark.parametrize(
    ("size", "least", "tried"),
    [(100, 30, [100, 50, 30]), (100, 25, [100, 50, 25]), (7, 7, [7]), (5, 7, [5]), (3, 1, [3, 1]), (1, 1, [1])],
)
def test_at_the_least_size_the_error_goes_on_once_all_is_undone(size: int, least: int, tried: list[int]) -> None:
    done: list[int] = []
    undone: list[int] = []

    def attempt(size: int) -> None:
        done.append(size)
        raise torch.OutOfMemoryError(f"at {size}")

    with pytest.raises(torch.OutOfMemoryError, match=f"at {tried[-1]}"):
        shrinking(attempt, size, least, undo=lambda: undone.append(0))
    assert done == tried
    assert len(undone) == len(tried)


@pytest.mark.parametrize("error", [*OTHERS, KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_other_errors_pass_at_once(error: BaseException) -> None:
    done: list[int] = []

    def attempt(size: int) -> None:
        done.append(size)
        raise error

    with pytest.raises(type(error)) as raised:
        shrinking(attempt, 100, 1, undo=lambda: pytest.fail("undone"))
    assert raised.value is error
    assert done == [100]


def test_an_error_of_undo_goes_on() -> None:
    def undo() -> None:
        raise OutOfMemory("it", "cannot be", "undone")

    def attempt(size: int) -> None:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(OutOfMemory, match="cannot be"):
        shrinking(attempt, 100, 1, undo=undo)


@pytest.mark.parametrize("deep", [False, True])
def test_nothing_of_the_failed_attempt_lives_when_the_next_one_starts(deep: bool) -> None:
    """Neither by its frames, nor by a cycle, nor by a graph; `undo` finds it gone as well, if no cycle holds it."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: dict[str, bool] = {}

    def attempt(size: int) -> int:
        if made:
            alive["next"] = any(ref() is not None for ref in made)
            return size
        tensor = torch.ones(4, requires_grad=True)
        loss = (tensor * 2).square().sum()
        made.extend(map(weakref.ref, (tensor, loss)))
        if deep:
            cycle: list[Any] = [tensor]
            cycle.append(cycle)
            _raise(loss)
        raise torch.OutOfMemoryError("no")

    def undo() -> None:
        alive["undo"] = any(ref() is not None for ref in made)

    gc.disable()
    try:
        assert shrinking(attempt, 8, 1, undo=undo) == (4, 4)
    finally:
        gc.enable()
    assert alive["next"] is False
    assert deep or alive["undo"] is False


def _raise(tensor: torch.Tensor) -> None:
    """An error with a frame of its own and one behind it."""
    try:
        raise ValueError(str(tensor))
    except ValueError as error:
        raise torch.OutOfMemoryError("while something else was handled") from error


# --- the card, as torch tells it ------------------------------------------------------------------------------------


class Card:
    """Stands for torch.cuda: a card of 24 GiB, of which others hold 10 and this process has reserved 2 and uses 1."""

    def __init__(self) -> None:
        self.total, self.others, self.reserved, self.allocated = 24 * GIB, 10 * GIB, 2 * GIB, GIB
        self.calls: list[Any] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = torch.cuda
        free = lambda device=None: (self.total - self.others - self.reserved, self.total)  # noqa: E731
        for name, value in {
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=self.total),
            "mem_get_info": free,
            "memory_reserved": lambda device=None: self.reserved,
            "memory_allocated": lambda device=None: self.allocated,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "set_per_process_memory_fraction": lambda share, device=None: self.calls.append(share),
            "get_per_process_memory_fraction": lambda device=None: 1.0,
            "current_blas_handle": lambda: 0,
        }.items():
            monkeypatch.setattr(cuda, name, value)
        monkeypatch.setattr(cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(allocator, "_run_stream", lambda _: None)  # torch has none without CUDA
        monkeypatch.setattr(
            torch.cuda.memory, "_set_allocator_settings", lambda text: self.calls.append(text), raising=False
        )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    made.install(monkeypatch)
    return made


def test_what_the_card_has_and_what_is_free(card: Card) -> None:
    assert total_bytes(CUDA) == 24 * GIB
    assert free_bytes(CUDA) == 13 * GIB  # 12 that nobody holds, and 1 that this process holds and does not use
    assert context_bytes(CUDA) == 10 * GIB


def test_a_budget_that_others_have_taken_is_refused_with_what_is_left(card: Card) -> None:
    check_room(14 * GIB, CUDA)
    with pytest.raises(ConfigError) as told:
        check_room(14 * GIB + 1, CUDA)
    assert told.value.given == "memory is 14.00 GiB"
    assert "of the card's 24.00 GiB only 14.00 GiB are left; 10.00 GiB are in use by other processes" in told.value.why
    assert 'memory = "13.7GiB"' in told.value.write
    check_room(100 * GIB, CPU)


@pytest.mark.parametrize("fails", [False, True])
def test_the_allocator_is_held_to_the_budget_while_a_run_lasts(card: Card, fails: bool) -> None:
    try:
        with capped(CUDA, 6 * GIB):
            assert card.calls[-1] == 0.25 - 20 * 2**20 / (24 * GIB)  # a page below it
            assert "expandable_segments:True" in card.calls
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert card.calls[-1] == 1.0


def test_without_a_budget_and_on_the_cpu_there_is_no_cap(card: Card) -> None:
    with capped(CUDA, None):
        pass
    assert {call for call in card.calls if isinstance(call, float)} == {1.0}
    card.calls.clear()
    with capped(CPU, 6 * GIB):
        give_back(CPU)
    assert card.calls == []
    give_back(CUDA)
    assert card.calls == ["empty_cache"]


def test_the_machine_is_the_card_of_a_cpu() -> None:
    assert total_bytes(CPU) == free_bytes(CPU) > 2**28
