"""Adapters, quantised layers and hooks take effect wherever a network reads weights for speed."""

import copy

import pytest
import torch
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from speechbrain.nnet.linear import Linear
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from modules.Branchformer import ConvolutionBranch
from modules.convolution import ConvolutionModule, FeedForward
from modules.lengths import relative_lengths
from modules.lm import MambaLM, TransformerLM
from modules.mamba import Mamba
from modules.packed_linear import with_packed_linears
from tests.modules.networks import padded_batch, small_network
from tests.modules.replaced import (
    WAYS_TO_DOUBLE,
    Adapter,
    QuantisedLinear,
    doubled,
    merged,
    replace,
)

WIDTH = 12
DIRECTION = ["conv1d", "x_proj", "dt_proj"]
MIXER = ["in_proj", *DIRECTION, "out_proj"]
CHUNKS = DynChunkTrainConfig(4)


def mixer(bidirectional=False) -> Mamba:
    torch.manual_seed(0)
    return Mamba(WIDTH, d_state=4, bidirectional=bidirectional)


def pair(network: nn.Module, names: list[str]) -> tuple[nn.Module, nn.Module]:
    """``network`` with adapters around the layers ``names``, and the same with them merged."""
    for name in names:
        replace(network, name, Adapter)
    plain = copy.deepcopy(network)
    for name in names:
        replace(plain, name, merged)
    return network, plain


def assert_same(actual, wanted) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def assert_same_gradients(adapted: nn.Module, plain: nn.Module, names: list[str]) -> None:
    """The adapters' own parameters have the gradients of those that they were merged into."""
    for name in names:
        branch, whole = adapted.get_submodule(name).branch, plain.get_submodule(name)
        for (part, parameter), wanted in zip(
            branch.named_parameters(), whole.parameters(), strict=True
        ):
            assert parameter.grad.any(), f"{name}.{part}"
            error = (parameter.grad - wanted.grad).norm() / wanted.grad.norm()
            assert error < 1e-5, f"{name}.{part}: {error:.2e}"


MIXERS = [
    *((False, [part]) for part in MIXER),
    *((True, [part]) for part in [*MIXER, *(f"{part}_b" for part in DIRECTION)]),
    (False, MIXER),
    (True, [*MIXER, *(f"{part}_b" for part in DIRECTION)]),
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 6, 40])
@pytest.mark.parametrize(("bidirectional", "parts"), MIXERS, ids=str)
def test_a_mixer_with_adapters_equals_one_with_merged_weights(
    bidirectional, parts, chunk_size, padded
):
    adapted, plain = pair(mixer(bidirectional), parts)
    x_BTD, lengths = padded_batch([13, 1, 8, 0], WIDTH)
    if not padded:
        x_BTD, lengths = torch.randn_like(x_BTD), None
    past, more = torch.randn(4, 5, WIDTH), torch.randn(4, 13, WIDTH)
    continues = chunk_size is not None or not bidirectional
    found = []
    for network in (adapted, plain):
        x = x_BTD.clone().requires_grad_()
        y, state = network(x, lengths, chunk_size=chunk_size, return_state=True)
        results = [y, state.conv, state.ssm]
        if continues:
            # From the end of other frames, and on to frames of which some items have none.
            _, before = network(past, chunk_size=chunk_size, return_state=True)
            later, state = network(
                more, torch.tensor([0, 13, 2, 1]), before, chunk_size=chunk_size, return_state=True
            )
            results += [later, state.conv, state.ssm]
        sum(result.sin().sum() for result in results).backward()
        found.append([*results, x.grad])
    assert_same(*found)
    assert_same_gradients(adapted, plain, parts)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("parts", [*([part] for part in MIXER), MIXER], ids=str)
def test_steps_with_adapters_equal_steps_with_merged_weights(parts, gradients):
    adapted, plain = pair(mixer(), parts)
    state, plain_state = adapted.initial_state(3), plain.initial_state(3)
    adapted = with_packed_linears(adapted)
    with torch.set_grad_enabled(gradients):
        for _ in range(6):
            x_BD = torch.randn(3, WIDTH)
            y_BD, state = adapted.step(x_BD, state)
            wanted_BD, plain_state = plain.step(x_BD, plain_state)
            assert_same((y_BD, state.conv, state.ssm),
                        (wanted_BD, plain_state.conv, plain_state.ssm))  # fmt: skip


def test_a_mixer_with_adapters_takes_no_frames_and_no_items():
    adapted, _ = pair(mixer(True), ["conv1d", "conv1d_b"])
    assert adapted(torch.randn(2, 0, WIDTH)).shape == (2, 0, WIDTH)
    assert adapted(torch.randn(0, 5, WIDTH)).shape == (0, 5, WIDTH)


@pytest.mark.parametrize("parts", [["x_proj"], ["conv1d", "conv1d_b"]], ids=str)
def test_padding_that_is_not_a_number_changes_no_frame_behind_adapters(parts):
    adapted, _ = pair(mixer(True), parts)
    x_BTD, lengths = padded_batch([9, 4], WIDTH)
    wanted = adapted(x_BTD, lengths)
    x_BTD[1, 4:] = float("nan")
    x_BTD.requires_grad_()
    found = adapted(x_BTD, lengths)
    assert_same(found, wanted)
    found.square().sum().backward()
    assert x_BTD.grad.isfinite().all()


@pytest.mark.parametrize("parts", [["x_proj"], ["conv1d"]], ids=str)
def test_mistakes_are_named_behind_adapters(parts):
    adapted, _ = pair(mixer(), parts)
    x_BTD = torch.randn(2, 3, WIDTH)
    with pytest.raises(ValueError, match="one row per row of x"):
        adapted(x_BTD, state=adapted.initial_state(3))
    with pytest.raises(ValueError, match="lengths run from 1 to 4"):
        adapted(x_BTD, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="lengths has dtype"):
        adapted(x_BTD, torch.tensor([0.5, 1.0]))
    bidirectional, _ = pair(mixer(True), parts)
    with pytest.raises(ValueError, match="0; wanted a positive"):
        bidirectional(x_BTD, chunk_size=0)


def test_adapters_keep_the_scan_in_float32_under_autocast():
    adapted, plain = pair(mixer(True), ["x_proj", "conv1d_b", "dt_proj"])
    x_BTD = torch.randn(2, 30, WIDTH)
    exact = plain(x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, state = adapted(x_BTD, return_state=True)
    assert y_BTD.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert (y_BTD - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("way", WAYS_TO_DOUBLE)
@pytest.mark.parametrize("part", [*MIXER, *(f"{part}_b" for part in DIRECTION)])
@torch.no_grad()
def test_whatever_changes_a_part_of_a_mixer_takes_effect(part, way):
    network = mixer(bidirectional=True)
    plain = copy.deepcopy(network)
    replace(network, part, WAYS_TO_DOUBLE[way])
    replace(plain, part, doubled)
    x_BTD, lengths = padded_batch([9, 4], WIDTH)
    assert_same(network(x_BTD, lengths, chunk_size=4), plain(x_BTD, lengths, chunk_size=4))


@pytest.mark.parametrize("part", ["in_proj", "x_proj", "dt_proj", "out_proj"])
@torch.no_grad()
def test_a_mixer_goes_through_quantised_layers(part):
    network = mixer()
    plain = copy.deepcopy(network)
    replace(network, part, QuantisedLinear)
    layer, quantised = plain.get_submodule(part), network.get_submodule(part)
    layer.weight.copy_(quantised.weight * quantised.scale)
    x_BTD, lengths = padded_batch([9, 4], WIDTH)
    assert_same(network(x_BTD, lengths), plain(x_BTD, lengths))
    state = network.initial_state(2)
    assert_same(network.step(x_BTD[:, 0], state)[0], plain.step(x_BTD[:, 0], state)[0])


POINTWISE, DEPTHWISE = "bottleneck.0", "conv"


@pytest.mark.parametrize("parts", [[POINTWISE], [DEPTHWISE], [POINTWISE, DEPTHWISE]], ids=str)
@pytest.mark.parametrize(("causal", "chunks"), [(False, None), (False, CHUNKS), (True, None)])
def test_a_convolution_module_with_adapters_equals_one_with_merged_weights(parts, causal, chunks):
    module = ConvolutionModule(WIDTH, kernel_size=5, causal=causal)
    adapted, plain = pair(module, parts)
    x_BTD, _ = padded_batch([11, 3], WIDTH)
    mask_BT1 = (torch.arange(11) >= torch.tensor([[11], [3]])).unsqueeze(-1)
    found = []
    for network in (adapted, plain):
        outputs = [network(x_BTD, mask_BT1, chunks)]
        context = torch.zeros(2, network.padding, WIDTH)
        for chunk in x_BTD.split(4, dim=1):
            y, context = network.forward_streaming(chunk, context)
            outputs += [y, context]
        sum(y.sin().sum() for y in outputs).backward()
        found.append(outputs)
    assert_same(*found)
    assert_same_gradients(adapted, plain, parts)


CHANGEABLE = [
    *((ConvolutionModule(WIDTH, kernel_size=5), part) for part in (POINTWISE, DEPTHWISE)),
    *((FeedForward(24, input_size=WIDTH), part) for part in ("ffn.0", "ffn.3")),
    *(
        (
            ConvolutionBranch(
                input_size=WIDTH,
                linear_units=8,
                kernel_size=5,
                activation=nn.GELU,
                gate_activation=nn.Identity,
                dropout=0.0,
                use_linear_after_conv=False,
            ),
            part,
        )
        for part in ("pre_channel_proj", "csgu.conv.conv", "post_channel_proj")
    ),
]


@pytest.mark.parametrize("way", WAYS_TO_DOUBLE)
@pytest.mark.parametrize(
    ("module", "part"), CHANGEABLE, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
@torch.no_grad()
def test_whatever_changes_a_part_of_a_module_takes_effect(module, part, way):
    module = copy.deepcopy(module)
    if part == "csgu.conv.conv":
        # Of the size of 1e-6 at first.
        nn.init.normal_(module.get_submodule(part).weight)
    plain = copy.deepcopy(module)
    replace(module, part, WAYS_TO_DOUBLE[way])
    replace(plain, part, doubled)
    x_BTD = torch.randn(2, 9, WIDTH)
    assert_same(module(x_BTD), plain(x_BTD))
    if isinstance(module, FeedForward):
        assert_same(module.step(x_BTD[:, 0]), plain.step(x_BTD[:, 0]))


@pytest.mark.parametrize("way", WAYS_TO_DOUBLE)
@pytest.mark.parametrize("part", ["", "w"])
@torch.no_grad()
def test_whatever_changes_an_output_layer_takes_effect_in_a_search(part, way):
    holder = nn.ModuleDict({"layer": Linear(input_size=WIDTH, n_neurons=7)})
    plain = copy.deepcopy(holder)
    name = f"layer.{part}".rstrip(".")
    if part == "" and way in ("parametrization", "special weight"):
        pytest.skip("the weight is that of the inner layer")
    replace(holder, name, WAYS_TO_DOUBLE[way])
    replace(plain, name, doubled)
    x_BD = torch.randn(3, WIDTH)
    assert_same(with_packed_linears(holder["layer"])(x_BD), plain["layer"](x_BD))


def with_lora(network: nn.Module) -> tuple[AdaptedModel, nn.Module]:
    """SpeechBrain's adapters in every linear layer and pointwise convolution; the same, merged."""
    adapted = AdaptedModel(
        network,
        LoRA,
        all_linear=True,
        target_layers=["*bottleneck.0"],
        adapter_kwargs={"rank": 2},
    )
    assert adapted.replace_layers
    for name in adapted.replace_layers:
        nn.init.normal_(network.get_submodule(name).adapter_up_proj.weight, std=0.1)
    plain = copy.deepcopy(network)
    for name in adapted.replace_layers:
        replace(plain, name, merged_lora)
    return adapted, plain


@torch.no_grad()
def merged_lora(lora: LoRA) -> nn.Module:
    layer, up, down = lora.pretrained_module, lora.adapter_up_proj, lora.adapter_down_proj
    product = up.weight.flatten(1) @ down.weight.flatten(1)
    layer.weight.add_(lora.scaling * product.view_as(layer.weight))
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "encoder", ["transformer", "conformer", "branchformer", "conmamba", "mamba"]
)
def test_an_encoder_with_adapters_equals_one_with_merged_weights(encoder, causal):
    if causal and encoder == "branchformer":
        pytest.skip("a Branchformer is never causal")
    adapted, plain = with_lora(small_network(encoder, causal=causal))
    src, lengths_B = padded_batch([9, 4])
    wav_len = relative_lengths(lengths_B, 9)
    out_BTD = adapted.encode(src, wav_len)
    for out, wanted, length in zip(out_BTD, plain.encode(src, wav_len), [9, 4], strict=True):
        assert_same(out[:length], wanted[:length])
    out_BTD[0].sin().sum().backward()
    for name in adapted.replace_layers:
        up = adapted.adapted_model.get_submodule(name).adapter_up_proj
        assert up.weight.grad.any(), name
    if encoder in ("conmamba", "mamba"):
        chunks = None if causal else CHUNKS
        streams = []
        for network in (adapted, plain):
            context = network.make_streaming_context(chunks)
            with torch.no_grad():
                pieces = [network.encode_streaming(x, context) for x in src.split(4, dim=1)]
            streams.append(torch.cat(pieces, dim=1))
        assert_same(*streams)


@pytest.mark.parametrize("decoder", ["transformer", "mamba"])
@torch.no_grad()
def test_a_decoder_with_adapters_equals_one_with_merged_weights(decoder):
    adapted, plain = with_lora(small_network(decoder_module=decoder, num_decoder_layers=2))
    src, lengths_B = padded_batch([9, 4])
    tokens = torch.randint(1, 11, (2, 6))
    wanted = plain(src, tokens, relative_lengths(lengths_B, 9))[1]
    assert_same(adapted(src, tokens, relative_lengths(lengths_B, 9))[1], wanted)
    state, outputs = adapted.init_decoder_state(plain.encode(src, lengths_B / 9), lengths_B), []
    adapted = with_packed_linears(adapted)
    for tokens_B in tokens.unbind(1):
        out_BD, state = adapted.decode_step(tokens_B, state)
        outputs.append(out_BD)
    assert_same(torch.stack(outputs, 1), wanted)


class TwiceAttending(nn.Module):
    """An attention around another one."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, *arguments, **options):
        attended, weights = self.base(*arguments, **options)
        return 2 * attended, weights


def doubled_by_hook(attention: nn.Module) -> nn.Module:
    attention.register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], outputs[1]))
    return attention


@torch.no_grad()
def doubled_output(attention: nn.Module) -> nn.Module:
    """SpeechBrain's or torch's attention with twice the weights of its last projection."""
    doubled(getattr(attention, "att", attention).out_proj)
    return attention


ATTENTION_CHANGES = {"wrapper": TwiceAttending, "hook": doubled_by_hook}


@pytest.mark.parametrize("change", ATTENTION_CHANGES)
@pytest.mark.parametrize(
    "part", ["self_attn", "self_attn.att", "multihead_attn", "multihead_attn.att"]
)
@torch.no_grad()
def test_whatever_changes_an_attention_takes_effect_in_cached_decoding(part, change):
    network = small_network(decoder_module="transformer", num_decoder_layers=2)
    plain = copy.deepcopy(network)
    for depth in (0, 1):
        replace(network, f"decoder.layers.{depth}.{part}", ATTENTION_CHANGES[change])
        replace(plain, f"decoder.layers.{depth}.{part}", doubled_output)
    memory_BTD, lengths_B = padded_batch([9, 4], 16)
    state, plain_state = (n.init_decoder_state(memory_BTD, lengths_B) for n in (network, plain))
    for tokens_B in torch.randint(1, 11, (5, 4)):
        # Two beams of either utterance, which change places.
        state, plain_state = (
            s.repeat(2) if s.num_tokens == 0 else s.select(torch.tensor([1, 0, 2, 2]))
            for s in (state, plain_state)
        )
        out_BD, state = network.decode_step(tokens_B, state)
        wanted_BD, plain_state = plain.decode_step(tokens_B, plain_state)
        assert_same(out_BD, wanted_BD)
        assert_same(state.layers.attention_BT, plain_state.layers.attention_BT)


@pytest.mark.parametrize("change", ATTENTION_CHANGES)
@pytest.mark.parametrize("part", ["self_att", "self_att.att"])
@torch.no_grad()
def test_whatever_changes_an_attention_takes_effect_in_a_language_model(part, change):
    torch.manual_seed(0)
    lm = TransformerLM(11, d_model=16, nhead=2, num_encoder_layers=2, d_ffn=32, dropout=0.0).eval()
    plain = copy.deepcopy(lm)
    for depth in (0, 1):
        replace(lm, f"encoder.layers.{depth}.{part}", ATTENTION_CHANGES[change])
        replace(plain, f"encoder.layers.{depth}.{part}", doubled_output)
    # 0 is padding, to which no later token attends.
    tokens_BU = torch.tensor([[1, 5, 0, 7, 3], [1, 4, 4, 0, 9]])
    state, logits = lm.initial_state(2), []
    for tokens_B in tokens_BU.unbind(1):
        logits_BV, state = lm.step(tokens_B, state)
        logits.append(logits_BV)
    assert_same(torch.stack(logits, 1), plain(tokens_BU))


@torch.no_grad()
def test_language_models_with_adapters_equal_those_with_merged_weights():
    torch.manual_seed(0)
    transformer = TransformerLM(
        11, d_model=16, nhead=2, num_encoder_layers=2, d_ffn=32, d_embedding=8
    )
    for lm in (transformer, MambaLM(11, d_model=16, num_layers=2, mamba_config={"d_state": 4})):
        adapted, plain = with_lora(lm.eval())
        tokens_BU = torch.randint(1, 11, (2, 6))
        state, logits = adapted.initial_state(2), []
        adapted = with_packed_linears(adapted)
        for tokens_B in tokens_BU.unbind(1):
            logits_BV, state = adapted.step(tokens_B, state)
            logits.append(logits_BV)
        assert_same(torch.stack(logits, 1), plain(tokens_BU))
