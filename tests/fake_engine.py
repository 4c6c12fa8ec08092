"""A sampler with weights of its own: docs/extending.md shows this file as it stands."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from shoestring.config.settings import Settings
from shoestring.errors import ConfigError
from shoestring.model.policy import Policy
from shoestring.model.sampling import Sampling
from shoestring.model.structure import quiet_peft
from shoestring.samplers.hf import HfEngine
from shoestring.types import Completion, Prompt


class OwnWeights(Settings):
    """Samples with a second copy of the base model, whose weights are a little off, as another engine's kernels are."""

    name: Literal["own-weights"] = "own-weights"
    noise: float = Field(default=0.01, ge=0)
    """How far each base weight is off, in standard deviations of its matrix."""

    exact: ClassVar[bool] = False

    def open(self, policy: Policy, wave_tokens: int | None = None) -> OwnWeightsEngine:
        if policy.adapted is None:
            raise ConfigError(
                'sampler.name is "own-weights" and adapter.name "none"',
                "the adapter is what this engine is sent after each step",
                'use adapter.name = "lora", or sampler.name = "hf"',
            )
        return OwnWeightsEngine(policy, self.noise, wave_tokens)


class OwnWeightsEngine:
    def __init__(self, policy: Policy, noise: float, wave_tokens: int | None):
        self._adapted: Any = copy.deepcopy(policy.adapted)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in self._adapted.named_parameters():
                if weight.dim() > 1 and "lora_" not in name:
                    weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
        own = copy.copy(policy)
        own.adapted, own.base = self._adapted, self._adapted.get_base_model()
        self._engine = HfEngine(own, wave_tokens)

    @property
    def wave_tokens(self) -> int | None:
        return self._engine.wave_tokens

    def sample(
        self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling, seed: int, first: int = 0, **others: Any
    ) -> list[tuple[Completion, ...]]:
        return self._engine.sample(prompts, num=num, sampling=sampling, seed=seed, first=first, **others)

    def rehearse(self, prompts: Sequence[Prompt], *, num: int, sampling: Sampling) -> None:
        self._engine.rehearse(prompts, num=num, sampling=sampling)

    def sync(self, policy: Policy) -> None:
        """Takes the adapter as PEFT's files, which is how any other engine would get it."""
        from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

        with TemporaryDirectory() as folder, quiet_peft():
            policy.save(Path(folder))
            set_peft_model_state_dict(self._adapted, load_peft_weights(folder, device=str(policy.device)))
