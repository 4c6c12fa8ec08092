"""Triton kernels for what plain torch does in several passes over a large tensor. Nothing here needs Triton until a
kernel is asked for."""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run over tensors of that type there. The first call on a GPU tries them: Triton may be
    missing, or the C compiler that it needs."""
    import torch

    known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    if device.type != "cuda" or not known or torch.version.cuda is None or find_spec("triton") is None:
        return False
    try:
        from shoestring.model.fast.kernels import head

        head.try_out(device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's own kinds differ from version to version
        warnings.warn(f"Triton does not work here, so log-probs are slower: {error}", stacklevel=2)
        return False
    return True
