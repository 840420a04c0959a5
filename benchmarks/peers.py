"""moespan and other engines side by side on one machine's CPU, one checkpoint, in turns.

    python benchmarks/peers.py run CHECKPOINT --out results \\
        --python llama.cpp=LLAMA/bin/python --python zentorch=ZEN/bin/python ...
    python benchmarks/peers.py table results/results.json      the table, in Markdown
    python benchmarks/peers.py plot results/results.json       the pictures (needs matplotlib)

Each engine runs in a process of its own virtual environment (`peer_engines.py`), one at a time.
Every round goes through all engines, every second round in reverse order. The machine's limits are
measured before and after each measurement. Each measurement is written at once; the same command
resumes after an interruption. README.md explains how to install the engines and read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_report import Report, draw, table

import moespan
from moespan.config import EngineConfig, ModelConfig
from moespan.machine.cores import usable_cores
from moespan.measure.bench import Case, Speed, peak_rss_bytes, percentile
from moespan.measure.probe import Probe, machine_name
from moespan.planner.work import Limits

HERE = Path(__file__).parent
MAX_TOKENS_PER_STEP = 2048

# After this time, OpenMP's busily waiting threads have left the cores to the next process.
_SETTLE_S = 0.25
# A measurement is repeated if other processes used more than this share of the cores.
_QUIET_SHARE = 0.06
_ANSWER_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Peer:
    """An engine in one precision.

    Attributes:
        engine: its name in `peer_engines.ENGINES`.
        python: which of the interpreters that `--python` names runs it.
        bits: bits of its weights.
        model: format that it reads: `checkpoint`, `w8a8`, or the type of a GGUF file.
        options: options of this engine.
        script: script of an engine that is not in `ENGINES`.
        is_extra: it runs only if `--peers` names it.
    """

    engine: str
    python: str
    bits: int = 16
    model: str = "checkpoint"
    options: dict[str, Any] = field(default_factory=dict)
    script: str = ""
    is_extra: bool = False

    def threads(self, cores: int) -> int:
        """Threads of one process of the engine, if it may use `cores`; ranks share them."""
        return max(1, cores // int(self.options.get("tensor_parallel_size", 1)))


PEERS = {
    "moespan": Peer("moespan", "moespan"),
    "moespan-int8": Peer("moespan", "moespan", 8, options={"quantization": "int8"}),
    "moespan-w8a8": Peer("moespan", "moespan", 8, options={"quantization": "w8a8"}),
    "moespan-int4": Peer("moespan", "moespan", 4, options={"quantization": "int4"}),
    "moespan-tp2": Peer("moespan", "moespan", options={"tensor_parallel_size": 2}, is_extra=True),
    "moespan-mapped": Peer("moespan", "moespan", options={"weight_cache_gb": 40}, is_extra=True),
    "moespan-int8-cache": Peer(
        "moespan", "moespan", options={"kv_cache_dtype": "int8"}, is_extra=True
    ),
    "transformers": Peer("transformers", "transformers"),
    "llama.cpp": Peer("llama.cpp", "llama.cpp", model="bf16"),
    "llama.cpp-q8_0": Peer("llama.cpp", "llama.cpp", 8, "q8_0"),
    "llama.cpp-q4_0": Peer("llama.cpp", "llama.cpp", 4, "q4_0"),
    "llama.cpp-q4_0-pure": Peer("llama.cpp", "llama.cpp", 4, "q4_0-pure"),
    "vllm": Peer("vllm", "vllm"),
    "vllm-zentorch": Peer("vllm", "zentorch"),
    "vllm-zentorch-w8a8": Peer("vllm", "zentorch", 8, "w8a8"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a case, or a mix of requests if there is none; and runs per round.

    An extra row is measured only if `--rows` names it.
    """

    label: str
    case: Case | None
    repeats: int = 1
    is_extra: bool = False

    def questions(self, draw: random.Random, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """Prompts and the number of tokens to continue each by."""
        if self.case is not None:
            count = self.case.tokens_wanted(MAX_TOKENS_PER_STEP)
            return self.case.prompts(draw, vocab_size), [count] * self.case.batch
        sizes = random.Random(0)  # the same mix every time, with other tokens
        lengths = [sizes.randint(32, 256) for _ in range(_MIXED_REQUESTS)]
        counts = [sizes.randint(8, 32) for _ in range(_MIXED_REQUESTS)]
        return [draw.choices(range(vocab_size), k=length) for length in lengths], counts

    def warm_up(self, draw: random.Random, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """Like `questions`, but with short prompts for decoding."""
        if self.case is None or not self.case.num_tokens:
            return self.questions(draw, vocab_size)
        return Case(self.case.batch, 8, 2).prompts(draw, vocab_size), [4] * self.case.batch


_MIXED_REQUESTS = 16

ROWS = {
    "prefill-128": Row("prefill 128", Case(1, 128), 2),
    "prefill-512": Row("prefill 512", Case(1, 512), 2),
    "prefill-2048": Row("prefill 2048", Case(1, 2048)),
    "decode-1": Row("decode batch 1", Case(1, 128, 48), 2),
    "decode-8": Row("decode batch 8", Case(8, 128, 24), 2),
    "decode-32": Row("decode batch 32", Case(32, 128, 16)),
    "decode-128": Row("decode batch 128", Case(128, 32, 8)),
    "mixed": Row("mixed load", None),
    "prefill-3968": Row("prefill 3968", Case(1, 3968), is_extra=True),
    "decode-1-2048": Row("decode batch 1 after 2048", Case(1, 2048, 24), is_extra=True),
    "decode-8-2048": Row("decode batch 8 after 2048", Case(8, 2048, 16), is_extra=True),
    "decode-1-3968": Row("decode batch 1 after 3968", Case(1, 3968, 24), is_extra=True),
    "decode-8-3968": Row("decode batch 8 after 3968", Case(8, 3968, 16), is_extra=True),
}


class PeerError(Exception):
    """An engine does not start, does not answer, or answers with an error."""


class Process:
    """An engine in a process of its own that has loaded and answered its first prompt.

    Attributes:
        load_s: seconds of loading, with imports and the first prompt.
        start_s: seconds from the start of the process to the first token.
        versions: versions of its packages.
    """

    def __init__(self, peer: Peer, python: str, model: str, threads: int, log: Path) -> None:
        threads = peer.threads(threads)
        job = {
            "engine": peer.engine,
            "model": model,
            "threads": threads,
            "options": peer.options,
            "script": peer.script,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
        environment.pop("PYTHONPATH", None)
        if peer.engine == "moespan":
            environment["PYTHONPATH"] = str(Path(moespan.__file__).parents[1])
        started = time.perf_counter()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / "peer_engines.py"), json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - started
        self.load_s = float(ready["load_s"])
        self.versions: dict[str, str] = ready["versions"]

    def ask(self, prompts: list[list[int]], num_tokens: list[int]) -> dict[str, Any]:
        """`times` and `others`, or the reason in `cannot`.

        Raises:
            PeerError: the engine failed and cannot be used any more.
        """
        assert self._process.stdin is not None
        question = json.dumps({"prompts": prompts, "num_tokens": num_tokens})
        try:
            self._process.stdin.write(question.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"it ended with code {self._process.wait()}") from None
        return self._answer()

    @property
    def peak_rss_bytes(self) -> int:
        """Peak memory in bytes of the engine and its children."""
        return peak_rss_bytes(self._process.pid)

    def close(self) -> None:
        """End it. Idempotent."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(_ANSWER_TIMEOUT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise PeerError(f"it ended with code {self._process.wait()}; its log says why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


class Records:
    """The measurements so far: lines of JSON, each written as soon as it is known.

    The first line describes what is measured. Each other line is a measurement, the start, the
    memory or the failure of an engine in a round.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Begin a file, or continue the one at `path`.

        Raises:
            PeerError: the file holds another measurement.
        """
        self._path = path
        self.lines = read_records(path) if path.exists() else []
        # Drop a last line that was cut off, so that the next line stands alone.
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if not self.lines:
            self.add(**header)
        elif self.lines[0] != header:
            raise PeerError(
                f"{path} is of another measurement ({self.lines[0]}, not {header}); give another "
                "--out"
            )

    def add(self, **record: Any) -> None:
        """Write one line."""
        self.lines.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def count(self, **wanted: Any) -> int:
        """Number of lines that have all of these values."""
        return sum(wanted.items() <= _plain(line).items() for line in self.lines[1:])


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if isinstance(value, str | int)}


def read_records(path: Path) -> list[dict[str, Any]]:
    """All complete lines of the file; a last line that a crash cut off is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run(args: argparse.Namespace) -> None:
    """Measure what is missing, and write the report.

    Raises:
        PeerError: nothing can be measured as asked.
    """
    peers = chosen_peers(args)
    args.out.mkdir(parents=True, exist_ok=True)
    models = {name: converted(peer, args) for name, peer in peers.items()}
    raw = json.loads((args.checkpoint / "config.json").read_text())
    header = {
        "model": args.checkpoint.resolve().name,
        "config": raw,
        "machine": machine_name("cpu"),
        "cores": os.cpu_count(),
        "threads": args.threads,
    }
    records = Records(args.out / "measurements.jsonl", header)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the probe
    with Probe("cpu", "bfloat16") as probe:
        for number in range(args.rounds):
            for name in list(peers)[:: -1 if number % 2 else 1]:
                if not _is_missing(records, number, name, args.rows):
                    continue
                log = args.out / f"{name}.log"
                try:
                    _warm_page_cache(Path(models[name]))
                    python = args.python[peers[name].python]
                    with Process(peers[name], python, models[name], args.threads, log) as process:
                        _measure(process, records, probe, number, name, args, raw["vocab_size"])
                except PeerError as error:
                    records.add(round=number, engine=name, failed=str(error))
                    say(f"round {number}, {name}: {error}; see {log}")
    if not any(line.get("measured") for line in records.lines):
        raise PeerError("nothing was measured")
    report = summary(records.lines, {name: peer.bits for name, peer in PEERS.items()})
    file = args.out / "results.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    text = "\n".join(table(report))
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    try:
        draw(report, args.out)
    except ImportError:
        say('no pictures: matplotlib is not installed; pip install ".[bench]", then: plot')


def say(text: str) -> None:
    """Print progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def chosen_peers(args: argparse.Namespace) -> dict[str, Peer]:
    """The peers of `--peers`, or all whose interpreter is given and that are not extra; `--engine`
    adds more."""
    for text in args.engine:
        name, _, rest = text.partition("=")
        python, _, script = rest.partition(":")
        if not script:
            raise PeerError(f"--engine {text!r} is not NAME=PYTHON:SCRIPT")
        args.python[name] = python
        PEERS[name] = Peer("", name, script=str(Path(script).resolve()))
    names = args.peers or [
        name for name, peer in PEERS.items() if peer.python in args.python and not peer.is_extra
    ]
    for name in names:
        if name not in PEERS:
            raise PeerError(f"--peers {name!r} is not one of {', '.join(PEERS)}")
        if PEERS[name].python not in args.python:
            raise PeerError(f"{name} needs --python {PEERS[name].python}=PATH")
    return {name: PEERS[name] for name in names}


def converted(peer: Peer, args: argparse.Namespace) -> str:
    """The model in the engine's format, converted now in the engine's environment if missing."""
    if peer.model == "checkpoint":
        return str(args.checkpoint)
    folder: Path = args.converted
    folder.mkdir(parents=True, exist_ok=True)
    is_gguf = peer.model != "w8a8"
    target = folder / f"{args.checkpoint.resolve().name}-{peer.model}{'.gguf' * is_gguf}"
    if not target.exists():
        say(f"writing {target}")
        half = target.with_name(target.name + ".part")
        kind = ["gguf", "--type", peer.model] if is_gguf else ["w8a8"]
        command = [args.python[peer.python], str(HERE / "peer_formats.py"), *kind]
        done = subprocess.run([*command, str(args.checkpoint), str(half)], env=_without_our_path())
        if done.returncode:
            raise PeerError(f"{target} could not be written")
        half.rename(target)
    return str(target)


def _without_our_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _is_missing(records: Records, number: int, name: str, rows: Sequence[str]) -> bool:
    """Whether a measurement of this engine's round is missing."""
    return any(_left(records, number, name, row) for row in rows)


def _left(records: Records, number: int, name: str, row: str) -> int:
    """Number of missing measurements."""
    if records.count(round=number, engine=name, row=row, measured=0):
        return 0
    return ROWS[row].repeats - records.count(round=number, engine=name, row=row, measured=1)


def _warm_page_cache(model: Path) -> None:
    """Read the files once, so that no engine's load time includes the disk's."""
    for file in sorted(model.glob("*.safetensors")) if model.is_dir() else [model]:
        with file.open("rb", buffering=0) as opened:
            buffer = bytearray(16 << 20)
            while opened.readinto(buffer):
                pass


def _measure(
    process: Process,
    records: Records,
    probe: Probe,
    number: int,
    name: str,
    args: argparse.Namespace,
    vocab_size: int,
) -> None:
    """Measure everything that is missing of one engine's round."""
    where: dict[str, Any] = {"round": number, "engine": name}
    records.add(**where, load_s=process.load_s, start_s=process.start_s, versions=process.versions)
    say(f"round {number}, {name}: first token after {process.start_s:.1f} s")
    draw_ids = random.Random(number)
    rows = {row: left for row in args.rows if (left := _left(records, number, name, row)) > 0}
    for row in rows:
        process.ask(*ROWS[row].warm_up(draw_ids, vocab_size))
    for row, left in rows.items():
        for _ in range(left):
            for attempt in range(args.retries + 1):
                time.sleep(_SETTLE_S)
                before = probe()
                answer = process.ask(*ROWS[row].questions(draw_ids, vocab_size))
                time.sleep(_SETTLE_S)
                limits = Limits.mean(before, probe())
                if answer.get("others", 0.0) <= _QUIET_SHARE:
                    break
                time.sleep(1 + 2 * attempt)
            if "cannot" in answer:
                records.add(**where, row=row, measured=0, cannot=answer["cannot"])
                break
            speed = _speed(ROWS[row], answer["times"])
            records.add(
                **where,
                row=row,
                measured=1,
                seconds=speed.seconds,
                gaps_s=[round(gap, 6) for gap in speed.gaps_s],
                bytes_per_s=limits.bytes_per_s,
                operations_per_s=limits.operations_per_s,
                others=answer["others"],
            )
            say(f"    {row}: {_tokens(ROWS[row]) / speed.seconds:.1f} tokens/s")
    records.add(**where, peak_rss_bytes=process.peak_rss_bytes)


def _speed(row: Row, times: list[list[float]]) -> Speed:
    """The speed of a case; for a mix, the seconds until all requests are done."""
    return row.case.speed(times) if row.case is not None else Speed(max(one[-1] for one in times))


def _tokens(row: Row) -> int:
    """Tokens that `Speed.seconds` cover: those of a step, or all that go in and out of a mix."""
    if row.case is not None:
        return row.case.tokens_per_step
    prompts, counts = row.questions(random.Random(0), 2)
    return sum(map(len, prompts)) + sum(counts)


def summary(records: Sequence[dict[str, Any]], bits: dict[str, int]) -> Report:
    """Medians of all measurements, in the form that `peer_report` takes.

    Args:
        records: the lines of `measurements.jsonl`.
        bits: bits of each engine's weights.
    """
    header, lines = records[0], list(records[1:])
    measured = [line for line in lines if line.get("measured")]
    config = ModelConfig.from_dict(header["config"])
    engine = EngineConfig(model="", dtype="bfloat16")
    names = list(dict.fromkeys(line["engine"] for line in lines))
    names.sort(key=lambda name: list(bits).index(name))
    rows: dict[str, Any] = {}
    for key in [key for key in ROWS if any(line["row"] == key for line in measured)]:
        row = ROWS[key]
        work = None if row.case is None else row.case.work(config, engine)
        cells = {}
        for name in names:
            mine = [line for line in measured if line["engine"] == name and line["row"] == key]
            if not mine:
                continue
            seconds = [line["seconds"] for line in mine]
            limits = [Limits(line["bytes_per_s"], line["operations_per_s"]) for line in mine]
            shares = (
                [work.least_s(one) / s for one, s in zip(limits, seconds, strict=True)]
                if work is not None
                else []
            )
            gaps = [gap for line in mine for gap in line["gaps_s"]]
            median_s = statistics.median(seconds)
            cells[name] = {
                "tokens_per_s": _tokens(row) / median_s,
                "limit_share": statistics.median(shares) if shares else None,
                "spread": (max(seconds) - min(seconds)) / median_s,
                "latency_s": statistics.median(gaps) if gaps else median_s,
                "latency_p99_s": percentile(gaps, 0.99) if gaps else None,
                "others": max(line["others"] for line in mine),
                "seconds": seconds,
                "limit_shares": shares,
            }
        rows[key] = {
            "label": row.label,
            "work": work and {**work._asdict(), "tokens": _tokens(row)},
            "engines": cells,
        }
    bandwidths = [line["bytes_per_s"] for line in measured]
    return {
        **header,
        "rounds": 1 + max((line["round"] for line in lines), default=-1),
        "limits": {
            "bytes_per_s": statistics.median(bandwidths),
            "lowest_bytes_per_s": min(bandwidths),
            "highest_bytes_per_s": max(bandwidths),
            "operations_per_s": statistics.median(line["operations_per_s"] for line in measured),
        },
        "engines": {
            name: _engine_facts([line for line in lines if line["engine"] == name], bits[name])
            for name in names
        },
        "rows": rows,
    }


def _engine_facts(lines: Sequence[dict[str, Any]], bits: int) -> dict[str, Any]:
    """The facts that the lines tell about one engine."""

    def values(key: str) -> list[Any]:
        return [line[key] for line in lines if key in line]

    def median(key: str) -> float | None:
        return statistics.median(values(key)) if values(key) else None

    return {
        "bits": bits,
        "versions": next(iter(values("versions")), {}),
        "load_s": median("load_s"),
        "start_to_first_token_s": median("start_s"),
        "peak_rss_bytes": max(values("peak_rss_bytes"), default=None),
        "error": next(iter(values("failed")[-1:]), None) if "failed" in lines[-1] else None,
    }


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _rows(text: str) -> list[str]:
    rows = _names(text)
    for row in rows:
        if row not in ROWS:
            raise argparse.ArgumentTypeError(f"{row!r} is not one of {', '.join(ROWS)}")
    return rows


def _interpreter(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    known = dict.fromkeys(peer.python for peer in PEERS.values())
    if not separator or name not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, NAME of {', '.join(known)}")
    return name, path


def parser() -> argparse.ArgumentParser:
    """The flags."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="measure what is missing, and print the table")
    verb.add_argument("checkpoint", type=Path, help="folder; moespan make-checkpoint writes one")
    verb.add_argument("--out", type=Path, required=True, help="folder for all that comes of it")
    verb.add_argument(
        "--python",
        type=_interpreter,
        action="append",
        default=[("moespan", sys.executable)],
        metavar="NAME=PATH",
        help="interpreter of the environment where transformers, llama.cpp, vllm, or zentorch (with"
        " vllm) is installed; may be repeated",
    )
    verb.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=PYTHON:SCRIPT",
        help="one more engine: a class Engine as in peer_engines.py",
    )
    verb.add_argument(
        "--converted", type=Path, help="folder of GGUF and W8A8 files (OUT); missing ones are made"
    )
    verb.add_argument(
        "--peers",
        type=_names,
        help=f"of {', '.join(PEERS)} (all that can run, without those that are the same engine with"
        " other options)",
    )
    verb.add_argument(
        "--rows",
        type=_rows,
        default=[name for name, row in ROWS.items() if not row.is_extra],
        help=f"of {','.join(ROWS)} (all, without those of long contexts)",
    )
    verb.add_argument("--rounds", type=int, default=3, help="(3)")
    verb.add_argument("--threads", type=int, default=usable_cores(), help="(all cores)")
    verb.add_argument(
        "--retries", type=int, default=2, help="of a measurement that others disturbed (2)"
    )
    for name, text in (("table", "print the table"), ("plot", "draw the pictures")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("results", type=Path, metavar="results.json")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.verb == "run":
        args.python = dict(args.python)
        args.converted = args.converted or args.out
        try:
            run(args)
        except PeerError as error:
            sys.exit(f"peers.py: {error}")
        return
    report = json.loads(args.results.read_text())
    if args.verb == "table":
        print(*table(report), sep="\n")
        return
    try:
        print(*draw(report, args.results.parent), sep="\n")
    except ImportError:
        sys.exit('peers.py: pictures need matplotlib; pip install ".[bench]"')


if __name__ == "__main__":
    main()
