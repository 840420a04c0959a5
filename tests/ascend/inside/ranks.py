"""Runs a function on several ranks, each a process with a simulated NPU of its own.

Processes are forked, which is fast, but works only while this process has touched no NPU.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # collectives and the stand-in's operators import it, in seconds: once for all
import torch.distributed as dist


def run_ranks(size, function, *args, timeout_s=60, **environ):
    """The results of `function(rank, *args)` on each rank, in a group of all ranks.

    An exception gives the result `Type: message`.
    """
    with tempfile.TemporaryDirectory() as folder:

        def on_rank(rank):
            timeout = timedelta(seconds=int(environ.get("ASCEND_SIM_TIMEOUT", 60)))
            torch.npu.set_device(rank)
            store = dist.FileStore(str(Path(folder, "store")), size)
            store.set_timeout(timeout)
            dist.init_process_group(
                "hccl", store=store, rank=rank, world_size=size, timeout=timeout
            )
            with torch.inference_mode():
                return function(rank, *args)

        return _fork(size, on_rank, timeout_s, lambda rank: environ)


def run_program(size, function, *args, timeout_s=300, **environ):
    """What `function(*args)` returned on rank 0 of a program that torchrun, as it seems, started
    on all ranks; the others may end in it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    return _fork(
        size,
        lambda rank: function(*args),
        timeout_s,
        lambda rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        answers=1,
    )[0]


def _fork(size, on_rank, timeout_s, environ_of, answers=None):
    """The results of the first `answers` ranks; None means all ranks."""
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        job = (there, rank, on_rank, environ_of(rank))
        process = context.Process(target=_main, args=job, daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        results = []
        for rank, (_, here) in enumerate(ranks[:answers]):
            if not here.poll(timeout_s):
                raise TimeoutError(f"rank {rank} has not answered in {timeout_s} s")
            results.append(here.recv())
        return results
    finally:
        for process, _ in ranks:
            process.kill()


def _main(pipe, rank, on_rank, environ):
    os.environ.update(environ)
    torch.set_num_threads(1)
    # Each recording of a graph collects garbage. To read all objects of torch for that takes longer
    # than to record.
    gc.freeze()
    try:
        pipe.send(on_rank(rank))
    except Exception as error:
        if os.environ.get("RANK"):
            traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")
    except SystemExit:  # a rank that only served the first one
        pass
    pipe.close()
    os._exit(0)
