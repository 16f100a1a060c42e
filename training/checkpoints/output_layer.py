"""How many outputs a model is to have: as many as its tokenizer asks for, unless the user says."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import ruamel.yaml

from inference.bundle import CONFIG_FILE
from training.launch.command_line import CommandLine, load_hparams

logger = logging.getLogger(__name__)


def outputs_of_run(run: str | Path) -> int | None:
    """``output_neurons`` of the run in a folder; None where there is none."""
    try:
        text = (Path(run) / "hyperparams.yaml").read_text(encoding="utf-8")
        return int(ruamel.yaml.YAML().load(text)["output_neurons"])
    except (OSError, ValueError, TypeError, KeyError, ruamel.yaml.YAMLError):
        return None


def _outputs_of_bundle(bundle: Path) -> int | None:
    """Outputs of the model in a bundle; None where there is none."""
    try:
        config = json.loads((bundle / CONFIG_FILE).read_text(encoding="utf-8"))
        return int(config["tokens"]["outputs"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def outputs_for(tokenizer_file: str | Path, num_tokens: int) -> int:
    """Outputs of a model that is to decode together with those of a tokenizer's run.

    Args:
        tokenizer_file: ``save/tokenizer.model`` or ``lm/tokenizer.ckpt`` of a run, or that of a
            bundle, which may have more outputs than tokens; or a tokenizer from elsewhere.
        num_tokens: of the tokenizer.
    """
    folder = Path(tokenizer_file).resolve().parent
    beside = _outputs_of_bundle(folder) or outputs_of_run(folder.parent)
    return num_tokens if beside is None else max(beside, num_tokens)


def with_outputs(
    line: CommandLine, hparams: dict[str, Any], outputs: int
) -> tuple[CommandLine, dict[str, Any]]:
    """Command line and hyperparameters of a model with so many outputs, its objects made anew."""
    if outputs == hparams["output_neurons"]:
        return line, hparams
    logger.info("output_neurons is %d, as the tokenizer has it", outputs)
    line = replace(line, overrides={**line.overrides, "output_neurons": outputs})
    return line, load_hparams(line.param_file, line.overrides)
