"""The secret that the nodes of one job share: where it comes from.

| what is given | node 0 | the other nodes |
|---|---|---|
| `cluster_key_file` | reads the file; makes it if it is missing | read the file; wait for it |
| `MOESPAN_CLUSTER_KEY` | takes it | take it |
| neither | makes a key and shows it | an error that names both |
| `no_cluster_key` | no secret | no secret |

`moespan.launch.tunnel` proves the key and never sends it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from moespan.config import Nodes
from moespan.errors import ConfigError, MeetingError

KEY_VARIABLE = "MOESPAN_CLUSTER_KEY"

_SHORTEST_KEY = 16
_LONGEST_KEY = 4096
_POLL_S = 0.2


def cluster_key(
    nodes: Nodes, say: Callable[[str], None], environ: Mapping[str, str] = os.environ
) -> bytes:
    """The key of this job, 32 bytes; the same for all jobs that are given none on purpose.

    Args:
        say: shows the user a line.

    Raises:
        ConfigError: there is no key, or none that can be used.
        MeetingError: node 0 has not made the file of the key within `join_timeout_s`.
    """
    if nodes.no_cluster_key:
        return _derived("")
    if nodes.cluster_key_file is not None:
        return _derived(_from_file(Path(nodes.cluster_key_file), nodes, say))
    if text := environ.get(KEY_VARIABLE, "").strip():
        return _derived(_checked(text, KEY_VARIABLE))
    if nodes.node_rank > 0:
        raise ConfigError(
            f"this node has no cluster key: set {KEY_VARIABLE} to the key that node 0 has shown on "
            "its stderr, or give all nodes the same --cluster-key-file; on a network that nobody "
            "else reaches, --no-cluster-key on all nodes does without"
        )
    return _derived(_new_key(say))


def keep_cluster_key(
    nodes: Nodes, say: Callable[[str], None], environ: MutableMapping[str, str] = os.environ
) -> None:
    """On node 0, before several jobs one after the other: if there is no key, make one for all.

    Args:
        environ: gets the key, for the agents.
    """
    is_settled = nodes.no_cluster_key or nodes.cluster_key_file is not None
    if nodes.nnodes > 1 and not is_settled and not environ.get(KEY_VARIABLE, "").strip():
        environ[KEY_VARIABLE] = _new_key(say)


def _new_key(say: Callable[[str], None]) -> str:
    text = secrets.token_hex(16)
    say(
        f"the cluster key of this job is {text}; start the other nodes with {KEY_VARIABLE}={text} "
        "in their environment (docs/multi_node.md)"
    )
    return text


def _derived(text: str) -> bytes:
    return hashlib.sha256(b"moespan cluster key\0" + text.encode()).digest()


def _checked(text: str, source: str) -> str:
    if not _SHORTEST_KEY <= len(text) <= _LONGEST_KEY:
        raise ConfigError(
            f"the cluster key in {source} has {len(text)} characters, and must have from "
            f"{_SHORTEST_KEY} to {_LONGEST_KEY}; `openssl rand -hex 16` makes a good one"
        )
    return text


def _from_file(path: Path, nodes: Nodes, say: Callable[[str], None]) -> str:
    """The key in a file, which node 0 makes and the others wait for if it is missing."""
    deadline = time.monotonic() + nodes.join_timeout_s
    while True:
        try:
            if text := _read(path):
                return _checked(text, str(path))
            if nodes.node_rank == 0:
                _make(path)
                say(f"wrote a new cluster key to {path}")
                continue
        except OSError as error:
            raise ConfigError(f"cluster_key_file={path}: {error.strerror}") from None
        if time.monotonic() > deadline:
            raise MeetingError(
                f"cluster_key_file={path} is missing or empty on this node; node 0 makes it there "
                "only if both see the same folder: copy it from node 0, or name a shared folder"
            )
        time.sleep(_POLL_S)


def _read(path: Path) -> str:
    """The stripped text of the file; empty if the file is missing.

    Raises:
        ConfigError: others may read or write the file, or it is no text of bounded length.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"cluster_key_file={path} is not a regular file")
        if status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                f"cluster_key_file={path} can be read or written by others; "
                f"chmod 600 {path} and, if others have seen the key, make a new one"
            )
        data = file.read(_LONGEST_KEY + 1)
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"cluster_key_file={path} is not a text") from None


def _make(path: Path) -> None:
    """Write a new key, all of it or nothing. If another process is first, its key stays."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{secrets.token_hex(16)}\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
