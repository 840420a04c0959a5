"""Operations for CUDA GPUs. Importing this package loads nothing; its modules need Triton.

`ops.py`: the operations. The other files hold Triton kernels, each with the function that launches
it. `rows.py`: norms, swiglu, rotary embedding, cache writes, rounding to 8 bits. `attention.py`:
attention over the paged cache. `routing.py`: the router, and the sorting of pairs of token and
expert. `matmul.py`: products with one matrix or a bank of experts. `tiles.py` and `tiles.json`: the
tile sizes of those products.

No kernel takes a length from the host, waits for the device or adds with atomics. Launches depend
on shapes alone, so that graphs can record them, and results are the same in every run.

With TRITON_INTERPRET=1 set before Triton is imported, everything runs on tensors of the CPU.
"""
