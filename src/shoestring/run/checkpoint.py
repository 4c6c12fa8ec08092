"""Save and resume: trained weights, optimizer, place in the data. Safetensors and JSON only; whole or not there at
all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring.errors import ConfigError
from shoestring.model.adapter import AdapterState, Handle
from shoestring.optimizers.base import load_state, state_of
from shoestring.run.folder import remove_folder, replace_folder
from shoestring.training.micro_batching import Pieces
from shoestring.types import Problem, Prompt


@dataclass
class State:
    """What a run remembers between steps, beside its weights. Random numbers need no place here: each is drawn from a
    hash of the seed, the step and what it is for."""

    step: int = 0
    """Steps that are done."""
    cursor: int = 0
    """Fresh problems that were drawn."""
    replays: list[Prompt] = field(default_factory=list)
    """Prefixes that the next step tries again."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What the algorithm remembers."""
    best_accuracy: float = -1.0
    """Of the evaluations so far, or the best mean reward; of none while `best_step` is -1."""
    best_step: int = -1
    skipped_in_a_row: int = 0
    """Steps in a row that were not applied because a number was not finite."""
    culprits: str = ""
    """The problems behind the last of them."""
    wave_tokens: int | None = None
    """Cache slots of a wave, as proved to fit."""
    pieces: Pieces = field(default_factory=Pieces)
    """How training is cut, as proved to fit."""
    planned: list[Any] = field(default_factory=list)
    """What these sizes were lowered from."""


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: State,
    handle: Handle | None = None,
) -> Path:
    """Writes checkpoints/step-N, N the number of steps done, under a temporary name first; returns it."""
    target = folder / "checkpoints" / f"step-{state.step}"
    values = json.dumps(_as_values(state))
    if target.exists():  # the weights of a step are what they are; an evaluation may have changed the state
        draft = target / ".draft-state.json"
        draft.write_text(values, encoding="utf-8")
        os.replace(draft, target / "state.json")
        return target

    def write(draft: Path) -> None:
        own = handle.state() if handle is not None else AdapterState(parameters, {})
        if own.values:
            (draft / "adapter.json").write_text(json.dumps(own.values), encoding="utf-8")
        moments, others = state_of(optimizer, parameters)
        for name, tensors in (("weights", own.tensors), ("optimizer", moments)):
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, draft / f"{name}.safetensors")
        (draft / "optimizer.json").write_text(json.dumps(others), encoding="utf-8")
        (draft / "state.json").write_text(values, encoding="utf-8")

    replace_folder(target, write)
    return target


@contextmanager
def saved_at(
    errors: type[BaseException],
    state: State,
    save: Callable[[], object],
    tell: Callable[[str], object],
    to_go_on: str,
    unless: type[BaseException] | tuple[()] = (),
) -> Iterator[None]:
    """Where it fails so, but not `unless` so, the steps that are done are saved first, and it is told how to go on."""
    try:
        yield
    except errors as error:
        if state.step and not isinstance(error, unless):
            try:
                save()
                tell(f"{state.step} steps are saved; to go on: {to_go_on}")
            except Exception as failed:  # it must not hide the first one
                tell(f"{state.step} steps are done and cannot be saved: {failed}")
        raise


def prune(folder: Path, limit: int) -> None:
    """Deletes all checkpoints but the newest `limit`, and the best weights that none of these refers to."""
    checkpoints = _by_step(folder / "checkpoints")
    kept = checkpoints[-limit:]
    best = {f"step-{json.loads((path / 'state.json').read_text(encoding='utf-8'))['best_step']}" for path in kept}
    for path in (*checkpoints[:-limit], *(path for path in _by_step(folder / "best") if path.name not in best)):
        remove_folder(path)


def _by_step(folder: Path) -> list[Path]:
    """The folders step-N in it, N upwards."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return next(reversed(_by_step(folder / "checkpoints")), None)


def steps_done(folder: Path) -> int:
    """The steps of that checkpoint; 0 without any."""
    last = latest(folder)
    return int(last.name[5:]) if last else 0


def restore(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    problems: Sequence[Problem] = (),
    handle: Handle | None = None,
) -> State:
    """Loads weights (the whole adapter of `handle`) and optimizer in place and returns the state, whose prefixes to
    replay belong to some of the `problems`; raises `ConfigError` if a file cannot be read."""
    with _read_from(path):
        own = load_file(path / "optimizer.safetensors")
        weights = load_file(path / "weights.safetensors") if handle is None else {}
        values, others = (json.loads((path / f"{n}.json").read_text(encoding="utf-8")) for n in ("state", "optimizer"))
        records = {"replays": _prompts(values["replays"], problems, path), "pieces": Pieces(**values["pieces"])}
        state = State(**{**values, **records})
    if handle is None:
        _fill(parameters, weights, path)
    else:
        read_adapter(path, handle)
    with _read_from(path):
        load_state(optimizer, parameters, own, others)
    return state


def weights_dtype(path: Path) -> torch.dtype:
    """The type of a checkpoint's weights."""
    with _read_from(path):
        return next(iter(load_file(path / "weights.safetensors").values())).dtype


def read_adapter(path: Path, handle: Handle) -> None:
    """Loads a checkpoint's adapter, or weights trained whole, in place; raises `ConfigError` if it cannot be read."""
    with _read_from(path):
        values = path / "adapter.json"
        noted = json.loads(values.read_text(encoding="utf-8")) if values.is_file() else {}
        state = AdapterState(load_file(path / "weights.safetensors"), noted)
    try:
        handle.load_state(state)
    except (KeyError, RuntimeError) as error:
        raise _other_weights(path) from error


@contextmanager
def _read_from(path: Path) -> Iterator[None]:
    """Says which checkpoint it is that cannot be read, and what to do about it."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        others = len(_by_step(path.parent)) > 1
        raise ConfigError(
            f"the checkpoint is {path}",
            f"it cannot be read ({type(error).__name__}: {error})",
            "remove that folder to go on from the checkpoint before it" if others else "it is the only one: start anew",
        ) from None


def _as_values(state: State) -> dict[str, Any]:
    """For JSON. Of a problem what it is found again by: the rest may be of types that JSON has not."""
    replays = [
        {"id": p.problem.id, "answer": p.problem.answer, "token_ids": p.token_ids, "answer_start": p.answer_start}
        for p in state.replays
    ]
    return {**dataclasses.asdict(dataclasses.replace(state, replays=[])), "replays": replays}


def _prompts(values: Sequence[Mapping[str, Any]], problems: Sequence[Problem], path: Path) -> list[Prompt]:
    known = {(problem.id, problem.answer): problem for problem in problems} if values else {}
    prompts = []
    for value in values:
        problem = known.get((value["id"], value["answer"]))
        if problem is None:
            raise ConfigError(
                f"the checkpoint is {path}",
                f'it goes on with problem "{value["id"]}", which the task no longer has',
                "give the task the data that the run was started with",
            )
        prompts.append(Prompt(problem, tuple(value["token_ids"]), value["answer_start"]))
    return prompts


def _fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path) -> None:
    """Copies values into the tensors of the same names."""
    if tensors.keys() != values.keys():
        raise _other_weights(path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _other_weights(path: Path) -> ConfigError:
    return ConfigError(
        f"the checkpoint is {path}",
        "what was trained has other weights than the config asks for",
        "use the run's own config",
    )
