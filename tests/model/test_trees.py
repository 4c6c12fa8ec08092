"""Training over trees: log-probs and gradients of the plain rows, with everything shared run once."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from tests.model.test_policy import OBJECTIVE, close

from batches import collate
from shoestring.model.fast import layers
from shoestring.model.fast.decoder import MODELS, Decoder
from shoestring.model.policy import Policy
from shoestring.model.trees import TREE_MODELS, cost, cut_tree, pack_rows
from shoestring.training.batch import training_rows
from shoestring.training.micro_batching import micro_batches, size
from shoestring.training.update import backward, update
from shoestring.types import Batch, Completion, Credit, Group, Problem, Prompt
from tiny import prompt, random_policy

Step = tuple[list[Group], list[Credit]]


def step_of(completions: list[list[tuple[int, ...]]], prompts: list[Prompt]) -> Step:
    """Every token selected, with advantages that differ."""
    groups, credits = [], []
    for index, (p, found) in enumerate(zip(prompts, completions, strict=True)):
        row = torch.tensor([g for g, ids in enumerate(found) for _ in ids])
        col = torch.tensor([t for ids in found for t in range(len(ids))])
        advantage = torch.randn(len(row), generator=torch.Generator().manual_seed(index))
        groups.append(Group(p, tuple(Completion(ids, (-1.0,) * len(ids), "end") for ids in found), ()))
        credits.append(Credit(row, col, advantage, torch.full((len(row),), 1 / len(row))))
    return groups, credits


def plain(length: int, ids: tuple[int, ...]) -> Prompt:
    return Prompt(Problem(str(ids), "?", "1"), ids, length)


# Those of the method notes: 5 + 15 inputs packed, 35 not; completions whose last token is no input have one less.
STAR: Step = step_of([[(9, 8, 7, 6, 1), (4, 3, 2, 1), (3, 3, 3, 1), (2, 9, 1, 1, 4, 1)]], [plain(5, (1, 2, 3, 4, 5))])
TRIE: Step = step_of(
    [[(7, 8, 9, 10, 0), (7, 8, 11, 0), (12, 8, 9, 0), (7, 8, 9, 13, 14, 0)]], [plain(5, (1, 2, 3, 4, 5))]
)


def some_step(seed: int = 0, num: int = 6) -> Step:
    """Groups of several prompts; few tokens, so that completions begin alike."""
    generator = random.Random(seed)
    found = [[tuple(generator.choices(range(3), k=generator.randint(1, 9))) for _ in range(num)] for _ in range(4)]
    return step_of(found, [prompt(5 + 3 * i, i) for i in range(4)])


def test_the_worked_examples_have_as_many_nodes_as_on_paper() -> None:
    for step, nodes in ((STAR, 20), (TRIE, 15)):
        batch = pack_rows(next(cut_tree(training_rows(*step), 10**6)))
        assert batch.input_ids.shape == (1, nodes)
        (rows,) = collate(*step)
        assert sum(len(row.token_ids) for row in training_rows(*step)) == 35
        assert rows.input_ids.shape[0] == 4


def gradients(policy: Policy, batches: list[Any], beta: float = 0.0, on: bool = False) -> dict[str, torch.Tensor]:
    objective = OBJECTIVE.model_copy(update={"beta": beta})
    for parameter in policy.trained().values():
        parameter.grad = None
    for index in range(len(batches)):
        backward(policy, batches, index, [None] * len(batches), objective, 0.9, on)
    return {name: p.grad.clone() for name, p in policy.trained().items() if p.grad is not None}


def same_logprobs(policy: Policy, tree: Batch, whole: Batch) -> None:
    """In whatever order the rows stand."""
    a, b = policy.logprobs(tree, 0.9), policy.logprobs(whole, 0.9)
    torch.testing.assert_close(a.sort().values, b.sort().values, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", TREE_MODELS)
@pytest.mark.parametrize("step", [STAR, TRIE, some_step()], ids=["star", "trie", "random"])
def test_log_probs_and_gradients_are_those_of_the_rows(family: str, step: Step) -> None:
    policy = random_policy(family)  # mistral's with a window shorter than the rows
    assert policy.takes_trees
    assert policy.own_layers == (family in MODELS)
    rows = training_rows(*step)
    (tree,) = micro_batches(rows, 10**6, trees=True)
    (whole,) = micro_batches(rows, 10**6, trees=False)
    assert tree.input_ids.numel() < whole.input_ids.numel()
    same_logprobs(policy, tree, whole)
    close(gradients(policy, [tree]), gradients(policy, [whole]), 5e-5)


@pytest.mark.parametrize(
    ("step", "trees"), [(TRIE, True), (some_step(), True), (STAR, False)], ids=["trie", "random", "star"]
)
def test_attention_in_blocks_is_that_over_paths(step: Step, trees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows on a CPU: in a block for each tree where that makes fewer scores, else for each path."""
    policy = random_policy("qwen2")
    (tree,) = micro_batches(training_rows(*step), 10**6, trees=True)
    assert tree.paths is not None
    blocks = layers.blocks_of(tree.paths)
    assert blocks is not None
    assert len(blocks.nodes) == (len(step[0]) if trees else len(tree.paths.nodes))
    found, logprobs = gradients(policy, [tree]), policy.logprobs(tree, 0.9)
    monkeypatch.setattr(layers, "_SHORT", 0)
    assert layers.blocks_of(tree.paths) is None
    torch.testing.assert_close(logprobs, policy.logprobs(tree, 0.9), atol=1e-5, rtol=0)
    close(found, gradients(policy, [tree]), 1e-5)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("step", [STAR, TRIE, some_step()], ids=["star", "trie", "random"])
@pytest.mark.parametrize("on", [False, True])
def test_attention_over_unpadded_rows_is_that_over_paths(family: str, step: Step, on: bool) -> None:
    """The way of a GPU, by its plain reference."""
    policy = random_policy(family)
    (tree,) = micro_batches(training_rows(*step), 10**6, trees=True)
    logprobs, wanted = policy.logprobs(tree, 0.9), gradients(policy, [tree], on=on)
    assert not policy.decoder.flash
    policy.decoder.flash = True
    torch.testing.assert_close(policy.logprobs(tree, 0.9), logprobs, atol=1e-5, rtol=0)
    close(gradients(policy, [tree], on=on), wanted, 1e-5)


def test_unpadded_rows_of_the_worked_example() -> None:
    """Behind a prompt of 5: 7 8 9 10, 7 8 9 13 14, 7 8 11 and 12 8 9, in this order and without their last tokens."""
    batch = pack_rows(next(cut_tree(training_rows(*TRIE), 10**6)))
    assert batch.paths is not None
    rows = batch.paths.unpadded
    assert rows is not None
    assert rows.own.tolist() == [0, 9, 11, 12, 15]
    assert rows.starts.tolist() == [0, 9, 19, 27, 35]
    assert rows.copies.tolist() == [4, 4, 4, 4, 4, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1]
    assert rows.owner.tolist() == [0] * 9 + [1] * 2 + [2] + [3] * 3
    assert rows.nodes[9:19].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]


def test_a_row_like_the_one_before_it_is_no_row_of_its_own() -> None:
    same = step_of([[(7, 8, 0), (7, 8, 0), (7, 9, 0)]], [plain(3, (1, 2, 3))])
    batch = pack_rows(next(cut_tree(training_rows(*same), 10**6)))
    assert batch.paths is not None
    rows = batch.paths.unpadded
    assert rows is not None
    assert len(batch.paths.nodes) == 3
    assert rows.own.tolist() == [0, 5, 6]
    assert rows.copies.tolist() == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("modules", [["q_proj"], ["o_proj", "v_proj"], ["gate_proj", "down_proj"], "all-linear"])
@pytest.mark.parametrize("adapted", ["all", 1, (1,)])
def test_our_own_layers_are_those_of_transformers(family: str, modules: Any, adapted: Any) -> None:
    """Wherever the adapter sits; with a KL term, and with layers run again."""
    options = {"sizes": {"sliding_window": None}} if family == "mistral" else {}
    policy = random_policy(family, adapter={"modules": modules, "layers": adapted}, **options)
    (tree,) = micro_batches(training_rows(*some_step(1), beta=0.3), 10**6, trees=True)
    assert policy.own_layers
    found = {on: gradients(policy, [tree], beta=0.3, on=on) for on in (False, True)}
    logprobs = policy.logprobs(tree, 0.9)
    policy.own_layers = False
    torch.testing.assert_close(logprobs, policy.logprobs(tree, 0.9), atol=2e-5, rtol=0)
    wanted = gradients(policy, [tree], beta=0.3)
    for on in (False, True):
        close(found[on], wanted, 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_layers_add_to_the_gradients_that_are_there(dtype: torch.dtype) -> None:
    """Whether they lie joined, as they make them, or apart; a frozen matrix gets none, and any one may be the only
    trained one."""
    policy = random_policy(adapter={"modules": "all-linear"}, dtype=dtype)
    (tree,) = micro_batches(training_rows(*some_step(1)), 10**6, trees=True)
    once = gradients(policy, [tree])
    close(gradients(policy, [tree, tree]), {name: 2 * grad for name, grad in once.items()}, 1e-5)
    for parameter in policy.trained().values():
        parameter.grad = torch.ones_like(parameter)
    backward(policy, [tree], 0, [None], OBJECTIVE, 0.9, False)
    close({name: p.grad - 1 for name, p in policy.trained().items() if p.grad is not None}, once, 1e-5)
    for trained in ("layers.0.self_attn.k_proj.lora_A", "layers.1.mlp.up_proj.lora_B"):
        for name, parameter in policy.trained().items():
            parameter.requires_grad_(trained in name)
        found = gradients(policy, [tree, tree])
        assert len(found) == 1
        close(found, {name: 2 * once[name] for name in found}, 1e-5)


@pytest.mark.parametrize("max_tokens", [1, 12, 30, 47, 90])
@pytest.mark.parametrize("on", [False, True])
def test_every_cut_gives_the_same_gradient(max_tokens: int, on: bool) -> None:
    policy = random_policy()
    rows = training_rows(*some_step(3), beta=0.1)
    whole = gradients(policy, micro_batches(rows, 10**6, trees=False), beta=0.1)
    cuts = micro_batches(rows, max_tokens, trees=True)
    close(gradients(policy, cuts, beta=0.1, on=on), whole, 5e-5)
    assert all(size(cut) <= max_tokens or len(cut.problem_ids) == 1 for cut in cuts)


def test_weights_are_taken_over_once_for_all_micro_batches_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy()
    batches = micro_batches(training_rows(*some_step(3), beta=0.1), 40, trees=True)
    assert len(batches) > 2
    optimizer = torch.optim.AdamW(policy.trained().values(), lr=0.1)
    seen: list[bool] = []
    real = Decoder.sync
    policy.decoder  # noqa: B018  # has its first weights
    monkeypatch.setattr(Decoder, "sync", lambda self: seen.append(True) or real(self))
    settings: Any = {"temperature": 1.0, "max_grad_norm": 1.0, "checkpointing": False}
    objective = OBJECTIVE.model_copy(update={"beta": 0.1, "updates": 2})
    assert update(policy, optimizer, batches, objective, **settings).applied
    assert len(seen) == 2
    found = policy.logprobs(batches[0])
    assert len(seen) == 3
    policy.own_layers = False
    torch.testing.assert_close(found, policy.logprobs(batches[0]), atol=5e-5, rtol=0)


def test_cuts_are_filled_as_far_as_they_go() -> None:
    rows = training_rows(*some_step(5))
    cuts = list(cut_tree(rows, 40))
    assert sorted(map(id, rows)) == sorted(id(row) for cut in cuts for row in cut)
    for cut, following in itertools.pairwise(cuts):
        more = pack_rows([*cut, following[0]])
        assert cost(more.input_ids.numel(), more.paths.nodes.numel()) > 40  # type: ignore[union-attr]


def test_a_row_whose_tokens_are_all_another_s() -> None:
    """One completion is the beginning of another."""
    step = step_of([[(7, 8, 9, 10), (7, 8, 9), (7,), (7, 8, 9, 10)]], [plain(3, (1, 2, 3))])
    policy = random_policy()
    rows = training_rows(*step)
    (tree,) = micro_batches(rows, 10**6, trees=True)
    assert tree.input_ids.tolist() == [[1, 2, 3, 7, 8, 9]]
    (whole,) = micro_batches(rows, 10**6, trees=False)
    same_logprobs(policy, tree, whole)
    close(gradients(policy, [tree]), gradients(policy, [whole]), 5e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt2"])
def test_other_attention_takes_rows(family: str) -> None:
    assert not random_policy(family).takes_trees


def test_a_window_takes_trees_in_our_own_layers_only() -> None:
    policy = random_policy("mistral")
    policy.own_layers = False
    assert not policy.takes_trees
