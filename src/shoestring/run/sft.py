"""A short supervised warm start on a task's worked solutions, for models too weak to earn any reward."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from rich.console import Console

from shoestring.adapters import ADAPTERS
from shoestring.config.run import Optim, named_model
from shoestring.config.sections import ExecutionSettings
from shoestring.config.settings import Settings, build, pick
from shoestring.errors import ConfigError, DataError
from shoestring.model import load as models
from shoestring.model.load import ModelSettings, pick_device
from shoestring.model.policy import Policy, to_device
from shoestring.optimizers.adamw import AdamW
from shoestring.optimizers.base import set_learning_rate
from shoestring.records import reporter as report
from shoestring.records.environment import command, quoted
from shoestring.run import checkpoint
from shoestring.run import folder as runs
from shoestring.run.loading import load_policy
from shoestring.run.locks import locked
from shoestring.run.signals import held_back
from shoestring.tasks import TASKS
from shoestring.tasks.file import File
from shoestring.training.batch import cut_rows, pad_rows
from shoestring.training.micro_batching import Pieces
from shoestring.training.update import (
    apply,
    build_optimizer,
    clip_gradient,
    learning_rate,
    penalise,
    take_gradient,
)
from shoestring.types import Problem, Row, TokenColumns


class SftConfig(Settings):
    """Everything a warm start depends on."""

    model: Annotated[ModelSettings, BeforeValidator(named_model)] = ModelSettings()
    task: Annotated[Any, BeforeValidator(lambda value: pick(TASKS, "task", value, "multiplication"))] = Field(
        default={"name": "multiplication"}
    )
    adapter: Annotated[Any, BeforeValidator(lambda value: pick(ADAPTERS, "adapter", value, "lora"))] = Field(
        default={"name": "none"}
    )
    """"none" trains all weights, in fp32 (with bf16 arithmetic on a GPU); an adapter is merged into the model at the
    end."""
    optim: Optim = AdamW(lr=2e-5, betas=(0.9, 0.95), schedule="cosine")
    epochs: float = Field(default=2.0, gt=0)
    batch_size: int = Field(default=32, ge=1)
    """Problems in an optimizer step."""
    max_length: int = Field(default=1024, ge=2)
    """Longer examples (prompt and solution, in tokens) are left out, and counted."""
    num: int | None = Field(default=None, ge=1)
    """Problems, the first of the train split; None takes all of it."""
    save_dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    execution: ExecutionSettings = ExecutionSettings()
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints, of which the newest is kept; 0: only where it is stopped or fails."""
    seed: int = 0
    out: str = "runs/sft"


def sft(config: SftConfig | Mapping[str, Any] | None = None, *, resume: str | Path | None = None) -> Path:
    """Trains on the solutions and writes an ordinary model folder, `<out>/model`; returns it.

    The loss is the mean negative log-prob of a batch's solution tokens, the end token included. Ctrl-C and SIGTERM are
    held back until the step in hand is done and saved, and take their course then. `resume` is the folder of a warm
    start that was stopped; it ends as it would have, and only how it is carried out may change (`execution`,
    `save_every`). Raises `ConfigError` and `DataError`.
    """
    if resume is None:
        config = config if isinstance(config, SftConfig) else build(SftConfig, dict(config or {}), "")
        runs.check_free(Path(config.out), "choose another folder, or go on with a warm start by --resume")
    else:
        config = resumed(Path(resume), config)
    folder, console = Path(config.out), Console(soft_wrap=True)
    config.optim.check(pick_device(config.execution.device))
    config.optim.check_trained(whole=config.adapter.name == "none")
    problems, unsolved = _problems(config)
    torch.manual_seed(config.seed)
    policy = _load(config)
    rows, left_out = _rows(policy, config, problems)
    folder.mkdir(parents=True, exist_ok=True)
    console.print(
        f"sft on {config.task.name}: {len(rows):,} examples, {left_out} longer than {config.max_length} left out"
        + (f", {unsolved:,} without a worked solution too" if unsolved else "")
    )
    with locked(folder), held_back("Stopping once this step is done and saved") as stopped:
        runs.write_config(folder, config)
        try:
            losses = _train(policy, config, rows, folder, console, stopped)
        except BaseException:
            if resume is None:
                runs.discard_unused(folder)
            raise
    console.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}\nmodel:    {folder / 'model'}", highlight=False)
    if stopped:
        raise _taken_up(stopped[0])
    where, task = quoted(folder / "model"), quoted(config.task.name)
    console.print(f"evaluate: {command()} eval {where} --task {task}", soft_wrap=True)
    return folder / "model"


def _taken_up(number: int) -> BaseException:
    """What a signal that was held back comes to."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def resumed(folder: Path, config: SftConfig | Mapping[str, Any] | None = None) -> SftConfig:
    """The config with which a warm start goes on: its own, with what may change changed."""
    values = runs.to_resume(folder)
    if "algorithm" in values:
        raise ConfigError(f"the warm start to resume is {folder}", "it is a run", "write train --resume")
    old = build(SftConfig, values, "")
    if (folder / "model").exists():
        raise ConfigError(f"the warm start to resume is {folder}", "it is done", f"use its model: {folder / 'model'}")
    asked = config if isinstance(config, SftConfig) else build(SftConfig, runs.over(old, config or {}), "")
    asked = asked.model_copy(update={"out": old.out})
    runs.refuse_changes(folder, runs.changes(old, asked))
    return asked.model_copy(update={"out": str(folder)})


def _problems(config: SftConfig) -> tuple[list[Problem], int]:
    """Those with a worked solution, and how many have none."""
    split = config.task.problems("train")
    problems = [split[i] for i in range(min(config.num or len(split), len(split)))]
    solved = [problem for problem in problems if config.task.solution(problem)]
    if not solved:
        raise ConfigError(
            f"task.name is {config.task.name}",
            "its training problems have no worked solutions to imitate",
            'add a column "solution" to the rows'
            if isinstance(config.task, File)
            else "use gsm8k, multiplication, word-problems, or file: with a column solution",
        )
    return solved, len(problems) - len(solved)


def _load(config: SftConfig) -> Policy:
    """Trained whole, weights are held in fp32: a bf16 weight would round most of its small updates away."""
    whole = config.adapter.name == "none"
    model = config.model.model_copy(update={"dtype": "fp32"}) if whole else config.model
    return load_policy(model, adapter=config.adapter, seed=config.seed, device=config.execution.device)


def _rows(policy: Policy, config: SftConfig, problems: Sequence[Problem]) -> tuple[list[Row], int]:
    """Each example as a row whose selected places are its solution's tokens, with weight 1 each."""
    rows, left_out = [], 0
    limit = min(config.max_length, policy.context or config.max_length)
    for problem in problems:
        prompt = policy.encode(config.task.ask(problem), config.task.format, config.task.chat)
        solution = config.task.solution(problem)
        answer = (*policy.tokenizer(solution, add_special_tokens=False)["input_ids"], policy.end_id)  # type: ignore[misc]
        if len(prompt) + len(answer) > limit:
            left_out += 1
            continue
        ones = torch.ones(len(answer))
        place = len(prompt) - 1 + torch.arange(len(answer))
        columns = TokenColumns(torch.tensor(answer), ones, ones, ones, 0 * ones)
        rows.append(Row(problem.id, prompt + answer[:-1], place, columns))
    if not rows:
        raise DataError("no example is short enough", f"all are longer than {limit} tokens", "raise max_length")
    return rows, left_out


def _train(
    policy: Policy, config: SftConfig, rows: list[Row], folder: Path, console: Console, stopped: Sequence[int]
) -> list[float]:
    """The steps that are left, until the last or a signal, then the model's folder; the loss of each step."""
    optimizer = build_optimizer(policy.trained(), config.optim)
    last = checkpoint.latest(folder)
    state = checkpoint.restore(last, policy.trained(), optimizer, handle=policy.handle) if last else checkpoint.State()
    report.cut_logs(folder, state.step)
    done = list(report.read_lines(folder / "metrics.jsonl"))
    losses, started = [line["loss"] for line in done], time.perf_counter() - (done[-1]["seconds"] if done else 0)
    steps = max(round(config.epochs * math.ceil(len(rows) / config.batch_size)), 1)
    if state.step > steps or len(losses) != state.step:
        raise ConfigError(
            f"the warm start to resume is {folder}",
            f"its checkpoint has done {state.step} steps, its log has {len(losses)}, and its examples make {steps}",
            "bring its files and those of its task back as they were, or start anew",
        )

    def save() -> None:
        checkpoint.save(folder, policy.trained(), optimizer, state, policy.handle)
        checkpoint.prune(folder, 1)

    to_go_on = f"{command()} sft --resume {quoted(folder)}"
    saved = partial(checkpoint.saved_at, BaseException, state, save, console.print, to_go_on)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1) as metrics:
        for batch in islice(_batches(rows, config), state.step, steps):
            with saved():  # what fails in here leaves the weights as they are
                if stopped:
                    raise _taken_up(stopped[0])
                loss = _backward(policy, config, batch)
            lr = learning_rate(state.step, steps, config.optim)
            norm, applied = _update(policy, optimizer, config, loss, lr)
            losses.append(loss)
            seconds = round(time.perf_counter() - started, 3)
            record = {"loss": loss, "grad_norm": norm, "lr": lr, "applied": applied, "seconds": seconds}
            metrics.write(json.dumps({"step": state.step, **record}) + "\n")
            if state.step % max(steps // 20, 1) == 0 or state.step == steps - 1:
                console.print(
                    f"step {state.step + 1}/{steps}  loss {loss:.4f}  norm {norm:.2f}  {seconds:.0f} s", highlight=False
                )
            state.step += 1
            if config.save_every and state.step % config.save_every == 0:
                save()
    with saved():
        _save(policy, config, folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return losses


def _batches(rows: list[Row], config: SftConfig) -> Iterator[list[Row]]:
    """The rows in seeded order, in a new one each time through them, without end."""
    random, size = Random(config.seed), config.batch_size
    while True:
        order = random.sample(rows, len(rows))
        yield from (order[start : start + size] for start in range(0, len(order), size))


def _update(
    policy: Policy, optimizer: torch.optim.Optimizer, config: SftConfig, loss: float, lr: float
) -> tuple[float, bool]:
    """The norm of the gradient, and whether the step was taken, which a number that is not finite prevents."""
    set_learning_rate(optimizer, lr)
    loss += penalise(policy)
    norm = float(clip_gradient(list(policy.trained().values()), config.optim.max_grad_norm))
    applied = math.isfinite(norm) and math.isfinite(loss)
    if applied:
        apply(policy, optimizer)
    optimizer.zero_grad(set_to_none=True)
    return norm, applied


def _backward(policy: Policy, config: SftConfig, rows: list[Row]) -> float:
    tokens, total = sum(len(row.col) for row in rows), 0.0
    rows = sorted(rows, key=lambda row: -len(row.token_ids))
    half = policy.device.type == "cuda" and policy.base.dtype == torch.float32
    for cut in cut_rows(rows, config.execution.micro_batch_tokens or Pieces.micro_batch_tokens):
        batch = to_device(pad_rows(cut), policy.device)
        with policy.checkpointing(config.execution.checkpointing is True):
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=half):
                logprob = policy.logprobs(batch)
            loss = -(batch.weight * logprob).sum() / tokens
            take_gradient(loss)
        total += loss.item()
    return total


def _save(policy: Policy, config: SftConfig, target: Path) -> None:
    policy.base.float()  # an adapter is added in fp32, and the sum rounded once
    model: Any = policy.base if policy.handle is None else policy.handle.merged()
    dtype = models.torch_dtype(config.save_dtype, policy.device)
    runs.replace_folder(target, lambda draft: save_model(model.to(dtype=dtype), policy, draft))


def save_model(model: Any, policy: Policy, folder: Path) -> None:
    """An ordinary model folder: weights in safetensors, config, tokenizer."""
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def merge(name: str, out: str) -> Path:
    """Writes the model of a run (or checkpoint, or adapter folder) with its adapter added into the weights, as an
    ordinary model folder.

    The sum is formed in fp32 and rounded once to the base's type. Training never does this: merging and unmerging bf16
    weights over and over moves them. An adapter trained over 4-bit weights is added to the weights they were made from,
    so that the merged model is not quite the one that was trained.
    """
    target = Path(out)
    runs.check_free(target)
    saved = runs.model_settings(name)
    policy = load_policy(saved.model_copy(update={"dtype": "fp32"}), device="cpu")
    if policy.adapted is None and (Path(name) / "model" / "config.json").is_file():
        raise ConfigError(
            f'the run is "{name}"',
            "all its weights were trained, so there is nothing to add",
            f"use {name}/model as it is",
        )
    whole = models.locate(name).checkpoint if policy.adapted is None else None
    if policy.adapted is None and whole is None:
        raise ConfigError(f'the run is "{name}"', "it has no adapter to merge", "give the folder of a finished run")
    stored = models.stored_dtype(name) if saved.dtype in ("auto", "nf4") else None
    dtype = stored or models.torch_dtype(saved.dtype, torch.device("cpu"))
    if whole is not None:
        dtype = checkpoint.weights_dtype(whole)
    merged: Any = policy.base if policy.handle is None else policy.handle.merged()
    runs.replace_folder(target, lambda draft: save_model(merged.to(dtype=dtype), policy, draft))
    return target
