"""Small tokenizers of this family and the files they come in, for several tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

import moespan.text.tokenizer
from moespan.text.tokenizer import Tokenizer

SOURCE = Path(moespan.text.tokenizer.__file__).parents[2]
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# The letters of the byte alphabet for the 13 bytes that no UTF-8 text has. DeepSeek's vocabulary
# lacks them, and its added tokens have them, as text.
IMPOSSIBLE_BYTES = "ÀÁõö÷øùúûüýþÿ"

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": BOS, "lstrip": False, "special": True},
    "eos_token": {"__type": "AddedToken", "content": EOS, "lstrip": False, "special": True},
    "pad_token": {"__type": "AddedToken", "content": EOS, "lstrip": False, "special": True},
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "tokenizer_class": "LlamaTokenizerFast",
    "chat_template": CHAT_TEMPLATE,
}

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and  then some more of the same.\n",
    "def main(argv):\n    return [int(word) for word in argv]\n",
    "混合专家模型让每个词元只经过少数专家。混合专家模型。",
    "Größe, naïve façade, Ångström; 👩‍👩‍👧‍👦 👍🏽 🙂🙂",
]


def byte_level(alphabet: str, **pre_tokenizer: bool) -> Backend:
    """A byte-level BPE tokenizer trained on a few lines of text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **pre_tokenizer})
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


def full_alphabet() -> str:
    return "".join(sorted(pre_tokenizers.ByteLevel.alphabet()))


def plain_backend() -> Backend:
    backend = byte_level(full_alphabet())
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return backend


def deepseek_backend() -> Backend:
    """The pipeline of DeepSeek-MoE-16B's tokenizer.json around a small vocabulary."""
    backend = byte_level("".join(set(full_alphabet()) - set(IMPOSSIBLE_BYTES)))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated")
            for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+")
        ]
        + [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    backend.add_special_tokens([AddedToken(BOS), AddedToken(EOS)])
    backend.add_tokens([AddedToken(letter, normalized=True) for letter in IMPOSSIBLE_BYTES])
    return backend


PLAIN = plain_backend().to_str()
DEEPSEEK = deepseek_backend().to_str()


def write(folder: Path, tokenizer_json: str, config: Mapping[str, Any] | None = None) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer is not None
    return tokenizer


def run_script(script: str) -> str:
    """Runs Python code in a fresh interpreter; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
