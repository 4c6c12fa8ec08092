"""How long prompts are, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoestring.config.run import RunConfig
from shoestring.model.chat import plain_text
from shoestring.model.load import locate
from shoestring.tasks.base import Task

# Prompt tokens where neither the setting nor the data tells.
_ASSUMED_PROMPT = 256


_LOOKED_AT = 64


# What a chat template puts around a message, about.
_TEMPLATE_TOKENS = 32


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
