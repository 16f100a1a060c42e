"""SpeechBrain's Branchformer encoder, made independent of what pads a batch."""

from typing import Any

import torch
from speechbrain.lobes.models.convolution import (
    ConvolutionalSpatialGatingUnit as SpeechBrainGatingUnit,
)
from speechbrain.lobes.models.transformer.Branchformer import (
    BranchformerEncoderLayer as SpeechBrainBranchformerEncoderLayer,
)
from speechbrain.lobes.models.transformer.Branchformer import (
    ConvolutionBranch as SpeechBrainConvolutionBranch,
)
from torch import Tensor, nn

from modules.convolution import depthwise
from modules.layer_stack import LayerStack, Surroundings
from modules.plain_layers import is_plain, runs_its_class


class ConvolutionalSpatialGatingUnit(SpeechBrainGatingUnit):
    """SpeechBrain's gating unit whose convolution reflects at each item's own end."""

    def forward(self, x: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Gates the first half of the channels of ``x`` (batch, time, channels) with the second."""
        x1, x2 = x.chunk(2, dim=-1)
        reach = self.conv.kernel_size // 2
        x2 = _reflected(self.norm(x2), lengths_B, reach)
        if is_plain(self.conv.conv) and runs_its_class(self.conv):
            x2 = depthwise(x2, self.conv.conv.weight, self.conv.conv.bias)
        else:
            # It reflects what is reflected already.
            x2 = self.conv(x2)[:, reach : x2.shape[1] - reach]
        if self.use_linear_after_conv:
            x2 = self.linear(x2)
        return self.dropout(self.activation(x2) * x1)


def _reflected(x_BTD: Tensor, lengths_B: Tensor | None, padding: int) -> Tensor:
    """Frames with ``padding`` reflected ones at both ends, as often as a short item needs."""
    frames = x_BTD.shape[1]
    if lengths_B is None:
        lengths_B = x_BTD.new_full((len(x_BTD),), frames, dtype=torch.long)
    last_B1 = (lengths_B - 1).clamp(min=0)[:, None]
    period_B1 = (2 * last_B1).clamp(min=1)
    places_L = torch.arange(-padding, frames + padding, device=x_BTD.device).abs()
    index_BL = places_L % period_B1
    index_BL = torch.minimum(index_BL, 2 * last_B1 - index_BL).clamp(min=0)
    return x_BTD.gather(1, index_BL.unsqueeze(-1).expand(-1, -1, x_BTD.shape[2]))


class ConvolutionBranch(SpeechBrainConvolutionBranch):
    """SpeechBrain's convolution branch around our gating unit; arguments as there."""

    def __init__(
        self,
        input_size: int,
        linear_units: int,
        activation: type[nn.Module],
        gate_activation: type[nn.Module],
        **gate_options: Any,
    ):
        super().__init__(
            input_size=input_size,
            linear_units=linear_units,
            activation=activation,
            gate_activation=gate_activation,
            **gate_options,
        )
        self.csgu = ConvolutionalSpatialGatingUnit(
            input_size=linear_units, activation=gate_activation, **gate_options
        )

    def forward(self, x: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Applies the branch to ``x`` (batch, time, d_model)."""
        gated = self.csgu(self.activation(self.pre_channel_proj(x)), lengths_B)
        return self.post_channel_proj(gated)


class BranchformerEncoderLayer(SpeechBrainBranchformerEncoderLayer):
    """SpeechBrain's Branchformer layer around our convolution branch; arguments as there.

    Raises:
        ValueError: it is to be causal, which its convolution is not, or to use an attention that
            SpeechBrain's Branchformer does not have.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        kernel_size: int = 31,
        activation: type[nn.Module] = nn.GELU,
        dropout: float = 0.0,
        attention_type: str = "RelPosMHAXL",
        csgu_linear_units: int = 3072,
        gate_activation: type[nn.Module] = nn.Identity,
        use_linear_after_conv: bool = False,
        causal: bool = False,
    ):
        if causal:
            raise ValueError("A Branchformer sees later frames; set causal: False.")
        if attention_type == "RoPEMHA":
            raise ValueError(
                "A Branchformer has no RoPEMHA; take regularMHA, RelPosMHAXL or hypermixing."
            )
        branch_options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "activation": activation,
            "dropout": dropout,
            "gate_activation": gate_activation,
            "use_linear_after_conv": use_linear_after_conv,
        }
        super().__init__(
            d_model=d_model,
            nhead=nhead,
            attention_type=attention_type,
            csgu_linear_units=csgu_linear_units,
            **branch_options,
        )
        self.convolution_branch = ConvolutionBranch(
            input_size=d_model, linear_units=csgu_linear_units, **branch_options
        )

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """Applies the layer to ``x`` (batch, time, d_model)."""
        query = self.norm_mhsa(x)
        attended, _ = self.mha_layer(
            query,
            query,
            query,
            key_padding_mask=surroundings.padding_BT,
            pos_embs=surroundings.pos_embs,
        )
        convolved = self.convolution_branch(self.norm_conv(x), surroundings.lengths_B)
        branches = torch.cat([self.dropout(attended), self.dropout(convolved)], dim=-1)
        return x + self.dropout(self.merge_proj(branches))


class BranchformerEncoder(LayerStack):
    """SpeechBrain's Branchformer encoder over ``BranchformerEncoderLayer``; parameters as there.

    Paper: arXiv:2207.02971.
    """

    layer_class = BranchformerEncoderLayer
    takes_chunks = False
