"""The optimizers: one small file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.optimizers.adamw import AdamW
from shoestring.optimizers.adamw_8bit import AdamW8bit
from shoestring.optimizers.adamw_cpu import AdamWCpu
from shoestring.optimizers.galore import GaLore
from shoestring.optimizers.lion import Lion
from shoestring.optimizers.lora_plus import LoRAPlus
from shoestring.optimizers.sgd import SGD

OPTIMIZERS: dict[str, type[Any]] = {
    "adamw": AdamW,
    "adamw-8bit": AdamW8bit,
    "adamw-cpu": AdamWCpu,
    "sgd": SGD,
    "lion": Lion,
    "lora-plus": LoRAPlus,
    "galore": GaLore,
}
