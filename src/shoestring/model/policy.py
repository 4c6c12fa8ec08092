"""The policy: one copy of the base model's weights, with an adapter in it or trained whole, which samples, trains and,
without its adapter, is its own reference."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring.errors import ConfigError
from shoestring.model.adapter import Handle
from shoestring.model.chat import Reader
from shoestring.model.fast.decoder import Decoder, unsupported
from shoestring.model.fast.layers import Pass, blocks_of
from shoestring.model.logit_transforms import POST_HEAD
from shoestring.model.logprobs import gathered_logprobs, selected_logprobs
from shoestring.model.structure import decoder_layers
from shoestring.model.trees import TREE_MODELS, attention_over_paths
from shoestring.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shoestring.model.chat import Messages

log = logging.getLogger("shoestring")


class Policy:
    """A causal model, its tokenizer, and what training and sampling ask of them.

    Modules stay in evaluation mode for good, so that dropout in a base model cannot part sampler and trainer.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        handle: Handle | None = None,
        name: str = "",
        first: PreTrainedModel | None = None,
    ):
        """`handle` is the adapter; `first` a frozen copy of `base`, where `base` itself is trained."""
        self.base = base
        self.tokenizer = tokenizer
        self.handle = handle
        self.adapted: nn.Module | None = None if handle is None or handle.model is base else handle.model
        self._first = first
        self.plain = False
        """Whether training goes through transformers, row by row: the reference of all that is faster."""
        self._decoder: Decoder | None = None
        self._as_reference = self._recompute = self._taken_over = False
        self.name = name
        self.eos_ids = _eos_ids(base, tokenizer)
        self.context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        post = POST_HEAD.get(base.config.model_type)
        self._post = post(base.config) if post and hasattr(base, "lm_head") else None
        if self._post is None:
            log.warning(
                'Models of type "%s" are read through their own logits: every token of a row meets the vocabulary '
                "matrix, which costs memory.",
                base.config.model_type,
            )
        parameters = inspect.signature(base.forward).parameters
        self.takes_positions = "position_ids" in parameters

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def end_id(self) -> int:
        """The token that closes a chat turn: the one to teach as the end of an answer."""
        own = self.tokenizer.eos_token_id
        return own if own is not None else self.eos_ids[0]  # type: ignore[return-value]

    @property
    def vocab_size(self) -> int:
        return self.base.config.get_text_config().vocab_size

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in the model's order."""
        return dict(self._trained)

    @cached_property
    def _trained(self) -> dict[str, nn.Parameter]:
        if self.handle is not None:
            return self.handle.parameters()
        return {name: parameter for name, parameter in self.base.named_parameters() if parameter.requires_grad}

    def encode(self, messages: Messages, form: str = "chat", options: dict[str, Any] | None = None) -> tuple[int, ...]:
        """Token ids of a prompt that ends where the answer starts."""
        return Reader(self.tokenizer, self.name, self.context).encode(messages, form, options)

    def decode(self, token_ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)  # type: ignore[return-value]

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probs of the batch's targets at their places, [N] in fp32. Only those places meet the vocabulary
        matrix."""
        if self._post is None:
            logits = self.base(input_ids=batch.input_ids, use_cache=False).logits
            return gathered_logprobs(logits[batch.row, batch.col], batch.target, temperature)
        hidden = self._selected_hidden(batch)
        head = self.base.lm_head
        if type(head) is not nn.Linear:  # an adapter on it, say: its weight is not all it does
            return gathered_logprobs(self._logits_of(hidden), batch.target, temperature)
        return selected_logprobs(hidden, head.weight, head.bias, batch.target, temperature, self._post)

    def _selected_hidden(self, batch: Batch) -> Tensor:
        """What the vocabulary matrix is given at the batch's places, [N, H]."""
        if batch.paths is None:
            hidden = self.base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            return hidden[batch.row, batch.col]
        if self.own_layers:
            return self._through_own_layers(batch)
        model, given = self.base.base_model, {"input_ids": batch.input_ids}
        if batch.trunk:
            model, given = self._upper, {"inputs_embeds": torch.cat(batch.trunk)[None]}
        with attention_over_paths(self.base.config):
            output = model(**given, position_ids=batch.paths.positions[None], use_cache=False, paths=batch.paths)
        return output.last_hidden_state[0, batch.paths.nodes[batch.row, batch.col]]

    def _through_own_layers(self, batch: Batch) -> Tensor:
        """The same by the layers of `shoestring.model.fast.layers`."""
        assert batch.paths is not None
        decoder, first = self.decoder, self.first_gradient_layer
        blocks = blocks_of(batch.paths) if decoder.sees_all(batch.paths.nodes.shape[1]) else None
        adapted = not self._as_reference
        if adapted and not self._taken_over:
            decoder.sync()
        flash = decoder.flash and batch.paths.unpadded is not None
        layers = Pass(decoder, batch.paths, adapted, blocks, flash, recompute=self._recompute)
        if batch.trunk:
            x = torch.cat(batch.trunk)
        else:
            with torch.no_grad():
                x = layers.run(nn.functional.embedding(batch.input_ids[0], decoder.embedding), decoder.layers[:first])
        x = layers.run(x, decoder.layers[first:])
        return layers.last_norm(x.index_select(0, batch.paths.nodes[batch.row, batch.col]))

    @cached_property
    def own_layers(self) -> bool:
        """Whether training runs the layers by our own code: for the models that the decode step knows, where nothing
        but factors of an adapter is trained. Set it to False for the reference, transformers' own."""
        return self._attends_plainly and self.adapted is not None and not unsupported(self.base, self.handle)

    @property
    def decoder(self) -> Decoder:
        """The decode step over the model's weights; made anew where these have been moved."""
        if self._decoder is None or not self._decoder.intact():
            self._decoder = Decoder(self.base, self.handle)
        return self._decoder

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, trained weights stay as they are: our own layers take them over once, and gradients of factors that
        are computed from parameters come to these once, at the end."""
        if self.own_layers:
            self.decoder.sync()
        self._taken_over = True
        try:
            yield
            self._taken_over = False
            self.pull_back()
        finally:
            self._taken_over = False
            if self._decoder is not None:  # those of micro-batches before a failed one
                self._decoder.drop_gradients()

    def pull_back(self) -> None:
        """Add the gradients of computed factors to their parameters'. Inside `unchanged` it waits for the end."""
        if self._decoder is not None and not self._taken_over:
            self._decoder.pull_back()

    def drop_gradients(self) -> None:
        """Forget the gradients of the trained parameters, and those of factors that have not come to them."""
        for parameter in self._trained.values():
            parameter.grad = None
        if self._decoder is not None:
            self._decoder.drop_gradients()

    def parameters_changed(self) -> None:
        """Look for the trained parameters again, and make the decode step again over them."""
        self.__dict__.pop("_trained", None)
        self.__dict__.pop("first_gradient_layer", None)
        self.__dict__.pop("_upper", None)
        self._decoder = None

    @property
    def takes_trees(self) -> bool:
        """Whether training can run what rows share once: the attention of every layer has to be torch's own over all
        that came before, or over a window of it in our own layers."""
        config = self.base.config
        window = config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None
        return self._attends_plainly and (not window or self.own_layers)

    @property
    def _attends_plainly(self) -> bool:
        config = self.base.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        known = config.model_type in TREE_MODELS and self._post is not None and not self.plain
        return known and kinds == {"full_attention"} and config._attn_implementation == "sdpa"

    @cached_property
    def first_gradient_layer(self) -> int:
        """The lowest layer with a trained parameter; 0 if the embedding is trained, all if nothing is."""
        return len(decoder_layers(self.base)[1]) - len(self._gradient_layers())

    @cached_property
    def _upper(self) -> Any:
        """The model from its first layer with a trained parameter upwards, over the same modules."""
        first = self.first_gradient_layer
        model: Any = copy.copy(self.base.base_model)
        model._modules = {**model._modules, "layers": nn.ModuleList(list(model.layers)[first:])}
        model.config = copy.copy(model.config)
        model.config.num_hidden_layers -= first
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[first:]
        return model

    def prefill(self, input_ids: Tensor, last: Tensor, cache: Any) -> Tensor:
        """Runs right-padded prompts, [P, L], into `cache`; the logits, [P, V], at each row's `last` place."""
        row = torch.arange(len(last), device=last.device)
        if self._post is None:
            return self.base(input_ids=input_ids, past_key_values=cache, use_cache=True).logits[row, last]
        output = self.base.base_model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return self._logits_of(output.last_hidden_state[row, last])

    def decode_step(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Logits, [B, V], behind one more token a row, [B, 1]; `mask`, [B, S], says which cache slots are real."""
        extra = {"position_ids": positions} if self.takes_positions else {}
        output = self.base(input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        return output.logits[:, -1]

    def _logits_of(self, hidden: Tensor) -> Tensor:
        assert self._post is not None
        return self._post(self.base.lm_head(hidden))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The policy as it was before training, without gradient: the base model without its adapter, or the copy."""
        if self._first is None and (self.handle is None or not self.handle.off_is_reference):
            given = "there is no adapter" if self.adapted is None else "the adapter turned off is not the first model"
            raise ConfigError(given, "the reference is the model without it", "set objective.beta = 0")
        _ = self._trained, self.first_gradient_layer  # found before PEFT freezes what it turns off
        self._as_reference = True
        try:
            with torch.no_grad(), self._copied() if self._first else self.handle.off():  # type: ignore[union-attr]
                yield
        finally:
            self._as_reference = False

    @contextmanager
    def _copied(self) -> Iterator[None]:
        """Has the copy of the first weights take the model's place."""
        assert self._first is not None
        trained, self.base = self.base, self._first
        try:
            yield
        finally:
            self.base = trained

    @contextmanager
    def checkpointing(self, on: bool) -> Iterator[None]:
        """Recomputes, in the backward pass, the layers that carry gradient; those below store nothing as it is.

        A layer asks its own `training` flag for this. Its children stay in evaluation mode, so no dropout wakes up.
        """
        layers = self._gradient_layers() if on else []
        recomputed: Any = partial(checkpoint, use_reentrant=False)
        if self.takes_trees:  # what is run again attends as it did at first
            contexts = lambda: (nullcontext(), attention_over_paths(self.base.config))  # noqa: E731
            recomputed = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        for layer in layers:
            layer.gradient_checkpointing = True
            layer.training = True
            layer._gradient_checkpointing_func = recomputed
        self._recompute = on
        try:
            yield
        finally:
            self._recompute = False
            for layer in layers:
                layer.gradient_checkpointing = False
                layer.training = False

    def _gradient_layers(self) -> list[Any]:
        """The decoder layers from the first with a trained parameter upwards."""
        _, layers = decoder_layers(self.base)
        if any(p.requires_grad for p in self.base.get_input_embeddings().parameters()):
            return list(layers)
        for index, layer in enumerate(layers):
            if any(p.requires_grad for p in layer.parameters()):
                return list(layers[index:])
        return []

    @property
    def result(self) -> Literal["adapter", "model"]:
        """What `save` writes."""
        return "model" if self.adapted is None else "adapter"

    def save(self, folder: Path) -> None:
        """Writes the adapter as PEFT does, so that `PeftModel.from_pretrained` reads it; without one, an ordinary model
        folder: weights in safetensors, config, tokenizer."""
        if self.handle is not None:
            self.handle.save(folder)
        else:
            self.base.save_pretrained(folder)
        if self.adapted is None:
            self.tokenizer.save_pretrained(folder)


def _eos_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a completion: the generation config's, and the tokenizer's own."""
    found = base.generation_config.eos_token_id if base.generation_config else None
    listed = found if isinstance(found, list) else [found]
    ids = sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})
    if not ids:
        raise ConfigError(
            f"model {base.config.name_or_path} names no end-of-sequence token",
            "its completions would never end",
            "set eos_token_id in its generation_config.json",
        )
    return tuple(ids)


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {
        name: value.to(device, non_blocking=True) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **moved, columns=batch.columns.to(device), paths=batch.paths and batch.paths.to(device))
