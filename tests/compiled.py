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

from shoestring.model.fast.kernels import decode
from shoestring.model.fast.triton_operations import Fused

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
    before, _, behind = text.partition("griddepcontrol.wait")
    given = [name for name in kernel.arg_names if types[name] != "constexpr"]
    read = {given[i] for i in read_in(before)} if constants["EARLY"] else set[str]()
    found = {
        "kernel": kernel.fn.__name__,
        **constants,
        "shared": made.metadata.shared,
        "ahead": len(re.findall(r"cp\.async\.cg\.shared\.global .*\], 0x10", text)),
        "one by one": len(re.findall(r"ld\.global\S*\.b16 ", text)),
        "read early": sorted(name for name in read if types[name][0] == "*"),
        "written early": len(re.findall(r"cp\.async\.cg|st\.global", before)) if constants["EARLY"] else 0,
        "let go": ("launch_dependents" in behind) - ("launch_dependents" in before),
    }
    if constants["SPLITS"] > 1 and kernel is decode.product:
        stored, _, counted = text.partition("atom.global.gpu.acq_rel.add")
        found["shown"] = "bar.sync" in stored[stored.rindex("st.global") :]
        found["parts"] = len(re.findall(r"ld\.global\.cg", counted))
    return found


def read_in(text: str) -> set[int]:
    """The places among a kernel's arguments of the addresses that a piece of PTX loads from, but for those that it
    only asks to be fetched."""
    sources: dict[str, set[str]] = {}
    loads: list[set[str]] = []
    for line in text.splitlines():
        line = re.sub(r"^\s*@!?%p\d+\s+", "", line).strip()
        parameter = re.match(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)", line)
        if parameter:
            sources[parameter[1]] = {parameter[2]}
            continue
        operands = re.match(r"(\S+)\s+(\{[^}]*\}|%\w+),?(.*)", line)
        if operands is None:
            continue
        given = set(re.findall(r"%\w+", operands[3]))
        if operands[1].startswith("ld.global"):
            loads.append(given)
        for made in re.findall(r"%\w+", operands[2]):
            sources[made] = sources.get(made, set()) | given
    found: set[str] = set()
    waiting = {name for given in loads for name in given}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name.isdigit():
            found.add(name)
        elif name not in seen:
            seen.add(name)
            waiting |= sources.get(name, set())
    return {int(name) for name in found}


def main(capability: int, shared: int) -> None:
    early = capability >= 90
    do, found = Fused(shared=shared * 2**10, early=early), []
    for rows, outs, inputs in ((16, 3072, 576), (64, 576, 1536)):
        for norm, gated, rank in ((True, False, 64), (True, True, 64), (False, False, 64), (False, False, 0)):
            tile = do.tile(rows, outs, inputs, rank, 2, gated=gated)
            sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.terms, "SPLITS": tile.splits}
            kind = {"NORM": norm, "BIAS": norm, "GATED": gated, "ADD": not norm, "GAIN": not norm, "RANK": rank}
            how = {"EARLY": early, "FETCH": early, "EVEN": inputs % tile.terms == 0, "PARTS": 64 if norm else 1}
            found.append(compiled(decode.product, capability, {**kind, **how, **sizes}, tile.stages))
    for size, programs, splits in ((64, 300, 1), (64, 30, 3), (128, 300, 1), (128, 30, 1), (256, 30, 1)):
        warps, block, stages = do.attention(programs, size, 2)
        sizes = {"KV": 2, "REPEAT": 6, "PADDED": 8, "D": size, "BLOCK": block, "SPLITS": splits}
        constants = {**sizes, "NORM": splits > 1, "EARLY": early}
        found.append(compiled(decode.attend, capability, constants, stages, warps))
    found.append(compiled(decode.combine, capability, {"D": 64, "SPLITS": 3, "PADDED": 4, "EARLY": early}, 1))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
