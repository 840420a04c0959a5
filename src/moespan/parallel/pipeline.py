"""Transport of the hidden state from one pipeline stage to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from moespan.parallel.mesh import Mesh


class StageLink:
    """Sends hidden states [L, H], replicated over tp, to the next stage.

    Each tp rank sends 1/tp of the tensor to its peer, and the peers gather the parts. Nothing
    travels twice between stages, which may be on different nodes.
    """

    def __init__(self, mesh: Mesh, hidden_size: int, dtype: torch.dtype) -> None:
        self._mesh = mesh
        self._hidden_size = hidden_size
        self._dtype = dtype

    def send(self, x: Tensor) -> None:
        """Start sending `x` [L, H] to the next stage."""
        tp, pp = self._mesh.tp, self._mesh.pp
        length = self._part_length(len(x))
        part = x.flatten()[tp.rank * length : (tp.rank + 1) * length]
        padded = torch.nn.functional.pad(part, (0, length - len(part)))
        pp.send(padded, pp.rank + 1, "hidden")

    def receive(self, num_tokens: int) -> Tensor:
        """Wait for the hidden state [num_tokens, H] of the previous stage."""
        tp, pp = self._mesh.tp, self._mesh.pp
        part = torch.empty(
            self._part_length(num_tokens), dtype=self._dtype, device=self._mesh.device
        )
        whole = tp.all_gather(pp.receive(part, pp.rank - 1), "hidden")
        return whole[: num_tokens * self._hidden_size].view(num_tokens, self._hidden_size)

    def _part_length(self, num_tokens: int) -> int:
        return -(-num_tokens * self._hidden_size // self._mesh.tp.size)
