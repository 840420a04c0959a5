"""Operations for Ascend NPUs, through torch_npu."""
