"""The Triton kernels of `moespan.ops.cuda.ops`, each with the function that launches it.

`rows.py`: norms, swiglu, rotary embedding, cache writes, rounding to 8 bits. `attention.py`: over
the paged cache. `routing.py`: the router, and pairs of token and expert in the order of experts.
`matmul.py`: products with one matrix or a bank of experts. `tiles.py`: the sizes that they work in.

No kernel needs a length from the host, waits for the device or adds with atomics: launches depend
on shapes alone, so that graphs can hold them, and results do not change from run to run.

With TRITON_INTERPRET=1 set before Triton is imported, all of it runs on tensors of the CPU.
"""
