"""A config's step in the terms of the formulas."""

from __future__ import annotations

from shoestring.adapters.base import AdapterCost
from shoestring.config.run import RunConfig
from shoestring.memory.footprint import Work
from shoestring.model.capability import fast_path, plain_attention
from shoestring.model.shapes import FAMILIES, Shape
from shoestring.optimizers.base import TrainedSizes


def on_gpu(config: RunConfig) -> bool:
    if config.execution.device == "auto":
        import torch

        return torch.cuda.is_available()
    return config.execution.device.startswith("cuda")


def work_of(config: RunConfig, shape: Shape, prompt: int, *, gpu: bool) -> Work:
    """A config's step, in the terms of the formulas."""
    dtype = config.model.dtype
    itemsize = {"bf16": 2, "fp16": 2, "fp32": 4}.get(dtype, 2 if gpu else 4)
    trained = config.adapter.cost(shape)
    sizes = trained_sizes(shape, trained, itemsize, gpu=gpu)
    sampling = config.drawing
    slow = fast_path(shape, config.model, config.adapter, gpu=gpu)
    graph = config.sampler.name in ("auto", "graph") and not slow
    plainly = not config.execution.plain and not plain_attention(shape, config.model)
    own_layers = plainly and not slow and not trained.whole
    trees = plainly and (own_layers or not shape.traits.window)
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
        state=config.optim.state_bytes(sizes),
        step_temporaries=config.optim.step_bytes(sizes),
        reference=reference,
        slow=slow,
        graph=graph,
        filtered=bool(config.eval_every or sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.entropy),
        trees=trees,
        own_layers=own_layers,
        flash=gpu and itemsize == 2 and _has_flash(),
        trunk_rows=_trunk_rows(config, trained) if graph and trees else 0,
    )


def _has_flash() -> bool:
    """Whether torch has FlashAttention on the card here; a card that is not here is taken for one that has it."""
    import torch

    from shoestring.model.fast.triton_training import has_flash

    return not torch.cuda.is_available() or has_flash(torch.device("cuda"), torch.bfloat16)


def _trunk_rows(config: RunConfig, trained: AdapterCost) -> int:
    """Completions whose residual stream in front of the first trained layer may be kept for training."""
    if trained.whole or trained.first_layer == 0 or config.execution.trunk_cache is False:
        return 0
    return config.sampling.most_prompts * config.sampling.num_completions


def trained_sizes(shape: Shape, trained: AdapterCost, itemsize: int, *, gpu: bool) -> TrainedSizes:
    """The sizes of what is trained. Of an adapter the plan knows how many parameters a layer has, not how many matrices
    they are in."""
    if not trained.whole:
        layers = [(trained.layer_parameters,)] * trained.adapted_layers
        rest = trained.parameters - trained.layer_parameters * trained.adapted_layers
        return TrainedSizes((), (*layers, (rest,)), 4, whole=False, gpu=gpu)
    matrices = [(linear.outputs, linear.inputs) for linear in shape.linears] * shape.layers
    vocabulary = [(size // shape.hidden, shape.hidden) for size in (shape.embedding, shape.head) if size]
    rest = trained.parameters - sum(rows * columns for rows, columns in (*matrices, *vocabulary))
    return TrainedSizes(tuple(matrices), (*vocabulary, (rest,)), itemsize, whole=True, gpu=gpu)
