"""The leader says how far loading is, also where no terminal shows a bar."""

from __future__ import annotations

import pytest

from moespan.engine.build import _ProgressLines


def test_loading_is_told_every_ten_seconds(caplog: pytest.LogCaptureFixture):
    now = [0.0]
    caplog.set_level("INFO", logger="moespan")
    progress = _ProgressLines(40_000_000_000, lambda: now[0])
    for _ in range(8):
        now[0] += 3.0
        progress(4_000_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "loading: 16.0 of 40.0 GB are read (40%)",
        "loading: 32.0 of 40.0 GB are read (80%)",
    ]
