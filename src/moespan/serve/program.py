"""The program of `moespan serve`: from the bound port to the last rank.

The order matters. The port is bound first, so that a taken port costs nothing. HTTP is served from
then on, so that probes see `starting`. Signals: SIGTERM drains; a second one, or SIGINT, ends at
once; SIGHUP reads the keys again.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from moespan.config import EngineConfig
from moespan.serve.app import make_app
from moespan.serve.auth import Keys
from moespan.serve.life import Life, OnNews, Ranks
from moespan.serve.metrics import Metrics, metrics_route
from moespan.serve.options import ServeOptions
from moespan.serve.page import page_routes
from moespan.serve.served import ServedModel
from moespan.serve.server import Server, url_of
from moespan.serve.upkeep import Upkeep, obey_signals

_LOOK_S = 0.05

Start = Callable[[OnNews], Awaitable[Ranks]]


@dataclass(frozen=True)
class Program:
    """All that a server is made of.

    Attributes:
        start: starts the ranks of `config`.
        sock: listens already.
        say: tells the operator that the server is ready.
    """

    config: EngineConfig
    model: ServedModel
    keys: Keys
    options: ServeOptions
    sock: socket.socket
    start: Start
    say: Callable[[str], object]

    def run(self) -> None:
        """Serve until a signal ends it.

        Raises:
            MoespanError: the engine cannot start, or died too often.
        """
        asyncio.run(self._run())

    async def _run(self) -> None:
        options = self.options
        metrics = Metrics(
            self.model.names[0], self.config, alias_vllm=options.metrics_alias == "vllm"
        )
        life = Life(self.start, options, metrics, self.config.step_timeout_s)
        app = make_app(
            self.model,
            life,
            self.keys,
            options,
            more_routes=[
                metrics_route(metrics),
                *page_routes(life, metrics, self.model.names[0], self.config.layout.world_size),
            ],
            on_end=metrics.answered,
        )
        server = Server(app, options)
        obey_signals(life)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.keys.reload)
        serving = asyncio.create_task(server.serve([self.sock]))
        beside = [
            asyncio.create_task(Upkeep(life, metrics).run()),
            asyncio.create_task(self._tell_when_ready(life)),
        ]
        try:
            await life.run()
        finally:
            for task in beside:
                task.cancel()
            server.should_exit = True
            await serving

    async def _tell_when_ready(self, life: Life) -> None:
        """Say once where the server is and what it serves."""
        while life.info is None:
            await asyncio.sleep(_LOOK_S)
        info, options = life.info, self.options
        parts = [
            f"ready on {url_of(self.sock, options)}",
            self.model.names[0],
            str(info.layout),
            f"{info.device}, {info.dtype}",
            f"KV for {info.num_blocks * info.block_size} tokens",
        ]
        if self.model.defaults:
            defaults = ", ".join(f"{name}={value}" for name, value in self.model.defaults.items())
            parts.append(f"defaults of generation_config.json: {defaults}")
        if options.log_prompts:
            parts.append("PROMPTS AND ANSWERS ARE LOGGED")
        self.say("; ".join(parts))
