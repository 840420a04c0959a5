"""Modules that a start must not load. Modules are counted, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
HEAVY = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "tqdm", "hypothesis", "asyncio"}


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after running `code`."""
    program = [sys.executable, "-c", f"{code}\n{LOADED}", *arguments]
    ran = subprocess.run(program, check=True, capture_output=True, text=True)
    return set(json.loads(ran.stderr.splitlines()[-1]))


def test_importing_moespan_loads_nothing_else_of_it_and_no_library():
    before = loaded_by("pass")
    added = {name for name in loaded_by("import moespan") - before if "." not in name}
    assert {name for name in added if name not in sys.stdlib_module_names} == {"moespan"}
    assert not any(name.startswith("moespan.") for name in loaded_by("import moespan"))


@pytest.mark.parametrize("verb", [[], ["generate"], ["doctor"]])
def test_help_loads_no_heavy_library(verb: list[str]):
    code = (
        "import sys, moespan.cli\ntry:\n    moespan.cli.main(sys.argv[1:])\nexcept SystemExit: pass"
    )
    assert not loaded_by(code, *verb, "--help") & HEAVY


def test_a_name_of_the_package_is_loaded_when_it_is_used():
    assert "moespan.front.llm" in loaded_by("import moespan\nmoespan.LLM")
