"""One path from waveforms to encoder output, at any sampling rate, hop and subsampling."""

import pytest
import torch
from speechbrain.processing.features import InputNormalization
from torch import nn

from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.speech_encoder import SpeechEncoder
from modules.TransformerASR import TransformerASR

BINS = 16
FORMS = {
    "published": ({}, (2, 2)),
    "8 kHz": ({"sample_rate": 8000, "n_fft": 256}, (2, 2)),
    "44.1 kHz": ({"sample_rate": 44100, "n_fft": 2048}, (2, 2)),
    "hop of 8 ms": ({"hop_length_ms": 8}, (2, 2)),
    "an eighth": ({}, (2, 2, 2)),
    "a half": ({}, (2,)),
}


def encoder_of(filterbank, strides, encoder="conmamba", **frontend) -> SpeechEncoder:
    torch.manual_seed(3)
    blocks = len(strides)
    cnn = ConvolutionFrontEnd(
        (None, None, BINS),
        num_blocks=blocks,
        out_channels=(4,) * blocks,
        kernel_sizes=(3,) * blocks,
        strides=strides,
        residuals=(False,) * blocks,
        **frontend,
    )
    input_size = cnn(torch.zeros(1, 16, BINS)).flatten(2).shape[2]
    network = TransformerASR(
        11, input_size, 16, 2, 2, 0, 24, 0.0, encoder_module=encoder, normalize_before=True
    )
    normalize = InputNormalization(norm_type="global", update_until_epoch=4)
    normalize.glob_mean, normalize.glob_std = torch.full((BINS,), -20.0), torch.full((BINS,), 9.0)
    normalize.count = 1
    return SpeechEncoder(Fbank(n_mels=BINS, **filterbank), normalize, cnn, network).eval()


def test_one_broken_sample_does_not_stay_in_the_statistics():
    encoder = encoder_of(*FORMS["published"]).train()
    wav_BS = torch.randn(2, 4000)
    wav_BS[0, 900] = torch.nan
    encoder.features(wav_BS, torch.tensor([4000, 4000]), epoch=1)
    assert encoder.normalize.count == 1
    assert (encoder.normalize.glob_mean == -20).all()
    encoder.features(torch.randn(2, 4000), torch.tensor([4000, 4000]), epoch=1)
    assert encoder.normalize.count > 1
    assert encoder.normalize.glob_std.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_frame_counts_are_what_filterbank_and_front_end_make(form):
    encoder = encoder_of(*FORMS[form])
    rate = encoder.compute_features.compute_STFT.sample_rate
    hop = encoder.compute_features.hop_samples
    counts = [1, hop - 1, hop, hop + 1, 4 * hop, 5 * hop - 1, rate, rate + 1]
    for num_samples in counts:
        feats_BTM = encoder.compute_features(torch.randn(1, num_samples))
        assert encoder.num_feature_frames(num_samples) == feats_BTM.shape[1]
        assert encoder.num_frames(num_samples) == encoder.CNN(feats_BTM).shape[1]
    assert encoder.stride_samples == hop * 2 ** len(FORMS[form][1])
    assert encoder.num_frames(torch.tensor(counts)).tolist() == list(
        map(encoder.num_frames, counts)
    )


def test_the_published_front_end_gives_25_frames_a_second():
    encoder = encoder_of(*FORMS["published"])
    counts = torch.tensor([0, 159, 160, 16000, 57599])
    feature_frames = 1 + counts // 160
    assert encoder.num_frames(counts).tolist() == ((feature_frames + 3) // 4).tolist()


@pytest.mark.parametrize("count", [torch.tensor([0.5]), -1])
def test_a_count_that_is_none_is_named(count):
    with pytest.raises(ValueError, match=r"float32|-1"):
        encoder_of(*FORMS["published"]).num_frames(count)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoder", ["conmamba", "conformer", "mamba"])
def test_what_an_utterance_gives_alone_it_gives_in_any_batch(form, encoder):
    encoder = encoder_of(*FORMS[form], encoder=encoder)
    rate = encoder.compute_features.compute_STFT.sample_rate
    num_samples_B = torch.tensor([rate, rate // 2 + 7, rate // 3])
    wav_BS = torch.randn(3, int(num_samples_B.max()) + 999)
    for wav_S, count in zip(wav_BS, num_samples_B.tolist(), strict=True):
        wav_S[count:] = 50 * torch.randn_like(wav_S[count:])
    together_BTD, num_frames_B = encoder(wav_BS, num_samples_B)
    for row, count in enumerate(num_samples_B.tolist()):
        alone_1TD, frames_1 = encoder(wav_BS[row : row + 1, :count], torch.tensor([count]))
        assert alone_1TD.shape[1] == int(frames_1) == int(num_frames_B[row])
        torch.testing.assert_close(
            together_BTD[row, : int(frames_1)], alone_1TD[0], rtol=0, atol=1e-4
        )


def test_the_pieces_in_a_row_are_the_whole():
    encoder = encoder_of(*FORMS["published"])
    wav_BS, num_samples_B = torch.randn(2, 8000), torch.tensor([8000, 5000])
    feats_BTM, feature_frames_B = encoder.features(wav_BS, num_samples_B)
    frames_BTFC, num_frames_B = encoder.frontend(feats_BTM, feature_frames_B)
    expected_BTD, expected_B = encoder(wav_BS, num_samples_B)
    assert torch.equal(num_frames_B, expected_B)
    assert torch.equal(encoder.encode(frames_BTFC, num_frames_B), expected_BTD)


def test_features_are_float32_whatever_the_precision_around_them():
    encoder = encoder_of(*FORMS["published"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feats_BTM, _ = encoder.features(torch.randn(1, 4000), torch.tensor([4000]))
    expected_BTM, _ = encoder.features(torch.randn(1, 4000), torch.tensor([4000]))
    assert feats_BTM.dtype == expected_BTM.dtype == torch.float32


def test_a_wrapper_may_take_the_place_of_the_front_end():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    encoder = encoder_of(*FORMS["published"])
    wav_BS, num_samples_B = torch.randn(1, 4000), torch.tensor([4000])
    expected_BTD, _ = encoder(wav_BS, num_samples_B)
    encoder.CNN = Wrapper(encoder.CNN)
    assert torch.equal(encoder(wav_BS, num_samples_B)[0], expected_BTD)
    assert encoder.num_frames(4000) == expected_BTD.shape[1]


def test_no_frame_of_padding_enters_the_statistics_of_the_normaliser(monkeypatch):
    encoder = encoder_of(*FORMS["published"]).train()
    num_samples_B = 160 * torch.arange(300, 1500, 3)
    num_frames_B = encoder.num_feature_frames(num_samples_B)
    feats_BTM = torch.full((len(num_frames_B), int(num_frames_B.max()), BINS), 1e6)
    for feats_TM, num_frames in zip(feats_BTM, num_frames_B, strict=True):
        feats_TM[:num_frames] = torch.randn(int(num_frames), BINS)
    monkeypatch.setattr(encoder.compute_features, "forward", lambda wav_BS, samples_B: feats_BTM)
    encoder.normalize.count = 0
    encoder.features(torch.zeros(len(num_samples_B), 1), num_samples_B, epoch=1)
    assert encoder.normalize.count == int(num_frames_B.sum())
    assert encoder.normalize.glob_std.max() < 2


@pytest.mark.parametrize("form", FORMS)
def test_parts_that_fit_each_other_are_taken(form):
    encoder_of(*FORMS[form]).train().check_widths()


def test_parts_that_do_not_fit_each_other_are_named():
    encoder = encoder_of({}, (2, 2)).train()
    whole, wide = encoder.Transformer.input_size, encoder_of({}, (2,)).CNN
    encoder.Transformer.input_size = 640
    with pytest.raises(ValueError, match=f"makes {whole} features of 16 .*input_size: {whole}"):
        encoder.check_widths()
    encoder.CNN = wide
    encoder.compute_features.compute_fbanks.n_mels = BINS + 4
    with pytest.raises(ValueError, match="CNN does not take features of 20 mel bins"):
        encoder.check_widths()
    assert encoder.CNN.training == wide.training
