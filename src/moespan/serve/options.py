"""The options of the server, each once: name, default, meaning. The flags follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moespan.errors import ConfigError


def option(default: Any, meaning: str) -> Any:
    """A field whose flag has this default and this help."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class LifeOptions:
    """Options of `moespan.serve.life.Life`: what waits, when the engine starts again, how it ends.

    A field is a flag of the same name, without the unit at its end.
    """

    max_queued_requests: int = option(4096, "most requests that wait for their first token")
    max_queued_tokens: int | None = option(
        None, "most prompt tokens of requests that wait (16 times the KV cache)"
    )
    max_restarts: int = option(3, "restarts of the engine within --restart-window before giving up")
    restart_window_s: float = option(3600.0, "seconds for which a restart counts")
    retry_unstarted: bool = option(
        False, "keep requests without a token so far over a restart of the engine"
    )
    drain_timeout_s: float = option(45.0, "seconds that running requests have after SIGTERM")

    def __post_init__(self) -> None:
        least = {
            "max_queued_requests": 1,
            "max_queued_tokens": 1,
            "max_restarts": 0,
            "restart_window_s": 0,
            "drain_timeout_s": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value} must be at least {low}")
