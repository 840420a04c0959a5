"""How far llama.cpp is from float32: the divergence of a GGUF file's logits from a reference.

    moespan verify CHECKPOINT --device cpu --dtype float32 --write-reference \\
        --reference f32.safetensors --prompt "..." "..."
    LLAMA/bin/python benchmarks/peer_formats.py gguf CHECKPOINT q4_0.gguf --type q4_0
    LLAMA/bin/python benchmarks/peer_divergence.py f32.safetensors q4_0.gguf ...
    moespan verify CHECKPOINT --device cpu --quantization int4 --reference f32.safetensors

The last command has the same figures for moespan. The third needs llama-cpp-python, torch and
safetensors, and nothing of moespan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peer_engines import Job, LlamaCpp
from safetensors.torch import load_file
from torch import Tensor


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ logits) in nats [T], of logits [T, V]."""
    ours, theirs = (one.double().log_softmax(-1) for one in (reference, logits))
    return (ours.exp() * (ours - theirs)).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path, metavar="REFERENCE.safetensors")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    held = load_file(args.reference)
    prompts = sorted(name.removesuffix(".ids") for name in held if name.endswith(".ids"))
    print("| file | mean KL, nats | max KL | top-1 |", "|---|---|---|---|", sep="\n")
    for model in args.models:
        engine = LlamaCpp(Job(str(model), args.threads))
        found, agreed = [], []
        for name in prompts:
            wanted = held[f"{name}.logits"]
            logits = torch.from_numpy(engine.logits(held[f"{name}.ids"].tolist()))
            found.append(divergences(wanted, logits))
            agreed.append(wanted.argmax(-1) == logits.argmax(-1))
        kl, top_1 = torch.cat(found), torch.cat(agreed).double().mean()
        print(f"| {model.name} | {kl.mean():.1e} | {kl.max():.1e} | {top_1:.1%} |", flush=True)


if __name__ == "__main__":
    main()
