"""Dropout on a CPU, where PyTorch's takes longer than the matrix product beside it."""

from ops.dropout.cpu import dropout, fits

__all__ = ["dropout", "fits"]
