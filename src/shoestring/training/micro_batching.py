"""Training a step in pieces that fit: a phase that runs out of memory is undone, and done again in smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shoestring.allocator import OutOfMemory, is_out_of_memory, shrinking
from shoestring.config.run import RunConfig
from shoestring.config.sizes import size_text
from shoestring.model.adapter import AdapterState, Handle
from shoestring.model.policy import Policy
from shoestring.model.sampling import Sampling
from shoestring.model.trees import cost, cut_tree, pack_rows
from shoestring.optimizers.base import load_state, set_learning_rate, state_of
from shoestring.training.batch import cut_rows, mini_batches, pad_rows, training_rows
from shoestring.training.update import UPDATES, UpdateReport, backward, build_optimizer
from shoestring.types import Batch, Credit, Group, Prompt, Row, TokenColumns, Trunk

T = TypeVar("T")

# Trained weights and optimizer state above this are not copied before a step: an error inside the optimizer's own step
# is then final.
_COPIED = 2**30


class HalfAStep(OutOfMemory):
    """Weights that an optimizer's step has changed in part, with no copy to go back to: not to be saved."""


@dataclass
class Snapshot:
    """Trained weights and optimizer state as they were, on the host; empty where they are too large to copy, or where
    memory cannot run out once they change."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    begun: list[bool] = field(default_factory=list)
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _state: dict[str, Tensor] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)
    handle: Handle | None = None
    _moving: AdapterState | None = None

    @classmethod
    @contextmanager
    def taken(cls, policy: Policy, optimizer: torch.optim.Optimizer, *, copied: bool) -> Iterator[Snapshot]:
        """For optimizer steps, each behind a backward pass; `copied` unless they take no memory."""
        parameters = policy.trained()
        own = cls(parameters, optimizer, handle=policy.handle)
        if copied:
            state, values = state_of(optimizer, parameters)
            if sum(t.nbytes for t in (*parameters.values(), *state.values())) <= _COPIED:
                own._weights, own._state, own._values = _on_host(parameters), _on_host(state), values
                if policy.handle is not None:
                    moving = policy.handle.moving()
                    own._moving = AdapterState(_on_host(moving.tensors), dict(moving.values))
        handle = optimizer.register_step_pre_hook(lambda *_: own.begun.append(True))
        try:
            yield own
        finally:
            handle.remove()

    def restore(self) -> None:
        """Puts everything back; raises `OutOfMemory` if an optimizer step has begun and there is no copy."""
        self.optimizer.zero_grad(set_to_none=True)
        if not self.begun:
            return
        if not self._weights:
            raise HalfAStep(
                "memory ran out in the optimizer's step",
                "no copy is kept to go back to, for it is thought to take no memory, or weights and state are above "
                f"{size_text(_COPIED)}",
                'go on from the last checkpoint with more memory, or start a run with optim.name = "adamw-cpu"',
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self._weights[name])
        if self.handle is not None and self._moving is not None:
            self.handle.load_moving(self._moving)
        load_state(self.optimizer, self.parameters, self._state, self._values)
        self.begun.clear()


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; those from a GPU are on their way, in the order of its stream."""
    pinned = any(tensor.is_cuda for tensor in tensors.values())
    made = {name: torch.empty_like(tensor, device="cpu", pin_memory=pinned) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        made[name].copy_(tensor.detach(), non_blocking=True)
    return made


def train_in_pieces(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    credits: Sequence[Credit],
    config: RunConfig,
    pieces: Pieces,
    seed: int,
) -> tuple[UpdateReport, list[Batch]]:
    """Do one update from these completions, in micro-batches of `pieces.micro_batch_tokens`, which is lowered if they
    do not fit. Every size gives the same gradient up to rounding, for the mini-batches do not depend on it."""
    objective = config.objective
    rows = training_rows(groups, credits, normalise=config.algorithm.normalise, beta=objective.beta)
    shares = mini_batches(rows, objective.mini_batches, seed)
    cut = cache(partial(cut_shares, shares, trees=policy.takes_trees))
    batches = cut(pieces.micro_batch_tokens)
    if not batches:  # without signal there is nothing to learn from, and the step is a fact to report
        return UpdateReport(), batches
    longest = max(len(row.token_ids) for row in rows)
    most = sum(size(batch) for batch in batches)
    copied = objective.updates * len(shares) > 1 or not config.optim.takes_no_memory(optimizer)
    with Snapshot.taken(policy, optimizer, copied=copied) as before:

        def attempt(max_tokens: int) -> tuple[UpdateReport, list[Batch]]:
            torch.manual_seed(seed)  # rounding by chance draws from torch's own generators
            used = batches if len(batches) == 1 and most <= max_tokens else cut(max_tokens)
            return UPDATES[objective.update](
                policy,
                optimizer,
                used,
                objective,
                temperature=config.sampling.temperature,
                max_grad_norm=config.optim.max_grad_norm,
                checkpointing=pieces.checkpointing,
            ), used

        return _fitted(attempt, pieces, longest, most, before.restore)


def rehearse(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    prompt: Prompt,
    config: RunConfig,
    pieces: Pieces,
    trunk_layer: int | None = None,
) -> torch.optim.Optimizer | None:
    """An optimizer step, and the largest micro-batch that a step can have forward and backward: it takes all the memory
    that training takes, and changes no weight, no state and no random number.

    An optimizer that has no state yet is left alone: a throw-away one takes the step, and is returned. Keep it while
    sampling is rehearsed, which has to fit next to its state.
    """
    parameters = policy.trained()
    spare = None if optimizer.state else Spare(parameters, config)

    def attempt(max_tokens: int) -> None:
        if spare:
            spare.step()
        batch = worst_batch(prompt, config, max_tokens, policy, trunk_layer)
        if len(batch.problem_ids) < config.sampling.num_prompts * config.sampling.num_completions:
            for parameter in parameters.values():  # as from the micro-batches before
                parameter.grad = torch.zeros_like(parameter)
        backward(policy, [batch], 0, [None], config.objective, config.sampling.temperature, pieces.checkpointing)
        policy.drop_gradients()

    def undo() -> None:
        policy.drop_gradients()
        if spare:
            spare.undo()

    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        longest = len(prompt.token_ids) + config.sampling.max_new_tokens - 1
        _fitted(attempt, pieces, longest, config.sampling.num_prompts * config.sampling.num_completions * longest, undo)
    return spare.optimizer if spare else None


class Spare:
    """A throw-away optimizer of the trained weights, which stay as they are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: RunConfig):
        self._parameters, self._config = parameters, config
        self._weights: dict[str, Tensor] = {}
        self.optimizer = build_optimizer(parameters, config.optim)

    def step(self) -> None:
        """One step of rate 0 along a gradient that is nowhere 0."""
        self._weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = torch.full_like(parameter, 1e-3)
        set_learning_rate(self.optimizer, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._put_back()

    def undo(self) -> None:
        """Put the weights back and drop the state."""
        self._put_back()
        self.optimizer = build_optimizer(self._parameters, self._config.optim)

    def _put_back(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._parameters[name].copy_(weight)
        self._weights = {}


def worst_batch(
    prompt: Prompt, config: RunConfig, max_tokens: int, policy: Policy, trunk_layer: int | None = None
) -> Batch:
    """Full-length rows behind the longest prompt, every token selected, as many as `max_tokens` allow; no two begin
    alike behind it. With `trunk_layer`, the residual stream of all of the step's rows is there."""
    sampling = config.sampling
    count = sampling.max_new_tokens
    trunks = _empty_trunks(policy, prompt, sampling) if trunk_layer is not None else []
    each = torch.full((count,), 1.0 / count)

    def row(place: int) -> Row:
        ids = (torch.arange(count) + place) % policy.vocab_size
        return Row(
            problem_id="rehearsal",
            token_ids=prompt.token_ids + tuple(ids[: count - 1].tolist()),
            col=torch.arange(count) + len(prompt.token_ids) - 1,
            columns=TokenColumns(ids, torch.ones(count), each, each, torch.zeros(count)),
            group=place // sampling.num_completions,
            prompt_tokens=len(prompt.token_ids),
            trunk=trunks[place] if trunks else None,
        )

    rows = [row(place) for place in range(sampling.num_prompts * sampling.num_completions)]
    return micro_batches(rows, max_tokens, trees=policy.takes_trees)[0]


def _empty_trunks(policy: Policy, prompt: Prompt, sampling: Sampling) -> list[Trunk]:
    """A step's, with nothing in them."""
    num = sampling.num_completions
    weight: Any = policy.base.get_input_embeddings().weight
    own = weight.new_zeros(sampling.most_prompts * num, sampling.max_new_tokens, weight.shape[1])
    prompts = [weight.new_zeros(len(prompt.token_ids), weight.shape[1]) for _ in range(sampling.most_prompts)]
    return [Trunk(prompts[place // num], own[place]) for place in range(len(own))]


def micro_batches(rows: Sequence[Row], max_tokens: int, *, trees: bool) -> list[Batch]:
    """Cut so that each takes no more memory than `max_tokens` padded tokens. With `trees`, what rows of a group share
    is run once."""
    if trees:
        made = [pack_rows(cut) for cut in cut_tree(rows, max_tokens)]
    else:
        ordered = sorted(rows, key=lambda row: -len(row.token_ids))
        made = [pad_rows(cut) for cut in cut_rows(ordered, max_tokens)]
    # No row is cut: terms of the objective sum over a row's tokens.
    assert sum(len(batch.problem_ids) for batch in made) == len(rows)
    return made


def cut_shares(shares: Sequence[Sequence[Row]], max_tokens: int, *, trees: bool) -> list[Batch]:
    """The micro-batches of every mini-batch, each with its mini-batch's number."""
    cuts = [micro_batches(share, max_tokens, trees=trees) for share in shares]
    return [replace(batch, mini_batch=number) for number, cut in enumerate(cuts) for batch in cut]


def size(batch: Batch) -> int:
    """What a micro-batch takes, in padded tokens."""
    nodes = batch.input_ids.numel()
    return nodes if batch.paths is None else cost(nodes, batch.paths.nodes.numel())


def _fitted(attempt: Callable[[int], T], pieces: Pieces, longest: int, most: int, undo: Callable[[], None]) -> T:
    """Runs `attempt` with micro-batches that fit, and remembers their size; down to a single row, and then with
    checkpointing. `most` are the tokens of all rows: larger micro-batches are no larger."""
    found = _halved(attempt, pieces, longest, most, undo)
    if found is None and pieces.may_checkpoint and not pieces.checkpointing:
        pieces.checkpointing = True
        found = _halved(attempt, pieces, longest, most, undo)
    if found is None:
        raise OutOfMemory(
            f"memory ran out while training on one row of {longest} tokens",
            "there is no smaller piece of a step",
            "lower sampling.max_new_tokens or adapter.layers, set execution.checkpointing = true or "
            'model.dtype = "nf4", or give more memory',
        )
    return found[0]


def _halved(
    attempt: Callable[[int], T], pieces: Pieces, longest: int, most: int, undo: Callable[[], None]
) -> tuple[T] | None:
    asked = pieces.micro_batch_tokens
    while asked // 2 >= max(most, longest):  # halves that would cut nothing
        asked //= 2
    try:
        found, fitted = shrinking(attempt, asked, longest, undo=undo)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    if fitted < asked:
        pieces.micro_batch_tokens = fitted
    return (found,)


@dataclass
class Pieces:
    """How the training of a step is cut. Lowered for good by a phase that ran out of memory."""

    micro_batch_tokens: int = 16_384
    checkpointing: bool = False
    may_checkpoint: bool = True
    """Whether checkpointing may be turned on where a single row does not fit without it."""
