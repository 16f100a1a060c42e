"""The parameters that each direction of a mixer has of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Direction(NamedTuple):
    """Parameters of one direction; E inner width, W taps, R rank of the step sizes, N state.

    Attributes:
        conv_weight: (E, W).
        conv_bias: (E,) or None.
        x_proj: (R + 2N, E), from the convolved input to step sizes, B and C.
        dt_proj: (E, R).
        dt_bias: (E,), added to the step sizes before softplus.
        A_log: (E, N); the decay rates are A = -exp(A_log).
        D: (E,).
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor

    @property
    def A(self) -> Tensor:
        """Decay rates, at least in float32: in half precision neighbouring ones would coincide."""
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        return -torch.exp(self.A_log.to(exact))

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Step sizes, B and C in the last axis of what ``x_proj`` gives."""
        state = self.A_log.shape[1]
        return projected.split([self.dt_proj.shape[1], state, state], dim=-1)
