"""The adapters: one small file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.adapters.lora import LoRA

ADAPTERS: dict[str, type[Any]] = {
    "lora": LoRA,
}
