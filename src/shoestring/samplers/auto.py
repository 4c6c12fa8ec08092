"""The sampler that is taken where none is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from shoestring.config.settings import Settings
from shoestring.model.fast.decoder import unsupported
from shoestring.samplers.hf import HfEngine

if TYPE_CHECKING:
    from shoestring.model.policy import Policy
from shoestring.samplers.graph import GraphEngine, log


class AutoSampler(Settings):
    """ "graph" for the models that it knows, else "hf"."""

    name: Literal["auto"] = "auto"
    exact: ClassVar[bool] = True

    def open(self, policy: Policy, wave_tokens: int | None = None) -> GraphEngine | HfEngine:
        reason = unsupported(policy.base, policy.handle)
        if not reason:
            return GraphEngine(policy, wave_tokens)
        log.warning('Completions are sampled through transformers (sampler "hf"), which is slower: %s.', reason)
        return HfEngine(policy, wave_tokens)
