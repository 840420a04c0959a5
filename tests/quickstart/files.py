"""The quickstart model and the scripts that made it, which are no package, as modules."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "quickstart"
TOOLS = ROOT / "tools" / "quickstart"

# The scripts find each other where they lie, as when they are run.
sys.path.insert(0, str(TOOLS))
import tasks  # noqa: E402
import train  # noqa: E402

__all__ = ["MODEL", "TOOLS", "tasks", "train"]
