"""Who may call: keys, and the rule that decides on the raw path before anything else looks at it.

With keys, everything needs one, known or not, except the exact paths in `OPEN_PATHS`. Neither the
Host header nor a decoded path takes part in the decision.

Without keys, only this machine can reach the server, but so can the pages that its browsers show:
a page may point a name of its own at 127.0.0.1 (DNS rebinding), and then nothing is foreign to it.
The name stays in the Host header. So names that are not of this machine are refused.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from moespan import files, log
from moespan.errors import ConfigError, shown
from moespan.front.api_key import API_KEY_VARIABLE
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal

OPEN_PATHS = frozenset({b"/health", b"/live", b"/ready"})
"""Raw paths that need no key."""

_MOST_FILE_BYTES = 1 << 20
_UNSENDABLE = re.compile(rb"[\x00-\x20\x7f]")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Keys:
    """The keys that clients may send, by name.

    Args:
        options: where keys come from.
        environment: where `MOESPAN_API_KEY` is taken out of, so that no child process inherits it.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(
        self, options: ServeOptions, environment: MutableMapping[str, str] = os.environ
    ) -> None:
        self._file = None if options.api_key_file is None else Path(options.api_key_file)
        self._fixed: dict[str, bytes] = {}
        if (value := environment.pop(API_KEY_VARIABLE, "")) != "":
            self._fixed[API_KEY_VARIABLE] = value.encode("utf-8", "surrogateescape")
        if options.api_key is not None:
            if not options.api_key:
                raise ConfigError("--api-key is empty; give a key or leave the flag out")
            log.logger.warning(
                "--api-key: everybody on this machine can read it in the list of processes; "
                "--api-key-file and %s are safer",
                API_KEY_VARIABLE,
            )
            self._fixed["--api-key"] = options.api_key.encode("utf-8", "surrogateescape")
        self._keys = self._read()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def reload(self) -> None:
        """Read the file again; a file that cannot be used changes nothing."""
        if self._file is None:
            log.logger.warning(
                "SIGHUP changes no key: there is no --api-key-file to read again; give one, or "
                "start the server again with the new key"
            )
            return
        try:
            self._keys = self._read()
        except ConfigError as error:
            log.logger.error("the keys stay as they are: %s", error)
        else:
            log.logger.info("%d keys are valid now", len(self._keys))

    def name_of(self, key: bytes) -> str | None:
        """The name of a key; None if there is no such key. Takes the same time for all keys."""
        found = None
        for name, known in self._keys.items():
            if hmac.compare_digest(known, key):
                found = name
        return found

    def _read(self) -> Mapping[str, bytes]:
        if self._file is None:
            return self._fixed
        try:
            lines = files.read_bytes(self._file, _MOST_FILE_BYTES).splitlines()
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise ConfigError(f"--api-key-file {self._file} cannot be read: {reason}") from None
        keys = dict(self._fixed)
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith(b"#"):
                continue
            name = words[0].decode("utf-8", "replace") if len(words) == 2 else f"line {number}"
            if _UNSENDABLE.search(words[-1]):
                raise ConfigError(
                    f"--api-key-file {self._file}, line {number}: holds characters that no header "
                    "can carry; write the file as plain text"
                )
            if len(words) > 2 or name in keys:
                raise ConfigError(
                    f"--api-key-file {self._file}, line {number}: must be KEY, or NAME KEY with a "
                    "name of its own"
                )
            keys[name] = words[-1]
        if not keys:
            raise ConfigError(f"--api-key-file {self._file} holds no key")
        return keys


class Auth:
    """ASGI: lets requests through that may come in, and refuses the others.

    Args:
        open_paths: raw paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        options: ServeOptions,
        open_paths: frozenset[bytes] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._keys = keys
        self._prefix = options.prefix.encode()
        self._origins = options.allowed_origins
        self._is_loopback = options.is_loopback
        self._hosts = frozenset(map(str.lower, (options.host, *options.allowed_hosts)))
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Refusal: a 401, or a 403 for a page of another origin or name.
        """
        headers = [(name, value) for name, value in scope["headers"]]
        credentials = [value for name, value in headers if name == b"authorization"]
        name, is_bearer = self._caller(credentials)
        if self._keys and name is None and not self._is_open(scope["raw_path"]):
            raise Refusal(
                401,
                "this key is not valid"
                if credentials
                else "a key is needed: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": 'Bearer, Basic realm="moespan", charset="UTF-8"'},
            )
        if not self._keys and self._is_loopback and not self._is_open(scope["raw_path"]):
            self._check_host(scope)
        if scope["method"] not in _SAFE_METHODS and not is_bearer:
            self._check_origin(headers)
        scope.setdefault("state", {})["caller"] = name
        await self._app(scope, receive, send)

    def _is_open(self, raw_path: bytes) -> bool:
        return raw_path.removeprefix(self._prefix) in self._open_paths

    def _caller(self, credentials: list[bytes]) -> tuple[str | None, bool]:
        """The name of the key, and whether a program sent it, not a browser by itself."""
        if len(credentials) != 1:
            return None, False
        scheme, _, value = credentials[0].strip().partition(b" ")
        value = value.strip()
        if scheme.lower() == b"bearer":
            return self._keys.name_of(value), True
        if scheme.lower() == b"basic":
            try:
                _, _, value = base64.b64decode(value, validate=True).partition(b":")
            except (binascii.Error, ValueError):
                return None, False
            return self._keys.name_of(value), False
        return None, False

    def _check_host(self, scope: Scope) -> None:
        """Refuse a name that a page may have pointed at this machine."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        is_tcp = scope["server"] is not None and scope["server"][1] is not None
        if is_tcp and hosts and "*" not in self._hosts and not self._is_own(_name_in(hosts[0])):
            raise Refusal(
                403,
                f"the name {shown(_name_in(hosts[0]))} in the Host header is none of this machine; "
                "use localhost or an address, or --allowed-hosts, or a key",
                code="foreign_host",
            )

    def _is_own(self, name: str) -> bool:
        """Whether a name is that of this machine, or an address."""
        if name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_origin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuse what a page of another origin makes a browser send."""
        given = {name: value.decode("latin-1") for name, value in headers}
        origin = given.get(b"origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        _, _, place = origin.lower().partition("://")  # any text may come; urlsplit raises
        if not place or place != given.get(b"host", "").lower():
            raise Refusal(
                403,
                f"pages of {shown(origin)} may not call this server; --allowed-origins would let "
                "them",
                code="foreign_origin",
            )


def _name_in(host: str) -> str:
    """The name or address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")


def check_reach(options: ServeOptions, keys: Keys) -> None:
    """Refuse a server that others can reach and that asks for no key.

    Raises:
        ConfigError: says what to do.
    """
    if options.is_loopback or keys or options.allow_no_auth:
        return
    raise ConfigError(
        f"--host {shown(options.host)} lets other machines in, and there is no key; give "
        f"--api-key-file FILE or {API_KEY_VARIABLE}, or --allow-no-auth if something before this "
        "server checks who calls"
    )
