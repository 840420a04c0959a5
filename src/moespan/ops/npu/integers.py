"""Matrices of 8-bit integers on Ascend NPUs: their layout, and the operators' arguments.

|             | W8A16                          | W8A8                                             |
|-------------|--------------------------------|--------------------------------------------------|
| one matrix  | `npu_weight_quant_batchmatmul` | `npu_dynamic_quant`, then `npu_quant_matmul`     |
| experts     | `npu_grouped_matmul` with      | `npu_grouped_matmul` with `scale` and            |
|             | `antiquant_scale`              | `per_token_scale`; `npu_dequant_swiglu_quant`    |

The combinations of dtypes follow the operators' pages in Ascend/op-plugin
(docs/zh/custom_APIs/torch_npu) for A2 and A3, and the checks in CANN's aclnn_grouped_matmul.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight, round_rows

_MOST_COLUMNS = 65535
# Widths that `npu_dequant_swiglu_quant` takes for rows of several experts.
_SWIGLU_WIDTHS = range(64, 10496 + 1, 64)


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix of 8-bit integers, or a bank of them.

    Attributes:
        values: int8 [in, out] or [E, in, out].
        scales: float32 [out] or [E, out].
        rounds: whether activations are rounded to 8 bits too.
    """

    values: Tensor
    scales: Tensor
    rounds: bool
    _cast: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, weight: QuantizedWeight) -> IntegerMatrix:
        """A transposed view of a single matrix, as the operators read it; a bank is copied to
        [E, in, out]."""
        values = weight.values.transpose(-2, -1)
        if values.dim() == 3:
            values = values.contiguous()
        return cls(values, weight.scales, weight.activation_bits == 8)

    def __len__(self) -> int:
        """Matrices of a bank."""
        return len(self.values)

    @property
    def has_swiglu(self) -> bool:
        """Whether `npu_dequant_swiglu_quant` takes the width of this gate-up bank [E, in, 2·I]."""
        return self.values.shape[-1] // 2 in _SWIGLU_WIDTHS

    def kwargs_for_floats(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a grouped matmul whose rows are of `dtype`, 16 bits."""
        scales, offsets = self._scales_in(dtype)
        # The operator demands offsets, although they are zero.
        return {"antiquant_scale": [scales], "antiquant_offset": [offsets]}

    def kwargs_for_integers(self, row_scales: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a grouped matmul whose rows are int8 with float32 scales [R], to `dtype`.

        With bfloat16 results the scales of the matrix must be bfloat16, with float16 results
        float32.
        """
        scales = self._scales_in(dtype)[0] if dtype == torch.bfloat16 else self.scales
        return {"scale": [scales], "per_token_scale": [row_scales], "output_dtype": dtype}

    def in_float32(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the product of x [R, in] in float32: x, rounded if `rounds`, and the
        matrices [..., in, out]. No operator takes float32, which serves to compare with a
        reference."""
        if self.rounds:
            values, scales = round_rows(x)
            x = values.float() * scales[:, None]
        return x, self.values.float() * self.scales[..., None, :]

    def times(self, npu: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·values·scales + bias, for one matrix: [T, in] → [T, out], by operators of `npu`."""
        num_columns = self.values.shape[1]
        if not x.numel():
            return x.new_empty(len(x), num_columns)
        if x.dtype == torch.float32:
            x, matrix = self.in_float32(x)
            return x @ matrix if bias is None else torch.addmm(bias, x, matrix)
        if bias is not None and (self.rounds or x.dtype == torch.bfloat16):
            bias = bias.float()
        if self.rounds:
            rows, row_scales = npu.npu_dynamic_quant(x)
            scales, dtype = self.scales, x.dtype

            def multiply(values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
                out: Tensor = npu.npu_quant_matmul(
                    rows, values, scales, pertoken_scale=row_scales, bias=bias, output_dtype=dtype
                )
                return out
        else:
            scales = self._scales_in(x.dtype)[0]

            def multiply(values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
                out: Tensor = npu.npu_weight_quant_batchmatmul(x, values, scales, bias=bias)
                return out

        if num_columns <= _MOST_COLUMNS:
            return multiply(self.values, scales, bias)
        # An unsplit head has more columns than the operators take.
        parts = self.values.split(_MOST_COLUMNS, 1)
        biases = [None] * len(parts) if bias is None else bias.split(_MOST_COLUMNS)
        each = zip(parts, scales.split(_MOST_COLUMNS), biases, strict=True)
        return torch.cat([multiply(*part) for part in each], 1)

    def _scales_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales in `dtype`, and as many zeros. Made once: recorded graphs hold the addresses."""
        if dtype not in self._cast:
            scales = self.scales.to(dtype)
            self._cast[dtype] = scales, torch.zeros_like(scales)
        return self._cast[dtype]
