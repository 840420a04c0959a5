"""What is to be run, as far as the checks need to know it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moespan.config import EngineConfig, Layout, ModelConfig


@dataclass(frozen=True)
class JobPlan:
    """What is to be run.

    Attributes:
        device: `npu`, `cuda` or `cpu`.
        layout: of the job; a single rank if none was named.
        config, model: with a MODEL; else None.
        bind: as `--bind` says it.
        nnodes, node_rank, master_addr, master_port: of a job on many nodes.
    """

    device: str
    layout: Layout = field(default_factory=Layout)
    config: EngineConfig | None = None
    model: ModelConfig | None = None
    bind: str = "auto"
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return max(self.layout.world_size // self.nnodes, 1)
