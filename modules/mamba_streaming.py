"""How the Mamba and ConMamba encoders stream: in any cutting, or in chunks if they look ahead."""

from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from modules.layer_stack import LayerStack, StreamingContext


class MambaLayerStack(LayerStack):
    """An encoder whose layers keep the past in a state, None before the first frame."""

    def make_streaming_context(
        self, dynchunktrain_config: DynChunkTrainConfig | None
    ) -> StreamingContext:
        """Starts a stream; chunks are needed exactly where the encoder is not causal.

        Raises:
            ValueError: chunks are missing, or given to a causal encoder.
        """
        if self.causal and dynchunktrain_config is not None:
            raise ValueError(
                "A causal encoder streams in any cutting and takes no chunks; give None."
            )
        if not self.causal and dynchunktrain_config is None:
            raise ValueError(
                "An encoder that is not causal streams in chunks; give a DynChunkTrainConfig, or "
                "build the network with causal=True."
            )
        return StreamingContext(dynchunktrain_config, [None] * len(self.layers))
