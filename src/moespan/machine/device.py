"""The choice of the device. torch is imported only for a device that has a file or is asked for."""

from __future__ import annotations

from pathlib import Path

from moespan.errors import ConfigError

# Devices that `auto` looks for, the preferred one first.
_DEVICE_FILES = {"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}


def choose_device(wanted: str) -> str:
    """`wanted`; for `auto` the best device that this machine has and this torch can use.

    Raises:
        ConfigError: the wanted device does not exist, or torch cannot use it.
    """
    if wanted == "cpu":
        return wanted
    if wanted == "auto":
        present = [d for d, files in _DEVICE_FILES.items() if any(Path("/dev").glob(files))]
        return next((device for device in present if _is_usable(device)), "cpu")
    if wanted == "npu":
        load_torch_npu()
    if not _is_usable(wanted):
        raise ConfigError(
            f"device {wanted!r} is not usable: torch finds none; check its driver and that torch "
            "was built for it, or use --device cpu"
        )
    return wanted


def load_torch_npu() -> None:
    """Make `torch.npu` exist.

    Torch could load torch_npu by itself, but `import torch` would then fail without CANN.

    Raises:
        ConfigError: torch_npu is not installed, or cannot load the libraries of CANN.
    """
    try:
        import torch_npu  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device 'npu' is not usable: torch_npu does not load ({reason}); install torch-npu, "
            "and source set_env.sh of CANN"
        ) from None


def _is_usable(device: str) -> bool:
    import torch

    if device == "npu":
        try:
            load_torch_npu()
        except ConfigError:
            return False
    module = getattr(torch, device, None)
    return module is not None and bool(module.is_available())
