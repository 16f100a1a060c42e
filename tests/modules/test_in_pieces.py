"""A recording of any length, in memory for a piece: the numbers of the plain forward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.processing.features import InputNormalization
from torch import nn

from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.mamba import Mamba
from modules.normalization import UtteranceMeanNormalization
from modules.speech_encoder import SpeechEncoder
from modules.TransformerASR import TransformerASR

RATE = 16000


def speech_encoder(
    encoder="conmamba", normalize=InputNormalization, norm_type="global", top_db=80.0, **options
):
    torch.manual_seed(5)
    cnn = ConvolutionFrontEnd((None, None, 16), out_channels=(4, 4))
    network = TransformerASR(
        11, 16, 16, 2, 2, 0, 24, 0.0, encoder_module=encoder, normalize_before=True, **options
    )
    normalizer = normalize(norm_type=norm_type, update_until_epoch=4)
    normalizer.glob_mean, normalizer.glob_std = torch.full((16,), -20.0), torch.full((16,), 9.0)
    normalizer.count = 1
    return SpeechEncoder(Fbank(n_mels=16, top_db=top_db), normalizer, cnn, network).eval()


NETWORKS = {
    "conmamba": {},
    "utterance mean": {"normalize": UtteranceMeanNormalization},
    "own statistics": {"norm_type": "sentence"},
    "no floor": {"top_db": None},
    "mamba": {"encoder": "mamba"},
    "causal": {"causal": True, "mamba_config": {"bidirectional": False}},
    "positions": {"attention_type": "regularMHA"},
}


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6, deadline=None)
@given(
    num_samples=st.integers(1, 3 * RATE),
    piece_s=st.sampled_from([0.05, 0.31, 1.0, 2.5, 10.0]),
)
def test_a_recording_in_pieces_is_the_recording_at_once(name, num_samples, piece_s):
    encoder = speech_encoder(**NETWORKS[name])
    wav_S = 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))
    wav_S[: num_samples // 3] *= 30
    with torch.no_grad():
        expected_1TD, _ = encoder(wav_S[None], torch.tensor([num_samples]))
    torch.testing.assert_close(
        encoder.forward_in_pieces(wav_S, piece_s), expected_1TD[0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("piece_frames", [1, 2, 7, 40])
def test_a_mixer_with_a_replaced_part_goes_in_pieces_too(bidirectional, piece_frames):
    mixer = Mamba(8, d_state=4, bidirectional=bidirectional).eval()
    mixer.x_proj = nn.Sequential(mixer.x_proj)
    x_BTD = torch.randn(2, 23, 8)
    with torch.no_grad():
        expected_BTD = mixer(nn.functional.layer_norm(x_BTD, (8,)))
        actual_BTD = mixer.forward_in_pieces(
            x_BTD, piece_frames, before=lambda x: nn.functional.layer_norm(x, (8,))
        )
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["conformer", "transformer", "branchformer"])
def test_attention_cannot_go_in_pieces_and_says_what_can(encoder):
    network = speech_encoder(encoder, attention_type="RelPosMHAXL")
    with pytest.raises(ValueError, match=r"needs all frames at once; .*conmamba, mamba"):
        network.forward_in_pieces(torch.zeros(RATE))
