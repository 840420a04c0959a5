"""Compiles every kernel of the CUDA path, without a GPU, and prints the resources that each needs.

    python benchmarks/compile_kernels.py                       # the 16B model on an H100 or H200
    python benchmarks/compile_kernels.py --capability 80 --quick

The operations are called as the model calls them, on CPU tensors that are never read. Instead of
launching a kernel, each call compiles it as the launch would. This shows that all kernels compile
and fit, not that they are right or fast. It needs Triton, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Most shared memory of one program, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications), and registers of one thread.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one kind of arguments."""

    kernel: str
    sizes: str
    warps: int
    shared_bytes: int
    registers: int
    spilled_bytes: int


class Compiler:
    """While active, compiles every launched kernel once for each kind of arguments."""

    def __init__(self, capability: int) -> None:
        self.compiled: list[Compiled] = []
        self._capability = capability
        self._seen: set[str] = set()

    def __enter__(self) -> Compiler:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        target = GPUTarget("cuda", self._capability, 32)

        class Absent:
            """A stand-in for the driver of a GPU that is not there."""

            def get_current_target(self) -> GPUTarget:
                return target

            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return 0

        driver.set_active(Absent())
        self._run = run = JITFunction.run
        compiler = self

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **sizes: Any) -> None:
            binary = run(kernel, *args, grid=grid, warmup=True, **sizes)
            compiler._note(kernel.__name__, sizes, binary)

        JITFunction.run = compile_only
        self._triton = triton
        return self

    def __exit__(self, *error: object) -> None:
        from triton.runtime.jit import JITFunction

        JITFunction.run = self._run

    def _note(self, name: str, sizes: dict[str, Any], binary: Any) -> None:
        if binary.hash in self._seen:
            return
        self._seen.add(binary.hash)
        registers, spilled = _resources(binary.asm["cubin"])
        shown = {key: value for key, value in sizes.items() if key.startswith("BLOCK_")}
        shown |= {key: True for key, value in sizes.items() if value is True}
        self.compiled.append(
            Compiled(
                name.strip("_"),
                " ".join(f"{key}={value}" for key, value in shown.items()),
                binary.metadata.num_warps,
                binary.metadata.shared,
                registers,
                spilled,
            )
        )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack for the registers that do not fit."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def call_everything(quick: bool, capability: int) -> Iterator[str]:
    """Call every operation as the 16B model does; yields what was called."""
    from moespan.checkpoint.rounding import QuantizedWeight
    from moespan.config import SCHEMES, Scheme
    from moespan.device import DEVICES
    from moespan.ops import AttentionBatch, ExpertBank, KVCache, Rotation, Weight
    from moespan.ops.cuda.ops import CudaOps
    from moespan.parallel.mesh import Axis

    ops, device = CudaOps(), torch.device("cpu")
    width, inner, dense, num_experts, chosen = 2048, 1408, 10944, 64, 6
    heads, head_size, num_blocks = 16, 128, 256
    block_size = DEVICES["cuda"].block_size
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float16, torch.float32]

    # Where tensor cores do not take 8-bit floats, the engine refuses them.
    schemes = [one for name, one in SCHEMES.items() if name != "fp8" or capability >= 89]

    def weight(scheme: Scheme | None, dtype: torch.dtype, *shape: int) -> Weight:
        if scheme is None:
            return torch.empty(shape, dtype=dtype)
        values = torch.empty(shape, dtype=getattr(torch, scheme.dtype))
        return QuantizedWeight(values, torch.empty(shape[:-1]), scheme.activation_bits)

    for dtype in dtypes:
        for tokens in (1, 8, 256, 2048):
            yield f"{dtype}, {tokens} tokens"
            x, residual = (torch.empty(tokens, width, dtype=dtype) for _ in range(2))
            scale = torch.empty(width, dtype=dtype)
            ops.rms_norm(x, scale, 1e-6)
            ops.add_rms_norm(x, residual, scale, 1e-6)
            chosen_weights, physical_ids = (
                torch.empty(tokens, chosen),
                torch.zeros(tokens, chosen, dtype=torch.int32),
            )
            ops.route(x, torch.empty(num_experts, width), chosen, False)
            for scheme in (None, *schemes) if dtype != torch.float32 else (None,):
                bank = ExpertBank(
                    weight(scheme, dtype, num_experts, 2 * inner, width),
                    weight(scheme, dtype, num_experts, width, inner),
                    first=0,
                    num_physical=num_experts,
                )
                ops.experts(x, chosen_weights, physical_ids, bank)
                for one in (2 * inner, dense):
                    gate_up = weight(scheme, dtype, 2 * one, width)
                    down = weight(scheme, dtype, width, one)
                    ops.mlp(x, gate_up, down)
                    ops.mlp_sum(x, gate_up, down, Axis(), "mlp", residual)
                if scheme is not None:
                    ops.linear(x, weight(scheme, dtype, 3 * width, width))
            for cache_dtype in (dtype, torch.int8):
                shape = (num_blocks, block_size, heads, head_size)
                is_int8 = cache_dtype == torch.int8
                scales = [torch.empty(shape[:3]) if is_int8 else None for _ in range(2)]
                cached = (torch.empty(shape, dtype=cache_dtype) for _ in range(2))
                cache = KVCache(*cached, *scales)
                query_lens = [1] * tokens if tokens < 2048 else [1024, 1, 1023]
                tables = [[0] * 128 for _ in query_lens]
                batch = AttentionBatch.build(
                    query_lens, [0] * len(query_lens), tables, block_size, device
                )
                qkv = torch.empty(tokens, 3 * heads, head_size, dtype=dtype)
                angles = torch.empty(tokens, head_size // 2)
                rotation = Rotation(heads, heads, angles, angles)
                ops.rope(qkv, rotation)
                q = ops.rope_to_cache(qkv, rotation, cache, batch.slots)
                k = torch.empty(tokens, heads, head_size, dtype=dtype)
                ops.write_cache(k, k, cache, batch.slots)
                ops.attention(q, cache, batch, 0.1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_BYTES)
    parser.add_argument("--quick", action="store_true", help="bfloat16 only")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    with torch.inference_mode(), Compiler(args.capability) as compiler:
        for called in call_everything(args.quick, args.capability):
            print(called, flush=True)
    most = SHARED_BYTES[args.capability]
    print(f"{'kernel':<20}{'warps':>6}{'shared':>8}{'regs':>6}{'spilled':>8}  sizes")
    for one in sorted(compiler.compiled, key=lambda one: (one.kernel, one.sizes)):
        fits = "" if one.shared_bytes <= most else "  DOES NOT FIT"
        print(
            f"{one.kernel:<20}{one.warps:>6}{one.shared_bytes:>8}{one.registers:>6}"
            f"{one.spilled_bytes:>8}  {one.sizes}{fits}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(one) for one in compiler.compiled], indent=1))
    too_large = [one for one in compiler.compiled if one.shared_bytes > most]
    print(f"{len(compiler.compiled)} compiled, {len(too_large)} do not fit")
    if too_large:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
