import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd as SpeechBrainFrontEnd
from torch import nn

from modules.frontend import Conv2d, ConvolutionFrontEnd, reflect_frequency

BINS = 12


def front_end(**options) -> ConvolutionFrontEnd:
    torch.manual_seed(3)
    return ConvolutionFrontEnd((1, 10, BINS), out_channels=(6, 4), dropout=0.0, **options).eval()


def test_unpadded_output_is_speechbrains_with_the_same_weights():
    theirs = SpeechBrainFrontEnd(
        (1, 10, BINS),
        num_blocks=2,
        num_layers_per_block=2,
        out_channels=[6, 4],
        kernel_sizes=[3, 5],
        strides=[2, 2],
        residuals=[True, False],
    ).eval()
    ours = front_end(num_layers_per_block=2, kernel_sizes=(3, 5), residuals=(True, False))
    ours.load_state_dict(theirs.state_dict())
    feats_BTM = torch.randn(2, 21, BINS)
    wanted = theirs(feats_BTM)
    torch.testing.assert_close(ours(feats_BTM), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours(feats_BTM, torch.tensor([21, 21])), wanted, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("filling", [1e3, float("nan")])
def test_an_item_in_a_batch_equals_the_item_alone(padding, filling):
    net = front_end(padding=padding)
    lengths = [23, 16, 9, 2, 1]
    feats_BTM = torch.randn(5, 23, BINS)
    single, single_gradients = [], None
    for row, length in zip(feats_BTM, lengths, strict=True):
        single.append(net(row[None, :length])[0])
        single[-1].square().sum().backward()
        row[length:] = filling
    single_gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    out_BTFC = net(feats_BTM, torch.tensor(lengths))
    out_BTFC.square().sum().backward()
    for out, wanted in zip(out_BTFC, single, strict=True):
        torch.testing.assert_close(out[: len(wanted)], wanted, atol=1e-5, rtol=1e-4)
        assert not out[len(wanted) :].any()
    for parameter, wanted in zip(net.parameters(), single_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-3, rtol=1e-4)


def test_a_causal_output_frame_has_no_gradient_to_later_frames():
    net = front_end(padding="causal")
    feats_BTM = torch.randn(1, 24, BINS, requires_grad=True)
    frame = 3
    # The last input of a frame: the centre of both strides.
    last_input = 4 * frame
    net(feats_BTM)[:, : frame + 1].square().sum().backward()
    assert not feats_BTM.grad[:, last_input + 1 :].any()
    assert feats_BTM.grad[:, last_input].any()


@pytest.mark.parametrize(
    ("kernel", "strides"), [(3, (2, 2)), (5, (2, 1)), (1, (1, 3)), (3, (3, 2))]
)
@settings(max_examples=10, deadline=None)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_causal_one_streams_in_any_cutting_of_its_output(kernel, strides, pieces):
    net = front_end(padding="causal", kernel_sizes=(kernel, kernel), strides=strides)
    stride = net.stride_frames
    feats_BTM = torch.randn(2, (sum(pieces) - 1) * stride + 1, BINS)
    # What stands before the stream is not read.
    early = torch.full((2, stride - 1, BINS), 1e3)
    state, outputs = net.initial_state(2, BINS), []
    sizes = [kept.shape for kept in state]
    for piece in torch.cat([early, feats_BTM], 1).split([n * stride for n in pieces], dim=1):
        is_first_B = torch.tensor([not outputs, not outputs])
        out, state = net.forward_streaming(piece, state, is_first_B)
        outputs.append(out)
        assert [kept.shape for kept in state] == sizes
    torch.testing.assert_close(torch.cat(outputs, 1), net(feats_BTM), atol=1e-5, rtol=1e-4)


def test_many_streams_give_what_each_gives():
    net = front_end(padding="causal")
    feats_BTM, state = torch.randn(19, 12, BINS), net.initial_state(19, BINS)
    is_first_B, counts_B = torch.arange(19) % 2 == 0, torch.arange(19) % 4
    state = [torch.randn_like(kept) for kept in state]
    out, after = net.forward_streaming(feats_BTM, state, is_first_B, counts_B)
    for i in range(19):
        row = slice(i, i + 1)
        wanted, kept_alone = net.forward_streaming(
            feats_BTM[row], [kept[row] for kept in state], is_first_B[row], counts_B[row]
        )
        torch.testing.assert_close(out[row], wanted, atol=1e-6, rtol=1e-5)
        for kept, alone in zip(after, kept_alone, strict=True):
            torch.testing.assert_close(kept[row], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", ["same", "causal"])
@settings(max_examples=20, deadline=None)
@given(frames=st.integers(1, 60), piece_frames=st.integers(1, 30))
def test_in_pieces_it_gives_the_whole(padding, frames, piece_frames):
    net = front_end(padding=padding)
    feats_BTM = torch.randn(2, frames, BINS)
    pieces = list(net.forward_in_pieces(feats_BTM, piece_frames))
    torch.testing.assert_close(torch.cat(pieces, 1), net(feats_BTM), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize(
    ("kernel", "strides"), [(3, (2, 2)), (3, (2, 2, 2)), (5, (2, 1)), (3, (3,))]
)
def test_it_tells_how_many_frames_come_out(kernel, strides, padding):
    blocks = len(strides)
    net = ConvolutionFrontEnd(
        (1, 10, BINS),
        num_blocks=blocks,
        out_channels=(4,) * blocks,
        kernel_sizes=(kernel,) * blocks,
        strides=strides,
        residuals=(False,) * blocks,
        padding=padding,
    )
    counts = torch.arange(kernel, 30)
    for frames, out_frames in zip(counts.tolist(), net.out_frames(counts).tolist(), strict=True):
        assert net(torch.zeros(1, frames, BINS)).shape[1] == out_frames == net.out_frames(frames)
        assert strides != (2, 2) or out_frames == (frames + 3) // 4


def test_defaults_are_the_published_front_end():
    out_BTFC = ConvolutionFrontEnd((8, 10, 80))(torch.randn(1, 101, 80))
    assert out_BTFC.shape == (1, 26, 20, 32)


def test_a_replaced_convolution_is_called():
    class Doubled(nn.Module):
        """Another layer in the place of a convolution."""

        def __init__(self, conv):
            super().__init__()
            self.inner = conv

        def forward(self, x_BCFT):
            return 2 * self.inner(x_BCFT)

    torch.manual_seed(1)
    net = ConvolutionFrontEnd((8, 10, 20), out_channels=(4, 6)).eval()
    feats_BTM, frames_B = torch.randn(2, 31, 20), torch.tensor([31, 17])
    expected = net(feats_BTM, frames_B)
    convolutions = [m for m in net.modules() if isinstance(m, Conv2d)]
    for layer in convolutions:
        with torch.no_grad():
            layer.conv.weight /= 2
            layer.conv.bias /= 2
        layer.conv = Doubled(layer.conv)
    torch.testing.assert_close(net(feats_BTM, frames_B), expected, rtol=0, atol=1e-5)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="same, causal"):
        front_end(padding="valid")
    with pytest.raises(ValueError, match="strides has 2 values for num_blocks=3"):
        ConvolutionFrontEnd(
            (1, 10, BINS),
            num_blocks=3,
            out_channels=(4, 4, 4),
            kernel_sizes=(3, 3, 3),
            residuals=(False, False, False),
        )
    with pytest.raises(ValueError, match="residuals=False"):
        front_end(residuals=(True, False), padding="causal").check_streaming()
    with pytest.raises(ValueError, match="padding='causal'"):
        front_end().initial_state(1, BINS)


@pytest.mark.parametrize("amount", [1, 2, 4])
def test_mirrored_bins_are_those_of_torch_gradients_included(amount):
    torch.manual_seed(0)
    x_BTFC = torch.randn(2, 3, 6, 5, requires_grad=True)
    ours = reflect_frequency(x_BTFC, amount)
    theirs = F.pad(x_BTFC.permute(0, 3, 1, 2), (amount, amount, 0, 0), mode="reflect")
    assert torch.equal(ours, theirs.permute(0, 2, 3, 1))
    grad_y = torch.randn_like(ours)
    gradients = [
        torch.autograd.grad(y, x_BTFC, grad_y)[0] for y in (ours, theirs.permute(0, 2, 3, 1))
    ]
    torch.testing.assert_close(*gradients)
