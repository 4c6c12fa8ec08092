"""One decode step over the policy's own weights, without transformers' layers around them.

The products of one input are fused: q, k and v (gate and up) become rows of one storage, of which the model's own
weights are views, so nothing is copied and nothing else notices. LoRA (arXiv 2106.09685) stays beside the base weights,
as two thin products for each fused one; so does every other adapter that has factors (`shoestring.model.adapter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoestring.model.fast.linear import Part, Product, _base, _shared_out
from shoestring.model.fast.operations import Heads, Operations, Stream, Table
from shoestring.model.fast.torch_operations import Plain, keep_entropy
from shoestring.model.fast.triton_operations import Fused
from shoestring.model.fast.triton_training import has_flash
from shoestring.model.sampling import Sampling
from shoestring.model.traits import MODELS, traits_of, unknown_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shoestring.model.adapter import Factors, Handle

# Linear modules of a layer that share an input, and are one product.
PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def unsupported(model: PreTrainedModel, handle: Handle | None = None) -> str:
    """Why this model, with the adapter of `handle` in it, has no decode step here; empty if it has one."""
    base: Any = model
    traits = traits_of(base.config.to_dict())
    gpu = base.device.type == "cuda"
    if traits.model_type not in MODELS:
        return unknown_layers(traits, 0, gpu=gpu)
    size = base.base_model.layers[0].self_attn.head_dim
    rotary = base.base_model.rotary_emb
    rope = getattr(rotary, "rope_type", "default")
    share = 2 * len(rotary.inv_freq) / size
    reason = unknown_layers(traits._replace(rope=rope, rotary_share=share), size, gpu=gpu)
    if reason:
        return reason
    if type(base.lm_head) is not nn.Linear:
        return "there is an adapter on its vocabulary matrix"
    if base.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weights are {base.dtype}"
    return next((reason for m in _linears(base) if (reason := _odd(m, handle))), "")


def _linears(base: Any) -> list[Any]:
    return [m for layer in base.base_model.layers for name, m in _named(layer)]


def _named(layer: Any) -> list[tuple[str, Any]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *((name, getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *((name, getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")),
    ]


def _odd(module: Any, handle: Handle | None) -> str:
    """What is unknown about a linear module, if anything is."""
    linear = _base(module)
    if type(linear) is not nn.Linear and type(linear).__name__ != "Linear4bit":
        return f"a layer holds a {type(linear).__name__}"
    if linear is module:
        return ""
    with torch.no_grad():
        factors = handle.factors(module) if handle is not None else None
    return "its adapter is no product of two thin matrices" if factors is None else ""


def join_on(model: Any, device: torch.device) -> None:
    """Brings to the device what is to be joined, each product as a whole: joined there later, the parts would leave
    holes in its memory."""
    if model.config.model_type not in MODELS:
        return
    for layer in model.base_model.layers:
        named = dict(_named(layer))
        for names in PRODUCTS:
            linears = [named[name] for name in names]
            if len(linears) == 1 or any(type(linear) is not nn.Linear for linear in linears):
                continue
            for parts in ([x.weight for x in linears], [x.bias for x in linears]):
                if all(part is not None for part in parts):
                    _shared_out(torch.cat([part.data for part in parts]).to(device), parts)


@dataclass(frozen=True)
class Layer:
    """A decoder layer, as the step needs it."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    first_norm: Tensor
    second_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    window: int | None


class Decoder:
    """The decode step of one model, with the adapter in it."""

    def __init__(self, base: Any, handle: Handle | None = None):
        self.handle = handle
        config, model = base.config, base.base_model
        self.device = base.device
        self.dtype = base.dtype
        self.operations: Operations = Fused.on(self.device) if self.device.type == "cuda" else Plain()
        self.flash = has_flash(self.device, self.dtype)
        attention = model.layers[0].self_attn
        rotary = model.rotary_emb
        self.heads = Heads(
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            rotary.inv_freq.to(self.device, torch.float32),
            float(getattr(rotary, "attention_scaling", 1.0)),
            config.rms_norm_eps,
        )
        self.eps = config.rms_norm_eps
        self.embedding = base.get_input_embeddings().weight
        self.last_norm = model.norm.weight
        self._head = base.lm_head
        self.layers = [self._layer(layer, index, config) for index, layer in enumerate(model.layers)]
        self.hidden_size, self.vocab_size = config.hidden_size, len(self._head.weight)
        self._weights = [weight for product in self.products for weight in product.weights]
        parts = [part for product in self.products for part in product.parts]
        self._computed = [part for part in parts if part.computed]
        own = [(p.down_rows, p.down, p.up_block, p.up, p.scaling) for p in parts if not p.computed]
        self._adapters = [list(column) for column in zip(*own, strict=True)]
        self.sync()

    def _layer(self, layer: Any, index: int, config: Any) -> Layer:
        named = dict(_named(layer))
        attention = layer.self_attn
        qkv, out, gate_up, down = (
            Product([named[name] for name in names], self.dtype, self.handle) for names in PRODUCTS
        )
        norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
        return Layer(
            qkv,
            out,
            gate_up,
            down,
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            norms,
            _window(config, index),
        )

    @property
    def products(self) -> list[Product]:
        return [p for layer in self.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    def intact(self) -> bool:
        """Whether the model's weights still lie in the joined storages: `.to()` and `deepcopy` part them."""
        return all(owner[name] is weight and weight.data_ptr() == at for owner, name, weight, at in self._weights)

    def sees_all(self, length: int) -> bool:
        """Whether attention reaches back to the start of a text of so many tokens in every layer."""
        return all(layer.window is None or layer.window >= length for layer in self.layers)

    @torch.no_grad()
    def sync(self) -> None:
        """Take over the adapter's weights as they are now."""
        for part in self._computed:
            part.fill(self._factors(part))
        if not self._adapters:
            return
        down, a, up, b, scaling = self._adapters
        torch._foreach_copy_(down, a)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(up, b)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(up, scaling)  # pyright: ignore[reportPrivateImportUsage]

    def pull_back(self) -> None:
        """Add the gradients that computed factors have gathered to those of the parameters they are computed from."""
        roots: list[Tensor] = []
        grads: list[Tensor] = []
        for part in self._computed:
            if part.gathered:
                with torch.enable_grad():
                    found = part.gradients(self._factors(part))
                roots += [root for root, _ in found]
                grads += [grad for _, grad in found]
        if roots:  # on this thread: one of autograd's own would have a cuBLAS workspace of its own
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.backward(roots, grads)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients that computed factors have gathered."""
        for part in self._computed:
            part.drop_gradients()

    def _factors(self, part: Part) -> Factors:
        assert self.handle is not None
        factors = self.handle.factors(part.module)
        assert factors is not None, "an adapter has lost its factors"
        return factors

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, V] from the last norm's output, [B, H]."""
        return self._head(hidden)

    @torch.no_grad()
    def step(self, rows: Tensor, table: Table, sampling: Sampling, trunk_layer: int | None = None) -> None:
        """One token more for each of `rows`, [B]; what enters `trunk_layer` is kept."""
        self.draw(self.logits(self.hidden(rows, table, trunk_layer)), rows, table, sampling)

    def draw(self, logits: Tensor, rows: Tensor, table: Table, sampling: Sampling) -> None:
        """Draws each row's next token from logits, [B, V], and writes it down."""
        token, logprob = self.operations.pick(logits, rows, table, sampling)
        if sampling.entropy:
            keep_entropy(logits, rows, table, sampling)
        self.operations.advance(token, logprob, rows, table)

    def hidden(self, rows: Tensor, table: Table, trunk_layer: int | None = None) -> Tensor:
        """Runs each row's next token, writing its keys and values: [B, H] behind the last norm."""
        do, eps = self.operations, self.eps
        stream = Stream(do.begin(rows, table, self.heads, self.embedding))
        next_norms = [*(layer.first_norm for layer in self.layers[1:]), None]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            if index == trunk_layer:
                do.keep(stream.x, rows, table)
            qkv = do.normed_linear(stream, layer.first_norm, eps, layer.qkv)
            found = do.attend(qkv, rows, table, index, self.heads, layer.head_norms, layer.window)
            do.add_linear(stream, found, layer.out, layer.second_norm)
            do.add_linear(stream, do.normed_gated(stream, layer.second_norm, eps, layer.gate_up), layer.down, next_norm)
        return do.norm(stream.x, self.last_norm, eps)


def _window(config: Any, layer: int) -> int | None:
    """Tokens that attention reaches back in a layer; None without a limit."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if kinds[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
