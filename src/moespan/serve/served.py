"""The model that is served: its names, limits, tokenizer, and defaults of sampling."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moespan import files
from moespan.config import EngineConfig, ModelConfig
from moespan.errors import ConfigError, RequestError, TokenizerError, shown
from moespan.front.prompts import Prompts
from moespan.serve.options import ServeOptions
from moespan.serve.refusals import Refusal
from moespan.text.tokenizer import Tokenizer
from moespan.version import __version__

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys of generation_config.json that can be defaults of sampling."""


@dataclass(frozen=True)
class ServedModel:
    """What requests are checked against and answered with.

    Attributes:
        names: what clients may call the model; the first is the one to show.
        root: the model as the operator typed it.
        created: seconds since 1970 when the server started.
        fingerprint: changes whenever the same request may get another answer.
        defaults: sampling parameters of requests that do not set them.
    """

    names: tuple[str, ...]
    root: str
    created: int
    fingerprint: str
    tokenizer: Tokenizer | None
    prompts: Prompts
    max_model_len: int
    vocab_size: int
    defaults: Mapping[str, float]

    @classmethod
    def load(
        cls, typed: str, config: EngineConfig, model_config: ModelConfig, options: ServeOptions
    ) -> ServedModel:
        """Read the tokenizer and the defaults of a checkpoint.

        Args:
            typed: the model as the operator typed it.

        Raises:
            TokenizerError, ConfigError: a file cannot be used.
        """
        tokenizer = Tokenizer.from_pretrained(config.model, options.chat_template)
        if options.chat_template is not None and tokenizer is None:
            raise ConfigError("--chat-template needs a tokenizer, and the checkpoint has none")
        if tokenizer is not None and tokenizer.has_chat_template:
            # Start the process that renders, so that the first chat does not wait for it. Whether
            # the template takes this message does not matter.
            with contextlib.suppress(RequestError, TokenizerError):
                tokenizer.apply_chat_template([{"role": "user", "content": ""}])
        vocab_size = model_config.vocab_size
        return cls(
            names=options.served_model_name or (typed,),
            root=typed,
            created=int(time.time()),
            fingerprint=fingerprint(config),
            tokenizer=tokenizer,
            prompts=Prompts(tokenizer, config.max_model_len, vocab_size),
            max_model_len=config.max_model_len,
            vocab_size=vocab_size,
            defaults=_defaults(config) if options.generation_config == "auto" else {},
        )

    def name_of(self, asked: str | None) -> str:
        """The name to answer with for the one that a client asked for.

        Raises:
            Refusal: a 404; the model has no such name.
        """
        if not asked:
            return self.names[0]
        if asked not in self.names:
            raise Refusal(
                404,
                f"the model {shown(asked)} does not exist; this server has "
                f"{', '.join(map(shown, self.names))}",
                param="model",
                code="model_not_found",
            )
        return asked


def fingerprint(config: EngineConfig) -> str:
    """A hash of the version, the checkpoint's config and sizes, the dtypes and the layout."""
    digest = hashlib.blake2b(digest_size=5)
    digest.update(f"{__version__} {config.dtype} {config.quantization} {config.layout}".encode())
    digest.update(f" {config.kv_cache_dtype} {config.device}".encode())
    for file in sorted(Path(config.model).glob("*")):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            digest.update(f" {file.name} {file.stat().st_size}".encode())
    digest.update(files.read_bytes(Path(config.model) / "config.json", files.MOST_JSON_BYTES))
    return f"fp_{digest.hexdigest()}"


def _defaults(config: EngineConfig) -> dict[str, float]:
    """Defaults of sampling in generation_config.json."""
    file = Path(config.model) / "generation_config.json"
    if not file.exists():
        return {}
    try:
        raw = msgspec.json.decode(files.read_bytes(file, files.MOST_JSON_BYTES), type=dict)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--generation-config auto: cannot read {file}: {error}") from error
    defaults = {name: raw[name] for name in _DEFAULTS if raw.get(name) is not None}
    if raw.get("do_sample") is False:  # Hugging Face's word for greedy
        defaults["temperature"] = 0.0
    return defaults
