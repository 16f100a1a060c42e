"""What a Mamba mixer does between its two projections: convolution, step sizes, scan and gate."""

from ops.mamba_inner.arguments import Direction
from ops.mamba_inner.dispatch import mamba_inner_fn
from ops.mamba_inner.step import mamba_inner_step

__all__ = ["Direction", "mamba_inner_fn", "mamba_inner_step"]
