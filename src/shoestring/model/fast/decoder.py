"""One decode step over the policy's own weights, without transformers' layers around them.

The products of one input are fused: q, k and v (gate and up) become rows of one storage, of which the model's own
weights are views, so nothing is copied and nothing else notices. LoRA (arXiv 2106.09685) stays beside the base weights,
as two thin products for each fused one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.model.fast.operations import Heads, Operations, Stream, Table
from shoestring.model.fast.torch_operations import Plain, keep_entropy
from shoestring.model.fast.triton_operations import Fused, has_flash
from shoestring.model.matmul import add_product
from shoestring.samplers.base import Sampling

if TYPE_CHECKING:
    from shoestring.model.policy import Policy

# Families whose layer is: norm, q k v, rotary embedding, attention, o, norm, SwiGLU.
MODELS = ("qwen2", "qwen3", "llama", "mistral")
# Linear modules of a layer that share an input, and are one product.
PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# Rotary embeddings whose frequencies do not change with the length of the text.
_ROPE = ("default", "linear", "llama3", "yarn")
# Rows of a storage are padded to this, to keep products on the tensor cores.
_ALIGNED = 8


def unsupported(policy: Policy) -> str:
    """Why this policy's model has no decode step here; empty if it has one."""
    base: Any = policy.base
    config = base.config
    if config.model_type not in MODELS:
        return f'models of type "{config.model_type}" are not among {", ".join(MODELS)}'
    rope = getattr(base.base_model.rotary_emb, "rope_type", "default")
    if rope not in _ROPE:
        return f'its rotary embedding is of type "{rope}"'
    if config.hidden_act not in ("silu", "swish"):
        return f'its activation is "{config.hidden_act}"'
    if type(base.lm_head) is not nn.Linear:
        return "there is an adapter on its vocabulary matrix"
    size = base.base_model.layers[0].self_attn.head_dim
    if 2 * len(base.base_model.rotary_emb.inv_freq) != size:
        return "its rotary embedding turns a part of each head only"
    if base.device.type == "cuda" and (size not in (16, 32, 64, 128, 256) or not _has_triton()):
        return f"its heads have {size} places" if _has_triton() else "Triton is not installed"
    if base.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its weights are {base.dtype}"
    return next((reason for m in _linears(base) if (reason := _odd(m))), "")


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def _linears(base: Any) -> list[Any]:
    return [m for layer in base.base_model.layers for name, m in _named(layer)]


def _named(layer: Any) -> list[tuple[str, Any]]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *((name, getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *((name, getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")),
    ]


def _odd(module: Any) -> str:
    """What is unknown about a linear module, if anything is."""
    linear = _base(module)
    if type(linear) is not nn.Linear and type(linear).__name__ != "Linear4bit":
        return f"a layer holds a {type(linear).__name__}"
    if linear is module:
        return ""
    plain = type(module).__name__ in ("Linear", "Linear4bit") and hasattr(module, "lora_A")
    names = list(getattr(module, "active_adapters", []))
    if not plain or len(names) != 1 or getattr(module, "lora_variant", {}) or module.merged:
        return "its adapter is more than plain LoRA"
    ups = [module.lora_B[name] for name in names if name in module.lora_B]
    return "its LoRA has a bias" if any(up.bias is not None for up in ups) else ""


def _base(module: Any) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module


@dataclass(frozen=True)
class _Thin:
    """LoRA of one linear module: A [r, in], B [out, r], both as they are trained."""

    down: nn.Parameter
    up: nn.Parameter
    scaling: float


def _thin(module: Any) -> _Thin | None:
    names = [name for name in getattr(module, "active_adapters", []) if name in getattr(module, "lora_A", {})]
    if not names:
        return None
    name = names[0]
    return _Thin(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


class Product:
    """One product for the linear modules that share an input: [B, in] -> [B, sum of outs]."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        self._linears = [_base(module) for module in modules]
        self.outs = sum(linear.out_features for linear in self._linears)
        self.weight = self.bias = None
        if all(type(linear) is nn.Linear for linear in self._linears):
            biases = [linear.bias for linear in self._linears]
            self.weight = _joined([linear.weight for linear in self._linears])
            self.bias = _joined(biases) if all(bias is not None for bias in biases) else None
        ranks = sum(len(thin.down) for module in modules if (thin := _thin(module)) is not None)
        self._tail = -(-ranks // _ALIGNED) * _ALIGNED
        options: dict[str, Any] = {"dtype": dtype, "device": self._linears[0].weight.device}
        self.down = torch.zeros(self._tail, self._linears[0].in_features, **options)
        self.up = torch.zeros(self.outs, self._tail, **options)
        self._parts = self._cut(modules)

    def _cut(self, modules: Sequence[Any]) -> list[tuple[Tensor, nn.Parameter, Tensor, nn.Parameter, float]]:
        """Where each adapter's A and B go: (rows of `down`, A, block of `up`, B, scaling)."""
        parts, out, rank = [], 0, 0
        self._blocks: list[tuple[slice, slice]] = []
        for module in modules:
            size = _base(module).out_features
            thin = _thin(module)
            if thin is not None:
                outs, ranks = slice(out, out + size), slice(rank, rank + len(thin.down))
                self._blocks.append((outs, ranks))
                parts.append((self.down[ranks], thin.down, self.up[outs, ranks], thin.up, thin.scaling))
                rank += len(thin.down)
            out += size
        return parts

    @property
    def parts(self) -> list[tuple[Tensor, nn.Parameter, Tensor, nn.Parameter, float]]:
        return self._parts

    @property
    def weights(self) -> list[tuple[dict[str, Any], str, nn.Parameter, int]]:
        """What lies joined: the owner's parameters, the name there, the parameter and its address."""
        joined = [name for name, whole in (("weight", self.weight), ("bias", self.bias)) if whole is not None]
        found = [(linear._parameters, name) for linear in self._linears for name in joined]
        return [(owner, name, owner[name], owner[name].data_ptr()) for owner, name in found]

    def __call__(self, x: Tensor) -> Tensor:
        """The product for the few rows of a decode step: for these bitsandbytes has kernels."""
        if self.weight is not None:
            return self.run(x)[0]
        several = [linear(x) for linear in self._linears]
        found = torch.cat(several, -1) if len(several) > 1 else several[0]
        return found.addmm_(self.inner(x), self.up.T) if self._tail else found

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """x += the product of y, of a decode step's few rows."""
        if self.weight is None or self.bias is not None:
            x.add_(self(y))
            return
        x.addmm_(y, self.weight.T)
        if self._tail:
            x.addmm_(self.inner(y), self.up.T)

    def run(self, x: Tensor, *, adapted: bool = True) -> tuple[Tensor, Tensor | None]:
        """The product, and what A gave, [B, tail], if there is an adapter; without it on request."""
        found = self._unpacked(x) if self.weight is None else F.linear(x, self.weight, self.bias)
        if not (self._tail and adapted):
            return found, None
        inner = self.inner(x)
        return found.addmm_(inner, self.up.T), inner

    def _unpacked(self, x: Tensor) -> Tensor:
        """The product with 4-bit weights, each of which goes straight to its columns."""
        found = x.new_empty(len(x), self.outs)
        for columns, linear in self._by_linear(found):
            weight = _dequantised(linear, x.dtype)
            if linear.bias is None:
                torch.mm(x, weight.T, out=columns)
            else:
                torch.addmm(linear.bias.to(x.dtype), x, weight.T, out=columns)
            del weight  # one at a time
        return found

    def _by_linear(self, whole: Tensor) -> Iterable[tuple[Tensor, Any]]:
        """The columns of [B, outs] that belong to each linear module."""
        return zip(whole.split([linear.out_features for linear in self._linears], -1), self._linears, strict=True)

    def inner(self, x: Tensor) -> Tensor:
        """What A gives, [B, tail]."""
        return F.linear(x, self.down)

    def back(self, grad: Tensor, *, adapted: bool = True, through: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """From the gradient of the product, [B, outs], that of x, [B, in] (unless not `through`), and that of what A
        gave, [B, tail], if there is an adapter."""
        found = self._back_through(grad) if through else None
        if not (self._tail and adapted):
            return found, None
        pulled = grad @ self.up
        if found is not None:
            found.addmm_(pulled, self.down)
        return found, pulled

    def add_gradients(self, grad: Tensor, pulled: Tensor, x: Tensor, inner: Tensor) -> None:
        """Adds those of each A and B to the parameters' own, from those of the product and of what A gave."""
        ranks = sum(len(a) for _, a, *_ in self._parts)
        _add_gradient([a for _, a, *_ in self._parts], pulled[:, :ranks].T, x)
        for (out, rank), (*_, b, scaling) in zip(self._blocks, self._parts, strict=True):
            _add_gradient([b], grad[:, out].T, inner[:, rank], scaling)

    def _back_through(self, grad: Tensor) -> Tensor:
        """[B, in], through the base weights."""
        if self.weight is not None:
            return grad @ self.weight
        total: Tensor | None = None
        for part, linear in self._by_linear(grad):
            weight = _dequantised(linear, grad.dtype)
            total = part @ weight if total is None else total.addmm_(part, weight)
            del weight  # one at a time
        assert total is not None
        return total


def _dequantised(linear: Any, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight, [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)


def _add_gradient(parameters: Sequence[nn.Parameter], a: Tensor, b: Tensor, scaling: float = 1.0) -> None:
    """Adds scaling a b, whose rows are those of the parameters, to their gradients, which come to lie joined."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(grads) == len(parameters):
        total = _joined(grads) if len(grads) > 1 else grads[0]
        add_product(total, a, b, scale=scaling)
        return
    total = a.new_empty(len(a), b.shape[1], dtype=parameters[0].dtype)
    add_product(total, a, b, scale=scaling, fresh=True)
    for parameter, rows in zip(parameters, total.split([len(parameter) for parameter in parameters]), strict=True):
        if parameter.requires_grad:
            parameter.grad = rows if parameter.grad is None else parameter.grad + rows


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One storage for tensors of [n, ...] each, which become its rows. It has the size of what it takes the place of,
    so that the next layer's fits where this one's lay."""
    first = parts[0].data
    count = sum(map(len, parts))
    if _follow(parts):  # they were joined when they were loaded
        return first.as_strided((count, *first.shape[1:]), first.stride())
    return _shared_out(torch.cat([part.data for part in parts]), parts)


def _shared_out(joined: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Makes the parts the rows of `joined`, which holds what they do."""
    for part, rows in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return joined


def _follow(parts: Sequence[Tensor]) -> bool:
    """Whether tensors lie one behind the other in one storage."""
    storage, start = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != start or not part.is_contiguous():
            return False
        start += part.nbytes
    return True


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
    """The decode step of one policy."""

    def __init__(self, policy: Policy):
        base: Any = policy.base
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
        self._adapters = [list(part) for part in zip(*(p for x in self.products for p in x.parts), strict=True)]
        self.sync()

    def _layer(self, layer: Any, index: int, config: Any) -> Layer:
        named = dict(_named(layer))
        attention = layer.self_attn
        qkv, out, gate_up, down = (Product([named[name] for name in names], self.dtype) for names in PRODUCTS)
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
        """Takes over the adapter's weights as they are now."""
        if not self._adapters:
            return
        down, a, up, b, scaling = self._adapters
        torch._foreach_copy_(down, a)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(up, b)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(up, scaling)  # pyright: ignore[reportPrivateImportUsage]

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
