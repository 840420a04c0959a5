"""Runs a function on several ranks, each a process with a pretend NPU of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(size, function, *args, timeout_s=60, **environ):
    """What `function(rank, *args)` returned on each rank, or `Type: message` of what it raised.

    Forked, which is fast, but only works as long as this process has touched no NPU.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            job = (there, rank, size, folder, environ, function, args)
            process = context.Process(target=_main, args=job, daemon=True)
            process.start()
            ranks.append((process, here))
        results = []
        for rank, (_, here) in enumerate(ranks):
            if not here.poll(timeout_s):
                raise TimeoutError(f"rank {rank} has not answered in {timeout_s} s")
            results.append(here.recv())
        for process, _ in ranks:
            process.kill()
    return results


def _main(pipe, rank, size, folder, environ, function, args):
    os.environ.update(environ)
    torch.set_num_threads(1)
    torch.npu.set_device(rank)
    timeout = timedelta(seconds=int(environ.get("ASCEND_SIM_TIMEOUT", 60)))
    store = dist.FileStore(str(Path(folder, "store")), size)
    store.set_timeout(timeout)
    dist.init_process_group("hccl", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        with torch.inference_mode():
            pipe.send(function(rank, *args))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    pipe.close()
    os._exit(0)
