"""The policy: log-probs of selected tokens, in every family, against the slow and obvious path."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batches import collate
from shoestring import train
from shoestring.algorithms import ALGORITHMS
from shoestring.model.load import ModelSettings
from shoestring.model.logit_transforms import POST_HEAD
from shoestring.model.policy import Policy
from shoestring.model.structure import decoder_layers
from shoestring.objectives.loss import Objective
from shoestring.optimizers.adamw import AdamW
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.training.update import build_optimizer, update
from shoestring.types import Batch, Group, Score
from tiny import FAMILIES, VOCAB, prompt, random_model, random_policy

OBJECTIVE = Objective(beta=0.0, clip_low=0.2, clip_high=0.2, updates=1, l2=0.0)


def sampled_groups(policy: Policy, num: int = 4, lengths: tuple[int, ...] = (5, 9), new: int = 12) -> list[Group]:
    """Groups of completions that the policy itself sampled, with rewards that differ."""
    prompts = [prompt(length, seed=i) for i, length in enumerate(lengths)]
    sampling = Sampling(max_new_tokens=new)
    found = SAMPLERS["hf"]().open(policy).sample(prompts, num=num, sampling=sampling, seed=7)
    scores = tuple(Score(float(i % 2), {}) for i in range(num))
    return [Group(p, completions, scores) for p, completions in zip(prompts, found, strict=True)]


def batches_of(groups: list[Group], algorithm: str = "grpo", max_tokens: int = 10_000, **settings: Any) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    credits = [ALGORITHMS[algorithm](**settings).credit(group, generator) for group in groups]
    return collate(groups, credits, max_tokens=max_tokens)


def full_logprobs(policy: Policy, batch: Batch, temperature: float) -> torch.Tensor:
    """The slow, obvious path: the library's own logits of every token."""
    logits = policy.base(input_ids=batch.input_ids, use_cache=False).logits
    return torch.log_softmax(logits.float() / temperature, -1)[batch.row, batch.col, batch.target]


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.trained().items() if p.grad is not None}


def clear(policy: Policy) -> None:
    for parameter in policy.trained().values():
        parameter.grad = None


def loss_gradients(policy: Policy, batches: list[Batch], *, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    clear(policy)
    for batch in batches:
        with policy.checkpointing(checkpointing):
            (-(batch.weight * batch.advantage * policy.logprobs(batch)).sum()).backward()
    return gradients(policy)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    """Equal within `atol`, times the size of the largest entry where that is above 1."""
    assert a.keys() == b.keys()
    for name in a:
        scale = max(1.0, float(b[name].abs().max()))
        torch.testing.assert_close(a[name], b[name], atol=atol * scale, rtol=0)


def test_every_listed_family_is_tested() -> None:
    assert FAMILIES.keys() == POST_HEAD.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_the_librarys_own_logits(family: str) -> None:
    policy = random_policy(family)
    [batch] = batches_of(sampled_groups(policy))
    for temperature in (1.0, 0.7):
        torch.testing.assert_close(
            policy.logprobs(batch, temperature), full_logprobs(policy, batch, temperature), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_the_samplers_logprobs_are_the_training_forwards(family: str) -> None:
    """Prompts of different lengths, so that padding is at work in the sampler."""
    policy = random_policy(family)
    batches = batches_of(sampled_groups(policy, lengths=(4, 11, 7)))
    for batch in batches:
        torch.testing.assert_close(policy.logprobs(batch), batch.sampler_logprob, atol=1e-5, rtol=0)


def test_an_unlisted_family_goes_through_its_own_logits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="shoestring"):
        policy = random_policy("gpt2")
    assert "gpt2" in caplog.text
    [batch] = batches_of(sampled_groups(policy))
    torch.testing.assert_close(policy.logprobs(batch), full_logprobs(policy, batch, 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ["grpo", "s-grpo", "t-spmo"])
def test_one_micro_batch_or_eight_give_the_same_gradient(algorithm: str) -> None:
    policy = random_policy()
    groups = sampled_groups(policy)
    whole = batches_of(groups, algorithm)
    cut = batches_of(groups, algorithm, max_tokens=1)
    assert len(whole) == 1
    assert len(cut) >= 4 if algorithm == "t-spmo" else len(cut) == 8
    close(loss_gradients(policy, whole), loss_gradients(policy, cut), atol=1e-6)


def test_what_lies_behind_the_last_selected_token_changes_nothing() -> None:
    """The cut row's log-probs and gradients are those of the whole row."""
    policy = random_policy()
    groups = sampled_groups(policy)
    [batch] = batches_of(groups, "s-grpo", alpha=2, k=3, p=0.5)
    assert batch.input_ids.shape[1] < max(len(c.token_ids) for g in groups for c in g.completions) + 9
    longer = torch.nn.functional.pad(batch.input_ids, (0, 6), value=3)
    extended = Batch(**{**vars(batch), "input_ids": longer})
    torch.testing.assert_close(policy.logprobs(batch), policy.logprobs(extended), atol=1e-6, rtol=0)
    # A sum of n fp32 terms in another order differs by at most n times its relative precision; here n is some 64.
    close(loss_gradients(policy, [batch]), loss_gradients(policy, [extended]), atol=64 * 2.0**-23)


class Seen(TorchDispatchMode):
    """Counts the rows that meet the vocabulary matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape[-1] == VOCAB:
            self.rows.append(out.shape[0])
        return out


def test_only_selected_tokens_meet_the_vocabulary_matrix() -> None:
    policy = random_policy()
    [batch] = batches_of(sampled_groups(policy), "s-grpo", alpha=2, k=2)
    with Seen() as seen:
        policy.logprobs(batch)
    assert sum(seen.rows) == len(batch.row) < batch.input_ids.numel()


def test_adapter_off_is_the_base_model_bit_for_bit_after_training() -> None:
    bare = random_model()
    policy = random_policy()
    groups = sampled_groups(policy)
    batches = batches_of(groups)
    before = base_hash(policy)
    optimizer = build_optimizer(policy.trained(), AdamW(lr=1e-2))
    for _ in range(3):
        report = update(policy, optimizer, batches, OBJECTIVE, temperature=1.0, max_grad_norm=1.0, checkpointing=False)
        assert report.applied
    ids = batches[0].input_ids
    assert not torch.equal(policy.base(input_ids=ids).logits, bare(input_ids=ids).logits)
    with policy.reference():
        assert torch.equal(policy.base(input_ids=ids).logits, bare(input_ids=ids).logits)
    assert base_hash(policy) == before


def base_hash(policy: Policy) -> str:
    digest = hashlib.sha256()
    for name, parameter in policy.base.named_parameters():
        if "lora" not in name:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def test_a_fresh_adapter_changes_nothing_so_the_kl_term_starts_at_exactly_0() -> None:
    policy = random_policy()
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.zero_()
    [batch] = batches_of(sampled_groups(policy))
    logprob = policy.logprobs(batch)
    with policy.reference():
        assert torch.equal(policy.logprobs(batch), logprob)


@pytest.mark.parametrize("layers", ["all", "last-third", 2, (1,)])
def test_checkpointing_changes_no_gradient_and_recomputes_only_layers_that_carry_one(layers: Any) -> None:
    policy = random_policy(adapter={"layers": layers})
    batches = batches_of(sampled_groups(policy))
    plain = loss_gradients(policy, batches)
    _, stack = decoder_layers(policy.base)
    calls: list[int] = []
    for index, layer in enumerate(stack):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    close(loss_gradients(policy, batches, checkpointing=True), plain, atol=1e-6)
    first = {"all": 0, "last-third": 2, 2: 1, (1,): 1}[layers]
    assert sorted(calls) == sorted([0, 1, 2, *range(first, 3)])
    assert not any(layer.training or layer.gradient_checkpointing for layer in stack)


def test_layers_below_the_first_adapter_store_nothing() -> None:
    """Every tensor that autograd saves belongs to the adapted layer or what lies above it."""
    policy = random_policy(adapter={"layers": 1})
    [batch] = batches_of(sampled_groups(policy))
    place, saved = [-1], []
    for index, layer in enumerate(decoder_layers(policy.base)[1]):
        layer.register_forward_pre_hook(lambda *_, index=index: place.__setitem__(0, index))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(place[0]) or t, lambda t: t):
        policy.logprobs(batch).sum().backward()
    assert saved
    assert set(saved) == {2}


def test_a_policy_is_loaded_by_a_name_or_a_folder_too() -> None:
    first, second = load_policy("tiny"), load_policy(ModelSettings(name="tiny"))
    assert all(torch.equal(a, b) for a, b in zip(first.base.parameters(), second.base.parameters(), strict=True))
    train({"steps": 1, "out": "run", "model": {"dtype": "bf16"}, "sampling": {"max_new_tokens": 4}}, quiet=True)
    own = load_policy(Path("run"))
    assert own.adapted is not None
    assert own.base.dtype == torch.bfloat16
