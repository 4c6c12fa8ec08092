"""What a step comes to: its line of metrics, and what its user should be told at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import stdev
from typing import NamedTuple

from shoestring.algorithms.base import is_informative
from shoestring.config.run import RunConfig
from shoestring.records.clock import Clock
from shoestring.rollout.rounds import Sampled
from shoestring.run.checkpoint import State
from shoestring.training.update import UpdateReport, learning_rate
from shoestring.types import Batch, Group, StepReport

# So many groups without signal are no accident.
_SAYS_SOMETHING = 8


class Done(NamedTuple):
    """A step that is done."""

    step: int
    sampled: Sampled
    batches: Sequence[Batch]
    result: UpdateReport
    clock: Clock


def step_report(done: Done, config: RunConfig, state: State) -> StepReport:
    """The step's line of metrics, with the pieces that `state` goes on with."""
    sampled, result, clock = done.sampled, done.result, done.clock
    scores = [score for group in sampled.groups for score in group.scores]
    completions = [completion for group in sampled.groups for completion in group.completions]
    names = sorted({name for score in scores for name in score.parts})
    tokens = [sum(len(c.token_ids) for c in group.completions) for group in sampled.groups]
    lengths = [len(completion.token_ids) for completion in completions]
    deviations = [stdev(score.value for score in group.scores) for group in sampled.groups if len(group.scores) > 1]
    return StepReport(
        step=done.step,
        reward=_mean([score.value for score in scores]),
        reward_parts={name: _mean([s.parts[name] for s in scores if name in s.parts]) for name in names}
        | {f"logged/{name}" if name in names else name: value for name, value in sampled.scored.metrics.items()},
        solved=_mean(
            [float(score.parts.get("solved", score.parts.get("correct", score.value)) >= 1) for score in scores]
        ),
        groups=len(sampled.kept),
        groups_with_signal=sum(map(is_informative, sampled.groups)),
        tokens_sampled=sum(tokens),
        tokens_trained=sum(len(batch.row) for batch in done.batches),
        tokens_run=sum(batch.input_ids.numel() for batch in done.batches),
        truncated=sum(c.stop == "length" for c in completions),
        prompts_truncated=sampled.num_cut,
        loss=result.loss,
        grad_norm=result.grad_norm,
        kl=result.kl,
        clip_fraction=result.clip_fraction,
        sampler_gap=result.sampler_gap,
        lr=learning_rate(done.step, config.steps, config.optim),
        applied=result.applied,
        seconds=clock.seconds,
        peak_bytes=max(clock.peaks.values(), default=0),
        peaks=clock.peaks,
        reserved_bytes=clock.reserved,
        wave_tokens=state.wave_tokens,
        micro_batch_tokens=state.pieces.micro_batch_tokens,
        checkpointing=state.pieces.checkpointing,
        importance_mean=result.importance_mean,
        importance_capped=result.importance_capped,
        groups_dropped=len(sampled.groups) - len(sampled.kept),
        tokens_dropped=sum(tokens) - sum(tokens[place] for place in sampled.kept),
        timed_out=len(sampled.scored.timed_out),
        tokens_per_s=sum(tokens) / clock.seconds["sample"],
        reward_std=_mean(deviations),
        length_mean=_mean(lengths),
        length_max=max(lengths, default=0),
        terms=dict(result.terms),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _alike(group: Group) -> bool:
    return len({score.value for score in group.scores}) == 1


def warnings(done: Done, config: RunConfig) -> Iterator[str]:
    """What a user should not have to find out by reading metrics."""
    step, groups, result = done.step, done.sampled.groups, done.result
    scores = [score.value for group in groups for score in group.scores]
    cut = [completion.stop == "length" for group in groups for completion in group.completions]
    if not result.finite:
        whose = f" of {', '.join(result.culprits)}" if result.culprits else ""
        yield (
            f"Step {step} was {'applied in part' if result.applied else 'not applied'}: the loss or gradient{whose} is "
            f"not finite (loss {result.loss}, norm {result.grad_norm})."
        )
    for problem, count in Counter(done.sampled.scored.timed_out).items():
        yield (
            f"Step {step}: {count} of problem {problem}'s completions took longer than rewards.timeout "
            f"({config.rewards.timeout:g} s) to score and {'counts' if count == 1 else 'count'} "
            + ("0." if config.rewards.on_timeout == "zero" else "as that problem's others do.")
        )
    if step == 0 and all(score.parts.get("unscored") for group in groups for score in group.scores):
        yield (
            f"WARNING: none of the {len(scores)} completions of the first step got a reward, so nothing could be "
            "learnt from it: the functions returned None, which passes a completion over, or were not done in time."
        )
    elif step == 0 and not any(scores):
        yield (
            f"WARNING: all {len(scores)} completions of the first step scored 0, so nothing could be learnt "
            "from it. Look at samples.jsonl: is the answer there, and does the scorer find it? A model too weak to "
            "earn any reward needs a warm start (shoestring sft) or easier problems."
        )
    elif step == 0 and len(groups) >= _SAYS_SOMETHING and all(map(_alike, groups)):
        yield (
            "WARNING: in the first step all completions of each prompt scored alike, so nothing could be learnt from "
            "it. Are the problems too easy, or the completions all the same (sampling.temperature)?"
        )
    if step == 0 and sum(cut) > 0.5 * len(cut):
        yield (
            f"WARNING: {sum(cut)} of {len(cut)} completions of the first step were cut off at sampling.max_new_tokens."
        )
