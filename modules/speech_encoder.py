"""From waveforms to encoder output: the one path that training, decoding and inference take."""

from collections.abc import Callable

import torch
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.lengths import IntOrTensor, relative_lengths
from modules.normalization import FiniteStatistics, normalize_in_pieces
from modules.stream_state import StreamState, stream_state
from modules.TransformerASR import EncoderState, TransformerASR


@stream_state
class SpeechEncoderState(StreamState):
    """State of streams of speech.

    Args:
        samples_BS: the last samples, which later frames still read.
        front_end: the last frames before each convolution of the front end.
        encoder: of the network, the clock of each stream in it.
    """

    samples_BS: Tensor
    front_end: tuple[Tensor, ...]
    encoder: EncoderState


class SpeechEncoder(nn.Module):
    """Filterbank, normaliser, convolutional front end and network as one module.

    ``forward`` is ``features``, ``frontend`` and ``encode`` in a row; a trainer calls the three and
    augments between them. It is the only source of frame counts.

    Args:
        compute_features: waveforms to features.
        normalize: of the features; trained before ``forward`` is called.
        CNN: features to fewer frames.
        Transformer: frames to encoder output.

    >>> from modules.frontend import ConvolutionFrontEnd
    >>> cnn = ConvolutionFrontEnd((None, None, 80))
    >>> network = TransformerASR(31, 640, 16, 2, 1, 0, 16, encoder_module="conmamba")
    >>> normalize = InputNormalization(norm_type="sentence")
    >>> encoder = SpeechEncoder(Fbank(), normalize, cnn, network).eval()
    >>> encoder_out_BTD, num_frames_B = encoder(torch.zeros(2, 16000), torch.tensor([16000, 8000]))
    >>> encoder_out_BTD.shape, num_frames_B
    (torch.Size([2, 26, 16]), tensor([26, 13]))
    >>> encoder.num_frames(8000)
    13
    """

    def __init__(
        self,
        compute_features: Fbank,
        normalize: InputNormalization,
        CNN: ConvolutionFrontEnd,
        Transformer: TransformerASR,
    ):
        super().__init__()
        self.compute_features = compute_features
        self.normalize = normalize
        FiniteStatistics(normalize)
        self.CNN = CNN
        self.Transformer = Transformer
        # A distributed wrapper that takes the front end's place does not tell them.
        self._frontend_frames = CNN.out_frames
        self._frontend_stride = CNN.stride_frames

    def frontend_width(self) -> int:
        """Features of a frame of the front end: what the network's ``input_size`` has to be.

        Raises:
            ValueError: the front end does not take what the filterbank makes.
        """
        bins, training = self.compute_features.compute_fbanks.n_mels, self.CNN.training
        try:
            with torch.no_grad():
                frames_BTFC = self.CNN.eval()(torch.zeros(1, 2 * self._frontend_stride, bins))
        except RuntimeError as error:
            raise ValueError(f"CNN does not take features of {bins} mel bins: {error}") from None
        finally:
            self.CNN.train(training)
        return frames_BTFC.shape[2:].numel()

    def check_widths(self) -> None:
        """Whether each part takes what the one before it makes.

        Raises:
            ValueError: it does not: another number of mel bins, or another front end.
        """
        made, wanted = self.frontend_width(), self.Transformer.input_size
        if made != wanted:
            bins = self.compute_features.compute_fbanks.n_mels
            raise ValueError(
                f"The front end makes {made} features of {bins} mel bins, and input_size of "
                f"Transformer is {wanted}. Give --Transformer '{{input_size: {made}}}'."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpeechEncoder":
        super()._apply(fn, recurse)
        # SpeechBrain's statistics are no buffers: without this they stay behind.
        self.normalize.to(fn(self.normalize.glob_mean).device)
        return self

    def num_feature_frames(self, num_samples: IntOrTensor) -> IntOrTensor:
        """Frames that the filterbank makes of so many samples (an integer or integers)."""
        return self.compute_features.num_frames(num_samples)

    def num_frames(self, num_samples: IntOrTensor) -> IntOrTensor:
        """Encoder frames that so many samples (an integer or integers) become."""
        return self._frontend_frames(self.num_feature_frames(num_samples))

    @property
    def stride_samples(self) -> int:
        """Samples from one encoder frame to the next."""
        return self.compute_features.hop_samples * self._frontend_stride

    def features(
        self, wav_BS: Tensor, num_samples_B: Tensor, epoch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised features ``feats_BTM`` and their frames per item, without a gradient.

        Args:
            wav_BS: waveforms between -1 and 1, padded with anything.
            num_samples_B: integer samples per item.
            epoch: in training: the normaliser learns in the first ones.
        """
        # Filterbank energies span more decades than bfloat16 has bits.
        with torch.autocast(wav_BS.device.type, enabled=False), torch.no_grad():
            feats_BTM = self.compute_features(wav_BS, num_samples_B)
            num_frames_B = self.num_feature_frames(num_samples_B)
            # A fraction of a frame less: rounded up, it would be a frame of padding to SpeechBrain.
            wav_lens = relative_lengths((num_frames_B - 0.25).clamp(min=0), feats_BTM.shape[1])
            return self.normalize(feats_BTM, wav_lens, epoch=epoch), num_frames_B

    def frontend(self, feats_BTM: Tensor, num_feature_frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Front-end frames (batch, time, frequency, channel), and how many each item has."""
        return self.CNN(feats_BTM, num_feature_frames_B), self._frontend_frames(
            num_feature_frames_B
        )

    def encode(
        self,
        frames_BTFC: Tensor,
        num_frames_B: Tensor,
        chunks: DynChunkTrainConfig | None = None,
    ) -> Tensor:
        """Encoder output ``encoder_out_BTD`` of front-end frames; none sees beyond its chunk."""
        return self.Transformer(frames_BTFC, None, num_frames_B, dynchunktrain_config=chunks)[0]

    @torch.no_grad()
    def forward_in_pieces(
        self,
        wav_S: Tensor,
        piece_s: float = 60.0,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Tensor:
        """``forward`` of one recording of any length, in evaluation: ``encoder_out_TD``.

        Every frame depends on the whole recording, as in ``forward``, and comes out the same. Layer
        by layer, the scan's state is carried forward through the pieces, and backward from the end.
        Memory beside the result: the features, another tensor as large as it, and a piece.

        Args:
            wav_S: a waveform between -1 and 1.
            piece_s: seconds that are in work at a time.
            progress: is told each share of the network's work that is done.

        Raises:
            ValueError: the encoder attends: every frame needs all others at once.
        """
        rate = self.compute_features.compute_STFT.sample_rate
        piece_samples = max(1, round(piece_s * rate))
        piece_feature_frames = self.num_feature_frames(piece_samples)
        with torch.autocast(wav_S.device.type, enabled=False):
            feats_1TM = self.compute_features.forward_in_pieces(wav_S[None], piece_samples)
            normalize_in_pieces(self.normalize, feats_1TM, piece_feature_frames)
        x_1TD = self._embedded_in_pieces(feats_1TM, piece_feature_frames)
        del feats_1TM
        piece_frames = self.num_frames(piece_samples)
        return self.Transformer.encode_in_pieces(x_1TD, piece_frames, progress)[0]

    def _embedded_in_pieces(self, feats_1TM: Tensor, piece_feature_frames: int) -> Tensor:
        """Features as what the encoder's layers take."""
        x_1TD, done = torch.empty(0), 0
        for frames_1TFC in self.CNN.forward_in_pieces(feats_1TM, piece_feature_frames):
            piece_1TD = self.Transformer.embed_source(frames_1TFC)
            if not done:
                num_frames = self._frontend_frames(feats_1TM.shape[1])
                x_1TD = piece_1TD.new_empty(1, num_frames, piece_1TD.shape[2])
            x_1TD[:, done : done + piece_1TD.shape[1]] = piece_1TD
            done += piece_1TD.shape[1]
        return x_1TD

    def check_streaming(self, chunks: DynChunkTrainConfig | None) -> None:
        """Checks that nothing in this model needs the future beyond such chunks.

        Raises:
            ValueError: something does; the message says what can be done.
        """
        self.compute_features.check_streaming()
        self.CNN.check_streaming()
        if self.normalize.norm_type != "global" or getattr(self.normalize, "remove_mean", False):
            raise ValueError(
                "The features are normalised with statistics of the utterance, which a stream does "
                "not know; train with SpeechBrain's InputNormalization, norm_type: global."
            )
        self.Transformer.check_streaming(chunks)
        if self.Transformer.has_absolute_positions:
            raise ValueError(
                f"Absolute positions end at max_length={self.Transformer.max_length}, a stream "
                "does not; train with attention_type: RelPosMHAXL."
            )
        if self.lead_samples < 0:
            raise ValueError(
                f"n_fft={self.compute_features.compute_STFT.n_fft} reads further ahead than an "
                f"encoder frame of {self.stride_samples} samples lasts; take a shorter transform."
            )

    def step_frames(self, chunks: DynChunkTrainConfig) -> int:
        """Encoder frames from the beginning of a chunk to that of the next one."""
        return self.Transformer.step_frames(chunks)

    @property
    def lead_samples(self) -> int:
        """Zeros that stand before the first sample of a stream.

        With them its first chunk is as long as all others: a frame is centred on its time, so that
        it ends half a transform later, and the first encoder frame ends with the first feature
        frame.
        """
        return self.stride_samples - (self.compute_features.compute_STFT.n_fft + 1) // 2

    def initial_state(
        self, batch_size: int, chunks: DynChunkTrainConfig | None = None
    ) -> SpeechEncoderState:
        """State of streams before their first sample.

        Args:
            chunks: at whose ends the network's sight ends; None for a causal one.

        Raises:
            ValueError: the model does not stream in such chunks.
        """
        self.check_streaming(chunks)
        features = self.compute_features
        front_end = self.CNN.initial_state(batch_size, features.compute_fbanks.n_mels)
        samples_BS = front_end[0].new_zeros(batch_size, features.num_kept_samples)
        return SpeechEncoderState(
            samples_BS, front_end, self.Transformer.initial_state(batch_size, chunks)
        )

    def forward_streaming(
        self,
        wav_BS: Tensor,
        state: SpeechEncoderState,
        num_frames_B: Tensor | None = None,
        chunks: DynChunkTrainConfig | None = None,
    ) -> tuple[Tensor, SpeechEncoderState]:
        """The next chunk of streams: the frames of ``forward`` over the whole of each.

        The next chunk begins ``step_frames`` behind this one: where the network looks ahead, it has
        some of the same samples.

        Args:
            wav_BS: the next samples, ``stride_samples`` for each frame of the chunk; a stream
                begins with ``lead_samples`` zeros, and zeros fill up its last chunk.
            state: from ``initial_state``, or what the previous call returned; it stays usable.
            num_frames_B: how many frames of the chunk each row has, integers; None means all. A row
                of 0 is held; with chunks, one of fewer than the chunk's is at its end.
            chunks: those of ``state``.

        Returns:
            ``encoder_out_BTD`` of at most ``step_frames`` frames, and the next state.
        """
        num_own_B = num_frames_B
        if chunks is not None and self.step_frames(chunks) < chunks.chunk_size:
            if num_own_B is None:
                frames = wav_BS.shape[1] // self.stride_samples
                num_own_B = torch.full_like(state.encoder.num_frames_B, frames)
            num_own_B = num_own_B.clamp(max=self.step_frames(chunks))
        num_samples_B = None if num_own_B is None else num_own_B * self.stride_samples
        with torch.autocast(wav_BS.device.type, enabled=False):
            feats_BTM, samples_BS = self.compute_features.forward_streaming(
                wav_BS, state.samples_BS, num_samples_B
            )
            feats_BTM = self.normalize(feats_BTM)
        is_first_B = state.encoder.num_frames_B == 0
        frames_BTFC, front_end = self.CNN.forward_streaming(
            feats_BTM, state.front_end, is_first_B, num_own_B
        )
        encoder_out_BTD, encoder = self.Transformer.encode_chunk(
            frames_BTFC, state.encoder, num_frames_B, chunks
        )
        return encoder_out_BTD, SpeechEncoderState(samples_BS, front_end, encoder)

    def forward(
        self,
        wav_BS: Tensor,
        num_samples_B: Tensor,
        chunks: DynChunkTrainConfig | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Waveforms to ``encoder_out_BTD`` and integer frames per item ``num_frames_B``.

        Args:
            wav_BS: waveforms between -1 and 1, padded with anything.
            num_samples_B: integer samples per item.
            chunks: behind whose ends a frame sees nothing; None shows it everything.

        Raises:
            ValueError: the lengths are not one integer per item, or the network takes no chunks.
        """
        frames_BTFC, num_frames_B = self.frontend(*self.features(wav_BS, num_samples_B))
        return self.encode(frames_BTFC, num_frames_B, chunks), num_frames_B
