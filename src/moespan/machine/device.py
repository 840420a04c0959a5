"""Which device to run on: found by the driver's files, and tried with torch where one is found.

Torch is imported only where there is a device to try.
"""

from __future__ import annotations

from pathlib import Path

from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.machine.cann import check_installed


def choose_device(wanted: str) -> str:
    """`wanted`, or for `auto` the best device that this machine has and this torch can use.

    Raises:
        ConfigError: the wanted device is not there, torch cannot use it, or moespan does not run on
            the installed versions of its software.
    """
    if wanted == "auto":
        found = next(name for name in _present() if DEVICES[name].is_host or _is_usable(name))
        if found == "npu":
            check_installed()
        return found
    if not DEVICES[wanted].is_host:
        if wanted == "npu":
            check_installed()
        load_plugin(wanted)
        if not _is_usable(wanted):
            raise ConfigError(
                f"device {wanted!r} is not usable: torch finds none; check its driver and that "
                "torch was built for it, or use --device cpu"
            )
    return wanted


def present_device(root: Path = Path("/")) -> str:
    """The best device whose driver is on this machine, whether or not torch can use it."""
    return _present(root)[0]


def load_plugin(device: str) -> None:
    """Make `torch.<device>` exist where torch has it from another package (torch_npu).

    Torch could load torch_npu by itself, but `import torch` would then fail without CANN.

    Raises:
        ConfigError: the package is not there, or cannot load the libraries that it needs.
    """
    if device != "npu":
        return
    try:
        import torch_npu  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device 'npu' is not usable: torch_npu does not load ({reason}); install torch-npu, "
            "and source set_env.sh of CANN"
        ) from None


def _present(root: Path = Path("/")) -> list[str]:
    """Names of the devices whose driver is here, the best one first; the host is always there."""
    folder = root / "dev"
    return [
        name
        for name, device in DEVICES.items()
        if device.is_host or any(folder.glob(device.driver_files))
    ]


def _is_usable(device: str) -> bool:
    import torch

    try:
        load_plugin(device)
    except ConfigError:
        return False
    module = getattr(torch, device, None)
    return module is not None and bool(module.is_available())
