"""Numbers for the pretend NPU that ascend_dryrun_setup.py builds.

Importing this module does two things.

1. It gives the fused `torch_npu` operators that an inference engine needs a CPU kernel,
   so that `torch_npu.npu_rms_norm(x, g)` works on CPU tensors. The schema, defaults and
   argument checks stay torch_npu's own. What an NPU leaves uninitialised is filled with
   NaN or -2**31 here, so that code which reads it fails.

2. It offers `with SimulatedNPU():`, under which operations on `npu` tensors compute.
   Each one runs twice: through the real adapter in libtorch_npu.so (dtype, shape and
   device checks; output allocation; a kernel that does nothing), and on a CPU view of
   the same memory. Results must agree in shape and dtype; then the CPU's numbers go
   into the NPU's output. Collectives pass through to the pretend HCCL. A captured
   NPUGraph replays: the same operations again, on the same memory, with the captured
   host values unless a graph task update replaced them.

A mode belongs to the thread that enters it. Views, copies and casts need no mode.
The semantics follow op-plugin's documents and its tests; a real NPU has the last word.
"""

import ctypes
import os

os.environ.setdefault("TASK_QUEUE_ENABLE", "0")  # kernels then run in the calling thread, in order

import torch
import torch_npu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

POISON = {True: float("nan"), False: -(2**31)}  # by dtype.is_floating_point: what must not be read
LIBRARIES = {space: torch.library.Library(space, "IMPL") for space in ("npu", "atb")}


def kernel(name):
    """Register a function as the CPU kernel of `namespace::operator[.overload]`."""
    space, operator = name.split("::")
    return lambda function: LIBRARIES[space].impl(operator, function, "CPU") or function


def refuse(**unsupported):
    for name, value in unsupported.items():
        if value not in (None, 0, False, "", []):
            raise NotImplementedError(f"the simulator does not know {name}={value}")


def uninitialised(shape, like, dtype=None):
    dtype = dtype or like.dtype
    return torch.full(shape, POISON[dtype.is_floating_point], dtype=dtype)


# ------------------------------------------------------------------ normalisation, activation, rotation


@kernel("npu::npu_rms_norm")
def rms_norm(x, gamma, epsilon=1e-6):
    axes = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(x.float().square().mean(axes, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


@kernel("npu::npu_add_rms_norm")
def add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    total = x1 + x2
    return *rms_norm(total, gamma, epsilon), total


@kernel("npu::npu_swiglu")
def swiglu(x, dim=-1):
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def rotate(x, cos, sin, mode):
    x1, x2 = x.float().chunk(2, -1) if mode == "half" else (x.float()[..., ::2], x.float()[..., 1::2])
    turned = torch.cat((-x2, x1), -1) if mode == "half" else torch.stack((-x2, x1), -1).flatten(-2)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)


@kernel("npu::npu_rotary_mul")
def rotary_mul(x, cos, sin, rotary_mode="half", rotate_by=None):
    refuse(rotate=rotate_by)
    return rotate(x, cos, sin, rotary_mode)


@kernel("npu::npu_apply_rotary_pos_emb")
def apply_rotary_pos_emb(query, key, cos, sin, layout="BSND", rotary_mode="half"):
    if layout not in ("BSND", "TND") or rotary_mode != "half" or query.size(-1) not in (64, 128):
        raise ValueError("A2 and A3 rotate BSND or TND, half mode, head size 64 or 128 only")
    query.copy_(rotate(query, cos, sin, rotary_mode))  # in place, although the schema does not say so
    key.copy_(rotate(key, cos, sin, rotary_mode))
    return query, key


# ------------------------------------------------------------------ mixture of experts


@kernel("npu::npu_moe_gating_top_k_softmax")
def gating_top_k_softmax(x, finished=None, k=1):
    weights = x.float().softmax(-1)
    ids = weights.argsort(dim=-1, descending=True, stable=True)[..., :k]
    rows = torch.arange(ids.numel(), dtype=torch.int32).reshape(k, -1).T.reshape(ids.shape)
    weights = weights.gather(-1, ids).to(x.dtype)
    if finished is not None:
        ids = torch.where(finished.unsqueeze(-1), x.size(-1), ids)
    return weights, ids.int(), rows.contiguous()


@kernel("npu::npu_moe_init_routing_v2")
def init_routing(x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, expert_num=-1,
                 drop_pad_mode=0, expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1,
                 active_expert_range=(), row_idx_type=0, x_dtype=None):
    refuse(scale=scale, offset=offset, drop_pad_mode=drop_pad_mode, x_dtype=x_dtype, quant_mode=quant_mode + 1)
    k, flat = expert_idx.size(1), expert_idx.flatten().long()
    start, end = active_expert_range or (0, expert_num)
    active = (flat >= start) & (flat < end)
    order = torch.where(active, flat, end).argsort(stable=True)[: int(active.sum())].int()
    rows = min(active_num, flat.numel()) if active_num > 0 else flat.numel()

    expanded = uninitialised((rows, x.size(1)), x)
    kept = order[:rows]
    expanded[: kept.numel()] = x[kept // k]
    row_idx = torch.full((flat.numel(),), -1 if row_idx_type == 0 else POISON[False], dtype=torch.int32)
    if row_idx_type == 0:  # gather: where each (token, choice) went, -1 for the experts of others
        row_idx[order.long()] = torch.arange(order.numel(), dtype=torch.int32)
    else:  # scatter: which (token, choice) each row came from
        row_idx[: order.numel()] = order
    counts = torch.bincount(flat[active] - start, minlength=end - start)
    if expert_tokens_num_type == 2:
        pairs = uninitialised((expert_num, 2), counts)
        used = counts.nonzero().flatten()
        pairs[: used.numel()] = torch.stack((used + start, counts[used]), 1)
        pairs[used.numel() : used.numel() + 1] = 0
        tokens = pairs
    else:
        tokens = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
    if not expert_tokens_num_flag:
        tokens = uninitialised((0,), counts)
    return expanded, row_idx, tokens, uninitialised((flat.numel(),), x, torch.float32)


@kernel("npu::npu_moe_token_permute")
def token_permute(tokens, indices, num_out_tokens=None, padded_mode=False):
    refuse(padded_mode=padded_mode)
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    k = flat.numel() // tokens.size(0)
    return tokens[order[: num_out_tokens or None] // k], order.argsort().int()


@kernel("npu::npu_moe_token_unpermute")
def token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    refuse(padded_mode=padded_mode)
    k = 1 if probs is None else probs.size(1)
    rows = permuted_tokens[sorted_indices.long()].float().unflatten(0, (-1, k))
    return (rows if probs is None else rows * probs.float().unsqueeze(-1)).sum(1).to(permuted_tokens.dtype)


@kernel("npu::npu_moe_finalize_routing")
def finalize_routing(expanded, skip1, skip2, bias, scales, src_to_dst, expert_for_source, drop_pad_mode=0, k=1):
    k = scales.size(1) if scales is not None else k
    index = src_to_dst.reshape(-1, k).long() if drop_pad_mode >= 2 else src_to_dst.reshape(k, -1).T.long()
    rows = torch.where((index >= 0).unsqueeze(-1), expanded.flatten(0, -2)[index.clamp(min=0)].float(), 0.0)
    if bias is not None:
        rows = rows + bias[expert_for_source.long()].float()
    out = (rows if scales is None else rows * scales.float().unsqueeze(-1)).sum(1)
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    return out.to(expanded.dtype)


@kernel("npu::npu_grouped_matmul")
def grouped_matmul(x, weight, *, bias=None, group_list=None, split_item=0, group_type=None, group_list_type=0,
                   output_dtype=None, **unsupported):
    refuse(**unsupported)
    weights = [w for one in weight for w in (one.unbind() if one.dim() == 3 else [one])]
    biases = [None] * len(weights) if bias is None else [b for one in bias for b in (one.unbind() if one.dim() == 2 else [one])]

    def product(a, i):
        y = a.float() @ weights[i].float()
        return (y if biases[i] is None else y + biases[i].float()).to(x[0].dtype)

    if group_type == -1:
        return [product(a, i) for i, a in enumerate(x)]
    if group_type != 0 or split_item not in (2, 3) or len(x) != 1 or group_list_type not in (0, 1):
        raise NotImplementedError("the simulator knows group_type 0 with one x and one y, and group_type -1")
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    if (counts < 0).any() or counts.sum() > x[0].size(0) or len(counts) != len(weights):
        raise ValueError(f"groups {counts.tolist()} do not fit {x[0].size(0)} rows and {len(weights)} weights")
    y = uninitialised((x[0].size(0), weights[0].size(1)), x[0])
    for i, (end, count) in enumerate(zip(counts.cumsum(0).tolist(), counts.tolist())):
        y[end - count : end] = product(x[0][end - count : end], i)
    return [y]


# ------------------------------------------------------------------ attention and its cache


def sequences(tensor, layout, heads, lengths):
    """Split a batch of queries, keys or values into one (S, N, D) tensor per sequence."""
    if layout == "TND":
        return list(tensor.split(torch.diff(torch.tensor([0, *lengths])).tolist()))
    if layout == "BSH":
        tensor = tensor.unflatten(-1, (heads, -1))
    rows = tensor.transpose(1, 2) if layout == "BNSD" else tensor
    lengths = lengths or [rows.size(1)]
    lengths = lengths * rows.size(0) if len(lengths) == 1 else lengths
    return [row[:length] for row, length in zip(rows, lengths)]


def paged(cache, table, heads, lengths, block_size):
    """The cached rows of each sequence; cache is (blocks, size, N*D) or (blocks, N, size, D)."""
    if cache.dim() == 4:
        cache = cache.transpose(1, 2)
    if cache.size(1) != block_size:
        raise ValueError(f"block_size {block_size}, but the cache has blocks of {cache.size(1)}")
    rows = cache.reshape(cache.size(0), block_size, heads, -1)
    return [rows[blocks.long()].flatten(0, 1)[:length] for blocks, length in zip(table, lengths)]


def mask_of(queries, keys, mode, atten_mask, pre_tokens, next_tokens, i):
    """True where a query may look."""
    back = torch.arange(queries).unsqueeze(1) + (0 if mode == 2 else keys - queries) - torch.arange(keys)
    if mode in (0, 1):
        if atten_mask is None:
            return torch.ones_like(back, dtype=torch.bool)
        hidden = atten_mask.bool()
        hidden = hidden[min(i, hidden.size(0) - 1)].flatten(0, -3)[0] if hidden.dim() > 2 else hidden
        return ~hidden[:queries, :keys]
    if atten_mask is None or tuple(atten_mask.shape[-2:]) != (2048, 2048):
        raise ValueError(f"sparse_mode {mode} wants a 2048 x 2048 atten_mask")
    if not torch.equal(atten_mask.bool().reshape(2048, 2048), torch.ones(2048, 2048, dtype=torch.bool).triu(1)):
        raise ValueError("the compressed atten_mask must be 1 above the diagonal (hidden) and 0 elsewhere")
    return (back >= -next_tokens) & (back <= pre_tokens) if mode == 4 else back >= 0


@kernel("npu::npu_fused_infer_attention_score")
def fused_infer_attention_score(query, key, value, *, atten_mask=None, actual_seq_lengths=None, actual_seq_lengths_kv=None,
                                block_table=None, num_heads=1, scale=1.0, pre_tokens=2147483647, next_tokens=2147483647,
                                input_layout="BSH", num_key_value_heads=0, sparse_mode=0, inner_precise=0, block_size=0,
                                softmax_lse_flag=False, **unsupported):
    refuse(**unsupported)
    if input_layout not in ("TND", "BSH", "BSND", "BNSD"):
        raise NotImplementedError(f"the simulator does not know input_layout={input_layout}")
    heads = num_key_value_heads or num_heads
    queries = sequences(query, input_layout, num_heads, actual_seq_lengths)
    if block_table is None:
        keys = sequences(key, input_layout, heads, actual_seq_lengths_kv)
        values = sequences(value, input_layout, heads, actual_seq_lengths_kv)
    else:  # lengths of cached sequences are per sequence, for TND too
        keys = paged(key, block_table, heads, actual_seq_lengths_kv, block_size)
        values = paged(value, block_table, heads, actual_seq_lengths_kv, block_size)
    outs, lses = [], []
    for i, (q, k, v) in enumerate(zip(queries, keys, values)):
        k, v = (t.repeat_interleave(num_heads // heads, 1).float() for t in (k, v))
        score = torch.einsum("snd,tnd->nst", q.float(), k) * scale
        mode = 0 if q.size(0) == 1 and input_layout != "TND" else sparse_mode
        seen = mask_of(q.size(0), k.size(0), mode, atten_mask, pre_tokens, next_tokens, i)
        score = score.masked_fill(~seen, float("-inf"))
        outs.append(torch.einsum("nst,tnd->snd", score.softmax(-1), v).to(query.dtype))
        lses.append(score.logsumexp(-1).T.unsqueeze(-1))
    if input_layout == "TND":
        return torch.cat(outs), torch.cat(lses) if softmax_lse_flag else torch.empty(0)
    size = query.size(2 if input_layout == "BNSD" else 1)
    out = torch.stack([torch.nn.functional.pad(o, (0, 0, 0, 0, 0, size - o.size(0))) for o in outs])
    lse = torch.stack([torch.nn.functional.pad(o, (0, 0, 0, 0, 0, size - o.size(0))) for o in lses]).transpose(1, 2)
    out = out.flatten(2) if input_layout == "BSH" else out.transpose(1, 2) if input_layout == "BNSD" else out
    return out.contiguous(), lse.contiguous() if softmax_lse_flag else torch.empty(0)


def fill(out, values):
    for place, value in zip(out, values):
        place.copy_(value) if value.numel() else None
    return tuple(out)


@kernel("npu::npu_fused_infer_attention_score.out")
def fused_infer_attention_score_out(*args, out, workspace=None, **same):
    return fill(out, fused_infer_attention_score(*args, **same))


@kernel("npu::npu_fused_infer_attention_score_v2.out")
def fused_infer_attention_score_v2_out(*args, out, workspace=None, **same):
    return fill(out, fused_infer_attention_score_v2(*args, **same))


@kernel("npu::npu_fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(query, key, value, *, actual_seq_qlen=None, actual_seq_kvlen=None, num_query_heads=1,
                                   softmax_scale=1.0, return_softmax_lse=False, **same):
    same.update(actual_seq_lengths=actual_seq_qlen, actual_seq_lengths_kv=actual_seq_kvlen, num_heads=num_query_heads)
    return fused_infer_attention_score(query, key, value, scale=softmax_scale, softmax_lse_flag=return_softmax_lse, **same)


@kernel("atb::_npu_reshape_and_cache")
def reshape_and_cache(key, value, key_cache, value_cache, slot_indices):
    kept = (slot_indices >= 0).nonzero().flatten()  # a negative slot is padding
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slot_indices[kept].long()] = rows[kept]


@kernel("npu::npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(key, value, key_cache, value_cache, slot_mapping, *, compress_lens=None,
                        compress_seq_offsets=None, seq_lens=None, cache_mode="PA_NZ"):
    refuse(compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    if cache_mode not in (None, "Norm"):
        raise NotImplementedError(f"the simulator does not know cache_mode={cache_mode}, which is the default")
    reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


@kernel("npu::npu_scatter_nd_update_")
def scatter_nd_update(tensor, indices, updates):
    tensor[tuple(indices.long().unbind(-1))] = updates
    return tensor


@kernel("npu::npu_format_cast")
def format_cast(tensor, acl_format, *, customize_dtype=None, input_dtype=None):
    return tensor.clone()  # the layout in memory is the hardware's own business


# ------------------------------------------------------------------ the device


def host(tensor):
    """A CPU tensor over the memory of an NPU tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())


def is_npu(x):
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


def to_cpu(x):
    """An argument as the CPU kernel wants it."""
    if is_npu(x):
        return host(x)
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return None if isinstance(x, torch.Generator) and x.device.type == "npu" else x


# Printing a tensor computes with it, and torch leaves every mode to do so.
show = torch._tensor_str._tensor_str
torch._tensor_str._tensor_str = lambda tensor, indent: show(tensor.cpu() if is_npu(tensor) else tensor, indent)

aten, npu = torch.ops.aten, torch.ops.npu
ALLOCATING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.set_,
              aten.resize_, aten.record_stream, aten._pin_memory,
              npu._npu_fused_infer_attention_score_get_max_workspace, npu._npu_fused_infer_attention_score_infer_output,
              npu._npu_fused_infer_attention_score_v2_get_max_workspace, npu._npu_fused_infer_attention_score_v2_infer_output}
COPYING = {aten._to_copy, aten.copy_, aten.clone, aten.item, aten._local_scalar_dense}  # the pretend device really does these
SYNCHRONISING = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.repeat_interleave,
                 aten.equal, aten.is_nonzero, aten.item, aten._local_scalar_dense}  # the host waits for a value or a shape
CPU_ONLY = SYNCHRONISING - COPYING | {aten.index, aten.index_put_, aten.bincount, npu.npu_format_cast}  # adapters need real kernels
COLLECTIVES = ("c10d", "_c10d_functional", "npu_custom_dist")


class SimulatedNPU(TorchDispatchMode):
    """Operations on npu tensors compute, and their adapters are checked. See the module's text."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        placed = any(isinstance(x, torch.device) and x.type == "npu" for x in leaves)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        packet = func.overloadpacket
        if not (placed or any(map(is_npu, leaves))) or packet in ALLOCATING:
            return func(*args, **kwargs)
        if Graph.updating is not None and not view:
            if func._schema.returns and "out" not in kwargs:
                raise RuntimeError(f"{func} in a graph task update: its result would be a new tensor, use an out variant")
            result = kwargs.get("out")
            result = tuple(result) if isinstance(result, list) else result
            Graph.updating.append((func, args, kwargs, result))
            return result
        if view or packet in COPYING or func.namespace in COLLECTIVES:
            result = func(*args, **kwargs)
            if view and storages(result) <= storages((args, kwargs)):
                return result  # not .contiguous() or .reshape() that had to copy
        elif packet in CPU_ONLY or func is aten.where.default:
            expected = on_cpu(func, args, kwargs)
            device = next(x.device for x in leaves if is_npu(x))
            result = args[0] if func._schema.is_mutable else tree_map_only(torch.Tensor, lambda x: x.to(device), expected)
        else:
            result = self.checked(func, args, kwargs)
        if Graph.capturing is not None:
            if packet in SYNCHRONISING or any(isinstance(x, torch.Tensor) and not is_npu(x) for x in tree_leaves(result)):
                raise RuntimeError(f"{func} waits for the device, which is not allowed while a graph is captured")
            Graph.capturing.append((func, args, kwargs, result))
        return result

    def checked(self, func, args, kwargs):
        """Both runs. The adapter may copy what it mutates about, so the CPU works on a copy made before."""
        names = func._schema.arguments
        bound = [*zip(names, args), *((a, kwargs[a.name]) for a in names[len(args):] if a.name in kwargs)]
        written = {id(t): (host(t), host(t).clone()) for a, value in bound if a.alias_info is not None and a.alias_info.is_write
                   for t in tree_leaves(value) if is_npu(t)}
        actual = func(*args, **kwargs)
        expected = on_cpu(func, args, kwargs, {key: copy for key, (_, copy) in written.items()})
        for memory, copy in written.values():
            memory.copy_(copy)
        for got, want in zip(tree_leaves(actual), tree_leaves(expected)):
            if is_npu(got) and (got.shape, got.dtype) != (want.shape, want.dtype):
                raise AssertionError(f"{func}: the NPU adapter returns {got.dtype} {tuple(got.shape)}, "
                                     f"the CPU kernel {want.dtype} {tuple(want.shape)}")
        deliver(expected, actual)
        return actual


def storages(tensors):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)}


def on_cpu(func, args, kwargs, instead=()):
    cpu_args, cpu_kwargs = tree_map(lambda x: instead[id(x)] if id(x) in instead else to_cpu(x), (args, kwargs))
    return func(*cpu_args, **cpu_kwargs)


def deliver(values, tensors):
    for tensor, value in zip(tree_leaves(tensors), tree_leaves(values)):
        if is_npu(tensor):
            host(tensor).copy_(value)


# ------------------------------------------------------------------ graphs


class Graph:
    """What torch_npu's graph functions say they do: steps are recorded, replayed and replaced."""

    capturing = updating = None  # the list of steps that operations now go to
    groups = {}  # task group handle: (steps of its graph, first, last)

    def begin(self, *args, **kwargs):
        Graph.capturing = self.steps = []
        begin(self, *args, **kwargs)

    def end(self):
        end(self)
        Graph.capturing = None

    def replay(self):
        for func, args, kwargs, result in self.steps:
            if func.namespace in COLLECTIVES:
                func(*args, **kwargs)
            else:
                deliver(on_cpu(func, args, kwargs), result)

    def group_begin(stream):
        Graph.first = len(Graph.capturing)
        group_begin(stream)

    def group_end(stream):
        handle = group_end(stream)
        Graph.groups[handle] = (Graph.capturing, Graph.first, len(Graph.capturing))
        return handle

    def update_begin(stream, handle):
        Graph.updating, Graph.place = [], Graph.groups[handle]

    def update_end(stream):
        steps, first, last = Graph.place
        if len(Graph.updating) != last - first:
            raise RuntimeError(f"a task group of {last - first} operations was updated with {len(Graph.updating)}")
        steps[first:last], Graph.updating = Graph.updating, None


graphs = torch_npu.npu.graphs
begin, end = graphs.NPUGraph.capture_begin, graphs.NPUGraph.capture_end
group_begin, group_end = graphs.graph_task_group_begin, graphs.graph_task_group_end
graphs.NPUGraph.capture_begin, graphs.NPUGraph.capture_end, graphs.NPUGraph.replay = Graph.begin, Graph.end, Graph.replay
for name in ("group_begin", "group_end", "update_begin", "update_end"):
    for module in (graphs, torch_npu.npu):
        setattr(module, f"graph_task_{name}", getattr(Graph, name))


def start():
    SimulatedNPU().__enter__()
