"""Every option is declared once, and every verb judges the configuration that would start."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moespan import LLM
from moespan.cli import _parser
from moespan.cli.flags import add_settings_flags, settings_of
from moespan.config import EngineConfig, EngineOptions, Layout, Nodes
from moespan.device import DEVICES
from moespan.errors import ConfigError, LayoutError
from moespan.front.settings import PYTHON_ONLY, Settings
from tests.support import QUICKSTART

MODEL = str(QUICKSTART)


def field_names(kind: type[Any]) -> set[str]:
    return {field.name for field in fields(kind)}


def flags_of_settings() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_settings_flags(parser)
    return parser


def resolved(**options: Any) -> EngineConfig:
    return Settings(MODEL, **{"device": "cpu", **options}).resolve().engine_config


def test_every_field_has_a_flag_or_is_named_as_python_only_and_every_flag_is_a_field():
    flags = {action.dest for action in flags_of_settings()._actions} - {"help"}
    assert flags == field_names(Settings) - PYTHON_ONLY
    assert field_names(Settings) >= PYTHON_ONLY


def test_no_flag_has_a_default_of_its_own():
    actions = [action for action in flags_of_settings()._actions if action.dest != "help"]
    assert {action.default for action in actions} == {argparse.SUPPRESS}
    assert settings_of(flags_of_settings().parse_args(["M"])) == Settings("M")


def test_a_field_is_declared_in_one_place():
    bases = [EngineOptions, Nodes]
    own = set(Settings.__annotations__) - {"_"}
    assert sum((len(field_names(base)) for base in bases), len(own)) == len(field_names(Settings))
    assert not set(EngineConfig.__annotations__) & field_names(EngineOptions)


def test_every_option_is_described():
    # Python 3.13 takes the indentation off docstrings, and `getdoc` does elsewhere.
    words = " ".join(str(inspect.getdoc(kind)) for kind in (Settings, EngineOptions, Nodes))
    missing = [name for name in field_names(Settings) if f"\n    {name}: " not in words]
    assert not missing


def test_llm_takes_the_options_by_name_and_shows_them():
    shown = inspect.signature(LLM).parameters
    assert next(iter(shown)) == "model"
    assert set(shown) == field_names(Settings)
    with pytest.raises(TypeError, match="tensor_parallel_siz"):
        LLM(MODEL, tensor_parallel_siz=2)  # type: ignore[call-arg]


def test_type_checkers_know_the_keywords_of_llm(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        "from moespan import LLM\n"
        "LLM('m', tensor_parallel_size=2, max_num_seqs=None)\n"
        "LLM('m', tensor_parallel_siz=2)\n"
        "LLM('m', max_num_seqs='3')\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary"]
    ran = subprocess.run([*mypy, str(program)], capture_output=True, text=True)
    lines = [line.partition("program.py:")[2] for line in ran.stdout.splitlines()]
    assert [line.partition(":")[0] for line in lines if "error" in line] == ["3", "4"], ran.stdout


def test_options_reach_the_ranks_as_given():
    config = resolved(kv_cache_dtype="int8", seed=7, enforce_eager=True, max_model_len=64)
    assert (config.kv_cache_dtype, config.seed, config.enforce_eager) == ("int8", 7, True)
    assert (config.max_model_len, config.model) == (64, str(QUICKSTART.resolve()))
    _, _, nodes = Settings(MODEL, nnodes=3, node_rank=2, silence_s=5.0).resolve(to_run=False)
    assert nodes == Nodes(nnodes=3, node_rank=2, silence_s=5.0)


@pytest.mark.parametrize("device", DEVICES)
def test_defaults_suit_the_model_and_the_device(device: str):
    config = Settings(MODEL, device=device).resolve(to_run=False).engine_config
    assert config.block_size == DEVICES[device].block_size
    assert (config.dtype, config.max_model_len) == ("bfloat16", 512)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 64),
        ({"max_num_batched_tokens": 32}, 32),
        ({"max_num_batched_tokens": 4096}, 64),
        ({"max_num_seqs": 128}, 128),
    ],
)
def test_a_step_has_room_for_a_token_of_each_sequence(options: dict[str, Any], expected: int):
    assert resolved(**options).max_num_seqs == expected


def test_a_small_step_is_taken_from_python_as_on_the_command_line():
    with LLM(MODEL, device="cpu", max_num_batched_tokens=32) as llm:
        assert llm.config.max_num_seqs == 32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size='2' must be an integer"),
        ({"tensor_parallel_size": 2.0}, "tensor_parallel_size=2.0 must be an integer"),
        ({"pipeline_parallel_size": True}, "pipeline_parallel_size=True must be an integer"),
        ({"max_num_seqs": "3"}, "max_num_seqs='3' must be an integer or None"),
        ({"join_timeout_s": "x"}, "join_timeout_s='x' must be a number"),
        ({"enforce_eager": 1}, "enforce_eager=1 must be True or False"),
        ({"pipeline_layers": "2,2"}, "pipeline_layers='2,2' must be None or a list of integers"),
        ({"pipeline_layers": [1, "3"]}, "pipeline_layers=[1, '3'] must be a list of integers"),
        ({"dtype": None}, "dtype=None must be text"),
        ({"expert_placement": {"default": []}}, "expert_placement={'default': []} must be text"),
    ],
)
def test_an_option_of_the_wrong_type_is_named(options: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        Settings(MODEL, **options)
    assert says in str(caught.value)


def test_numbers_and_paths_of_other_libraries_are_taken():
    settings = Settings(QUICKSTART, tensor_parallel_size=np.int64(2), pipeline_layers=(1, 3))  # type: ignore[arg-type]
    assert (settings.model, settings.tensor_parallel_size) == (MODEL, 2)
    assert Settings(MODEL, join_timeout_s=5).join_timeout_s == 5


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("tp", "did you mean tensor_parallel_size?"),
        ("tensor_paralel_size", "did you mean tensor_parallel_size?"),
        ("gpu_memory_utilization", r"help\(LLM\) names them all"),
    ],
)
def test_an_option_that_does_not_exist_names_the_nearest_one(option: str, hint: str):
    wrong: dict[str, Any] = {option: 2}
    with pytest.raises(TypeError, match=f"LLM has no option '{option}'; {hint}"):
        LLM(MODEL, **wrong)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu"}, "device='tpu' is not one of auto, npu, cuda, cpu"),
        ({"dtype": "int8"}, "dtype='int8' is not one of auto, float32"),
        ({"load_format": "pickle"}, "load_format='pickle' is not one of auto"),
        ({"moe_dispatch": "fast"}, "moe_dispatch='fast' is not one of"),
        ({"trust_remote_code": True}, "trust_remote_code is refused"),
        ({"nnodes": 0}, "nnodes=0 must be at least 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 must be at least 1"),
    ],
)
def test_an_option_that_is_wrong_by_itself_is_refused_at_once(options: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        Settings(MODEL, **options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expert_placement": "/nonexistent.json"}, "/nonexistent.json is neither"),
        ({"moe_dispatch": "all_to_all"}, "moe_dispatch=all_to_all does not apply to layout tp=1"),
        ({"max_model_len": 513}, "max_model_len=513 exceeds the model's max_position_embeddings"),
        ({"tensor_parallel_size": 3}, "tp=3 does not divide num_attention_heads=8"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("to_run", [True, False])
def test_options_that_do_not_go_together_are_refused_for_every_verb(
    options: dict[str, Any], says: str, to_run: bool
):
    with pytest.raises((ConfigError, LayoutError)) as caught:
        Settings(MODEL, **{"device": "cpu", **options}).resolve(to_run=to_run)
    assert says in str(caught.value)


VERBS = {
    "generate": ["--prompt", "1+1="],
    "bench": [],
    "verify": [],
    "doctor": [],
    "generate --print-env": ["--print-env"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_judges_the_configuration_that_would_run(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    placement = tmp_path / "placement.json"
    placement.write_text(json.dumps({"default": [[*range(12)], [*range(12, 16)]]}))
    flags = ["-tp", "2", "-ep", "2", "--expert-placement", str(placement), "--block-size", "64"]
    flags += ["--no-prefix-caching", "--num-blocks", "99", "--check-finite", "--device", "cpu"]
    asked = ["--max-num-seqs", "64"]  # bench would make room for its largest batch
    seen: list[EngineConfig] = []
    original = Settings.resolve

    def spy(self: Settings, *, to_run: bool = True) -> Any:
        found = original(self, to_run=to_run)
        seen.append(found.engine_config)
        raise KeyboardInterrupt

    monkeypatch.setattr(Settings, "resolve", spy)
    args = [verb.split()[0], MODEL, *flags, *asked, *VERBS[verb]]
    with pytest.raises(SystemExit):
        from moespan.cli import main

        main(args)
    config = seen[0]
    assert config.layout == Layout(tp=2, ep=2)
    assert config.expert_placement == json.loads(placement.read_text())
    assert (config.block_size, config.num_blocks, config.max_num_seqs) == (64, 99, 64)
    assert (config.enable_prefix_caching, config.check_finite) == (False, True)


@pytest.mark.parametrize(
    "option",
    [
        {"device": "cpu", "batch_invariant": True},
        {"npu_weight_format": "nz"},
        {"npu_maskless_decode": True},
        {"npu_scatter_prefill": 3},
        {"npu_fused_all_reduce": 3},
        {"moe_dispatch": "fused", "npu_hierarchical_dispatch": True},
    ],
    ids=str,
)
def test_a_reference_in_float32_leaves_out_what_needs_16_bits(option: dict[str, Any]):
    asked = Settings(MODEL, **{"device": "npu", "dtype": "bfloat16", "npu_aiv": True, **option})
    if asked.device == "cpu":
        asked = replace(asked, npu_aiv=False)
    with pytest.raises(ConfigError):
        replace(asked, dtype="float32").resolve(to_run=False)
    config = asked.in_float32().resolve(to_run=False).engine_config
    assert (config.dtype, config.npu_aiv) == ("float32", asked.npu_aiv)


def test_the_doctor_refuses_an_expert_placement_that_generate_refuses(
    capsys: pytest.CaptureFixture[str],
):
    from moespan.cli import main

    flags = ["-tp", "2", "-ep", "2", "--expert-placement", "/nonexistent.json"]
    for verb in (["doctor"], ["generate", "--prompt", "a"]):
        with pytest.raises(SystemExit) as exit_:
            main([verb[0], MODEL, *flags, "--block-size", "64", *verb[1:]])
        assert exit_.value.code == 2
        assert "/nonexistent.json is neither contiguous nor round_robin nor a file" in (
            capsys.readouterr().err
        )


def test_a_length_of_0_is_refused_without_a_model_too():
    with pytest.raises(ConfigError, match="max_model_len=0 must be at least 1"):
        Settings(max_model_len=0).resolve(to_run=False)


def test_another_layout_leaves_all_other_settings_alone():
    settings = Settings(MODEL, enable_expert_parallel=True, max_num_seqs=5, pipeline_layers=[4])
    moved = settings.with_layout(Layout(tp=2, pp=2, pipeline_layers=(1, 3)))
    assert (moved.tensor_parallel_size, moved.pipeline_parallel_size) == (2, 2)
    assert (moved.pipeline_layers, moved.enable_expert_parallel) == ((1, 3), False)
    assert (moved.model, moved.max_num_seqs) == (MODEL, 5)


def test_parsing_leaves_the_arguments_as_they_were():
    args = _parser().parse_args(["bench", MODEL, "--decode-batch", "99"])
    before = dict(vars(args))
    settings_of(args, max_num_batched_tokens=3)
    assert vars(args) == before


@pytest.mark.parametrize("module", ["settings", "start", "prompts"])
def test_a_server_can_use_a_module_of_the_front_without_torch_and_without_llm(module: str):
    code = (
        f"import moespan.front.{module}, sys\n"
        "assert not {'torch', 'moespan.front.llm', 'moespan.front.batch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
