"""Tests that fail because of faults in the product that the stricter simulator finds.

Each line goes when its fault is fixed; a test that passes then fails here (`strict`).
"""

from __future__ import annotations

import re

import pytest

FLOAT32 = "the KV cache is written in float32 by an operator that takes 16-bit types and int8 only"
ONE_GROUP = "a grouped matmul of one expert gets its count instead of its end"
FAULTS = {
    r"TestNpuOps::test_rope_to_cache\[\d+-\d+-[19]-dtype0\]": FLOAT32,
    r"TestNpuOps::test_attention_over_the_paged_cache\[\d-\d-\[\d.*-dtype0\]": FLOAT32,
    r"test_greedy_continuations_are_those_of_the_hugging_face_model\[": FLOAT32,
    r"test_layouts_over_hccl_compute_.*\[[148]\]": FLOAT32,
    r"TestNpuOps::test_experts\[23-5-1-7-3-": ONE_GROUP,
}


def pytest_collection_modifyitems(items):
    for item in items:
        for pattern, reason in FAULTS.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
