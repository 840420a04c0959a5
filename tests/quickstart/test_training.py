"""The quickstart model's training goes on after an interruption as if there had been none."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.quickstart.files import MODEL, train


@pytest.fixture(autouse=True)
def no_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "report", lambda *_, **__: None)


def run(work_dir: Path) -> dict[str, torch.Tensor]:
    """Trains a tiny network for six steps; its weights."""
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
    network = train.Network({**train.CONFIG, **small, "num_hidden_layers": 2})
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    train.train(network, tokenizer, arguments)
    return network.state_dict()


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    expected = run(tmp_path / "whole")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    weights = run(tmp_path / "cut")

    assert "going on from step 3" in capsys.readouterr().out
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["state.safetensors"]
