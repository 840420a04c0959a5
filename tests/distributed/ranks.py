"""Engines on real ranks that tests of layouts share, so that not each starts processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import save_file

from moespan import LLM
from moespan.config import EngineConfig, Layout, ModelConfig, Nodes
from moespan.engine.client import EngineClient
from moespan.errors import MoespanError
from moespan.launch.local import join
from moespan.launch.ranks import RanksClient
from moespan.measure.verify import Reference
from tests.support import DATA

ONE_RANK = Layout()


class Ranks:
    """Groups of running ranks, by world size. A new engine on a group replaces the previous one.

    Args:
        program: what Python runs in each rank; None is the product's own program.
    """

    def __init__(self, program: Sequence[str] | None = None) -> None:
        self._program: dict[str, Any] = {} if program is None else {"program": program}
        self._clients: dict[int, RanksClient] = {}

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(RanksClient.close, self._clients.values()))

    def llm(
        self, model: Path, layout: Layout = ONE_RANK, moe_dispatch: str = "auto", **settings: Any
    ) -> LLM:
        """An engine, in float32 unless `settings` say otherwise. Only the next engine ends it."""
        with mock.patch("moespan.front.llm.connect", self._connect):
            return LLM(
                str(model),
                tensor_parallel_size=layout.tp,
                expert_parallel_size=layout.ep,
                pipeline_parallel_size=layout.pp,
                sequence_parallel_size=layout.sp,
                data_parallel_size=layout.dp,
                pipeline_layers=layout.pipeline_layers,
                moe_dispatch=moe_dispatch,
                **{
                    "device": "cpu",
                    "dtype": "float32",
                    "max_num_batched_tokens": 512,
                    "num_blocks": 64,
                    **settings,
                },
            )

    def _connect(self, config: EngineConfig, nodes: Nodes) -> EngineClient:
        assert nodes == Nodes(), "the pools are on this machine"
        world_size = config.layout.world_size
        if world_size == 1:
            return join(config)
        client = self._clients.pop(world_size, None)
        if client is not None:
            with contextlib.suppress(MoespanError):  # an earlier test killed it: start another
                client.reload(config)
                self._clients[world_size] = client
                return client
            client.close()
        self._clients[world_size] = RanksClient(config, 60, **self._program)
        return self._clients[world_size]


def oracle(name: str) -> Path:
    """The folder of an oracle checkpoint."""
    return DATA / "oracle" / name


def oracle_reference(name: str, folder: Path, num_greedy_tokens: int) -> Reference:
    """The Hugging Face model's results, with shorter continuations; written to `folder`."""
    whole = Reference(oracle(name) / "ref" / "ref_logits.safetensors")
    tensors: dict[str, np.ndarray] = {}
    for prompt in whole.prompts:
        greedy = whole.greedy(prompt)
        assert greedy is not None
        tensors[f"{prompt}.ids"] = np.array(whole.ids(prompt))
        tensors[f"{prompt}.logits"] = whole.logits(prompt)
        tensors[f"{prompt}.greedy"] = np.array(greedy[:num_greedy_tokens])
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return Reference(path)


def cases(config: ModelConfig, layouts: Iterable[Layout]) -> Iterator[tuple[Layout, str]]:
    """Every layout that fits the model with every dispatch that applies to it."""
    for layout in layouts:
        layout.check(config)
        for dispatch in layout.dispatches:
            yield layout, dispatch
