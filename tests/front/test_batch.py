"""Every line of a JSONL file is answered once or reported; finished answers are never lost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moespan import LLM
from moespan.engine.request import SamplingParams
from moespan.errors import ConfigError, EngineDeadError, MoespanError
from moespan.front.batch import AnswerFile, AnswerStream, BatchReport, answered_ids, run_batch
from tests.support import QUICKSTART, write_config

Record = dict[str, Any]


class Batch:
    """Runs `lines` (records, or raw text) and keeps the answers and the reports."""

    def __init__(
        self,
        llm: LLM,
        folder: Path,
        lines: list[Mapping[str, Any] | str | bytes],
        *,
        defaults: Mapping[str, Any] | None = None,
        chat: bool = False,
        done: set[str] | None = None,
        output: io.StringIO | None = None,
    ) -> None:
        self.path = folder / "input.jsonl"
        raw = [json.dumps(line) if isinstance(line, Mapping) else line for line in lines]
        self.path.write_bytes(
            b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in raw)
        )
        self.output = output or io.StringIO()
        self.complaints: list[str] = []
        self.num_advanced = 0
        self.report: BatchReport = run_batch(
            llm,
            self.path.read_bytes().splitlines(keepends=True),
            AnswerStream(self.output),
            {"temperature": 0, "max_tokens": 8, **(defaults or {})},
            name=str(self.path),
            chat=chat,
            done=done or set(),
            report_failure=self.complaints.append,
            advance=self._advance,
        )

    def _advance(self, num_lines: int) -> None:
        self.num_advanced += num_lines

    @property
    def records(self) -> list[Record]:
        return [json.loads(line) for line in self.output.getvalue().splitlines()]

    def text_of(self, given_id: Any) -> str:
        (found,) = [record for record in self.records if record["id"] == given_id]
        return str(found["text"])

    def complaint_of(self, number: int) -> str:
        prefix = f"{self.path}:{number}: "
        (found,) = [text for text in self.complaints if text.startswith(prefix)]
        return found.removeprefix(prefix)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(QUICKSTART), device="cpu") as llm:
        yield llm


@pytest.fixture
def run(llm: LLM, tmp_path: Path) -> Callable[..., Batch]:
    return lambda *lines, **settings: Batch(llm, tmp_path, list(lines), **settings)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[LLM]:
    """Random weights, no tokenizer."""
    folder = write_config(tmp_path / "small")
    with LLM(str(folder), device="cpu", load_format="dummy", max_num_seqs=4) as llm:
        yield llm


# Lines in, lines out


def test_an_answer_has_all_that_the_contract_names(run: Callable[..., Batch]):
    (record,) = run({"prompt": "347+85=", "id": "sum"}).records
    assert record == {
        "id": "sum",
        "text": "432",
        "token_ids": [21, 20, 19, 1],
        "finish_reason": "stop",
        "stop_reason": None,
        "num_prompt_tokens": 8,
        "num_cached_tokens": 0,
    }


def test_keys_that_mean_nothing_are_named_once(
    run: Callable[..., Batch], caplog: pytest.LogCaptureFixture
):
    line = {"promt": "x", "prompt": [4], "params": {"max_tokens": 1}, "source": "a"}
    many = {str(number): 0 for number in range(50)}
    assert len(run(line, {**line, "id": "two"}, {**line, **many}).records) == 3
    said = [record.getMessage().partition("input.jsonl:")[2] for record in caplog.records]
    assert said[:2] == [
        "1: the key 'promt' is ignored; did you mean 'prompt'?",
        "1: the key 'source' is ignored; lines have prompt, messages, id, params",
    ]
    assert len(said) == 8


def test_prompts_are_text_or_token_ids(run: Callable[..., Batch], llm: LLM):
    assert llm.tokenizer is not None
    batch = run({"prompt": "12+30="}, {"prompt": llm.tokenizer.encode("347+85=")})
    assert (batch.text_of(1), batch.text_of(2)) == ("42", "432")


def test_an_id_is_any_json_and_without_one_the_number_of_the_line(run: Callable[..., Batch]):
    ids: list[Any] = ["a", 7, 7.5, True, None, ["x", 1], {"b": 1, "a": [2]}, "", "二"]
    lines: list[Any] = [{"prompt": "1+1=", "id": given} for given in ids]
    batch = run(*lines, "", {"prompt": "1+1="})
    found = [json.dumps(record["id"]) for record in batch.records]
    assert sorted(found) == sorted(json.dumps(given) for given in [*ids, len(ids) + 2])
    assert "二" in batch.output.getvalue()  # as it is, not escaped


def test_params_of_a_line_override_the_defaults(run: Callable[..., Batch]):
    batch = run(
        {"prompt": "347+85="},
        {"prompt": "347+85=", "params": {"max_tokens": 1}},
        {"prompt": "347+85=", "params": {"stop": "2"}},
        {"prompt": "347+85=", "params": {}},
        {"prompt": "347+85=", "params": None},
        defaults={"max_tokens": 2},
    )
    assert [batch.text_of(number) for number in range(1, 6)] == ["43", "4", "43", "43", "43"]


def test_scores_and_continuations_are_in_the_answer(run: Callable[..., Batch]):
    (record,) = run(
        {"prompt": "347+85=", "params": {"logprobs": 1, "prompt_logprobs": 0, "n": 2}}
    ).records
    assert [one["text"] for one in record["outputs"]] == ["432", "432"]
    assert record["text"] == "432"
    (token_id, logprob, top), *_ = record["logprobs"]
    assert (token_id, top) == (21, [[21, logprob]])
    assert record["prompt_logprobs"][0] is None
    assert len(record["prompt_logprobs"]) == 8


def test_chat_lines_are_user_messages_or_whole_conversations(run: Callable[..., Batch]):
    batch = run(
        {"prompt": "12+30="},
        {"messages": [{"role": "user", "content": "12+30="}]},
        chat=True,
    )
    assert (batch.text_of(1), batch.text_of(2)) == (" 42", " 42")


def test_token_ids_are_given_as_they_are_even_with_chat(run: Callable[..., Batch], llm: LLM):
    assert llm.tokenizer is not None
    batch = run({"prompt": llm.tokenizer.encode("12+30=")}, chat=True)
    assert batch.text_of(1) == "42"


def test_null_means_not_set_whoever_wrote_the_line(run: Callable[..., Batch]):
    nothing = dict.fromkeys(SamplingParams.__struct_fields__)
    batch = run(
        {"prompt": "347+85=", "params": {**nothing, "max_tokens": 2, "best_of": None}},
        {"prompt": "347+85=", "params": {"max_tokens": 2}, "messages": None, "max_tokens": None},
        {"prompt": "347+85=", "params": {"max_tokens": None}},  # as many as the model allows
        defaults={"max_tokens": 1, "temperature": 0},
    )
    assert [batch.text_of(number) for number in (1, 2, 3)] == ["43", "43", "432"]


def test_a_content_may_be_a_list_of_texts(run: Callable[..., Batch]):
    parts = [{"type": "text", "text": "12"}, {"type": "text", "text": "30"}]
    batch = run(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "12+30="}]}]},
        {"messages": [{"role": "user", "content": ["12+30="], "name": None}]},
        {"messages": [{"role": "user", "content": parts}], "params": {"max_tokens": 1}},
        {"messages": [{"role": "user", "content": "12\n30"}], "params": {"max_tokens": 1}},
        chat=True,
    )
    assert (batch.text_of(1), batch.text_of(2)) == (" 42", " 42")
    counts = {record["id"]: record["num_prompt_tokens"] for record in batch.records}
    assert counts[3] == counts[4]


# Bad lines


BAD_LINES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{prompt", "not JSON: "),
    "no UTF-8": (b'{"prompt": "\xff"}', "not JSON: "),
    "too deep": ("[" * 100_000, "not JSON: "),
    "no object": ("[1, 2]", "a JSON list, not an object"),
    "no prompt": ({"id": "x"}, "the line has no prompt"),
    "a number": ({"prompt": 5}, "5 is neither text nor a list of token ids"),
    "mixed list": ({"prompt": [1, "2"]}, "[1, '2'] is neither"),
    "empty": ({"prompt": []}, "the prompt is empty"),
    "not in the vocabulary": ({"prompt": [512]}, "token id 512 is not within 0..511"),
    "too long": ({"prompt": [5] * 600}, "the prompt has 600 tokens; max_model_len=512"),
    "half a character": ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    "half a character in the id": ('{"prompt": "a", "id": "\\ud83d"}', "cannot be written as JSON"),
    "NaN as id": ('{"prompt": "a", "id": NaN}', "cannot be written as JSON"),
    "params a list": ({"prompt": "a", "params": []}, "params=[] must be an object"),
    "params false": ({"prompt": "a", "params": False}, "params=False must be an object"),
    "unknown parameter": (
        {"prompt": "a", "params": {"heat": 1}},
        "'heat' is not a sampling",
    ),
    "wrong type": ({"prompt": "a", "params": {"top_k": "x"}}, "top_k='x' must be an integer"),
    "out of bounds": ({"prompt": "a", "params": {"top_p": 0}}, "top_p=0 must be a number above 0"),
    "NaN": ('{"prompt": "a", "params": {"top_p": NaN}}', "top_p=nan must be a number above 0"),
    "far too many": (
        {"prompt": "a", "params": {"max_tokens": 2**70}},
        "must be an integer",
    ),
    "half a stop": ('{"prompt": "a", "params": {"stop": "\\ud83d"}}', "whole characters"),
    "misplaced": ({"prompt": "a", "max_tokens": 5}, "max_tokens belongs in params"),
    "messages without chat": ({"messages": []}, "messages are only for chat; add --chat"),
}


def test_a_bad_line_is_reported_with_its_number_and_the_others_run(run: Callable[..., Batch]):
    lines: list[Any] = [{"prompt": "1+1=", "id": "first"}]
    for bad, _ in BAD_LINES.values():
        lines += [bad, {"prompt": "2+2="}]
    batch = run(*lines)
    for number, (_, says) in enumerate(BAD_LINES.values()):
        assert says in batch.complaint_of(2 + 2 * number)
    assert len(batch.complaints) == batch.report.num_failed == len(BAD_LINES)
    assert batch.report.num_answered == len(BAD_LINES) + 1
    assert [record["text"] for record in batch.records] == ["2", *["4"] * len(BAD_LINES)]
    assert batch.num_advanced == len(lines)
    for complaint in batch.complaints:
        assert "\n" not in complaint
        assert len(complaint) < 500


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, "has no 'content'"),
        ({"messages": "hello"}, "messages is str"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "both a prompt and"),
        ({"id": 1}, "the line has no prompt"),
        ({"messages": [{"role": "user", "content": None}]}, "must be a string"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be a string"),
        ({"messages": [{"role": "user", "content": [5]}]}, "['content'][0] is 5; each part"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
            "must be a text",
        ),
        ({"messages": [5]}, "messages[0] is int"),
    ],
)
def test_a_bad_conversation_is_reported(run: Callable[..., Batch], bad: Record, says: str):
    batch = run(bad, {"prompt": "1+1=", "id": "good"}, chat=True)
    assert says in batch.complaint_of(1)
    assert [record["id"] for record in batch.records] == ["good"]


def test_the_first_line_of_an_id_counts_and_the_others_are_reported(run: Callable[..., Batch]):
    batch = run(
        {"prompt": "1+1=", "id": "a"},
        {"prompt": "2+2=", "id": "a"},
        {"prompt": "3+3=", "id": 4},
        {"prompt": "4+4="},
        {"prompt": "1+4=", "id": {"x": 1, "y": 2}},
        {"prompt": "1+5=", "id": {"y": 2, "x": 1}},
        {"prompt": "1+6=", "id": "4"},
    )
    for number in (2, 4, 6):
        assert "is on an earlier line too" in batch.complaint_of(number)
    assert [record["text"] for record in batch.records] == ["2", "6", "5", "7"]


def test_an_engine_error_is_reported_with_the_number_of_the_line(small: LLM, tmp_path: Path):
    batch = Batch(
        small,
        tmp_path,
        [{"prompt": [1, 2]}, {"prompt": [1, 2], "params": {"stop": ["x"]}}, {"prompt": "text"}],
    )
    assert [record["id"] for record in batch.records] == [1]
    assert "stop strings need a tokenizer" in batch.complaint_of(2)
    assert "give token ids" in batch.complaint_of(3)


# Going on after an end


def test_resuming_skips_what_is_answered(run: Callable[..., Batch], tmp_path: Path):
    lines = [{"prompt": f"{number}+1=", "id": number} for number in range(1, 9)]
    whole = run(*lines)
    output = tmp_path / "output.jsonl"
    output.write_text("".join(whole.output.getvalue().splitlines(keepends=True)[:3]))
    done = answered_ids(output)
    rest = run(*lines, done=done)
    assert rest.report.num_skipped == 3
    assert rest.report.num_answered == 5
    assert rest.num_advanced == 8
    answered = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert sorted([*answered, *(record["id"] for record in rest.records)]) == [*range(1, 9)]


@pytest.mark.parametrize("cut", [1, 5, 20, -1])
def test_a_truncated_line_is_removed_and_counts_as_unanswered(
    run: Callable[..., Batch], tmp_path: Path, cut: int
):
    lines = [{"prompt": f"{number}+1=", "id": number} for number in (1, 2)]
    first, second = run(*lines).output.getvalue().splitlines(keepends=True)
    output = tmp_path / "output.jsonl"
    output.write_text(first + second[:cut])
    assert answered_ids(output) == {"1"}
    assert output.read_text() == first


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "1+1=", "id": 1}\n{"prompt": "2+2=", "id": 2}\n',  # the input by mistake
        '{"prompt": "1+1=", "id": 1}',
        "notes without an end of line",
        "notes\n",
        '{"text": "no id", "token_ids": [], "finish_reason": "stop"}\n',
        "\n",
        '[{"id": 1}]\n',
    ],
)
def test_a_file_that_holds_no_answers_is_refused_and_left_alone(tmp_path: Path, content: str):
    output = tmp_path / "output.jsonl"
    output.write_text(content)
    with pytest.raises(ConfigError, match=r"output\.jsonl:1 is not an answer of an earlier run"):
        answered_ids(output)
    assert output.read_text() == content


def test_an_empty_file_is_an_earlier_run_that_answered_nothing(tmp_path: Path):
    output = tmp_path / "output.jsonl"
    output.touch()
    assert answered_ids(output) == set()


def test_a_crash_loses_no_finished_answer(
    small: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines: list[Any] = [
        {"prompt": [number + 1], "params": {"max_tokens": 1 + number % 3, "ignore_eos": True}}
        for number in range(40)
    ]
    receive, num_received = small._client.receive, 0

    def receive_then_die(timeout_s: float | None = None) -> list[Any]:
        nonlocal num_received
        if num_received == 12:
            raise EngineDeadError("rank 1 was killed by SIGKILL")
        num_received += 1
        deltas = receive(timeout_s)
        finished.update(delta.id for delta in deltas if delta.finish_reason)
        return deltas

    finished: set[str] = set()
    output = tmp_path / "output.jsonl"
    with monkeypatch.context() as patch, output.open("w") as file:
        patch.setattr(small._client, "receive", receive_then_die)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            Batch(small, tmp_path, lines, output=file)  # type: ignore[arg-type]
        # Already there, though the file is still open.
        assert len(output.read_text().splitlines()) == len(finished)
    assert 0 < len(finished) < 40
    done = answered_ids(output)
    rest = Batch(small, tmp_path, lines, done=done)
    before = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert sorted([*before, *(record["id"] for record in rest.records)]) == [*range(1, 41)]


def test_a_thousand_prompts_are_each_answered_exactly_once_in_bounded_memory(tmp_path: Path):
    lines: list[Any] = [
        {
            "prompt": [number % 60, number // 60],
            "id": f"n{number}",
            "params": {"max_tokens": 1 + number % 5, "ignore_eos": True},
        }
        for number in range(1000)
    ]
    folder = write_config(tmp_path / "small")
    with LLM(str(folder), device="cpu", load_format="dummy", max_num_seqs=64) as llm:
        most_live = 0

        class Output(io.StringIO):
            def write(self, text: str) -> int:
                nonlocal most_live
                most_live = max(most_live, len(llm._live))
                return super().write(text)

        batch = Batch(llm, tmp_path, lines, output=Output())
    assert sorted(record["id"] for record in batch.records) == sorted(line["id"] for line in lines)
    for record in batch.records:
        assert len(record["token_ids"]) == 1 + int(record["id"][1:]) % 5
    assert most_live <= 128
    assert (batch.report.num_answered, batch.report.num_failed) == (1000, 0)
    assert batch.report.num_output_tokens == 3000
    assert batch.num_advanced == 1000


# The place for answers


def answers(count: int) -> Iterator[Record]:
    for number in range(count):
        yield {"id": number, "token_ids": [5], "finish_reason": "stop", "text": "é🐱"}


def test_a_file_holds_each_answer_as_soon_as_it_is_written(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "a", "token_ids": [], "finish_reason": "stop"}\n')
    with contextlib.closing(AnswerFile(path, 1)) as file:
        for number, record in enumerate(answers(3), 1):
            file.write(record)
            assert len(answered_ids(path)) == number + 1
    assert "é🐱" in path.read_text()


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def replace(path: Path) -> None:
    path.with_suffix(".new").touch()
    path.with_suffix(".new").rename(path)


def cut(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (remove, "was removed or renamed"),
        (rename, "was removed or renamed"),
        (replace, "was replaced by another file"),
        (cut, "was cut"),
    ],
)
def test_a_file_that_is_taken_away_is_named(
    tmp_path: Path, change: Callable[[Path], None], says: str, is_last: bool
):
    path = tmp_path / "out.jsonl"
    file = AnswerFile(path)
    for record in answers(3):
        file.write(record)
    change(path)
    with pytest.raises(MoespanError, match=rf"out\.jsonl {says} .*; 3 answers .*may be lost"):
        if is_last:
            file.close()
        else:
            file.write(next(answers(1)))
    with contextlib.suppress(MoespanError):
        file.close()


def test_a_folder_that_is_taken_away_is_named_too(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = AnswerFile(folder / "out.jsonl")
    shutil.rmtree(folder)
    with pytest.raises(MoespanError, match="was removed or renamed"):
        file.close()


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_number_of_answers_and_the_fix(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.symlink_to("/dev/full")
    file = AnswerFile(path, 7)
    with pytest.raises(MoespanError) as caught:
        file.write(next(answers(1)))
    assert str(caught.value) == (
        f"{path} cannot be written: No space left on device; it holds 7 answers, and the same "
        "command with --resume adds the others"
    )
    file.close()


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "utf-8"])
def test_a_line_is_json_in_any_encoding(encoding: str):
    raw = io.BytesIO()
    stream = AnswerStream(io.TextIOWrapper(raw, encoding=encoding))
    records = [*answers(2), {"id": 9, "text": "plain"}]
    for record in records:
        stream.write(record)
    assert [json.loads(line) for line in raw.getvalue().decode(encoding).splitlines()] == records
    assert ("🐱".encode() in raw.getvalue()) == (encoding == "utf-8")
