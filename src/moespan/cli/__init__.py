"""The command line: one module for each verb, with its flags and what it runs.

`moespan VERB --help` shows a verb's flags; vLLM's and SGLang's spellings are accepted too. Heavy
imports wait until a verb needs them. A new verb is a module with `SUMMARY`, `add_flags` and `run`,
and its name in `_VERBS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moespan import log
from moespan.cli import bench, doctor, generate, info, make_checkpoint, quantize, verify
from moespan.cli.environment import print_environment
from moespan.cli.show import EXIT_FAILED
from moespan.errors import MoespanError
from moespan.machine.environment import keep_torch_npu_out
from moespan.version import __version__

_VERBS = (generate, verify, bench, info, make_checkpoint, quantize, doctor)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 if all went well, 1 if something failed, 2 for a wrong command."""
    args = _parser().parse_args(argv)
    # An installed torch_npu without CANN would make `import torch` fail, for other devices too.
    keep_torch_npu_out()
    log.keep_stdout_for_answers()
    run = print_environment if getattr(args, "print_env", False) else args.run
    try:
        log.set_up(args.log_level)
        code = run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone. Python flushes once more at exit, now into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (MoespanError, OSError) as error:
        log.logger.error("%s", error)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moespan", description="Runs DeepSeek-MoE under any layout. See VERB --help."
    )
    parser.add_argument("--version", action="version", version=f"moespan {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in _VERBS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        verb = verbs.add_parser(
            name, help=module.SUMMARY, description=module.run.__doc__, allow_abbrev=False
        )
        module.add_flags(verb)
        verb.add_argument(
            "--log-level",
            choices=log.LEVELS,
            help="least severe messages on stderr (info; or as MOESPAN_LOG_LEVEL says)",
        )
        verb.set_defaults(run=module.run, usage_error=verb.error)
    return parser
