"""The records, in the order in which they are made. Data moves one way: a later stage makes a new record.

Letters: P prompts in a step, G completions of a prompt, T tokens of a completion, N selected tokens, BxL a padded
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # what scores completions in a process of its own need not wait for torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    `answer` is the reference that a completion is compared with; `meta` holds whatever else the task knows (a worked
    solution under "solution", the other columns of a data row under "columns").

    >>> Problem("multiplication-12x34", "12*34=", "408", {}).answer
    '408'
    """

    id: str
    question: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What the model is given: token ids up to where its answer starts, and from there a forced prefix if there is one.

    Without a prefix `answer_start == len(token_ids)`; with one, `token_ids[answer_start:]` is the prefix. It is part
    of the answer's text, and never trained.

    >>> Prompt(Problem("1", "2*3=", "6"), token_ids=(5, 8, 6, 9, 1, 1), answer_start=4).prefix
    (1, 1)
    """

    problem: Problem
    token_ids: tuple[int, ...]
    answer_start: int

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.token_ids[self.answer_start :]


@dataclass(frozen=True)
class Request:
    """`num` completions of a prompt.

    `noise_key` is a seed and a place: completion g draws what (seed, place, `first_completion` + g) hash to, whatever
    else is sampled with it. So a later request with the same key and a higher `first_completion` draws more of the same
    prompt. `truncated` says whether the prompt was cut from the left.
    """

    prompt: Prompt
    num: int
    noise_key: tuple[int, int]
    first_completion: int = 0
    truncated: bool = False


class Trunk(NamedTuple):
    """The residual stream in front of a layer below which nothing is trained, as sampling found it: of the prompt,
    [P, H], and of the completion's own tokens but the last, [T - 1, H] or more."""

    prompt: Tensor
    own: Tensor


@dataclass(frozen=True)
class Completion:
    """The tokens that the model sampled, [T], the end-of-sequence token included, and their log-probs, [T].

    A log-prob is log-softmax(logits / temperature) at the sampled token, before top-p, top-k and min-p; greedy decoding
    counts as temperature 1. `stop` is "end" when the model ended by itself and "length" when it was cut off.
    `entropies`, [T], are those of the same distributions, in nats; empty unless they were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Literal["end", "length"]
    trunk: Trunk | None = field(default=None, compare=False, repr=False)
    """What training may start from; not there as a rule."""
    entropies: tuple[float, ...] = ()


@dataclass(frozen=True)
class Score:
    """A completion's reward and its named parts (for the report)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A prompt with its completions, [G], and their scores, [G]."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Credit:
    """Which tokens of a group train, how hard, and their share of the average. All fields are [N].

    `row` is the completion's place in the group, `col` the token's place in the completion (both int64). `advantage`
    says which way and how hard; `weight` holds the algorithm's own average over the group, so that the loss is a plain
    sum. They stay apart because clipping looks at the advantage's sign. `kl_weight` (None: the same as `weight`) is
    the token's share of the KL term.

    Completions `abc`, `abd`, `ae` with rewards 1, 0, 1 hold eight tokens but five distinct (prefix, token) pairs, so
    T-SPMO gives ab -1/6 (row 0, col 1), abc +1/2 (row 0, col 2), abd -1/2 (row 1, col 2), ae +1/3 (row 2, col 1), each
    with weight 1/5; `a` follows from the prompt in every completion, has advantage 0 and is left out.
    """

    row: Tensor
    col: Tensor
    advantage: Tensor
    weight: Tensor
    kl_weight: Tensor | None = None


@dataclass(frozen=True)
class TokenColumns:
    """What N selected tokens carry, [N] each: the only list of these columns.

    `target` is the token's id (int64). `sampler_logprob` is its log-prob under the distribution that drew it. The other
    three are those of `Credit`. `extra` holds further streams by name, such as "entropy" or "values".
    """

    target: Tensor
    advantage: Tensor
    weight: Tensor
    kl_weight: Tensor
    sampler_logprob: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.target)

    @classmethod
    def cat(cls, parts: Sequence[TokenColumns]) -> TokenColumns:
        """Join one or more parts, each with the same names in `extra`."""
        import torch

        names = [part.streams().keys() for part in parts]
        if any(name != names[0] for name in names):
            raise ValueError("the parts have different extra columns")
        streams = [part.streams() for part in parts]
        return cls._of({name: torch.cat([stream[name] for stream in streams]) for name in names[0]})

    def take(self, index: Tensor) -> TokenColumns:
        """Keep the tokens of a mask, [N] bool, or of places, [n] int64."""
        return self._each(lambda column: column[index])

    def split(self, counts: Sequence[int]) -> list[TokenColumns]:
        """Cut into runs of the given lengths, whose sum is N."""
        cuts = {name: column.split(list(counts)) for name, column in self.streams().items()}
        return [self._of({name: cut[i] for name, cut in cuts.items()}) for i in range(len(counts))]

    def to(self, device: torch.device) -> TokenColumns:
        """Move every column, without waiting for the device."""
        return self._each(lambda column: column.to(device, non_blocking=True))

    def streams(self) -> dict[str, Tensor]:
        """Every column by its name."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return own | dict(self.extra)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenColumns:
        return self._of({name: change(column) for name, column in self.streams().items()})

    @classmethod
    def _of(cls, streams: Mapping[str, Tensor]) -> TokenColumns:
        own = {f.name: streams[f.name] for f in fields(cls) if f.name != "extra"}
        return cls(**own, extra={name: column for name, column in streams.items() if name not in own})


class Unpadded(NamedTuple):
    """The K rows of `Paths` that own nodes, one behind the other, P places in all. A row owns those of its nodes that
    no row before it has: they lie side by side in the tree, and are the last of the row."""

    nodes: Tensor
    """[P] int32: the node at each place."""
    starts: Tensor
    """[K + 1] int32: where each row starts among the places."""
    own: Tensor
    """[K + 1] int32: where what it owns starts among the nodes."""
    owner: Tensor
    """[T] int32: the row that owns each node."""
    copies: Tensor
    """[T] int32: how many rows have it: the owner and those behind it."""


class Paths(NamedTuple):
    """How R rows of up to L tokens lie in a tree of T nodes."""

    nodes: Tensor
    """[R, L]: the node at each place of each row; behind a row's end, any."""
    place: Tensor
    """[T]: a place of each node, counted through the rows."""
    positions: Tensor
    """[T]: each node's distance from the start."""
    unpadded: Unpadded | None = None

    def to(self, device: torch.device) -> Paths:
        def moved(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        unpadded = self.unpadded and Unpadded(*map(moved, self.unpadded))
        return Paths(moved(self.nodes), moved(self.place), moved(self.positions), unpadded)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: right-padded rows, [B, L], and the N places in them where the loss is taken.

    `input_ids[row, col]` is the input whose output predicts `columns.target`. Rows end at their last selected place:
    nothing behind it is run. `problem_ids`, [B], name the rows in messages.
    """

    input_ids: Tensor
    row: Tensor
    col: Tensor
    columns: TokenColumns
    problem_ids: tuple[str, ...]
    paths: Paths | None = None
    """With it, the rows are paths of a tree, and `input_ids` are its nodes, [1, T]."""
    trunk: tuple[Tensor, ...] = ()
    """The residual stream of the nodes, T rows of [H] in all, where training starts from it."""
    mini_batch: int = 0
    """Which of the step's mini-batches this is a part of."""

    @property
    def target(self) -> Tensor:
        return self.columns.target

    @property
    def advantage(self) -> Tensor:
        return self.columns.advantage

    @property
    def weight(self) -> Tensor:
        return self.columns.weight

    @property
    def kl_weight(self) -> Tensor:
        return self.columns.kl_weight

    @property
    def sampler_logprob(self) -> Tensor:
        return self.columns.sampler_logprob


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl. `seconds` are per phase; `peaks` are too, in bytes allocated on the GPU (empty on the
    CPU), with `peak_bytes` the largest of them and `reserved_bytes` the most that the allocator held.

    `wave_tokens`, `micro_batch_tokens` and `checkpointing` are the pieces that the step was done in: lower than planned
    after a phase that ran out of memory. `sampler_gap` is the mean distance between the sampler's log-probs and the
    training forward's; `importance_mean` the mean weight that makes up for it, and `importance_capped` the share of
    tokens whose weight the cap changed.

    With dynamic sampling, `groups` are those that the step kept, and `groups_dropped` and `tokens_dropped` what else it
    sampled; rewards, lengths, `solved`, `tokens_sampled` and `truncated` are over both, so that they compare with a run
    without. `reward_std` is the sample deviation of a group's rewards, in the mean over groups; `length_mean` and
    `length_max` are tokens a completion. `timed_out` counts completions that were not scored in time. `tokens_per_s` is
    `tokens_sampled` over the seconds of sampling. `terms` holds the further figures of the objective's terms; without
    any, the line leaves it out.
    """

    step: int
    reward: float
    reward_parts: Mapping[str, float]
    solved: float
    groups: int
    groups_with_signal: int
    tokens_sampled: int
    tokens_trained: int
    tokens_run: int
    truncated: int
    prompts_truncated: int
    loss: float
    grad_norm: float
    kl: float
    clip_fraction: float
    sampler_gap: float
    lr: float
    applied: bool
    seconds: Mapping[str, float]
    peak_bytes: int
    peaks: Mapping[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0
    wave_tokens: int | None = None
    micro_batch_tokens: int | None = None
    checkpointing: bool = False
    importance_mean: float = 1.0
    importance_capped: float = 0.0
    groups_dropped: int = 0
    tokens_dropped: int = 0
    timed_out: int = 0
    tokens_per_s: float = 0.0
    reward_std: float = 0.0
    length_mean: float = 0.0
    length_max: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)


class Row(NamedTuple):
    """One completion that trains: its ids up to the last input that is needed, and its n selected places with their
    columns."""

    problem_id: str
    token_ids: tuple[int, ...]
    col: Tensor
    columns: TokenColumns
    group: int = 0
    """Rows of one group begin with the same prompt."""
    prompt_tokens: int = 0
    trunk: Trunk | None = None

    @property
    def target(self) -> Tensor:
        return self.columns.target


def has_signal(credit: Credit) -> bool:
    return bool((credit.advantage != 0).any())
