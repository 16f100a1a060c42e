"""Values of the YAML files are checked before anything is built."""

import pytest

from common.errors import UserError
from tests.ctc_runs import CONMAMBA
from training.launch.command_line import load_hparams
from training.launch.settings import (
    DEFAULTS,
    INPUT_FILES,
    PATHS,
    SETTINGS,
    check_inputs,
    check_setting,
    check_together,
)

REFUSED = {
    "seed": None,
    "num_encoder_layers": 2.5,
    "log_interval_steps": 0,
    "test_beam_size": 0,
    "max_batch_length_train": 0,
    "num_workers": -1,
    "mamba_config": 8,
    "test_splits": None,
    "avg_checkpoints": 0,
    "max_decode_ratio": -1,
    "temperature": 0,
    "sorting": "upwards",
    "token_type": "word",
    "unknown_characters": "ignore",
    "blank_index": 3,
    "eos_index": 0,
    "ctc_weight_decode": 1,
    "spliced_share": 1.5,
    "label_smoothing": "high",
    "skip_prep": "maybe",
    "transformer_dropout": True,
    "output_folder": 7,
    "precision": "fp8",
    "grad_accumulation_factor": 0,
    "scorer_beam_scale": 0.5,
    "total_steps": 0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_that_cannot_be_is_refused_by_its_key(key):
    with pytest.raises(UserError, match=f"^--{key} is .*; it must be"):
        check_setting(key, REFUSED[key], "--")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -5),
        ("test_splits", "dev-clean"),
        ("test_splits", []),
        ("mamba_config", None),
        ("skip_prep", False),
        ("num_workers", 0),
        ("lr_adam", 1e-3),
        ("no such key", object()),
    ],
)
def test_what_can_be_is_taken(key, value):
    check_setting(key, value, "--")


def test_every_default_is_a_value_of_its_key():
    for key, value in DEFAULTS.items():
        check_setting(key, value, "--")
    assert "spliced_share" in DEFAULTS
    assert "lr_adam" not in DEFAULTS
    assert len(SETTINGS) > 60


def test_keys_of_special_recipes_hold_without_standing_in_the_file(tmp_path):
    assert "consistency_weight" not in CONMAMBA.read_text(encoding="utf-8")
    needed = {"data_folder": "x", "output_folder": str(tmp_path)}
    assert load_hparams(str(CONMAMBA), needed)["consistency_weight"] == 0.0
    given = load_hparams(str(CONMAMBA), needed | {"consistency_weight": 0.2})
    assert given["consistency_weight"] == 0.2


def test_a_value_in_the_file_is_checked_before_its_objects_are_built(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("num_encoder_layers: 2.5\nnet: !new:nowhere.Network\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"file\.yaml: num_encoder_layers is 2\.5; it must be an"):
        load_hparams(str(path), {})


@pytest.mark.parametrize(
    ("values", "first", "second"),
    [
        ({"encoder_module": "conformer", "d_model": 130, "nhead": 4}, "d_model", "nhead"),
        (
            {"decoder_module": "transformer", "num_decoder_layers": 1, "d_model": 9, "nhead": 2},
            *("d_model", "nhead"),
        ),
        ({"min_decode_ratio": 2, "max_decode_ratio": 1}, "min_decode_ratio", "max_decode_ratio"),
        ({"n_warmup_steps": 20, "total_steps": 10}, "n_warmup_steps", "total_steps"),
        ({"chunk_size_min": 4, "chunk_size_max": 3}, "chunk_size_min", "chunk_size_max"),
    ],
)
def test_two_values_that_exclude_each_other_are_refused_together(values, first, second):
    pattern = f"^a.yaml: {first} is {values[first]} and {second} is {values[second]}; {first} must"
    with pytest.raises(UserError, match=pattern):
        check_together(values, "a.yaml: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_module": "conmamba", "kernel_size": 30}, "kernel_size is 30; .* an odd one"),
        (
            {"encoder_module": "conformer", "kernel_size": 2, "causal_convolution": False},
            "kernel_size is 2; .* --causal_convolution True",
        ),
        ({"encoder_module": "branchformer", "chunkwise_prob": 0.7}, "encoder_module is branchf"),
        (
            {"encoder_module": "conformer", "attention_type": "hypermixing", "chunkwise_prob": 1},
            "attention_type is hypermixing",
        ),
    ],
)
def test_what_would_end_the_first_batch_is_refused(values, message):
    with pytest.raises(UserError, match=f"^a.yaml: {message}"):
        check_together(values, "a.yaml: ")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"chunk_size_min": 4, "chunk_size_max": 4},
        {"encoder_module": "conmamba", "kernel_size": 30, "causal_convolution": True},
        {"encoder_module": "conformer", "kernel_size": 30, "causal": True},
        {"encoder_module": "mamba", "kernel_size": 30},
        {"encoder_module": "conmamba", "attention_type": "hypermixing", "chunkwise_prob": 1},
        {"encoder_module": "conmamba", "d_model": 130, "nhead": 4},
        {"encoder_module": "conformer", "d_model": 128, "nhead": 4},
        {"min_decode_ratio": 1, "max_decode_ratio": 1},
    ],
)
def test_values_that_fit_together_are_taken(values):
    check_together(values, "a.yaml: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("Transformer", {"normalise_before": True}, "takes no normalise_before.*normalize_before"),
        ("mamba_config", {"expand": 0}, "d_inner is 0"),
        ("encoder_module", "conformr", "known are .*conformer"),
        ("activation", 3, "no key 'activation'.* part of Transformer"),
        ("CNN", 5, "--CNN is 5; it must be parts of it"),
        ("spectrogram_augmentations", 5, r"must be \[\], or what the file has"),
        ("spectrogram_augmentations", [5], r"must be \[\], or what the file has"),
        ("noam_scheduler", None, "a run needs it"),
        ("modules", {"x": 3}, "modules.x is 3; it must be a network"),
        ("mamba_config", {"d_stat": 3}, "mamba_config holds d_stat; .* Did you mean d_state"),
        ("n_fft", 511, "n_fft is 511; wanted an even number"),
        ("lr_adam", float("inf"), "must be a number"),
        ("weight_decay", float("nan"), "must be a number"),
        ("speed_perturb", {"speeds": []}, r"has the speeds \[\]; .* --speed_perturb null"),
        ("speed_perturb", {"speeds": [90, -5]}, "needs percentages above 0"),
        ("CNN", {"kernel_sizes": 3}, "ConvolutionFrontEnd cannot be made with these values"),
    ],
)
def test_what_an_object_refuses_is_one_message(tmp_path, key, value, message):
    given = {"data_folder": "x", "output_folder": str(tmp_path), "num_encoder_layers": 1}
    with pytest.raises(UserError, match=message):
        load_hparams(str(CONMAMBA), given | {key: value})


def test_every_key_of_a_path_is_of_something_to_read_or_of_the_run():
    read = {*INPUT_FILES, "data_folder", "pretrained_lm_tokenizer_path"}
    assert PATHS - read == {"output_folder", "save_folder", "train_log"}


@pytest.mark.parametrize("key", [*INPUT_FILES, "data_folder", "pretrained_lm_tokenizer_path"])
def test_a_path_that_is_not_there_is_named_with_its_key(key, tmp_path):
    path = str(tmp_path / "gone")
    pattern = f"^{key} {path}: there is no such (file|folder). Give "
    with pytest.raises(UserError, match=pattern):
        check_inputs({key: path}, test_only=False)
    check_inputs({key: None}, test_only=False)


def test_each_path_of_a_list_is_looked_for(tmp_path):
    (tmp_path / "text").write_text("ONE", encoding="utf-8")
    given = {"train_text": [str(tmp_path / "text"), str(tmp_path / "gone")]}
    with pytest.raises(UserError, match=r"^train_text .*gone: there is no"):
        check_inputs(given, test_only=False)
    # What was trained on may be gone when the model is evaluated.
    check_inputs(given, test_only=True)


def test_a_name_on_the_hub_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_inputs({"pretrained_lm_tokenizer_path": "owner/name"}, test_only=False)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").touch()
    for wrong in ("owner/name", "name", "./owner/other", "a/b/c"):
        with pytest.raises(UserError, match=f"^pretrained_lm_tokenizer_path {wrong}: "):
            check_inputs({"pretrained_lm_tokenizer_path": wrong}, test_only=False)
