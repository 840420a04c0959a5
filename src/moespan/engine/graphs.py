"""Decode steps as recorded graphs, on devices that have them: one launch instead of hundreds.

A step in which every sequence has one token is padded to one of a few sizes. The work of each size
is recorded when the size first occurs. Added rows are sequences of one token in cache blocks that
no request gets. All inputs of a step go into one tensor, whose address stays the same.

The plans alone decide whether a step is padded, and to what size, so all ranks agree. A rank that
cannot record runs padded steps without graphs, once it has proved that its device still computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moespan.config import EngineConfig
from moespan.config.engine import padded_sizes
from moespan.engine.sampler import fill_in
from moespan.engine.step import StepPlan
from moespan.log import once
from moespan.memory import is_host, reserved_bytes, zeros
from moespan.ops import AttentionBatch, Ops, Replay
from moespan.parallel.counters import Traffic
from moespan.parallel.mesh import Mesh
from moespan.parallel.tokens import split_evenly

# Parts of the inputs begin at multiples of so many int32, aligned as separate tensors would be.
_ALIGNMENT = 128

Run = Callable[[Tensor, AttentionBatch, Tensor], Tensor]
"""(token ids [S] or hidden state [L, H], batch, rows [S]) → the model's output."""


def scratch_blocks(config: EngineConfig, ops: Ops) -> int:
    """Cache blocks for padding, with a slot for each added row; 0 without graphs."""
    if config.enforce_eager or not ops.has_graphs:
        return 0
    return -(-padded_sizes(config.max_num_seqs)[-1] // config.block_size)


@dataclass
class _Recorded:
    """One padded size: its inputs, its output, and its recorded work."""

    inputs: Tensor
    batch: AttentionBatch
    token_ids: Tensor
    rows: Tensor
    hidden: Tensor | None
    replay: Replay | None = None
    traffic: Traffic | None = None
    out: Tensor | None = None


class DecodeGraphs:
    """The graphs of one rank.

    Attributes:
        num_recorded, memory_bytes: number of graphs so far, and the device memory of them.

    Args:
        run: runs the model.
        mesh: counts the model's collectives in its `traffic`, those of a replay included.
        hidden_size: width of the hidden state that the previous stage sends.
        first_scratch_block: first of the blocks that padding may write to.
    """

    def __init__(
        self,
        ops: Ops,
        run: Run,
        config: EngineConfig,
        mesh: Mesh,
        hidden_size: int,
        first_scratch_block: int,
    ) -> None:
        self.num_recorded = self.memory_bytes = 0
        self._ops, self._run, self._mesh = ops, run, mesh
        self._device, self._traffic = mesh.device, mesh.traffic
        self._hidden_size, self._dtype = hidden_size, getattr(torch, config.dtype)
        self._sizes = padded_sizes(config.max_num_seqs)
        self._block_size, self._first_scratch_block = config.block_size, first_scratch_block
        self._width = config.blocks_per_sequence
        self._recorded: dict[int, _Recorded] = {}
        self._gave_up = False
        if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
            self._gave_up = True
            self.say("ASCEND_LAUNCH_BLOCKING=1 does not go with recording")

    def size_for(self, num_tokens: int) -> int | None:
        """The padded size of a step of `num_tokens` sequences; None if it is too large."""
        return next((size for size in self._sizes if size >= num_tokens), None)

    def say(self, why: str, from_any_rank: bool = False) -> None:
        """Warn, once, that steps run without graphs."""
        once(f"decode steps are not recorded as graphs: {why}", from_any_rank)

    def __call__(
        self, plan: StepPlan, size: int, hidden: Tensor | None, expected: Tensor | None = None
    ) -> Tensor:
        """Run the decode step `plan`, padded to `size` sequences.

        Args:
            hidden: hidden state from the previous stage, [L, H]; None on the first stage.
            expected: int32 [R], the tokens that the plan names by index; None if there are none.

        Returns:
            The model's output for the padded step, in memory that the next step overwrites.
        """
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._recorded[size] = self._make(size)
        total_lens = self._fill(recorded, plan)
        if expected is not None:
            recorded.token_ids.copy_(fill_in(recorded.token_ids, expected))
        if recorded.hidden is not None:
            assert hidden is not None
            recorded.hidden.copy_(hidden)
        if recorded.replay is not None:
            recorded.replay(total_lens)
            assert recorded.out is not None and recorded.traffic is not None
            self._traffic.add(recorded.traffic)
            return recorded.out
        batch = recorded.batch
        inputs = recorded.token_ids if recorded.hidden is None else recorded.hidden
        batch = replace(batch, context_lens=[total - 1 for total in total_lens])
        # Run once before recording, so that kernels, communicators and constants exist by then.
        out = self._run(inputs, batch, recorded.rows)
        if not self._gave_up:
            self._record(recorded, lambda: self._run(inputs, batch, recorded.rows))
        return out

    def _record(self, recorded: _Recorded, run: Callable[[], Tensor]) -> None:
        before = reserved_bytes(self._device)

        def keep() -> None:
            recorded.out = run()

        def record() -> None:
            recorded.replay = self._ops.record(keep)

        try:
            recorded.traffic = self._traffic.count_separately(record)
        except Exception as error:
            # If a device or driver cannot record, for any reason, steps run without graphs.
            self._gave_up = True
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self._prove_computing(why)
            self.say(f"{why}; the device still computes", from_any_rank=True)
            return
        self.num_recorded += 1
        self.memory_bytes += reserved_bytes(self._device) - before

    def _prove_computing(self, why: str) -> None:
        """Raise unless the device computes, outside a graph, after recording failed.

        The proof has no collective: other ranks may have recorded.
        """
        try:
            ones = torch.ones((1, self._hidden_size), dtype=self._dtype, device=self._device)
            normed = self._ops.rms_norm(ones, ones[0], 1e-6)
            works = bool(((normed - ones).abs() < 0.1).all())
        except Exception as error:
            raise RuntimeError(
                f"recording a decode step failed ({why}), and the device computes nothing since "
                f"({type(error).__name__}: {error}); start again with --enforce-eager"
            ) from error
        if not works:
            raise RuntimeError(
                f"recording a decode step failed ({why}), and the device computes wrong numbers "
                "since; start again with --enforce-eager"
            )

    def _make(self, size: int) -> _Recorded:
        lengths = [size, size, size, size, size * self._width]
        rooms = [-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]
        whole = torch.zeros(sum(rooms), dtype=torch.int32, device=self._device)
        parts = [room[:length] for room, length in zip(whole.split(rooms), lengths, strict=True)]
        token_ids, positions, slots, totals, tables = parts
        batch = AttentionBatch(
            [1] * size, [0] * size, tables.view(size, self._width), slots, positions, totals
        )
        rows = torch.arange(size, dtype=torch.int32, device=self._device)
        hidden = None
        if not self._mesh.is_first_stage:
            here = split_evenly(size, self._mesh.sp.size)[self._mesh.sp.rank]
            hidden = zeros((here, self._hidden_size), self._dtype, self._device)
        return _Recorded(whole, batch, token_ids, rows, hidden)

    def _fill(self, recorded: _Recorded, plan: StepPlan) -> list[int]:
        """Copy the plan's inputs to the device, in one transfer; → length of each sequence after
        the step."""
        size, given = len(recorded.rows), len(plan.token_ids)
        added = size - given
        # New memory for each step; the allocator keeps it until it has been copied.
        sent = torch.zeros(
            recorded.inputs.shape, dtype=torch.int32, pin_memory=not is_host(self._device)
        )
        inputs = sent.numpy()
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        token_ids, positions, slots, totals = inputs[: 4 * room].reshape(4, room)[:, :size]
        tables = inputs[4 * room :][: size * self._width].reshape(size, self._width)
        token_ids[:given] = plan.token_ids
        positions[:given] = plan.context_lens
        np.add(positions, 1, out=totals)
        for row, table in zip(tables, plan.block_tables, strict=False):
            row[: len(table)] = table
        tables[given:] = self._first_scratch_block
        blocks = tables[np.arange(size), positions // self._block_size]
        slots[:] = blocks * self._block_size + positions % self._block_size
        # The first added row writes the slot that all added rows read.
        slots[given:] += np.arange(added, dtype=np.int32)
        recorded.inputs.copy_(sent, non_blocking=True)
        return [length + 1 for length in plan.context_lens] + [1] * added
