"""A simulated Ascend NPU: numbers, checks and graphs for torch_npu over a stand-in for CANN."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys


def start_with_torch_npu() -> None:
    """Start the simulator when torch_npu is imported, wherever that happens.

    Not earlier: most processes of a program never import torch and should not wait for it.
    """
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module
        # Kernels then run in order in the calling thread, not in a thread of torch_npu.
        os.environ["TASK_QUEUE_ENABLE"] = "0"

        def load_and_start(module):
            load(module)
            from ascend_sim.device import start

            start()

        setattr(spec.loader, "exec_module", load_and_start)  # noqa: B010
        return spec
