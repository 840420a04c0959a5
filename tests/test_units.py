"""Numbers for people."""

from __future__ import annotations

import pytest

from moespan.units import COUNTS, bytes_in_words, scaled


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (3_771_216, "3.77 MB"),
        (32_751_456_256, "32.75 GB"),
        (5e15, "5000.00 TB"),
    ],
)
def test_bytes_have_the_largest_unit_that_they_fill(number: float, text: str):
    assert bytes_in_words(number) == text


def test_a_small_count_has_no_unit():
    assert [scaled(n, COUNTS, 3) for n in (12, 12_345)] == ["12", "12.345 K"]
