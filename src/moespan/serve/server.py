"""Sockets, and uvicorn on them. Signals belong to `moespan.serve.program`, not to uvicorn."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from moespan.errors import ConfigError, shortened
from moespan.files import open_regular
from moespan.serve.edge import OnEnd
from moespan.serve.options import ServeOptions
from moespan.serve.wire import Turns, Wire

_BACKLOG = 2048
_LEAST_FILES = 64  # 20 without any connection

SHUTDOWN_S = 5
"""Seconds that clients have to read the ends of their answers when the server ends."""


class PortTakenError(ConfigError):
    """The address cannot be listened on."""


def listen(options: ServeOptions) -> socket.socket:
    """A socket that accepts connections from now on.

    Raises:
        PortTakenError: the address is taken, is not ours, or needs a right that we do not have.
    """
    if options.uds is not None:
        return _listen_at_path(Path(options.uds))
    return _listen_at_port(options.host, options.port, "--port")


def check_open_files() -> None:
    """Refuse a limit of open files under which the server would listen and accept nobody.

    Raises:
        ConfigError: the limit is below `_LEAST_FILES`.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < _LEAST_FILES:
        raise ConfigError(
            f"a process may open {most} files, and a server needs {_LEAST_FILES} at least; set "
            "ulimit -n 65536, or LimitNOFILE= of the unit"
        )


def listen_apart(options: ServeOptions) -> list[socket.socket]:
    """The same for --management-port; none without it. Raises as `listen`."""
    if options.management_port is None:
        return []
    return [_listen_at_port(options.host, options.management_port, "--management-port")]


def _listen_at_port(host: str, port: int, flag: str) -> socket.socket:
    where = f"--host {host} {flag} {port}"
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, number)
    except OSError as error:
        raise PortTakenError(f"{where} is no address to listen on: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise PortTakenError(
            f"{where} cannot be listened on: {error.strerror}; end the other program, or give "
            "another port"
        ) from None
    return sock


def _listen_at_path(path: Path) -> socket.socket:
    """A unix socket that only this user can reach. Replaces one that nobody listens on."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode) and not _is_served(path):
            path.unlink()
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise PortTakenError(f"--uds {path} cannot be listened on: {error}") from None
    return sock


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def url_of(sock: socket.socket, options: ServeOptions) -> str:
    """Where clients find a listening socket."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    scheme = "http" if options.ssl_certfile is None else "https"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{options.prefix}"


def _refuse_odd_files(options: ServeOptions) -> None:
    """OpenSSL would wait at a FIFO without end, and its errors name no file."""
    for flag, path in (
        ("--ssl-certfile", options.ssl_certfile),
        ("--ssl-keyfile", options.ssl_keyfile),
        ("--ssl-ca-certs", options.ssl_ca_certs),
    ):
        if path is not None:
            try:
                open_regular(path).close()
            except (OSError, ValueError) as error:
                raise ConfigError(f"{flag} {shortened(path)} cannot be read: {error}") from None


def _refuse_encrypted_key(options: ServeOptions) -> None:
    """OpenSSL would ask the terminal for the passphrase, and wait at each start."""
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return

    def refuse() -> str:
        raise ConfigError(
            f"--ssl-keyfile {shortened(options.ssl_keyfile)} is encrypted, and a server cannot ask "
            "for the passphrase; give a key without one, as openssl pkey -in KEY -out PLAIN "
            "writes, in a file that only this user can read"
        )

    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        options.ssl_certfile, options.ssl_keyfile, refuse
    )


class Server(uvicorn.Server):
    """uvicorn on one socket, without signals of its own. `should_exit` ends it.

    Args:
        on_end: called for refusals that `app` does not hear of: of what is no request, or too slow.

    Raises:
        ConfigError: certificate or key cannot be used.
    """

    def __init__(
        self, app: ASGIApp, options: ServeOptions, on_end: OnEnd = lambda route, status: None
    ) -> None:
        _refuse_odd_files(options)
        # uvicorn would write to stderr in its own form; what matters is logged by us.
        logging.getLogger("uvicorn").propagate = False
        if not logging.getLogger("uvicorn").handlers:
            logging.getLogger("uvicorn").addHandler(logging.NullHandler())
        protocol: Any = functools.partial(Wire, options=options, turns=Turns(), on_end=on_end)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=options.forwarded_allow_ips is not None,
            forwarded_allow_ips=options.forwarded_allow_ips or "",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=SHUTDOWN_S,
            timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]
            h11_max_incomplete_event_size=options.max_header_kib << 10,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_NONE if options.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        )
        try:
            _refuse_encrypted_key(options)
            config.load()
        except OSError as error:  # ssl.SSLError is one
            named = f"--ssl-certfile {options.ssl_certfile}, --ssl-keyfile {options.ssl_keyfile}"
            raise ConfigError(f"{named}: {error}") from None
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield
