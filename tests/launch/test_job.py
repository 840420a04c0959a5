"""Programs of ours start in whatever directory the user stands in, and import nothing from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from moespan.launch.job import module_arguments


def test_a_module_of_ours_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("raise SystemExit('imported from here')")
    done = subprocess.run(
        [sys.executable, *module_arguments("moespan.measure.probe")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert "imported from here" not in done.stderr
    assert "missing 2 required positional arguments" in done.stderr
