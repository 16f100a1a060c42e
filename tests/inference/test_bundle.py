"""Bundles are data: whole, checked, self-contained, and the model that was trained."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common.errors import UserError
from common.files import file_digest
from inference import Recognizer
from inference.bundle import main, read_bundle, read_run, write_bundle
from inference.hub import FILES
from inference.inspect import main as inspect
from inference.model import make_model
from inference.weights import unpack
from tests.inference.runs import make_run
from training.evaluation import leave_bundle

LOADED = ("config.json", "model.safetensors", "tokenizer.model", "checksums.json")


def change_config(bundle: Path, change) -> None:
    """Edit config.json so that its checksum fits."""
    config = json.loads((bundle / "config.json").read_text())
    change(config)
    (bundle / "config.json").write_text(json.dumps(config))
    checksums = json.loads((bundle / "checksums.json").read_text())
    checksums["config.json"] = file_digest(bundle / "config.json")
    (bundle / "checksums.json").write_text(json.dumps(checksums))


def set_at(*path, to):
    """A change of one field."""

    def change(config):
        *parents, last = path
        for key in parents:
            config = config[key]
        config[last] = to

    return change


def test_a_training_run_ends_with_a_bundle_of_its_model(run, recognizers):
    kind = "s2s" if "s2s" in str(run) else "ctc"
    assert {path.name for path in (run / "bundle").iterdir()} == set(FILES) - {"lm.safetensors"}
    state = torch.load(run / "save" / "averaged" / "model.ckpt", weights_only=True)
    modules = recognizers[kind].model.parts()
    ours = [tensor for module in modules.values() for tensor in module.state_dict().values()]
    torch.testing.assert_close(ours, list(state.values()), rtol=0, atol=0)


def test_the_text_is_that_of_the_runs_evaluation(run, recognizers, tone_corpus):
    recognizer = recognizers["s2s" if "s2s" in str(run) else "ctc"]
    lines = (run / "hyp_test-clean.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) == 3
    for line in lines:
        name, _, hypothesis = line.split("\t")
        (path,) = tone_corpus.rglob(f"{name}.flac")
        assert recognizer.transcribe(path).text == hypothesis


def test_all_files_can_be_read_by_whom_one_can(bundle):
    modes = {path.stat().st_mode & 0o777 for path in bundle.iterdir() if path.is_file()}
    assert len(modes) == 1


def test_all_statistics_of_the_normaliser_are_kept(tmp_path):
    run = make_run(
        tmp_path / "run", "CTC/an4", d_ffn=16, inter_ctc_layers=[], self_conditioning=False
    )
    saved = torch.load(run / "save" / "averaged" / "normalizer.ckpt")
    for model in (read_run(run), read_bundle(write_bundle(run, tmp_path / "b", "int8"))):
        normalize = model.encoder.normalize
        assert type(normalize).__name__ == "UtteranceMeanNormalization"
        assert normalize.remove_mean
        assert normalize.count == saved["count"] > 0
        torch.testing.assert_close(normalize.glob_mean, saved["glob_mean"], rtol=0, atol=0)
        torch.testing.assert_close(normalize.glob_std, saved["glob_std"], rtol=0, atol=0)


@pytest.mark.parametrize("name", LOADED)
def test_a_changed_byte_is_one_clear_error(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 4
    (bundle / name).write_bytes(content)
    with pytest.raises(UserError, match="bundle again"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", LOADED)
def test_a_missing_file_is_one_clear_error(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing|has no {name}"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["README.md", "hyperparams.yaml"])
def test_loading_reads_nothing_else(bundle, name):
    (bundle / name).write_text("!apply:os.abort []")
    (bundle / "inference.py").write_text("raise SystemExit")
    read_bundle(bundle)
    (bundle / name).unlink()
    read_bundle(bundle)


@pytest.mark.parametrize("name", LOADED)
def test_a_link_out_of_the_folder_is_refused(bundle, tmp_path, name):
    shutil.move(bundle / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", bundle / name)
    with pytest.raises(UserError, match=f"{name} is a link"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("format", to=99), "format 99; this version reads formats up to 1. Update"),
        (set_at("format", to="1"), "format '1'"),
        (set_at("kind", to=["ctc"]), r"kind is \['ctc'\]"),
        (set_at("kind", to="rnnt"), "kind is 'rnnt'; known are ctc, s2s"),
        (set_at("network", "CNN", "class", to="os.system"), "CNN is of class 'os.system'"),
        (set_at("network", "CNN", "class", to="Linear"), "it must be ConvolutionFrontEnd"),
        (set_at("network", "CNN", "norm", to={"maker": "eval"}), "CNN.norm is of class 'eval'"),
        (set_at("network", "CNN", "norm", to={"maker": ["GELU"]}), "CNN.norm is of class"),
        (set_at("network", "ctc_lin", to=None), "ctc_lin is of class None"),
        (set_at("network", "seq_lin", to={"class": "Linear"}), "a ctc model has CNN, Transformer"),
        (set_at("network", "Transformer", "d_model", to=1 << 40), "no model of ours|d_model"),
        (set_at("network", "Transformer", "d_model", to=1 << 14), "belong to another model"),
        (set_at("network", "Transformer", "d_model", to=1e300), "d_model is 1e"),
        (set_at("network", "Transformer", "d_model", to=float("nan")), "d_model is nan"),
        (set_at("network", "Transformer", "d_model", to="wide"), "no model of ours"),
        (set_at("network", "Transformer", "encoder_module", to="brain"), "no model of ours"),
        (set_at("network", "Transformer", "colour", to=1), "no model of ours"),
        (set_at("network", "Transformer", "num_encoder_layers", to=1 << 30), "none has a size"),
        (set_at("network", "Transformer", "num_encoder_layers", to=1 << 20), "a larger one"),
        (set_at("network", "Transformer", "mamba_config", "d_state", to=1 << 20), "a larger one"),
        (set_at("network", "CNN", "input_shape", to=[1 << 12, 1 << 12, 80]), "a larger one"),
        (set_at("network", "CNN", "kernel_sizes", to={"ref": "Transformer"}), "refers to"),
        (set_at("features", "compute_features", "n_fft", to=8), "no model of ours"),
        (set_at("features", "compute_features", "n_mels", to=40), "no model of ours"),
        (set_at("features", "compute_features", "sample_rate", to=80), "80 Hz, which is impossib"),
        (set_at("features", "compute_features", "win_length_ms", to=60_000), "no model of ours"),
        (set_at("features", to=[]), "features is"),
        (set_at("tokens", "outputs", to=30), "number of outputs than the tokens' 30"),
        (set_at("tokens", "blank", to=31), "the blank 31"),
        (set_at("tokens", "outputs", to=True), "True outputs"),
        (set_at("search", "beam_size", to=[1]), r"beam_size \[1\]"),
        (set_at("search", "beam_size", to=2.5), "beam_size 2.5"),
        (set_at("search", "prune_history", to=0.5), "prune_history 0.5"),
        (set_at("search", "ngram", to="/etc/passwd"), "search has ngram"),
        (set_at("lm", to={"class": "MambaLM", "vocab": 31}), "lm.safetensors is missing"),
        (set_at("results", to=[1]), "results is"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(bundle, change, message):
    change_config(bundle, change)
    with pytest.raises(UserError, match=message):
        read_bundle(bundle)


def test_loading_draws_no_random_numbers(bundle):
    before = torch.get_rng_state()
    read_bundle(bundle)
    assert torch.equal(torch.get_rng_state(), before)


def test_scales_of_other_rows_are_refused(bundle):
    tensors = safetensors.torch.load_file(bundle / "model.safetensors")
    # Multiplied out, 4 kB would become a megabyte.
    tensors["more"] = torch.zeros(1, 1000, dtype=torch.int8)
    tensors["more#scale"] = torch.zeros(250)
    with pytest.raises(UserError, match="more has scales that are not one for each"):
        unpack(tensors)


def test_deep_and_huge_configurations_are_refused(bundle):
    deep = {}
    for _ in range(30):
        deep = {"a": deep}
    change_config(bundle, set_at("network", "CNN", "norm", to=deep))
    with pytest.raises(UserError, match="nested too deeply"):
        read_bundle(bundle)
    for text in ("[" * 100_000, '{"a": "' + "x" * (1 << 20) + '"}', "[]", "\x00"):
        (bundle / "checksums.json").write_text(text)
        with pytest.raises(UserError, match=r"checksums\.json (cannot be read|holds no mapping)"):
            read_bundle(bundle)


def test_weights_of_another_model_name_a_tensor(bundle):
    model = read_bundle(bundle)
    tensors = safetensors.torch.load_file(bundle / "model.safetensors")
    for name, changed, message in (
        ("ctc_lin.w.bias", None, "ctc_lin.w.bias is missing"),
        ("more", torch.zeros(1), "more has no place"),
        ("ctc_lin.w.bias", torch.zeros(5), r"ctc_lin.w.bias is \(5,\) and should be \(31,\)"),
        ("normalize.glob_mean", torch.zeros(0), "no statistics"),
    ):
        spoiled = {k: v for k, v in {**tensors, name: changed}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            make_model(model.config, model.tokenizer, spoiled)


def test_no_folder_and_no_bundle_say_how_to_get_one(tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="Train one"):
            read_bundle(folder)
        with pytest.raises(UserError, match="Train one"):
            read_run(folder)


def test_only_a_bundle_is_replaced(tmp_path):
    run = make_run(tmp_path / "run", "CTC/demo")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(UserError, match="is no bundle"):
            write_bundle(run, folder)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    # As of a web project, or of another library's model.
    (tmp_path / "mine" / "config.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="is no bundle"):
        write_bundle(run, tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"thesis.txt", "config.json"}


@pytest.mark.parametrize("beside", [None, ".git/HEAD", "notes.txt"])
def test_what_lies_beside_a_bundle_stays(tmp_path, beside):
    run, folder = make_run(tmp_path / "run", "CTC/demo"), tmp_path / "b"
    write_bundle(run, folder, "fp16")
    names = {path.name for path in folder.iterdir()}
    (folder / "lm.safetensors").write_text("of another model")
    if beside:
        (folder / beside).parent.mkdir(exist_ok=True)
        (folder / beside).write_text("x")
        names.add(Path(beside).parts[0])
    write_bundle(run, folder, "fp32")
    assert {path.name for path in folder.iterdir()} == names
    assert read_bundle(folder).config["stored_precision"] == "fp32"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "b"}
    if beside:
        assert (folder / beside).read_text() == "x"


@pytest.mark.parametrize("beside", [None, "notes.txt"])
def test_a_bundle_on_another_device_is_replaced(tmp_path, monkeypatch, beside):
    run, disk = make_run(tmp_path / "run", "CTC/demo"), tmp_path / "disk"
    disk.mkdir()
    folder = tmp_path / "b"
    folder.symlink_to(disk)
    write_bundle(run, folder, "fp16")
    (disk / "lm.safetensors").write_text("of another model")
    if beside:
        (disk / beside).write_text("x")
    names = {path.name for path in disk.iterdir()} - {"lm.safetensors"}

    def on_one_device(move):
        def moved(source, target, **options):
            if (disk in Path(source).resolve().parents) != (disk in Path(target).resolve().parents):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return move(source, target, **options)

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, on_one_device(getattr(os, name)))
    write_bundle(run, folder, "fp32")
    assert folder.is_symlink()
    assert {path.name for path in disk.iterdir()} == names
    assert read_bundle(folder).config["stored_precision"] == "fp32"


def test_a_run_that_goes_on_outdates_its_bundle(tmp_path, caplog):
    run = make_run(tmp_path / "run", "CTC/demo")
    write_bundle(run, run / "bundle")
    caplog.clear()
    read_run(run)
    assert not caplog.records
    averaged = run / "save" / "averaged" / "model.ckpt"
    state = torch.load(averaged)
    state["2.w.bias"] += 1
    torch.save(state, averaged)
    model = read_run(run)
    torch.testing.assert_close(model.ctc_lin.w.bias, state["2.w.bias"])
    (record,) = caplog.records
    assert "another model than the run's present one is in its bundle" in record.message
    shutil.rmtree(run / "save")
    assert not torch.equal(read_run(run).ctc_lin.w.bias, state["2.w.bias"])


def test_an_older_run_without_a_bundle_is_read_without_executing_it(tmp_path, caplog):
    run = make_run(tmp_path / "run", "CTC/demo")
    with (run / "hyperparams.yaml").open("a") as stream:
        stream.write(f"\nspy: !apply:pathlib.Path.touch [!apply:pathlib.Path [{tmp_path}/spy]]\n")
    recognizer = Recognizer.from_run(run, device="cpu")
    assert recognizer.sample_rate == 16000
    assert [r.message for r in caplog.records if "on the fly" in r.message] != []
    assert not (tmp_path / "spy").exists()
    assert not (run / "bundle").exists()


def test_a_class_outside_the_table_stops_bundling_and_is_named(tmp_path):
    run = make_run(tmp_path / "run", "CTC/demo")
    text = (run / "hyperparams.yaml").read_text()
    for old, new in (
        ("modules.frontend.ConvolutionFrontEnd", "mine.FrontEnd"),
        ("!name:torch.nn.GELU", "!name:mine.Activation"),
        ("decoding.ctc_beam_search.CTCBeamSearch", "mine.Searcher"),
    ):
        assert old in text
        (run / "hyperparams.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=new.partition(":")[2] or new):
            write_bundle(run, tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_what_prevents_the_bundle_of_a_run_is_a_warning(tmp_path, caplog, monkeypatch):
    run = make_run(tmp_path / "run", "CTC/demo")
    leave_bundle(run)
    before = (run / "bundle" / "checksums.json").read_bytes()

    def refuse(**options):
        raise PermissionError(13, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryDirectory", refuse)
        leave_bundle(run)
    assert "Read-only file system" in caplog.records[-1].message
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        leave_bundle(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "model.safetensors cannot be written" in caplog.records[-1].message
    text = (run / "hyperparams.yaml").read_text()
    (run / "hyperparams.yaml").write_text(text.replace("torch.nn.GELU", "mine.Activation"))
    leave_bundle(run)
    assert caplog.records[-1].levelname == "WARNING"
    assert "mine.Activation" in caplog.records[-1].message
    assert (run / "bundle" / "checksums.json").read_bytes() == before


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_command_writes_a_bundle_that_loads(tmp_path, capsys, precision):
    run = make_run(tmp_path / "run", "CTC/demo")
    folder = tmp_path / "deep" / "b"
    arguments = [str(run), str(folder), "--precision", precision, "--language", "en"]
    assert main([*arguments, "--licence", "cc-by-4.0"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert read_bundle(folder).config["stored_precision"] == precision
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "language: en\nlicense: cc-by-4.0" in card


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path} is not the folder of an evaluated"
    )


def test_the_model_card_tells_where_the_model_comes_from(run):
    card = (run / "bundle" / "README.md").read_text(encoding="utf-8")
    results = json.loads((run / "results.json").read_text())
    assert f"{results['model']['parameters']:,}" in card
    assert f"{results['splits']['test-clean']['wer']:.2f}" in card
    assert results["run"]["command"] in card
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    assert ["trained on", "train-clean-100"] in rows
    assert ["checkpoints chosen on", "dev-clean"] in rows
    assert ["test-clean", "no"] in [row[:2] for row in rows]
    for name in ("model.safetensors", "tokenizer.model"):
        assert [name, f"`{file_digest(run / 'bundle' / name)}`"] in rows


def test_of_no_words_neither_card_nor_report_has_a_rate(tmp_path, capsys):
    run = make_run(tmp_path / "run", "CTC/demo")
    counts = {"del": 0, "sub": 0, "words": 0, "utterances": 2, "audio_s": 2.0, "decode_s": 1.0}
    scores = {
        name: {"wer": 0.0, "cer": 0.0, "ins": ins, **counts}
        for name, ins in (("noise", 2), ("silence", 0))
    }
    (run / "results.json").write_text(json.dumps({"splits": scores, "run": {}}))
    bundle = write_bundle(run, tmp_path / "b")
    card = (bundle / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    assert ["noise", "no", "-", "-", "0"] in rows
    assert ["silence", "no", "0.00", "0.00", "0"] in rows
    assert inspect([str(bundle)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["noise", "-", "-"] in lines
    assert ["silence", "0.00", "0.00"] in lines


def test_a_named_evaluation_leaves_the_model_card_its_scores(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    results = json.loads((copy / "results.json").read_text())
    named = {"splits": results["splits"], "settings": {}, "run": results["run"]}
    results["evaluations"] = {"test-clean_beam2": named}
    (copy / "results.json").write_text(json.dumps(results))
    bundle = write_bundle(copy, tmp_path / "bundle")
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert f"{results['splits']['test-clean']['wer']:.2f}" in card
    assert results["run"]["command"] in card
