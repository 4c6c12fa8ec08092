"""The fast sampler against the plain one: the same tokens and log-probs, whatever the batch; and its scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from batches import collate
from shoestring.allocator import OutOfMemory
from shoestring.errors import ConfigError
from shoestring.model.fast.decoder import MODELS, unsupported
from shoestring.model.load import ModelSettings
from shoestring.model.policy import Policy, to_device
from shoestring.run.loading import load_policy
from shoestring.samplers import SAMPLERS, Sampling
from shoestring.samplers.capture import LADDER, prompts_at_once
from shoestring.samplers.graph import GraphEngine
from shoestring.samplers.hf import HfEngine
from shoestring.types import Batch, Completion, Credit, Group, Score
from tiny import prompt, random_policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [prompt(n, i) for i, n in enumerate((4, 23, 9, 1, 14))]


def policy_of(family: str = "qwen2", **options: Any) -> Policy:
    """Heads of 16, which is as small as the kernels take them."""
    policy = random_policy(family, sizes={"hidden_size": 64, "head_dim": 16}, **options)
    (policy.adapted or policy.base).to(DEVICE)
    return policy


def flat(groups: list[tuple[Completion, ...]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def assert_same(found: list[tuple[Completion, ...]], wanted: list[tuple[Completion, ...]]) -> None:
    """The same tokens; log-probs and entropies within 1e-4."""
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert (a.token_ids, a.stop) == (b.token_ids, b.stop)
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(a.entropies), torch.tensor(b.entropies), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_it_draws_what_the_plain_sampler_draws(family: str, temperature: float) -> None:
    policy = policy_of(family)
    sampling = Sampling(max_new_tokens=20, temperature=temperature)
    wanted = HfEngine(policy).sample(PROMPTS, num=3, sampling=sampling, seed=7)
    assert_same(GraphEngine(policy).sample(PROMPTS, num=3, sampling=sampling, seed=7), wanted)


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj", "o_proj"], ["gate_proj", "down_proj"], "all-linear"])
def test_adapters_wherever_they_are(modules: Any) -> None:
    policy = policy_of(adapter={"modules": modules, "layers": (0, 2)})
    wanted = HfEngine(policy).sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=12), seed=1)
    assert_same(GraphEngine(policy).sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=12), seed=1), wanted)


def test_an_adapter_that_has_been_trained_is_seen() -> None:
    policy = policy_of()
    engine = GraphEngine(policy)
    before = engine.sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=12), seed=1)
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            if "lora_B" in name:
                parameter.mul_(-2)
    after = engine.sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=12), seed=1)
    assert after != before
    assert_same(after, HfEngine(policy).sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=12), seed=1))


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "temperature": 0.8}])
def test_filters(settings: dict[str, Any]) -> None:
    policy = policy_of()
    sampling = Sampling(max_new_tokens=10, **settings)
    wanted = HfEngine(policy).sample(PROMPTS, num=3, sampling=sampling, seed=2)
    assert_same(GraphEngine(policy).sample(PROMPTS, num=3, sampling=sampling, seed=2), wanted)


def test_two_hundred_prompts_greedily() -> None:
    """The same tokens as the plain sampler's, at least up to a place where its two best are within 1e-4."""
    policy = policy_of()
    generator = random.Random(0)
    prompts = [prompt(generator.randint(1, 30), i) for i in range(200)]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    wanted = flat(HfEngine(policy).sample(prompts, num=1, sampling=greedy, seed=0))
    found = flat(GraphEngine(policy).sample(prompts, num=1, sampling=greedy, seed=0))
    for p, a, b in zip(prompts, found, wanted, strict=True):
        if a.token_ids == b.token_ids:
            continue
        same = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y)
        ids = torch.tensor([p.token_ids + b.token_ids[:same]], device=policy.device)
        best = policy.base(ids).logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-4


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 40])
def test_completions_come_and_go(rows: int) -> None:
    """With few places, those that end make room for others; each draws what it would have drawn anyway."""
    policy = policy_of()
    policy.eos_ids = tuple(range(0, 12))
    prompts = [*PROMPTS, prompt(3, 9, prefix=6), prompt(12, 10, prefix=15)]
    sampling = Sampling(max_new_tokens=14)
    wanted = HfEngine(policy).sample(prompts, num=4, sampling=sampling, seed=3)
    engine = GraphEngine(policy, wave_tokens=rows * (27 + 14))
    lengths = {len(c.token_ids) for c in flat(wanted)}
    assert {1, 14} < lengths
    assert_same(engine.sample(prompts, num=4, sampling=sampling, seed=3), wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_entropies_as_completions_come_and_go(temperature: float) -> None:
    """With the embedded model, in a table that was made for a sampling without them and then grows; a rehearsal before
    it does no harm. They are those of the model's own logits."""
    policy = load_policy(ModelSettings(dtype="fp32"), device=DEVICE)
    sampling = Sampling(max_new_tokens=24, temperature=temperature, entropy=True)
    engine = GraphEngine(policy, wave_tokens=5 * 60)
    engine.sample(PROMPTS[:2], num=2, sampling=Sampling(max_new_tokens=4), seed=1)
    engine.rehearse(PROMPTS, num=4, sampling=sampling)
    for prompts, seed in ((PROMPTS[:3], 2), (PROMPTS, 3)):
        found = engine.sample(prompts, num=4, sampling=sampling, seed=seed)
        wanted = HfEngine(policy).sample(prompts, num=4, sampling=sampling, seed=seed)
        assert_same(found, wanted)
        for p, c in ((p, c) for p, group in zip(prompts, found, strict=True) for c in group):
            ids = torch.tensor([p.token_ids + c.token_ids[:-1]], device=policy.device)
            with torch.no_grad():
                logits = policy.base(ids).logits[0, len(p.token_ids) - 1 :].cpu()
            own = torch.distributions.Categorical(logits=logits / (temperature or 1.0)).entropy()
            torch.testing.assert_close(torch.tensor(c.entropies), own, atol=1e-4, rtol=0)


def test_groups_are_handed_over_as_they_are_complete() -> None:
    policy = policy_of()
    policy.eos_ids = tuple(range(0, 30))
    told: dict[int, tuple[Completion, ...]] = {}
    engine = GraphEngine(policy, wave_tokens=4 * 60)
    found = engine.sample(
        PROMPTS,
        num=3,
        sampling=Sampling(max_new_tokens=14),
        seed=3,
        done=lambda place, group: told.update({place: group}),
    )
    assert [told[place] for place in range(len(PROMPTS))] == found
    assert list(told) != sorted(told) or len(told) == len(PROMPTS)


def test_a_batch_larger_than_the_ladder() -> None:
    policy = policy_of()
    sampling = Sampling(max_new_tokens=2)
    prompts = [prompt(3, i % 7) for i in range(LADDER[-1] // 2 + 10)]
    found = GraphEngine(policy).sample(prompts, num=2, sampling=sampling, seed=0)
    assert_same(
        found[-2:], HfEngine(policy).sample(prompts[-2:], num=2, sampling=sampling, seed=0, first=len(prompts) - 2)
    )


def test_nothing_to_sample() -> None:
    assert GraphEngine(policy_of()).sample([], num=3, sampling=Sampling(), seed=0) == []


@pytest.mark.parametrize("family", MODELS)
def test_in_bf16_log_probs_are_no_further_off_than_the_plain_sampler_s(family: str) -> None:
    """Of those of the same tokens in fp32, which are the truth: both round, and in the mean neither by more than 1.3
    times as much as the other."""
    off = []
    for engine in (GraphEngine, HfEngine):
        policy = policy_of(family, dtype=torch.bfloat16)
        groups = engine(policy).sample(PROMPTS, num=32, sampling=Sampling(max_new_tokens=24), seed=1)
        (policy.adapted or policy.base).float()
        batch = to_device(everything(groups), policy.device)
        off.append(float((policy.logprobs(batch) - batch.sampler_logprob).abs().mean().detach()))
    assert min(off) > 1e-3
    assert max(off) <= 1.3 * min(off)


def everything(groups: list[tuple[Completion, ...]]) -> Batch:
    """All tokens of completions of `PROMPTS`, as one batch of rows."""
    made, credits = [], []
    for p, completions in zip(PROMPTS, groups, strict=True):
        row = torch.cat([torch.full((len(c.token_ids),), i) for i, c in enumerate(completions)])
        col = torch.cat([torch.arange(len(c.token_ids)) for c in completions])
        made.append(Group(p, completions, ()))
        credits.append(Credit(row, col, torch.ones(len(row)), torch.ones(len(row))))
    [batch] = collate(made, credits, max_tokens=10**9)
    return batch


def test_log_probs_are_those_of_training() -> None:
    policy = policy_of("qwen3")
    found = GraphEngine(policy).sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=9, temperature=0.8), seed=0)
    groups = [Group(p, g, (Score(0.0),) * len(g)) for p, g in zip(PROMPTS, found, strict=True)]
    for group in groups:
        row = torch.tensor([g for g, c in enumerate(group.completions) for _ in c.token_ids])
        col = torch.tensor([t for c in group.completions for t in range(len(c.token_ids))])
        ones = torch.ones(len(row))
        [batch] = collate([group], [Credit(row, col, ones, ones)])
        with torch.no_grad():
            again = policy.logprobs(to_device(batch, policy.device), 0.8)
        torch.testing.assert_close(again.cpu(), batch.sampler_logprob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma", "phi3", "olmo2"])
def test_other_models_fall_back_or_are_refused_by_name(family: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of(family)
    assert isinstance(SAMPLERS["auto"]().open(policy), HfEngine)
    assert f'"{family}"' in caplog.text
    with pytest.raises(ConfigError, match=f'models of type "{family}"'):
        SAMPLERS["graph"]().open(policy)


def test_what_else_it_does_not_know() -> None:
    policy = policy_of()
    assert unsupported(policy.base, policy.handle) == ""
    policy.base.config.hidden_act = "gelu"
    assert "gelu" in unsupported(policy.base, policy.handle)
    policy = policy_of("llama")
    policy.base.base_model.rotary_emb.rope_type = "dynamic"
    assert "dynamic" in unsupported(policy.base, policy.handle)


def test_weights_are_shared_with_the_model_and_joined_again_after_a_move() -> None:
    policy = policy_of()
    bytes_before = sum(p.nbytes for p in policy.base.parameters())
    state = {name: value.clone() for name, value in policy.base.state_dict().items()}
    engine = GraphEngine(policy)
    wanted = engine.sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=6), seed=1)
    for name, value in policy.base.state_dict().items():
        assert torch.equal(value, state[name])
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in policy.base.parameters()}
    assert sum(storages.values()) == bytes_before
    policy.base.to(torch.float64).to(torch.float32)
    assert not engine._steps.decoder.intact()
    assert_same(engine.sample(PROMPTS, num=2, sampling=Sampling(max_new_tokens=6), seed=1), wanted)
    assert engine._steps.decoder.intact()


@pytest.mark.parametrize(
    ("rows", "prompts", "num", "wanted"), [(64, 8, 8, 8), (8, 8, 8, 2), (1, 5, 4, 1), (10, 9, 1, 9)]
)
def test_prompts_at_once(rows: int, prompts: int, num: int, wanted: int) -> None:
    assert prompts_at_once(rows, prompts, num) == wanted


class TestMemoryThatRunsOut:
    def test_fewer_rows_and_no_group_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = policy_of()
        policy.eos_ids = tuple(range(0, 30))
        sampling = Sampling(max_new_tokens=10)
        wanted = HfEngine(policy).sample(PROMPTS, num=4, sampling=sampling, seed=3)
        engine = GraphEngine(policy)
        told: list[int] = []
        step, calls = engine._steps.run, [0]

        def failing(rows: Any, *rest: Any) -> None:
            calls[0] += 1
            if len(rows) > 5 and (told or calls[0] > 1):
                raise torch.OutOfMemoryError("planted")
            step(rows, *rest)

        monkeypatch.setattr(engine._steps, "run", failing)
        monkeypatch.setattr("shoestring.samplers.graph._LOOK_EVERY", 1)
        found = engine.sample(PROMPTS, num=4, sampling=sampling, seed=3, done=lambda place, _: told.append(place))
        assert_same(found, wanted)
        assert sorted(told) == list(range(len(PROMPTS)))
        assert engine.wave_tokens == 5 * (23 + 10)

    def test_not_even_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = GraphEngine(policy_of())

        def failing(*_: Any) -> None:
            raise torch.OutOfMemoryError("planted")

        monkeypatch.setattr(engine._steps, "run", failing)
        with pytest.raises(OutOfMemory, match="one completion of 33 tokens"):
            engine.sample(PROMPTS, num=4, sampling=Sampling(max_new_tokens=10), seed=3)


def test_a_rehearsal_takes_what_sampling_takes() -> None:
    engine = GraphEngine(policy_of())
    engine.rehearse(PROMPTS, num=3, sampling=Sampling(max_new_tokens=10))
    wanted = HfEngine(engine._policy).sample(PROMPTS, num=3, sampling=Sampling(max_new_tokens=10), seed=1)
    assert_same(engine.sample(PROMPTS, num=3, sampling=Sampling(max_new_tokens=10), seed=1), wanted)


def test_short_and_long_samplings_share_a_table() -> None:
    """An evaluation between two steps: other prompts, other limits, greedy."""
    policy = policy_of()
    engine = GraphEngine(policy)
    long, short = Sampling(max_new_tokens=18), Sampling(max_new_tokens=5, temperature=0)
    for sampling, num in ((long, 3), (short, 1), (long, 2), (short, 4)):
        wanted = HfEngine(policy).sample(PROMPTS, num=num, sampling=sampling, seed=6)
        assert_same(engine.sample(PROMPTS, num=num, sampling=sampling, seed=6), wanted)
