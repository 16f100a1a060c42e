"""Weights as a bundle stores them: float32, float16, or integers of 8 bits with scales."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UserError

PRECISIONS = ("fp32", "fp16", "int8")
NORMALIZER = "normalize."
"""Before the names of the normaliser's statistics, which are stored as they are."""

_SCALE_SUFFIX = "#scale"
# Shorter rows gain little beside their scale: the state of a scan, convolutions over time.
_MIN_INT8_COLUMNS = 32


def pack(tensors: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Tensors as they are stored.

    With int8 a matrix becomes integers between -127 and 127, and beside it a float32 scale for each
    of its rows; all that is no matrix of long rows stays float32.

    Args:
        tensors: weights and statistics by name.
        precision: one of ``PRECISIONS``.

    Raises:
        UserError: a weight that the precision cannot hold.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or name.startswith(NORMALIZER):
            stored[name] = tensor.contiguous()
        elif precision == "int8" and tensor.dim() > 1 and tensor[0].numel() >= _MIN_INT8_COLUMNS:
            rows_RC = tensor.float().flatten(1)
            scale_R1 = rows_RC.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            stored[name] = (rows_RC / scale_R1).round().to(torch.int8).reshape(tensor.shape)
            stored[name + _SCALE_SUFFIX] = scale_R1[:, 0].contiguous()
        else:
            dtype = torch.float16 if precision == "fp16" else torch.float32
            stored[name] = tensor.to(dtype).contiguous()
            if stored[name].isinf().any() and tensor.isfinite().all():
                raise UserError(f"{name} has weights beyond float16. Store the model as fp32.")
    return stored


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``pack``, in float32.

    Raises:
        UserError: scales that belong to another tensor.
    """
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE_SUFFIX):
            continue
        scale_R = stored.get(name + _SCALE_SUFFIX)
        if scale_R is not None:
            if scale_R.shape != tensor.shape[:1]:
                raise UserError(f"{name} has scales that are not one for each of its rows.")
            tensor = tensor.float() * scale_R.reshape(-1, *[1] * (tensor.dim() - 1))
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors
