"""Compile every Triton kernel for four GPUs without having one, and check the results.

    python -m benchmarks.aot [--targets sm_90 gfx942] [--kernels gradient] [--json FILE]

Ahead of time (AOT): Triton needs a GPU to run a kernel, but not to compile it. The compiled code
shows: registers of a thread, and spills to memory (slow); shared memory of a program (too much: no
launch); if the matrix product uses the matrix instruction (else it takes ten times as long); bytes
that a thread loads at once (16 are best). The variants are those that kernels/ launches, with its
block shapes and with arguments specialised as in a launch. Prints a table; exits 1 if a check of
`failures` fails.

NVIDIA's registers and spills are from ptxas as Triton calls it, with its options. Not with
TRITON_INTERPRET=1, which makes kernels Python at import. Triton 3.6 to 3.9.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Device(NamedTuple):
    target: GPUTarget
    shared: int  # most bytes of shared memory (AMD: LDS) of a program
    matrix: str  # the instruction that multiplies matrices


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 166_912, "mma.sync"),  # A100
    "sm_90": Device(GPUTarget("cuda", 90, 32), 232_448, "wgmma"),  # H100, H200
    "sm_100": Device(GPUTarget("cuda", 100, 32), 232_448, "tcgen05.mma"),  # B200
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 65_536, "mfma"),  # MI300
}
KERNELS = ("statistics", "gradient", "topk", "parts", "merge")
# Qwen3-14B. Of sizes and strides only 1 and multiples of 16 change the code.
VOCABULARY, SLICE = 151_936, 4096
# SmolLM2-135M and Qwen3-14B: queries of a key, head dim, branches of a tile on a trunk.
BRANCHES = ((3, 64, 16), (5, 128, 8))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Launch(NamedTuple):
    kernel: Any  # a function under @triton.jit
    variant: str
    arguments: dict[str, Any]  # "*bf16" a tensor, None none; others: see `argument`
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def launches() -> list[Launch]:
    from kernels import branch_parts, tiles

    return [*_statistics(tiles), *_gradient(tiles), *_topk(tiles), *_branches(branch_parts)]


def _statistics(tiles: ModuleType) -> Iterator[Launch]:
    for logits, kept, columns in (
        ("*bf16", None, VOCABULARY),  # kernels/logits.py
        ("*fp32", None, VOCABULARY),
        ("*fp32", "*fp16", SLICE),  # kernels/slices.py
        ("*fp32", "*fp32", SLICE),
    ):
        arguments = dict(
            LOGITS=logits, EXPONENTIALS=kept, columns=columns, row_stride=columns, column_stride=1,
            first=0,
        )  # fmt: skip
        variant = f"{logits[1:]} logits, {_keeps(kept)}"
        yield Launch(tiles.statistics, variant, arguments, {"num_warps": tiles.WARPS})


def _gradient(tiles: ModuleType) -> Iterator[Launch]:
    for values, source, out in (
        ("*bf16", "logits", "*bf16"),  # kernels/logits.py
        ("*fp32", "logits", "*fp32"),
        ("*fp32", "logits", "*bf16"),  # kernels/slices.py
        ("*fp16", "exp(x)", "*bf16"),
        ("*fp32", "exp(x)", "*fp32"),
    ):
        kept = source == "exp(x)"
        arguments = dict(
            VALUES=values, OUT=out, ROWS="*i64" if kept else None, OFFSET="*fp32" if kept else None,
            row_stride=SLICE, column_stride=1, columns=SLICE, out_stride=SLICE, first=0,
            offset_stride=-(-VOCABULARY // SLICE) if kept else 0,
        )  # fmt: skip
        variant = f"{values[1:]} {source} to {out[1:]}"
        yield Launch(tiles.gradient, variant, arguments, {"num_warps": tiles.WARPS})


def _topk(tiles: ModuleType) -> Iterator[Launch]:
    for k in (16, tiles.MOST):
        arguments = dict(
            LOGITS="*fp32", COLUMNS="*i64", row_stride=SLICE, column_stride=1, columns=SLICE, K=k
        )
        yield Launch(tiles.topk, f"fp32 logits, k = {k}", arguments, {"num_warps": tiles.WARPS})


def _branches(branch_parts: ModuleType) -> Iterator[Launch]:
    for dtype, (rep, size, width), own in product(DTYPES, BRANCHES, (False, True)):
        known, options = branch_parts.constants(DTYPES[dtype], rep, size, 1 if own else width)
        strides = (x for x in branch_parts.parts.arg_names if x.endswith("_stride"))
        arguments = known | dict.fromkeys(strides, size) | dict(
            Q=f"*{dtype}", KEYS=f"*{dtype}", VALUES=f"*{dtype}", TABLE=None if own else "*i32",
            START=None if own else "*i64", LIMIT="*i64", tokens=8000, branches=64,
            first_piece=0, pieces=2,
        )  # fmt: skip
        variant = f"{dtype}, {'own' if own else 'trunk'}, D = {size}"
        yield Launch(branch_parts.parts, variant, arguments, options)
    for dtype, pieces in product(DTYPES, (2, 2 * branch_parts.MOST_PIECES)):
        known, options = branch_parts.constants_of_merge(pieces, 128)
        arguments = known | {"RESULT": f"*{dtype}"}
        yield Launch(branch_parts.merge, f"{dtype}, {pieces} pieces", arguments, options)


def _keeps(kept: str | None) -> str:
    return f"keep {kept[1:]}" if kept else "keep no"


def argument(launch: Launch, name: str, constant: bool) -> Any:
    """Return an argument of a launch; default: a constant of its module, or an fp32 tensor."""
    if name in launch.arguments:
        return launch.arguments[name]
    if constant:
        return getattr(sys.modules[launch.kernel.__module__], name)
    if name.isupper():
        return "*i64" if name == "TARGETS" else "*fp32"
    raise ValueError(f"{launch.name} takes {name}; say in benchmarks/aot.py what it is")


def translate(launch: Launch, target: GPUTarget):
    """Compile the kernel as a launch with these arguments would."""
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = argument(launch, param.name, param.is_constexpr)
        number = isinstance(value, int) and not param.do_not_specialize
        # None and 1 are compiled in, as constants are.
        if param.is_constexpr or value is None or (number and value == 1):
            signature[param.name], constants[(i,)] = "constexpr", value
            continue
        signature[param.name] = value if isinstance(value, str) else "i32"
        aligned = isinstance(value, str) and not param.do_not_specialize_on_alignment
        if aligned or (number and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = launch.options | {"enable_fp_fusion": True}  # the default differs between versions
    return triton.compile(source, target=target, options=options)


def inspect(launch: Launch, device: Device) -> dict[str, Any]:
    """Return registers, spills, shared memory, matrix instruction, bytes of the widest load."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # Triton prints the output of ptxas -v there
        compiled = translate(launch, device.target)
    if device.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        loads = re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", assembly)
        widest = max(4 * int(count or 1) for count in loads)
    else:
        assembly = compiled.asm["ptx"]
        registers = int(re.search(r"Used (\d+) registers", log.getvalue()).group(1))
        spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", log.getvalue())))
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)\s", assembly)
        widest = max(int(count or 1) * int(bits) // 8 for count, bits in loads)
        widest = max(widest, 16 if "cp.async.cg" in assembly else 0)  # straight to shared memory
    return {
        "registers": registers, "spills": spills, "shared": compiled.metadata.shared,
        "matrix": next((m for m in (device.matrix, "mma.sync") if m in assembly), ""),
        "load": widest,
    }  # fmt: skip


def failures(row: dict[str, Any]) -> list[str]:
    """Return the checks that a row of the table fails."""
    device, found = DEVICES[row["target"]], []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared"] > device.shared:
        found.append(f"shared memory {row['shared']}, the GPU has {device.shared}")
    # fp32 has none; the newer instructions need more than the 16 rows of one branch.
    enough = {device.matrix, "mma.sync" if "own" in row["variant"] else device.matrix}
    multiplies = row["kernel"] == "parts" and "bf16" in row["variant"]
    if multiplies and row["matrix"] not in enough:
        found.append(f"no {device.matrix}")
    if row["load"] < 16:
        found.append(f"loads of {row['load']} bytes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--json", type=Path, help="write the table here, too")
    o = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: kernels are Python then, nothing to compile; unset it")
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # the cache has no log
    print(f"triton {triton.__version__}")
    head = ("kernel", "variant", "target", "registers", "spills", "shared", "matrix", "load", "ok")
    line = "{:18}{:30}{:8}{:>9}{:>7}{:>8}  {:12}{:>4}  {}".format
    print(line(*head))
    rows = []
    for name in o.targets:
        for launch in launches():
            if launch.name not in o.kernels:
                continue
            row = {"kernel": launch.name, "variant": launch.variant, "target": name}
            row |= inspect(launch, DEVICES[name])
            row["ok"] = "; ".join(failures(row)) or "ok"
            rows.append(row)
            print(line(*(row[column] for column in head)), flush=True)
    if o.json:
        o.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
    bad = sum(row["ok"] != "ok" for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} pass")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
