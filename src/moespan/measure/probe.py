"""The probe: measures how fast this machine reads memory and multiplies matrices.

`moespan.planner.work` compares a step with these limits. A process of its own measures (`Probe`),
so that its buffers count in no other process's memory. Only that process imports torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from moespan import log
from moespan.device import DEVICES
from moespan.errors import MoespanError
from moespan.launch.job import module_arguments
from moespan.machine.cores import usable_cores
from moespan.planner.work import Limits


class Probe:
    """Measures the limits of a job's devices at each call, which takes about 0.1 s on a CPU.

    Reading is the sum of a float32 tensor far larger than all caches, the best of four. Arithmetic
    is a product of matrices in the job's dtype, the best of three; on CPUs also with weights that
    were packed before. On CPUs all threads of the job take part. On other devices the first device
    is measured and counts for each rank.

    Args:
        dtype: dtype of the matrices.
        num_devices: factor by which the measured limits are multiplied.
    """

    def __init__(self, device: str, dtype: str, num_devices: int = 1) -> None:
        self._num_devices = num_devices
        self._process = subprocess.Popen(
            [sys.executable, *module_arguments(__name__), device, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No module is imported from the user's current directory.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        self()  # the first measurement only warms up

    def __call__(self) -> Limits:
        """The limits at this moment.

        Raises:
            MoespanError: the measuring process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            one = msgspec.json.decode(answer, type=Limits)
        except (BrokenPipeError, msgspec.DecodeError):  # libraries may say goodbye on stdout
            self._process.communicate()  # it ends when its input does
            raise MoespanError(
                "the process that measures the machine ended with code "
                f"{self._process.returncode}; its error is above"
            ) from None
        return Limits(one.bytes_per_s * self._num_devices, one.operations_per_s * self._num_devices)

    @property
    def pid(self) -> int:
        """Process id of the measuring process."""
        return self._process.pid

    def close(self) -> None:
        """End the measuring process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def machine_name(device: str) -> str:
    """The model of the device, or of this machine's processor."""
    if not DEVICES[device].is_host:
        import torch

        return str(torch.get_device_module(device).get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


_LEAST_CPU_BUFFER_BYTES = 192 << 20
_DEVICE_BUFFER_BYTES = 1 << 30
# Tokens, inputs and outputs of the product; on a CPU the sizes of an expert's layer for a prompt.
_CPU_PRODUCT = (256, 2048, 5632)
# Elsewhere square matrices: a small one does not fill a fast device, a large one takes a slow or
# emulated device many seconds.
_DEVICE_SIZES = (1024, 2048, 4096, 8192)
_LEAST_PRODUCT_S = 4e-3


def last_level_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all caches of the last level together; 0 if the system does not report them."""
    sizes: dict[tuple[int, str], int] = {}
    for cache in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((cache / "level").read_text())
            kib = int((cache / "size").read_text().strip().removesuffix("K"))
            sizes[level, (cache / "shared_cpu_list").read_text()] = kib << 10
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def _best_s(run: Callable[[], object], times: int) -> float:
    return min(timeit.repeat(run, number=1, repeat=times))


def size_for(seconds: Callable[[int], float]) -> int:
    """Rows of the square matrices whose product tells the speed of a device.

    Args:
        seconds: measures a product of matrices with so many rows.
    """
    long_enough = (size for size in _DEVICE_SIZES[:-1] if seconds(size) >= _LEAST_PRODUCT_S)
    return next(long_enough, _DEVICE_SIZES[-1])


def _measure(device: str, dtype: str) -> None:
    """The measuring process of `Probe`: one line of limits on stdout for each line on stdin."""
    log.keep_stdout_for_answers()
    answers, sys.stdout = sys.stdout, sys.stderr  # torch_npu prints warnings
    import torch

    from moespan.machine.device import choose_device
    from moespan.memory import available_bytes

    choose_device(device)
    is_cpu = DEVICES[device].is_host
    if is_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    buffer_bytes = (
        max(_LEAST_CPU_BUFFER_BYTES, 4 * last_level_cache_bytes())
        if is_cpu
        else _DEVICE_BUFFER_BYTES
    )
    if is_cpu:
        # Huge pages, if the system has any: with small pages a sum reads about 7 % less.
        pages = mmap.mmap(-1, buffer_bytes)
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        numbers = torch.frombuffer(pages, dtype=torch.float32).fill_(1)
    else:
        # Next to an engine, or on a small device, there may be less room.
        buffer_bytes = min(buffer_bytes, available_bytes(torch.device(device)) // 4)
        numbers = torch.ones(buffer_bytes // 4, device=device)
    options = {"dtype": getattr(torch, dtype), "device": device}

    def product(rows: int, inputs: int, outputs: int) -> tuple[Any, Any, Callable[[], object]]:
        tokens = torch.randn(rows, inputs, **options)
        weight = torch.randn(outputs, inputs, **options)
        return tokens, weight, lambda: torch.nn.functional.linear(tokens, weight)[0, 0].item()

    def read() -> None:
        numbers.sum().item()  # `item` waits for the device

    if is_cpu:
        rows, inputs, outputs = _CPU_PRODUCT
    else:
        rows = inputs = outputs = size_for(lambda size: _best_s(product(size, size, size)[2], 2))
    tokens, weight, multiply = product(rows, inputs, outputs)
    products = [multiply]
    if is_cpu:
        # Some processors' instructions need the weights in another order, which `linear` makes anew
        # in each call. The operators are private, and missing for some processors and dtypes.
        mkldnn = torch.ops.mkldnn
        with contextlib.suppress(AttributeError, RuntimeError):
            packed = mkldnn._reorder_linear_weight(weight, rows)

            def multiply_packed() -> None:
                mkldnn._linear_pointwise(tokens, packed, None, "none", [], None)

            multiply_packed()
            products.append(multiply_packed)

    for _ in sys.stdin:
        limits = Limits(
            numbers.nbytes / _best_s(read, 4),
            2 * rows * inputs * outputs / min(_best_s(product, 3) for product in products),
        )
        print(msgspec.json.encode(limits).decode(), file=answers, flush=True)


if __name__ == "__main__":
    _measure(*sys.argv[1:])
