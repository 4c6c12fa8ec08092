"""The adapters: one small file each. The table is the list."""

from __future__ import annotations

from typing import Any

from shoestring.adapters.adalora import AdaLoRA
from shoestring.adapters.lora import LoRA
from shoestring.adapters.lora_xs import LoRAXS
from shoestring.adapters.miss import MiSS
from shoestring.adapters.none import NoAdapter
from shoestring.adapters.peft import Peft
from shoestring.adapters.peft_presets import DoRA, RsLoRA, VeRA

ADAPTERS: dict[str, type[Any]] = {
    "lora": LoRA,
    "lora-xs": LoRAXS,
    "miss": MiSS,
    "peft": Peft,
    "dora": DoRA,
    "rslora": RsLoRA,
    "vera": VeRA,
    "adalora": AdaLoRA,
    "none": NoAdapter,
}
