"""Writes a DeepSeek-MoE checkpoint in the formats that other engines read: GGUF, and W8A8.

    python benchmarks/peer_formats.py gguf CHECKPOINT OUT.gguf --type q8_0
    python benchmarks/peer_formats.py w8a8 CHECKPOINT OUT_FOLDER

`peers.py run` calls it in the virtual environment of the engine in question. It imports nothing of
moespan; it needs torch and safetensors, and for GGUF the packages `gguf` and `llama-cpp-python`.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_0-pure")
"""Types of a GGUF file. `q4_0` is what `llama-quantize` writes by that name: its head has 6 bits
(8 if the hidden size is no multiple of 256). In `q4_0-pure` (`--pure`) the head has 4 bits, too."""

Read = Callable[[str], Tensor]
"""A tensor of the checkpoint by its Hugging Face name."""

# Elements that are quantised in one go, so that temporaries stay small.
_ELEMENTS_AT_ONCE = 1 << 24


class Entry(NamedTuple):
    """One tensor of a GGUF file. `keeps_f32`: norms and routers, as llama.cpp's own converter
    leaves them."""

    name: str
    shape: tuple[int, ...]
    keeps_f32: bool
    read: Callable[[], Tensor]


def checkpoint_reader(folder: Path) -> Read:
    """Reads tensors of all safetensors files in `folder`, one at a time."""
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    return lambda name: where[name].get_tensor(name)


def gguf_entries(config: dict[str, Any], read: Read) -> Iterator[Entry]:
    """The tensors of a GGUF file of architecture `deepseek`, in the order of the file."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_width = hidden // heads * kv_heads
    width = config["moe_intermediate_size"]

    def matrix(name: str, source: str, rows: int, columns: int) -> Entry:
        return Entry(name, (rows, columns), False, lambda: read(source))

    def norm(name: str, source: str) -> Entry:
        return Entry(name, (hidden,), True, lambda: read(source))

    def interleaved(name: str, source: str, rows: int, num_heads: int) -> Entry:
        return Entry(
            name, (rows, hidden), False, lambda: interleave_rotary_halves(read(source), num_heads)
        )

    def stacked(sources: list[str]) -> Tensor:
        return torch.stack([read(source) for source in sources])

    yield matrix("token_embd.weight", "model.embed_tokens.weight", vocabulary, hidden)
    for i in range(config["num_hidden_layers"]):
        source, block = f"model.layers.{i}", f"blk.{i}"
        attention = f"{source}.self_attn"
        yield norm(f"{block}.attn_norm.weight", f"{source}.input_layernorm.weight")
        yield interleaved(f"{block}.attn_q.weight", f"{attention}.q_proj.weight", hidden, heads)
        yield interleaved(
            f"{block}.attn_k.weight", f"{attention}.k_proj.weight", kv_width, kv_heads
        )
        yield matrix(f"{block}.attn_v.weight", f"{attention}.v_proj.weight", kv_width, hidden)
        yield matrix(f"{block}.attn_output.weight", f"{attention}.o_proj.weight", hidden, hidden)
        yield norm(f"{block}.ffn_norm.weight", f"{source}.post_attention_layernorm.weight")
        if i < config["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                shape = _mlp_shape(part, hidden, config["intermediate_size"])
                yield matrix(
                    f"{block}.ffn_{part}.weight", f"{source}.mlp.{part}_proj.weight", *shape
                )
            continue
        num_experts = config["n_routed_experts"]
        router = f"{source}.mlp.gate.weight"
        yield Entry(
            f"{block}.ffn_gate_inp.weight",
            (num_experts, hidden),
            True,
            functools.partial(read, router),
        )
        for part in ("gate", "up", "down"):
            experts = [f"{source}.mlp.experts.{e}.{part}_proj.weight" for e in range(num_experts)]
            yield Entry(
                f"{block}.ffn_{part}_exps.weight",
                (num_experts, *_mlp_shape(part, hidden, width)),
                False,
                functools.partial(stacked, experts),
            )
            shape = _mlp_shape(part, hidden, width * config["n_shared_experts"])
            shared = f"{source}.mlp.shared_experts.{part}_proj.weight"
            yield matrix(f"{block}.ffn_{part}_shexp.weight", shared, *shape)
    yield norm("output_norm.weight", "model.norm.weight")
    if not config["tie_word_embeddings"]:
        yield matrix("output.weight", "lm_head.weight", vocabulary, hidden)


def interleave_rotary_halves(weight: Tensor, num_heads: int) -> Tensor:
    """A query or key projection [rows, H] for rotary embeddings of neighbours, not of halves."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """Convert the checkpoint in `source` to a GGUF file without a vocabulary.

    Raises:
        ValueError: llama.cpp's graph of this architecture could not compute this model.
    """
    import gguf

    config = json.loads((source / "config.json").read_text())
    for key, wanted in (
        ("model_type", "deepseek"),
        ("moe_layer_freq", 1),
        ("norm_topk_prob", False),
        ("rope_scaling", None),
        ("scoring_func", "softmax"),
    ):
        if config[key] != wanted:
            raise ValueError(f"{key}={config[key]!r}: llama.cpp's graph only knows {wanted!r}")
    writer = gguf.GGUFWriter(str(target), "deepseek")
    _write_header(writer, config, source.name)
    entries = list(gguf_entries(config, checkpoint_reader(source)))
    of_entry = [gguf.GGMLQuantizationType[entry_type(entry, kind)] for entry in entries]
    for entry, its_type in zip(entries, of_entry, strict=True):
        block, block_bytes = gguf.GGML_QUANT_SIZES[its_type]
        num_bytes = math.prod(entry.shape) // block * block_bytes
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), num_bytes, raw_dtype=its_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, its_type in zip(entries, of_entry, strict=True):
        writer.write_tensor_data(_ggml_bytes(entry.read(), its_type))
    writer.close()


def entry_type(entry: Entry, kind: str) -> str:
    """The ggml type of one tensor in a file of type `kind` (`GGUF_TYPES`)."""
    if entry.keeps_f32:
        return "F32"
    if kind == "q4_0" and entry.name == "output.weight":
        return "Q8_0" if entry.shape[-1] % 256 else "Q6_K"
    return kind.removesuffix("-pure").upper()


def _write_header(writer: Any, config: dict[str, Any], name: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(1.0)
    writer.add_tokenizer_model("no_vocab")


def _mlp_shape(part: str, hidden: int, width: int) -> tuple[int, int]:
    return (hidden, width) if part == "down" else (width, hidden)


def _ggml_bytes(tensor: Tensor, its_type: Any) -> NDArray[Any]:
    """The tensor as bytes of a ggml type."""
    import gguf

    types = gguf.GGMLQuantizationType
    if its_type == types.F32:
        return tensor.float().numpy()  # type: ignore[no-any-return]
    if its_type == types.F16:
        return tensor.half().numpy()  # type: ignore[no-any-return]
    if its_type == types.BF16:
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()  # type: ignore[no-any-return]
    rows = tensor.reshape(-1, tensor.shape[-1])
    at_once = max(1, _ELEMENTS_AT_ONCE // rows.shape[1])
    packed = np.concatenate([_quantized(part.float(), its_type) for part in rows.split(at_once)])
    return packed.reshape(*tensor.shape[:-1], packed.shape[-1])


def _quantized(rows: Tensor, its_type: Any) -> NDArray[Any]:
    """float32 rows [R, C] as bytes [R, B] of a ggml type, by ggml's own routine."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[its_type]
    num_rows, columns = rows.shape
    packed = np.empty((num_rows, columns // block * block_bytes), np.uint8)
    size, of_rows = ctypes.c_int64, rows.contiguous()
    _ggml().ggml_quantize_chunk(
        ctypes.c_int(its_type),
        ctypes.c_void_p(of_rows.data_ptr()),
        packed.ctypes.data_as(ctypes.c_void_p),
        size(0),
        size(num_rows),
        size(columns),
        ctypes.c_void_p(),
    )
    return packed


@functools.cache
def _ggml() -> ctypes.CDLL:
    """The library in which llama-cpp-python has ggml's quantisation."""
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None and package.origin is not None
    return ctypes.CDLL(str(Path(package.origin).parent / "lib" / "libggml-base.so"))


def write_w8a8(source: Path, target: Path) -> None:
    """Write int8 weights with a scale for each output channel, and activations rounded to int8 for
    each token at run time: compressed-tensors' form, which vLLM reads. Embedding, head, routers and
    norms stay as they are."""
    target.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight = opened.get_tensor(name)
                if not name.endswith("_proj.weight"):
                    tensors[name] = weight
                    continue
                values = weight.float()
                scales = (values.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
                tensors[name] = (values / scales).round().clamp(-127, 127).to(torch.int8)
                tensors[f"{name}_scale"] = scales
        save_file(tensors, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    shutil.copy(source / "generation_config.json", target)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _int8("channel", dynamic=False),
                "input_activations": _int8("token", dynamic=True),
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _int8(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=["gguf", "w8a8"])
    parser.add_argument("source", type=Path, metavar="CHECKPOINT")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--type", choices=GGUF_TYPES, default="bf16", help="of a GGUF file (bf16)")
    args = parser.parse_args()
    if args.format == "gguf":
        write_gguf(args.source, args.target, args.type)
    else:
        write_w8a8(args.source, args.target)


if __name__ == "__main__":
    main()
