"""The options of the server, each once: name, default, meaning, when to change it.

The flags of `moespan serve`, their help and the table in docs/cli.md follow from here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

from moespan.engine.request import MAX_LOGPROBS, MAX_N
from moespan.errors import ConfigError, shown
from moespan.front.api_key import API_KEY_VARIABLE


def option(
    default: Any,
    meaning: str,
    when: str = "",
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
) -> Any:
    """A field whose flag has this default and this help.

    Args:
        when: when a user should change the default, for the docs.
        aliases: other spellings of the flag.
        choices: the values that the flag takes; empty for any.
    """
    about = {"help": meaning, "when": when, "aliases": aliases, "choices": choices}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class LifeOptions:
    """Options of `moespan.serve.life.Life`: what waits, when the engine starts again, how it ends.

    A field is a flag of the same name, without the unit at its end.
    """

    max_queued_requests: int = option(
        4096,
        "most requests that wait for their first token; more are answered 429",
        "a router should go elsewhere sooner",
    )
    max_queued_tokens: int | None = option(
        None,
        "most prompt tokens of requests that wait (16 times the KV cache)",
        "see --max-queued-requests",
    )
    max_restarts: int = option(
        3,
        "restarts of the engine within --restart-window before giving up",
        "0 where something else restarts the server",
    )
    restart_window_s: float = option(
        3600.0, "seconds for which a restart counts", "see --max-restarts"
    )
    retry_unstarted: bool = option(
        False,
        "keep requests without a token so far over a restart of the engine",
        "clients do not try again themselves",
    )
    drain_timeout_s: float = option(
        45.0,
        "seconds that running requests have after SIGTERM",
        "long answers; an orchestrator must wait longer than this",
        aliases=("--shutdown-timeout",),
    )

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


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Options of the HTTP side: addresses, keys, limits, what is logged."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; beyond loopback a key is needed",
        "0.0.0.0 or :: where clients are on other machines",
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", "several servers on a host")
    uds: str | None = option(
        None, "unix socket to listen on, instead of --host and --port", "behind a local proxy"
    )
    api_key: str | None = option(
        None,
        "key that clients must send; `ps` shows it, so prefer --api-key-file or "
        f"{API_KEY_VARIABLE}",
        "short trials",
    )
    api_key_file: str | None = option(
        None,
        "file of keys, one a line: KEY, or NAME KEY; read again on SIGHUP",
        "every server that others can reach",
    )
    allow_no_auth: bool = option(
        False, "listen beyond loopback without a key", "behind a gateway that checks who calls"
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "names of the model for clients; the first is shown in answers (MODEL as typed)",
        "clients and routers expect a fixed name",
    )
    root_path: str | None = option(
        None, "path that a proxy puts before ours", "a proxy that does not strip its prefix"
    )
    ssl_certfile: str | None = option(None, "certificate for HTTPS", "no proxy ends TLS")
    ssl_keyfile: str | None = option(None, "private key of the certificate", "see --ssl-certfile")
    ssl_ca_certs: str | None = option(
        None, "clients must show a certificate that these authorities signed", "mutual TLS"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "origins whose pages may call this server; * for all", "a web page of another host"
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "names in the Host header that a loopback server without a key takes beside localhost and "
        "IP addresses; * for all",
        "a local proxy passes the name of a public host on",
    )
    forwarded_allow_ips: str | None = option(
        None,
        "proxies whose X-Forwarded headers are believed, separated by commas",
        "logs should show the client behind a proxy",
    )
    chat_template: str | None = option(
        None, "file with another chat template", "base models, or a faulty template"
    )
    generation_config: str = option(
        "none",
        "auto: generation_config.json sets defaults of sampling; none: OpenAI's defaults",
        "clients that set no temperature should get the checkpoint's",
        choices=("auto", "none"),
    )
    max_logprobs: int = option(MAX_LOGPROBS, "most log probabilities for each token", "to save CPU")
    max_prompts: int = option(512, "most prompts of one request", "evaluation in large batches")
    max_choices: int = option(1024, "most prompts times n of one request", "see --max-prompts")
    max_n: int = option(MAX_N, "most continuations of a prompt", "to save the KV cache")
    max_body_mib: int = option(8, "largest body of a request, in MiB", "very long batches")
    max_header_kib: int = option(16, "headers of a request in all, in KiB", "large cookies")
    max_connections: int = option(4096, "most connections at a time", "see also ulimit -n")
    read_timeout_s: float = option(
        60.0, "seconds for headers and body of a request together", "slow links"
    )
    write_timeout_s: float = option(
        60.0, "seconds after which a client that reads nothing is dropped", "slow links"
    )
    request_timeout_s: float | None = option(
        None, "seconds after which a request ends with an error (off)", "clients without a timeout"
    )
    keep_alive_s: float = option(
        75.0, "seconds that an idle connection stays open", "longer than a load balancer's"
    )
    strict_fields: bool = option(
        False, "refuse requests with fields that are not known, as OpenAI does", "to find mistakes"
    )
    metrics_alias: str = option(
        "vllm",
        "vllm: /metrics has vLLM's names beside ours; none: ours only",
        "no board or router reads vLLM's names",
        choices=("vllm", "none"),
    )
    management_port: int | None = option(
        None,
        "a second port with the same routes, whose connections are counted apart",
        "probes and metrics must get through while clients fill --port",
    )
    mindie_routes: bool = option(
        False, "also answer the routes of MindIE's server", "clients and probes written for MindIE"
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "URL of an OTLP collector that gets a span for each request (needs the extra otel)",
        "a trace should show queue, prefill and decode",
    )
    log_format: str | None = option(
        None,
        "json: every line of the log is an object (text, or as MOESPAN_LOG_FORMAT says)",
        "something collects the log",
        choices=("text", "json"),
    )
    log_requests: bool = option(
        False, "log a line for each request but probes: ids and numbers", "to debug"
    )
    disable_log_requests: bool = option(
        False, "as without --log-requests", "commands written for vLLM"
    )
    log_prompts: bool = option(False, "log prompts and answers, too", "to debug, with consent")

    def __post_init__(self) -> None:
        least = {
            "port": 0,
            "management_port": 0,
            "max_logprobs": 0,
            "max_prompts": 1,
            "max_choices": 1,
            "max_n": 1,
            "max_body_mib": 1,
            "max_header_kib": 1,
            "max_connections": 1,
            "read_timeout_s": 0.01,
            "write_timeout_s": 0.01,
            "request_timeout_s": 0.01,
            "keep_alive_s": 0.01,
        }
        most = {
            "port": 65535,
            "management_port": 65535,
            "max_logprobs": MAX_LOGPROBS,
            "max_n": MAX_N,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= most.get(name, value):
                rule = f"within {low}..{most[name]}" if name in most else f"at least {low}"
                raise ConfigError(f"{flag_of(name)} {shown(value)} must be {rule}")
        for origin in self.allowed_origins:
            if not re.fullmatch(r"\*|https?://[^/\s]+", str(origin)):
                raise ConfigError(
                    f"--allowed-origins {shown(origin)} must be * or like https://example.org"
                )
        for name in self.allowed_hosts:
            if not re.fullmatch(r"\*|[\w.-]+", str(name)):
                raise ConfigError(
                    f"--allowed-hosts {shown(name)} must be * or a name without a port, like "
                    "example.org"
                )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together; give both")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-ca-certs needs --ssl-certfile and --ssl-keyfile")
        if self.root_path and (self.root_path[0] != "/" or self.root_path[-1] == "/"):
            raise ConfigError(f"--root-path {shown(self.root_path)} must be like /prefix")

    @property
    def prefix(self) -> str:
        """The path before all routes; empty without one."""
        return self.root_path or ""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost" or (self.uds is not None and self.management_port is None):
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, kw_only=True)
class ServeOptions(HttpOptions, LifeOptions):
    """All options of `moespan serve` beside those of the engine."""

    def __post_init__(self) -> None:
        LifeOptions.__post_init__(self)
        HttpOptions.__post_init__(self)


def flag_of(name: str) -> str:
    """The flag of a field: its name without the unit at its end."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def options() -> Iterator[Field[Any]]:
    """All fields of `ServeOptions` in the order in which help and docs show them."""
    own = {one.name: one for one in fields(ServeOptions)}
    for group in (HttpOptions, LifeOptions):
        yield from (own[one.name] for one in fields(group))


def default_text(one: Field[Any]) -> str:
    """A field's default for help and docs; empty if nothing is set."""
    if one.default in (None, False, (), ""):
        return ""
    return f"{one.default:g}" if isinstance(one.default, float) else str(one.default)


def flags_table() -> list[str]:
    """The rows of the table of flags in docs/cli.md."""
    rows = ["| flag | default | meaning | when to change it |", "|---|---|---|---|"]
    for one in options():
        names = ", ".join(f"`{name}`" for name in (flag_of(one.name), *one.metadata["aliases"]))
        about = one.metadata
        rows.append(f"| {names} | {default_text(one)} | {about['help']} | {about['when']} |")
    return rows
