"""The sampler: right tokens, right log-probs, the same draws however they are batched. Contracts run over the table."""

from __future__ import annotations

import pytest
import torch

from shoestring.samplers import SAMPLERS, Sampling
from shoestring.samplers.draw import draw, filtered, noise
from shoestring.samplers.hf import HfEngine
from shoestring.types import Completion
from tiny import FAMILIES, prompt, random_policy

PROMPTS = [prompt(4, 0), prompt(9, 1), prompt(6, 2)]
SAMPLING = Sampling(max_new_tokens=10)


def tokens(groups: list[tuple[Completion, ...]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in groups]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_repeats_and_another_does_not(name: str) -> None:
    engine = SAMPLERS[name]().open(random_policy())
    first = engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert first == engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert tokens(first) != tokens(engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=2))
    assert len(first) == 3
    assert all(len(group) == 3 for group in first)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("wave_tokens", [1, 40, 60, 10_000])
def test_waves_choose_no_token(name: str, wave_tokens: int) -> None:
    policy = random_policy()
    whole = SAMPLERS[name]().open(policy).sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    waves = SAMPLERS[name]().open(policy, wave_tokens).sample(PROMPTS, num=3, sampling=SAMPLING, seed=1)
    assert tokens(whole) == tokens(waves)
    for a, b in zip((c for g in whole for c in g), (c for g in waves for c in g), strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("wave_tokens", [1, 40, 10_000])
def test_what_is_told_of_finished_groups_is_what_is_returned(name: str, wave_tokens: int) -> None:
    """A sampler need not tell of a group, but if it does, the last word counts."""
    told: dict[int, tuple[Completion, ...]] = {}
    engine = SAMPLERS[name]().open(random_policy(), wave_tokens)
    found = engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1, first=5, done=told.__setitem__)
    assert all(group == found[place] for place, group in told.items())
    assert found == engine.sample(PROMPTS, num=3, sampling=SAMPLING, seed=1, first=5)
    assert name != "hf" or told.keys() == {0, 1, 2}


@pytest.mark.parametrize("name", SAMPLERS)
def test_stops_and_limits(name: str) -> None:
    """A completion ends with an end token or at the limit, to which a forced prefix counts."""
    policy = random_policy()
    policy.eos_ids = tuple(range(0, 60))  # so that many rows end early, each at its own time
    forced = [prompt(5, 3), prompt(5, 4, prefix=4), prompt(7, 5, prefix=9)]
    found = SAMPLERS[name]().open(policy).sample(forced, num=8, sampling=SAMPLING, seed=3)
    for p, group in zip(forced, found, strict=True):
        limit = max(10 - len(p.prefix), 1)
        for c in group:
            assert len(c.token_ids) == len(c.logprobs) <= limit
            assert (c.token_ids[-1] in policy.eos_ids) == (c.stop == "end")
            assert not any(token in policy.eos_ids for token in c.token_ids[:-1])
            assert c.stop == "end" or len(c.token_ids) == limit


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_that_leave_early_change_no_other(name: str) -> None:
    """Draws up to the first end token are those of the same model without any end token."""
    policy = random_policy()
    free = SAMPLERS[name]().open(policy).sample(PROMPTS, num=6, sampling=SAMPLING, seed=5)
    policy.eos_ids = tuple(range(0, 40))
    stopped = SAMPLERS[name]().open(policy).sample(PROMPTS, num=6, sampling=SAMPLING, seed=5)
    assert any(c.stop == "end" for group in stopped for c in group)
    for a, b in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        assert a.token_ids[: len(b.token_ids)] == b.token_ids


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
    from shoestring.policy import Policy

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


def test_greedy_log_probs_are_those_at_temperature_1() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    token, logprob = draw(logits, torch.tensor([0.9], dtype=torch.float64), Sampling(temperature=0))
    assert (token.item(), round(logprob.exp().item(), 6)) == (0, 0.5)
