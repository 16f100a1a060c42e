import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.lobes.features import Fbank as SpeechBrainFbank

from modules.features import Fbank


@pytest.mark.parametrize(("n_fft", "win_length_ms"), [(512, 25), (400, 25), (512, 32)])
def test_unpadded_features_are_speechbrains(n_fft, win_length_ms):
    wav_BS = torch.randn(2, 4000)
    wanted = SpeechBrainFbank(n_fft=n_fft, win_length=win_length_ms, n_mels=80)(wav_BS)
    actual = Fbank(n_fft=n_fft, win_length_ms=win_length_ms)(wav_BS, torch.tensor([4000, 4000]))
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("filling", ["noise", "zeros", "nan"])
def test_features_of_an_item_do_not_depend_on_its_padding(filling):
    fbank = Fbank()
    samples = [4001, 1600, 1, 159]
    wav_BS = torch.randn(4, 4001) * torch.tensor([10.0, 0.01, 1.0, 1.0])[:, None]
    alone = [
        fbank(wav[None, :n], torch.tensor([n]))[0] for wav, n in zip(wav_BS, samples, strict=True)
    ]
    for wav, n in zip(wav_BS, samples, strict=True):
        wav[n:] = {"noise": 1e3, "zeros": 0.0, "nan": float("nan")}[filling]
    feats_BTM = fbank(wav_BS, torch.tensor(samples))
    for feats, wanted in zip(feats_BTM, alone, strict=True):
        torch.testing.assert_close(feats[: len(wanted)], wanted, atol=1e-4, rtol=1e-5)
        assert not feats[len(wanted) :].any()


def test_dynamic_range_ends_80_db_below_the_item_and_can_be_lifted():
    wav_BS = torch.zeros(1, 8000)
    wav_BS[:, :1000] = torch.randn(1000)
    limited, free = Fbank()(wav_BS), Fbank(top_db=None)(wav_BS)
    assert limited.amin() == pytest.approx(limited.amax().item() - 80)
    assert free.amin() == pytest.approx(-100)


@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=8), behind=st.integers(0, 159))
def test_streamed_in_whole_hops_equals_the_whole(pieces, behind):
    fbank = Fbank(top_db=None, n_mels=20)
    hop, kept = fbank.hop_samples, fbank.num_kept_samples
    wav_BS = torch.randn(2, (sum(pieces) - 1) * hop + behind)
    # A frame is centred on its time.
    edge = fbank.compute_STFT.n_fft // 2
    padded_BS = F.pad(wav_BS, (edge, edge))
    before_BS, outputs = padded_BS[:, :kept], []
    for piece in padded_BS[:, kept:].split([*(hop * n for n in pieces), behind], dim=1)[:-1]:
        feats_BTM, before_BS = fbank.forward_streaming(piece, before_BS)
        outputs.append(feats_BTM)
        assert before_BS.shape[1] == kept
    torch.testing.assert_close(torch.cat(outputs, 1), fbank(wav_BS), atol=1e-3, rtol=1e-4)


def test_a_stream_with_a_floor_is_an_error():
    with pytest.raises(ValueError, match="top_db=None"):
        Fbank().check_streaming()


def test_a_window_longer_than_the_transform_is_an_error():
    with pytest.raises(ValueError, match=r"512 samples.*n_fft=400"):
        Fbank(n_fft=400, win_length_ms=32)


def test_relative_lengths_are_an_error():
    with pytest.raises(ValueError, match="float32"):
        Fbank()(torch.randn(2, 400), torch.tensor([1.0, 0.5]))
