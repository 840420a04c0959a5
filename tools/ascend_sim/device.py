"""The simulated device: operations on `npu` tensors compute, and pass torch_npu's real adapters.

Each operation runs twice: through the adapter in libtorch_npu.so (checks of dtypes, shapes and
devices; allocation of results; an empty kernel), and on a CPU view of the same memory. The results
must agree in shape and dtype; then the CPU's numbers are written to the NPU's result. Collectives
pass through to the stand-in for HCCL. Memory that is allocated and not written is poisoned.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import Any

import torch
import torch_npu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ascend_sim import ai_cpu, fused_communication, graphs, kernels  # noqa: F401  they register CPU kernels
from ascend_sim.graphs import COLLECTIVES, Graph
from ascend_sim.kernels import FRACTAL_NZ, ND
from ascend_sim.memory import deliver, host, is_npu, on_cpu, poison, storages, to_meta
from ascend_sim.rules import RefusedError, cann

aten, npu = torch.ops.aten, torch.ops.npu
ALLOCATING = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
UNSEEN = ALLOCATING | {
    aten.set_,
    aten.resize_,
    aten.record_stream,
    aten._pin_memory,
    npu._npu_fused_infer_attention_score_get_max_workspace,
    npu._npu_fused_infer_attention_score_infer_output,
    npu._npu_fused_infer_attention_score_v2_get_max_workspace,
    npu._npu_fused_infer_attention_score_v2_infer_output,
}
# Operations that the stand-in itself performs.
COPYING = {aten._to_copy, aten.copy_, aten.clone, aten.item, aten._local_scalar_dense}
# Operations whose adapters read the results of their kernels.
WITHOUT_ADAPTER = {aten.index, aten.index_put_, aten.bincount, npu.npu_format_cast}
# Operations that take a matrix in tiles.
PRODUCTS = {
    aten.linear,
    aten.mm,
    aten.matmul,
    aten.addmm,
    npu.npu_linear,
    npu.npu_grouped_matmul,
    npu.npu_mm_all_reduce_base,
    npu.npu_quant_matmul,
}
# Tensors in NZ format, by the address of their memory.
tiled: dict[int, Any] = {}
# Operations whose result's shape, or the host's next step, depends on numbers: by tag, and by name.
WAITING = {aten.where.default, aten.is_nonzero.default, aten.repeat_interleave.self_Tensor}
DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class SimulatedNPU(TorchDispatchMode):
    """The mode in which operations on npu tensors compute, for the thread that enters it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in UNSEEN or not concerns_npu(args, kwargs):
            result = func(*args, **kwargs)
            if packet in ALLOCATING:
                poison(result)
            return result
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if view:
            result = func(*args, **kwargs)
            if storages(result) <= storages((args, kwargs)):
                return result
            # Not a view: `.contiguous()` or `.reshape()` copied.
            if Graph.capturing is not None:
                Graph.record(func, args, kwargs, result)
            return result
        if packet is npu.npu_format_cast:
            return cast_format(args, kwargs)
        if packet is npu.get_npu_format:
            return format_of(args[0])
        check_tiled(func, args, kwargs)
        if Graph.updating is not None:
            return Graph.record_update(func, args, kwargs)
        ai_cpu.note(func, args, kwargs)
        if Graph.capturing is not None:
            return capture(func, args, kwargs)
        graphs.settle()
        return compute(func, args, kwargs)


def cast_format(args, kwargs):
    """As in torch_npu, the cast changes nothing unless internal formats are allowed."""
    if Graph.capturing is not None:
        raise RefusedError("npu_format_cast runs as an aclop, which a captured graph cannot hold")
    result = compute(npu.npu_format_cast.default, args, kwargs)
    allowed = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
    if args[1] == FRACTAL_NZ and allowed in (b"enable", "enable"):
        address = result.untyped_storage().data_ptr()
        tiled[address] = weakref.ref(result, lambda _: tiled.pop(address, None))
    return result


def format_of(tensor):
    return FRACTAL_NZ if tiled_whole(tensor) is not None else ND


def tiled_whole(tensor):
    """The tensor in NZ format whose memory `tensor` shares; None if there is none."""
    found = tiled.get(tensor.untyped_storage().data_ptr()) if is_npu(tensor) else None
    return found and found()


def check_tiled(func, args, kwargs):
    """Refuse a tensor in tiles unless it is used whole, in a matrix product: torch_npu would
    convert it back first."""
    for x in tree_leaves((args, kwargs)):
        whole = tiled_whole(x) if tiled and is_npu(x) else None
        if whole is None:
            continue
        layouts = [(whole.shape, whole.stride())]
        if whole.dim() == 2:
            layouts.append((whole.t().shape, whole.t().stride()))
        if func.overloadpacket not in PRODUCTS or (x.shape, x.stride()) not in layouts:
            raise RefusedError(
                f"{func} of {tuple(x.shape)} with strides {x.stride()}, a view of a tensor in "
                f"NZ format {tuple(whole.shape)}: NZ is for whole matrices in products"
            )


@functools.cache
def is_composite(func):
    """Whether the device has kernels only for the parts of an operation, not for the whole."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(
        func.name(), "PrivateUse1"
    )


def concerns_npu(args, kwargs):
    return any(
        is_npu(x) or (isinstance(x, torch.device) and x.type == "npu")
        for x in tree_leaves((args, kwargs))
    )


def waits(func, args):
    """Whether the host needs a number from the device to continue."""
    if func.overloadpacket in (aten.index, aten.index_put_):  # by a mask, not by numbers
        masks = (torch.bool, torch.uint8)
        return any(isinstance(x, torch.Tensor) and x.dtype in masks for x in tree_leaves(args[1]))
    return func in WAITING or bool(DATA_DEPENDENT & set(func.tags))


def compute(func, args, kwargs):
    packet = func.overloadpacket
    if packet in COPYING or func.namespace in COLLECTIVES:
        return func(*args, **kwargs)
    if packet not in WITHOUT_ADAPTER and not waits(func, args):
        return compute_checked(func, args, kwargs)
    result = on_cpu(func, args, kwargs)
    if func._schema.is_mutable:
        return args[0]
    device = next(x.device for x in tree_leaves((args, kwargs)) if is_npu(x))
    return tree_map_only(torch.Tensor, lambda x: x.to(device), result)


def compute_checked(func, args, kwargs):
    """Run the adapter and the CPU kernel.

    Since the adapter may change its arguments, the CPU kernel gets copies made before.
    """
    names = func._schema.arguments
    bound = [*zip(names, args, strict=False)]
    bound += [(name, kwargs[name.name]) for name in names[len(args) :] if name.name in kwargs]
    written = {
        id(tensor): (host(tensor), host(tensor).clone())
        for name, value in bound
        if name.alias_info is not None and name.alias_info.is_write
        for tensor in tree_leaves(value)
        if is_npu(tensor)
    }
    actual = func(*args, **kwargs)
    copies = {key: copy for key, (_, copy) in written.items()}
    expected = on_cpu(func, args, kwargs, copies)
    for memory, copy in written.values():
        memory.copy_(copy)
    for got, want in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if is_npu(got) and (got.shape, got.dtype) != (want.shape, want.dtype):
            raise AssertionError(
                f"{func}: the NPU's adapter returns {got.dtype} {tuple(got.shape)}, "
                f"the CPU kernel {want.dtype} {tuple(want.shape)}"
            )
    deliver(expected, actual)
    return actual


def capture(func, args, kwargs):
    """Check and record the operation, without computing."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    copies = func.overloadpacket in COPYING
    if waits(func, args):
        raise RefusedError(f"{func} waits for the device, which a captured graph cannot")
    if any(not is_npu(x) and (x.dim() or copies) for x in leaves):
        raise RefusedError(f"{func} reads or writes a CPU tensor, which a captured graph cannot")
    if func.overloadpacket not in WITHOUT_ADAPTER:
        result = func(*args, **kwargs)
    elif func._schema.is_mutable:
        result = args[0]
    else:
        shape = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
        result = torch.empty(shape.shape, dtype=shape.dtype, device=leaves[0].device)
    if any(isinstance(x, torch.Tensor) and not is_npu(x) for x in tree_leaves(result)):
        raise RefusedError(f"{func} waits for the device, which a captured graph cannot")
    Graph.record(func, args, kwargs, result)
    old = storages((args, kwargs))
    poison([x for x in tree_leaves(result) if is_npu(x) and not storages(x) <= old])
    return result


def start():
    """Simulate in all threads of this process until it ends."""
    os.environ["ASCEND_SIM_CANN"] = cann()
    if os.environ.get("ASCEND_SIM_OLD_WHEEL") == "1":
        kernels.hide_cache_mode()
    graphs.install()
    show = torch._tensor_str._tensor_str  # it computes outside every dispatch mode
    torch._tensor_str._tensor_str = lambda tensor, indent: show(
        tensor.cpu() if is_npu(tensor) else tensor, indent
    )
    run = threading.Thread.run

    def run_simulated(thread):
        with SimulatedNPU():
            run(thread)

    setattr(threading.Thread, "run", run_simulated)  # noqa: B010
    SimulatedNPU().__enter__()
