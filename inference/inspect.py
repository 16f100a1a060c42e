"""What a bundle or a run is.

python -m inference.inspect my_model
python -m inference.inspect results/CTC/an4/3402 --json
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import EXIT_USER_ERROR, UserError, in_words
from common.files import file_digest
from common.tables import format_number, text_table
from inference.bundle import FILES, RUN_FILES, is_bundle, read_bundle, read_run
from inference.model_card import KINDS
from inference.scoring.reports import rates


def describe(folder: str | Path) -> dict[str, Any]:
    """Facts about the model in a folder, which is loaded to see that it is whole.

    Raises:
        UserError: there is none, or a damaged one.
    """
    folder = Path(folder)
    bundled = is_bundle(folder)
    model = read_bundle(folder) if bundled else read_run(folder)
    config = model.config
    recogniser = [module for name, module in model.parts().items() if name != "lm"]
    features, network = config["features"], config["network"]["Transformer"]
    names = [name for name in (FILES if bundled else RUN_FILES) if (folder / name).is_file()]
    return {
        "path": str(folder),
        "is": "bundle" if bundled else "run",
        "kind": config["kind"],
        "network": {key: value for key, value in network.items() if key != "class"},
        "language_model": config.get("lm"),
        "parameters": sum(p.numel() for module in recogniser for p in module.parameters()),
        "features": {
            **features["compute_features"],
            "normalizer": features["normalize"]["class"],
        },
        "tokens": {**config["tokens"], "pieces": model.tokenizer.get_piece_size()},
        "sample_rate": model.sample_rate,
        "frames_per_second": 1 / model.frame_s,
        "search": config["search"],
        "left_out": config.get("left_out", []),
        "stored_precision": config.get("stored_precision"),
        "language": config.get("language"),
        "licence": config.get("licence"),
        "training": config.get("training", {}),
        "run": config.get("run", {}),
        "results": config.get("results", {}),
        "files": {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": file_digest(folder / name),
            }
            for name in names
        },
    }


def report(facts: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    network, features, tokens = facts["network"], facts["features"], facts["tokens"]
    kind = KINDS[facts["kind"]]
    lines = [
        ("model", f"{facts['is']}, {kind}"),
        ("encoder", _network(network, "encoder")),
        ("decoder", _network(network, "decoder")),
        ("language model", (facts["language_model"] or {}).get("class")),
        ("parameters", f"{facts['parameters']:,}"),
        ("features", f"{features.get('n_mels', 80)} mel bins, {features['normalizer']}"),
        ("audio", f"{facts['sample_rate']} Hz"),
        ("frames", f"{facts['frames_per_second']:g} a second"),
        ("tokens", f"{tokens['pieces']} {tokens.get('type')}, {tokens['outputs']} outputs"),
        ("search", _pairs(facts["search"])),
        ("left out", ", ".join(facts["left_out"])),
        ("stored as", facts["stored_precision"]),
        ("language", facts["language"]),
        ("licence", facts["licence"]),
        ("trained on", ", ".join(facts["training"].get("train_splits", []))),
        ("chosen on", ", ".join(facts["training"].get("dev_splits", []))),
        ("seed", facts["training"].get("seed")),
        ("commit", facts["run"].get("commit")),
    ]
    width = max(len(name) for name, _ in lines)
    blocks = [
        facts["path"],
        "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines if value),
    ]
    if facts["results"]:
        rows = [
            (split, *(format_number(rate, 2) for rate in rates(score)))
            for split, score in facts["results"].items()
        ]
        blocks.append(text_table(("split", "WER %", "CER %"), rows))
    rows = [(name, f"{file['bytes']:,}", file["sha256"]) for name, file in facts["files"].items()]
    blocks.append(text_table(("file", "bytes", "SHA-256"), rows))
    return "\n\n".join(blocks)


def _network(network: Mapping[str, Any], half: str) -> str | None:
    layers = network.get(f"num_{half}_layers")
    if not layers:
        return None
    module = network.get(f"{half}_module", "transformer")
    return f"{module}, {layers} layers, width {network.get('d_model')}"


def _pairs(search: Mapping[str, Any]) -> str:
    scalars = {k: v for k, v in search.items() if not isinstance(v, (Mapping, list))}
    scalars |= search.get("scorer", {}).get("weights", {})
    return ", ".join(f"{key} {value}" for key, value in scalars.items())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.inspect", description="Say what a bundle or a run is."
    )
    parser.add_argument("model", help="folder of a bundle or a run")
    parser.add_argument("--json", action="store_true", help="all of it, for a program")
    arguments = parser.parse_args(argv)
    try:
        facts = describe(arguments.model)
    except UserError as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(json.dumps(facts, indent=1) if arguments.json else report(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
