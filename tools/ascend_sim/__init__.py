"""A pretend Ascend NPU: numbers, checks and graphs for torch_npu over a stand-in for CANN."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys


def start_with_torch_npu() -> None:
    """Make the import of torch_npu, whoever does it and when, start the simulator.

    Not before: most processes of a program never import torch, and should not wait for it.
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
        # Kernels run in the calling thread then, in order, and not in one of torch_npu's own.
        os.environ["TASK_QUEUE_ENABLE"] = "0"

        def load_and_start(module):
            load(module)
            from ascend_sim.device import start

            start()

        setattr(spec.loader, "exec_module", load_and_start)  # noqa: B010
        return spec
