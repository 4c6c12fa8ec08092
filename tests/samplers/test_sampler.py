"""The sampler: right tokens, right log-probs, the same draws however they are batched. Contracts run over the table,
and over an engine with weights of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fake_engine import OwnWeights
from shoestring.model.draw import DRAW_TILE, draw, entropy, filtered, noise
from shoestring.model.policy import Policy
from shoestring.rollout.rollout import roll_out
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.samplers.hf import HfEngine
from shoestring.types import Batch, Completion, Prompt, TokenColumns
from tiny import FAMILIES, prompt, random_policy

PROMPTS = [prompt(4, 0), prompt(9, 1), prompt(6, 2)]
SAMPLING = Sampling(max_new_tokens=10)


class Case(NamedTuple):
    """A sampler, how far its log-probs may be from the training forward's, and whether it needs to be sent weights."""

    sampler: Any
    tolerance: float = 1e-4
    own_weights: bool = False


CASES = {
    **{name: Case(sampler()) for name, sampler in SAMPLERS.items()},
    "own weights": Case(OwnWeights(noise=0), own_weights=True),
    "own weights, off": Case(OwnWeights(noise=0.005), tolerance=0.5, own_weights=True),
}


def opened(name: str, policy: Policy, wave_tokens: int | None = None) -> Any:
    return CASES[name].sampler.open(policy, wave_tokens)


def tokens(groups: list[tuple[Completion, ...]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in groups]


@pytest.mark.parametrize("name", CASES)
def test_a_seed_repeats_and_another_does_not(name: str) -> None:
    engine = opened(name, random_policy())
    first = engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert first == engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert tokens(first) != tokens(engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=2))
    assert len(first) == 3
    assert all(len(group) == 3 for group in first)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wave_tokens", [1, 40, 60, 10_000])
def test_waves_choose_no_token(name: str, wave_tokens: int) -> None:
    policy = random_policy()
    whole = opened(name, policy).sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    waves = opened(name, policy, wave_tokens).sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert tokens(whole) == tokens(waves)
    for a, b in zip((c for g in whole for c in g), (c for g in waves for c in g), strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wave_tokens", [1, 40, 10_000])
def test_what_is_told_of_finished_groups_is_what_is_returned(name: str, wave_tokens: int) -> None:
    """A sampler need not tell of a group, but if it does, the last word counts."""
    told: dict[int, tuple[Completion, ...]] = {}
    engine = opened(name, random_policy(), wave_tokens)
    found = engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1, first=5, done=told.__setitem__)
    assert all(group == found[place] for place, group in told.items())
    assert found == engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1, first=5)
    assert name != "hf" or told.keys() == {0, 1, 2}


@pytest.mark.parametrize("name", CASES)
def test_stops_and_limits(name: str) -> None:
    """A completion ends with an end token or at the limit, to which a forced prefix counts."""
    policy = random_policy()
    policy.eos_ids = tuple(range(0, 60))  # so that many rows end early, each at its own time
    forced = [prompt(5, 3), prompt(5, 4, prefix=4), prompt(7, 5, prefix=9)]
    found = opened(name, policy).sample(forced, num=8, sampling=SAMPLING, seed=3)
    for p, group in zip(forced, found, strict=True):
        limit = max(10 - len(p.prefix), 1)
        for c in group:
            assert len(c.token_ids) == len(c.logprobs) <= limit
            assert (c.token_ids[-1] in policy.eos_ids) == (c.stop == "end")
            assert not any(token in policy.eos_ids for token in c.token_ids[:-1])
            assert c.stop == "end" or len(c.token_ids) == limit


@pytest.mark.parametrize("name", CASES)
def test_rows_that_leave_early_change_no_other(name: str) -> None:
    """Draws up to the first end token are those of the same model without any end token."""
    policy = random_policy()
    free = opened(name, policy).sample(PROMPTS, num=6, sampling=SAMPLING, seed=5)
    policy.eos_ids = tuple(range(0, 40))
    stopped = opened(name, policy).sample(PROMPTS, num=6, sampling=SAMPLING, seed=5)
    assert any(c.stop == "end" for group in stopped for c in group)
    for a, b in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        assert a.token_ids[: len(b.token_ids)] == b.token_ids


@pytest.mark.parametrize("name", CASES)
def test_a_forced_prefix_is_gone_on_from(name: str) -> None:
    """It is no part of the completion, and what follows is what follows the same tokens in a question."""
    engine = opened(name, random_policy())
    forced = prompt(5, 4, prefix=4)
    asked = Prompt(forced.problem, forced.token_ids, len(forced.token_ids))
    found = engine.sample([forced], num=4, sampling=SAMPLING, seed=3)
    assert tokens(found) == tokens(engine.sample([asked], num=4, sampling=Sampling(max_new_tokens=6), seed=3))
    rollout = roll_out(random_policy(), engine, [forced], num=1, sampling=SAMPLING, seed=3)[0]
    assert rollout.texts[0] == random_policy().decode(forced.prefix + rollout.completions[0].token_ids)


def trained_logprobs(policy: Policy, asked: Prompt, completion: Completion, temperature: float) -> Tensor:
    """The training forward's log-probs of the whole vocabulary at each place of a completion. [T, V]"""
    num = len(completion.token_ids)
    ids = torch.tensor([asked.token_ids + completion.token_ids])
    every = torch.arange(policy.vocab_size)
    zeros = torch.zeros(num * policy.vocab_size)
    batch = Batch(
        ids,
        torch.zeros(num * policy.vocab_size, dtype=torch.int64),
        (torch.arange(num) + len(asked.token_ids) - 1).repeat_interleave(policy.vocab_size),
        TokenColumns(every.repeat(num), zeros, zeros, zeros, zeros),
        problem_ids=("p",),
    )
    with torch.no_grad():
        return policy.logprobs(batch, temperature).view(num, -1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 5}])
def test_log_probs_are_the_training_forwards_up_to_what_is_stated(name: str, changes: dict[str, Any]) -> None:
    policy, sampling = random_policy(), Sampling(max_new_tokens=10, **changes)
    gaps = []
    for p, group in zip(PROMPTS, opened(name, policy).sample(PROMPTS, num=4, sampling=sampling, seed=1), strict=True):
        for c in group:
            every = trained_logprobs(policy, p, c, sampling.temperature)
            own = every.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
            gaps.append((own - torch.tensor(c.logprobs)).abs())
    worst = torch.cat(gaps).max().item()
    assert worst <= CASES[name].tolerance
    if CASES[name].tolerance > 1e-4:
        assert worst > 1e-2  # else it states what it has not


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_entropies_are_the_training_forwards_where_they_are_asked_for(name: str, changes: dict[str, Any]) -> None:
    """Those before the filters; asking for them changes no draw, and not asked for they are gone again."""
    policy, sampling = random_policy(), Sampling(max_new_tokens=10, **changes)
    policy.eos_ids = tuple(range(0, 40))
    engine = opened(name, policy, 60)
    asked = sampling.model_copy(update={"entropy": True})
    plain = engine.sample(PROMPTS, num=4, sampling=sampling, seed=1)
    found = engine.sample(PROMPTS, num=4, sampling=asked, seed=1)
    assert not any(c.entropies for group in plain for c in group)
    assert engine.sample(PROMPTS, num=4, sampling=sampling, seed=1) == plain
    assert tokens(found) == tokens(plain)
    for p, group in zip(PROMPTS, found, strict=True):
        for c in group:
            every = trained_logprobs(policy, p, c, sampling.temperature or 1.0)
            wanted = -(every.exp() * every).sum(-1)
            gap = (torch.tensor(c.entropies) - wanted).abs().max()
            assert len(c.entropies) == len(c.token_ids)
            assert gap.item() <= CASES[name].tolerance


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_likeliest(name: str) -> None:
    policy = random_policy()
    greedy = Sampling(max_new_tokens=10, temperature=0)
    for p, group in zip(PROMPTS, opened(name, policy).sample(PROMPTS, num=2, sampling=greedy, seed=1), strict=True):
        assert group[0] == group[1]
        every = trained_logprobs(policy, p, group[0], 1.0)
        own = every.gather(-1, torch.tensor(group[0].token_ids)[:, None]).squeeze(-1)
        assert (every.max(-1).values - own).max().item() <= 2 * CASES[name].tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_changed_adapter_is_seen_once_it_is_synced(name: str) -> None:
    """And not before, by an engine that has to be sent it."""
    policy = random_policy()
    engine = opened(name, policy)
    before = engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    with torch.no_grad():
        for parameter in policy.trained().values():
            parameter.mul_(1.5)
    if CASES[name].own_weights:
        assert engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1) == before
    engine.sync(policy)
    after = engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert tokens(after) != tokens(before)
    assert after == opened(name, policy).sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)


@pytest.mark.parametrize("name", CASES)
def test_sampling_and_syncing_leave_the_policy_alone(name: str) -> None:
    policy = random_policy()
    before = {key: value.clone() for key, value in policy.base.state_dict().items()}
    engine = opened(name, policy)
    engine.sample(PROMPTS, num=2, sampling=SAMPLING, seed=1)
    engine.sync(policy)
    assert all(torch.equal(value, before[key]) for key, value in policy.base.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.base.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_rehearsal_chooses_no_token(name: str) -> None:
    policy = random_policy()
    engine = opened(name, policy, 60)
    engine.rehearse(PROMPTS, num=3, sampling=SAMPLING)
    assert engine.wave_tokens == 60
    fresh = opened(name, policy, 60).sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1) == fresh


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_made_of_nothing(name: str) -> None:
    assert opened(name, random_policy()).sample([], num=3, sampling=SAMPLING, seed=1) == []


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_greedy_decoding_equals_the_librarys_generate(family: str) -> None:
    policy = random_policy(family)
    greedy = Sampling(max_new_tokens=12, temperature=0)
    found = HfEngine(policy).sample(PROMPTS, num=1, sampling=greedy, seed=0)
    for p, group in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([p.token_ids])
        made = policy.base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert group[0].token_ids == tuple(made[0, len(p.token_ids) :].tolist())


def test_every_end_token_of_the_generation_config_counts() -> None:
    base = random_policy().base
    base.generation_config.eos_token_id = [5, 9]
    assert Policy(base, random_policy().tokenizer).eos_ids == (5, 9, 257)


def test_noise_is_the_same_for_every_length_and_device() -> None:
    assert torch.equal(noise(3, 1, 2, 10), noise(3, 1, 2, 100)[:10])
    assert not torch.equal(noise(3, 1, 2, 10), noise(3, 1, 3, 10))


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 40,000 draws of 8 tokens: 7 degrees of freedom, so above 24.3 once in a thousand."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 0.2])
    count = 40_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logprob = draw(logits.expand(count, -1), uniform, Sampling(temperature=0.8))
    wanted = (logits / 0.8).softmax(-1)
    torch.testing.assert_close(logprob, wanted.log()[token], atol=1e-5, rtol=0)
    seen = torch.bincount(token, minlength=8)
    assert float(((seen - count * wanted) ** 2 / (count * wanted)).sum()) < 24.3


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for u in (0.0, 0.4999999, 0.5, 0.75, 1 - 2**-53):
        token, _ = draw(logits, torch.tensor([u], dtype=torch.float64), Sampling())
        assert token.item() in (0, 2)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.31}, [0, 1]),
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.1}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_filters(settings: dict[str, float], kept: list[int]) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05."""
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert filtered(probs, Sampling(**settings)).nonzero()[:, 1].tolist() == kept


def test_log_probs_are_those_before_the_filters() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    _, logprob = draw(logits, torch.tensor([0.9], dtype=torch.float64), Sampling(top_k=1))
    assert logprob.item() == pytest.approx(torch.tensor(0.5).log().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("probs", "settings", "expected"),
    [
        ([0.5, 0.3, 0.2], {}, 1.029653),
        ([0.5, 0.3, 0.2], {"top_k": 1, "top_p": 0.5, "min_p": 0.9}, 1.029653),
        ([0.5, 0.3, 0.2], {"temperature": 0}, 1.029653),
        ([0.5, 0.3, 0.2], {"temperature": 0.5}, 0.853584),  # of 25/38, 9/38 and 4/38
        ([0.25] * 4, {"temperature": 0.1}, 1.386294),
        ([0.5, 0.0, 0.5], {}, 0.693147),
        ([0.0, 1.0], {}, 0.0),
    ],
)
def test_entropies_of_known_distributions(probs: list[float], settings: dict[str, float], expected: float) -> None:
    found = entropy(torch.tensor([probs]).log(), Sampling(**settings))
    assert found.tolist() == pytest.approx([expected], abs=1e-5)


def test_entropies_of_more_logits_than_a_tile_holds() -> None:
    logits = torch.randn(5, DRAW_TILE // 2, generator=torch.Generator().manual_seed(0))
    logprobs = logits.double().log_softmax(-1)
    wanted = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(entropy(logits, Sampling()).double(), wanted, atol=1e-4, rtol=0)


def test_greedy_log_probs_are_those_at_temperature_1() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    token, logprob = draw(logits, torch.tensor([0.9], dtype=torch.float64), Sampling(temperature=0))
    assert (token.item(), round(logprob.exp().item(), 6)) == (0, 0.5)
