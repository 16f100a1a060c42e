"""Networks give on a GPU what they give on the CPU, and in a batch what they give alone."""

import pytest
import torch
from speechbrain.processing.features import InputNormalization

from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.lengths import relative_lengths
from modules.overlapping_chunks import ChunkConfig
from modules.speech_encoder import SpeechEncoder
from tests.modules.networks import (
    assert_same_gradients,
    gradients,
    padded_batch,
    small_network,
)

LENGTHS = [37, 20, 9, 1]
BINS = 12


def encode(network, x_BTD, lengths_B, device, chunks=None):
    """Outputs of each item, and the gradients of all parameters, on the CPU."""
    network, x_BTD, lengths_B = network.to(device), x_BTD.to(device), lengths_B.to(device)
    wav_len = relative_lengths(lengths_B, x_BTD.shape[1])
    out_BTD = network.encode(x_BTD, wav_len, dynchunktrain_config=chunks)
    outputs = [out[:length] for out, length in zip(out_BTD, lengths_B.tolist(), strict=True)]
    sum(out.sin().sum() for out in outputs).backward()
    found = {name: gradient.cpu() for name, gradient in gradients(network).items()}
    return [out.detach().cpu() for out in outputs], found


def assert_same_outputs(found, wanted):
    for output, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(output, reference, atol=1e-4, rtol=1e-4)


def test_an_encoder_is_that_of_the_cpu(device):
    batch = padded_batch(LENGTHS)
    wanted, wanted_gradients = encode(small_network("conmamba"), *batch, torch.device("cpu"))
    found, found_gradients = encode(small_network("conmamba"), *batch, device)
    assert_same_outputs(found, wanted)
    assert_same_gradients(found_gradients, wanted_gradients)


@pytest.mark.parametrize("encoder", ["conmamba", "mamba"])
@pytest.mark.parametrize("lookahead", [0.0, 0.25, 0.5])
def test_an_encoder_in_chunks_is_that_of_the_cpu(device, encoder, lookahead):
    batch, chunks = padded_batch(LENGTHS), ChunkConfig(8, None, lookahead)
    wanted, wanted_gradients = encode(small_network(encoder), *batch, torch.device("cpu"), chunks)
    found, found_gradients = encode(small_network(encoder), *batch, device, chunks)
    assert_same_outputs(found, wanted)
    assert_same_gradients(found_gradients, wanted_gradients)


def test_what_an_utterance_gives_alone_it_gives_in_any_batch(device):
    x_BTD, lengths_B = padded_batch(LENGTHS)
    network = small_network("conmamba")
    together, together_gradients = encode(network, x_BTD, lengths_B, device)
    alone, alone_gradients = [], []
    for row, length in enumerate(LENGTHS):
        item = x_BTD[row : row + 1, :length], torch.tensor([length])
        outputs, found = encode(network, *item, device)
        alone += outputs
        alone_gradients.append(found)
    assert_same_outputs(together, alone)
    summed = {name: sum(found[name] for found in alone_gradients) for name in together_gradients}
    assert_same_gradients(together_gradients, summed)


def speech_encoder():
    """From waveforms to encoder output, with trained statistics."""
    torch.manual_seed(3)
    cnn = ConvolutionFrontEnd((None, None, BINS), out_channels=(4, 4))
    normalize = InputNormalization(norm_type="global", update_until_epoch=4)
    normalize.glob_mean, normalize.glob_std = torch.full((BINS,), -20.0), torch.full((BINS,), 9.0)
    normalize.count = 1
    network = small_network("conmamba", input_size=BINS)
    return SpeechEncoder(Fbank(n_mels=BINS), normalize, cnn, network).eval()


@torch.no_grad()
def test_a_speech_encoder_is_that_of_the_cpu_alone_and_in_a_batch(device):
    num_samples_B = torch.tensor([16000, 9001, 5000])
    wav_BS = torch.randn(3, 17000)
    for wav_S, count in zip(wav_BS, num_samples_B.tolist(), strict=True):
        wav_S[count:] = 50.0
    out_BTD, num_frames_B = speech_encoder().to(device)(wav_BS.to(device), num_samples_B.to(device))
    encoder = speech_encoder()
    for row, count in enumerate(num_samples_B.tolist()):
        alone_1TD, frames_1 = encoder(wav_BS[row : row + 1, :count], torch.tensor([count]))
        assert int(num_frames_B[row]) == int(frames_1)
        assert_same_outputs([out_BTD[row, : int(frames_1)].cpu()], [alone_1TD[0]])


def test_a_speech_encoder_moves_as_a_whole():
    normalize = speech_encoder().to("meta").normalize
    assert normalize.glob_mean.device.type == normalize.glob_std.device.type == "meta"
