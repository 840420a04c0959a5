"""What is to be run, as far as the checks need to know it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moespan.config import EngineConfig, Layout, ModelConfig, Nodes


@dataclass(frozen=True)
class JobSpec:
    """What is to be run.

    Attributes:
        device: `npu`, `cuda` or `cpu`.
        layout: of the job; a single rank if none was named.
        config, model: with a MODEL; else None.
        bind: as `--bind` says it.
        nodes: this one's place among those of the job.
    """

    device: str
    layout: Layout = field(default_factory=Layout)
    config: EngineConfig | None = None
    model: ModelConfig | None = None
    bind: str = "auto"
    nodes: Nodes = field(default_factory=Nodes)

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return max(self.layout.world_size // self.nodes.nnodes, 1)
