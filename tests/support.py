"""What several tests share: the oracles, small geometries, and a driver that runs prompts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.checkpoint.random import RandomSource
from moespan.checkpoint.source import SafetensorsSource, Source
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.engine.step import PromptRow, SampleRow, StepPlan, StepPlans, StepResult
from moespan.engine.worker import Worker
from moespan.ops import CpuOps, Ops
from moespan.parallel.mesh import Mesh

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data"
QUICKSTART = Path(__file__).parents[1] / "models" / "quickstart"
ORACLES = ("tiny", "tiny_gqa", "sixteen")

_GEOMETRY: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 26,
    "max_position_embeddings": 256,
    "model_type": "deepseek",
    "moe_intermediate_size": 10,
    "moe_layer_freq": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 61,
}


WHOLE_GROUPS = {"intermediate_size": 96, "moe_intermediate_size": 32}
"""Overrides of a `geometry` whose rows are to be rounded in groups of 32."""


def geometry(**overrides: Any) -> dict[str, Any]:
    """A `config.json` of a model so small that it runs in no time."""
    unknown = overrides.keys() - _GEOMETRY.keys()
    assert not unknown, unknown
    return {**_GEOMETRY, **overrides}


class Oracle:
    """A checkpoint with what the Hugging Face model computes from it: see data/README.md."""

    def __init__(self, name: str) -> None:
        self.folder = DATA / "oracle" / name
        self.config = ModelConfig.from_pretrained(self.folder)
        with safe_open(str(self.folder / "ref" / "ref_logits.safetensors"), "pt") as handle:
            self.tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        self.names = sorted(key[:-4] for key in self.tensors if key.endswith(".ids"))
        self.prompts = [self.tensors[f"{name}.ids"].tolist() for name in self.names]
        self.logits = [self.tensors[f"{name}.logits"].numpy() for name in self.names]
        self.greedy = [self.tensors[f"{name}.greedy"].tolist() for name in self.names]

    def source(self) -> SafetensorsSource:
        return SafetensorsSource(self.folder, self.config)


def write_config(folder: Path, **overrides: Any) -> Path:
    """Make `folder` a checkpoint for dummy weights: a config.json of the small geometry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(geometry(**overrides)))
    return folder


def altered_checkpoint(
    source: Path, target: Path, name: str, change: Callable[[torch.Tensor], object]
) -> Path:
    """Copy a checkpoint to `target`, with `change` applied to the tensor `name`."""
    shutil.copytree(source, target)
    for file in target.glob("model*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, metadata={"format": "pt"})
            return target
    raise AssertionError(f"{source} has no {name}")


def make_worker(
    config: ModelConfig,
    source: Source | None = None,
    mesh: Mesh | None = None,
    *,
    ops: Ops | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    block_size: int = 4,
    num_blocks: int = 256,
    enforce_eager: bool = False,
    expert_stats: bool = False,
) -> Worker:
    """One rank's worker, with NaN in every slot of its cache: what is read must be written first.

    Without a source it has random weights, without a mesh it is the only rank.
    """
    torch_dtype = getattr(torch, dtype)
    mesh = mesh or Mesh.create(Layout(), CPU)
    ops = ops or CpuOps()
    source = source or RandomSource(config, torch_dtype, seed=0)
    placement = place(config, mesh.layout, mesh.rank, quantization=quantization)
    weights, _ = load_weights(placement, source, torch_dtype, mesh.device, new_builder=ops.builder)
    settings = EngineConfig(
        "unused",
        mesh.layout,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        max_model_len=256,
        enforce_eager=enforce_eager,
        expert_stats=expert_stats,
    )
    worker = Worker(settings, config, mesh, ops, weights, num_blocks)
    for caches in worker.caches:
        for cache in caches.tensors:
            if cache.is_floating_point():  # scales, where the rest is integers
                cache.fill_(torch.nan)
    return worker


def execute(worker: Worker, plan: StepPlan) -> StepResult:
    """The result of a plan on the only rank of its world."""
    pending = worker.execute(StepPlans.of([plan]))
    assert pending is not None
    return pending.wait()


def greedy_row(**settings: Any) -> SampleRow:
    """Sample greedily unless `settings` say otherwise."""
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
    return SampleRow(**{**neutral, **settings})


def sampling_of(sequences: Iterable[int], *rows: SampleRow) -> dict[str, Any]:
    """The fields of a plan that samples the first token after `sequences`, greedily or as `rows`
    say."""
    sampled = list(sequences)
    samples = list(rows) or [greedy_row()] * len(sampled)
    return {"sampled": sampled, "positions": [0] * len(sampled), "samples": samples}


@dataclass
class Run:
    """One sequence as `run_prompts` computes it."""

    token_ids: list[int]
    prompt_len: int
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)

    @property
    def logits(self) -> np.ndarray:
        """Logits of the prompt's tokens, float32 [T, V]."""
        return np.concatenate(self.rows)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.prompt_len :]


def run_prompts(
    worker: Worker,
    prompts: list[list[int]],
    *,
    block_size: int = 4,
    num_blocks: int = 256,
    most_chunk: int = 256,
    num_generated: int = 0,
    seed: int = 0,
) -> list[Run]:
    """Compute all prompts' logits and continue them greedily.

    Each step takes random sequences, of each prompt a random chunk of at most `most_chunk` tokens;
    blocks are handed out in random order as they are needed, so those of sequences interleave.
    """
    rng = random.Random(seed)
    free_blocks = rng.sample(range(num_blocks), num_blocks)
    runs = [Run(list(prompt), len(prompt)) for prompt in prompts]
    step = 0
    while True:
        unfinished = [run for run in runs if run.num_computed < run.prompt_len + num_generated]
        if not unfinished:
            return runs
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        query_lens, sampled, prompt_rows, token_ids = [], [], [], []
        for at, run in enumerate(chosen):
            left = len(run.token_ids) - run.num_computed
            query_lens.append(rng.randint(1, min(left, most_chunk)))
            end = run.num_computed + query_lens[-1]
            token_ids += run.token_ids[run.num_computed : end]
            while len(run.block_table) * block_size < end:
                run.block_table.append(free_blocks.pop())
            if run.num_computed < run.prompt_len:
                prompt_rows.append(PromptRow(sequence=at, targets=[], logprobs=None, logits=True))
            if end == len(run.token_ids):
                sampled.append(at)
        plan = StepPlan(
            step=step,
            token_ids=token_ids,
            query_lens=query_lens,
            context_lens=[run.num_computed for run in chosen],
            block_tables=[list(run.block_table) for run in chosen],
            prompts=prompt_rows,
            **sampling_of(sampled),
        )
        result = execute(worker, plan)
        step += 1
        for row, scores in zip(prompt_rows, result.prompts, strict=True):
            logits = np.frombuffer(scores.logits, np.float32)
            chosen[row.sequence].rows.append(logits.reshape(query_lens[row.sequence], -1))
        for run, query_len in zip(chosen, query_lens, strict=True):
            run.num_computed += query_len
        for at, sample in zip(sampled, result.samples, strict=True):
            run = chosen[at]
            assert sample.token_id is not None
            if run.num_computed < run.prompt_len + num_generated:
                run.token_ids.append(sample.token_id)


def assert_close(ours: np.ndarray, theirs: np.ndarray, relative: float) -> None:
    """No element differs by more than `relative` of the largest one of `theirs`."""
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    # Written so that a NaN fails.
    assert worst <= relative, f"differs by {worst:.2e} of the largest element"
