"""The quickstart model's training goes on after an interruption as if there had been none."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "quickstart"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch):
    """tools/quickstart/train.py as a module, without its evaluations."""
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("quickstart_train", TOOLS / "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "report", lambda *_, **__: None)
    yield module
    sys.modules.pop("tasks", None)


def train(training, work_dir: Path) -> dict[str, torch.Tensor]:
    """Trains a network of a few thousand weights for six steps; its weights."""
    work_dir.mkdir(exist_ok=True)
    arguments = argparse.Namespace(
        work_dir=work_dir,
        steps=6,
        horizon=8,
        cooldown=3,
        warmup=2,
        rows=2,
        length=128,
        lr=2.5e-3,
        prompt_weight=0.05,
        eval_every=3,
        seed=0,
    )
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    network = training.Network({**training.CONFIG, **small, "num_hidden_layers": 2})
    tokenizer = Tokenizer.from_file(str(ROOT / "models" / "quickstart" / "tokenizer.json"))
    training.train(network, tokenizer, arguments)
    return network.state_dict()


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    expected = train(training, tmp_path / "whole")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(training, tmp_path / "cut")
    weights = train(training, tmp_path / "cut")

    assert "going on from step 3" in capsys.readouterr().out
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["state.safetensors"]
