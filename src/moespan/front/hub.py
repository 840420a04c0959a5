"""Finds the checkpoint folder of a model: a folder here, or a download of a hub client."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from moespan.errors import ConfigError, install_hint

# Weights, configs and tokenizer; never code.
_FILES = ["*.safetensors", "*.json", "*.jinja"]


def resolve(model: str) -> Path:
    """The folder of `model`, which is itself a folder, or a name that a hub client downloads.

    The client is `huggingface_hub`. `modelscope` takes its place if only `modelscope` is installed,
    or if `MOESPAN_USE_MODELSCOPE=1` is set.

    Raises:
        ConfigError: there is neither a folder nor a hub model of this name, or no client is
            installed.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:  # the user in ~user does not exist
        raise ConfigError(f"{model} does not exist: {error}") from None
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{model} is a file; give the checkpoint's folder")
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise ConfigError(f"{model} does not exist; give a checkpoint folder")
    clients = [name for name in ("huggingface_hub", "modelscope") if importlib.util.find_spec(name)]
    if not clients:
        raise ConfigError(
            f"{model} is not a folder here, and no hub client is installed to download it; give a "
            f"checkpoint folder, or {install_hint('hub')}"
        )
    if os.environ.get("MOESPAN_USE_MODELSCOPE") == "1" and "modelscope" in clients:
        clients = ["modelscope"]
    try:
        if clients[0] == "huggingface_hub":
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(model, allow_patterns=_FILES))
        from modelscope import snapshot_download as modelscope_download

        return Path(modelscope_download(model, allow_patterns=_FILES))
    except Exception as error:  # the clients pass on every error of their transports
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"{model} is not a folder here, and {clients[0]} could not download it: {reason}"
        ) from error
