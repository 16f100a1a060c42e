"""A ConMamba layer over one chunk of streams, in one call of compiled code."""

from ops.conmamba_layer.cpu import FeedForward, Layer, Linear, Norm, fits

__all__ = ["FeedForward", "Layer", "Linear", "Norm", "fits"]
