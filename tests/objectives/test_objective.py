"""From credit to the loss: the token losses, the micro-batches, and the prefixes that replay chooses."""

import dataclasses
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import collate
from shoestring.algorithms.base import Replay
from shoestring.curricula import replay
from shoestring.objectives import TERMS
from shoestring.objectives.base import Tokens
from shoestring.objectives.k3 import k3
from shoestring.objectives.loss import Objective, l2_loss, objective_loss
from shoestring.objectives.ppo import policy_loss
from shoestring.training.batch import cut_rows, pad_rows, single_rows
from shoestring.types import Batch, Completion, Credit, Group, Problem, Prompt, Row, Score, TokenColumns, has_signal

END = 99


def near(value):
    return pytest.approx(value, abs=1e-5)


# --- the loss of a token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratios", "losses", "clipped"),
    [
        (0.866024, [1.0, 1.3], [-0.866024, -1.039229], [False, True]),
        (-0.866024, [0.7, 1.1, 1.0, 0.5], [0.692819, 0.952626, 0.866024, 0.692819], [True, False, False, True]),
        (0.0, [0.5, 1.0, 1.5], [0.0, 0.0, 0.0], [False, False, False]),
        (0.866024, [0.5], [-0.433012], [False]),  # a good token that became rare is free to come back
        (-0.866024, [5.0], [4.330120], [False]),  # there is no second clip of bad tokens
    ],
)
def test_policy_loss_and_where_its_gradient_is_zero(advantage, ratios, losses, clipped):
    logprob = torch.tensor(ratios).log().requires_grad_()
    found, held = policy_loss(logprob, torch.zeros(len(ratios)), torch.full((len(ratios),), advantage), 0.2, 0.2)
    assert found.tolist() == near(losses)
    assert held.tolist() == clipped
    found.sum().backward()
    free = [0.0 if off else -advantage * ratio for off, ratio in zip(clipped, ratios, strict=True)]
    assert logprob.grad.tolist() == near(free)


def test_ratio_one_has_the_gradient_of_the_policy():
    """Where both arms of the maximum are equal no part of the gradient is lost."""
    logprob = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.5])
    policy_loss(logprob, logprob.detach(), advantage, 0.2, 0.2)[0].sum().backward()
    assert torch.equal(logprob.grad, -advantage)


@pytest.mark.parametrize(("d", "expected"), [(0.1, 0.005171), (-0.1, 0.004837), (0.0, 0.0)])
def test_k3(d, expected):
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0 + d])).item() == near(expected)


@settings(deadline=None)
@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative(logprob, reference):
    assert k3(torch.tensor([logprob]), torch.tensor([reference])).item() >= 0


def test_k3_pulls_towards_the_reference():
    """d(k3)/d(logprob) = 1 - exp(d)"""
    logprob = torch.tensor([-1.0, -1.0], requires_grad=True)
    k3(logprob, torch.tensor([-0.9, -1.1])).sum().backward()
    assert logprob.grad.tolist() == near([-0.105171, 0.095163])


@pytest.mark.parametrize("logprob", [0.0, -50.0, -1e4, -1e30])
@pytest.mark.parametrize("other", [0.0, -50.0, -1e4, -1e30])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_extreme_log_ratios_stay_finite(logprob, other, advantage):
    value, other = torch.tensor([logprob], requires_grad=True), torch.tensor([other])
    pg, _ = policy_loss(value, other, torch.tensor([advantage]), 0.2, 0.2)
    loss = pg + 0.04 * k3(value, other)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ppo", "k3"])
def test_the_gradient_is_that_of_finite_differences(name):
    """In float64, for good and bad tokens on both sides of the clips."""
    logprob = torch.tensor([0.5, 0.9, 1.1, 1.5] * 2, dtype=torch.float64).log() - 1
    fixed = torch.full((8,), -1.0, dtype=torch.float64)
    advantage = torch.tensor([1.0, 0.5, 2.0, 1.0, -1.0, -0.5, -2.0, -1.0], dtype=torch.float64)
    columns = TokenColumns(torch.zeros(8).long(), advantage, advantage.abs(), advantage.abs(), fixed)

    def total(logprob):
        loss, _ = TERMS[name]().loss(Tokens(logprob, fixed, fixed, torch.zeros(8).long()), columns)
        return (columns.weight * loss).sum()

    [found] = torch.autograd.grad(total(logprob.requires_grad_()), logprob)
    with torch.no_grad():
        steps = 1e-6 * torch.eye(8, dtype=torch.float64)
        slopes = [(total(logprob + step) - total(logprob - step)) / 2e-6 for step in steps]
    torch.testing.assert_close(found, torch.stack(slopes), atol=1e-8, rtol=0)


def test_l2_loss_is_a_sum_over_all_weights():
    parameters = [torch.tensor([[0.1], [-0.2]], requires_grad=True), torch.tensor([0.3], requires_grad=True)]
    loss = l2_loss(parameters, 0.01)
    loss.backward()
    assert loss.item() == near(0.01 * 0.14)
    assert parameters[0].grad.flatten().tolist() == near([0.002, -0.004])
    assert parameters[1].grad.tolist() == near([0.006])


# --- the loss of a batch --------------------------------------------------------------------------------------------


def batch_of(advantage, weight, kl_weight):
    num = len(advantage)
    return Batch(
        torch.zeros(1, num, dtype=torch.int64),
        torch.zeros(num, dtype=torch.int64),
        torch.arange(num),
        TokenColumns(
            torch.zeros(num, dtype=torch.int64),
            torch.tensor(advantage),
            torch.tensor(weight),
            torch.tensor(kl_weight),
            torch.zeros(num),
        ),
        ("p",),
    )


def objective(beta=0.0):
    return Objective(beta=beta, clip_low=0.2, clip_high=0.2, updates=1, l2=0.0)


def test_objective_loss_is_the_weighted_sum():
    batch = batch_of([0.866024, -0.866024, 0.866024], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125])
    tokens = Tokens(torch.tensor([1.0, 0.7, 1.3]).log(), torch.zeros(3), None, batch.row)
    loss, metrics = objective_loss(tokens, batch.columns, objective())
    assert loss.item() == near(-0.5 * 0.866024 + 0.25 * 0.692819 - 0.125 * 1.039229)
    assert metrics.keys() == {"loss", "clip_fraction"}
    assert metrics["clip_fraction"].total.item() == 2


def test_objective_loss_adds_beta_times_the_kl():
    """Over the KL weights, which need not be the policy's: here the second token counts for the KL alone."""
    logprob = torch.tensor([-1.0, -1.0], requires_grad=True)
    batch = batch_of([2.0, 0.0], [0.5, 0.0], [0.25, 0.75])
    reference = torch.tensor([-0.9, -1.1])
    tokens = Tokens(logprob, logprob.detach(), reference, batch.row)
    loss, metrics = objective_loss(tokens, batch.columns, objective(beta=0.04))
    kl = 0.25 * 0.005171 + 0.75 * 0.004837
    assert metrics["kl"].total.item() == near(kl)
    assert not metrics["kl"].total.requires_grad
    assert loss.item() == near(-1.0 + 0.04 * kl)
    loss.backward()
    assert logprob.grad.tolist() == near([-1.0 - 0.04 * 0.25 * 0.105171, 0.04 * 0.75 * 0.095163])


def test_objective_loss_of_a_reference_that_is_the_policy_is_the_policy_part():
    logprob = torch.tensor([-1.0, -3.0])
    batch = batch_of([1.0, -1.0], [0.5, 0.5], [0.5, 0.5])
    tokens = Tokens(logprob, logprob, logprob.clone(), batch.row)
    without, _ = objective_loss(tokens, batch.columns, objective())
    assert objective_loss(tokens, batch.columns, objective(beta=0.04))[0] == without


# --- micro-batches --------------------------------------------------------------------------------------------------


def make_group(name, prompt, completions, rewards=None):
    """Tokens are positive, so that a 0 in a batch is padding; a log-prob is the token over -100."""
    rewards = rewards if rewards is not None else [0.0] * len(completions)
    return Group(
        Prompt(Problem(name, "", ""), tuple(prompt), len(prompt)),
        tuple(Completion(tuple(c), tuple(-t / 100 for t in c), "end") for c in completions),
        tuple(Score(reward) for reward in rewards),
    )


def make_credit(*places, kl=False):
    """From (row, col, advantage, weight[, KL weight])."""
    columns = list(zip(*places, strict=True)) if places else [()] * 4
    row, col = (torch.tensor(values, dtype=torch.int64) for values in columns[:2])
    return Credit(row, col, *(torch.tensor(values, dtype=torch.float32) for values in columns[2:]))


def batch_places(batches):
    """How often each (problem, input up to the place, target, sampler log-prob, advantage, weights) stands in them."""
    return Counter(
        (
            batch.problem_ids[row],
            tuple(batch.input_ids[row, : col + 1].tolist()),
            *(getattr(batch, name)[n].item() for name in WHAT),
        )
        for batch in batches
        for n, (row, col) in enumerate(zip(batch.row.tolist(), batch.col.tolist(), strict=True))
    )


WHAT = ("target", "sampler_logprob", "advantage", "weight", "kl_weight")
FIRST = make_group("first", [11, 12, 13], [[21, 22, 23, 24], [31, 32]])
SECOND = make_group("second", [14, 15], [[41, 42, 43], [51]])
FIRST_CREDIT = make_credit((0, 0, 0.5, 0.25), (0, 2, -0.5, 0.25), (1, 1, 1.0, 0.5))
SECOND_CREDIT = make_credit((0, 0, -1.0, 1.0), (1, 0, 0.0, 1.0))


def test_collate_points_at_the_input_before_the_token():
    (batch,) = collate([FIRST, SECOND], [FIRST_CREDIT, SECOND_CREDIT])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [11, 12, 13, 31, 0], [14, 15, 0, 0, 0]]
    assert batch.row.tolist() == [0, 0, 1, 2]
    assert batch.col.tolist() == [2, 4, 3, 1]
    assert batch.target.tolist() == [21, 23, 32, 41]
    assert batch.advantage.tolist() == [0.5, -0.5, 1.0, -1.0]
    assert batch.weight.tolist() == batch.kl_weight.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert batch.sampler_logprob.tolist() == near([-0.21, -0.23, -0.32, -0.41])
    assert batch.problem_ids == ("first", "first", "second")


def test_collate_runs_nothing_behind_the_last_selected_token():
    """Neither that token itself: it is a target and no input."""
    (batch,) = collate([FIRST], [make_credit((0, 1, 1.0, 1.0), (1, 0, 1.0, 1.0))])
    assert batch.input_ids.tolist() == [[11, 12, 13, 21], [11, 12, 13, 0]]


@pytest.mark.parametrize(("normalise", "divisor"), [("groups", 3), ("tokens", 7)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_collate_divides_by_all_groups_or_all_selected_tokens(normalise, divisor, beta):
    """Groups without signal, and places that are left out, count too."""
    dead = make_credit((0, 0, 0.0, 1.0), (1, 0, 0.0, 1.0))
    credits = [FIRST_CREDIT, SECOND_CREDIT, dead]
    (batch,) = collate([FIRST, SECOND, FIRST], credits, normalise=normalise, beta=beta)
    acts = batch.advantage != 0
    assert batch.weight[acts].tolist() == near([weight / divisor for weight in (0.25, 0.25, 0.5, 1.0)])
    assert batch.weight[~acts].tolist() == near([1 / divisor] * (3 if beta else 0))
    assert torch.equal(batch.weight, batch.kl_weight)


def test_collate_leaves_out_places_without_effect_only_when_beta_is_zero():
    groups, credits = [FIRST, SECOND], [make_credit((0, 0, 0.5, 0.25), (0, 3, 0.0, 0.25)), SECOND_CREDIT]
    (without,) = collate(groups, credits, beta=0.0)
    assert without.target.tolist() == [21, 41]
    assert without.input_ids.tolist() == [[11, 12, 13], [14, 15, 0]]
    (with_kl,) = collate(groups, credits, beta=0.04)
    assert with_kl.target.tolist() == [21, 24, 41, 51]
    assert with_kl.input_ids.shape == (3, 6)


def test_collate_takes_the_kl_weights_of_the_credit():
    """A place with KL weight alone is kept when beta asks for it, and one with neither never is."""
    credit = make_credit((0, 0, 1.0, 0.5, 0.25), (0, 1, 0.0, 0.0, 0.25), (0, 2, 0.0, 0.0, 0.0))
    (batch,) = collate([FIRST, SECOND], [credit, make_credit()], beta=0.04)
    assert batch.target.tolist() == [21, 22]
    assert batch.weight.tolist() == [0.25, 0.0]
    assert batch.kl_weight.tolist() == [0.125, 0.125]


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_collate_of_nothing_is_no_batch(beta):
    assert collate([], [], beta=beta) == []
    assert collate([FIRST], [make_credit()], beta=beta) == []
    assert collate([FIRST], [make_credit()], normalise="tokens", beta=beta) == []


def test_collate_wants_a_credit_for_each_group():
    with pytest.raises(ValueError, match="zip"):
        collate([FIRST, SECOND], [FIRST_CREDIT])


def test_has_signal():
    assert has_signal(FIRST_CREDIT)
    assert not has_signal(make_credit((0, 0, 0.0, 1.0)))
    assert not has_signal(make_credit())


@st.composite
def steps(draw):
    """Groups with prompts and completions of any length and credit on some of their tokens."""
    groups, credits, token = [], [], iter(range(1, 10**6))
    for number in range(draw(st.integers(1, 3))):
        prompt = [next(token) for _ in range(draw(st.integers(1, 4)))]
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
        groups.append(make_group(f"p{number}", prompt, [[next(token) for _ in range(n)] for n in lengths]))
        every = [(row, col) for row, length in enumerate(lengths) for col in range(length)]
        chosen = draw(st.lists(st.sampled_from(every), unique=True)) if every else []
        values = st.sampled_from([-1.0, 0.0, 0.5])
        credits.append(make_credit(*((*place, draw(values), draw(st.sampled_from([0.25, 1.0]))) for place in chosen)))
    return groups, credits


@settings(deadline=None)
@given(steps(), st.integers(1, 40), st.sampled_from(["groups", "tokens"]), st.sampled_from([0.0, 0.04]))
def test_any_cut_holds_the_same_places(step, max_tokens, normalise, beta):
    groups, credits = step
    cut = collate(groups, credits, normalise=normalise, beta=beta, max_tokens=max_tokens)
    whole = collate(groups, credits, normalise=normalise, beta=beta, max_tokens=10**6)
    assert len(whole) <= 1
    assert batch_places(cut) == batch_places(whole)
    assert batch_places(single_rows(cut)) == batch_places(whole)
    divisor = len(groups) if normalise == "groups" else max(sum(len(credit.row) for credit in credits), 1)
    total = sum(
        credit.weight[torch.full_like(credit.row, bool(beta), dtype=torch.bool) | (credit.advantage != 0)].sum()
        for credit in credits
    )
    assert sum(batch.weight.sum().item() for batch in cut) == near(float(total) / divisor)


@settings(deadline=None)
@given(steps(), st.integers(1, 40))
def test_batches_are_sorted_and_keep_to_the_limit(step, max_tokens):
    batches = collate(*step, max_tokens=max_tokens)
    lengths = [(row != 0).sum().item() for batch in batches for row in batch.input_ids]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        assert batch.input_ids.shape[0] == len(batch.problem_ids)
        assert batch.input_ids.numel() <= max_tokens or batch.input_ids.shape[0] == 1
        assert batch.input_ids.shape[1] == (batch.input_ids[0] != 0).sum()
        # Every row ends at a selected place, and no place lies in the padding.
        last = [batch.col[batch.row == row].max().item() for row in range(len(batch.problem_ids))]
        assert last == [(row != 0).sum().item() - 1 for row in batch.input_ids]


@settings(deadline=None)
@given(steps(), st.integers(1, 40))
def test_single_rows_are_the_rows_of_the_batches(step, max_tokens):
    batches = collate(*step, max_tokens=max_tokens)
    singles = list(single_rows(batches))
    assert [single.problem_ids for single in singles] == [(name,) for batch in batches for name in batch.problem_ids]
    assert all(single.input_ids.shape[0] == 1 and not single.row.any() for single in singles)
    for name in ("col", *WHAT):
        parts = [[getattr(batch, name) for batch in found] for found in (batches, singles)]
        assert not batches or torch.equal(*(torch.cat(part) for part in parts)), name


def row_of(length):
    one = torch.ones(1)
    columns = TokenColumns(torch.tensor([7]), one, one, one, one)
    return Row("p", tuple(range(1, length + 1)), torch.tensor([length - 1]), columns)


def test_cut_rows_fills_each_batch_as_far_as_it_goes():
    cuts = cut_rows([row_of(n) for n in (20, 5, 5, 4, 3, 2)], max_tokens=15)
    assert [[len(row.token_ids) for row in cut] for cut in cuts] == [[20], [5, 5, 4], [3, 2]]


def test_pad_rows_pads_on_the_right():
    assert pad_rows([row_of(3), row_of(1)]).input_ids.tolist() == [[1, 2, 3], [1, 0, 0]]


# --- replay ---------------------------------------------------------------------------------------------------------

BEST, WORST = (61, 62, 63, 64, END), (71, 72, 73, END)
MIXED = make_group("mixed", [11, 12], [BEST, WORST, [81, 82, END]], [1.0, 0.0, 0.5])
FLAT = make_group("flat", [13], [BEST, WORST], [0.5, 0.5])


def choose(source, groups=(MIXED,), num_prompts=100, seed=0, fraction=1.0, cut="uniform"):
    return replay.choose(Replay(source, fraction, None, cut), groups, num_prompts, Random(seed))


@pytest.mark.parametrize(("source", "given"), [("success", {BEST}), ("failure", {WORST}), ("both", {BEST, WORST})])
def test_replay_takes_every_proper_prefix_of_the_best_or_worst(source, given):
    """Of the cuts that come up: at least one token, and never the last one, which may be the end token."""
    found = {prompt.prefix for seed in range(200) for prompt in choose(source, seed=seed)}
    assert found == {ids[:at] for ids in given for at in range(1, len(ids))}


def test_replay_cut_in_the_middle():
    assert {prompt.prefix for prompt in choose("both", cut="half")} == {BEST[:2], WORST[:2]}


def test_replay_picks_among_equally_good_completions():
    group = make_group("tie", [11], [BEST, WORST, [81, 82]], [1.0, 1.0, 0.0])
    found = {prompt.prefix[0] for seed in range(50) for prompt in choose("success", [group], seed=seed)}
    assert found == {61, 71}


def test_replay_only_of_groups_whose_rewards_differ():
    assert choose("both", [FLAT]) == []
    assert {prompt.problem.id for prompt in choose("both", [FLAT, MIXED, FLAT])} == {"mixed"}


@pytest.mark.parametrize(("fraction", "num_prompts", "expected"), [(0.5, 4, 2), (0.5, 5, 2), (1.0, 3, 3), (0.2, 4, 0)])
def test_replay_respects_its_fraction(fraction, num_prompts, expected):
    assert len(choose("both", [MIXED] * 10, num_prompts, fraction=fraction)) == expected


def test_replay_gives_every_group_a_chance():
    """Where there is room for one, it is not always the first."""
    groups = [make_group(name, [11], [BEST, WORST], [1.0, 0.0]) for name in "abc"]
    chosen = [choose("success", groups, num_prompts=1, seed=seed) for seed in range(50)]
    assert {prompt.problem.id for prompts in chosen for prompt in prompts} == {"a", "b", "c"}


def test_replay_gives_what_there_is():
    assert len(choose("both", [MIXED], 100)) == 2
    assert choose("both", [], 100) == []


def test_replay_keeps_the_question_and_where_the_answer_starts():
    for prompt in choose("both"):
        assert (prompt.problem, prompt.answer_start) == (MIXED.prompt.problem, 2)
        assert prompt.token_ids[:2] == (11, 12)


def test_replay_of_a_replayed_prompt_goes_on_with_its_prefix():
    """The answer is prefix and completion together, and a cut may lie in either."""
    group = dataclasses.replace(MIXED, prompt=Prompt(MIXED.prompt.problem, (11, 12, 91, 92), 2))
    found = [prompt for seed in range(200) for prompt in choose("success", [group], seed=seed)]
    answer = (91, 92, *BEST)
    assert {prompt.prefix for prompt in found} == {answer[:at] for at in range(1, len(answer))}
    assert {prompt.token_ids[: prompt.answer_start] for prompt in found} == {(11, 12)}


@pytest.mark.parametrize("cut", ["uniform", "half"])
@pytest.mark.parametrize("completion", [[], [END]])
def test_replay_passes_over_answers_too_short_to_cut(completion, cut):
    group = make_group("short", [11], [completion, WORST], [1.0, 0.0])
    assert choose("success", [group], cut=cut) == []
    assert len(choose("both", [group], cut=cut)) == 1


def test_no_replay():
    assert replay.choose(None, [MIXED], 100, Random(0)) == []


def test_replay_is_decided_by_its_random_numbers():
    first, again, other = (choose("both", [MIXED] * 8, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
