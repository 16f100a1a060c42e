"""The recogniser's network: an encoder and, for joint CTC/attention, a decoder, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.lobes.models.transformer.Transformer import NormalizedEmbedding
from speechbrain.lobes.models.transformer.TransformerASR import (
    TransformerASR as SpeechBrainTransformerASR,
)
from speechbrain.lobes.models.transformer.TransformerASR import (
    TransformerASRStreamingContext as SpeechBrainStreamingContext,
)
from speechbrain.lobes.models.transformer.TransformerASR import make_transformer_src_mask
from speechbrain.nnet.containers import ModuleList
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.dropout import replace_dropout
from modules.initialisation import initialise
from modules.layer_stack import Surroundings
from modules.lengths import absolute_lengths, padding_mask
from modules.mamba_decoder import MambaDecoderState
from modules.positions import SignedRelPosEncXL
from modules.stream_state import StreamState, stream_state
from modules.Transformer import DECODERS, ENCODERS, build, build_encoder, lookup
from modules.transformer_decoder import TransformerDecoderState

ATTENTION_TYPES = ("regularMHA", "RelPosMHAXL", "hypermixing", "RoPEMHA")
POSITIONAL_ENCODINGS = ("fixed_abs_sine", None)
ATTENTION_ENCODERS = ("branchformer", "conformer", "transformer")


@stream_state
class EncoderState(StreamState):
    """State of an encoder's streams.

    Args:
        num_frames_B: frames of each stream so far.
        layers: one state per layer.
    """

    num_frames_B: Tensor
    layers: tuple[StreamState, ...]


@dataclass
class TransformerASRStreamingContext(SpeechBrainStreamingContext):
    """What ``encode_streaming`` moves on: streams that are cut alike, as SpeechBrain has them.

    Args:
        pending_BTF: frames that do not fill a chunk yet.
        finished: whether the last frames have come.
    """

    encoder_context: EncoderState | None
    pending_BTF: Tensor | None = None
    finished: bool = False


@dataclass(frozen=True)
class DecoderState:
    """State of token-by-token decoding, one row per hypothesis; never modified in place.

    Args:
        num_tokens: tokens so far, the same for every row.
        layers: state of the decoder.
    """

    num_tokens: int
    layers: MambaDecoderState | TransformerDecoderState

    def select(self, index: Tensor) -> DecoderState:
        """The state of the hypotheses ``index`` (integers), in that order."""
        return DecoderState(self.num_tokens, self.layers.select(index))

    def repeat(self, n: int) -> DecoderState:
        """Every hypothesis ``n`` times in a row: the beams of an utterance side by side."""
        return DecoderState(self.num_tokens, self.layers.repeat(n))


class TransformerASR(SpeechBrainTransformerASR):
    """SpeechBrain's TransformerASR with the state-space encoders and decoder beside its own.

    What an utterance gives alone, it gives in any batch.

    Some options are shared, so that ``encoder_module`` and ``decoder_module`` can be changed and
    nothing else: nhead, d_ffn, activation, normalize_before, mamba_config, attention_type and those
    of positions have no effect on an encoder or a decoder that has no use for them. The options
    that are None by default belong to the encoders named with them and are an error for others.

    Args:
        tgt_vocab: size of the vocabulary.
        input_size: features per frame of ``src``.
        d_model: width of the network.
        nhead: attention heads.
        num_encoder_layers: layers of the encoder, at least 1.
        num_decoder_layers: layers of the decoder; 0 for CTC alone.
        d_ffn: inner width of the feed-forward layers.
        dropout: dropout probability.
        activation: of feed-forward layers, those of Conformer and ConMamba excepted.
        positional_encoding: "fixed_abs_sine" or None.
        normalize_before: LayerNorm before (True) or after attention and feed-forward; Conformer
            wants True, Mamba layers always have it before.
        kernel_size: taps of the convolution in Conformer, ConMamba and Branchformer; None is 31.
            Other encoders have none.
        bias: whether the convolution module of Conformer and ConMamba has biases; None is True.
        encoder_module: name in ``modules.Transformer.ENCODERS``.
        decoder_module: name in ``modules.Transformer.DECODERS``.
        mamba_config: options of the mixers (d_state, expand, d_conv, bidirectional, ...), not
            modified. Decoders always run forward only.
        conformer_activation: of feed-forward and convolution modules in Conformer; None is Swish.
        conmamba_activation: the same in ConMamba; None is GELU.
        branchformer_activation: of the convolution branch in Branchformer; None is GELU.
        attention_type: regularMHA, RelPosMHAXL, hypermixing or RoPEMHA. With RelPosMHAXL the
            positions are the attention's business, and ConMamba gets none.
        max_length: frames and tokens that absolute positions reach.
        causal: no encoder frame sees a later one. The decoder is always causal.
        csgu_linear_units: inner width of Branchformer's convolution branch; None is 3072.
        gate_activation: of the gate in Branchformer's convolution branch; None is the identity.
        use_linear_after_conv: a linear layer behind the convolution of that gate; None is False.
        output_hidden_states: ``encode`` returns the outputs of all layers beside its result.
        layerdrop_prob: probability with which training leaves an encoder layer out.
        gradient_checkpointing: recompute encoder layers in the backward: same gradients, less
            memory, more time.
        init: how weights are drawn, a name in ``modules.initialisation.INITS``: "xavier" for the
            published models, "near_identity" leaves CTC's plateau of blanks sooner.
        inter_ctc_layers: encoder layers, counted from 1, that a recipe trains with CTC, too. Here
            they only say where ``self_conditioning`` is.
        self_conditioning: the layers above are told the output probabilities of these, see
            ``modules.self_conditioning``.
        signed_positions: relative positions tell before from after, see ``modules.positions``; of
            attention with RelPosMHAXL. Published models do without.
        causal_convolution: in the convolution of Conformer and ConMamba no frame sees a later one,
            so that the end of a chunk changes nothing in it.

    Raises:
        ValueError: an unknown name, options that contradict each other, or one that the encoder
            does not take.
    """

    # Of many classes, SpeechBrain's among them.
    encoder: Any
    decoder: Any

    def __init__(
        self,
        tgt_vocab: int,
        input_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        d_ffn: int = 2048,
        dropout: float = 0.1,
        activation: type[nn.Module] = nn.ReLU,
        positional_encoding: str | None = "fixed_abs_sine",
        normalize_before: bool = False,
        kernel_size: int | None = None,
        bias: bool | None = None,
        encoder_module: str = "transformer",
        decoder_module: str = "transformer",
        mamba_config: Mapping[str, Any] | None = None,
        conformer_activation: type[nn.Module] | None = None,
        conmamba_activation: type[nn.Module] | None = None,
        branchformer_activation: type[nn.Module] | None = None,
        attention_type: str = "regularMHA",
        max_length: int = 2500,
        causal: bool = False,
        csgu_linear_units: int | None = None,
        gate_activation: type[nn.Module] | None = None,
        use_linear_after_conv: bool | None = None,
        output_hidden_states: bool = False,
        layerdrop_prob: float = 0.0,
        gradient_checkpointing: bool = False,
        init: str = "xavier",
        inter_ctc_layers: Sequence[int] = (),
        self_conditioning: bool = False,
        signed_positions: bool = False,
        causal_convolution: bool = False,
    ):
        lookup(ENCODERS, encoder_module, "encoder_module")
        decoder_class = lookup(DECODERS, decoder_module, "decoder_module")
        if attention_type not in ATTENTION_TYPES:
            raise ValueError(
                f"attention_type is {attention_type!r}; known are {', '.join(ATTENTION_TYPES)}."
            )
        if positional_encoding not in POSITIONAL_ENCODINGS:
            raise ValueError(
                f"positional_encoding is {positional_encoding!r}; known are fixed_abs_sine, None."
            )
        if num_encoder_layers < 1 or num_decoder_layers < 0:
            raise ValueError(
                f"num_encoder_layers is {num_encoder_layers} and num_decoder_layers "
                f"{num_decoder_layers}; wanted at least 1 and at least 0."
            )
        if encoder_module == "conformer" and not normalize_before:
            raise ValueError(
                "A Conformer normalises before its modules: set normalize_before: True."
            )
        if encoder_module == "branchformer" and causal_convolution:
            raise ValueError("A Branchformer's convolution cannot be causal_convolution.")
        attends = encoder_module in ATTENTION_ENCODERS
        if attends and causal and attention_type == "hypermixing":
            raise ValueError(
                "hypermixing mixes all frames and cannot be causal; set causal: False."
            )

        beyond = [i for i in inter_ctc_layers if not 1 <= i < num_encoder_layers]
        if beyond:
            raise ValueError(
                f"inter_ctc_layers holds {beyond}; of {num_encoder_layers} layers, those between 1 "
                f"and {num_encoder_layers - 1} are inner ones."
            )
        if self_conditioning and not inter_ctc_layers:
            raise ValueError("self_conditioning needs inter_ctc_layers, such as [3, 6].")
        if signed_positions and attention_type != "RelPosMHAXL":
            raise ValueError(
                f"signed_positions are relative ones; attention_type is {attention_type!r}, set "
                "RelPosMHAXL."
            )

        # SpeechBrain's constructor ends with _init_params.
        self.init = init
        self.input_size = input_size
        # SpeechBrain builds no encoder under a name that it does not know and no decoder of 0
        # layers; both come from our tables below.
        super().__init__(
            tgt_vocab=tgt_vocab,
            input_size=input_size,
            d_model=d_model,
            nhead=nhead,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=0,
            d_ffn=d_ffn,
            dropout=dropout,
            activation=activation,
            positional_encoding=positional_encoding,
            normalize_before=normalize_before,
            encoder_module="from modules.Transformer",
            attention_type=attention_type,
            max_length=max_length,
            causal=causal,
            output_hidden_states=output_hidden_states,
            layerdrop_prob=layerdrop_prob,
        )
        if signed_positions:
            self.positional_encoding = SignedRelPosEncXL(d_model)
        self.d_model = d_model
        self.nhead = nhead
        self.max_length = max_length
        self.encoder_attends = attends
        self.encoder_has_positions = encoder_module != "mamba"
        shared = {
            "d_model": d_model,
            "nhead": nhead,
            "d_ffn": d_ffn,
            "dropout": dropout,
            "activation": activation,
            "normalize_before": normalize_before,
            "mamba_config": mamba_config,
            "attention_type": attention_type,
            "causal": causal,
            "causal_convolution": causal_convolution,
            "layerdrop_prob": layerdrop_prob,
            "gradient_checkpointing": gradient_checkpointing,
            "conditioned_layers": inter_ctc_layers if self_conditioning else (),
            "num_tokens": tgt_vocab,
        }
        if kernel_size is not None:
            shared["kernel_size"] = kernel_size
        particular = {
            "bias": bias,
            "conformer_activation": conformer_activation,
            "conmamba_activation": conmamba_activation,
            "branchformer_activation": branchformer_activation,
            "csgu_linear_units": csgu_linear_units,
            "gate_activation": gate_activation,
            "use_linear_after_conv": use_linear_after_conv,
        }
        self.encoder = build_encoder(
            encoder_module, {**shared, "num_layers": num_encoder_layers}, particular
        )
        if num_decoder_layers > 0:
            self.decoder = build(decoder_class, {**shared, "num_layers": num_decoder_layers})
            self.custom_tgt_module = ModuleList(NormalizedEmbedding(d_model, tgt_vocab))
        replace_dropout(self)
        self._init_params()

    def forward(
        self,
        src: Tensor,
        tgt: Tensor | None,
        wav_len: Tensor | None = None,
        pad_idx: int = 0,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        intermediate_layers: Collection[int] = (),
    ) -> tuple[Any, Tensor | None]:
        """Encodes ``src`` and decodes ``tgt`` with it.

        Args:
            src: frames (batch, time, features) or (batch, time, frequency, channel).
            tgt: tokens (batch, tokens) that begin with bos, or None.
            wav_len: frames of each item, integers or a fraction of those of the batch; None: all.
            pad_idx: token that fills up ``tgt``.
            dynchunktrain_config: cuts time into chunks, see ``encode``.
            intermediate_layers: encoder layers, counted from 1, whose outputs are wanted too.

        Returns:
            encoder output (batch, time, d_model), decoder output (batch, tokens, d_model) or None;
            with ``intermediate_layers`` a pair in the place of the encoder's, as from ``encode``.

        Raises:
            ValueError: there is a target and no decoder; or as in ``encode``.
        """
        encoder_out, inner = self.encode(
            src,
            wav_len,
            dynchunktrain_config=dynchunktrain_config,
            intermediate_layers=intermediate_layers,
        )
        encoded = (encoder_out, inner) if intermediate_layers else encoder_out
        if tgt is None:
            return encoded, None
        lengths_B = self._lengths(wav_len, encoder_out)
        return encoded, self._decoded(tgt, encoder_out, lengths_B, tgt.eq(pad_idx))[0]

    def encode(
        self,
        src: Tensor,
        wav_len: Tensor | None = None,
        pad_idx: int = 0,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        intermediate_layers: Collection[int] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encodes ``src``.

        Args:
            src: frames (batch, time, features) or (batch, time, frequency, channel).
            wav_len: frames of each item, integers or a fraction of those of the batch; None: all.
            pad_idx: has no effect; SpeechBrain's signature.
            dynchunktrain_config: cuts time into chunks; a frame sees nothing behind its chunk.
            intermediate_layers: layers, counted from 1, whose outputs are wanted too.

        Returns:
            encoder output (batch, time, d_model); with ``intermediate_layers`` (or
            ``output_hidden_states``, then of all layers) a pair of it and the list of the layers'
            outputs, each through the closing LayerNorm.

        Raises:
            ValueError: chunks for a causal network or one with hypermixing, a layer that does not
                exist, or more frames than absolute positions reach.
        """
        self._check_chunks(dynchunktrain_config)
        src = _flattened(src)
        lengths_B = self._lengths(wav_len, src)
        padding_BT = None
        if lengths_B is not None:
            padding_BT = padding_mask(lengths_B, src.shape[1])
            # Keeps NaN in the padding away from the gradient of the first layer's weights.
            src = src.masked_fill(padding_BT.unsqueeze(-1), 0.0)
        x_BTD, pos_embs = self._with_positions(self.custom_src_module(src))
        if intermediate_layers is None and self.output_hidden_states:
            intermediate_layers = range(1, len(self.encoder.layers) + 1)
        encoder_out, inner = self.encoder(
            src=x_BTD,
            src_mask=self._src_mask(src, padding_BT, dynchunktrain_config),
            src_key_padding_mask=padding_BT,
            pos_embs=pos_embs,
            dynchunktrain_config=dynchunktrain_config,
            intermediate_layers=intermediate_layers or (),
        )
        return encoder_out if intermediate_layers is None else (encoder_out, inner)

    @torch.no_grad()
    def embed_source(self, src: Tensor) -> Tensor:
        """Front-end frames as what the encoder's layers take, before positions."""
        return self.custom_src_module(_flattened(src))

    @torch.no_grad()
    def encode_in_pieces(
        self,
        x_BTD: Tensor,
        piece_frames: int,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Tensor:
        """``encode`` of what ``embed_source`` gave, layer by layer in bounded memory.

        Args:
            x_BTD: frames, all of them valid; changed.
            piece_frames: frames that are in work at a time.
            progress: is told each share of the work that is done.

        Raises:
            ValueError: an encoder that attends: every frame needs all others at once.
        """
        if not hasattr(self.encoder, "forward_in_pieces"):
            able = [name for name, cls in ENCODERS.items() if hasattr(cls, "forward_in_pieces")]
            raise ValueError(
                f"{type(self.encoder).__name__} needs all frames at once; encoders that go through "
                f"a long recording in pieces: {', '.join(sorted(able))}."
            )
        x_BTD, _ = self._with_positions(x_BTD)
        return self.encoder.forward_in_pieces(x_BTD, piece_frames, progress)

    @torch.no_grad()
    def decode(
        self, tgt: Tensor, encoder_out: Tensor, enc_len: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Decodes whole prefixes, as SpeechBrain's searchers do for every token.

        Args:
            tgt: tokens (batch, tokens) that begin with bos.
            encoder_out: (batch, time, d_model).
            enc_len: its valid frames, integers; None means all.

        Returns:
            decoder output (batch, tokens, d_model), and the last layer's attention over
            ``encoder_out`` (None of a Mamba decoder).
        """
        return self._decoded(tgt, encoder_out, None if enc_len is None else enc_len.long())

    @torch.no_grad()
    def init_decoder_state(
        self, memory_BTD: Tensor, memory_lengths_B: Tensor | None = None
    ) -> DecoderState:
        """The state before the first token, one row per utterance.

        Args:
            memory_BTD: encoder output.
            memory_lengths_B: its valid frames, integers; None means all.

        Raises:
            ValueError: the network has no decoder.
        """
        self._check_decoder()
        lengths_B = None if memory_lengths_B is None else memory_lengths_B.long()
        return DecoderState(0, self.decoder.init_state(memory_BTD, lengths_B))

    @torch.no_grad()
    def decode_step(self, tokens_B: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Decodes one more token of every hypothesis, in inference: no dropout.

        Args:
            tokens_B: the last token of each hypothesis, bos at first.
            state: what ``init_decoder_state`` or the previous step returned, possibly selected or
                repeated since; it stays usable.

        Returns:
            decoder output ``dec_out_BD``, what ``decode`` gives at the last token, and the next
            state.

        Raises:
            ValueError: more tokens than absolute positions reach.
        """
        x_BUD = self._embedded(tokens_B[:, None], state.num_tokens)
        out_BD, layers = self.decoder.step(x_BUD[:, 0], state.layers)
        return out_BD, DecoderState(state.num_tokens + 1, layers)

    def check_streaming(self, chunks: DynChunkTrainConfig | None) -> None:
        """Checks that the encoder streams in such chunks; None for a causal network.

        Raises:
            ValueError: it does not; the message says what can be done.
        """
        if not hasattr(self.encoder, "check_streaming"):
            able = [name for name, cls in ENCODERS.items() if hasattr(cls, "check_streaming")]
            raise ValueError(
                f"{type(self.encoder).__name__} cannot stream; encoders that can: "
                f"{', '.join(sorted(able))}."
            )
        self._check_chunks(chunks)
        self.encoder.check_streaming(chunks)

    def initial_state(
        self, batch_size: int, chunks: DynChunkTrainConfig | None = None
    ) -> EncoderState:
        """State of streams before their first frame; arguments as in ``check_streaming``.

        Raises:
            ValueError: the encoder does not stream in such chunks.
        """
        self.check_streaming(chunks)
        clock_B = torch.zeros(
            batch_size, dtype=torch.long, device=self.encoder.norm.norm.weight.device
        )
        return EncoderState(clock_B, self.encoder.initial_states(batch_size, chunks))

    def step_frames(self, chunks: DynChunkTrainConfig) -> int:
        """Frames from the beginning of a chunk to that of the next one."""
        return chunks.chunk_size - self.encoder.ahead_frames(chunks)

    def encode_chunk(
        self,
        src: Tensor,
        state: EncoderState,
        num_frames_B: Tensor | None = None,
        chunks: DynChunkTrainConfig | None = None,
    ) -> tuple[Tensor, EncoderState]:
        """Encodes the next chunk of streams: the frames of ``encode`` over the whole of each.

        A row of no frames is held: its state stays. With chunks, a row of fewer frames than
        ``chunks.chunk_size`` is the end of its stream. Chunks may overlap: the next one begins
        ``step_frames`` behind the beginning of this one.

        Args:
            src: at most ``chunks.chunk_size`` frames (batch, time, features) or (batch, time,
                frequency, channel); of a causal network any number.
            state: from ``initial_state``, or what the previous call returned; it stays usable.
            num_frames_B: how many frames of each row count, integers; None means all.
            chunks: those of ``state``.

        Returns:
            encoder output (batch, time, d_model) of the frames that the next chunk does not begin
            with, and the next state.

        Raises:
            ValueError: more frames than absolute positions reach, or another number of streams.
        """
        src, num_new = _flattened(src), src.shape[1]
        if src.shape[0] != state.num_frames_B.shape[0]:
            raise ValueError(
                f"src has {src.shape[0]} rows, the state {state.num_frames_B.shape[0]} streams."
            )
        padding_BT = None if num_frames_B is None else padding_mask(num_frames_B, num_new)
        x_BTD, pos_embs = self._with_positions(
            self.custom_src_module(src), state.num_frames_B, self._num_left(chunks)
        )
        own = num_new if chunks is None else min(num_new, self.step_frames(chunks))
        surroundings = Surroundings(
            None, padding_BT, num_frames_B, pos_embs, chunks, ahead=num_new - own
        )
        out_BTD, layers = self.encoder.forward_streaming(x_BTD, surroundings, state.layers)
        num_own_B = own if num_frames_B is None else num_frames_B.clamp(max=own)
        return out_BTD[:, :own], EncoderState(state.num_frames_B + num_own_B, layers)

    def _num_left(self, chunks: DynChunkTrainConfig | None) -> int:
        """Frames before a chunk that attention sees."""
        return (chunks.left_context_size_frames() or 0) if chunks and self.encoder_attends else 0

    def make_streaming_context(
        self,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        encoder_kwargs: Mapping[str, Any] | None = None,
    ) -> TransformerASRStreamingContext:
        """Starts streams for ``encode_streaming``, SpeechBrain's interface.

        Args:
            dynchunktrain_config: chunks, as in training; None for a causal network.
            encoder_kwargs: has no effect; SpeechBrain's signature.

        Raises:
            ValueError: the encoder cannot stream in this way; the message says what can be done.
        """
        self.check_streaming(dynchunktrain_config)
        return TransformerASRStreamingContext(dynchunktrain_config, None)

    def encode_streaming(
        self, src: Tensor, context: TransformerASRStreamingContext, final: bool = False
    ) -> Tensor:
        """Encodes the next frames of streams that are cut alike, in any cutting.

        The frames are those of ``encode`` over the whole stream with the same chunks. A causal
        network gives a frame for a frame; with chunks, frames that do not fill a chunk wait in the
        context for the next call. ``encode_chunk`` serves streams that are not cut alike.

        Args:
            src: the next frames (batch, time, features) or (batch, time, frequency, channel).
            context: from ``make_streaming_context``; moved on.
            final: these are the last frames; an incomplete chunk is encoded as it is.

        Returns:
            encoder output (batch, time, d_model), possibly of no frames.

        Raises:
            ValueError: the stream has ended.
        """
        if context.finished:
            raise ValueError("This stream has had its final frames; make a new streaming context.")
        src, chunks = _flattened(src), context.dynchunktrain_config
        if context.pending_BTF is not None:
            src = torch.cat([context.pending_BTF, src], dim=1)
        if context.encoder_context is None:
            context.encoder_context = self.initial_state(len(src), chunks)
        context.finished = final
        step = chunk_size = max(src.shape[1], 1)
        if chunks is not None:
            chunk_size, step = chunks.chunk_size, self.step_frames(chunks)
        outputs = [src.new_zeros(src.shape[0], 0, self.d_model)]
        while src.shape[1] >= (1 if final else chunk_size):
            out_BTD, context.encoder_context = self.encode_chunk(
                src[:, :chunk_size], context.encoder_context, chunks=chunks
            )
            outputs.append(out_BTD)
            src = src[:, step:]
        context.pending_BTF = src if src.shape[1] else None
        return torch.cat(outputs, dim=1)

    def _decoded(
        self,
        tgt: Tensor,
        memory_BTD: Tensor,
        lengths_B: Tensor | None,
        tgt_key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self._check_decoder()
        return self.decoder(self._embedded(tgt), memory_BTD, lengths_B, tgt_key_padding_mask)

    def _embedded(self, tgt: Tensor, num_before: int = 0) -> Tensor:
        x_BUD, table = self.custom_tgt_module(tgt), self._target_positions
        return x_BUD if table is None else x_BUD + self._absolute(table, num_before, x_BUD)

    @property
    def _target_positions(self) -> Any:
        # With relative or rotary positions in the encoder, the decoder has a table of its own.
        table = getattr(self, "positional_encoding_decoder", None)
        return getattr(self, "positional_encoding", None) if table is None else table

    @property
    def has_absolute_targets(self) -> bool:
        """Whether there is a decoder whose tokens are numbered, up to ``max_length``."""
        return hasattr(self, "decoder") and self._target_positions is not None

    @property
    def has_absolute_positions(self) -> bool:
        """Whether the encoder's frames are numbered, up to ``max_length``."""
        return (
            self.attention_type == "regularMHA"
            and self.positional_encoding_type is not None
            and self.encoder_has_positions
        )

    def _with_positions(
        self, x_BTD: Tensor, num_before_B: Tensor | None = None, num_left: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Frames with absolute positions added, or relative positions for the attention.

        ``num_before_B`` frames came earlier, ``num_left`` of them are attended to again.
        """
        if self.attention_type == "RelPosMHAXL":
            if not self.encoder_attends:
                return x_BTD, None
            return x_BTD, self.positional_encoding.make_pe(x_BTD.shape[1] + num_left)
        if self.has_absolute_positions:
            table = self.positional_encoding
            if num_before_B is None:
                x_BTD = x_BTD + self._absolute(table, 0, x_BTD)
            else:
                self._check_positions(int(num_before_B.max()) + x_BTD.shape[1])
                times_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
                x_BTD = x_BTD + table.pe[0, num_before_B[:, None] + times_T]
        return x_BTD, None

    def _absolute(self, table: Any, start: int, x: Tensor) -> Tensor:
        end = start + x.shape[1]
        self._check_positions(end)
        return table.pe[:, start:end]

    def _check_positions(self, end: int) -> None:
        if end > self.max_length:
            raise ValueError(
                f"A sequence has reached {end} frames or tokens, absolute positions end at "
                f"max_length={self.max_length}. Raise max_length, or cut the sequence."
            )

    def _src_mask(
        self,
        src: Tensor,
        padding_BT: Tensor | None,
        dynchunktrain_config: DynChunkTrainConfig | None,
    ) -> Tensor | None:
        if not self.encoder_attends:
            return None
        if self.causal:
            frames = src.shape[1]
            return torch.ones(frames, frames, dtype=torch.bool, device=src.device).triu(1)
        mask = make_transformer_src_mask(src, dynchunktrain_config=dynchunktrain_config)
        if mask is not None and padding_BT is not None and self.attention_type == "regularMHA":
            # A padded frame whose chunks hold nothing but padding would see no frame at all, and
            # torch's attention answers that with NaN: let padded frames see every valid one.
            mask = (mask & ~padding_BT[:, :, None]).repeat_interleave(self.nhead, dim=0)
        return mask

    def _lengths(self, wav_len: Tensor | None, x_BTD: Tensor) -> Tensor | None:
        return None if wav_len is None else absolute_lengths(wav_len, x_BTD.shape[1])

    def _check_chunks(self, dynchunktrain_config: DynChunkTrainConfig | None) -> None:
        if dynchunktrain_config is None:
            return
        if self.causal:
            raise ValueError(
                "A causal network takes no chunks; leave dynchunktrain_config out, or build the "
                "network with causal=False."
            )
        if self.encoder_attends and self.attention_type == "hypermixing":
            raise ValueError("hypermixing mixes all frames and cannot be cut into chunks.")

    def _check_decoder(self) -> None:
        if not hasattr(self, "decoder"):
            raise ValueError("This network has no decoder; build it with num_decoder_layers > 0.")

    def _init_params(self) -> None:
        initialise(self, self.init)


def _flattened(src: Tensor) -> Tensor:
    return src.flatten(2) if src.dim() == 4 else src
