"""Nothing that comes with a checkpoint, or over a wire, is ever run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moespan
from moespan import LLM, SamplingParams
from moespan.cli import main
from moespan.config import ModelConfig
from moespan.errors import CheckpointError
from tests.support import QUICKSTART

SOURCE = Path(moespan.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Modules that make objects, or code, of bytes.
MODULES = {
    "cloudpickle", "code", "codeop", "dill", "imp", "joblib", "marshal", "multiprocessing",
    "pickle", "pickletools", "runpy", "shelve", "transformers", "yaml", "zipimport",
}  # fmt: skip
# Calls by the last part of their name.
CALLS = {
    "eval", "exec", "compile", "execfile", "__import__", "import_module", "exec_module",
    "load_module", "spec_from_file_location", "module_from_spec", "run_path", "run_module",
    "system", "popen", "all_gather_object", "broadcast_object_list",
    "gather_object", "scatter_object_list", "send_object_list", "recv_object_list",
}  # fmt: skip
# Calls by their whole name.
DOTTED_CALLS = {"torch.load", "torch.jit.load", "torch.package", "np.load", "numpy.load"}
# Of `re` and of patterns; it compiles no code.
HARMLESS_CALLS = {"re.compile"}
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` as it is written; "" in place of what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def offences(code: str) -> Iterator[str]:
    """Every way in `code` by which data could become code."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *names]
            for name in names:
                if name.partition(".")[0] in MODULES | {"system", "import_module"}:
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in DOTTED_CALLS or (
                name.rpartition(".")[2] in CALLS and name not in HARMLESS_CALLS
            ):
                yield f"line {node.lineno}: call of {name}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in KEYWORDS and not is_false:
                    yield f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_source_file_makes_code_of_data(file: Path):
    assert list(offences(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, pickle",
        "from pickle import loads",
        "from torch import multiprocessing",
        "import multiprocessing.connection",
        "eval(text)",
        "builtins.exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "importlib.import_module(name)",
        "importlib.util.spec_from_file_location(name, path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "load(path, allow_pickle=flag)",
        "dist.broadcast_object_list(objects)",
    ],
)
def test_the_search_finds(code: str):
    assert len(list(offences(code))) == 1


@pytest.mark.parametrize(
    "code",
    ["import re", "re.compile(text)", "f(trust_remote_code=False)", "importlib.util.find_spec(n)"],
)
def test_the_search_passes_over(code: str):
    assert list(offences(code)) == []


def test_the_search_sees_all_of_the_package():
    assert {"settings.py", "llm.py", "tokenizer.py", "rank.py"} <= {file.name for file in FILES}


TRAP = """
from pathlib import Path
Path({marker!r}).touch()
raise SystemExit("code of a checkpoint was run")
"""


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """The quickstart model, with every way by which a checkpoint asks that its code be run."""
    folder = tmp_path / "trapped"
    shutil.copytree(QUICKSTART, folder)
    trap = TRAP.format(marker=str(tmp_path / "sprung"))
    for name in ("modeling_trap", "configuration_trap", "tokenization_trap", "setup", "conftest"):
        (folder / f"{name}.py").write_text(trap)
    for file, auto_map in {
        "config.json": {
            "AutoConfig": "configuration_trap.TrapConfig",
            "AutoModelForCausalLM": "modeling_trap.TrapForCausalLM",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_trap.TrapTokenizer", None]},
    }.items():
        raw = json.loads((folder / file).read_text())
        raw |= {"auto_map": auto_map, "trust_remote_code": True}
        (folder / file).write_text(json.dumps(raw))
    return folder


def test_code_that_a_checkpoint_brings_stays_inert(
    trapped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(trapped)
    with LLM(".", device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        assert llm.generate("347+85=", params)[0].outputs[0].text == "432"
        conversation = [{"role": "user", "content": "12+30="}]
        assert llm.chat(conversation, params)[0].outputs[0].text == " 42"
    with pytest.raises(SystemExit) as exit_:
        main(["info", "."])
    assert exit_.value.code == 0
    assert not (tmp_path / "sprung").exists()
    assert not [name for name in sys.modules if name.endswith("_trap")]
    assert not [*trapped.rglob("__pycache__")]
    capsys.readouterr()


def test_auto_map_changes_nothing_of_the_model(trapped: Path):
    assert ModelConfig.from_pretrained(trapped) == ModelConfig.from_pretrained(QUICKSTART)


def test_a_pickle_checkpoint_is_refused_unopened(trapped: Path, tmp_path: Path):
    (trapped / "model.safetensors").unlink()
    marker = tmp_path / "sprung"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(marker),)

    bomb = pickle.dumps(Bomb())
    pickle.loads(bomb)
    marker.rmdir()  # it works
    (trapped / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="are never opened here; convert them"):
        LLM(str(trapped), device="cpu")
    assert not marker.exists()
