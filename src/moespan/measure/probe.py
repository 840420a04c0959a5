"""A roofline's two sides: what a step cannot do without, and how fast this machine could do it.

The first is counted from the placement table and the model's geometry; the second is measured by a
process of its own (`Probe`), so that its buffers are in nobody's memory figures. Only that process
imports torch.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import platform
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec

from moespan.checkpoint.placement import cache_bytes_per_token, place
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.errors import MoespanError
from moespan.machine.cores import usable_cores


class Limits(msgspec.Struct, frozen=True):
    """What the devices of a job can do together in a second."""

    bytes_per_s: float
    operations_per_s: float

    @classmethod
    def mean(cls, before: Limits, after: Limits) -> Limits:
        """What held between two measurements."""
        return cls(
            (before.bytes_per_s + after.bytes_per_s) / 2,
            (before.operations_per_s + after.operations_per_s) / 2,
        )


class Work(NamedTuple):
    """What cannot be avoided: arithmetic operations, and bytes to be read."""

    operations: float
    num_bytes: float

    def least_s(self, limits: Limits) -> float:
        """Seconds that no program takes less than: the slower of the two, both at their limit."""
        return max(self.operations / limits.operations_per_s, self.num_bytes / limits.bytes_per_s)

    def bound(self, limits: Limits) -> str:
        """Which of the two is the slower: `compute` or `memory`."""
        compute_s = self.operations / limits.operations_per_s
        return "compute" if compute_s > self.num_bytes / limits.bytes_per_s else "memory"


def step_work(
    config: ModelConfig, engine: EngineConfig, num_sequences: int, num_new: int, context: float
) -> Work:
    """One step: `num_new` tokens of each of `num_sequences` sequences after `context` others.

    Operations are two for each weight that a token meets, and four for each element of a query and
    each token that it attends to; the head only meets the last token of a sequence. Bytes are those
    of the weights, as the engine keeps them, read once, and of the KV cache. T tokens that choose k
    of E experts meet E · (1 - (1 - k/E)^T) of them when routing is as even as that of random
    weights; a trained router is less even, and they meet fewer. Activations are not counted.

    The whole model counts, however it is laid out: its weights are somewhere, and have to be read.
    """
    num_tokens = num_sequences * num_new
    chosen = config.num_experts_per_tok / (config.n_routed_experts or 1)
    head = "embed" if config.tie_word_embeddings else "head"
    operations = num_bytes = 0.0
    held = place(config, Layout(), 0, quantization=engine.quantization)
    for name, parameter in held.parameters.items():
        elements, size_bytes = math.prod(parameter.shape), parameter.num_bytes(engine.dtype)
        if name == head:
            operations += 2 * elements * num_sequences
            num_bytes += size_bytes
        elif name == "embed":  # a token reads one row
            num_bytes += size_bytes / config.vocab_size * num_tokens
        elif ".experts." in name:
            operations += 2 * elements * chosen * num_tokens
            num_bytes += size_bytes * (1 - (1 - chosen) ** num_tokens)
        else:
            operations += 2 * elements * num_tokens
            num_bytes += size_bytes
    pairs = num_tokens * (context + (num_new + 1) / 2)
    operations += 4 * config.hidden_size * config.num_hidden_layers * pairs
    token_bytes = cache_bytes_per_token(config, Layout(), 0, engine.cache_dtype)
    num_bytes += num_sequences * (context + num_new) * token_bytes
    return Work(operations, num_bytes)


class Probe:
    """Measures what the devices of a job can do, whenever it is called: about 0.1 s on a CPU.

    Reading is the sum of a float32 tensor far larger than all caches, the best of four; arithmetic
    is a product of matrices in the job's dtype, the best of three, on CPUs also with weights that
    are packed before. On CPUs all threads of the job take part. On other devices the first one is
    measured and counts for each rank.

    Args:
        dtype: of the matrices.
        num_devices: how often what is measured counts.
    """

    def __init__(self, device: str, dtype: str, num_devices: int = 1) -> None:
        self._num_devices = num_devices
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, device, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No module is imported from whatever directory the user happens to stand in.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        self()  # the first one only warms up

    def __call__(self) -> Limits:
        """The limits right now.

        Raises:
            MoespanError: the process that measures has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            code = self._process.wait()
            raise MoespanError(f"the process that measures the machine ended with code {code}")
        one = msgspec.json.decode(answer, type=Limits)
        return Limits(one.bytes_per_s * self._num_devices, one.operations_per_s * self._num_devices)

    @property
    def pid(self) -> int:
        """Number of the process that measures."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
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
    if device != "cpu":
        import torch

        return str(torch.get_device_module(device).get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


_LEAST_CPU_BUFFER_BYTES = 192 << 20
_DEVICE_BUFFER_BYTES = 1 << 30
# Tokens, inputs and outputs of the product: on a CPU those of an expert's layer for a prompt.
_CPU_PRODUCT = (256, 2048, 5632)
_DEVICE_PRODUCT = (8192, 8192, 8192)


def _last_level_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """All caches of the last level together; 0 where the system does not tell."""
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


def _measure(device: str, dtype: str) -> None:
    """The process of `Probe`: a line of limits on stdout for each line on stdin."""
    import torch

    from moespan.machine.device import choose_device

    choose_device(device)
    is_cpu = device == "cpu"
    if is_cpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    buffer_bytes = (
        max(_LEAST_CPU_BUFFER_BYTES, 4 * _last_level_cache_bytes())
        if is_cpu
        else _DEVICE_BUFFER_BYTES
    )
    rows, inputs, outputs = _CPU_PRODUCT if is_cpu else _DEVICE_PRODUCT
    if is_cpu:
        # In huge pages, if the system has any: in small ones a sum reads about 7 % less.
        pages = mmap.mmap(-1, buffer_bytes)
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        numbers = torch.frombuffer(pages, dtype=torch.float32).fill_(1)
    else:
        numbers = torch.ones(buffer_bytes // 4, device=device)
    options = {"dtype": getattr(torch, dtype), "device": device}
    tokens, weight = torch.randn(rows, inputs, **options), torch.randn(outputs, inputs, **options)

    def read() -> None:
        numbers.sum().item()  # `item` waits for the device

    def multiply() -> None:
        torch.nn.functional.linear(tokens, weight)[0, 0].item()

    products = [multiply]
    if is_cpu:
        # Some processors' instructions need another order of the weights, which `linear` makes anew
        # in each call. Private, and not there for every processor and dtype.
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
        print(msgspec.json.encode(limits).decode(), flush=True)


if __name__ == "__main__":
    _measure(*sys.argv[1:])
