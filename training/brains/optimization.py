"""Optimiser parameter groups, clipping and learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from speechbrain.nnet.schedulers import NoamScheduler
from speechbrain.utils import checkpoints

_NORMS = (
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.RMSNorm,
)


def parameter_groups(module: torch.nn.Module) -> list[dict]:
    """Two groups: weights that decay, and those that must not.

    The second holds biases (those of relative positions too), the weights of every normalisation
    (whatever their shape), everything one-dimensional, and the rates A_log of mixers, which decay
    would pull towards -1, by their names and by mamba_ssm's mark ``_no_weight_decay``, which a copy
    of a network loses.
    """
    decay, keep, seen = [], [], set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            spared = (
                isinstance(part, _NORMS)
                or parameter.ndim <= 1
                or "bias" in name
                or name.endswith("_log")
                or getattr(parameter, "_no_weight_decay", False)
            )
            (keep if spared else decay).append(parameter)
    return [{"params": decay}, {"params": keep, "weight_decay": 0.0}]


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clip the norm over all groups together; a negative ``max_norm`` only measures it.

    SpeechBrain's own clipping covers the first group alone.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def scale_gradients(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every gradient."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)


@checkpoints.register_checkpoint_hooks
class WarmupHoldCosineScheduler:
    """Linear warm-up, a plateau, then a cosine down to a fraction of the peak.

    Called once after every optimiser step, as SpeechBrain's NoamScheduler is.

    Args:
        lr_initial: peak learning rate.
        n_warmup_steps: optimiser steps from 0 to the peak.
        n_hold_steps: optimiser steps at the peak.
        total_steps: optimiser steps until the end of the decay; None waits for ``end_at``.
        final_fraction: of the peak, at and after ``total_steps``.

    Raises:
        ValueError: the decay would end before it begins.
    """

    def __init__(
        self,
        lr_initial: float,
        n_warmup_steps: int,
        total_steps: int | None,
        n_hold_steps: int = 0,
        final_fraction: float = 0.01,
    ):
        self.lr_initial = lr_initial
        self.n_warmup_steps = n_warmup_steps
        self.n_hold_steps = n_hold_steps
        self.final_fraction = final_fraction
        self.n_steps = 0
        self.total_steps: int | None = None
        if total_steps is not None:
            self.end_at(total_steps)

    def end_at(self, total_steps: int) -> None:
        """Let the decay end at the optimiser step with this number.

        Raises:
            ValueError: it would end before it begins.
        """
        if self.n_warmup_steps + self.n_hold_steps >= total_steps:
            raise ValueError(
                f"total_steps ({total_steps}) must exceed n_warmup_steps + n_hold_steps "
                f"({self.n_warmup_steps} + {self.n_hold_steps})."
            )
        self.total_steps = total_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step number ``step``, counted from 1."""
        if step < self.n_warmup_steps:
            return self.lr_initial * step / self.n_warmup_steps
        if self.total_steps is None:
            raise ValueError("total_steps is open: it follows from epochs and batches, or give it.")
        decay_steps = self.total_steps - self.n_warmup_steps - self.n_hold_steps
        progress = (step - self.n_warmup_steps - self.n_hold_steps) / decay_steps
        cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return self.lr_initial * (self.final_fraction + (1 - self.final_fraction) * cosine)

    def __call__(self, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        """Advance one step; returns the learning rates before and after."""
        self.n_steps += 1
        before, after = optimizer.param_groups[0]["lr"], self.lr_at(self.n_steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = after
        return before, after

    @checkpoints.mark_as_saver
    def _save(self, path):
        torch.save({"n_steps": self.n_steps}, path)

    @checkpoints.mark_as_loader
    def _load(self, path, end_of_epoch=False):
        del end_of_epoch
        self.n_steps = torch.load(path, weights_only=True)["n_steps"]


def first_lr(scheduler: NoamScheduler | WarmupHoldCosineScheduler) -> float:
    """Learning rate of the very first step, before the schedule was called."""
    if isinstance(scheduler, WarmupHoldCosineScheduler):
        return scheduler.lr_at(1)
    return scheduler.lr_initial * scheduler.normalize * scheduler.n_warmup_steps**-1.5


def count_parameters(modules: Iterable[torch.nn.Module]) -> int:
    """Trainable parameters, shared ones counted once."""
    unique = {
        id(p): p.numel() for module in modules for p in module.parameters() if p.requires_grad
    }
    return sum(unique.values())
