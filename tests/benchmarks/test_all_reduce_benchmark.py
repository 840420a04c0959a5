"""The script that times all-reduces: what it finds wrong, and what size it names."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moespan.parallel.mesh import Axis
from moespan.parallel.one_shot import OneShotSum
from tests.support import CPU

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import all_reduce
from all_reduce import Row, bound


def test_the_bound_is_where_one_shot_is_slower_first():
    faster, slower, absent = ((2.0, 1.0), (1.0, 2.0), (1.0, None))
    for times, expected in (
        ([faster, faster, faster], 300),
        ([faster, faster, slower], 200),
        ([faster, slower, faster], 100),
        ([slower, faster, faster], 0),
        ([faster, absent, absent], 100),
        ([absent, absent, absent], 0),
    ):
        rows = [Row(100 * (i + 1), *pair, is_right=True) for i, pair in enumerate(times)]
        assert bound(rows) == bound(rows[::-1]) == expected


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_a_sum_that_is_off_by_a_rounding_is_wrong_in_one_shot(
    monkeypatch: pytest.MonkeyPatch, error: float
):
    """The other rank is not there, and adds nothing."""
    monkeypatch.setattr(all_reduce, "ROWS", (1, 4))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    short = mock.create_autospec(OneShotSum, instance=True)
    short.takes.side_effect = lambda x: len(x) < 4
    short.side_effect = lambda x: x * (1 + error)
    axis = Axis(ranks=(0, 1), one_shot=short)
    rows = list(all_reduce.measure(Axis(), axis, 8, torch.float32, CPU))
    assert [row.message_bytes for row in rows] == [32, 128]
    assert [row.one_shot_s is None for row in rows] == [False, True]
    assert [row.is_right for row in rows] == [error == 0, True]
