"""Messages: their levels, their form, where they go, and in whose process."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from moespan import log
from moespan.config import EngineConfig, Layout, Nodes
from moespan.errors import ConfigError
from moespan.launch.agent_process import _environment, start_agent
from moespan.launch.job import Job
from tests.support import QUICKSTART

HOSTILE = r'logger.error("a \\x1b[2J\\rb\\u202e")'
RANK_0 = {"RANK": "0", "WORLD_SIZE": "4"}
RANK_3 = {"RANK": "3", "WORLD_SIZE": "4"}
EACH_LEVEL = (
    "for one in (logger.debug, logger.info, logger.warning, logger.error): one(one.__name__)"
)


def ran(
    code: str, environ: Mapping[str, str] = {}, arguments: tuple[str, ...] = ()
) -> tuple[str, str]:
    """stdout and stderr of a program of its own."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name
        not in ("RANK", "WORLD_SIZE", "MOESPAN_LOG", "MOESPAN_LOG_LEVEL", "MOESPAN_LOG_FORMAT")
    }
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **environ},
    )
    return done.stdout, done.stderr


def shown(code: str, environ: Mapping[str, str] = {}) -> list[str]:
    """Lines on stderr of a program that is one of ours."""
    out, err = ran(
        f"from moespan import log\nfrom moespan.log import logger\nlog.set_up()\n{code}", environ
    )
    assert out == ""
    return err.splitlines()


def of_library(code: str, environ: Mapping[str, str] = {}) -> list[str]:
    """Lines on stderr of a user's program, which has no rank of its own."""
    out, err = ran(f"import logging\n{code}", environ)
    assert out == ""
    return err.splitlines()


@pytest.fixture
def level_restored() -> Iterator[None]:
    """Restore the level afterwards."""
    before = log.logger.level
    yield
    log.logger.setLevel(before)


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        ("", ["info", "warning", "error"]),
        ("debug", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_decides_which_lines_are_shown(level: str, lines: list[str]) -> None:
    assert shown(EACH_LEVEL, {"MOESPAN_LOG_LEVEL": level}) == [f"moespan: {line}" for line in lines]


def test_the_level_of_the_command_line_wins() -> None:
    found = shown(f"log.set_up('error')\n{EACH_LEVEL}", {"MOESPAN_LOG_LEVEL": "debug"})
    assert found == ["moespan: error"]


def test_a_level_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="log level 'loud' is not known; use one of debug, info"):
        log.set_up("loud")
    first, *others = shown(EACH_LEVEL, {"MOESPAN_LOG_LEVEL": "loud"})
    assert first.startswith("moespan: MOESPAN_LOG_LEVEL='loud' is not a level, and is ignored")
    assert others == ["moespan: info", "moespan: warning", "moespan: error"]


def test_the_old_variable_works_and_its_new_name_is_shown_once() -> None:
    first, *others = shown(EACH_LEVEL, {"MOESPAN_LOG": "debug"})
    assert first == (
        "moespan: MOESPAN_LOG is now MOESPAN_LOG_LEVEL; the next release ignores the old name"
    )
    assert others[0] == "moespan: debug"
    both = {"MOESPAN_LOG": "debug", "MOESPAN_LOG_LEVEL": "error"}
    assert shown(EACH_LEVEL, both) == ["moespan: error"]
    assert shown("logger.info('x')", {"MOESPAN_LOG": "anything"}) == ["moespan: x"]


@pytest.mark.usefixtures("level_restored")
def test_processes_that_we_start_inherit_the_level() -> None:
    for level, inherited in ((logging.NOTSET, "info"), (logging.DEBUG, "debug"), (35, "error")):
        log.logger.setLevel(level)
        assert _environment()["MOESPAN_LOG_LEVEL"] == inherited
        assert ("TORCH_CPP_LOG_LEVEL" in _environment()) == (inherited != "debug")


@pytest.mark.parametrize(
    ("environ", "prefix"),
    [
        ({}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        (RANK_0, "rank 0: "),
        (RANK_3, "rank 3: "),
        ({**RANK_3, "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}, "rank 3: "),
        ({**RANK_3, "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}, "node 1, rank 3: "),
    ],
)
def test_a_line_names_rank_and_node_where_there_are_several(
    environ: dict[str, str], prefix: str
) -> None:
    assert shown("logger.info('100% done')", environ) == [f"moespan: {prefix}100% done"]


def test_once_is_once_and_rank_0_speaks_for_all() -> None:
    code = "for _ in range(2): log.once('slow'); log.once('mine', from_any_rank=True)"
    assert shown(code) == ["moespan: slow", "moespan: mine"]
    assert shown(code, RANK_0) == ["moespan: slow", "moespan: rank 0: mine"]
    assert shown(code, RANK_3) == ["moespan: rank 3: mine"]


def test_no_line_is_lost_when_the_process_ends_at_once() -> None:
    assert shown("import os\nlogger.info('last')\nos._exit(0)") == ["moespan: last"]


def test_a_program_of_ours_without_stderr_runs_on() -> None:
    assert shown("import sys\nsys.stderr = None\nlogger.error('x')") == []


def test_a_library_that_configures_logging_does_not_double_our_lines() -> None:
    assert shown("import logging\nlogging.basicConfig()\nlogger.info('x')") == ["moespan: x"]


# A user's program


def test_a_program_without_logging_sees_warnings() -> None:
    code = f"from moespan.log import logger, once\n{EACH_LEVEL}\nonce('slow')"
    assert of_library(code) == ["moespan: warning", "moespan: error", "moespan: slow"]
    found = of_library(code, {"MOESPAN_LOG_LEVEL": "debug"})
    assert found[:2] == ["moespan: debug", "moespan: info"]


@pytest.mark.parametrize("is_before", [True, False])
def test_logging_that_the_program_configures_is_respected(is_before: bool) -> None:
    lines = [
        "logging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s')",
        "from moespan.log import logger, once",
    ]
    code = "\n".join(lines if is_before else reversed(lines))
    assert of_library(f"{code}\nonce('slow')\nlogger.info('x')") == [
        "moespan WARNING slow",
        "moespan INFO x",
    ]


def test_a_program_may_silence_the_logger() -> None:
    code = (
        "from moespan.log import once\n"
        "logging.getLogger('moespan').addHandler(logging.NullHandler())\nonce('slow')"
    )
    assert of_library(code) == []


def test_the_root_logger_is_not_touched() -> None:
    code = (
        "root = logging.getLogger()\n"
        "before = vars(root).copy(), list(root.handlers)\n"
        "import moespan.front.llm, moespan.log\n"
        "moespan.log.once('slow')\n"
        "after = vars(root).copy(), list(root.handlers)\n"
        "for state in (before, after): state[0].pop('_cache')\n"
        "assert before == after\n"
        "logger = logging.getLogger('moespan')\n"
        "assert logger.propagate and logger.level == logging.NOTSET"
    )
    assert of_library(code) == ["moespan: slow"]


def test_it_needs_no_torch() -> None:
    assert of_library("import sys, moespan.log\nassert 'torch' not in sys.modules") == []


def test_ranks_name_themselves_and_inherit_the_level(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "rank.py"
    program.write_text(
        "from moespan.launch.rank import as_rank\n"
        "from moespan.log import logger, once\n"
        "def play(job, rank, _):\n"
        "    once('slow')\n"
        "    logger.debug('here')\n"
        "    if rank == 1: raise RuntimeError('broken')\n"
        "as_rank(play)\n"
    )
    monkeypatch.setattr(log.logger, "level", logging.DEBUG)
    job = Job.create(EngineConfig("fake", Layout(tp=2)), Nodes())
    assert start_agent(job, 2, [str(program)]).wait(120) == 1
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("moespan: ")]
    assert sorted(lines) == [
        "moespan: rank 0: here",
        "moespan: rank 1: failed",
        "moespan: rank 1: here",
        "moespan: slow",
    ]
    assert "RuntimeError: broken" in err


def test_control_characters_of_a_message_are_escaped():
    assert shown(HOSTILE) == [r"moespan: a \x1b[2J\rb\u202e"]


def test_what_a_library_writes_to_the_descriptor_is_no_answer() -> None:
    code = (
        "import os\n"
        "from moespan.cli import info, main\n"
        "info.run = lambda args: (os.write(1, b'from a library\\n'), print('answer'), 0)[2]\n"
        f"main(['info', {str(QUICKSTART)!r}])\n"
    )
    assert ran(code)[0] == "answer\n"


def test_what_ranks_print_is_no_answer(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text("import os; os.write(1, b'from a library\\n'); print('from Python')\n")
    code = (
        "from moespan.config import EngineConfig, Layout, Nodes\n"
        "from moespan.launch.job import Job\n"
        "from moespan.launch.agent_process import start_agent\n"
        f"config = EngineConfig({str(QUICKSTART)!r}, Layout(tp=2), dtype='float32')\n"
        "job = Job.create(config, Nodes())\n"
        f"assert start_agent(job, 2, [{str(rank)!r}]).wait(100) == 0\n"
        "print('answer')\n"
    )
    assert ran(code)[0] == "answer\n"


def test_a_closed_stdout_or_stderr_is_left_closed() -> None:
    for closed in (1, 2):
        ran(
            f"import os; from moespan import log; os.close({closed}); log.keep_stdout_for_answers()"
            "; os._exit(0)"
        )


@pytest.mark.parametrize(
    ("level", "expected"), [("info", "before after"), ("debug", "before no after")]
)
def test_what_is_muted_is_dropped_unless_the_level_is_debug(level: str, expected: str) -> None:
    code = (
        "import os; from moespan import log; log.set_up()\n"
        "for at in (1, 2): os.write(at, b'before ')\n"
        "with log.mute(1, 2): [os.write(at, b'no ') for at in (1, 2)]\n"
        "for at in (1, 2): os.write(at, b'after')\n"
    )
    assert ran(code, {"MOESPAN_LOG_LEVEL": level}) == (expected, expected)


JSON = {"MOESPAN_LOG_FORMAT": "json"}


def test_json_lines_hold_the_message_its_speaker_and_its_fields():
    code = r'logger.warning("two\nlines \x1b %d", 7, extra={"fields": {"request": "a\nb", "n": 2}})'
    (line,) = shown(code, {**JSON, **RANK_3, "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"})
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {
        "level": "warning",
        "message": "two\nlines \\x1b 7",
        "node": 1,
        "rank": 3,
        "request": "a\nb",
        "n": 2,
    }


def test_the_format_is_checked_and_given_to_children():
    assert log.variables()["MOESPAN_LOG_FORMAT"] == "text"
    with pytest.raises(ConfigError, match="log format 'xml' is not known; use one of text, json"):
        log.set_up(form="xml")
    code = "print(log.variables(), file=__import__('sys').stderr)"
    (line,) = shown(code, {**JSON, "MOESPAN_LOG_LEVEL": "warning"})
    assert line == "{'MOESPAN_LOG_LEVEL': 'warning', 'MOESPAN_LOG_FORMAT': 'json'}"
