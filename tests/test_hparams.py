"""The CTC files of hparams: they train as they are, and comparisons between them are fair."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import ruamel.yaml

from modules.Transformer import ENCODERS
from modules.weights import with_new_decoder
from tests.ctc_runs import REPOSITORY, TINY, command_line, large_ones_slow, metrics, train
from training.brains.optimization import count_parameters
from training.launch.command_line import load_hparams

FOLDER = REPOSITORY / "hparams" / "CTC"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
UNTOUCHED = dict.fromkeys(TINY)
"""Takes the overrides of short runs back, so that a file's own values hold."""

KEYS = [
    "data_folder",
    "output_folder",
    "save_folder",
    "train_splits",
    "dev_splits",
    "test_splits",
    "skip_prep",
    "seed",
    "number_of_epochs",
    "batch_size",
    "num_workers",
    "dynamic_batching",
    "max_batch_length_train",
    "max_batch_length_val",
    "num_bucket",
    "lr_adam",
    "weight_decay",
    "n_warmup_steps",
    "avg_checkpoints",
    "token_type",
    "output_neurons",
    "test_beam_size",
    "kenlm_model_path",
    "use_wandb",
    "wandb_entity",
    "wandb_project",
    "use_tensorboard",
    "early_stop_patience",
    "gradient_checkpointing",
    "encoder_module",
    "CNN",
    "Transformer",
    "ctc_lin",
    "normalize",
    "modules",
    "model",
]
"""Names that users override and other parts call; the same in every file."""


@pytest.mark.parametrize("name", large_ones_slow(FILES))
def test_every_file_trains_two_steps_and_is_evaluated(name, tone_corpus, tmp_path):
    folder = tmp_path / "run"
    short = {
        "train_splits": "[train-clean-100]",
        "dev_splits": "[dev-clean]",
        "held_out_speakers": "[]",
        "test_splits": "[test-other]",
        "token_type": "char",
        "output_neurons": 31,
        "number_of_epochs": 1,
        "max_batch_length_train": 4,
        "max_batch_length_val": 4,
        "num_workers": 0,
        "grad_accumulation_factor": 1,
        "optimizer_step_limit": 2,
        "log_interval_steps": 1,
        "device": "cpu",
    }
    arguments = command_line(tone_corpus, folder, FOLDER / f"{name}.yaml", **(UNTOUCHED | short))
    try:
        assert train(arguments) == 0
        losses = [entry["train_loss"] for entry in metrics(folder) if "train_loss" in entry]
        assert len(losses) == 2
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert results["splits"]["test-other"]["utterances"] == 2
        assert results["run"]["precision"] == load_text(name)["precision"]
    finally:
        # A large model leaves half a gigabyte.
        shutil.rmtree(folder / "save", ignore_errors=True)


def parameters_of(name: str, tmp_path: Path) -> int:
    hparams = load_hparams(
        str(FOLDER / f"{name}.yaml"), {"data_folder": "x", "output_folder": str(tmp_path)}
    )
    return count_parameters([hparams["model"]])


@pytest.mark.parametrize(
    ("name", "parameters"), [("conformer_large", 28_786_111), ("conmamba_large", 31_555_519)]
)
def test_the_large_models_have_the_published_number_of_parameters(name, parameters, tmp_path):
    assert parameters_of(name, tmp_path) == parameters


@pytest.mark.parametrize(("name", "most"), [("an4", 6e6), ("mini_librispeech", 12e6)])
def test_twins_are_of_equal_size(name, most, tmp_path):
    sizes = [parameters_of(each, tmp_path) for each in (name, f"{name}_conformer")]
    assert max(sizes) <= most
    assert max(sizes) / min(sizes) < 1.02


@pytest.mark.parametrize("name", ["an4", "mini_librispeech"])
def test_the_joint_model_can_begin_with_the_ctc_model(name, tmp_path):
    options = {"data_folder": "x", "output_folder": str(tmp_path)}
    files = (FOLDER / f"{name}.yaml", FOLDER.parent / "S2S" / f"{name}.yaml")
    ctc, joint = (load_hparams(str(file), options)["model"] for file in files)
    joint.load_state_dict(with_new_decoder(ctc.state_dict(), joint))


def test_consistency_changes_nothing_of_the_published_network(tmp_path):
    assert differences("conmamba_small", "conmamba_small_crctc") == {
        *("output_folder", "grad_accumulation_factor", "max_batch_length_train"),
        *("consistency_weight", "time_drops_low", "time_drops_high", "time_drop"),
    }
    besides = differences("conmamba_small_crctc", "conmamba_medium_crctc")
    assert besides == {"output_folder", "d_model", "num_encoder_layers"}
    assert 21e6 < parameters_of("conmamba_medium_crctc", tmp_path) < 23e6


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", ["an4", "an4_conformer", "demo"])
def test_the_encoder_can_be_changed_alone(name, encoder, tmp_path):
    options = {"data_folder": "x", "output_folder": str(tmp_path), "encoder_module": encoder}
    hparams = load_hparams(str(FOLDER / f"{name}.yaml"), options)
    assert type(hparams["Transformer"].encoder) is ENCODERS[encoder]


@pytest.mark.parametrize("name", ["conformer_small", "conmamba_small", "mamba_small"])
def test_small_models_have_the_published_shape(name):
    text = load_text(name)
    shape = text["num_encoder_layers"], text["d_model"], text["d_ffn"]
    assert shape == (12, 144, 1024)


def load_text(name: str) -> dict:
    """A file as it is written: references and objects stay text."""
    yaml = ruamel.yaml.YAML()
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def as_text(node: object) -> object:
    """Tag and content of a YAML node in a form that compares."""
    tag = str(getattr(node, "tag", ""))
    if isinstance(node, dict):
        return tag, {key: as_text(value) for key, value in node.items()}
    if isinstance(node, list):
        return tag, [as_text(value) for value in node]
    return tag, str(getattr(node, "value", node))


def differences(first: str, second: str) -> set[str]:
    """Keys that differ between two files; those of the network with its name in front."""
    a, b = (as_text(load_text(name))[1] for name in (first, second))
    network = {
        f"Transformer.{key}"
        for key in a["Transformer"][1].keys() | b["Transformer"][1].keys()
        if a["Transformer"][1].get(key) != b["Transformer"][1].get(key)
    }
    others = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {"Transformer"}
    return network | others


SIGNED = {"signed_positions", "Transformer.signed_positions"}
ENCODER = {"output_folder", "encoder_module", "mamba_config", "Transformer.mamba_config"}


@pytest.mark.parametrize(
    ("first", "second", "besides"),
    [
        ("conmamba_small", "conformer_small", set()),
        ("conmamba_large", "conformer_large", set()),
        ("conmamba_small", "mamba_small", set()),
        ("conmamba_small", "transformer_small", {"attention_type"}),
        ("an4", "an4_conformer", {"d_ffn", *SIGNED}),
        ("mini_librispeech", "mini_librispeech_conformer", {"d_ffn", *SIGNED}),
    ],
)
def test_files_that_are_compared_differ_in_the_encoder_alone(first, second, besides):
    found = differences(first, second)
    assert {"output_folder", "encoder_module"} <= found
    assert found <= ENCODER | besides


STREAMING = {
    "output_folder",
    "chunkwise_prob",
    "chunk_size_min",
    "chunk_size_max",
    "valid_chunk_size",
    "left_context_chunks",
    "causal",
    "Transformer.causal",
    "kernel_size",
    "Transformer.kernel_size",
    "causal_convolution",
    "Transformer.causal_convolution",
    "stream_lookahead",
    "dynchunktrain_config_sampler",
    "compute_features",
    "CNN",
}


@pytest.mark.parametrize(
    ("name", "besides"),
    [
        ("conmamba_small", set()),
        ("demo", set()),
        ("an4", {"normalize", "remove_utterance_mean"}),
    ],
)
def test_a_file_for_streaming_differs_in_what_streaming_needs_alone(name, besides):
    assert differences(name, f"{name}_streaming") == STREAMING | besides


@pytest.mark.parametrize("encoder", ["conmamba", "conformer"])
def test_large_and_small_differ_in_size_alone(encoder):
    found = differences(f"{encoder}_small", f"{encoder}_large")
    assert found == {"output_folder", "d_model", "num_encoder_layers"}


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_the_keys_that_users_override(name):
    text = load_text(name)
    assert [key for key in KEYS if key not in text] == []
    recoverables = text["checkpointer"]["recoverables"]
    assert recoverables.keys() == {"model", "noam_scheduler", "normalizer", "counter"}
    assert text["use_wandb"] is False
    assert text["use_tensorboard"] is False
    assert text["wandb_entity"] is None
    assert "mamba_config" in text or text["encoder_module"] in ("conformer", "transformer")


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_a_files_header_names_the_file(name):
    content = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    header = content.split("\n\n")[0]
    assert re.findall(r"train_CTC\.py (\S+)", header) == [f"hparams/CTC/{name}.yaml"]
    place = name if name.startswith("demo") else f"CTC/{name}"
    assert f"output_folder: !ref results/{place}" in content


SCRIPTS = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("", "training/**/", "inference/", "modules/")
    for path in sorted(FOLDER.parents[1].glob(f"{folder}*.py"))
)


@pytest.mark.parametrize("path", sorted(FOLDER.parent.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_key_is_referred_to_or_read(path):
    content = path.read_text(encoding="utf-8")
    keys = re.findall(r"^([a-zA-Z]\w*):", content, re.MULTILINE)
    assert len(keys) > 20
    without_effect = [
        key
        for key in keys
        if not re.search(rf"<{key}[>\[.]", content)
        and not re.search(rf"""["']{key}["']|\.{key}\b""", SCRIPTS)
    ]
    assert without_effect == []
