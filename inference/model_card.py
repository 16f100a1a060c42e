"""The README.md of a bundle."""

from collections.abc import Mapping
from typing import Any

from common.tables import format_number, markdown_table
from inference.scoring.reports import rates

KINDS = {"ctc": "CTC", "s2s": "joint CTC/attention"}
"""What the kinds of models are called."""

_USE = """\
From the repository of Mamba-ASR:

```python
from inference import Recognizer

asr = Recognizer.from_pretrained("path/of/this/folder")  # or its name on the hub
print(asr.transcribe("speech.wav").text)
```

or `python transcribe.py path/of/this/folder speech.wav`. Both load data alone and execute nothing
of this folder. SpeechBrain's `{interface}.from_hparams(source="path/of/this/folder")` gives the
same text there; it executes `hyperparams.yaml`."""


def model_card(config: Mapping[str, Any], checksums: Mapping[str, str]) -> str:
    """What the model is, what it was trained on, how well it did and how to use it.

    Args:
        config: of the bundle.
        checksums: SHA-256 of its files by their names.
    """
    network, training, run = config["network"]["Transformer"], config["training"], config["run"]
    encoder = network.get("encoder_module", "transformer")
    kind = KINDS[config["kind"]]
    blocks = [
        _front_matter(config),
        f"# {encoder} {kind} speech recogniser",
        "A bundle of Mamba-ASR: a trained model as a folder of data.",
        _table(_about(config, encoder, kind)),
        "## Use",
        _USE.format(interface="EncoderASR" if config["kind"] == "ctc" else "EncoderDecoderASR"),
        *_results(config),
        "## Training",
        _table(
            [
                ("trained on", _names(training["train_splits"])),
                ("checkpoints chosen on", _names(training["dev_splits"])),
                *training["settings"].items(),
                ("seed", training["seed"]),
                ("precision", run.get("precision")),
                ("commit", run.get("commit")),
                ("versions", _pairs(run.get("versions"))),
            ]
        ),
        *([f"By `{run['command']}`."] if "command" in run else []),
        "## Files",
        markdown_table(
            ("file", "SHA-256"),
            [(name, f"`{digest}`") for name, digest in checksums.items()],
            text_columns=2,
        ),
        "## Licence",
        _licence(config["licence"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _front_matter(config: Mapping[str, Any]) -> str:
    """What the hub reads of a card."""
    lines = ["---", "library_name: mamba-asr", "pipeline_tag: automatic-speech-recognition"]
    if config["language"]:
        lines.append(f"language: {config['language']}")
    if config["licence"]:
        lines.append(f"license: {config['licence']}")
    return "\n".join([*lines, "---"])


def _about(config: Mapping[str, Any], encoder: str, kind: str) -> list[tuple[str, Any]]:
    network, features = config["network"]["Transformer"], config["features"]["compute_features"]
    layers = f"{network.get('num_encoder_layers')} layers, width {network.get('d_model')}"
    decoder = None
    if config["kind"] == "s2s":
        module = network.get("decoder_module", "transformer")
        decoder = f"{module}, {network.get('num_decoder_layers')} layers"
    lm = config["lm"]["class"] if "lm" in config else None
    return [
        ("kind", kind),
        ("language", config["language"] or "not stated"),
        ("encoder", f"{encoder}, {layers}"),
        ("decoder", decoder),
        ("language model in the search", lm),
        ("parameters", f"{config['parameters']:,}"),
        ("audio", f"{features.get('sample_rate', 16000)} Hz, one channel"),
        ("tokens", f"{config['tokens']['type']}, {config['tokens']['outputs']} outputs"),
        ("weights stored as", config["stored_precision"]),
    ]


def _results(config: Mapping[str, Any]) -> list[str]:
    if not config["results"]:
        return []
    tuned_on = config["training"]["dev_splits"]
    rows = [
        (
            split,
            "yes" if split in tuned_on else "no",
            *(format_number(rate, 2) for rate in rates(score)),
            score["words"],
        )
        for split, score in config["results"].items()
    ]
    precision = config["stored_precision"]
    rounded = "" if precision == "fp32" else f", before its weights were stored as {precision}"
    header = ("split", "checkpoints chosen on it", "WER %", "CER %", "words")
    blocks = [
        "## Results",
        markdown_table(header, rows, text_columns=2),
        f"As the training run's own evaluation gave them{rounded}.",
    ]
    if config["left_out"]:
        blocks.append(
            f"The run's search also has a {' and a '.join(config['left_out'])}, which the bundle "
            "does not hold: without it results are others than these."
        )
    for split, command in config["evaluations"].items():
        blocks.append(f"{split} was scored by `{command}`.")
    return blocks


def _licence(licence: str | None) -> str:
    weights = licence or (
        "not stated: whoever trained them decides, within the licence of the speech that they were "
        "trained on"
    )
    return f"Of the weights: {weights}. Of Mamba-ASR, which runs them: MIT."


def _table(rows: list[tuple[str, Any]]) -> str:
    known = [(name, value) for name, value in rows if value not in (None, "")]
    return markdown_table(("", ""), known, text_columns=2)


def _names(splits: list[str]) -> str:
    return ", ".join(splits) or "unknown"


def _pairs(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
