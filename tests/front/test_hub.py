"""A model's name becomes a folder; a hub client is asked only if it cannot be a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moespan.errors import ConfigError
from moespan.front.hub import resolve

CLIENT = """
from pathlib import Path

def snapshot_download(model, allow_patterns):
    if model == "org/missing":
        raise RuntimeError("404: no such model\\nmany more lines")
    folder = Path({folder!r}) / {name!r}
    folder.mkdir(exist_ok=True)
    (folder / "asked").write_text(" ".join([model, *allow_patterns]))
    return str(folder)
"""


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for both hub clients; each downloads into a folder of its own name."""
    for name in ("huggingface_hub", "modelscope"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        code = CLIENT.format(folder=str(tmp_path), name=f"from {name}")
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delenv("MOESPAN_USE_MODELSCOPE", raising=False)
    yield tmp_path
    for name in ("huggingface_hub", "modelscope"):
        sys.modules.pop(name, None)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: Path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path / "org")) == tmp_path / "org"
    assert resolve("org/name") == Path("org/name")  # though it looks like a hub name
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["missing", "./a/b", "/a/b", "a/b/c", "~/a/b", "~no-such-user/x", "a/../../b", "a\0b"]
)
def test_a_name_that_looks_like_a_path_never_reaches_a_hub(clients: Path, name: str):
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(name)
    assert not [*clients.glob("from *")]


def test_a_file_is_refused(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match=r"is a file; give the checkpoint's folder"):
        resolve(str(file))


def test_a_hub_is_asked_for_weights_configs_and_templates_and_never_for_code(clients: Path):
    folder = resolve("org/name")
    assert folder == clients / "from huggingface_hub"
    assert (folder / "asked").read_text() == "org/name *.safetensors *.json *.jinja"


def test_the_other_hub_is_asked_on_request(clients: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESPAN_USE_MODELSCOPE", "1")
    assert resolve("org/name") == clients / "from modelscope"


def test_a_failed_download_is_one_line(clients: Path):
    with pytest.raises(ConfigError) as caught:
        resolve("org/missing")
    assert str(caught.value) == (
        "org/missing is not a folder here, and huggingface_hub could not download it: "
        "404: no such model"
    )


def test_without_a_client_the_way_to_get_one_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[hub\]'"):
        resolve("org/name")
