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

INTEGERS = ("rows", "outs", "inputs", "tail", "parts", "x_stride", "layer", "stride", "window")
SINGLES = ("eps", "scale", "scaling")
TABLES = {"records": "*i64", "arrived": "*i32"} | dict.fromkeys(("turns", "mass", "squares", "sums", "part"), "*fp32")
# What the launcher finds out by itself: addresses and sizes that are multiples of 16.
ALIGNED = ("outs", "inputs", "tail", "x_stride", "stride")


def compiled(kernel: Any, capability: int, constants: dict[str, Any], stages: int, warps: int = 4) -> dict[str, Any]:
    """For bf16."""
    types: dict[str, str] = {}
    for name in kernel.arg_names:
        kind = "i32" if name in INTEGERS else "fp32" if name in SINGLES else TABLES.get(name, "*bf16")
        types[name] = "constexpr" if name in constants else kind
    names = enumerate(kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if types[name][0] == "*" or name in ALIGNED}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_stages": stages, "num_warps": warps, "launch_pdl": constants["EARLY"]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = made.asm["ptx"]
    before, _, _ = text.partition("griddepcontrol.wait")
    return {
        "kernel": kernel.fn.__name__,
        **constants,
        "shared": made.metadata.shared,
        "ahead": len(re.findall(r"cp\.async\.cg\.shared\.global .*\], 0x10", text)),
        "one by one": len(re.findall(r"ld\.global\S*\.b16 ", text)),
        "too early": len(re.findall(r"cp\.async\.cg|st\.global", before)) if constants["EARLY"] else 0,
        "let go": text.count("griddepcontrol.launch_dependents"),
    }


def main(capability: int, shared: int) -> None:
    early = capability >= 90
    do, found = Fused(shared=shared * 2**10, early=early), []
    for rows, outs, inputs in ((16, 3072, 576), (64, 576, 1536), (256, 576, 576)):
        for norm, gated, rank in ((True, False, 64), (True, True, 64), (False, False, 64), (False, False, 0)):
            tile = do.tile(rows, outs, inputs, rank, 2, gated=gated)
            sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.terms, "SPLITS": tile.splits}
            kind = {"NORM": norm, "BIAS": norm, "GATED": gated, "ADD": not norm, "GAIN": not norm, "RANK": rank}
            constants = {
                **kind,
                "PARTS": 64 if norm else 1,
                "EARLY": early,
                "FETCH": early,
                "EVEN": inputs % tile.terms == 0,
                **sizes,
            }
            found.append(compiled(decode.product, capability, constants, tile.stages))
    for size, programs in ((64, 300), (64, 30), (128, 300), (128, 30), (256, 30)):
        warps, block, stages = do.attention(programs, size, 2)
        sizes = {"KV": 2, "REPEAT": 6, "PADDED": 8, "D": size, "BLOCK": block, "SPLITS": 1}
        found.append(compiled(decode.attend, capability, {**sizes, "NORM": False, "EARLY": early}, stages, warps))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
