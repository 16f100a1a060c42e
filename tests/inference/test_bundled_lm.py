"""The language model of a joint search is part of its bundle: the text is the run's."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hyperpyyaml import load_hyperpyyaml

import train_S2S
from common.errors import UserError
from decoding import pretrained_lm
from decoding.pretrained_lm import LM_FILE, TOKENIZER_FILE
from inference import Recognizer
from inference.bundle import read_bundle, write_bundle
from modules.lengths import relative_lengths
from tests.inference.runs import make_run

TRANSFORMER = "speechbrain.lobes.models.transformer.TransformerLM.TransformerLM"


@pytest.fixture(params=["TransformerLM", "MambaLM"])
def run(request, tmp_path):
    """A joint run whose search has a language model that matters."""
    lm_folder = tmp_path / "lm"
    lm_folder.mkdir()
    folder = make_run(
        tmp_path / "run",
        "S2S/demo",
        num_decoder_layers=1,
        no_lm=False,
        pretrained_lm_tokenizer_path=str(lm_folder),
        lm_weight=2.0,
        test_beam_size=3,
    )
    path = folder / "hyperparams.yaml"
    if request.param == "MambaLM":
        text = path.read_text()
        assert text.count(TRANSFORMER + "\n") == 1
        text = text.replace(TRANSFORMER, "modules.lm.MambaLM")
        begin = text.index("  d_model: 128", text.index("modules.lm.MambaLM"))
        end = text.index("normalize_before", begin)
        end = text.index("\n", end)
        path.write_text(text[:begin] + "  d_model: 16\n  num_layers: 1\n" + text[end:])
    torch.manual_seed(1)
    language_model = load_hyperpyyaml(path.read_text())["lm_model"]()
    for parameter in language_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    torch.save(language_model.state_dict(), lm_folder / LM_FILE)
    shutil.copyfile(folder / "save" / "tokenizer.model", lm_folder / TOKENIZER_FILE)
    return folder


def test_the_text_is_that_of_the_runs_own_search(run, tmp_path):
    write_bundle(run, tmp_path / "b")
    shutil.rmtree(tmp_path / "lm")
    recognizer = Recognizer.from_bundle(tmp_path / "b", device="cpu")
    rng = np.random.default_rng(0)
    waveforms = [rng.uniform(-1, 1, 16000 * n).astype(np.float32) for n in (2, 1)]
    found = [transcript.text for transcript in recognizer.transcribe_batch(waveforms)]

    lm_folder = tmp_path / "lm"
    lm_folder.mkdir()
    lm = safetensors.torch.load_file(tmp_path / "b" / "lm.safetensors")
    torch.save(lm, lm_folder / LM_FILE)
    shutil.copyfile(run / "save" / "tokenizer.model", lm_folder / TOKENIZER_FILE)
    hparams = load_hyperpyyaml((run / "hyperparams.yaml").read_text())
    hparams["model"].load_state_dict(torch.load(run / "save" / "averaged" / "model.ckpt"))
    hparams["model"].eval()
    tokenizer = recognizer.model.tokenizer
    train_S2S.prepare_searches(hparams, tokenizer)
    encoder_out_BTD, _, num_frames_B = recognizer.encode(waveforms)
    wav_lens = relative_lengths(num_frames_B, encoder_out_BTD.shape[1])
    tokens, _, _, _ = hparams["test_search"](encoder_out_BTD, wav_lens)
    size = tokenizer.get_piece_size()
    texts = [tokenizer.decode([t for t in ids if 3 <= t < size]) for ids in tokens]
    assert [text.split() for text in found] == [text.split() for text in texts]
    assert all(found)

    del recognizer.model.config["search"]["scorer"]["full_scorers"][0]
    del recognizer.model.config["search"]["scorer"]["weights"]["lm"]
    without = [transcript.text for transcript in recognizer.transcribe_batch(waveforms)]
    assert without != found


def test_a_language_model_that_is_gone_stops_bundling(run, tmp_path):
    shutil.rmtree(tmp_path / "lm")
    with pytest.raises(UserError, match=r"lm\.ckpt is missing"):
        write_bundle(run, tmp_path / "b")


def test_a_language_model_of_another_size_is_refused(run, tmp_path):
    state = torch.load(tmp_path / "lm" / LM_FILE)
    name = next(iter(state))
    state[name] = state[name][:-1]
    torch.save(state, tmp_path / "lm" / LM_FILE)
    with pytest.raises(UserError, match="belong to another model"):
        write_bundle(run, tmp_path / "b")


def test_its_file_is_checked_like_the_others(run, tmp_path):
    bundle = write_bundle(run, tmp_path / "b", "int8")
    read_bundle(bundle)
    with (bundle / "lm.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=r"lm\.safetensors is not the file"):
        read_bundle(bundle)


def test_language_models_of_two_repositories_do_not_meet(tmp_path, monkeypatch):
    def fetch(name, source, savedir):
        path = Path(savedir) / name
        path.write_text(source, encoding="utf-8")
        return path

    monkeypatch.setattr(pretrained_lm, "fetch", fetch)
    for source in ("ours/lm", "theirs/lm", "ours/lm"):
        found = pretrained_lm.fetch_pretrained(source, "lm.ckpt", tmp_path)
        assert found.read_text(encoding="utf-8") == source
        assert found == pretrained_lm.pretrained_file(source, "lm.ckpt", tmp_path)
