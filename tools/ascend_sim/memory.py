"""NPU tensors as the CPU sees them: the simulated device's memory is host memory."""

from __future__ import annotations

import ctypes

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from ascend_sim.rules import poison_of

# Larger allocations are not poisoned: caches may be larger than the host's memory.
MOST_POISONED_BYTES = 64 << 20


def is_npu(x):
    return isinstance(x, torch.Tensor) and x.device.type == "npu" and not isinstance(x, FakeTensor)


def host(tensor):
    """A CPU tensor over the memory of an NPU tensor. It does not keep that memory alive."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_cpu(x):
    """An argument as a CPU kernel takes it."""
    if is_npu(x):
        return host(x)
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return None if isinstance(x, torch.Generator) and x.device.type == "npu" else x


def to_meta(x):
    """An argument without numbers, to find the shape of a result."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def on_cpu(func, args, kwargs, instead=None):
    """Run `func` over the memory of its arguments; `instead` maps ids to replacements."""
    instead = instead or {}

    def place(x):
        return instead[id(x)] if id(x) in instead else to_cpu(x)

    args, kwargs = tree_map(place, (args, kwargs))
    return func(*args, **kwargs)


def deliver(values, tensors):
    """Write results of the CPU into NPU tensors."""
    for tensor, value in zip(tree_leaves(tensors), tree_leaves(values), strict=True):
        if is_npu(tensor):
            host(tensor).copy_(value)


def poison(tensors):
    """Fill unwritten memory with poison."""
    for tensor in tree_leaves(tensors):
        if is_npu(tensor) and 0 < tensor.numel() * tensor.element_size() <= MOST_POISONED_BYTES:
            host(tensor).fill_(poison_of(tensor.dtype))


def storages(tensors):
    """Addresses of the memory that tensors share."""
    tensors = (x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor))
    return {x.untyped_storage().data_ptr() for x in tensors}
