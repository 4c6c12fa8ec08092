"""The loop: problems, prompts, completions, scores, credit, one update, one report. Read `_run` from top to bottom."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from shoestring.algorithms.base import StepGenerator
from shoestring.allocator import capped, give_back
from shoestring.config.run import RunConfig
from shoestring.curricula import replay
from shoestring.errors import ConfigError, DataError, ShoestringError
from shoestring.evaluation.evaluate import EvalSettings, check_judges, evaluate, evaluate_by_rewards
from shoestring.model.load import check_quantisation, pick_device
from shoestring.optimizers.base import set_learning_rate
from shoestring.records import reporter as report
from shoestring.records.clock import Clock
from shoestring.rewards.base import RewardFunction, Scored, TrainerState
from shoestring.rewards.functions import Rewards, check_task
from shoestring.rollout import workers as pool
from shoestring.rollout.rollout import Rollout, roll_out, rows
from shoestring.rollout.rounds import Round, Sampled, joined, wanted
from shoestring.run import checkpoint, profiler
from shoestring.run import folder as runs
from shoestring.run import preflight as budgets
from shoestring.run.checkpoint import State
from shoestring.run.handle import Run
from shoestring.run.locks import locked
from shoestring.run.messages import MAX_SKIPPED, never_finite, to_go_on
from shoestring.run.opening import opened
from shoestring.run.session import Session
from shoestring.run.signals import held_back
from shoestring.run.summary import Done, step_report, warnings
from shoestring.training.credit import credit_step
from shoestring.training.micro_batching import HalfAStep, train_in_pieces
from shoestring.training.update import check_update, learning_rate
from shoestring.types import Group, Prompt


def train(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    rewards: Iterable[RewardFunction | str] | RewardFunction | str = (),
    data: Iterable[Mapping[str, Any]] | None = None,
    eval_data: Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    profile: bool = False,
) -> Run:
    """Trains as `config` says (a config, a nested mapping, a recipe's path, or None for the embedded default).

    `rewards` are functions in TRL's form (or "task") that take the place of `[rewards] functions`. `data` are rows with
    `prompt` (or `question`) and `answer`; they are written into the run's folder and take the place of the task;
    `eval_data` are others, for the evaluations during the run (`eval_every`).
    `resume` is the folder of a run to go on with. `profile` writes a trace of a step and the seconds by phase into
    the run's folder (see `shoestring.run.profiler`). Raises `ConfigError` and `DataError` before the model loads
    wherever that is possible. Ctrl-C and SIGTERM are held back until the step in hand is done and saved, and take
    their course then: Ctrl-C raises `KeyboardInterrupt`.
    """
    run = carried_out(
        config, rewards=rewards, data=data, eval_data=eval_data, resume=resume, quiet=quiet, profile=profile
    )
    if run.stopped_by:
        print(f"{len(run.reports)} steps are saved; to go on: {to_go_on(run.folder, run.config)}", file=sys.stderr)
        signal.raise_signal(run.stopped_by)
    return run


def carried_out(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    rewards: Iterable[RewardFunction | str] | RewardFunction | str = (),
    data: Iterable[Mapping[str, Any]] | None = None,
    eval_data: Iterable[Mapping[str, Any]] | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
    profile: bool = False,
) -> Run:
    """As `train`, but a run that a signal has stopped is returned."""
    pool.refuse_inside_a_worker()
    rewards = (rewards,) if isinstance(rewards, str) or callable(rewards) else tuple(rewards)
    for given in rewards:
        if not isinstance(given, str) and not callable(given):
            raise ConfigError(f"rewards holds {given!r}", "it cannot be called", 'give functions, or "task"')
    folder, settled = runs.open_run(config, data=data, eval_data=eval_data, resume=resume, rewards=rewards)
    with locked(folder):
        try:
            scorer = Rewards(rewards or settled.rewards.functions, settled.rewards.weights)
            return _run(folder, settled, scorer, quiet=quiet, profile=profile)
        except Exception:  # the same command should work once the mistake is mended, in a class of the user's own too
            if resume is None:
                runs.discard_unused(folder)
            raise


def _run(folder: Path, config: RunConfig, rewards: Rewards, *, quiet: bool, profile: bool) -> Run:
    done = checkpoint.steps_done(folder)
    if config.steps < done:
        raise ConfigError(
            f"steps is {config.steps}, and {folder} has done {done}", "a run does not go back", "write more steps"
        )
    check_task(config.rewards.functions, config.task)
    if profile:
        profiler.check(config.steps, done)
    problems = config.task.problems("train")
    if config.eval_every:
        if config.evaluated_by == "answers":
            check_judges(config.task)
        config.task.problems(config.evaluation.split)  # a split that is not there is found now, not at its first use
    config.optim.check(pick_device(config.execution.device))
    check_update(config.objective)
    check_quantisation(config.model)
    config.tracking.check()
    device = pick_device(config.execution.device)
    budget = budgets.checked_before_loading(config, problems, device)

    with pool.opened(rewards, config.task, config.rewards) as scoring, capped(device, budget):
        session, state, longest = opened(folder, config, problems, scoring, quiet=quiet)
        with (
            held_back("Stopping once this step is done and saved") as stopped,
            session.reporter.tracking(config.tracking, config.model_dump(mode="json"), state.step),
            session.reporter.running(state.step),
        ):
            if state.step < config.steps:
                budgets.rehearse(session, state, longest)
            with profiler.recorded(session.reporter, config.steps - state.step, device, on=profile) as next_step:
                _train(session, state, stopped, next_step)
    stopped_by = stopped[0] if stopped else 0
    return Run(folder, config, report.read_metrics(folder), session.policy, stopped_by, state.best_step)


def _train(session: Session, state: State, stopped: Sequence[int], next_step: Callable[[], None]) -> None:
    """Steps until the last, or until a signal has come; evaluations and checkpoints where they are due. `next_step`
    tells the profiler."""
    config = session.config
    while state.step < config.steps and not stopped:
        if config.eval_every and state.step % config.eval_every == 0:
            _evaluate(session, state)
        _step(session, state)
        if state.step == session.first_step + 1:
            runs.write_config(session.folder, config)  # with what a resumed run has changed
        next_step()
        if state.skipped_in_a_row == MAX_SKIPPED:
            session.save(state)
            raise never_finite(state, session.folder)
        if config.save_every and state.step % config.save_every == 0:
            session.save(state)
    if config.eval_every and not stopped:
        _evaluate(session, state)
    with _saved_at(session, state, BaseException):
        session.save(state)
    _save_result(session, state)


def _step(session: Session, state: State) -> None:
    """One step, after which `state` has moved."""
    clock = Clock(session.policy.device)
    with _saved_at(session, state, BaseException):  # weights and state are those of the last step
        sampled = _sample(session, state, clock)
    with _saved_at(session, state, ShoestringError):  # here too, but for half a step
        moved = _learn(session, state, sampled, clock)
    with _saved_at(session, state, BaseException):  # now of this one
        if moved:
            session.engine.sync(session.policy)


def _sample(session: Session, state: State, clock: Clock) -> Sampled:
    """The first half of a step: sample, score, give credit. Changes nothing that a checkpoint holds."""
    sampling = session.config.sampling
    rounds: list[Round] = []
    while num := wanted(rounds, sampling):  # one round, unless dynamic sampling is on
        rounds.append(_round(session, state, clock, sum(len(done.groups) for done in rounds), num))
    sampled = joined(rounds, sampling.num_prompts)
    with clock.phase("credit"):
        return _credited(session, state, sampled)


def _credited(session: Session, state: State, sampled: Sampled) -> Sampled:
    """The same with the credit of the groups that are kept, all of them at once; `state` moves only in `_learn`."""
    seeds = [session.seed(state.step, "credit", place) for place in sampled.kept]
    generator = StepGenerator.seeded(session.seed(state.step, "credit"), seeds)
    credits, memory = credit_step(session.config.algorithm, sampled.kept_groups, state.memory, generator)
    return sampled._replace(credits=credits, memory=memory)


def _learn(session: Session, state: State, sampled: Sampled, clock: Clock) -> bool:
    """The second half: update, report. `state` moves at its end, once all of it is done. Whether anything trained."""
    config, step = session.config, state.step
    groups, credits = sampled.kept_groups, sampled.credits
    cursor = state.cursor + len(sampled.groups) - len(state.replays)
    with clock.phase("train"), session.fresh.ahead(cursor, config.sampling.num_prompts):
        set_learning_rate(session.optimizer, learning_rate(step, config.steps, config.optim))
        seed = session.seed(step, "round")
        result, batches = train_in_pieces(
            session.policy, session.optimizer, groups, credits, config, state.pieces, seed
        )
        give_back(session.policy.device)
        if batches:
            state.skipped_in_a_row = 0 if result.finite else state.skipped_in_a_row + 1
            state.culprits = ", ".join(result.culprits)
    state.wave_tokens = session.engine.wave_tokens
    state.cursor, state.memory = cursor, dict(sampled.memory)
    state.replays = replay.choose(
        config.algorithm.replay, groups, config.sampling.num_prompts, Random(session.seed(step, "replay"))
    )
    state.step += 1
    session.reporter.samples(step, sampled)
    done = Done(step, sampled, batches, result, clock)
    session.reporter.step(step_report(done, config, state))
    for warning in warnings(done, config):
        session.reporter.warn(warning)
    if session.plan is not None and step == session.first_step:
        budgets.compare(session, clock)
    return bool(batches)


def _saved_at(session: Session, state: State, errors: type[BaseException]) -> AbstractContextManager[None]:
    """Where it fails so, the steps that are done are saved first."""
    save, how = partial(session.save, state), to_go_on(session.folder, session.config)
    return checkpoint.saved_at(errors, state, save, session.reporter.warn, how, unless=HalfAStep)


# --- the stages of a step -------------------------------------------------------------------------------------------


def _round(session: Session, state: State, clock: Clock, start: int, num: int) -> Round:
    """`num` more prompts of a step that has `start` already, sampled and scored."""
    step = state.step
    with clock.phase("sample"):
        rollouts, num_cut = _roll_out(session, state, start, num)
        give_back(session.policy.device)  # nothing of sampling stays
    with clock.phase("score"):
        scored, groups = _score(session, rollouts, step)
    return Round(rollouts, groups, scored, num_cut)


def _roll_out(session: Session, state: State, start: int, num: int) -> tuple[list[Rollout], int]:
    """Completions of fresh problems and, in a step's first round (`start` 0), of the prefixes that replay wants to see
    continued; counts cut prompts. Scoring hears of each group as soon as it is there."""
    sampling, step = session.config.drawing, state.step
    replays = state.replays if start == 0 else []
    place = max(start - len(state.replays), 0)  # of the first fresh prompt, among the step's fresh ones
    fresh, num_cut = session.fresh.take(state.cursor + place, num - len(replays))

    def begin_to_score(rollout: Rollout) -> None:
        session.scoring.begin(rows([rollout]), _trainer_state(session, step))

    def rolled(prompts: list[Prompt], num: int, purpose: str, first: int = 0) -> list[Rollout]:
        return roll_out(
            session.policy,
            session.engine,
            prompts,
            num=num,
            sampling=sampling,
            seed=session.seed(step, purpose),
            first=first,
            done=begin_to_score if session.scoring.early else None,
            trunk_layer=session.trunk_layer,
        )

    rollouts = rolled(fresh, sampling.num_completions, "sample", place)
    if replays:
        num = session.config.algorithm.replay.completions or sampling.num_completions
        rollouts += rolled(replays, num, "sample replays")
    return rollouts, num_cut


def _score(session: Session, rollouts: Sequence[Rollout], step: int) -> tuple[Scored, list[Group]]:
    scored = session.scoring.score(rows(rollouts), _trainer_state(session, step))
    scores = iter(scored.scores)
    groups = [Group(r.prompt, r.completions, tuple(next(scores) for _ in r.completions)) for r in rollouts]
    return scored, groups


def _trainer_state(session: Session, step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=session.config.steps)


def _evaluate(session: Session, state: State) -> None:
    """Greedy accuracy, or mean reward, on the run's own evaluation problems; keeps the best weights if the config says
    so."""
    config = session.config
    settings = EvalSettings(
        split=config.evaluation.split,
        num=config.evaluation.num,
        max_new_tokens=config.sampling.max_new_tokens,
        allow_truncated_prompts=config.allow_truncated_prompts,
    )

    def scored(rollouts: Sequence[Rollout]) -> Scored:
        try:
            return session.scoring.score(rows(rollouts), _trainer_state(session, state.step))
        except DataError as error:
            given = f"in the evaluation after step {state.step} (one completion a problem) {error.given}"
            raise DataError(given, error.why, error.write) from error

    with _saved_at(session, state, BaseException):
        if config.evaluated_by == "answers":
            found = evaluate(session.policy, session.engine, config.task, settings)
            figure = found.accuracy
        else:
            found = evaluate_by_rewards(session.policy, session.engine, config.task, settings, scored)
            figure = found.reward
            for problem in found.timed_out:
                session.reporter.warn(
                    f"After step {state.step}: the completion of problem {problem} took longer than rewards.timeout "
                    f"({config.rewards.timeout:g} s) to score."
                )
    state.wave_tokens = session.engine.wave_tokens
    again = state.best_step == state.step  # after an error
    best = figure > state.best_accuracy or state.best_step < 0 or again
    if best:
        state.best_accuracy, state.best_step = figure, state.step
        if config.evaluation.keep == "best":
            folder = session.folder / "best" / f"step-{state.step}"
            runs.replace_folder(folder, session.policy.save)
    session.reporter.evaluation({"step": state.step, **found.as_json(), "best_so_far": best})


def _save_result(session: Session, state: State) -> None:
    """What the run ends with: the adapter in PEFT's format, or the whole model."""
    best = session.folder / "best" / f"step-{state.best_step}"

    def write(draft: Path) -> None:
        if session.config.evaluation.keep == "best" and best.is_dir():
            shutil.copytree(best, draft, dirs_exist_ok=True)
        else:
            session.policy.save(draft)

    runs.replace_folder(session.folder / session.policy.result, write)


# --- around the loop ------------------------------------------------------------------------------------------------
