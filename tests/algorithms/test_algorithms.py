"""Credit assignment: the worked numbers of GRPO, S-GRPO, T-SPMO and the entropy filter, what must hold for any group,
and the contract of every entry of the table."""

import dataclasses
from collections import defaultdict
from itertools import product

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from batches import collate
from shoestring.algorithms import ALGORITHMS
from shoestring.algorithms.t_spmo import distinct_pairs
from shoestring.config.settings import pick
from shoestring.errors import ConfigError
from shoestring.objectives.base import Tokens
from shoestring.objectives.loss import Objective, l2_loss, objective_loss
from shoestring.objectives.ppo import policy_loss
from shoestring.types import Completion, Group, Problem, Prompt, Score

EOS = 0
REWARDS = (1.0, 0.0, 0.0, 1.0)


def make_group(completions, rewards, truncated=()):
    """A group of token sequences (a string counts as one token a letter), of which those at `truncated` were cut
    off. A token's entropy follows from its id."""
    ids = [tuple(map(ord, c)) if isinstance(c, str) else tuple(c) for c in completions]
    return Group(
        Prompt(Problem("p", "", ""), (1, 2, 3), 3),
        tuple(
            Completion(
                c,
                (-1.0,) * len(c),
                "length" if i in truncated else "end",
                entropies=tuple(token * 37 % 101 / 100 for token in c),
            )
            for i, c in enumerate(ids)
        ),
        tuple(Score(reward) for reward in rewards),
    )


def with_entropies(*rows, rewards=REWARDS, truncated=()):
    """Completions whose tokens have these entropies."""
    group = of_lengths(*map(len, rows), rewards=rewards, truncated=truncated)
    completions = [
        dataclasses.replace(completion, entropies=tuple(row))
        for completion, row in zip(group.completions, rows, strict=True)
    ]
    return dataclasses.replace(group, completions=tuple(completions))


def of_lengths(*lengths, rewards=REWARDS, truncated=()):
    """Completions of these lengths with tokens that differ everywhere."""
    return make_group([range(100 * i, 100 * i + n) for i, n in enumerate(lengths, 1)], rewards, truncated)


def credit(group, name, seed=0, **settings):
    return ALGORITHMS[name](**settings).credit(group, torch.Generator().manual_seed(seed))


def places(credit):
    return list(zip(credit.row.tolist(), credit.col.tolist(), strict=True))


def by_row(credit, values):
    """The distinct values on each row that has any."""
    found = defaultdict(set)
    for row, value in zip(credit.row.tolist(), values.tolist(), strict=True):
        found[row].add(round(value, 7))
    return [sorted(found[row]) for row in sorted(found)]


def gradients(credit):
    """d(loss)/d(log-prob) at each place, with ratio 1."""
    logprob = torch.full_like(credit.advantage, -1.5, requires_grad=True)
    loss, _ = policy_loss(logprob, logprob.detach(), credit.advantage, 0.2, 0.2)
    (credit.weight * loss).sum().backward()
    return dict(zip(places(credit), logprob.grad.tolist(), strict=True))


no_deadline = hypothesis.settings(deadline=None)


def near(value):
    return pytest.approx(value, abs=1e-5)


# --- GRPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eps": 1e-6}, 0.866024),
        ({"eps": 1e-4}, 0.865875),
        ({"advantage": "centred", "loss_agg": "token_sum_norm", "norm_length": 8}, 0.5),  # Dr. GRPO
    ],
)
def test_grpo_gives_every_token_the_advantage_of_its_completion(settings, expected):
    found = credit(of_lengths(2, 4, 1, 3), "grpo", **settings)
    assert places(found) == [(row, col) for row, length in enumerate((2, 4, 1, 3)) for col in range(length)]
    signs = {0: 1, 1: -1, 2: -1, 3: 1}
    assert found.advantage.tolist() == near([expected * signs[row] for row in found.row.tolist()])


@pytest.mark.parametrize(("num", "expected"), [(2, 0.707107), (8, 2.474874)])
def test_one_success_has_sample_deviation_advantage(num, expected):
    """(G - 1) / sqrt(G)"""
    found = credit(of_lengths(*[1] * num, rewards=[1.0] + [0.0] * (num - 1)), "grpo")
    assert found.advantage[0].item() == near(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_agg": "seq_mean_token_mean"}, -0.075777),
        ({"loss_agg": "token_mean"}, 0.216506),
        ({"loss_agg": "seq_mean_token_sum"}, 0.649518),
        ({"loss_agg": "token_sum_norm", "norm_length": 8}, 0.081190),
    ],
    ids=lambda value: value.get("loss_agg") if isinstance(value, dict) else "",
)
def test_aggregations(settings, expected):
    """Two rows with advantages +-0.866024 and given ratios, from credit through the batch to the loss."""
    ratio = {101: 1.0, 102: 1.3, 201: 0.7, 202: 1.1, 203: 1.0, 204: 0.5}
    group = make_group([[101, 102], [201, 202, 203, 204]], [1.0, 0.0])
    algorithm = ALGORITHMS["grpo"](**settings)
    found = algorithm.credit(group, torch.Generator())
    found = dataclasses.replace(found, advantage=found.advantage.sign() * 0.866024)
    (batch,) = collate([group], [found], normalise=algorithm.normalise)
    logprob = torch.tensor([ratio[token] for token in batch.target.tolist()]).log()
    objective = Objective(beta=0.0, clip_low=0.2, clip_high=0.2, updates=1, l2=0.0)
    tokens = Tokens(logprob, torch.zeros(6), None, batch.row)
    assert objective_loss(tokens, batch.columns, objective)[0].item() == near(expected)


@pytest.mark.parametrize(("clip_high", "expected"), [(0.2, -1.039229), (0.28, -1.108511)])
def test_clip_higher(clip_high, expected):
    loss, _ = policy_loss(torch.tensor([1.3]).log(), torch.zeros(1), torch.tensor([0.866024]), 0.2, clip_high)
    assert loss.item() == near(expected)


@pytest.mark.parametrize("settings", [{"loss_agg": "token_sum_norm"}, {"norm_length": 8}])
def test_norm_length_belongs_to_token_sum_norm(settings):
    with pytest.raises(ConfigError, match="norm_length"):
        pick(ALGORITHMS, "algorithm", {"name": "grpo"} | settings)


# --- S-GRPO ---------------------------------------------------------------------------------------------------------


def test_s_grpo_selection_example():
    uniform = torch.tensor([0.0, 0.0, 0.0, 0.7, 0.2, 0.9, 0.4, 0.1, 0.3, 0.6])
    selected = ALGORITHMS["s-grpo"](alpha=3, k=5, p=0.5).select_row(uniform)
    assert selected.nonzero().flatten().tolist() == [0, 1, 2, 4, 6]


def test_s_grpo_expected_size():
    """Exact: the mean over all 2^7 equally likely outcomes of the places behind alpha."""
    algorithm = ALGORITHMS["s-grpo"](alpha=3, k=5, p=0.5)
    outcomes = [torch.tensor((0.0,) * 3 + tail) for tail in product((0.25, 0.75), repeat=7)]
    sizes = [int(algorithm.select_row(outcome).sum()) for outcome in outcomes]
    assert sum(sizes) / len(sizes) == near(4.929688)


def test_s_grpo_mean_size_of_drawn_selections():
    """Within five standard errors: one size deviates by less than 0.3."""
    group = of_lengths(*[10] * 4000, rewards=[0.0] * 4000)
    found = credit(group, "s-grpo", alpha=3, k=5, p=0.5)
    assert len(found.row) / 4000 == pytest.approx(4.929688, abs=5 * 0.3 / 4000**0.5)


@no_deadline
@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=20), st.data())
def test_s_grpo_selection_is_the_sequential_rule(uniform, data):
    k = data.draw(st.integers(1, 22), "k")
    alpha = data.draw(st.integers(0, k), "alpha")
    p = data.draw(st.floats(0, 1), "p")
    expected, count = [], 0
    for t, u in enumerate(uniform):
        selected = t < alpha or (count < k and u < p)
        expected.append(selected)
        count += selected
    algorithm = ALGORITHMS["s-grpo"](alpha=alpha, k=k, p=p)
    assert algorithm.select_row(torch.tensor(uniform, dtype=torch.float64)).tolist() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"alpha": 4, "k": 4, "p": 1.0}, [0, 1, 2, 3]),  # alpha takes the whole budget
        ({"alpha": 2, "k": 9, "p": 0.0}, [0, 1]),
        ({"alpha": 0, "k": 3, "p": 1.0}, [0, 1, 2]),
        ({"alpha": 0, "k": 3, "p": 0.0}, []),
        ({"alpha": 8, "k": 9, "p": 0.0}, [0, 1, 2, 3, 4, 5]),  # a completion of at most alpha tokens
    ],
)
def test_s_grpo_selection_at_its_limits(settings, expected):
    found = credit(of_lengths(6, 6, rewards=[1.0, 0.0]), "s-grpo", **settings)
    assert found.col[found.row == 0].tolist() == expected


def test_s_grpo_gradient_example():
    """Of four completions the first has T = {0, 1, 2, 4, 6}, the second both of its tokens."""
    algorithm = ALGORITHMS["s-grpo"](alpha=3, k=5, p=0.5)
    group = of_lengths(10, 2, 0, 1)
    draws = (algorithm.credit(group, torch.Generator().manual_seed(seed)) for seed in range(1000))
    found = next(draw for draw in draws if draw.col[draw.row == 0].tolist() == [0, 1, 2, 4, 6])
    expected = {(0, t): -0.043301 for t in (0, 1, 2, 4, 6)} | {(1, t): 0.108253 for t in (0, 1)}
    assert gradients(found) == near(expected | {(3, 0): -0.866024 / 4})


@pytest.mark.parametrize("everything", [{"alpha": 50, "k": 50, "p": 0.0}, {"alpha": 0, "k": 50, "p": 1.0}])
@pytest.mark.parametrize("extra", [{}, {"mask_truncated": True}, {"advantage": "centred"}, {"eps": 1e-4}])
@pytest.mark.parametrize("lengths", [(7, 3, 12, 1), (5, 0, 50, 2)])
def test_s_grpo_that_selects_everything_is_grpo(everything, extra, lengths):
    group = of_lengths(*lengths, rewards=(0.2, 1.0, 0.0, 0.7), truncated=(2,))
    ours, theirs = credit(group, "s-grpo", **everything, **extra), credit(group, "grpo", **extra)
    for name in ("row", "col", "advantage", "weight"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.kl_weight is None
    assert theirs.kl_weight is None


def test_s_grpo_kl_scope_all_spreads_the_kl_over_every_token():
    """The policy's part stays as it is; each token has GRPO's share of the KL term."""
    group, settings = of_lengths(9, 5, 0, 7), {"alpha": 2, "k": 4, "p": 0.5}
    narrow = credit(group, "s-grpo", **settings)
    wide = credit(group, "s-grpo", kl_scope="all", **settings)
    full = credit(group, "grpo")
    assert places(wide) == places(full)
    assert torch.equal(wide.kl_weight, full.weight)
    acting = wide.weight != 0
    assert [place for place, on in zip(places(wide), acting.tolist(), strict=True) if on] == places(narrow)
    assert torch.equal(wide.weight[acting], narrow.weight)
    assert torch.equal(wide.advantage[acting], narrow.advantage)
    assert not wide.advantage[~acting].any()


def test_s_grpo_draws_anew_for_each_row_and_seed():
    group, settings = of_lengths(60, 60, rewards=[1.0, 0.0]), {"alpha": 0, "k": 60, "p": 0.5}
    first, second = (credit(group, "s-grpo", seed, **settings) for seed in (1, 2))
    assert first.col[first.row == 0].tolist() != first.col[first.row == 1].tolist()
    assert places(first) != places(second)


def test_s_grpo_refuses_alpha_beyond_k():
    with pytest.raises(ConfigError, match="alpha at most k"):
        pick(ALGORITHMS, "algorithm", {"name": "s-grpo", "alpha": 5, "k": 4})


# --- the entropy filter ---------------------------------------------------------------------------------------------

SPREADS = ([1.5, 0.1, 1.3], [0.2, 0.4], [], [0.6, 0.5, 0.9, 0.0, 0.8])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 0), (0, 2)]),  # 0.2 of ten tokens; two completions have none
        ({"fraction": 0.4}, [(0, 0), (0, 2), (3, 2), (3, 4)]),
        ({"fraction": 0.46}, [(0, 0), (0, 2), (3, 0), (3, 2), (3, 4)]),  # 4.6 are 5
        ({"fraction": 0.01}, [(0, 0)]),
        ({"k": 1}, [(0, 0), (1, 1), (3, 2)]),
        ({"k": 2}, [(0, 0), (0, 2), (1, 0), (1, 1), (3, 2), (3, 4)]),
    ],
)
def test_entropy_filter_selection_example(settings, expected):
    assert places(credit(with_entropies(*SPREADS), "entropy-filter", **settings)) == expected


def test_entropy_filter_credit_example():
    """Each selected token has its completion's advantage, and a share of its completion's quarter."""
    found = credit(with_entropies(*SPREADS), "entropy-filter", fraction=0.46)
    assert by_row(found, found.advantage) == [[near(0.866024)], [near(0.866024)]]
    assert found.weight.tolist() == near([1 / 8] * 2 + [1 / 12] * 3)
    assert found.kl_weight is None


@pytest.mark.parametrize("settings", [{"fraction": 0.5}, {"k": 2}])
def test_entropy_filter_takes_the_earlier_of_equals(settings):
    group = with_entropies([0.7] * 4, [0.7] * 2, rewards=[1.0, 0.0])
    expected = {"fraction": [(0, 0), (0, 1), (0, 2)], "k": [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert places(credit(group, "entropy-filter", **settings)) == expected[next(iter(settings))]


def test_entropy_filter_does_not_count_completions_that_are_left_out():
    """Of the ten tokens the five of the last completion stay, and 0.4 of these are two."""
    group = with_entropies(*SPREADS, truncated=(0, 1))
    found = credit(group, "entropy-filter", fraction=0.4, mask_truncated=True)
    assert places(found) == [(3, 2), (3, 4)]
    assert found.weight.tolist() == near([1 / 8] * 2)
    everything = with_entropies(*SPREADS, truncated=range(4))
    assert not places(credit(everything, "entropy-filter", mask_truncated=True))


@pytest.mark.parametrize("everything", [{"fraction": 1.0}, {"k": 90}])
@pytest.mark.parametrize("extra", [{}, {"mask_truncated": True}, {"advantage": "centred"}, {"eps": 1e-4}])
@pytest.mark.parametrize("lengths", [(7, 3, 12, 1), (5, 0, 50, 2)])
def test_entropy_filter_that_selects_everything_is_grpo(everything, extra, lengths):
    group = of_lengths(*lengths, rewards=(0.2, 1.0, 0.0, 0.7), truncated=(2,))
    ours, theirs = credit(group, "entropy-filter", **everything, **extra), credit(group, "grpo", **extra)
    for name in ("row", "col", "advantage", "weight"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@no_deadline
@given(st.lists(st.lists(st.sampled_from([0.0, 0.3, 0.3000001, 1.2]), max_size=6), min_size=2, max_size=5), st.data())
def test_entropy_filter_selects_the_highest(rows, data):
    """No token that is left out has a higher entropy than one that is in."""
    k = data.draw(st.none() | st.integers(1, 7), "k")
    settings = {"fraction": data.draw(st.floats(0.01, 1), "fraction")} if k is None else {"k": k}
    group = with_entropies(*rows, rewards=[0.0] * len(rows))
    chosen = set(places(credit(group, "entropy-filter", **settings)))
    every = {(row, col): value for row, values in enumerate(rows) for col, value in enumerate(values)}
    for row in range(len(rows)) if k else [None]:
        here = {place: value for place, value in every.items() if row in (None, place[0])}
        inside = [value for place, value in here.items() if place in chosen]
        outside = [value for place, value in here.items() if place not in chosen]
        assert max(outside, default=0.0) <= min(inside, default=1.2)
        count = min(k, len(here)) if k else max(round(settings["fraction"] * len(here)), min(len(here), 1))
        assert len(inside) == count


def test_entropy_filter_takes_a_fraction_or_a_number():
    both = {"name": "entropy-filter", "fraction": 0.2, "k": 8}
    with pytest.raises(
        ConfigError, match=r"algorithm\.fraction is 0\.2 and algorithm\.k is 8; .*; write one of the two"
    ):
        pick(ALGORITHMS, "algorithm", both)
    with pytest.raises(ConfigError, match=r"algorithm\.fraction is None and algorithm\.k is None"):
        pick(ALGORITHMS, "algorithm", {"name": "entropy-filter", "fraction": None})
    given_k = ALGORITHMS["entropy-filter"](k=8)
    assert (given_k.fraction, given_k.k) == (None, 8)
    assert ALGORITHMS["entropy-filter"](**given_k.model_dump(exclude_none=True)) == given_k


def test_entropy_filter_refuses_completions_without_entropies():
    bare = with_entropies([0.5, 0.2], [0.1], rewards=[1.0, 0.0])
    bare = dataclasses.replace(
        bare, completions=(bare.completions[0], dataclasses.replace(bare.completions[1], entropies=()))
    )
    with pytest.raises(ConfigError, match=r"0 entropies for 1 tokens; .* selects tokens by them; use sampler\.name"):
        credit(bare, "entropy-filter")


# --- edge cases of GRPO and S-GRPO ----------------------------------------------------------------------------------

both = pytest.mark.parametrize("name", ["grpo", "s-grpo"])


@both
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ConfigError, match="a group of one has no mean"):
        credit(of_lengths(4, rewards=[1.0]), name)


@both
def test_an_empty_completion_counts_in_the_mean_and_in_g(name):
    found = credit(of_lengths(2, 0, 1, 4), name)
    assert sorted(set(found.row.tolist())) == [0, 2, 3]
    assert by_row(found, found.weight) == [[near(1 / 8)], [near(1 / 4)], [near(1 / 16)]]
    assert by_row(found, found.advantage) == [[near(0.866024)], [near(-0.866024)], [near(0.866024)]]


@both
def test_a_completion_of_only_the_end_token_is_an_ordinary_row(name):
    found = credit(make_group([[EOS], [5, 6, EOS]], [1.0, 0.0]), name)
    assert places(found)[0] == (0, 0)
    assert found.weight.tolist() == near([1 / 2] + [1 / 6] * 3)
    assert found.advantage.tolist() == near([0.707106] + [-0.707106] * 3)


@both
def test_masked_truncated_rows_still_count_in_the_statistics(name):
    group = of_lengths(2, 5, 3, 4, truncated=(1, 3))
    plain, masked = credit(group, name), credit(group, name, mask_truncated=True)
    stays = (plain.row == 0) | (plain.row == 2)
    assert places(masked) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert torch.equal(masked.advantage, plain.advantage[stays])
    assert torch.equal(masked.weight, plain.weight[stays])


@both
def test_truncated_rows_train_by_default(name):
    assert credit(of_lengths(2, 5, 3, 4, truncated=(0, 1, 2, 3)), name).row.unique().tolist() == [0, 1, 2, 3]


@both
def test_identical_completions_are_told_apart_by_their_rewards(name):
    found = credit(make_group(["ab"] * 4, REWARDS), name)
    assert by_row(found, found.advantage) == [[near(s * 0.866024)] for s in (1, -1, -1, 1)]


# --- T-SPMO ---------------------------------------------------------------------------------------------------------

EXAMPLE = make_group(["abc", "abd", "aec", "f"], [1.0, 0.0, 1.0, 0.0])


def named_pairs(group):
    """Advantage and branching flag of each pair by its spelling, prefix and token."""
    spelt = {}
    for pair in distinct_pairs(group):
        ids = group.completions[pair.row].token_ids[: pair.col + 1]
        assert ids not in spelt
        spelt[ids] = (pair.advantage, pair.branching)
    return spelt


def test_t_spmo_advantages_example():
    pairs = {"".join(map(chr, ids)): pair for ids, pair in named_pairs(EXAMPLE).items()}
    expected = {"a": 1 / 6, "f": -1 / 2, "ab": -1 / 6, "ae": 1 / 3, "abc": 1 / 2, "abd": -1 / 2, "aec": 0.0}
    assert {name: advantage for name, (advantage, _) in pairs.items()} == near(expected)
    assert {name for name, (_, branching) in pairs.items() if not branching} == {"aec"}


def test_t_spmo_baseline_is_a_mean_over_rows_not_over_children():
    """With a mean over the two children of `a` its value would be 0.75, and `ab` would get -0.25."""
    advantage, _ = named_pairs(EXAMPLE)[tuple(map(ord, "ab"))]
    assert advantage == near(-0.166667)


@pytest.mark.parametrize(("u_count", "counted", "at_c"), [("all", 7, -0.071429), ("branching", 6, -0.083333)])
def test_t_spmo_gradient_example(u_count, counted, at_c):
    found = credit(EXAMPLE, "t-spmo", u_count=u_count)
    assert found.weight.tolist() == near([1 / counted] * 6)
    assert gradients(found)[0, 2] == near(at_c)
    assert set(places(found)) == {(0, 0), (0, 1), (0, 2), (1, 2), (2, 1), (3, 0)}


def test_t_spmo_row_sums_example():
    pairs = named_pairs(EXAMPLE)
    sums = [sum(pairs[c.token_ids[: t + 1]][0] for t in range(len(c.token_ids))) for c in EXAMPLE.completions]
    assert sums == near([0.5, -0.5, 0.5, -0.5])


def test_t_spmo_regulariser_example():
    theta = torch.tensor([0.1, -0.2], requires_grad=True)
    loss = l2_loss([theta], 0.01)
    loss.backward()
    assert loss.item() == near(0.0005)
    assert theta.grad.tolist() == near([0.002, -0.004])


groups_of_few_tokens = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=5), st.sampled_from([0.0, 1.0, 0.1, 0.3, -0.4])),
    min_size=1,
    max_size=8,
).map(lambda rows: make_group([ids for ids, _ in rows], [reward for _, reward in rows]))


def starting_with(group, prefix):
    """Rewards of the completions that start so."""
    return [
        score.value
        for completion, score in zip(group.completions, group.scores, strict=True)
        if completion.token_ids[: len(prefix)] == prefix
    ]


def mean(values):
    return sum(values) / len(values)


@no_deadline
@given(groups_of_few_tokens)
def test_t_spmo_pairs_are_the_definition_written_out(group):
    expected = {}
    for completion in group.completions:
        for t in range(len(completion.token_ids)):
            pair, prefix = completion.token_ids[: t + 1], completion.token_ids[:t]
            here, before = starting_with(group, pair), starting_with(group, prefix)
            expected[pair] = (pytest.approx(mean(here) - mean(before), abs=1e-12), len(here) < len(before))
    assert named_pairs(group) == expected


@no_deadline
@given(groups_of_few_tokens)
def test_t_spmo_stands_at_the_first_row_that_holds_a_pair(group):
    for row, col, _, _ in distinct_pairs(group):
        ids = group.completions[row].token_ids[: col + 1]
        assert not any(c.token_ids[: col + 1] == ids for c in group.completions[:row])


@no_deadline
@given(groups_of_few_tokens)
def test_t_spmo_pair_that_does_not_branch_has_advantage_zero(group):
    assert all(pair.advantage == 0.0 for pair in distinct_pairs(group) if not pair.branching)


def test_t_spmo_shared_start_has_advantage_zero_where_rewards_cancel():
    """0.1 + 0.2 - 0.3 is 0 or not as it is summed; the mean at `a` and the mean over all must be the same number."""
    advantage, branching = named_pairs(make_group(["ab", "ac", "ad"], [0.1, 0.2, -0.3]))[(ord("a"),)]
    assert (advantage, branching) == (0.0, False)


@no_deadline
@given(groups_of_few_tokens)
def test_t_spmo_advantages_sum_to_zero_where_every_completion_continues(group):
    """sum over v of n(p, v) A(v|p) = 0"""
    sums = defaultdict(float)
    for pair, (advantage, _) in named_pairs(group).items():
        sums[pair[:-1]] += len(starting_with(group, pair)) * advantage
    ended = {completion.token_ids for completion in group.completions}
    assert {prefix: total for prefix, total in sums.items() if prefix not in ended} == {
        prefix: pytest.approx(0.0, abs=1e-12) for prefix in sums if prefix not in ended
    }


@no_deadline
@given(groups_of_few_tokens)
def test_t_spmo_advantages_telescope_along_a_path_of_its_own(group):
    """Their sum along completion i is R_i - mean(R), where no other completion runs through its end."""
    pairs = named_pairs(group)
    for completion, score in zip(group.completions, group.scores, strict=True):
        ids = completion.token_ids
        if len(starting_with(group, ids)) == 1:
            total = sum(pairs[ids[: t + 1]][0] for t in range(len(ids)))
            assert total == pytest.approx(score.value - mean(starting_with(group, ())), abs=1e-12)


@pytest.mark.parametrize("u_count", ["all", "branching"])
@no_deadline
@given(groups_of_few_tokens)
def test_t_spmo_credit_is_the_pairs_that_act(u_count, group):
    found = credit(group, "t-spmo", u_count=u_count)
    pairs = distinct_pairs(group)
    assert places(found) == [(pair.row, pair.col) for pair in pairs if pair.advantage != 0]
    assert found.advantage.tolist() == near([pair.advantage for pair in pairs if pair.advantage != 0])
    counted = len(pairs) if u_count == "all" else sum(pair.branching for pair in pairs)
    assert found.weight.tolist() == near([1 / counted] * len(found.weight) if counted else [])


@pytest.mark.parametrize(
    "group",
    [
        make_group(["abc"], [1.0]),
        make_group(["abc"] * 4, REWARDS),
        make_group(["", ""], [1.0, 0.0]),
    ],
    ids=["group of one", "identical completions", "only empty completions"],
)
def test_t_spmo_without_branching_has_no_credit(group):
    assert len(credit(group, "t-spmo").row) == 0
    assert len(credit(group, "t-spmo", u_count="branching").row) == 0


def test_t_spmo_end_of_a_truncated_row_makes_a_single_child_matter():
    group = make_group(["a", "ab"], [0.0, 1.0], truncated=(0,))
    found = credit(group, "t-spmo", u_count="branching")
    assert (places(found), found.advantage.tolist(), found.weight.tolist()) == ([(1, 1)], [0.5], [1.0])


def test_t_spmo_empty_completion_counts_at_the_root():
    assert named_pairs(make_group(["a", "a", ""], [1.0, 1.0, 0.0])) == {(ord("a"),): (near(1 / 3), True)}


def test_t_spmo_end_token_is_a_child():
    found = credit(make_group([[EOS], [5, EOS]], [1.0, 0.0]), "t-spmo")
    assert places(found) == [(0, 0), (1, 0)]
    assert found.advantage.tolist() == near([0.5, -0.5])
    assert found.weight.tolist() == near([1 / 3, 1 / 3])


@pytest.mark.parametrize("replay_from", ["success", "failure", "both"])
def test_t_spmo_replay_is_off_unless_asked_for(replay_from):
    assert ALGORITHMS["t-spmo"]().replay is None
    asked = ALGORITHMS["t-spmo"](replay_from=replay_from, replay_fraction=0.25, replay_completions=6)
    assert asked.replay == (replay_from, 0.25, 6, "uniform")


# --- the contract: every entry of the table -------------------------------------------------------------------------

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
every_group = pytest.mark.parametrize(
    "group",
    [
        of_lengths(3, 90, 70, 1),
        of_lengths(4, 0, 0, 2, rewards=(0.1, 0.2, 0.3, 0.3)),
        of_lengths(5, 80, rewards=(-1.0, 2.5), truncated=(1,)),
        of_lengths(0, 0, rewards=(1.0, 0.0)),
        make_group([[EOS], [EOS], [7, EOS]], (0.0, 1.0, 1.0)),
        make_group(["abc"] * 4, REWARDS),
        EXAMPLE,
    ],
    ids=["long", "empty rows", "truncated", "all empty", "only the end", "identical", "trie"],
)


@every_algorithm
@every_group
def test_contract_credit_names_tokens_of_the_group_once(name, group):
    found = credit(group, name)
    lengths = [len(completion.token_ids) for completion in group.completions]
    assert found.row.dtype == found.col.dtype == torch.int64
    assert all(0 <= row < len(lengths) and 0 <= col < lengths[row] for row, col in places(found))
    assert len(set(places(found))) == len(found.row)


@every_algorithm
@every_group
def test_contract_weights_are_finite_and_not_negative(name, group):
    found = credit(group, name)
    assert found.advantage.shape == found.row.shape
    assert found.advantage.isfinite().all()
    for weight in (found.weight, found.weight if found.kl_weight is None else found.kl_weight):
        assert weight.shape == found.row.shape
        assert bool((weight.isfinite() & (weight >= 0)).all())


@every_algorithm
@every_group
def test_contract_same_seed_gives_the_same_credit(name, group):
    first, second = (credit(group, name, seed=7) for _ in range(2))
    for field in dataclasses.fields(first):
        one, other = (getattr(found, field.name) for found in (first, second))
        assert one is other is None or torch.equal(one, other), field.name


@every_algorithm
@every_group
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.7, 1 / 3])
def test_contract_equal_rewards_give_exactly_zero(name, group, value):
    """Also where the mean of equal rewards rounds: three times 0.1 makes 0.30000000000000004."""
    equal = dataclasses.replace(group, scores=(Score(value),) * len(group.scores))
    assert not credit(equal, name).advantage.any()


@every_algorithm
def test_contract_credit_leaves_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    credit(of_lengths(3, 90, 70, 1), name)
    assert torch.equal(torch.get_rng_state(), before)


@every_algorithm
def test_contract_settings(name):
    algorithm = ALGORITHMS[name]()
    assert algorithm.name == name
    assert algorithm.normalise in {"groups", "tokens"}
    assert algorithm.least_completions >= 1
    assert algorithm.replay is None or 0 < algorithm.replay.fraction <= 1
    assert algorithm.objective._fields == ("beta", "clip_low", "clip_high", "updates", "l2")
    assert pick(ALGORITHMS, "algorithm", name) == algorithm


@every_algorithm
def test_contract_settings_are_frozen_and_strict_about_names(name):
    with pytest.raises(ValidationError, match="frozen"):
        ALGORITHMS[name]().name = name
    with pytest.raises(ValidationError, match="no_such_setting"):
        ALGORITHMS[name](no_such_setting=1)
    with pytest.raises(ConfigError, match="there is no such setting"):
        pick(ALGORITHMS, "algorithm", {"name": name, "no_such_setting": 1})
