"""The README.md of a bundle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml

from common.tables import format_number, markdown_table

_USE = """```python
from inference import Recognizer

asr = Recognizer.from_bundle("path/of/this/folder")
print(asr.transcribe("speech.wav").text)
```

or `python transcribe.py path/of/this/folder speech.wav`."""


def model_card(config: Mapping[str, Any], run: str | Path) -> str:
    """What the model is, what it was trained on, how well it did and how to use it.

    Args:
        config: of the bundle.
        run: output folder of the training run; what it does not have is left out.
    """
    run = Path(run)
    results, recipe = _results(run), _recipe(run)
    network, features = config["network"]["Transformer"], config["features"]["compute_features"]
    branches = {"ctc": "CTC", "s2s": "joint CTC/attention"}[config["kind"]]
    about = [
        ("kind", f"{branches}, encoder {network['encoder_module']}"),
        ("parameters", _grouped(results.get("model", {}).get("parameters"))),
        ("audio", f"{features.get('sample_rate', 16000)} Hz, one channel"),
        ("tokens", f"{config['tokens']['type']}, {config['tokens']['outputs']} outputs"),
        ("trained on", ", ".join(recipe.get("train_splits", [])) or "unknown"),
        ("checkpoints chosen on", ", ".join(recipe.get("dev_splits", [])) or "unknown"),
        ("weights stored as", config.get("stored_precision", "fp32")),
        ("seed", recipe.get("seed", "unknown")),
        ("commit", results.get("run", {}).get("commit") or "unknown"),
        ("command", f"`{results.get('run', {}).get('command', 'unknown')}`"),
    ]
    blocks = [
        f"# {network['encoder_module']} {config['kind']} recogniser",
        "A bundle of Mamba-ASR. It holds data alone; loading it executes nothing.",
        markdown_table(("", ""), about, text_columns=2),
        "## Use",
        _USE,
    ]
    if results.get("splits"):
        rows = [
            (split, f"{score['wer']:.2f}", f"{score['cer']:.2f}", score["words"])
            for split, score in results["splits"].items()
        ]
        blocks += [
            "## Results",
            markdown_table(("split", "WER %", "CER %", "words"), rows),
            "As the training run's own evaluation gave them.",
        ]
    blocks += [
        "## Licence",
        "Of the weights: whoever trained them decides, within the licence of the speech they were "
        "trained on. Mamba-ASR itself is under the MIT licence.",
    ]
    return "\n\n".join(blocks) + "\n"


def _grouped(count: Any) -> str:
    return f"{count:,}" if isinstance(count, int) else format_number(None, 0)


def _results(run: Path) -> dict[str, Any]:
    try:
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def _recipe(run: Path) -> dict[str, Any]:
    try:
        recipe = ruamel.yaml.YAML().load((run / "hyperparams.yaml").read_text(encoding="utf-8"))
    except (OSError, ruamel.yaml.YAMLError):
        return {}
    return dict(recipe)
