"""Presets are configs that the engine runs. They need no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from moespan.checkpoint.presets import PRESETS, preset
from moespan.config import ModelConfig
from moespan.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models_that_the_engine_runs(name: str):
    config = ModelConfig.from_dict(preset(name, {}))
    assert config.num_moe_layers > 0
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("huge", {}, "preset 'huge' is not one of 16b, 16b-4l, tiny"),
        ("tiny", {"hiden_size": 64}, "hiden_size is not a key of preset tiny; keys: "),
        ("tiny", {"hidden_size": 100}, "hidden_size=100 is not a multiple"),
        ("tiny", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not implemented"),
    ],
)
def test_presets_refuse_what_the_engine_would(name: str, overrides: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        preset(name, overrides)
    assert said in str(caught.value)


def test_overrides_leave_the_preset_as_it_was():
    before = dict(PRESETS["tiny"])
    assert preset("tiny", {"num_hidden_layers": 2})["num_hidden_layers"] == 2
    assert PRESETS["tiny"] == before


def test_presets_need_no_torch():
    code = "import moespan.checkpoint.presets, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
