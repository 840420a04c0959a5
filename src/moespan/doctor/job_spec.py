"""The job to be checked, as far as the checks need to know it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moespan.config import EngineConfig, Layout, ModelConfig, Nodes


@dataclass(frozen=True)
class JobSpec:
    """The job to be checked.

    Attributes:
        device: `npu`, `cuda` or `cpu`.
        layout: the layout of the job; a single rank if none was named.
        config, model: None if no MODEL was named.
        bind: the value of `--bind`.
        nodes: the nodes of the job, and which of them this is.
        port: where a server is to listen; None for no server.
    """

    device: str
    layout: Layout = field(default_factory=Layout)
    config: EngineConfig | None = None
    model: ModelConfig | None = None
    bind: str = "auto"
    nodes: Nodes = field(default_factory=Nodes)
    port: int | None = None

    @property
    def ranks(self) -> int:
        """Ranks on one node."""
        return max(self.layout.world_size // self.nodes.nnodes, 1)
