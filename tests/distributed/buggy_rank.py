"""The program of a rank of the real engine in which a bug is planted.

The bug is named in the file on the command line, which is read before each engine is built.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.launch import rank
from moespan.model.network import Attention
from moespan.parallel.beats import Beat
from moespan.parallel.dispatch import PhysicalExperts
from moespan.parallel.mesh import Axis
from moespan.parallel.pipeline import StageLink

Patch = contextlib.AbstractContextManager[Any]


def forget_all_reduce(module: str) -> Patch:
    """Sums of one module are not taken over tp."""
    whole = Axis.all_reduce

    def all_reduce(self: Axis, x: Tensor, of: str) -> Tensor:
        return x if of == module else whole(self, x, of)

    return mock.patch.object(Axis, "all_reduce", all_reduce)


def shift_physical_experts() -> Patch:
    """Every rank but the first takes its experts for those one place further."""
    whole = PhysicalExperts.__init__

    def init(self: PhysicalExperts, *arguments: Any) -> None:
        whole(self, *arguments)
        self.starts = [start + (start > 0) for start in self.starts]

    return mock.patch.object(PhysicalExperts, "__init__", init)


def mix_up_what_comes_back() -> Patch:
    """all_to_all takes what comes back for the tokens in another order than they were sent."""
    whole = Axis.all_to_all

    def all_to_all(
        self: Axis, x: Tensor, send_rows: list[int], receive_rows: list[int], module: str
    ) -> Tensor:
        received = whole(self, x, send_rows, receive_rows, module)
        return received.flip(0) if self.name == "ep" and module == "moe" else received

    return mock.patch.object(Axis, "all_to_all", all_to_all)


def swap_sp_halves() -> Patch:
    """Tokens come back from attention with the heads of the sp ranks in another order."""
    whole = Attention._to_tokens

    def to_tokens(self: Attention, attended: Tensor, lengths: list[int]) -> Tensor:
        heads = whole(self, attended, lengths)
        return torch.cat(heads.chunk(self.sp.size, 1)[::-1], 1)

    return mock.patch.object(Attention, "_to_tokens", to_tokens)


def swap_parts_between_stages() -> Patch:
    """A stage puts the parts that the tp ranks of the stage before sent in another order."""
    whole = StageLink.receive

    def receive(self: StageLink, num_tokens: int) -> Tensor:
        x = whole(self, num_tokens)
        return torch.cat(x.flatten().chunk(2)[::-1]).view_as(x)

    return mock.patch.object(StageLink, "receive", receive)


def leave_out_a_layer() -> Patch:
    """The second stage begins a layer too late."""
    whole = Layout.stages

    def stages(self: Layout, config: ModelConfig) -> list[range]:
        return [
            range(layers.start + (stage == 1), layers.stop)
            for stage, layers in enumerate(whole(self, config))
        ]

    return mock.patch.object(Layout, "stages", stages)


def shuffle_vocabulary() -> Patch:
    """The head's parts come together in another order."""
    whole = Axis.all_gather

    def all_gather(self: Axis, x: Tensor, module: str) -> Tensor:
        gathered = whole(self, x, module)
        if module == "head" and self.size > 1:
            return torch.cat(gathered.chunk(self.size)[::-1])
        return gathered

    return mock.patch.object(Axis, "all_gather", all_gather)


BUGS: dict[str, Callable[[], Patch]] = {
    "none": contextlib.nullcontext,
    "the embedding is not summed": lambda: forget_all_reduce("embed"),
    "attention is not summed": lambda: forget_all_reduce("attention"),
    "the experts are not summed": lambda: forget_all_reduce("moe"),
    "physical experts are shifted": shift_physical_experts,
    "tokens come back from experts in another order": mix_up_what_comes_back,
    "halves of sp are swapped": swap_sp_halves,
    "parts are swapped between stages": swap_parts_between_stages,
    "a stage begins a layer too late": leave_out_a_layer,
    "the vocabulary is shuffled": shuffle_vocabulary,
}

_planted = contextlib.ExitStack()


def build_leader(config: EngineConfig, device: torch.device, beat: Beat) -> rank.LeaderEngine:
    plant()
    return rank._build_leader(config, device, beat)


def follow(config: EngineConfig, device: torch.device, beat: Beat) -> EngineConfig | None:
    plant()
    return rank._follow(config, device, beat)


def plant() -> None:
    _planted.close()
    _planted.enter_context(BUGS[BUG_FILE.read_text()]())


if __name__ == "__main__":
    BUG_FILE = Path(sys.argv.pop(1))
    rank.run_rank(build_leader, follow)
