"""The memory plan: what a run will take, before it starts, and into how many pieces a budget cuts its steps.

Made from the config and the model's config.json alone; `footprint` holds the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from shoestring.adapters.base import Trained
from shoestring.config import run as configs
from shoestring.config.files import overridden
from shoestring.config.run import RunConfig
from shoestring.config.sizes import size_text
from shoestring.errors import ConfigError
from shoestring.memory import footprint
from shoestring.memory.budget import budget_bytes
from shoestring.memory.footprint import Work
from shoestring.memory.sampling import decode, kv_cache, prefill, sample_peak
from shoestring.memory.training import activations, head, micro_batch, train_peak
from shoestring.model.chat import plain_text
from shoestring.model.fast.decoder import MODELS
from shoestring.model.load import locate
from shoestring.model.shapes import FAMILIES, Shape, read_shape
from shoestring.model.trees import TREE_MODELS
from shoestring.tasks.base import Task
from shoestring.training.update import state_bytes

# Where a budget has room, training takes more than sampling does for micro-batches of so many tokens.
_ENOUGH_TOKENS = 2_048
# A layer's pass forward and back over so many tokens times its weights takes an H100 as long as the host takes to
# launch it: some 2 ms for our own layers, 10,000 tokens of a 0.5B model.
_LAUNCHED = 1.5e11
_MOST_TOKENS = 16_384
_ERROR = 2**24
# What is not missed: without a budget training may take so much even where sampling needs less. On a host it is so many
# bytes beside the weights, on a GPU this share of the card.
_HOST_FLOOR, _CARD_FLOOR = 128 * 2**20, 0.025
# Prompt tokens where neither the setting nor the data tells.
_ASSUMED_PROMPT = 256
_LOOKED_AT = 64
# What a chat template puts around a message, about.
_TEMPLATE_TOKENS = 32


class Sizes(NamedTuple):
    """The pieces in which a step is carried out."""

    wave_rows: int
    """Completions sampled at once."""
    micro_rows: int
    """Full-length rows trained at once."""
    checkpointing: bool


class Phase(NamedTuple):
    phase: str
    bytes: int


class Alternative(NamedTuple):
    change: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """Predicted bytes of a run's steps. `peak` is of allocated memory, without the CUDA context."""

    work: Work
    sizes: Sizes
    budget: int | None
    peak: int
    smallest: int
    """The least budget under which the run as configured completes."""
    phases: tuple[Phase, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return _fits(self.work, self.peak, self.budget)

    @property
    def least_memory(self) -> str:
        """The smallest budget as `memory` takes it."""
        return f"{-(-self.smallest // 2**20)}MiB"

    @property
    def waves(self) -> int:
        return -(-self.work.rows // self.sizes.wave_rows)

    @property
    def wave_tokens(self) -> int:
        """Cache slots of a wave."""
        return self.sizes.wave_rows * self.work.slots

    @property
    def micro_batch(self) -> int:
        """Padded tokens of a micro-batch."""
        return self.sizes.micro_rows * self.work.row_tokens

    def as_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "peak": self.peak,
            "fits": self.fits,
            "smallest_budget": self.smallest,
            "phases": [phase._asdict() for phase in self.phases],
            "waves": self.waves,
            "micro_batch": self.micro_batch,
            "alternatives": [alternative._asdict() for alternative in self.alternatives],
            "notes": list(self.notes),
        }


def predict(
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    prompt_tokens: int | None = None,
    room: int | None = None,
    total: int | None = None,
) -> Plan:
    """The plan of a config (or a nested mapping, a recipe's path, None for the embedded default).

    `prompt_tokens` is the longest prompt (default: the setting, the data, or an assumption that the notes tell). `room`
    are the bytes that can be had where no budget is set, `total` those of the card or machine that a share refers to,
    and without a budget what training may take of it (default: those found here). Raises `ConfigError` for a model
    whose shape is not known.
    """
    if not isinstance(config, RunConfig):
        config = configs.settle(dict(config)) if isinstance(config, Mapping) else configs.load(config)
    shape = read_shape(config.model.name, family=config.model.family, revision=config.model.revision)
    prompt, note = (prompt_tokens, "") if prompt_tokens else _prompt_tokens(config)
    gpu = on_gpu(config)
    work = work_of(config, shape, prompt, gpu=gpu)
    total = total if total is not None else _total(gpu)
    floor = int((total or 0) * _CARD_FLOOR) if gpu else footprint.static(work) + _HOST_FLOOR
    notes = [note] if note else []
    if total is None and config.memory is None:
        notes.append(f"There is no card here. On one, training may take {_CARD_FLOOR:.1%} of it, if that is more.")
    return _planned(config, work, budget_bytes(config.memory, total), room, floor, tuple(notes))


def check(plan: Plan) -> None:
    """Raises `ConfigError` if the budget is below what the run needs in its smallest pieces."""
    if plan.budget is None or plan.fits:
        return
    best = min(plan.alternatives, key=lambda alternative: alternative.peak, default=None)
    more = f"; or set {best.change}, with which {size_text(best.peak)} would do" if best else ""
    raise ConfigError(
        f"memory is {size_text(plan.budget)}",
        f"with one completion sampled and one row trained at a time this run needs {size_text(plan.smallest)}",
        f'write memory = "{plan.least_memory}"{more}',
    )


def on_gpu(config: RunConfig) -> bool:
    if config.execution.device == "auto":
        import torch

        return torch.cuda.is_available()
    return config.execution.device.startswith("cuda")


def work_of(config: RunConfig, shape: Shape, prompt: int, *, gpu: bool) -> Work:
    """A config's step, in the terms of the formulas."""
    dtype = config.model.dtype
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}.get(dtype, 2 if gpu else 4)
    trained = config.adapter.trained(shape)
    sampling = config.drawing
    fast = not config.execution.plain and config.model.attn_implementation != "eager"
    reference = "none" if not config.objective.beta else "copy" if trained.whole else "adapter"
    return Work(
        shape=shape,
        trained=trained,
        itemsize=itemsize,
        nf4=dtype == "nf4",
        prompt=prompt,
        added=sampling.max_new_tokens,
        # An evaluation's completions have a prompt each.
        prompts=sampling.num_prompts * (sampling.num_completions if config.eval_every else 1),
        rows=sampling.num_prompts * sampling.num_completions,
        group=sampling.num_completions,
        padded=sampling.num_prompts > 1,
        gpu=gpu,
        eager=8 if FAMILIES[shape.family].eager else 6 if config.model.attn_implementation == "eager" else 0,
        state=state_bytes(config.optim),
        step_temporaries=_step_temporaries(config, shape, trained, gpu),
        reference=reference,
        graph=config.sampler.name in ("auto", "graph") and shape.family in MODELS,
        filtered=bool(config.eval_every or sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.entropy),
        trees=fast and shape.family in TREE_MODELS,
        own_layers=fast and shape.family in MODELS and not trained.whole,
        flash=gpu and itemsize == 2 and _has_flash(),
        trunk_rows=_trunk_rows(config, shape, trained),
    )


def _has_flash() -> bool:
    """Whether torch has FlashAttention on the card here; a card that is not here is taken for one that has it."""
    import torch

    from shoestring.model.fast.triton_training import has_flash

    return not torch.cuda.is_available() or has_flash(torch.device("cuda"), torch.bfloat16)


def _trunk_rows(config: RunConfig, shape: Shape, trained: Trained) -> int:
    """Completions whose residual stream in front of the first trained layer may be kept for training."""
    known = shape.family in MODELS and config.sampler.name in ("auto", "graph") and not config.execution.plain
    if not known or trained.whole or trained.first_layer == 0 or config.execution.trunk_cache is False:
        return 0
    return config.sampling.most_prompts * config.sampling.num_completions


def _step_temporaries(config: RunConfig, shape: Shape, trained: Trained, gpu: bool) -> int:
    """Bytes that an optimizer step takes for its while: torch's fused AdamW none, torchao's those of a whole weight."""
    if config.optim.name == "adamw-8bit":
        return 8 * (shape.embedding if trained.whole else max(trained.layer_parameters, 1))
    return 2**25 if trained.whole and gpu else 0


def margin(work: Work, budget: int) -> int:
    """What a budget must leave free: its cap lies a page lower, and a prediction may err."""
    return 20 * 2**20 + budget // 100 if work.gpu else 0


def _fits(work: Work, peak: int, budget: int | None) -> bool:
    return budget is None or peak + margin(work, budget) <= budget


# --- choosing the pieces --------------------------------------------------------------------------------------------


def _planned(
    config: RunConfig, work: Work, budget: int | None, room: int | None, floor: int, notes: tuple[str, ...]
) -> Plan:
    sizes = _choose(config, work, budget, room, floor)
    without = replace(work, trunk_rows=0)
    if work.trunk_rows and config.execution.trunk_cache == "auto" and (budget is not None or room is not None):
        plainly = _choose(config, without, budget, room, floor)
        cramped = sizes.wave_rows < plainly.wave_rows or not _fits(work, _peak(work, sizes), budget)
        work, sizes = (without, plainly) if cramped else (work, sizes)
    smallest = _least_budget(config, work)
    return Plan(
        work,
        sizes,
        budget,
        _peak(work, sizes),
        smallest,
        _phases(work, sizes),
        _alternatives(config, work, sizes, budget),
        notes,
    )


def _peak(work: Work, sizes: Sizes) -> int:
    return max(
        sample_peak(work, sizes.wave_rows),
        _train_peak(work, sizes),
    )


def _train_peak(work: Work, sizes: Sizes) -> int:
    batch = micro_batch(work, sizes.micro_rows)
    return train_peak(work, batch, sizes.checkpointing, sizes.wave_rows)


def _choose(config: RunConfig, work: Work, budget: int | None, room: int | None, floor: int) -> Sizes:
    """As few waves as fit, and micro-batches that take no more than sampling or, without a budget, the floor, whichever
    is more; yet more, up to the budget, only where they would be too small to keep a card busy."""
    most = room
    if budget is not None:
        most = budget - margin(work, budget)
        spare = max(most - _least_peak(config, work), 0)  # some of it is left to the allocator
        most -= min(budget // 40, spare // 2) if work.gpu else 0
    execution = config.execution
    wave_limit = max(execution.wave_tokens // work.slots, 1) if execution.wave_tokens else work.rows
    least = [choice for choice in (True, False) if execution.checkpointing in ("auto", choice)]

    def goes(rows: int) -> bool:
        """What sampling leaves behind has to leave room for training."""
        train = min(_train_peak(work, Sizes(rows, 1, choice)) for choice in least)
        return most is None or max(sample_peak(work, rows), train) <= most

    wave_rows = _evenly(work.rows, _largest(goes, min(wave_limit, work.rows)))
    if execution.micro_batch_tokens:
        limit = min(max(execution.micro_batch_tokens // work.row_tokens, 1), work.rows)
        return _micro(config, work, wave_rows, limit, budget and most)
    limit = min(max(_most_tokens(work) // work.row_tokens, 1), work.rows)
    # What sampling takes for certain, prompts of one length or not, or the floor; less what a prediction may err by.
    allowed = sample_peak(replace(work, padded=False), wave_rows)
    if budget is None:
        allowed = max(allowed, floor if most is None else min(floor, most))
    beside = _micro(config, work, wave_rows, limit, allowed - _ERROR * work.gpu)
    if budget is None or beside.micro_rows >= min(limit, _ENOUGH_TOKENS // work.row_tokens):
        return beside
    busy = min(limit, max(_ENOUGH_TOKENS // work.row_tokens, 1))
    return _micro(config, work, wave_rows, busy, most)


def _most_tokens(work: Work) -> int:
    """Beyond these a micro-batch gains nothing: it keeps a card busy for twice as long as it takes to launch it."""
    return max(_MOST_TOKENS, int(2 * _LAUNCHED / _matrices(work)) * work.gpu)


def _matrices(work: Work) -> int:
    """Weights of a layer."""
    return sum(linear.inputs * linear.outputs for linear in work.shape.linears)


def _micro(config: RunConfig, work: Work, wave_rows: int, limit: int, allowed: int | None) -> Sizes:
    """The largest micro-batch of at most `limit` rows within `allowed` bytes; with checkpointing if that makes small
    ones larger."""

    def sized(checkpointing: bool) -> Sizes:
        def trains(rows: int) -> bool:
            return allowed is None or _train_peak(work, Sizes(wave_rows, rows, checkpointing)) <= allowed

        return Sizes(wave_rows, _evenly(work.rows, _largest(trains, limit)), checkpointing)

    if config.execution.checkpointing != "auto":
        return sized(config.execution.checkpointing)
    plain, recomputed = sized(False), sized(True)
    if allowed is not None and _train_peak(work, recomputed) > allowed:  # neither may fit
        return min(plain, recomputed, key=lambda sizes: _train_peak(work, sizes))
    fits = allowed is None or _train_peak(work, plain) <= allowed
    return plain if fits and _layer_time(work, plain) <= _layer_time(work, recomputed) else recomputed


def _layer_time(work: Work, sizes: Sizes) -> float:
    """What a step's micro-batches take for one layer, in launches of its pass forward and back, which count on a GPU
    only. Recomputing adds a quarter to the launches and a third to the products."""
    launched, busy = float(work.gpu), sizes.micro_rows * work.row_tokens * _matrices(work) / _LAUNCHED
    if sizes.checkpointing:
        launched, busy = launched * 1.25, busy * 4 / 3
    return -(-work.rows // sizes.micro_rows) * max(launched, busy)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 1 where none does."""
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _evenly(count: int, most: int) -> int:
    """The size of equal parts of at most `most`: no more parts than needed, and no larger than that asks for.

    >>> _evenly(64, 54)
    32
    """
    return -(-count // -(-count // most))


def _least_peak(config: RunConfig, work: Work) -> int:
    """Of the smallest pieces."""
    checkpointing = config.execution.checkpointing
    if config.execution.trunk_cache == "auto":
        work = replace(work, trunk_rows=0)
    choices = (True, False) if checkpointing == "auto" else (checkpointing,)
    return min(_peak(work, Sizes(1, 1, choice)) for choice in choices)


def _least_budget(config: RunConfig, work: Work) -> int:
    """The smallest pieces, and the margin on top."""
    peak = _least_peak(config, work)
    if not work.gpu:
        return peak
    return int((peak + margin(work, 0)) / 0.99) + 1


def _phases(work: Work, sizes: Sizes) -> tuple[Phase, ...]:
    """The parts. The two peaks are of what is held at the same time; the context is not in them."""
    batch = micro_batch(work, sizes.micro_rows)
    return tuple(
        Phase(name, int(count))
        for name, count in (
            ("weights", footprint.weights(work)),
            ("adapter, gradient and optimizer", footprint.held(work) + footprint.gradient(work)),
            ("workspace and pages", footprint.workspace(work) + footprint.pages(work)),
            ("trunk cache", footprint.trunk_cache(work)),
            ("KV cache", kv_cache(work, sizes.wave_rows)),
            ("prefill", prefill(work, sizes.wave_rows)),
            ("decode", decode(work, sizes.wave_rows)),
            ("log-prob and reference pass", footprint.forward_token(work) * batch.nodes),
            ("training activations", activations(work, batch, sizes.checkpointing)),
            ("head", head(work, batch.scored)),
            ("peak while sampling", sample_peak(work, sizes.wave_rows)),
            ("peak while training", _train_peak(work, sizes)),
            ("context", footprint.CONTEXT if work.gpu else 0),
        )
    )


# --- what else could be set -----------------------------------------------------------------------------------------


def _alternatives(config: RunConfig, work: Work, sizes: Sizes, budget: int | None) -> tuple[Alternative, ...]:
    """What other settings would take: without a budget the peak of the same pieces; under one, which pieces are chosen
    to fill, the least budget."""
    found = []
    for overrides, note, pieces in _changes(config, work, sizes):
        if budget is not None and pieces != sizes:
            continue
        values: dict[str, Any] = config.model_dump(
            exclude_none=True, exclude={"rewards"}
        )  # Python functions have no name
        for override in overrides:
            values = overridden(values, override.replace(" = ", "=", 1))
        changed = configs.settle(values)
        prompt = min(work.prompt, changed.sampling.max_prompt_tokens or work.prompt)
        step = replace(work_of(changed, work.shape, prompt, gpu=work.gpu), padded=work.padded)
        peak = _peak(step, pieces) if budget is None else _least_budget(changed, step)
        found.append(Alternative(", ".join(overrides) + note, peak))
    return tuple(found)


def _changes(config: RunConfig, work: Work, sizes: Sizes) -> Iterator[tuple[list[str], str, Sizes]]:
    """What could be set otherwise: the settings, a note, and the pieces."""
    adapter, whole = config.adapter, work.trained.whole
    if not work.nf4 and not whole:
        yield ['model.dtype = "nf4"'], "", sizes
    kept = footprint.kept_layers(work)
    third = max(work.shape.layers // 3, 1)
    if hasattr(adapter, "layers") and kept > 1:
        yield ['adapter.layers = "last-third"' if kept > third else f"adapter.layers = {kept // 2}"], "", sizes
    if whole:
        yield ['adapter.name = "lora"'], "", sizes
    if config.optim.name == "adamw":
        yield ['optim.name = "adamw-8bit"' if whole else 'optim.name = "adamw-cpu"'], "", sizes
    if sizes.wave_rows > 1:
        half = -(-sizes.wave_rows // 2)
        note = f" ({-(-work.rows // half)} waves)"
        yield [f"execution.wave_tokens = {half * work.slots}"], note, sizes._replace(wave_rows=half)
    if not sizes.checkpointing or config.execution.checkpointing is False:
        yield ["execution.checkpointing = true"], "", sizes._replace(checkpointing=True)
    if sizes.micro_rows > 1:
        yield [f"execution.micro_batch_tokens = {work.row_tokens}"], " (one row)", sizes._replace(micro_rows=1)
    if work.added > 1:
        yield [f"sampling.max_new_tokens = {work.added // 2}"], "", sizes
    if work.prompt > 1:
        cut = config.allow_truncated_prompts or config.sampling.max_prompt_tokens is not None
        more = [] if cut else ["allow_truncated_prompts = true"]
        yield [f"sampling.max_prompt_tokens = {work.prompt // 2}", *more], "", sizes
    if getattr(adapter, "rank", 1) > 1:
        yield [f"adapter.rank = {adapter.rank // 2}"], "", sizes


# --- how long prompts are -------------------------------------------------------------------------------------------


def _prompt_tokens(config: RunConfig) -> tuple[int, str]:
    """Tokens of the longest prompt, and how that is known, without transformers: about, where a chat template is on
    top."""
    limit = config.sampling.max_prompt_tokens
    if limit is not None:
        return limit, ""
    count = _text_tokens(config)
    if not count:
        return _ASSUMED_PROMPT, f"prompts are taken to have {_ASSUMED_PROMPT} tokens: set sampling.max_prompt_tokens"
    if config.task.format == "plain":
        return count, f"prompts have up to {count} tokens"
    return count + _TEMPLATE_TOKENS, f"prompts have up to about {count + _TEMPLATE_TOKENS} tokens"


def _text_tokens(config: RunConfig) -> int:
    """Tokens of the longest prompt's bare text; 0 where the data or the tokenizer are not at hand."""
    try:
        longest, tokenizer = _longest_texts(config), _tokenizer(config)
    except Exception:  # no data, no tokenizer, or one of a kind that cannot be read: an assumption has to do
        return 0
    if tokenizer is None:
        return 0
    return max((len(tokenizer.encode(text).ids) for text in longest), default=0)


def _longest_texts(config: RunConfig) -> list[str]:
    """The longest of the prompts in memory, or some of those that are made as they are read."""
    problems = config.task.problems("train")
    chosen = longest_problems(config.task, problems)
    return [plain_text(config.task.ask(problem)) for problem in chosen]


def longest_problems(task: Task, problems: Sequence[Any]) -> list[Any]:
    """The problems with the longest texts; of data that are made as they are read, some from all over."""
    if isinstance(problems, (list, tuple)):
        return sorted(problems, key=lambda problem: -len(plain_text(task.ask(problem))))[:_LOOKED_AT]
    apart = max(len(problems) // _LOOKED_AT, 1)
    return [problems[i] for i in range(0, len(problems), apart)][:_LOOKED_AT]


def _tokenizer(config: RunConfig) -> Any:
    from tokenizers import Tokenizer

    file = Path(locate(config.model.name).path) / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def _total(gpu: bool) -> int | None:
    """The memory of the card here, or of the machine; None where the run's card is not here."""
    import torch

    from shoestring.allocator import total_bytes

    if gpu and not torch.cuda.is_available():
        return None
    return total_bytes(torch.device("cuda" if gpu else "cpu"))
