"""`moespan chat`: a conversation in the terminal, with a local engine or with a server."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moespan.cli.flags import add_print_env_flag, add_settings_flags, given_fields, settings_of
from moespan.cli.sampling_flags import add_sampling_flags, sampling_of
from moespan.cli.show import EXIT_FAILED, check_writable, say, say_start
from moespan.cli.starting import serve_unless_first_node, start_llm
from moespan.errors import ConfigError, RequestError, printable, shown
from moespan.files import read_bytes
from moespan.front.api_key import API_KEY_VARIABLE

if TYPE_CHECKING:
    from moespan.front.conversation import Answerer, Conversation, Ending

SUMMARY = "talk with a model, here or on a server"


_MOST_KEY_BYTES = 4096
_LIKE_A_SERVER = re.compile(r"[\w.-]+:\d{1,5}(/v1)?/?")

# With an engine of this program: greedy, and as many tokens as the model's length leaves.
_DEFAULTS = {"temperature": 0.0, "max_tokens": None}

_HELP = """\
/reset          forget the conversation; the system message stays
/system TEXT    set the system message; without TEXT: remove it
/save FILE      write the conversation as JSON
/help           show these commands
/quit           end (Ctrl-D, too)
Ctrl-C stops an answer. Any other line is a question; "//..." asks "/..." """


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `chat`."""
    add_settings_flags(parser)
    add_print_env_flag(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", default="", help="system message")
    group.add_argument("--quiet", action="store_true", help="print only answers and errors")
    add_sampling_flags(parser, max_tokens=None, temperature=None)
    group = parser.add_argument_group("server (MODEL is http://HOST:PORT)")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="id of the model (the first of the server)"
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"the server's key ({API_KEY_VARIABLE})"
    )


def run(args: argparse.Namespace) -> int:
    """Talk with a model in the terminal. MODEL is a checkpoint, or the address of a server."""
    from moespan.front.conversation import Conversation

    if sys.stdin is None:
        raise ConfigError("chat reads standard input, which is closed; use a terminal")
    with _answerer(args) as answerer:
        if not args.quiet and sys.stdin.isatty():
            say("/help shows the commands")
        is_refused = _converse(Conversation(answerer, args.system), args.quiet)
    return EXIT_FAILED if is_refused and not sys.stdin.isatty() else 0


@contextlib.contextmanager
def _answerer(args: argparse.Namespace) -> Iterator[Answerer]:
    """The engine or server that MODEL names."""
    from moespan.engine.request import SamplingParams
    from moespan.front.conversation import EngineAnswerer
    from moespan.front.remote import ServerAnswerer

    params = sampling_of(args)
    if args.model.startswith(("http://", "https://")):
        _refuse_engine_flags(args)
        SamplingParams.from_dict(params)  # wrong values are refused before anything is sent
        yield ServerAnswerer(
            args.model, params, model=args.served_model_name, api_key=_api_key(args.api_key_file)
        )
        return
    if _LIKE_A_SERVER.fullmatch(args.model) and not Path(args.model).exists():
        raise ConfigError(f"MODEL={shown(args.model)}: did you mean http://{args.model}?")
    for name in ("served_model_name", "api_key_file"):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} goes with a server; MODEL={shown(args.model)} is none")
    settings = settings_of(args)
    serve_unless_first_node(settings)
    sampling = SamplingParams.from_dict({**_DEFAULTS, **params})
    with start_llm(settings) as llm:
        say_start(args, llm)
        yield EngineAnswerer(llm, sampling)


def _refuse_engine_flags(args: argparse.Namespace) -> None:
    given = given_fields(args).keys() - {"model"}
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise ConfigError(
            f"{flags}: of an engine, but MODEL={shown(args.model)} is a server, which has its own "
            "options; leave these flags out"
        )


def _api_key(path: Path | None) -> str | None:
    """The key in the file, or the value of the variable."""
    if path is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        key = read_bytes(path, _MOST_KEY_BYTES).decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        key = ""
    if not key.isprintable() or not key:
        raise ConfigError(f"--api-key-file {path} holds no key: one line of printable ASCII")
    return key


def _converse(conversation: Conversation, quiet: bool) -> bool:
    """Read lines until the end of stdin or `/quit`, and answer each; → whether one was refused."""
    is_refused = False
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and editing
    while (line := _next_line()) is not None:
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            if not _obey(conversation, line):
                break
        elif line and not _answer(conversation, line.removeprefix("/"), quiet):
            is_refused = True
    return is_refused


def _next_line() -> str | None:
    """The next line of stdin; None at its end. Ctrl-C at the prompt clears the line."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return None
        except UnicodeDecodeError:
            raise RequestError("stdin is not UTF-8 text; convert it") from None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()


def _obey(conversation: Conversation, line: str) -> bool:
    """Carry out a command; False for the one that ends the conversation."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest
    elif command == "/save" and rest:
        _save(conversation, Path(rest).expanduser())
    elif command == "/save":
        say("not saved: /save needs the name of a file, as in /save talk.json")
    elif command == "/help":
        say(_HELP)
    else:
        say(f"{shown(line)} is no command; /help shows them")
    return True


def _save(conversation: Conversation, path: Path) -> None:
    try:
        check_writable(path, "/save")
        conversation.save(path)
    except (ConfigError, OSError) as error:
        say(f"not saved: {error}")
    else:
        say(f"saved {len(conversation.messages)} messages to {path}")


def _answer(conversation: Conversation, question: str, quiet: bool) -> bool:
    """Print the answer as it comes; False if it is refused. Ctrl-C ends no more than the answer."""
    started = time.perf_counter()
    try:
        ending = conversation.ask(question, _print_piece)
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped")
        if not sys.stdin.isatty():
            raise
    except RequestError as error:
        say(f"{error}; /reset starts anew" if sys.stdin.isatty() else str(error))
        return False
    else:
        print(flush=True)
        if not quiet:
            say(_remark(ending, time.perf_counter() - started))
    return True


def _print_piece(piece: str) -> None:
    print(printable(piece), end="", flush=True)


def _remark(ending: Ending, seconds: float) -> str:
    cut = "; cut at the limit of tokens" if ending.finish_reason == "length" else ""
    rate = ending.num_tokens / max(seconds, 1e-9)
    return f"[{ending.num_tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s{cut}]"
