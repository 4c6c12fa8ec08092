"""Compiles the kernels of a decode step for cards that are not here, and prints what came of it: a JSON list. A program
of its own, since Triton either compiles or interprets.

python tests/compiled.py CAPABILITY SHARED_KIB
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shoestring.kernels import decode
from shoestring.samplers.fused import Fused

INTEGERS = ("rows", "outs", "inputs", "tail", "x_stride", "layer", "stride", "window")
SINGLES = ("eps", "scale", "scaling")
TABLES = {"info": "*i32", "where": "*i64", "inv_freq": "*fp32", "mass": "*fp32"}
# What the launcher finds out by itself: addresses and sizes that are multiples of 16.
ALIGNED = ("outs", "inputs", "tail", "x_stride", "stride")


def compiled(kernel: Any, capability: int, constants: dict[str, Any], stages: int) -> dict[str, Any]:
    """For bf16."""
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        integer = "*i64" if name == "rows" and kernel is decode.attend else "i32"
        kind = integer if name in INTEGERS else "fp32" if name in SINGLES else TABLES.get(name, "*bf16")
        types[name] = "constexpr" if name in constants else kind
    names = enumerate(kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if types[name][0] == "*" or name in ALIGNED}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": stages})
    text = made.asm["ptx"]
    return {
        "kernel": kernel.fn.__name__,
        **constants,
        "shared": made.metadata.shared,
        "ahead": len(re.findall(r"cp\.async\.cg\.shared\.global .*\], 0x10", text)),
        "one by one": len(re.findall(r"ld\.global\S*\.b16 ", text)),
    }


def main(capability: int, shared: int) -> None:
    do, found = Fused(shared=shared * 2**10), []
    for rows, outs in ((16, 3072), (64, 576), (256, 576)):
        for norm, gated in ((True, False), (True, True), (False, False)):
            block_m, block_n, block_k, stages = do.blocks(rows, outs, 64, 2, gated=gated)
            sizes = {"RANK": 64, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
            constants = {"NORM": norm, "BIAS": norm, "GATED": gated, "ADD": not norm, **sizes}
            found.append(compiled(decode.product, capability, constants, stages))
    for size in (64, 128, 256):
        block, stages = do.block(size, 2)
        constants = {"KV": 2, "REPEAT": 6, "PADDED": 16, "D": size, "BLOCK": block, "SPLITS": 1, "NORM": False}
        found.append(compiled(decode.attend, capability, constants, stages))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
