"""Makes the quickstart checkpoint from nothing: tokenizer, training, evaluation, files.

One command reproduces ``models/quickstart``::

    python tools/quickstart/train.py

It needs torch, tokenizers, safetensors and jinja2. The state of the training is saved to
``--work-dir`` now and then; the same command goes on from there after an interruption.
``--eval-only`` measures the held-out accuracy of a finished checkpoint.

The network here is only for training and for the reference results: it shares no code with the
engine, so that the two can be held against each other.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import tasks
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

REPOSITORY = Path(__file__).resolve().parents[2]

BOS, EOS = "<|begin|>", "<|end|>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 512
# Any id would do: the loss weight of padding is zero and no token attends to it.
PADDING_ID = EOS_ID

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly teacher.",
    "Answer briefly.",
    "请回答问题。",
)

CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.01,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.04,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "torch_dtype": "bfloat16",
}

REFERENCE_PROMPTS = (
    "",
    "347+85=",
    "sort 42 7 93 18:",
    "Story: Mia, fox, lake.",
    "User: 故事：小明，猫，公园。\n\nAssistant:",
)
REFERENCE_STEPS = 16


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------


def build_tokenizer(seed: int) -> Tokenizer:
    """Trains the byte-level BPE: 2 special tokens, 256 bytes, 254 merges; a digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The special tokens are text no merge may be learned from.
    texts = (
        "".join(text.removeprefix(BOS).removeprefix(EOS) for text, _ in document)
        for document in islice(documents(seed), 60_000)
    )
    tokenizer.train_from_iterator(texts, trainer)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """The promises the rest relies on: size, ids, whole-digit tokens, exact round trips."""
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"vocabulary has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    if (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) != (BOS_ID, EOS_ID):
        raise ValueError(f"special tokens {BOS} and {EOS} do not have ids {BOS_ID} and {EOS_ID}")
    if len(tokenizer.encode("1234567890", add_special_tokens=False).ids) != 10:
        raise ValueError("digits are not split one by one")
    texts = (" a  b\n\n\tc ", "347+85=432", "小明去公园玩。", "naïve café", "👩‍👩‍👧 🙂", "\x00\r\n")
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids) != text:
            raise ValueError(f"text {text!r} does not survive the tokenizer")


# ---------------------------------------------------------------------------------------------
# Documents and batches
# ---------------------------------------------------------------------------------------------

# The pieces of a document: (text, whether the model has to write it).
Document = list[tuple[str, bool]]


def documents(seed: int) -> Iterator[Document]:
    """Endless documents: plain exercises and chats of one to three turns, half and half."""
    rng = Random(f"documents:{seed}")
    items = tasks.training_items(seed)
    while True:
        if rng.random() < 0.5:
            item = next(items)
            yield [(BOS + item.prompt, False), (item.answer, True), (EOS, True)]
            continue
        pieces: Document = [(BOS, False)]
        if rng.random() < 0.25:
            pieces.append((rng.choice(SYSTEM_MESSAGES) + "\n\n", False))
        for item in islice(items, rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]):
            pieces.append((f"User: {item.prompt}\n\nAssistant:", False))
            pieces.append((" " + item.answer.strip(), True))
            pieces.append((EOS, True))
        yield pieces


@dataclass
class Batch:
    """Packed rows of documents: ``R`` rows of ``L`` tokens."""

    ids: Tensor  # (R, L) int64
    positions: Tensor  # (R, L) int64, from 0 again in every document
    document: Tensor  # (R, L) int64, which document of its row a token belongs to; -1 is padding
    targets: Tensor  # (R, L) int64
    weights: Tensor  # (R, L) float32, the loss weight of each target


def make_batch(
    tokenizer: Tokenizer, seed: int, rows: int, length: int, prompt_weight: float
) -> Batch:
    """Packs documents into rows first-fit; a document is never cut, one that fits nowhere is left.

    Documents do not see each other and positions restart, so a document is trained on exactly as
    it is met in use.
    """
    filled: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(rows)]
    room = [length] * rows
    misses = 0
    for pieces in documents(seed):
        ids: list[int] = []
        weights: list[float] = []
        for text, wanted in pieces:
            encoded = tokenizer.encode(text, add_special_tokens=False).ids
            ids += encoded
            weights += [1.0 if wanted else prompt_weight] * len(encoded)
        row = next((i for i in range(rows) if room[i] >= len(ids)), None)
        if row is not None:
            filled[row].append((ids, weights))
            room[row] -= len(ids)
        elif (misses := misses + 1) == 20:
            break

    columns: dict[str, list[Any]] = {"ids": [], "positions": [], "document": [], "weights": []}
    for packed, left in zip(filled, room, strict=True):
        columns["ids"].append([i for ids, _ in packed for i in ids] + [PADDING_ID] * left)
        columns["positions"].append([i for ids, _ in packed for i in range(len(ids))] + [0] * left)
        columns["document"].append([n for n, (ids, _) in enumerate(packed) for _ in ids])
        columns["document"][-1] += [-1] * left
        # Nothing has to foresee the first token of a document.
        columns["weights"].append([w for _, ws in packed for w in [0.0, *ws[1:]]] + [0.0] * left)
    token_ids, token_weights = torch.tensor(columns["ids"]), torch.tensor(columns["weights"])
    return Batch(
        ids=token_ids,
        positions=torch.tensor(columns["positions"]),
        document=torch.tensor(columns["document"]),
        targets=token_ids.roll(-1, dims=1),
        weights=token_weights.roll(-1, dims=1),
    )


# ---------------------------------------------------------------------------------------------
# Network. Shapes: R rows, L tokens of a row, T = R * L tokens, H hidden, N heads, D head size,
# E experts, K experts per token, V vocabulary. Module names are those of the checkpoint.
# ---------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x (R, L, H), cos and sin (R, 1, L, D), mask (R, 1, L, L) → (R, L, H)."""
        rows, length, hidden = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(rows, length, self.heads, -1).transpose(1, 2)

        q = rotate(split(self.q_proj(x)), cos, sin)
        k = rotate(split(self.k_proj(x)), cos, sin)
        y = functional.scaled_dot_product_attention(q, k, split(self.v_proj(x)), attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(rows, length, hidden))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves rotated against each other: x (R, N, L, D) → (R, N, L, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H) → (..., H)."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        self.top_k = config["num_experts_per_tok"]
        self.gate = nn.Linear(hidden, config["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(MLP(hidden, width) for _ in range(config["n_routed_experts"]))
        self.shared_experts = MLP(hidden, width * config["n_shared_experts"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (R, L, H) → output (R, L, H), load-balancing loss ().

        The loss is E · Σₑ fₑ·Pₑ with fₑ the share of the (token, choice) pairs that went to
        expert e and Pₑ its mean probability: 1 when all experts are used alike.
        """
        flat = x.flatten(0, 1)
        probabilities = self.gate(flat).softmax(-1)  # (T, E)
        weights, chosen = probabilities.topk(self.top_k, sorted=False)  # (T, K)
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)
        token = order // self.top_k
        counts = chosen.bincount(minlength=len(self.experts))
        inputs = flat.index_select(0, token).split(counts.tolist())
        outputs = [expert(part) for expert, part in zip(self.experts, inputs, strict=True)]
        weighted = torch.cat(outputs) * weights.flatten()[order, None]
        routed = torch.zeros_like(flat).index_add(0, token, weighted)

        share = counts / chosen.numel()
        balance = len(self.experts) * (share * probabilities.mean(0)).sum()
        return routed.view_as(x) + self.shared_experts(x), balance


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], index: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        dense = index < config["first_k_dense_replace"]
        self.mlp = MLP(hidden, config["intermediate_size"]) if dense else MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (R, L, H) → (R, L, H), load-balancing loss ()."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        y = self.mlp(self.post_attention_layernorm(x))
        y, balance = y if isinstance(y, tuple) else (y, x.new_zeros(()))
        return x + y, balance


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class Network(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config["initializer_range"])

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, document: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids, positions, document (R, L) → logits (R, L, V), mean load-balancing loss ().

        Without ``positions`` and ``document`` a row is one document.
        """
        rows, length = ids.shape
        if positions is None:
            positions = torch.arange(length).expand(rows, length)
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
        if document is not None:
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
        size = self.config["hidden_size"] // self.config["num_attention_heads"]
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
        angles = positions[:, None, :, None].float() * frequencies  # (R, 1, L, D/2)
        cos, sin = (torch.cat((a, a), dim=-1) for a in (angles.cos(), angles.sin()))

        x = self.model.embed_tokens(ids)
        balances = []
        for index, layer in enumerate(self.model.layers):
            x, balance = layer(x, cos, sin, mask)
            if index >= self.config["first_k_dense_replace"]:
                balances.append(balance)
        return self.lm_head(self.model.norm(x)), torch.stack(balances).mean()


@torch.no_grad()
def round_to_bfloat16(network: Network) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16().float())


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


# What AdamW remembers of every parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine over ``horizon`` steps; the last ``cooldown`` steps fall to 0.

    The cool-down is what ends the training: a run may stop well before the cosine does.
    """
    if step < arguments.warmup:
        return arguments.lr * (step + 1) / arguments.warmup
    progress = min(1.0, (step - arguments.warmup) / (arguments.horizon - arguments.warmup))
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
    return arguments.lr * cosine * min(1.0, (arguments.steps - step) / arguments.cooldown)


def save_state(
    path: Path, network: Network, optimizer: torch.optim.Optimizer, steps_done: int
) -> None:
    """Weights and the optimizer's moments, by parameter name; a reader sees all or nothing."""
    tensors = {}
    for name, parameter in network.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key in MOMENTS:
            tensors[f"{key}.{name}"] = optimizer.state[parameter][key]
    draft = path.with_suffix(".new")
    save_file(tensors, draft, metadata={"steps_done": str(steps_done)})
    draft.replace(path)


@torch.no_grad()
def load_state(path: Path, network: Network, optimizer: torch.optim.Optimizer) -> int:
    """Puts everything back where `save_state` found it; returns the steps that were done."""
    with safe_open(path, "pt") as file:
        for name, parameter in network.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in MOMENTS}
        return int(file.metadata()["steps_done"])


def train(network: Network, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    matrices = [p for p in network.parameters() if p.dim() == 2]
    vectors = [p for p in network.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    state_path = arguments.work_dir / "state.safetensors"
    first = 0
    if state_path.exists():
        first = load_state(state_path, network, optimizer)
        print(f"going on from step {first}", flush=True)

    start = time.monotonic()
    for step in range(first, arguments.steps):
        batch = make_batch(
            tokenizer,
            # Every step has its own seed, so that a resumed run sees the same batches.
            arguments.seed * 10_000_000 + step,
            arguments.rows,
            arguments.length,
            arguments.prompt_weight,
        )
        logits, balance = network(batch.ids, batch.positions, batch.document)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        weights = batch.weights.flatten()
        loss = (losses * weights).sum() / weights.sum()
        (loss + network.config["aux_loss_alpha"] * balance).backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % 50 == 0:
            answer = losses.detach()[weights == 1.0].mean()
            print(
                f"step {done} loss {loss.item():.4f} answer {answer:.4f} balance {balance:.3f} "
                f"norm {norm:.2f} tokens/s "
                f"{(done - first) * batch.ids.numel() / (time.monotonic() - start):.0f}",
                flush=True,
            )
        if done % arguments.eval_every == 0 or done == arguments.steps:
            save_state(state_path, network, optimizer, done)
            for task, n in (("sum", 200), ("sort", 200), ("story", 24)):
                report(network, tokenizer, task, "plain", n, show=2)


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


def render_chat(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    return template.render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        bos_token=BOS,
        eos_token=EOS,
    )


def prompt_ids(tokenizer: Tokenizer, prompt: str, form: str) -> list[int]:
    """The ids an engine would feed for the prompt as completion or as one chat message."""
    if form == "plain":
        return tokenizer.encode(prompt).ids
    text = render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def greedy(network: Network, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Greedy continuations up to and without the end token; those without one are cut at limit.

    Recomputes everything each step: plain and slow. Padding is on the right, where the causal
    mask hides it.
    """
    rows = [list(ids) for ids in prompts]
    live = list(range(len(rows)))
    for _ in range(limit):
        longest = max(len(rows[i]) for i in live)
        ids = torch.full((len(live), longest), PADDING_ID)
        for line, i in enumerate(live):
            ids[line, : len(rows[i])] = torch.tensor(rows[i])
        last = torch.tensor([len(rows[i]) - 1 for i in live])
        logits, _ = network(ids)
        following = logits[torch.arange(len(live)), last].argmax(-1).tolist()
        for i, token in zip(live, following, strict=True):
            rows[i].append(token)
        live = [i for i in live if rows[i][-1] != EOS_ID]
        if not live:
            break
    return [row[len(ids) :] for row, ids in zip(rows, prompts, strict=True)]


def report(
    network: Network, tokenizer: Tokenizer, task: str, form: str, n: int, show: int = 0
) -> float:
    """Prints and returns the exact-match accuracy on ``n`` held-out items.

    An answer counts only if it is right and followed by the end token.
    """
    items = tasks.heldout(task, n)
    limit = 100 if task == "story" else 24
    right = 0
    shown: list[str] = []
    for start in range(0, n, 100):
        part = items[start : start + 100]
        written = greedy(network, [prompt_ids(tokenizer, p, form) for p, _ in part], limit)
        for (prompt, _), ids in zip(part, written, strict=True):
            text = tokenizer.decode(ids)
            good = ids[-1] == EOS_ID and tasks.is_correct(task, prompt, text)
            right += good
            if not good or len(shown) < show:
                shown.append(f"    {'right' if good else 'wrong'} {prompt!r} -> {text!r}")
    print(f"  {task} {form}: {right}/{n} = {right / n:.1%}", flush=True)
    print(*shown[:show], sep="\n", flush=True)
    return right / n


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything but the model card; weights are stored in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": None,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    weights = {name: w.bfloat16().contiguous() for name, w in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_checkpoint(folder: Path) -> tuple[Network, Tokenizer]:
    """The network in float32 with the stored, bfloat16-rounded weights."""
    network = Network(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return network, Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.no_grad()
def write_reference(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """``p<i>.ids`` (T,), ``p<i>.logits`` (T, V) and ``p<i>.greedy`` (16,) of a few prompts.

    The greedy continuation does not stop at the end token.
    """
    tensors: dict[str, Tensor] = {}
    for index, prompt in enumerate(REFERENCE_PROMPTS):
        ids = tokenizer.encode(prompt).ids
        tensors[f"p{index}.ids"] = torch.tensor(ids)
        tensors[f"p{index}.logits"] = network(torch.tensor([ids]))[0][0].contiguous()
        row = list(ids)
        for _ in range(REFERENCE_STEPS):
            row.append(int(network(torch.tensor([row]))[0][0, -1].argmax()))
        tensors[f"p{index}.greedy"] = torch.tensor(row[len(ids) :])
    save_file(tensors, folder / "reference.safetensors")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "models" / "quickstart")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "build" / "quickstart")
    parser.add_argument("--eval-only", action="store_true", help="only measure the checkpoint")
    parser.add_argument("--eval-items", type=int, default=500)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--horizon", type=int, default=10_000, help="steps of the whole cosine")
    parser.add_argument("--cooldown", type=int, default=2500, help="steps of the final decay")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--prompt-weight", type=float, default=0.05, help="loss weight of prompts")
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if not arguments.eval_only:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
        tokenizer_path = arguments.work_dir / "tokenizer.json"
        if not tokenizer_path.exists():
            build_tokenizer(arguments.seed).save(str(tokenizer_path))
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        network = Network(CONFIG)
        train(network, tokenizer, arguments)
        round_to_bfloat16(network)
        write_checkpoint(network, tokenizer, arguments.out)
        write_reference(*load_checkpoint(arguments.out), arguments.out)
    network, tokenizer = load_checkpoint(arguments.out)
    for task in tasks.TASKS:
        n = min(arguments.eval_items, 90) if task == "story" else arguments.eval_items
        for form in ("plain", "chat"):
            report(network, tokenizer, task, form, n, show=3)


if __name__ == "__main__":
    main()
