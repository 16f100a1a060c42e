"""Weights from a file into a network, with an error that says what does not fit."""

from pathlib import Path

import torch

from common.errors import UserError
from common.files import why_unreadable


def load_model_weights(module: torch.nn.Module, path: Path, where: str = "checkpoint") -> None:
    """Load a state dict strictly.

    Raises:
        UserError: the file cannot be read, or the weights belong to another architecture; names the
            first mismatches.
    """
    if reason := why_unreadable(path):
        raise UserError(f"{path} is not a file of model weights: {reason}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # What torch says is for programmers, and may be nothing.
        kind = type(error).__name__
        raise UserError(f"{path} is not a file of model weights, or damaged ({kind}).") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} is not a file of model weights: it holds no dict of tensors")
    own = module.state_dict()
    problems = [
        f"{name}: the model has it, the {where} does not" for name in own if name not in state
    ]
    problems += [
        f"{name}: the {where} has it, the model does not" for name in state if name not in own
    ]
    problems += [
        f"{name}: {tuple(state[name].shape)} in the {where}, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        raise UserError(
            f"{path} belongs to another architecture. {len(problems)} parameters differ, first: "
            + "; ".join(problems[:5])
            + ". Use the YAML and overrides that it was trained with, or another output_folder."
        )
    module.load_state_dict(state)
