"""The program of `moespan serve`: from the bound port to the last rank.

The order matters. The port is bound first, so that a taken port costs nothing. HTTP is served from
then on, so that probes see `starting`. Signals: SIGTERM drains; a second one, or SIGINT, ends at
once; SIGHUP reads the keys again.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.routing import Route

from moespan import log
from moespan.config import EngineConfig
from moespan.engine.info import EngineInfo
from moespan.serve import mindie
from moespan.serve.app import make_app
from moespan.serve.auth import Keys
from moespan.serve.expert_watch import ExpertWatch
from moespan.serve.life import Life
from moespan.serve.live_requests import OnNews, Ranks
from moespan.serve.metrics import Metrics, metrics_route
from moespan.serve.options import ServeOptions
from moespan.serve.page import page_routes
from moespan.serve.served import ServedModel
from moespan.serve.server import Server, url_of
from moespan.serve.tracing import Tracing
from moespan.serve.upkeep import Upkeep, obey_signals

_LOOK_S = 0.05
_SWITCH_S = 0.0005
"""After what time a thread that runs Python code lets another one run, by default 5 ms. The loop
waits so long at each of its system calls while the pool's threads decode and encode."""

_LAST_BYTES_S, _FORCED_BYTES_S = 10.0, 1.0
"""How long clients may take to read the end of their answers when no rank is left."""

Start = Callable[[OnNews], Awaitable[Ranks]]


@dataclass(frozen=True)
class Program:
    """All that a server is made of.

    Attributes:
        start: starts the ranks of `config`.
        socks: listen already; the first is for clients, the second is --management-port.
        tracing: makes spans of requests; None for none.
    """

    config: EngineConfig
    model: ServedModel
    keys: Keys
    options: ServeOptions
    socks: Sequence[socket.socket]
    start: Start
    tracing: Tracing | None = None

    def run(self) -> None:
        """Serve until a signal ends it.

        Raises:
            MoespanError: the engine cannot start, or died too often.
        """
        sys.setswitchinterval(_SWITCH_S)
        gc.collect()
        gc.freeze()  # else each full collection looks at all modules, and streams wait 12 ms for it
        asyncio.run(self._run())

    async def _run(self) -> None:
        options = self.options
        metrics = Metrics(
            self.model.names[0], self.config, alias_vllm=options.metrics_alias == "vllm"
        )
        given = self.start, options, metrics, self.model.tokenizer, self.config.step_timeout_s
        life = Life(*given) if self.tracing is None else Life(*given, on_end=self.tracing.tell)
        watch = ExpertWatch(life, metrics) if self.config.expert_stats else None
        app = make_app(
            self.model,
            life,
            self.keys,
            options,
            more_routes=self._operators_routes(life, metrics, watch),
            open_paths=mindie.OPEN_PATHS if options.mindie_routes else frozenset(),
            on_end=metrics.answered,
        )
        # Each counts its own connections.
        servers = [Server(app, options, metrics.answered) for _ in self.socks]
        obey_signals(life)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.keys.reload)
        serving = [
            asyncio.create_task(server.serve([sock]))
            for server, sock in zip(servers, self.socks, strict=True)
        ]
        beside = [
            asyncio.create_task(Upkeep(life, metrics).run()),
            asyncio.create_task(self._tell_when_ready(life)),
        ]
        if watch is not None:
            beside.append(asyncio.create_task(watch.run()))
        try:
            await life.run()
        finally:
            for task in beside:
                task.cancel()
            for server in servers:
                server.should_exit = True
            last_bytes_s = _FORCED_BYTES_S if life.is_forced else _LAST_BYTES_S
            await asyncio.wait(serving, timeout=last_bytes_s)
            for server in servers:  # clients that still do not read
                server.force_exit = True
            await asyncio.gather(*serving)
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.shut_down)

    def _operators_routes(
        self, life: Life, metrics: Metrics, watch: ExpertWatch | None
    ) -> list[Route]:
        name, ranks = self.model.names[0], self.config.layout.world_size
        routes = [metrics_route(metrics), *page_routes(life, metrics, name, ranks, watch)]
        if self.options.mindie_routes:
            routes += mindie.mindie_routes(self.model, life, metrics, self.options)
        return routes

    async def _tell_when_ready(self, life: Life) -> None:
        """Say once where the server is and what it serves."""
        while life.info is None:
            await asyncio.sleep(_LOOK_S)
        log.logger.info("%s", self._ready_line(life.info))

    def _ready_line(self, info: EngineInfo) -> str:
        num_tokens = info.num_blocks * info.block_size * info.layout.dp
        parts = [
            f"ready on {url_of(self.socks[0], self.options)}",
            self.model.names[0],
            str(info.layout),
            f"{info.device}, {info.dtype}",
            f"KV for {num_tokens} tokens: {num_tokens // info.max_model_len} sequences of "
            f"{info.max_model_len}",
        ]
        if self.model.defaults:
            defaults = ", ".join(f"{name}={value}" for name, value in self.model.defaults.items())
            parts.append(f"defaults of generation_config.json: {defaults}")
        if self.options.log_prompts:
            parts.append("PROMPTS AND ANSWERS ARE LOGGED")
        return "; ".join(parts)
