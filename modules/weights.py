"""Weights from a file into a network, with an error that says what does not fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import why_unreadable


def load_model_weights(module: torch.nn.Module, path: Path, where: str = "checkpoint") -> None:
    """Load the state dict of a file strictly.

    Raises:
        UserError: the file cannot be read, or the weights belong to another architecture; names the
            first mismatches.
    """
    load_weights(module, read_weights(path), path, where)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
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
    return state


def with_new_decoder(state: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """What a joint model begins with that takes over a CTC model: its decoder is its own.

    Args:
        state: of ``[CNN, Transformer, ctc_lin]``, the ``model`` of a CTC recipe; another state is
            returned as it is.
        model: ``[CNN, Transformer, seq_lin, ctc_lin]``, that of a joint recipe.
    """
    if {name.split(".")[0] for name in state} != {"0", "1", "2"}:
        return dict(state)
    own_parts = ("1.decoder.", "1.custom_tgt_module.", "2.")
    own = {name: value for name, value in model.state_dict().items() if name.startswith(own_parts)}
    taken = {f"3{name[1:]}" if name.startswith("2.") else name: state[name] for name in state}
    return own | taken


def load_weights(
    module: torch.nn.Module, state: Mapping[str, Tensor], path: Path, where: str
) -> None:
    """Load a state dict strictly; ``load_model_weights`` has the errors."""
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


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
