"""The command line: one module for each verb, with its flags and its code.

`moespan VERB --help` shows a verb's flags; vLLM's and SGLang's spellings are accepted too. Heavy
imports wait until a verb runs. A new verb is a module with `SUMMARY`, `add_flags` and `run` that is
listed in `_VERBS`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moespan import log
from moespan.cli import (
    bench,
    calibrate,
    chat,
    doctor,
    experts,
    generate,
    info,
    make_checkpoint,
    plan,
    quantize,
    serve,
    streams,
    verify,
)
from moespan.cli.environment import print_environment
from moespan.cli.show import EXIT_FAILED, EXIT_REFUSED
from moespan.errors import (
    ConfigError,
    EngineDeadError,
    LayoutError,
    MoespanError,
    RequestError,
    shortened,
)
from moespan.machine.environment import keep_torch_npu_out
from moespan.version import __version__

_VERBS = (
    generate,
    chat,
    serve,
    verify,
    bench,
    calibrate,
    plan,
    experts,
    info,
    make_checkpoint,
    quantize,
    doctor,
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit.

    The exit code is 0 if all went well, 1 if something failed, 2 for a command that is refused
    because of its flags or their values, and 130 after Ctrl-C.

    Args:
        argv: the arguments; None for those of this process, which then belongs to the verb.
    """
    streams.prepare()
    if argv is None:
        sys.unraisablehook = _report_unless_interrupt
    try:
        code = _run(argv)
        failure = None
    except BaseException as error:
        code, failure = _judge(error)
    if argv is None:
        # The rest is bounded, and must not be cut.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    lost = streams.finish()
    if code == 0 and lost is not None:
        code, failure = _judge(lost)
    if failure is not None:
        log.logger.error("%s", failure)
        streams.finish()
    sys.exit(code)


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    # An installed torch_npu without CANN would make `import torch` fail, for other devices too.
    keep_torch_npu_out()
    run = print_environment if getattr(args, "print_env", False) else args.run
    log.set_up(args.log_level)
    try:
        Path.cwd()
    except OSError as error:  # MKL would end the process while torch is imported
        raise ConfigError(f"the current folder is gone: {error.strerror}; cd to another") from None
    code: int = run(args)
    return code


def _judge(error: BaseException) -> tuple[int, str | None]:
    """The exit code after `error`, and the message for the user, if any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return 130, None
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, SystemExit):  # of argparse, and of a node that has served
        return (error.code if isinstance(error.code, int) else EXIT_FAILED), None
    if isinstance(error, BrokenPipeError):  # the reader of stdout has seen enough
        return EXIT_FAILED, None
    if isinstance(error, EngineDeadError):  # may end in the traceback of a rank
        log.logger.debug("%s", error)
        first, *more = str(error).splitlines()
        return EXIT_FAILED, f"{first}; --log-level debug shows where" if more else first
    if isinstance(error, ConfigError | LayoutError | RequestError):
        return EXIT_REFUSED, str(error)
    if isinstance(error, MoespanError) or (isinstance(error, OSError) and error.strerror):
        return EXIT_FAILED, str(error)
    log.logger.debug("unexpected error", exc_info=error)
    reason = shortened(next(iter(str(error).splitlines()), ""), 200)
    kind = type(error).__name__
    what = f"{kind}: {reason}" if reason else kind
    return EXIT_FAILED, f"unexpected error: {what}; --log-level debug shows where"


def _report_unless_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Report an error that Python cannot raise, except Ctrl-C in code that cleans up."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


class _Parser(argparse.ArgumentParser):
    """Tells of a mistake in two lines; the usage of some verbs has fifty."""

    def error(self, message: str) -> NoReturn:
        """Exit as argparse does, without the whole usage."""
        usage = f"usage: {self.prog} ... ({self.prog} --help shows the rest)"
        self.exit(EXIT_REFUSED, f"{usage}\n{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
