"""The streaming context that the Mamba and ConMamba encoders share."""

from dataclasses import dataclass
from typing import Any

from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig


@dataclass
class MambaStreamingContext:
    """State of a stream, constant in size. The encoder replaces the layers' states as it goes.

    Args:
        dynchunktrain_config: chunks of a bidirectional encoder; ``None`` for a causal one.
        layers: one state per layer.
    """

    dynchunktrain_config: DynChunkTrainConfig | None
    layers: list[Any]


def make_streaming_context(
    dynchunktrain_config: DynChunkTrainConfig | None, causal: bool, layers: list[Any]
) -> MambaStreamingContext:
    """Starts a stream over ``layers``, the blank states of an encoder.

    Raises:
        ValueError: chunks are missing for an encoder that looks ahead, or given to a causal one.
    """
    if causal and dynchunktrain_config is not None:
        raise ValueError("A causal encoder streams in any cutting and takes no chunks; give None.")
    if not causal and dynchunktrain_config is None:
        raise ValueError(
            "An encoder that is not causal streams in chunks; give a DynChunkTrainConfig, or build "
            "the network with causal=True."
        )
    return MambaStreamingContext(dynchunktrain_config, layers)
