"""All-reduces between the GPUs of one machine: in one shot, beside NCCL's. Are they right, are they
faster, and up to which size?

    torchrun --nproc-per-node 8 benchmarks/all_reduce.py
    torchrun --nproc-per-node 2 benchmarks/all_reduce.py --device cpu    # its logic, without a GPU

Messages are those of decode steps: rows of the model's hidden size. Each size is first summed over
fresh random numbers, by a recorded graph as in a step; in one shot all ranks must get exactly the
parts added in the order of the ranks; NCCL may round differently. Then a graph of many such sums is
recorded and replayed. A time is the median replay on the slowest rank, divided by the number of
sums. The last line has the flag that suits this machine. Exits with 1 if a sum is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moespan.config import Layout
from moespan.launch.distributed import init_distributed
from moespan.ops import Ops, ops_for
from moespan.parallel.mesh import Axis, Mesh

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512)
DRAWS, SUMS, REPEATS = 3, 50, 20
# Share of the largest value: the order of additions differs, and with it the rounding.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Row:
    """One message size: seconds of one sum, and whether all were right. None: not in one shot."""

    message_bytes: int
    nccl_s: float
    one_shot_s: float | None
    is_right: bool


def bound(rows: Sequence[Row]) -> int:
    """Largest size in bytes up to which one shot is never slower; 0 if it is never faster."""
    found = 0
    for row in sorted(rows, key=lambda row: row.message_bytes):
        if row.one_shot_s is None or row.one_shot_s > row.nccl_s:
            break
        found = row.message_bytes
    return found


def recorded(ops: Ops, run: Callable[[], object]) -> Callable[[], object]:
    """Run `run` once, and return it as a graph where the device has graphs."""
    run()
    if not ops.has_graphs:
        return run
    replay = ops.record(run)
    return lambda: replay([])


def sums(axis: Axis, ops: Ops, draws: Sequence[Tensor]) -> list[Tensor]:
    """The sums of all `draws`, computed by one graph."""
    x, found = draws[0].clone(), []
    total = x

    def run() -> None:
        nonlocal total
        total = axis.all_reduce(x.clone(), "benchmark")

    replay = recorded(ops, run)
    for draw in draws:
        x.copy_(draw)
        replay()
        found.append(total.clone())
    return found


def in_order(axis: Axis, draw: Tensor) -> Tensor:
    """The parts of all ranks, added in their order."""
    total, *others = axis.all_gather(draw[None], "benchmark").unbind()
    total = total.clone()
    for other in others:
        total += other
    return total


def seconds(axis: Axis, ops: Ops, x: Tensor, synchronize: Callable[[], object]) -> float:
    """Seconds of one sum of `x`, which holds zeros, on the slowest rank."""
    replay = recorded(ops, lambda: [axis.all_reduce(x, "benchmark") for _ in range(SUMS)])
    taken = []
    for _ in range(REPEATS):
        synchronize()
        dist.barrier()
        started = time.perf_counter()
        replay()
        synchronize()
        taken.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(taken) / SUMS)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def measure(
    nccl: Axis, short: Axis, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Row]:
    """Measure a row for each size; all ranks take part."""
    ops = ops_for(device.type)
    synchronize: Callable[[], object] = (
        (lambda: None) if device.type == "cpu" else torch.get_device_module(device).synchronize
    )
    generator = torch.Generator(device).manual_seed(nccl.rank)
    for num_rows in ROWS:
        shape = (num_rows, hidden_size)
        draws = [
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(DRAWS)
        ]
        expected = [in_order(nccl, draw) for draw in draws]
        right = [
            bool((total - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max())
            for total, exact in zip(sums(nccl, ops, draws), expected, strict=True)
        ]
        x = torch.zeros(shape, dtype=dtype, device=device)
        nccl_s, one_shot_s = seconds(nccl, ops, x, synchronize), None
        if short.one_shot is not None and short.one_shot.takes(x):
            found = sums(short, ops, draws)
            right += [torch.equal(*pair) for pair in zip(found, expected, strict=True)]
            one_shot_s = seconds(short, ops, x, synchronize)
        everywhere = torch.tensor(int(all(right)))
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        yield Row(x.numel() * x.element_size(), nccl_s, one_shot_s, bool(everywhere))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--hidden-size", type=int, default=2048, help="(that of 16B)")
    args = parser.parse_args(argv)
    device = init_distributed(args.device)
    layout, dtype = Layout(tp=dist.get_world_size()), getattr(torch, args.dtype)
    most_bytes = max(ROWS) * args.hidden_size * dtype.itemsize
    meshes = [Mesh.create(layout, device, one_shot_bytes=size) for size in (0, most_bytes)]
    nccl, short = (mesh.tp for mesh in meshes)

    def say(line: str) -> None:
        if nccl.rank == 0:
            print(line, flush=True)

    say(f"{layout}, {args.dtype}, {args.device}; torch {torch.__version__}")
    say(f"{'rows':>6}{'KiB':>8}{'library µs':>12}{'one shot µs':>13}")
    rows = []
    for num_rows, row in zip(
        ROWS, measure(nccl, short, args.hidden_size, dtype, device), strict=True
    ):
        rows.append(row)
        one_shot = "-" if row.one_shot_s is None else f"{row.one_shot_s * 1e6:.1f}"
        say(
            f"{num_rows:>6}{row.message_bytes / 1024:>8.0f}{row.nccl_s * 1e6:>12.1f}{one_shot:>13}"
            + ("" if row.is_right else "  WRONG")
        )
    say(f"--cuda-one-shot-bytes {bound(rows)}")
    for mesh in meshes:
        mesh.close()
    dist.destroy_process_group()
    if not all(row.is_right for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
