"""SpeechBrain's own classes load a bundle and find the same text."""

from pathlib import Path

import pytest
import torch
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR

from common.errors import UserError
from inference.bundle import write_bundle
from tests.ctc_runs import REPOSITORY

INTERFACES = {"ctc": EncoderASR, "s2s": EncoderDecoderASR}


@pytest.fixture(params=INTERFACES)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of model, at the root of the repository and without a network."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return request.param


@pytest.fixture
def asr(kind, request):
    """The interface of the run's bundle."""
    run = request.getfixturevalue(f"{kind}_run")
    return INTERFACES[kind].from_hparams(source=str(run / "bundle"))


def test_files_have_the_text_of_the_recognizer(asr, kind, recognizers, audio_files):
    texts = [asr.transcribe_file(str(path)) for path in audio_files]
    assert texts == [recognizers[kind].transcribe(path).text for path in audio_files]
    assert len(set(texts)) > 3


def test_a_padded_batch_has_it_too(asr, kind, recognizers, waveforms):
    texts = [transcript.text for transcript in recognizers[kind].transcribe_batch(waveforms)]
    lengths_B = torch.tensor([len(wav_S) for wav_S in waveforms])
    # Rubbish in the padding.
    wavs = torch.full((len(waveforms), int(lengths_B.max())), 0.5)
    for row_S, wav_S in zip(wavs, waveforms, strict=True):
        row_S[: len(wav_S)] = torch.from_numpy(wav_S)
    found, tokens = asr.transcribe_batch(wavs, lengths_B / lengths_B.max())
    assert found == texts
    assert [asr.tokenizer.decode_ids(ids) for ids in tokens] == texts


def test_nothing_is_put_into_another_folder(kind, request, tmp_path):
    bundle = request.getfixturevalue(f"{kind}_run") / "bundle"
    before = sorted(bundle.rglob("*"))
    INTERFACES[kind].from_hparams(source=str(bundle), savedir=str(tmp_path / "saved"))
    assert sorted(bundle.rglob("*")) == before
    saved = tmp_path / "saved"
    assert [path.name for path in saved.rglob("*")] == ["hyperparams.yaml"]


def test_int8_weights_load(ctc_run, tmp_path, audio_files, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    asr = EncoderASR.from_hparams(source=str(write_bundle(ctc_run, tmp_path / "b", "int8")))
    assert isinstance(asr.transcribe_file(str(audio_files[0])), str)


def test_a_damaged_bundle_is_the_same_error(bundle: Path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (bundle / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors is not the file"):
        EncoderASR.from_hparams(source=str(bundle))
