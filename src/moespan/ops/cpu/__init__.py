"""Operations for CPUs. Importing this package loads nothing.

`plain.py`: the operations in plain torch, for any dtype. `native.py`: the operations in bfloat16
through C++ kernels. `compiler.py`: builds and loads the library of kernels. `packing.py`: packs
weights as the kernels read them. `kernels/`: the C++ sources; `kernels.cpp` describes them.
"""
