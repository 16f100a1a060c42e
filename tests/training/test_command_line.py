"""Command line: options, overrides, and mistakes that end with one message."""

import errno
import signal
import subprocess
import sys

import pytest

from common.errors import EXIT_USER_ERROR, Interrupted, UserError
from tests.ctc_runs import REPOSITORY
from training.launch.command_line import (
    check_keys,
    load_hparams,
    parse_command_line,
    parse_overrides,
    run_script,
)
from training.launch.run_options import IN_USE, option_actions
from training.launch.start import run_options
from training.launch.yaml_file import resolved_text

YAML = """
batch_size: 8
lr_adam: 0.001
output_folder: !ref results/<batch_size>
data_folder: !PLACEHOLDER
train_splits: [train-clean-100]
mamba_config:
  d_state: 16
  expand: 2
precision: bf16
layer: !new:torch.nn.Linear
  in_features: !ref <batch_size>
  out_features: 2
"""


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--a", "1"], {"a": 1}),
        (["--a=1"], {"a": 1}),
        (["--a", "x=y"], {"a": "x=y"}),
        (["--a=x=y=z"], {"a": "x=y=z"}),
        (["--a", "-12.5"], {"a": -12.5}),
        (["--a", "1e-3", "--b=-2e4"], {"a": 0.001, "b": -20000.0}),
        (["--a", "[x, 'y z']", "--b=[]"], {"a": ["x", "y z"], "b": []}),
        (["--a", "{k: 1, l: [2]}"], {"a": {"k": 1, "l": [2]}}),
        (["--a", "True", "--b", "null", "--c", ""], {"a": True, "b": None, "c": None}),
        (["--a", "path with spaces/x.yaml"], {"a": "path with spaces/x.yaml"}),
        (["--a", "1", "--a", "2"], {"a": 2}),
    ],
)
def test_overrides_are_yaml_values(arguments, expected):
    assert parse_overrides(arguments) == expected


@pytest.mark.parametrize("arguments", [["--a"], ["--a", "--b", "1"], ["--b", "1", "--a"]])
def test_a_key_without_a_value_is_named(arguments):
    with pytest.raises(UserError, match="--a has no value"):
        parse_overrides(arguments)


def test_a_value_without_a_key_is_named():
    with pytest.raises(UserError, match=r"'train-clean-360'.*Lists and patterns need quotes"):
        parse_overrides(["--train_splits", "train-clean-100", "train-clean-360"])


def test_a_single_dash_is_named():
    with pytest.raises(UserError, match=r"-lr begins with one dash; .*: --lr"):
        parse_overrides(["--seed", "1", "-lr", "3"])


def test_a_value_that_is_not_yaml_is_named():
    with pytest.raises(
        UserError, match=r"value of --a is not valid YAML.*Quote lists and mappings"
    ):
        parse_overrides(["--a", "[1, 2"])


def test_options_and_overrides_are_told_apart():
    line = parse_command_line(
        ["m.yaml", "--batch_size", "4", "--precision=fp32", "--test_only", "--lr_adam=0.1"], ""
    )
    assert line.param_file == "m.yaml"
    assert line.overrides == {"batch_size": 4, "lr_adam": 0.1}
    assert line.run_options == {"param_file": "m.yaml", "precision": "fp32", "test_only": True}
    assert (line.resume, line.init_from) == (None, None)


def test_the_interval_that_is_typed_replaces_the_other():
    for typed, other in (("minutes", "steps"), ("steps", "minutes")):
        line = parse_command_line(["m.yaml", f"--ckpt_interval_{typed}", "5"], "")
        assert line.run_options[f"ckpt_interval_{typed}"] == 5
        assert line.run_options[f"ckpt_interval_{other}"] == 0
    both = ["--ckpt_interval_minutes", "5", "--ckpt_interval_steps", "5"]
    with pytest.raises(UserError, match="exclude each other"):
        parse_command_line(["m.yaml", *both], "")


@pytest.mark.parametrize("option", ["--resume", "--init_from"])
def test_what_is_of_training_is_not_given_with_an_evaluation(option):
    with pytest.raises(UserError, match=f"{option} is for training"):
        parse_command_line(["run.yaml", "--test_only", option, "save/CKPT+1"], "")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("LM/transformer_small", "consistency_weight", 0.2),
        ("LM/mamba_small", "held_out_speakers", [1]),
        ("CTC/demo", "decoder_token_noise", 0.3),
    ],
)
def test_a_key_that_the_script_does_not_read_is_refused(name, key, value):
    needed = {"data_folder": "x"} if name.startswith("CTC") else {"train_text": "x"}
    needed |= {"valid_text": "y"} if "train_text" in needed else {}
    script = "train_LM.py" if name.startswith("LM") else "train_CTC.py"
    with pytest.raises(UserError, match=f"{script} does nothing with {key}"):
        check_keys(f"hparams/{name}.yaml", needed | {key: value})
    check_keys(f"hparams/{name}.yaml", needed | {"ema_decay": 0.99})


def test_a_schedule_without_warmup_is_refused_where_it_needs_one(tmp_path):
    needed = {"data_folder": "x", "output_folder": str(tmp_path), "n_warmup_steps": 0}
    with pytest.raises(UserError, match=r"n_warmup_steps is 0; .*at least 1"):
        load_hparams("hparams/CTC/conmamba_small.yaml", needed)
    assert load_hparams("hparams/CTC/demo.yaml", needed)["noam_scheduler"].n_warmup_steps == 0


def test_a_key_that_begins_like_an_option_is_a_key():
    line = parse_command_line(["m.yaml", "--test", "1", "--dev", "x"], "")
    assert line.overrides == {"test": 1, "dev": "x"}


def test_own_options_are_no_overrides():
    line = parse_command_line(["m.yaml", "--resume", "save/CKPT+1", "--init_from=w.ckpt"], "")
    assert (line.resume, line.init_from) == ("save/CKPT+1", "w.ckpt")
    assert line.overrides == {}
    assert not {"resume", "init_from"} & line.run_options.keys()


@pytest.mark.parametrize("left", ["save/averaged/model.ckpt", "lm/lm.ckpt", "model.ckpt"])
def test_a_run_or_a_checkpoint_stands_for_its_weights(left, tmp_path):
    weights = tmp_path / left
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.touch()
    line = parse_command_line(["m.yaml", "--init_from", str(tmp_path)], "")
    assert line.init_from == str(weights)


def options_of(arguments, hparams):
    return run_options(parse_command_line(["m.yaml", *arguments], ""), hparams)


def test_a_run_option_comes_from_the_command_line_else_the_yaml_else_the_default():
    hparams = {"precision": "bf16", "device": "cpu", "max_grad_norm": 2.0}
    options = options_of(["--precision", "fp32"], hparams)
    assert (options.precision, options.device, options.max_grad_norm) == ("fp32", "cpu", 2.0)
    assert options.grad_accumulation_factor == 1
    assert options_of([], hparams).precision == "bf16"


def test_the_backend_of_processes_suits_the_device():
    assert options_of(["--device", "cpu"], {}).distributed_backend == "gloo"
    assert options_of(["--device", "cuda:1"], {}).distributed_backend == "nccl"
    assert options_of(
        ["--device", "cuda", "--distributed_backend=gloo"], {}
    ).distributed_backend == ("gloo")


def test_a_checkpoint_interval_in_steps_replaces_the_one_in_minutes():
    options = options_of(["--ckpt_interval_steps", "5"], {"ckpt_interval_minutes": 30})
    assert (options.ckpt_interval_steps, options.ckpt_interval_minutes) == (5, 0)


def test_overrides_reach_references_and_objects(yaml_file):
    hparams = load_hparams(
        yaml_file, {"batch_size": 3, "data_folder": "x=y", "mamba_config": {"d_state": 4}}
    )
    assert hparams["output_folder"] == "results/3"
    assert hparams["layer"].in_features == 3
    assert hparams["data_folder"] == "x=y"
    assert hparams["mamba_config"] == {"d_state": 4, "expand": 2}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("batchsize", "Did you mean batch_size"),
        ("lr_adma", "lr_adam"),
        ("zzz", "--help .* lists its keys"),
        ("batch-size", "written --batch_size"),
        ("learning_rate", "called lr_adam: --lr_adam"),
        ("d_state", r"part of mamba_config: --mamba_config '\{d_state: VALUE\}'"),
        ("in_features", "called batch_size"),
        ("out_features", r"part of layer: --layer '\{out_features: VALUE\}'"),
        ("test_onlyy", "Did you mean test_only"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(yaml_file, key, hint):
    with pytest.raises(UserError, match=f"has no key '{key}'.*{hint}"):
        load_hparams(yaml_file, {key: 1, "data_folder": "x"})


def test_a_required_key_left_open_is_named(yaml_file):
    with pytest.raises(UserError, match=r"leaves open .*--data_folder /path/to/LibriSpeech"):
        load_hparams(yaml_file, {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"hyperparameter file .*conmanba\.yaml: there is no such"):
        load_hparams(str(tmp_path / "conmanba.yaml"), {})


@pytest.mark.parametrize(
    "content",
    ["a: [1, 2", "a: b: c", "- 1\n- 2\n", "", "# a\n", ": :", "3: 4", "a: !new:no.such.Thing\n"],
)
def test_a_file_that_is_no_hyperparameter_file_is_one_error(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_hparams(str(path), {})


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("what, where, what to do"), EXIT_USER_ERROR, "error: what, where, what to do\n"),
        (OSError(errno.ENOSPC, "No space left", "log"), EXIT_USER_ERROR, "make room and repeat"),
        (OSError(errno.EMFILE, "Too many open files", "a.wav"), EXIT_USER_ERROR, "ulimit -n"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "a/log"),
            EXIT_USER_ERROR,
            "a/log: Is a",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), EXIT_USER_ERROR, "a: Permission"),
        (RuntimeError("[enforce fail at inline_container.cc:1]"), EXIT_USER_ERROR, "make room"),
        (RuntimeError("DataLoader worker (pid 1) exited"), EXIT_USER_ERROR, "worker has died"),
        (Interrupted(2), 130, ""),
        (Interrupted(15), 143, ""),
    ],
)
def test_a_script_ends_with_the_documented_status_and_one_message(capsys, error, status, message):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main, [])
    assert ended.value.code == status
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == bool(message)


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), FileNotFoundError("bug"), ValueError("bug")]
)
def test_a_fault_of_the_code_keeps_its_traceback(error):
    def main(argv):
        raise error

    with pytest.raises(type(error), match="bug"):
        run_script(main, [])


def test_an_interruption_says_how_to_go_on(capsys):
    def main(argv):
        raise Interrupted(signal.SIGINT)

    with pytest.raises(SystemExit):
        run_script(main, [])
    assert capsys.readouterr().out == "saved; repeat the command to go on\n"


CHATTY = """
import logging, sys
from training.launch.command_line import run_script
def main(argv):
    logging.basicConfig(stream=sys.stdout, level="INFO", force=True)
    for i in range(20000):
        print("a line that nobody reads any more")
        logging.info("nor this one")
    with open(argv[0], "w") as stream:
        stream.write("done")
run_script(main)
"""


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", "> /dev/full"])
def test_a_run_goes_on_where_its_output_is_closed(tmp_path, redirection):
    done = tmp_path / "done"
    python = 'set -o pipefail; "$0" -c "$1" "$2"'
    ended = subprocess.run(
        ["bash", "-c", f"{python} {redirection}", sys.executable, CHATTY, str(done)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert done.read_text() == "done"


def test_a_script_gets_the_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "m.yaml", "--a", "1"])
    got = []
    run_script(got.extend)
    assert got == ["m.yaml", "--a", "1"]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("width", "abc", "a number"),
        ("width", True, "a number"),
        ("shuffle", "abc", "True or False"),
        ("shuffle", 1, "True or False"),
    ],
)
def test_a_value_of_another_kind_than_the_files_is_an_error(tmp_path, key, value, wanted):
    path = tmp_path / "kinds.yaml"
    path.write_text("width: 4\nshuffle: False\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"--{key} is {value!r}; it must be {wanted}"):
        load_hparams(str(path), {key: value})
    assert load_hparams(str(path), {"width": 2.5, "shuffle": True})["shuffle"] is True
    assert load_hparams(str(path), {"width": None})["width"] is None


def test_a_misspelt_switch_is_suggested():
    with pytest.raises(UserError, match="Did you mean --test_only"):
        parse_command_line(["m.yaml", "--test-only"], "")


def test_an_accumulation_over_no_batch_is_an_error():
    with pytest.raises(UserError, match="at least 1"):
        options_of(["--grad_accumulation_factor", "0"], {})


def test_an_interruption_has_the_documented_status(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_script(main, [])
    assert ended.value.code == 130
    # It may have come in a training, too: a second Ctrl-C does not wait for a checkpoint.
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "repeat the command to go on from the last checkpoint" in error


FILE = "hparams/CTC/conmamba_small.yaml"


def answer_of(*arguments):
    """Exit status, output and errors of train_CTC.py, and whether it had imported torch."""
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path('train_CTC.py', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules or 'speechbrain' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    *output, imported = done.stdout.splitlines()
    return done.returncode, "\n".join(output), done.stderr, imported == "True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "YAML_FILE_OR_RUN"),
        (["docs"], "docs has no recipe.yaml"),
        (["no.yaml"], "hyperparameter file no.yaml: there is no such file"),
        ([FILE], "--data_folder /path/to/LibriSpeech"),
        ([FILE, "--data_folder", "x", "--lr_adma", "1"], "Did you mean lr_adam"),
        ([FILE, "--data_folder", "x", "--seed", "null"], "--seed is None; it must be an integer"),
        ([FILE, "--data_folder", "x", "--grad_accumulation_factor", "0"], "at least 1"),
        (["hparams/S2S/an4.yaml", "--data_folder", "x"], "trained by train_S2S.py"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(arguments, message):
    status, _, errors, imported = answer_of(*arguments)
    assert status == EXIT_USER_ERROR
    assert message in errors
    assert "Traceback" not in errors
    assert not imported


def test_help_lists_options_and_the_keys_of_the_file_before_torch_is_imported():
    status, output, errors, imported = answer_of("hparams/CTC/an4.yaml", "--help")
    assert (status, errors, imported) == (0, "", False)
    assert "python train_CTC.py hparams/CTC/conmamba_small.yaml --data_folder" in output
    lines = [line.split() for line in output.splitlines()]
    keys = [words[0] for words in lines if words and words[0].startswith("--")]
    for key in ("--resume", "--precision", "--spliced_share", "--decoder_token_noise"):
        assert key in keys
    assert keys.index("--seed") < keys.index("--data_folder") < keys.index("--d_model")
    (skip_bad,) = (words for words in lines if words[:1] == ["--skip_bad"])
    assert " ".join(skip_bad[1:]) == "False True leaves unusable utterances out instead of stopping"
    assert answer_of("hparams/CTC/an4.yaml", "-h")[1] == output


def test_the_options_are_speechbrains():
    assert option_actions().keys() >= set(IN_USE)
    # A step that is not finite is always skipped.
    assert "skip_nonfinite_grads" not in IN_USE


@pytest.mark.parametrize("name", ["2024-06-01", "007", "1e3", "0x10", "true", "a<b>c/d", "1 2"])
def test_a_folder_may_be_called_anything(tmp_path, name):
    path = tmp_path / "paths.yaml"
    path.write_text(
        "output_folder: !PLACEHOLDER\nsave_folder: !ref <output_folder>/save\n"
        "made: !new:collections.Counter\n  folder: !ref <save_folder>\n"
        "paths: [!ref <output_folder>]\n",
        encoding="utf-8",
    )
    hparams = load_hparams(str(path), parse_overrides(["--output_folder", name]))
    assert hparams["output_folder"] == hparams["paths"][0] == name
    assert hparams["save_folder"] == hparams["made"]["folder"] == f"{name}/save"
    kept = tmp_path / "resolved.yaml"
    kept.write_text(resolved_text(path, {"output_folder": name}), encoding="utf-8")
    assert load_hparams(str(kept), {})["output_folder"] == name


def test_splits_and_other_names_are_taken_as_they_are_written():
    given = parse_overrides(["--train_splits", "[2024, 007]", "--dev_splits", "1e3"])
    assert given == {"train_splits": ["2024", "007"], "dev_splits": "1e3"}
    assert parse_overrides(["--kenlm_model_path", "null"]) == {"kenlm_model_path": None}


@pytest.mark.parametrize(
    ("line", "ours"),
    [("consistancy_weight: 0.2", "consistency_weight"), ("n_warmup_step: 3", "n_warmup_steps")],
)
def test_a_misspelt_key_of_the_file_is_an_error(tmp_path, line, ours):
    path = tmp_path / "file.yaml"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"file.yaml: .* Did you mean {ours}"):
        load_hparams(str(path), {})


def test_keys_that_only_the_file_itself_reads_are_its_own(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("lr_adam: 1.0\nlr_adam2: 2\nwidth: 3\nb: !ref <width>\n", encoding="utf-8")
    assert load_hparams(str(path), {})["b"] == 3
