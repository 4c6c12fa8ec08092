"""Chat messages -> token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from shoestring.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = list[dict[str, str]]


def plain_text(messages: Messages) -> str:
    """The messages as bare text, for models without a chat template."""
    return "\n\n".join(message["content"] for message in messages)


class Reader(NamedTuple):
    """What reading prompts takes of a model: before its weights are there, or of a whole policy."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int | None

    def encode(self, messages: Messages, form: str = "chat", options: dict[str, Any] | None = None) -> tuple[int, ...]:
        """Token ids of a prompt that ends where the answer starts."""
        if form == "plain":
            return tuple(self.tokenizer(plain_text(messages))["input_ids"])  # type: ignore[arg-type]
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f'the tokenizer of model "{self.name}" has no chat template',
                "the task asks in chat messages",
                'use an instruction-tuned model, or write task.format = "plain"',
            )
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **(options or {})
        )
        return tuple(ids)  # type: ignore[arg-type]
