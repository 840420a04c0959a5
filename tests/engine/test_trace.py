"""Two recordings of a prompt are compared value by value, in the network's order."""

from __future__ import annotations

import numpy as np

from moespan.engine.trace import Observation, first_difference, join_rows


def seen(layer: int, module: str, values: list[list[float]]) -> Observation:
    array = np.array(values, np.float32)
    return Observation(layer, module, array.shape[1], array.tobytes())


RECORDING = [
    seen(-1, "embed", [[1, 2], [3, 4]]),
    seen(0, "attention", [[0, 0], [0, 0]]),
    seen(0, "hidden", [[1, -8], [2, 2], [4, 4]]),
]


def changed(at: int, values: list[list[float]]) -> list[Observation]:
    one = RECORDING[at]
    return [*RECORDING[:at], seen(one.layer, one.module, values), *RECORDING[at + 1 :]]


def test_equal_recordings_have_no_difference():
    assert first_difference(RECORDING, list(RECORDING), 0.0) is None


def test_the_first_value_and_the_first_token_that_differ_are_named():
    ours = changed(2, [[1, -8], [2, 2.5], [5, 4]])
    assert first_difference(ours, RECORDING, 1e-3) == (
        "layer 0, hidden: first at token 1, by 1.2e-01 of the largest value"
    )
    ours = [*changed(0, [[1, 2], [3, 5]])[:1], *ours[1:]]
    assert first_difference(ours, RECORDING, 1e-3) == (
        "embed: first at token 1, by 2.5e-01 of the largest value"
    )


def test_a_difference_counts_as_a_share_of_the_largest_value():
    ours = changed(2, [[1, -8], [2, 2], [4, 4.007]])
    assert first_difference(ours, RECORDING, 1e-3) is None
    assert first_difference(ours, RECORDING, 8e-4) is not None
    assert first_difference(changed(1, [[0, 0], [0, 1e-2]]), RECORDING, 1e-3) is not None


def test_nan_and_infinity_differ_from_every_number():
    for bad in (np.nan, np.inf):
        ours = changed(2, [[1, -8], [2, bad], [4, 4]])
        found = first_difference(ours, RECORDING, 1e-3)
        assert found is not None and found.startswith("layer 0, hidden: first at token 1")


def test_a_missing_value_or_another_shape_is_a_difference():
    assert first_difference(RECORDING[:1], RECORDING, 1.0) == "layer 0, attention: missing"
    ours = changed(2, [[1, -8], [2, 2]])
    assert first_difference(ours, RECORDING, 1.0) == (
        "layer 0, hidden: shape (2, 2) instead of (3, 2)"
    )


def test_values_only_in_ours_are_not_compared():
    assert first_difference(RECORDING, RECORDING[2:], 0.0) is None


def test_rows_of_ranks_are_joined_in_their_order():
    first = [seen(0, "hidden", [[1, 2]]), seen(1, "hidden", [[7, 7]])]
    second = [seen(0, "hidden", [[3, 4], [5, 6]]), seen(1, "hidden", [[8, 8], [9, 9]])]
    joined = join_rows([first, second])
    assert [one.values.tolist() for one in joined] == [
        [[1, 2], [3, 4], [5, 6]],
        [[7, 7], [8, 8], [9, 9]],
    ]
    assert [str(one) for one in joined] == ["layer 0, hidden", "layer 1, hidden"]
    assert join_rows([first]) == first
