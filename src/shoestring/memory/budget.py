"""The memory budget: sizes as people write them, what a card has, its cap, and a second try in smaller pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoestring.allocator import free_bytes, total_bytes
from shoestring.config.sizes import parse_size, size_text
from shoestring.errors import ConfigError

if TYPE_CHECKING:
    import torch


def budget_bytes(text: str | None, total: int | None) -> int | None:
    """The budget that `memory` sets on a card (or machine) of `total` bytes; None without the setting.

    A share needs a card to be a share of: without one (`total` None) it cannot be told in bytes.
    """
    if text is None:
        return None
    size = parse_size(text)
    if isinstance(size, float):
        if total is None:
            raise ConfigError(f'memory is "{text}"', "there is no card here to take a share of", 'write "6GiB" or such')
        return int(size * total)
    if total is not None and size > total:
        raise ConfigError(f'memory is "{text}"', f"there are {size_text(total)} in all", "write no more than that")
    return size


def check_room(budget: int, device: torch.device) -> None:
    """Raises `ConfigError` if other processes hold so much of the card that the budget is not there."""
    import torch

    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)  # so that the context of this process is counted already
    total, free = total_bytes(device), free_bytes(device)
    held = torch.cuda.memory_allocated(device)
    if free + held < budget:
        raise ConfigError(
            f"memory is {size_text(budget)}",
            f"of the card's {size_text(total)} only {size_text(free + held)} are left; "
            f"{size_text(total - free - held)} are in use by other processes and by the CUDA context",
            f'end those processes, or write memory = "{(free + held) / 2**30 * 0.98:.1f}GiB" at most',
        )


def context_bytes(device: torch.device) -> int:
    """What this process and others hold of the card outside this process's allocator: CUDA context, loaded kernels."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
