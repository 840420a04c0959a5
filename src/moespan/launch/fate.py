"""How a process of the job ended, in words: its signal, and whether memory had run out.

Imports no torch.
"""

from __future__ import annotations

import signal
from pathlib import Path

from moespan import cgroups


class OomKills:
    """Counts the processes that the kernel has killed for memory since this object was made."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = cgroups.oom_kills(root)

    @property
    def count(self) -> int:
        """Kills in our control group; 0 if the kernel does not tell."""
        now = cgroups.oom_kills(self._root)
        return 0 if now is None or self._before is None else max(now - self._before, 0)

    def fate(self, signal_number: int) -> str:
        """The end of a process that a signal has killed, as the rest of a sentence about it."""
        if signal_number != signal.SIGKILL:
            return f"was killed by {signal_name(signal_number)}"
        if not self.count:
            return "was killed by SIGKILL from outside"
        limit = cgroups.memory_limit_bytes(self._root)
        within = "" if limit is None else f" within its limit of {limit / 2**30:.1f} GiB"
        return (
            "was killed by the kernel (SIGKILL), because the control group ran out of memory"
            f"{within}; lower num_blocks, max_num_seqs, max_num_batched_tokens or max_model_len, "
            "use more ranks or nodes, or raise the limit"
        )


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGSEGV."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process; False if it has gone."""
    return _stat(pid)[:1] in (["T"], ["t"])


def start_ticks(pid: int) -> int:
    """When a process started, in the kernel's ticks; 0 if it has gone. With its number this names
    a process for ever."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def state_of(pid: int, started: int) -> str:
    """The letter of the kernel for the state of the process that `started` then, such as Z for a
    zombie; empty if it has gone."""
    fields = _stat(pid)
    return fields[0] if fields and int(fields[19]) == started else ""


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state on, which is field 3 of proc(5); [] if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
