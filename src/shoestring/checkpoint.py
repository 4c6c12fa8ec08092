"""Save and resume: adapter, optimizer, place in the data. Safetensors and JSON only; whole or not there at all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoestring.errors import ConfigError
from shoestring.runs import replace_folder
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
    best_accuracy: float = -1.0
    best_step: int = -1
    skipped_in_a_row: int = 0
    """Steps in a row that were not applied because a number was not finite."""
    culprits: str = ""
    """The problems behind the last of them."""


def save(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: State) -> Path:
    """Writes checkpoints/step-N, N the number of steps done, under a temporary name first; returns it."""
    target = folder / "checkpoints" / f"step-{state.step}"
    values = json.dumps(dataclasses.asdict(state), default=str)
    if target.exists():  # the weights of a step are what they are; an evaluation may have changed the state
        draft = target / ".draft-state.json"
        draft.write_text(values, encoding="utf-8")
        os.replace(draft, target / "state.json")
        return target

    def write(draft: Path) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        save_file(weights, draft / "adapter.safetensors")
        save_file(_moments(parameters, optimizer), draft / "optimizer.safetensors")
        (draft / "state.json").write_text(values, encoding="utf-8")

    replace_folder(target, write)
    return target


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def restore(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """Loads weights and optimizer in place and returns the state."""
    weights = load_file(path / "adapter.safetensors")
    if weights.keys() != parameters.keys():
        raise ConfigError(
            f"the checkpoint is {path}",
            "its adapter has other weights than the config asks for",
            "use the run's own config",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    _restore_moments(load_file(path / "optimizer.safetensors"), parameters, optimizer)
    values: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return State(**{**values, "replays": [_prompt(value) for value in values["replays"]]})


def _prompt(value: Mapping[str, Any]) -> Prompt:
    return Prompt(Problem(**value["problem"]), tuple(value["token_ids"]), value["answer_start"])


def _moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by "parameter name:what"."""
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_moments(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters[name]
        # AdamW counts its steps on the CPU; its moments lie beside the weights.
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
