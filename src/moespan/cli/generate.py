"""`moespan generate`: prompts from the command line or from a JSONL file."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from moespan import log
from moespan.cli.flags import add_print_env_flag, add_settings_flags, settings_of
from moespan.cli.sampling_flags import add_sampling_flags, sampling_of
from moespan.cli.show import EXIT_FAILED, check_writable, print_text, say, say_speed, say_start
from moespan.cli.starting import serve_unless_first_node, start_llm
from moespan.errors import ConfigError, EngineDeadError, RequestError
from moespan.files import read_bytes
from moespan.front.settings import Settings

if TYPE_CHECKING:
    from moespan.engine.request import Request
    from moespan.front.batch import Answers
    from moespan.front.llm import LLM
    from moespan.front.outputs import RequestOutput

SUMMARY = "continue prompts"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    add_settings_flags(parser)
    add_print_env_flag(parser)
    # One of the two is required, except with --print-env.
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts"
    )
    prompts.add_argument(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='lines {"prompt": text or ids, "id": any, "params": {...}}; - is standard input',
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="one line for each answer, in the order in which they finish (default: stdout)",
    )
    parser.add_argument("--resume", action="store_true", help="skip ids that --output already has")
    parser.add_argument("--chat", action="store_true", help="treat each prompt as a user message")
    parser.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    parser.add_argument("--quiet", action="store_true", help="print only answers and errors")
    parser.add_argument(
        "--record-routing",
        type=Path,
        metavar="FILE.json",
        help="write how many tokens chose each expert, for plan --routing; turns on --expert-stats",
    )
    add_sampling_flags(parser, "defaults for lines that do not set them")
    group = parser.add_argument_group("outputs")
    form = parser.add_argument_group("form of the answers (needs the extra grammar)")
    form = form.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON of this schema")
    form.add_argument("--regex", metavar="REGEX", help="text that matches as a whole")
    form.add_argument("--choice", nargs="+", metavar="TEXT", help="one of these texts")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="a grammar in Lark or GBNF")
    group.add_argument("--logprobs", type=int, metavar="N", help="with --json or --input")
    group.add_argument("--prompt-logprobs", type=int, metavar="N", help="with --json or --input")
    group.add_argument("-n", type=int, metavar="N", help="continuations of each prompt (1)")


def run(args: argparse.Namespace) -> int:
    """Continue prompts from the command line or from a JSONL file."""
    from moespan.engine.request import SamplingParams

    settings = settings_of(args)
    if args.record_routing is not None:
        check_writable(args.record_routing, "--record-routing")
        settings = replace(settings, expert_stats=True)
    serve_unless_first_node(settings)
    if args.prompt is None and args.input is None:
        args.usage_error("one of the arguments --prompt --input is required")
    params = sampling_of(args, "logprobs", "prompt_logprobs", "n")
    if form := _form(args):
        params["structured_outputs"] = form
    sampling = SamplingParams.from_dict(params)
    if args.input is not None:
        return _answer_file(args, settings, params)
    if args.output is not None or args.resume:
        raise ConfigError("--output and --resume go with --input FILE.jsonl")
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise ConfigError("--logprobs and --prompt-logprobs go with --json or --input FILE.jsonl")
    return _answer_prompts(args, settings, sampling)


def _form(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `structured_outputs` that the flags name; empty without any."""
    from moespan.text.grammar import MAX_GRAMMAR_BYTES

    files = {"json": args.json_schema, "grammar": args.grammar}
    form = {"regex": args.regex, "choice": args.choice}
    for name, path in files.items():
        if path is not None:
            try:
                form[name] = read_bytes(path, MAX_GRAMMAR_BYTES).decode()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"{path} cannot be read: {reason}; give a file") from None
    return {name: value for name, value in form.items() if value is not None}


def _answer_prompts(args: argparse.Namespace, settings: Settings, sampling: Any) -> int:
    with start_llm(settings) as llm:
        say_start(args, llm)
        started = time.perf_counter()
        requests = list(_requests(args, llm, sampling))
        numbers = {request.id: number for number, (_, request) in enumerate(requests)}
        finished: dict[int, RequestOutput] = {}
        num_shown = num_tokens = num_failed = 0
        try:
            for output in llm.stream(requests):
                num_tokens += sum(len(one.token_ids) for one in output.outputs)
                num_failed += output.error is not None
                finished[numbers[output.request_id]] = output
                while num_shown in finished:  # in the order of the prompts
                    _show(args, num_shown, finished.pop(num_shown))
                    num_shown += 1
        except (KeyboardInterrupt, EngineDeadError):
            for number in sorted(finished):
                _show(args, number, finished[number])
            raise
        seconds = time.perf_counter() - started
        _record_routing(args, llm)
    say_speed(args, len(requests) - num_failed, num_tokens, seconds)
    return EXIT_FAILED if num_failed else 0


def _requests(
    args: argparse.Namespace, llm: LLM, sampling: Any
) -> Iterator[tuple[str | None, Request]]:
    for number, prompt in enumerate(args.prompt):
        try:
            message = {"role": "user", "content": prompt}
            yield llm.request(llm.chat_prompt([message]) if args.chat else prompt, sampling)
        except RequestError as error:
            raise RequestError(f"prompt {number}: {error}") from None


def _show(args: argparse.Namespace, number: int, output: RequestOutput) -> None:
    from moespan.front.batch import AnswerStream, answer

    if output.error is not None:
        log.logger.error("prompt %d: %s", number, output.error)
    elif args.json:
        AnswerStream(sys.stdout).write(answer(number, output))
    else:
        print_text(args.prompt[number], output)


def _answer_file(args: argparse.Namespace, settings: Settings, params: dict[str, Any]) -> int:
    from tqdm import tqdm

    from moespan.front.batch import run_batch

    def report_failure(message: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):  # the bar makes room for the line
            log.logger.error("%s", message)

    done = _answered_before(args)
    with (
        _input(args.input) as (lines, num_lines),
        start_llm(settings) as llm,
        _opened(args.output, len(done)) as output,
        tqdm(total=num_lines, unit="prompt", disable=args.quiet or None) as bar,
    ):
        say_start(args, llm)
        report = run_batch(
            llm,
            lines,
            output,
            params,
            name=str(args.input),
            chat=args.chat,
            done=done,
            report_failure=report_failure,
            advance=bar.update,
        )
        _record_routing(args, llm)
    if report.num_skipped and not args.quiet:
        say(f"{report.num_skipped} were answered before")
    say_speed(args, report.num_answered, report.num_output_tokens, report.seconds)
    if report.num_failed:
        log.logger.error("%d of %d lines failed", report.num_failed, report.num_lines)
    return EXIT_FAILED if report.num_failed else 0


def _record_routing(args: argparse.Namespace, llm: LLM) -> None:
    """Write what `--record-routing` asks for."""
    if args.record_routing is None:
        return
    from moespan.planner.expert_load import write_counts

    write_counts(args.record_routing, llm.expert_counts())


def _answered_before(args: argparse.Namespace) -> set[str]:
    """Ids that `--output` already holds; refuses files that cannot be read or written."""
    from moespan.front.batch import answered_ids

    if args.output is None:
        if args.resume:
            raise ConfigError("--resume needs --output FILE.jsonl, with the answers so far")
        return set()
    check_writable(args.output, "--output")
    if not args.output.exists():
        return set()
    if not args.resume:
        raise ConfigError(
            f"--output {args.output} exists; add --resume to answer only the missing ids, or "
            "give another file"
        )
    return answered_ids(args.output)


@contextlib.contextmanager
def _input(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The lines of a file, a pipe or standard input (`-`), and how many a file has.

    Raises:
        ConfigError: it is something else.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise ConfigError("--input - reads standard input, which is closed; give a file")
        yield sys.stdin.buffer, None
        return
    if path.is_fifo():
        with path.open("rb") as pipe:
            yield pipe, None
        return
    if not path.is_file():
        raise ConfigError(f"--input {path} is not a file, a pipe or -")
    with path.open("rb") as file:
        num_lines = sum(1 for line in file if line.strip())
        file.seek(0)
        yield file, num_lines


@contextlib.contextmanager
def _opened(path: Path | None, num_answers: int) -> Iterator[Answers]:
    from moespan.front.batch import AnswerFile, AnswerStream

    if path is None:
        yield AnswerStream(sys.stdout)
        return
    with contextlib.closing(AnswerFile(path, num_answers)) as file:
        yield file
