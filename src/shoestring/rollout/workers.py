"""Scoring in processes of their own: it begins while other completions are still being sampled, and a row that takes
too long ends nothing but its process.

A row is one completion. Each is scored by itself, so a function gets lists of one; how rows are dealt out to the
processes changes neither scores nor their order. A function that compares the completions of a group needs
`rewards.workers = 0`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from shoestring.errors import ConfigError, DataError, ShoestringError
from shoestring.rewards.base import Judged, Row, Scored, TrainerState, joined_judged
from shoestring.rewards.functions import Rewards
from shoestring.tasks.base import Task

if TYPE_CHECKING:  # it comes with torch, for which a worker need not wait
    from shoestring.rewards.settings import RewardSettings

# Seconds that a new process has to import what it needs. They do not count as a row's.
_START = 120.0
_HOW = 'put the function into a module and name it by its place, "package.module:function", or set rewards.workers = 0'

Key = tuple[str, str, tuple[int, ...]]
"""A row's problem, text and tokens."""


class Scoring(Protocol):
    """How a run scores its completions."""

    early: bool
    """Whether it can begin before all is sampled."""

    def begin(self, rows: Sequence[Row], state: TrainerState) -> None:
        """Told of rows that `score` will be asked for later. Rows that it is never asked for do no harm."""
        ...

    def score(self, rows: Sequence[Row], state: TrainerState) -> Scored: ...


@contextmanager
def opened(rewards: Rewards, task: Task, settings: RewardSettings) -> Iterator[Scoring]:
    """Scoring as `[rewards]` says: in the loop's own thread, or in `workers` processes that end with the context."""
    if settings.workers == 0:
        yield Here(rewards, task)
        return
    pool = Pool(rewards, task, settings)
    try:
        pool.wait_until_ready()
        yield pool
    finally:
        pool.close()


def refuse_inside_a_worker() -> None:
    """A worker reads the script that started the run, and must not start it again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "rewards.workers is more than 0 in a script that trains as soon as it is read",
            "each worker reads the script too",
            'put the call under `if __name__ == "__main__":`',
        )


class Here:
    """Scores in the loop's own thread, once all is sampled."""

    early = False

    def __init__(self, rewards: Rewards, task: Task):
        self._rewards, self._task = rewards, task

    def begin(self, rows: Sequence[Row], state: TrainerState) -> None:
        pass

    def score(self, rows: Sequence[Row], state: TrainerState) -> Scored:
        return self._rewards.score(self._task, rows, state)


class TimedOut(Exception):
    """A row was not scored in time."""


class Closed(Exception):
    """The pool was closed while a row was waiting."""


class WorkerError(Exception):
    """The traceback of what was raised in a worker, as text: the cause of the error that the run stops with."""


class Pool:
    """Scores rows in `settings.workers` processes. A thread for each process waits for it."""

    early = True

    def __init__(self, rewards: Rewards, task: Task, settings: RewardSettings):
        self._rewards, self._settings = rewards, settings
        payload = _payload(rewards, task)
        self._workers = [Worker(payload, settings.timeout) for _ in range(settings.workers)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="rewards")
        self._begun: dict[Key, list[Future[Judged]]] = defaultdict(list)

    def wait_until_ready(self) -> None:
        """Raises `ConfigError` if the functions cannot be had in another process (found out by one worker for all)."""
        try:
            self._workers[0].wait_until_ready()
        except DataError as error:
            given = f"rewards.workers is {self._settings.workers}"
            raise ConfigError(given, f"a worker could not start ({error.why})", _HOW) from error.__cause__

    def close(self) -> None:
        """Ends every process, whatever it is doing."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def begin(self, rows: Sequence[Row], state: TrainerState) -> None:
        for row in rows:
            self._begun[_key(row)].append(self._threads.submit(self._judge, row, state))

    def score(self, rows: Sequence[Row], state: TrainerState) -> Scored:
        """Waits for rows that were begun, and has the others scored; raises `DataError` as the functions do."""
        waiting = [self._begun[key].pop(0) if self._begun[key] else None for key in map(_key, rows)]
        for left in self._begun.values():  # of a sampling that was done again
            for future in left:
                future.cancel()
        self._begun.clear()
        futures = [
            future or self._threads.submit(self._judge, row, state) for row, future in zip(rows, waiting, strict=True)
        ]
        late: list[str] = []
        judged = [self._waited(row, future, state, late) for row, future in zip(rows, futures, strict=True)]
        return self._rewards.weigh(rows, joined_judged(judged), tuple(late)) if rows else Scored([])

    def _waited(self, row: Row, future: Future[Judged], state: TrainerState, late: list[str]) -> Judged:
        try:
            return future.result()
        except TimedOut:
            if self._settings.on_timeout == "stop":
                raise self._too_late(row, state) from None
        late.append(row.problem.id)
        given = 0.0 if self._settings.on_timeout == "zero" else None
        return Judged({name: [given] for name in self._rewards.names}, [{}])

    def _too_late(self, row: Row, state: TrainerState) -> DataError:
        return DataError(
            f"a completion of problem {row.problem.id} was not scored within {self._settings.timeout:g} s "
            f"in step {state.global_step} (by {', '.join(self._rewards.names)})",
            "the run waits no longer for a row, and rewards.on_timeout says that it stops then",
            'fix the function, raise rewards.timeout, or set rewards.on_timeout = "unscored" or "zero"',
        )

    def _judge(self, row: Row, state: TrainerState) -> Judged:
        worker = self._idle.get()
        try:
            return worker.judge(row, state)
        finally:
            self._idle.put(worker)


class Worker:
    """A process that judges one row at a time, and another one in its place once that one hangs."""

    def __init__(self, payload: bytes, timeout: float | None):
        self._payload, self._timeout = payload, timeout
        self._lock, self._closed = threading.Lock(), False
        self._start()

    def _start(self) -> None:
        with self._lock:
            if self._closed:
                raise Closed
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_work, args=(self._payload, theirs), name="shoestring-rewards", daemon=True
            )
            self._process.start()
            theirs.close()
            self._ready = False

    def wait_until_ready(self) -> None:
        if not self._ready:
            try:
                self._answer(_START)
            except TimedOut:
                self._kill()
                raise DataError(
                    f"a reward worker was not ready after {_START:g} s",
                    "importing what the rewards need takes longer, or hangs",
                    "make that import lighter, use fewer rewards.workers, or set rewards.workers = 0",
                ) from None
            self._ready = True

    def judge(self, row: Row, state: TrainerState) -> Judged:
        self.wait_until_ready()
        try:
            with suppress(BrokenPipeError):  # of a process that has ended: it does not answer either
                self._pipe.send((row, state))
            return self._answer(self._timeout, row)
        except TimedOut:
            self._kill()
            self._start()
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._kill()

    def _answer(self, timeout: float | None, row: Row | None = None) -> Any:
        """What the process sends next; raises what it failed with."""
        try:
            if not self._pipe.poll(timeout):
                raise TimedOut
            result, error, trace = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended(row) from None
        if error is not None:
            raise DataError(*error) from WorkerError(trace)
        return result

    def _ended(self, row: Row | None) -> Exception:
        """What it means that the process is not there any more."""
        if self._closed:
            return Closed()
        self._process.join(5)
        doing = "starting" if row is None else f"scoring a completion of problem {row.problem.id}"
        return DataError(
            f"a reward worker ended while {doing}",
            f"its process ended with exit code {self._process.exitcode} (a negative one is a signal's number)",
            "look at what it printed; a function must not end its process, and memory must suffice for all workers",
        )

    def _kill(self) -> None:
        """Ends the process and what it has started: it leads a process group of its own."""
        if self._process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # one that is too young to have a group
        self._process.join()


def _key(row: Row) -> Key:
    return row.problem.id, row.text, tuple(row.completion_ids)


def _payload(rewards: Rewards, task: Task) -> bytes:
    """What a worker needs, pickled; raises `ConfigError` naming what cannot be."""
    for part, name in [*zip(rewards.given, rewards.names, strict=True), (task, f"the task {task.name}")]:
        try:
            pickle.dumps(part)
        except Exception as error:
            raise ConfigError(
                f"rewards.workers is more than 0, and {name} is to score in another process",
                f"it cannot be sent there ({type(error).__name__}: {error})",
                _HOW,
            ) from None
    return pickle.dumps((rewards.given, rewards.weights, task))


# --- in the worker --------------------------------------------------------------------------------------------------


def _work(payload: bytes, pipe: Connection) -> None:
    """A worker's life: unpacks the functions, then answers rows until the run is gone. Each answer is (result, the
    three parts of an error, its traceback)."""
    os.setsid()  # Ctrl-C in the terminal is the run's
    for number in (signal.SIGINT, signal.SIGTERM):  # handled and not ignored: what it starts would inherit that
        signal.signal(number, lambda *_: None)
    _end_with_parent()
    try:
        functions, weights, task = pickle.loads(payload)  # made by the run itself, a moment ago
        rewards = Rewards(functions, weights)
    except Exception as error:
        pipe.send((None, ("the rewards", f"{type(error).__name__}: {error}", _HOW), traceback.format_exc()))
        return
    pipe.send((None, None, ""))
    with suppress(EOFError, OSError):  # the run has ended
        while True:
            row, state = pipe.recv()
            pipe.send_bytes(_answered(rewards, task, row, state))


def _answered(rewards: Rewards, task: Task, row: Row, state: TrainerState) -> bytes:
    try:
        return pickle.dumps((rewards.judge(task, [row], state), None, ""))
    except ShoestringError as error:
        return pickle.dumps((None, (error.given, error.why, error.write), traceback.format_exc()))
    except Exception as error:  # a task that raises, or a logged value that cannot be sent
        given = f"{', '.join(rewards.names)} raised {type(error).__name__}: {error}"
        why = f"it was scoring problem {row.problem.id}"
        return pickle.dumps((None, (given, why, "fix the function"), traceback.format_exc()))


def _end_with_parent() -> None:
    """On Linux, a worker that hangs in a function ends with the run even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
