"""The command line keeps its spellings, says what it did, and answers wrong input in one line."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from moespan import LLM, SamplingParams, __version__
from moespan.checkpoint.presets import preset
from moespan.cli import _parser, main
from moespan.cli.flags import settings_of
from moespan.config import ModelConfig
from moespan.engine.client import LocalClient
from moespan.errors import EngineDeadError
from moespan.front.batch import AnswerFile
from moespan.front.settings import Settings
from moespan.planner.expert_load import Routing
from tests.support import DATA, QUICKSTART, altered_checkpoint, write_config

TINY = DATA / "oracle" / "tiny"
REFERENCE = TINY / "ref" / "ref_logits.safetensors"


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Cli = Callable[..., Ran]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs one command in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        assert isinstance(exit_.value.code, int)
        return Ran(exit_.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def sixteen_b(tmp_path: Path) -> Path:
    """A folder with the config of the 16B model, without weights."""
    folder = tmp_path / "16b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset("16b", {})))
    return folder


def parse(*arguments: str) -> argparse.Namespace:
    return _parser().parse_args(arguments)


# Spellings


SPELLINGS: list[tuple[str, tuple[str, ...], str, object]] = [
    ("tensor_parallel_size", ("-tp", "--tensor-parallel-size", "--tp-size", "--tp"), "4", 4),
    ("max_model_len", ("--max-model-len", "--context-length"), "99", 99),
    ("max_num_seqs", ("--max-num-seqs", "--max-running-requests"), "9", 9),
    ("max_num_batched_tokens", ("--max-num-batched-tokens", "--chunked-prefill-size"), "77", 77),
    ("block_size", ("--block-size", "--page-size"), "8", 8),
    ("num_blocks", ("--num-blocks", "--num-gpu-blocks-override"), "50", 50),
    *(("device", ("--device",), device, device) for device in ("auto", "npu", "cuda", "cpu")),
    *(
        ("dtype", ("--dtype",), dtype, dtype)
        for dtype in ("auto", "float32", "bfloat16", "float16")
    ),
    *(("load_format", ("--load-format",), form, form) for form in ("auto", "safetensors", "dummy")),
]
SAMPLING: list[tuple[str, tuple[str, ...], str, object]] = [
    ("max_tokens", ("--max-tokens", "--max-new-tokens"), "5", 5),
    ("min_tokens", ("--min-tokens",), "2", 2),
    ("temperature", ("--temperature",), "0.5", 0.5),
    ("top_p", ("--top-p",), "0.9", 0.9),
    ("top_k", ("--top-k",), "40", 40),
    ("min_p", ("--min-p",), "0.1", 0.1),
    ("seed", ("--seed",), "7", 7),
    ("repetition_penalty", ("--repetition-penalty",), "1.1", 1.1),
    ("presence_penalty", ("--presence-penalty",), "-0.5", -0.5),
    ("frequency_penalty", ("--frequency-penalty",), "0.5", 0.5),
    ("stop", ("--stop",), "x", ["x"]),
    ("stop_token_ids", ("--stop-token-ids",), "3", [3]),
    ("logprobs", ("--logprobs",), "2", 2),
    ("prompt_logprobs", ("--prompt-logprobs",), "0", 0),
    ("n", ("-n",), "2", 2),
]


def spelled(rows: list[tuple[str, tuple[str, ...], str, object]]) -> list[Any]:
    return [
        pytest.param(name, flag, value, meant, id=f"{flag}={value}")
        for name, flags, value, meant in rows
        for flag in flags
    ]


@pytest.mark.parametrize(("name", "flag", "value", "meant"), spelled(SPELLINGS + SAMPLING))
def test_generate_takes_every_spelling(name: str, flag: str, value: str, meant: object):
    for arguments in ([flag, value], [f"{flag}={value}"]):
        assert getattr(parse("generate", "M", "--prompt", "a", *arguments), name) == meant


@pytest.mark.parametrize(("name", "flag", "value", "meant"), spelled(SPELLINGS))
def test_verify_takes_every_spelling(name: str, flag: str, value: str, meant: object):
    assert getattr(parse("verify", "M", "--reference", "R", flag, value), name) == meant


NGRAM = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}'


@pytest.mark.parametrize("flags", [["--speculative-tokens", "4"], ["--speculative-config", NGRAM]])
def test_drafts_are_asked_for_in_two_forms(flags: list[str]):
    assert settings_of(parse("serve", "M", *flags)).speculative_tokens == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{bad", "'{bad' is not valid JSON"),
        ("4", 'only {"method": "ngram", ...} is known'),
        ('{"method": "eagle", "num_speculative_tokens": 4}', 'only {"method": "ngram", ...}'),
        ('{"method": "ngram"}', "num_speculative_tokens must be a number of tokens"),
        ('{"method": "ngram", "num_speculative_tokens": 4, "model": "m"}', "'model' is not known"),
        (
            '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 3}',
            "prompt_lookup_min=3 is refused: drafts follow the last 2 tokens",
        ),
    ],
)
def test_other_speculation_is_refused(cli: Cli, config: str, said: str):
    ran = cli("serve", "M", "--speculative-config", config)
    assert ran.code == 2 and said in ran.err


@pytest.mark.parametrize("flag", ["-tp", "--tensor-parallel-size", "--tp-size", "--tp"])
def test_info_takes_every_spelling(flag: str):
    assert parse("info", "M", flag, "2", "--json").tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("flags", "is_on"),
    [
        ([], True),
        (["--enable-prefix-caching"], True),
        (["--no-prefix-caching"], False),
        (["--no-enable-prefix-caching"], False),
        (["--disable-radix-cache"], False),
    ],
)
def test_the_prefix_cache_is_on_by_default(flags: list[str], is_on: bool):
    args = parse("generate", "M", "--prompt", "a", *flags)
    assert settings_of(args).enable_prefix_caching is is_on


def test_every_sampling_flag_names_a_parameter_of_the_engine():
    flags = {name for name, *_ in SAMPLING} | {"ignore_eos"}
    assert flags <= {*SamplingParams.__struct_fields__}


@pytest.mark.parametrize("verb", ["generate", "verify", "info"])
def test_remote_code_is_refused_with_the_reason(cli: Cli, verb: str):
    more = {"generate": ["--prompt", "a"], "verify": ["--reference", "R"], "info": []}[verb]
    ran = cli(verb, "--trust-remote-code", QUICKSTART, *more)
    assert ran.code == 2
    assert "--trust-remote-code is refused: the model is built in" in ran.err
    assert "code that comes with a checkpoint is never run" in ran.err


def test_abbreviated_flags_are_refused(cli: Cli):
    ran = cli("generate", QUICKSTART, "--prompt", "a", "--max-tok", 3)
    assert ran.code == 2
    assert "unrecognized arguments: --max-tok" in ran.err


@pytest.mark.parametrize(
    "verb", [[], ["generate"], ["verify"], ["info"], ["bench"], ["make-checkpoint"]]
)
def test_help_is_shown(cli: Cli, verb: list[str]):
    ran = cli(*verb, "--help")
    assert ran.code == 0
    assert ran.out.startswith("usage: moespan")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["--version"], ["info", str(QUICKSTART)]]
)
def test_verbs_that_only_print_import_no_torch(arguments: list[str]):
    code = (
        "import sys, moespan.cli\n"
        "try:\n    moespan.cli.main(sys.argv[1:])\n"
        "except SystemExit as exit_:\n    assert exit_.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


# generate


def test_generate_prints_each_prompt_with_its_text_and_says_where_it_ran(cli: Cli):
    ran = cli("generate", QUICKSTART, "--device", "cpu", "--prompt", "347+85=", "12+30=")
    assert ran.code == 0
    assert ran.out == "\n347+85=\n→ 432\n\n12+30=\n→ 42\n"
    start, runs_on, weights, cache, speed = ran.err.splitlines()
    assert start == f"model    {QUICKSTART}"
    assert runs_on.startswith("runs on  cpu, bfloat16, tp=1")
    assert "MB of bfloat16 per rank, loaded in" in weights
    assert "tokens in blocks of 32" in cache
    assert speed.startswith("2 answered, 7 tokens in ")


def test_quiet_leaves_only_answers(cli: Cli):
    ran = cli("generate", QUICKSTART, "--quiet", "--prompt", "12+30=")
    assert ran == Ran(0, "\n12+30=\n→ 42\n", "")


def test_prompts_may_be_given_one_flag_each(cli: Cli):
    ran = cli("generate", QUICKSTART, "--quiet", "--prompt", "1+1=", "--prompt", "2+2=", "3+3=")
    assert ran.out.count("→") == 3
    flags = ["--stop", "a", "--stop", "b", "c", "--stop-token-ids", "1", "--stop-token-ids", "2"]
    args = parse("generate", "M", "--prompt", "a", *flags)
    assert (args.stop, args.stop_token_ids) == (["a", "b", "c"], [1, 2])


def test_json_is_one_line_for_each_prompt(cli: Cli):
    arguments = ["--json", "--quiet", "--logprobs", 0, "-n", 2, "--prompt", "347+85=", "12+30="]
    ran = cli("generate", QUICKSTART, *arguments)
    assert [record["id"] for record in ran.records] == [0, 1]
    assert [record["text"] for record in ran.records] == ["432", "42"]
    assert [len(record["outputs"]) for record in ran.records] == [2, 2]
    assert [len(record["logprobs"]) for record in ran.records] == [4, 3]


def test_answers_have_the_form_that_a_flag_names(cli: Cli, tmp_path: Path):
    (tmp_path / "schema").write_text('{"const": 7}')
    (tmp_path / "grammar").write_text('root ::= "1" [0-9] "!"')
    for flag, value, text in (
        ("--regex", "[0-9]{2}", "14"),
        ("--json-schema", tmp_path / "schema", "7"),
        ("--grammar", tmp_path / "grammar", "14!"),
        ("--choice", "1416", "1416"),
    ):
        ran = cli("generate", QUICKSTART, "--json", "--quiet", "--prompt", "681+734=", flag, value)
        assert [record["text"] for record in ran.records] == [text], flag
    ran = cli("generate", QUICKSTART, "--prompt", "a", "--grammar", tmp_path / "missing")
    assert ran.code == 2 and "missing cannot be read" in ran.err


def test_chat_puts_prompts_through_the_template(cli: Cli):
    ran = cli("generate", QUICKSTART, "--chat", "--json", "--quiet", "--prompt", "12+30=")
    (record,) = ran.records
    assert (record["text"], record["num_prompt_tokens"]) == (" 42", 14)


def test_sampling_flags_reach_the_engine(cli: Cli):
    def texts(*flags: object) -> list[str]:
        prompts = ["--prompt", "Story: Mia, fox, lake.", "347+85="]
        ran = cli("generate", QUICKSTART, "--json", "--quiet", *flags, *prompts)
        assert ran.code == 0
        return [record["text"] for record in ran.records]

    warm = ["--temperature", 2, "--max-tokens", 20]
    assert texts(*warm, "--seed", 5) == texts(*warm, "--seed", 5)
    assert texts(*warm, "--seed", 5) != texts(*warm, "--seed", 6)
    assert texts(*warm, "--top-k", 1) == texts("--max-tokens", 20)
    assert texts("--max-tokens", 2)[1] == "43"
    assert texts("--stop", "2", "the")[1] == "43"
    assert texts("--ignore-eos", "--max-tokens", 8)[1] != "432"


def test_the_seed_of_sampling_is_not_that_of_dummy_weights(cli: Cli, tmp_path: Path):
    folder = write_config(tmp_path / "small")
    input_path = tmp_path / "input.jsonl"
    input_path.write_text('{"prompt": [3, 1, 4]}\n')
    arguments = ["--load-format", "dummy", "--quiet", "--ignore-eos", "--input", input_path]
    first, second = (cli("generate", folder, *arguments, "--seed", seed) for seed in (1, 2))
    assert first.code == 0
    assert first == second


@pytest.mark.parametrize("how", ["pipe", "standard input"])
def test_prompts_come_through_pipes(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    lines = b'{"prompt": [3, 1, 4]}\n\nno JSON\n{"prompt": [3]}\n'
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if how == "standard input":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        pipe = Path("-")
    else:
        threading.Thread(target=pipe.write_bytes, args=[lines]).start()
    ran = cli("generate", TINY, "--quiet", "--max-tokens", 2, "--input", pipe)
    assert [record["id"] for record in ran.records] == [1, 4]
    assert ran.code == 1
    assert f"{pipe}:3: not JSON" in ran.err
    assert "1 of 3 lines failed" in ran.err


@pytest.mark.parametrize("words", [("generate", "--input", "-"), ("chat",)])
def test_a_closed_standard_input_is_named(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    monkeypatch.setattr(sys, "stdin", None)
    ran = cli(words[0], QUICKSTART, *words[1:], "--quiet")
    assert ran.code == 2
    assert "standard input, which is closed" in ran.err


def test_without_a_tokenizer_token_ids_are_printed(cli: Cli, tmp_path: Path):
    input_path = tmp_path / "input.jsonl"
    input_path.write_text('{"prompt": [3, 1, 4]}\n')
    ran = cli("generate", TINY, "--quiet", "--max-tokens", 3, "--input", input_path)
    assert ran.code == 0
    assert len(ran.records[0]["token_ids"]) == 3
    ran = cli("generate", TINY, "--quiet", "--prompt", "text")
    assert ran.code == 2
    assert ran.err.startswith("moespan: prompt 0: the prompt is text, and this checkpoint has no")


def test_a_prompt_that_fails_is_named_and_the_others_are_printed(cli: Cli, tmp_path: Path):
    def spoil(embedding: torch.Tensor) -> None:
        embedding[330] = torch.nan  # "Story"

    name = "model.embed_tokens.weight"
    folder = altered_checkpoint(QUICKSTART, tmp_path / "bad", name, spoil)
    ran = cli("generate", folder, "--quiet", "--prompt", "12+30=", "Story: Mia", "347+85=")
    assert ran.code == 1
    assert ran.out == "\n12+30=\n→ 42\n\n347+85=\n→ 432\n"
    assert ran.err.startswith("moespan: prompt 1: the logits at position")


def test_a_file_is_answered_and_resumed(cli: Cli, tmp_path: Path):
    input_path, output = tmp_path / "input.jsonl", tmp_path / "output.jsonl"
    lines = [json.dumps({"prompt": f"{n}+1=", "id": n}) for n in range(2, 7)]
    input_path.write_text("\n".join([*lines[:2], "{", *lines[2:]]) + "\n")
    arguments = ["generate", QUICKSTART, "--input", input_path, "--output", output]

    ran = cli(*arguments)
    assert (ran.code, ran.out) == (1, "")
    assert f"moespan: {input_path}:3: not JSON" in ran.err
    assert ran.err.splitlines()[-2].startswith("5 answered, ")
    assert ran.err.splitlines()[-1] == "moespan: 1 of 6 lines failed"
    answers = {
        record["id"]: record["text"] for record in map(json.loads, output.read_text().splitlines())
    }
    assert answers == {n: str(n + 1) for n in range(2, 7)}

    whole = output.read_text()
    ran = cli(*arguments)
    assert ran.code == 2
    assert "exists; add --resume to answer only the missing ids" in ran.err
    assert output.read_text() == whole

    input_path.write_text("\n".join(lines) + "\n")
    output.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"id": 6, "te')
    ran = cli(*arguments, "--resume")
    assert ran.code == 0
    assert "3 were answered before" in ran.err
    assert len(output.read_text().splitlines()) == 5
    ran = cli(*arguments, "--resume", "--quiet")
    assert ran == Ran(0, "", "")
    found = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert sorted(found) == [*range(2, 7)]


def test_recorded_routing_is_what_the_plan_takes(cli: Cli, tmp_path: Path):
    path = tmp_path / "counts.json"
    arguments = ["generate", QUICKSTART, "--quiet", "--ignore-eos", "--max-tokens", 3]
    arguments += ["--record-routing", path]
    assert cli(*arguments, "--prompt", "347+85=", "1+1=").code == 0
    config = ModelConfig.from_pretrained(QUICKSTART)
    counts = {int(layer): row for layer, row in json.loads(path.read_text())["counts"].items()}
    assert {sum(row) for row in counts.values()} == {(8 + 5 + 4) * config.num_experts_per_tok}
    assert Routing.read(str(path), config).counts == counts

    input_path = tmp_path / "input.jsonl"
    input_path.write_text('{"prompt": "347+85="}\n{"prompt": "1+1="}\n')
    path.unlink()
    assert cli(*arguments, "--input", input_path).code == 0
    assert {
        int(layer): row for layer, row in json.loads(path.read_text())["counts"].items()
    } == counts
    ran = cli("generate", QUICKSTART, "--record-routing", tmp_path, "--prompt", "a")
    assert (ran.code, "--record-routing" in ran.err) == (2, True)


def test_experts_are_placed_by_their_counts(cli: Cli, tmp_path: Path):
    counts, placement, page = (tmp_path / name for name in ("c.json", "p.json", "heat.html"))
    rows = {layer: [90, 80, 70, 60, 50, 40, 30, 20, *[1] * 8] for layer in (1, 2, 3)}
    counts.write_text(json.dumps({"counts": rows}))
    arguments = ["experts", QUICKSTART, "--counts", counts, "-ep", 2, "-dp", 2]
    ran = cli(*arguments, "--out", placement, "--html", page, "--hardware", "zen4-2")
    assert ran.code == 0
    assert "    1   1.964   1.000" in ran.out.splitlines()
    now, then = re.findall(r"([0-9.]+) ms (?:now|placed)", ran.out)
    assert float(then) < float(now)
    assert page.read_text().count("<rect") == 3 * 16
    config = Settings(
        str(QUICKSTART),
        data_parallel_size=2,
        expert_parallel_size=2,
        expert_placement=str(placement),
    ).resolve(to_run=False)[1]
    assert isinstance(config.expert_placement, dict)
    assert [len(held) for held in config.expert_placement["2"]] == [8, 8]
    for copies, said in ((1, "0 of 6 allowed; the others"), (2, "12 of 12 allowed\n")):
        assert f"copies of experts: {said}" in cli(*arguments, "--copies", copies).out
    for more, said in (
        (["-ep", 1], "ep=1"),
        (["--copies", 9], "--copies 9"),
        (["--counts", "uniform"], "uniform is no file of expert counts: No such file"),
        (["--counts", QUICKSTART / "config.json"], 'must be like {"counts": '),
        (["--counts", page], "it is not JSON"),
        (["--plot", tmp_path / "heat.gif"], ".png or .svg"),
    ):
        refused = cli(*arguments, *more)
        assert (refused.code, said in refused.err) == (2, True)


def test_answers_of_a_file_go_to_stdout_without_an_output(cli: Cli, tmp_path: Path):
    input_path = tmp_path / "input.jsonl"
    input_path.write_text('{"prompt": "347+85="}\n\n{"prompt": "12+30=", "id": "two"}\n')
    ran = cli("generate", QUICKSTART, "--quiet", "--input", input_path)
    assert {record["id"]: record["text"] for record in ran.records} == {1: "432", "two": "42"}
    assert ran.err == ""


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.rename(path.parent / "old")])
def test_an_output_that_is_taken_away_in_mid_run_is_an_error(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
):
    input_path, output = tmp_path / "input.jsonl", tmp_path / "output.jsonl"
    input_path.write_text("".join(f'{{"prompt": "{n}+1="}}\n' for n in range(9)))
    write = AnswerFile.write

    def write_and_take_away(self: AnswerFile, record: dict[str, Any]) -> None:
        write(self, record)
        if record["id"] == 5:
            change(output)

    monkeypatch.setattr(AnswerFile, "write", write_and_take_away)
    ran = cli("generate", QUICKSTART, "--quiet", "--input", input_path, "--output", output)
    assert ran.code == 1
    assert f"moespan: {output} was removed or renamed while answers were written" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_terminal_that_cannot_show_a_character_loses_no_answer(tmp_path: Path, encoding: str):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    input_path = tmp_path / "input.jsonl"
    input_path.write_text('{"prompt": "347+85=", "id": "é🐱"}\n{"prompt": "12+30="}\n')
    command = [sys.executable, "-m", "moespan", "generate", str(QUICKSTART), "--quiet"]
    for more in (["--prompt", "🐱", "12+30="], ["--input", str(input_path)]):
        ran = subprocess.run([*command, *more], env=environment, capture_output=True)
        assert (ran.returncode, ran.stderr) == (0, b"")
        out = ran.stdout.decode(encoding)
        if more[0] == "--prompt":
            assert "\\U0001f431\n" in out
            assert out.endswith(" 42\n")
        else:
            found = {record["id"]: record["text"] for record in map(json.loads, out.splitlines())}
            assert found == {"é🐱": "432", 2: "42"}


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (EngineDeadError("rank 1 was killed by SIGKILL"), 1, "moespan: rank 1 was killed"),
        (
            EngineDeadError("rank 1 failed with X: y\nTraceback ..."),
            1,
            "moespan: rank 1 failed with",
        ),
        (
            ZeroDivisionError("a bug"),
            1,
            "moespan: unexpected error: ZeroDivisionError: a bug; --log",
        ),
        (MemoryError(), 1, "moespan: unexpected error: MemoryError; --log-level debug shows"),
        (OSError(28, "No space left on device"), 1, "moespan: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_cause_of_a_failed_run_is_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(LocalClient, "receive", fail)
    ran = cli("generate", QUICKSTART, "--quiet", "--prompt", "1+1=")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(says)
    assert ran.err.count("\n") == (1 if says else 0)


def test_a_small_step_lowers_the_default_number_of_sequences(cli: Cli):
    arguments = ["--quiet", "--max-num-batched-tokens", 3, "--prompt", "1+1=", "2+2="]
    assert cli("generate", QUICKSTART, *arguments).out == "\n1+1=\n→ 2\n\n2+2=\n→ 4\n"


@pytest.mark.slow
def test_two_ranks_answer_like_one():
    command = [sys.executable, "-m", "moespan", "generate", str(QUICKSTART), "--device", "cpu"]
    more = ["--dtype", "float32", "--json", "-tp", "2", "--prompt", "347+85=", "sort 42 7 93:"]
    ran = subprocess.run([*command, *more], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [record["text"] for record in records] == ["432", " 7 42 93"]
    assert "tp=2" in ran.stderr


def test_a_closed_stdout_ends_a_run_without_noise():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "moespan", "info", str(QUICKSTART)]
    ran = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (ran.returncode, ran.stderr) == (1, b"")


def test_the_version_is_printed():
    command = [sys.executable, "-m", "moespan", "--version"]
    assert subprocess.check_output(command, text=True) == f"moespan {__version__}\n"


# verify


def test_verify_passes_with_exit_code_0(cli: Cli):
    ran = cli("verify", TINY, "--reference", REFERENCE, "--dtype", "float32")
    assert (ran.code, ran.err) == (0, "")
    header, *prompts = ran.out.splitlines()[:6]
    assert header.split("  ")[0] == "prompt"
    assert [line.split()[:2] for line in prompts] == [
        ["p0", "1"], ["p1", "7"], ["p2", "32"], ["p3", "100"], ["p4", "181"],
    ]  # fmt: skip
    assert all(line.endswith("equal") for line in prompts)
    assert "(limit 2.0e-04)" in ran.out
    assert ran.out.endswith("passed\n")


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "int4"])
def test_verify_without_a_file_compares_with_the_checkpoint_of_floats(
    cli: Cli, tmp_path: Path, scheme: str
):
    assert cli("quantize", TINY, tmp_path / "out", "--quantization", scheme).code == 0
    same = ("--dtype", "float32", "--max-tokens", 2, "--json")
    stored = cli("verify", tmp_path / "out", "--against", TINY, *same)
    made = cli("verify", TINY, "--quantization", scheme, *same)
    assert (stored.code, stored.records) == (made.code, made.records)
    report = json.loads(made.out)
    assert report["passed"] and made.code == 0
    assert (report["quantization"], report["kv_cache_dtype"]) == (scheme, "float32")
    assert 0 < report["mean_kl"] < report["max_kl"]


def test_verify_of_rows_that_are_independent_makes_its_reference_without_that(cli: Cli):
    """Its reference is float32, which does not take the option."""
    ran = cli("verify", TINY, "--batch-invariant", "--dtype", "bfloat16", "--max-tokens", 2)
    assert ran.code == 0, ran.err


def test_verify_fails_with_exit_code_1_and_the_reason(cli: Cli, tmp_path: Path):
    name = "model.layers.1.mlp.gate.weight"
    folder = altered_checkpoint(TINY, tmp_path / "bad", name, lambda weight: weight.neg_())
    ran = cli("verify", folder, "--reference", REFERENCE, "--dtype", "float32")
    assert ran.code == 1
    assert "FAILED: max |Δ| is" in ran.out
    assert "greedy token" in ran.out
    assert "passed" not in ran.out
    ran = cli("verify", folder, "--reference", REFERENCE, "--dtype", "float32", "--json")
    assert ran.code == 1
    (report,) = ran.records
    assert report["passed"] is False
    assert len(report["prompts"]) == 5


def test_verify_prints_its_report_as_json(cli: Cli):
    ran = cli("verify", TINY, "--reference", REFERENCE, "--dtype", "bfloat16", "--json")
    assert ran.code == 0
    (report,) = ran.records
    assert (report["passed"], report["failures"], report["dtype"]) == (True, [], "bfloat16")
    assert 0 < report["mean_kl"] < report["tolerance"]["kl"]


def test_a_reference_is_written_and_passes(cli: Cli, tmp_path: Path):
    made = tmp_path / "made.safetensors"
    ran = cli("verify", TINY, "--reference", made, "--write-reference", "--max-tokens", 5)
    assert (ran.code, ran.out) == (0, f"wrote {made}: 4 prompts, float32, one rank\n")
    with safe_open(str(made), "numpy") as file:
        assert file.get_slice("p3.logits").get_shape() == [100, 512]
        assert file.get_slice("p3.greedy").get_shape() == [5]
    assert cli("verify", TINY, "--reference", made, "--dtype", "float32").code == 0
    ran = cli("verify", TINY, "--reference", made, "--write-reference")
    assert ran.code == 2
    assert "exists; give a new file to write" in ran.err


def test_a_reference_is_written_for_given_prompts(cli: Cli, tmp_path: Path):
    made = tmp_path / "made.safetensors"
    arguments = ["--reference", made, "--write-reference", "--prompt", "1+1=", "--prompt", "2+2="]
    assert cli("verify", QUICKSTART, *arguments).code == 0
    assert cli("verify", QUICKSTART, "--reference", made, "--dtype", "float32").code == 0
    with LLM(str(QUICKSTART), device="cpu") as llm, safe_open(str(made), "numpy") as file:
        assert llm.tokenizer is not None
        assert file.get_tensor("p1.ids").tolist() == llm.tokenizer.encode("2+2=")


# info


def test_info_on_the_16b_model(cli: Cli, sixteen_b: Path):
    ran = cli("info", sixteen_b)
    assert (ran.code, ran.err) == (0, "")
    facts = dict(line.split("  ", 1) for line in ran.out.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["parameters"] == "16.376 B total, 2.83 B active for one token"
    assert facts["weights"] == (
        "65.50 GB float32, 32.75 GB bfloat16, 32.75 GB float16, 16.63 GB int8, 16.63 GB w8a8, "
        "16.84 GB fp8, 9.62 GB int4"
    )
    assert facts["KV cache per token"] == (
        "448 KiB float32, 224 KiB bfloat16, 224 KiB float16, 115.5 KiB int8"
    )
    assert facts["attention"] == "16 heads × 128, 16 KV heads"
    assert facts["experts"] == "64 routed, top 6, 2 shared, width 1408, in 27 layers"
    assert "32.76 GB of bfloat16 weights, 224 KiB of bfloat16 KV cache per token" in ran.out


@pytest.mark.parametrize("tp", [1, 8])
def test_info_counts_the_bytes_of_every_rank(cli: Cli, sixteen_b: Path, tp: int):
    (facts,) = cli("info", sixteen_b, "-tp", tp, "--json").records
    assert facts["parameters"] == 16_375_728_128
    assert facts["active_parameters"] == pytest.approx(2.83e9, rel=2e-3)
    assert facts["bytes"]["bfloat16"] == 2 * 16_375_728_128
    assert facts["kv_bytes_per_token"]["bfloat16"] == 224 * 1024
    # Norms and routers are on every rank, routers in float32; all else is split.
    norms, routers = (2 * 28 + 1) * 2048, 27 * 64 * 2048
    split = 16_375_728_128 - norms - routers
    assert facts["weight_bytes_per_rank"] == [2 * split // tp + 2 * norms + 4 * routers] * tp


def test_info_says_what_a_rank_holds(cli: Cli, sixteen_b: Path):
    ran = cli("info", sixteen_b, "-tp", 8, "--dtype", "float16")
    assert "4.11 GB of float16 weights, 28 KiB of float16 KV cache per token" in ran.out
    ran = cli("info", sixteen_b, "-tp", 8, "--quantization", "int8", "--kv-cache-dtype", "int8")
    assert "2.10 GB of int8 weights, 14.4375 KiB of int8 KV cache per token" in ran.out


def test_info_leaves_out_schemes_that_the_model_cannot_have(cli: Cli, sixteen_b: Path):
    config = json.loads((sixteen_b / "config.json").read_text())
    (sixteen_b / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 1400}))
    ran = cli("info", sixteen_b)
    assert "fp8" in ran.out and "int4" not in ran.out
    ran = cli("info", sixteen_b, "--quantization", "int4")
    assert ran.code == 2
    assert "groups of 32, and moe_intermediate_size=1400 is no multiple of it; use int8" in ran.err


def test_info_scales_its_units_to_small_models(cli: Cli):
    ran = cli("info", QUICKSTART)
    assert "1.875 M total, 990.34 K active for one token" in ran.out
    assert "7.50 MB float32, 3.75 MB bfloat16" in ran.out


def test_info_on_a_dense_model(cli: Cli, tmp_path: Path):
    ran = cli("info", write_config(tmp_path / "dense", n_routed_experts=None))
    assert ran.code == 0
    assert "experts             none" in ran.out


# make-checkpoint


def test_a_checkpoint_is_made_with_the_keys_that_are_set(cli: Cli, tmp_path: Path):
    folder = tmp_path / "made"
    settings = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "norm_topk_prob": True,
        "torch_dtype": "float32",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    flags = [
        part
        for key, value in settings.items()
        for part in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    ran = cli("make-checkpoint", folder, "--preset", "tiny", *flags, "--seed", 3)
    assert (ran.code, ran.out) == (0, "")
    assert f"wrote {folder}: " in ran.err
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in settings} == settings
    with LLM(str(folder), device="cpu", check_finite=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        written = llm.generate([5, 6], params)[0].outputs
    with LLM(str(folder), device="cpu", load_format="dummy", seed=3) as llm:
        assert llm.generate([5, 6], params)[0].outputs == written
    ran = cli("make-checkpoint", folder)
    assert ran.code == 2
    assert "already holds a checkpoint; choose another folder" in ran.err


# Wrong input


WRONG_COMMANDS: list[tuple[list[object], str]] = [
    ([], "the following arguments are required: VERB"),
    (["serenade"], "invalid choice: 'serenade'"),
    (["generate"], "the following arguments are required: MODEL"),
    (["generate", QUICKSTART], "one of the arguments --prompt --input is required"),
    (["generate", QUICKSTART, "--prompt", "a", "--input", "b"], "not allowed with argument"),
    (["generate", QUICKSTART, "--prompt"], "expected at least one argument"),
    (["generate", QUICKSTART, "--prompt", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["generate", QUICKSTART, "--prompt", "a", "-tp", "two"], "invalid int value: 'two'"),
    (["generate", QUICKSTART, "--prompt", "a", "--warp", "9"], "unrecognized arguments: --warp"),
    (["verify", QUICKSTART, "--write-reference"], "--write-reference needs --reference"),
    (["info"], "the following arguments are required: MODEL"),
    (["make-checkpoint"], "the following arguments are required: DIR"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG_COMMANDS)
def test_a_wrong_command_is_told_in_two_lines(cli: Cli, arguments: list[object], says: str):
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    usage, fault = ran.err.splitlines()
    assert usage.startswith("usage: moespan") and "--help" in usage
    assert says in fault


SUM = ["--prompt", "1+1="]
WRONG_INPUT: list[tuple[str, str]] = [
    # generate
    ("generate /no/such/folder {sum}", "/no/such/folder does not exist; give a checkpoint folder"),
    ("generate {tmp} {sum}", "config.json does not exist; is {tmp} a checkpoint folder?"),
    ("generate {file} {sum}", "{file} is a file; give the checkpoint's folder"),
    ("generate {llama} {sum}", "model_type='llama' is not implemented; only 'deepseek' is"),
    ("generate {no_json} {sum}", "config.json cannot be read as JSON"),
    ("generate {deep} {sum}", "config.json cannot be read as JSON"),
    (
        "generate {quick} {sum} -tp 3",
        "tp=3 does not divide num_attention_heads=8; use tp=1, 2, 4, 8",
    ),
    ("generate {quick} {sum} -tp 0", "tp=0 must be at least 1"),
    ("generate {quick} {sum} -tp -2", "tp=-2 must be at least 1"),
    (
        "generate {quick} {sum} --temperature -1",
        "temperature=-1.0 must be a finite number of at least 0",
    ),
    ("generate {quick} {sum} --temperature nan", "temperature=nan must be a finite number"),
    (
        "generate {quick} {sum} --max-tokens -1",
        "max_tokens=-1 must be an integer within 0..2**31-1",
    ),
    ("generate {quick} {sum} --top-p 2", "top_p=2.0 must be a number above 0 and at most 1"),
    ("generate {quick} {sum} -n 0", "n=0 must be an integer within 1..128"),
    ("generate {quick} {sum} --seed -1", "seed=-1 must be an integer within"),
    ("generate {quick} {sum} --max-model-len 0", "max_model_len=0 must be at least 1"),
    ("generate {quick} {sum} --context-length 513", "exceeds the model's max_position_embeddings"),
    ("generate {quick} {sum} --max-num-seqs 0", "max_num_seqs=0 must be at least 1"),
    ("generate {quick} {sum} --max-num-batched-tokens 0", "max_num_batched_tokens=0 must be"),
    (
        "generate {quick} {sum} --max-num-seqs 9 --max-num-batched-tokens 8",
        "max_num_seqs=9 exceeds max_num_batched_tokens=8",
    ),
    ("generate {quick} {sum} --block-size 0", "block_size=0 must be at least 1"),
    ("generate {quick} {sum} --num-blocks 3", "num_blocks=3 of 32 tokens cannot hold one"),
    ("generate {quick} --prompt 1+1= {long}", "prompt 1: the prompt has"),
    ("generate {quick} {sum} --output {tmp}/o", "--output and --resume go with --input"),
    ("generate {quick} {sum} --logprobs 3", "--logprobs and --prompt-logprobs go with --json"),
    ("generate {quick} --input {tmp}/none --output /proc/x", "/proc cannot be written; give a"),
    ("quantize {quick} /proc/x", "/proc cannot be written: "),
    ("calibrate --preset tiny --out /proc/x", "/proc cannot be written; give a file elsewhere"),
    ("generate {quick} {sum} --resume", "--output and --resume go with --input"),
    ("generate {quick} --input {tmp}/none", "--input {tmp}/none is not a file, a pipe or -"),
    ("generate {quick} --input {tmp}", "--input {tmp} is not a file, a pipe or -"),
    ("generate {quick} --input {file} --resume", "--resume needs --output FILE.jsonl"),
    ("generate {quick} --input {file} --output {tmp}", "--output {tmp} is a folder; give a file"),
    ("generate {quick} --input {file} --output {tmp}/no/o", "there is no folder {tmp}/no"),
    (
        "generate {quick} --input {file} --output {file} --resume",
        "{file}:1 is not an answer of an earlier run; give another --output",
    ),
    ("generate {cut} {sum}", "is not a whole checkpoint of the model in its config.json"),
    ("generate {tiny} --chat {sum}", "prompt 0: chat needs a tokenizer"),
    # verify
    ("verify {quick} --reference {tmp}/none", "reference {tmp}/none cannot be read"),
    ("verify {quick} --reference {file}", "reference {file} cannot be read"),
    ("verify {small} --load-format dummy --reference {ref}", "p0: prompt_token_ids: token id"),
    ("verify {quick} --reference {ref} --prompt a", "or add --write-reference"),
    ("verify {quick} --reference {ref} --max-tokens 4", "or add --write-reference"),
    ("verify {quick} --reference {ref} --against {quick}", "or add --write-reference"),
    ("verify {quick} --trace", "--trace needs --reference"),
    ("verify {quick} --all-layouts 2 -tp 2", "leave -tp, -ep, -pp, -sp and -dp out"),
    ("verify {quick} --nnodes 2", "on many nodes verify needs --reference"),
    ("quantize {quick} {tmp}", "{tmp} exists; choose another folder"),
    ("quantize {quick} {tmp}/no/r", "there is no folder {tmp}/no"),
    ("quantize {fp8} {tmp}/r --quantization fp8", "{fp8} is quantised already (fp8)"),
    (
        "generate {fp8} {sum} --quantization w8a8",
        "quantization=w8a8: the checkpoint holds weights of fp8, which can be run as fp8 only",
    ),
    ("info {fp8} --quantization int8", "quantization=int8: the checkpoint holds weights of fp8"),
    ("verify {quick} --reference {ref} --write-reference", "exists; give a new file to write"),
    ("verify {quick} --reference {tmp}/no/r --write-reference", "there is no folder {tmp}/no"),
    (
        "verify {quick} --reference {tmp}/r --write-reference --dtype bfloat16",
        "--write-reference computes in float32 on one rank; leave --dtype and -tp out",
    ),
    ("verify {quick} --reference {tmp}/r --write-reference -tp 2", "leave --dtype and -tp out"),
    (
        "verify {quick} --reference {tmp}/r --write-reference --max-tokens 0",
        "--max-tokens 0 must be at least 1",
    ),
    (
        "verify {quick} --reference {tmp}/r --write-reference --max-tokens 512",
        "--max-tokens 512 leaves no room for a prompt within max_model_len=512",
    ),
    (
        "verify {tiny} --reference {tmp}/r --write-reference --prompt a",
        "--prompt needs a tokenizer, and this checkpoint has none",
    ),
    # info
    ("info /no/such/folder", "/no/such/folder does not exist"),
    ("info {llama}", "model_type='llama' is not implemented"),
    ("info {quick} -tp 3", "tp=3 does not divide num_attention_heads=8"),
    # make-checkpoint
    ("make-checkpoint {tmp}/m --preset huge", "preset 'huge' is not one of 16b, 16b-4l, tiny"),
    ("make-checkpoint {tmp}/m --set hidden_size", "--set 'hidden_size' is not key=value"),
    ("make-checkpoint {tmp}/m --set size=3", "size is not a key of preset tiny; keys: "),
    ("make-checkpoint {tmp}/m --set hidden_size=big", "hidden_size='big' must be an integer"),
    ("make-checkpoint {tmp}/m --set hidden_size=100", "hidden_size=100 is not a multiple of"),
    ("make-checkpoint {file}", "{file} is a file; give a folder"),
]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, object]:
    """Values of the names in the commands of `WRONG_INPUT`."""
    contents = {"llama": '{"model_type": "llama"}', "no_json": "{", "deep": "[" * 100_000}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "file").write_text('{"prompt": "1+1="}\n')
    return {
        "tmp": tmp_path,
        "file": tmp_path / "file",
        "quick": QUICKSTART,
        "tiny": TINY,
        "ref": REFERENCE,
        "small": write_config(tmp_path / "small"),
        "long": "1" * 600,
        "sum": "--prompt 1+1=",
        **{name: tmp_path / name for name in contents},
    }


@pytest.mark.parametrize(("command", "says"), WRONG_INPUT)
def test_wrong_input_is_one_clear_line(
    cli: Cli, places: dict[str, object], tmp_path: Path, command: str, says: str
):
    if "{fp8}" in command:
        places["fp8"] = tmp_path / "fp8"
        assert cli("quantize", QUICKSTART, tmp_path / "fp8", "--quantization", "fp8").code == 0
    if "{cut}" in command:
        places["cut"] = cut = altered_checkpoint(
            TINY, tmp_path / "cut", "model.norm.weight", lambda weight: None
        )
        os.truncate(cut / "model-00002-of-00003.safetensors", 5000)
    before = sorted(tmp_path.rglob("*"))
    ran = cli(*command.format(**places).split())
    # A checkpoint that is damaged is no fault of the command.
    assert (ran.code, ran.out) == (1 if "{cut}" in command else 2, "")
    *_, error = [line for line in ran.err.splitlines() if line.startswith("moespan: ")]
    assert says.format(**places) in error
    assert "Traceback" not in ran.err
    assert sorted(tmp_path.rglob("*")) == before  # no partial file is left


def test_what_a_library_writes_to_stdout_is_not_among_the_answers(tmp_path: Path):
    code = (
        "import os, sys, moespan.cli, moespan.cli.info as info\n"
        "run = info.run\n"
        "def noisy(args):\n    os.write(1, b'[Gloo] noise\\n')\n    return run(args)\n"
        "info.run = noisy\n"
        "moespan.cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "info", str(QUICKSTART), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["model"] == str(QUICKSTART)
    assert "[Gloo] noise" in ran.stderr


@pytest.mark.parametrize(
    "flags", [["--speed", "2"], ["--clip"], ["--share", "0"], ["--num-requests", "5"]]
)
def test_flags_of_a_load_are_refused_where_steps_are_measured(cli: Cli, flags: list[str]) -> None:
    ran = cli("bench", QUICKSTART, *flags)
    assert ran.code == 2
    assert f"{flags[0]} without a load has no effect; add --load, --rate" in ran.err


def test_a_trace_has_its_own_number_of_requests(cli: Cli) -> None:
    ran = cli("bench", QUICKSTART, "--load", "trace.csv", "--num-requests", "5")
    assert ran.code == 2
    assert "--load brings its own requests; leave out --num-requests" in ran.err
