"""Operations for Ascend NPUs. Importing this package loads nothing; its modules need torch_npu.

`ops.py`: the operations. `integers.py`: matrices of 8-bit integers.
"""
