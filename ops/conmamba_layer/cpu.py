"""Hands a layer's weights and its streams to layer.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ops import build, packed_linear
from ops.mamba_inner import Direction, chunk_cpu
from ops.mamba_inner.arguments import check_directions
from ops.mamba_inner.chunk_cpu import MAX_FRAMES
from ops.native import address, are_float32_on_cpu

_kernel = build.Kernel(Path(__file__).with_name("layer.cpp"))


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A linear layer."""

    weight: Tensor
    bias: Tensor | None


class FeedForward(NamedTuple):
    """LayerNorm, linear layer, activation, linear layer."""

    norm: Norm
    inner: Linear
    outer: Linear


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("eps", ctypes.c_double),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("outputs", ctypes.c_int64),
    ]


class _FeedForward(ctypes.Structure):
    _fields_ = [("norm", _Norm), ("inner", _Linear), ("outer", _Linear)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("width", "kernel", "left", "swish")),
        ("ffn1", _FeedForward),
        ("ffn2", _FeedForward),
        ("mixer_norm", _Norm),
        ("in_proj", _Linear),
        ("out_proj", _Linear),
        ("conv_norm", _Norm),
        ("pointwise", _Linear),
        *((name, ctypes.c_void_p) for name in ("depthwise", "depthwise_bias")),
        ("after_norm", _Norm),
        ("after", _Linear),
        ("last_norm", _Norm),
    ]


class _Streams(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("x", "seen", "next_seen")),
        ("mixer", chunk_cpu.Chunk),
    ]


def fits(*weights: Tensor) -> bool:
    """Whether a `Layer` can be made of these weights here: compiled, in float32 on the CPU."""
    return (
        are_float32_on_cpu(*weights)
        and chunk_cpu.prepare() is None
        and packed_linear.prepare() is None
        and _kernel.prepare() is None
    )


class Layer:
    """A layer with its weights arranged; for as long as these do not change.

    Args:
        ffn1, ffn2: the feed-forward modules, each added by half.
        mixer_norm: before the mixer.
        in_proj, out_proj: of the mixer.
        directions: of the mixer, one or two.
        conv_norm, pointwise: of the convolution module, before its gate.
        depthwise: (D, kernel) and its bias.
        left: frames before its own that the depthwise convolution sees; what its taps would see
            behind the chunk is zero.
        after_norm, after: of the convolution module, around its activation.
        last_norm: closes the layer.
        swish: whether activations are SiLU; else they are GELU.
    """

    def __init__(
        self,
        *,
        ffn1: FeedForward,
        ffn2: FeedForward,
        mixer_norm: Norm,
        in_proj: Linear,
        out_proj: Linear,
        directions: tuple[Direction, ...],
        conv_norm: Norm,
        pointwise: Linear,
        depthwise: Linear,
        left: int,
        after_norm: Norm,
        after: Linear,
        last_norm: Norm,
        swish: bool,
    ):
        # Whatever the structures point at.
        self._kept: list[Tensor] = []
        taps_KD = depthwise.weight.detach().t().contiguous()
        self._keep(taps_KD)
        kernel, width = taps_KD.shape
        self._layer = _Layer(
            width,
            kernel,
            left,
            swish,
            self._feed_forward(ffn1),
            self._feed_forward(ffn2),
            self._norm(mixer_norm),
            self._linear(in_proj),
            self._linear(out_proj),
            self._norm(conv_norm),
            self._linear(pointwise),
            address(taps_KD),
            address(self._keep(depthwise.bias)),
            self._norm(after_norm),
            self._linear(after),
            self._norm(last_norm),
        )
        self._directions = chunk_cpu.Directions(directions)
        inner, state, taps = check_directions(directions)
        self._state_shapes = (inner, taps - 1), (inner, state), (left, width)

    def takes(self, x_BTD: Tensor, *states: Tensor) -> bool:
        """Whether a call fits: few frames, their states, float32 on the CPU, without gradients.

        Args:
            x_BTD: as in a call.
            states: those of a call, in its order.
        """
        batch, frames, width = x_BTD.shape
        return (
            batch > 0
            and 0 < frames <= MAX_FRAMES
            and width == self._layer.width
            and all(
                x.shape == (batch, *shape)
                for x, shape in zip(states, self._state_shapes, strict=True)
            )
            and chunk_cpu.fits(x_BTD, *states)
        )

    def __call__(
        self,
        x_BTD: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        seen_BLD: Tensor,
        ahead: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and the next states of the mixer's convolution, its scan and the module.

        These are the states before the last ``ahead`` frames, fewer than all.
        """
        y_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
        conv_state, ssm_state, seen_BLD = (
            state.contiguous() for state in (conv_state, ssm_state, seen_BLD)
        )
        next_conv, next_ssm, next_seen_BLD = map(
            torch.empty_like, (conv_state, ssm_state, seen_BLD)
        )
        batch, frames, _ = x_BTD.shape
        streams = _Streams(
            ctypes.pointer(self._layer),
            y_BTD.data_ptr(),
            seen_BLD.data_ptr(),
            next_seen_BLD.data_ptr(),
            self._directions.chunk(
                batch, frames, conv_state, ssm_state, next_conv, next_ssm, ahead=ahead
            ),
        )
        _kernel.load().conmamba_layer(ctypes.byref(streams))
        return y_BTD, next_conv, next_ssm, next_seen_BLD

    def _keep(self, x: Tensor | None) -> Tensor | None:
        if x is not None:
            x = x.detach().contiguous()
            self._kept.append(x)
        return x

    def _norm(self, norm: Norm) -> _Norm:
        return _Norm(address(self._keep(norm.weight)), address(self._keep(norm.bias)), norm.eps)

    def _linear(self, linear: Linear) -> _Linear:
        packed = self._keep(packed_linear.pack(linear.weight.detach().contiguous()))
        return _Linear(address(packed), address(self._keep(linear.bias)), len(linear.weight))

    def _feed_forward(self, ffn: FeedForward) -> _FeedForward:
        return _FeedForward(self._norm(ffn.norm), self._linear(ffn.inner), self._linear(ffn.outer))
