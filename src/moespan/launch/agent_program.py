"""The program of the agent. Whatever fails in it, the front learns the reason.

Started as `python -m moespan.launch.agent_program JOB_DIRECTORY RANKS FRONT_PID PROGRAM...`, the
arguments of `moespan.launch.agent.main`. Even the import of torch may fail, for want of memory, so
the agent is loaded where a failure is written for the front.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback

from moespan import log
from moespan.launch.job import Failure, Job


def main(argv: list[str]) -> int:
    """Run the agent, and write any error of its own for the front; → its exit code."""
    directory, ranks, front_pid, *program = argv
    job = Job(directory)
    log.set_up()
    try:
        from moespan.launch import agent

        return agent.main(job, int(ranks), int(front_pid), program)
    except Exception as error:
        message = f"the agent failed with {type(error).__name__}: {error}".removesuffix(": ")
        trace = traceback.format_exc()
        job.write_failure(Failure(rank=None, kind="", message=message, traceback=trace))
        return 1
    finally:
        if os.getppid() != int(front_pid):
            shutil.rmtree(job.directory, ignore_errors=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # A thread that hangs in the store of a lost node would crash an orderly exit of Python.
    os._exit(code)
