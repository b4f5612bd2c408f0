"""Compile kernels for GPUs that are not there: shared memory, registers, stack and PTX of a configuration.

Each kernel file says with `compile_specs()` what to compile: its kernels in every configuration of the table.
Needs no GPU, but Triton's compiler: not under TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # CUDA programming guide, per thread block


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSpec:
    """One kernel in one configuration for one architecture.

    types: of the runtime arguments in order, "*bf16", "i32", "fp32"; None for a pointer that is not passed.
    constants: the tl.constexpr arguments. unaligned: arguments that are not multiples of 16 (pointers and
    strides are by default, as torch's are; a launch finds that out by itself).
    """

    name: str
    kernel: Any
    sm: int
    types: tuple[str | None, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    unaligned: frozenset[str] = field(default=frozenset())
    has_fp_fusion: bool = True  # fused multiply-adds


class Compiled(NamedTuple):
    """What came out. stack_bytes above 0: registers were spilled, or an array was indexed at run time."""

    name: str
    sm: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    has_wgmma: bool
    has_async_copy: bool


def on_every_sm(
    kernel: Any,
    types: tuple[str | None, ...],
    num_warps: int,
    constants: Mapping[str, Any],
    *,
    num_stages: int = 3,  # Triton's default
    has_fp_fusion: bool = True,
) -> list[CompileSpec]:
    """Specs of a kernel whose configuration is the same on every GPU."""
    return [
        CompileSpec(
            name=f"{kernel.__name__} {dict(constants)}",
            kernel=kernel,
            sm=sm,
            types=types,
            constants=constants,
            num_warps=num_warps,
            num_stages=num_stages,
            has_fp_fusion=has_fp_fusion,
        )
        for sm in SHARED_BYTES
    ]


def compile_spec(spec: CompileSpec) -> Compiled:
    """Compile as a launch with these arguments would. Raises triton's CompilationError."""
    arguments = [name for name in spec.kernel.arg_names if name not in spec.constants]
    assert len(arguments) == len(spec.types), f"{spec.name}: {arguments} have types {spec.types}"
    signature = dict.fromkeys(spec.kernel.arg_names, "constexpr")
    constants: dict[str, Any] = dict(spec.constants)
    attributes = {}
    for name, kind in zip(arguments, spec.types, strict=True):
        if kind is None:
            constants[name] = None
            continue
        signature[name] = kind
        if kind[0] in "*i" and name not in spec.unaligned:
            attributes[(spec.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    source = ASTSource(spec.kernel, signature, constants, attributes)
    options = {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.has_fp_fusion,
    }
    binary = triton.compile(source, target=GPUTarget("cuda", spec.sm, 32), options=options)
    registers, stack_bytes = _resources(binary.asm["cubin"])
    ptx = binary.asm["ptx"]
    shared = int(binary.metadata.shared)
    return Compiled(
        spec.name, spec.sm, shared, registers, stack_bytes, "wgmma.mma_async" in ptx, "cp.async" in ptx
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, read by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        dump = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert found, f"cuobjdump printed no resource usage: {dump}"
    return int(found[1]), int(found[2])
