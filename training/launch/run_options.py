"""SpeechBrain's run options (device, precision, ...), known before SpeechBrain is imported."""

import argparse
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from common.errors import UserError

IN_USE = (
    "test_only",
    "device",
    "precision",
    "eval_precision",
    "grad_accumulation_factor",
    "max_grad_norm",
    "ckpt_interval_minutes",
    "ckpt_interval_steps",
    "optimizer_step_limit",
    "nonfinite_patience",
    "noprogressbar",
    "debug",
    "debug_batches",
    "debug_epochs",
    "debug_persistently",
)
"""Those that help lists first; the others follow under a heading of their own."""

OF_ONE_START = {
    "param_file",
    "test_only",
    "device",
    "distributed_backend",
    "noprogressbar",
    "log_config",
    *("debug", "debug_batches", "debug_epochs", "debug_persistently"),
}
"""Those that a run does not keep when it goes on."""


@cache
def _speechbrain_module() -> ModuleType:
    """``speechbrain.utils.run_opts`` by itself: importing its package takes seconds."""
    found = importlib.util.find_spec("speechbrain")
    if found is None or not found.submodule_search_locations:
        raise UserError("SpeechBrain is not installed: pip install -r requirements.txt")
    path = Path(found.submodule_search_locations[0]) / "utils" / "run_opts.py"
    spec = importlib.util.spec_from_file_location("_speechbrain_run_opts", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def option_actions() -> dict[str, argparse.Action]:
    """SpeechBrain's options by name: those in use in the order above, then the others by name."""
    actions = {
        action.dest: action
        for action in _speechbrain_module().RunOptions._create_parser()._actions
        if action.option_strings and action.dest != "help"
    }
    # SpeechBrain's default of None leaves it a string, which no step count exceeds.
    actions["optimizer_step_limit"].type = int
    return {name: actions[name] for name in (*IN_USE, *sorted(actions.keys() - set(IN_USE)))}
