"""How many tokens chose each expert: counted on the device, read when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moespan.config import EngineConfig, ModelConfig
from moespan.parallel.mesh import Mesh


class ExpertCounter:
    """Counts of one rank's layers. A step adds to them once, without waiting for the device.

    Args:
        layers: numbers of the layers of this rank's stage that have experts.
        end_of_slots: first cache slot of padding. Graphs pad steps with tokens in such slots, and
            those tokens are not counted.
    """

    def __init__(
        self, layers: Sequence[int], num_experts: int, end_of_slots: int, device: torch.device
    ) -> None:
        self._layers, self._end_of_slots = layers, end_of_slots
        shape = (len(layers), num_experts)
        # int32 would overflow within weeks on a busy server.
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._starts = torch.arange(len(layers), device=device)[:, None, None] * num_experts

    @classmethod
    def make(
        cls, config: EngineConfig, model_config: ModelConfig, mesh: Mesh, num_blocks: int
    ) -> ExpertCounter | None:
        """The counter of a rank whose requests have so many cache blocks; None unless
        `expert_stats` asks for it."""
        if not config.expert_stats:
            return None
        stage = mesh.layout.stages(model_config)[mesh.at.pp]
        layers = [layer for layer in stage if model_config.is_moe(layer)]
        num_experts = model_config.n_routed_experts or 0
        return cls(layers, num_experts, num_blocks * config.block_size, mesh.device)

    def add(self, chosen: Sequence[Tensor], slots: Tensor) -> None:
        """Count one step.

        Args:
            chosen: of each layer, the experts of each token, integers [L, K].
            slots: the tokens' cache slots, integers [L].
        """
        if not chosen:  # a stage without experts
            return
        places = torch.stack(list(chosen)) + self._starts  # [layers, L, K]
        is_real = (slots < self._end_of_slots).to(torch.int64)[:, None].expand(places.shape)
        self._counts.view(-1).scatter_add_(0, places.flatten(), is_real.flatten())

    def read(self) -> dict[int, list[int]]:
        """Layer → tokens that chose each expert. Waits for the steps on the device."""
        return dict(zip(self._layers, self._counts.tolist(), strict=True))
