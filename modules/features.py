"""Log-mel filterbank whose values for an utterance do not depend on the batch it comes in."""

import torch
import torch.nn.functional as F
from speechbrain.lobes.features import Fbank as SpeechBrainFbank
from speechbrain.processing.features import STFT, Filterbank
from speechbrain.utils.autocast import fwd_default_precision
from torch import Tensor

from modules.lengths import IntOrTensor, padding_mask
from modules.stream_state import last_frames


class FixedFilterbank(Filterbank):
    """SpeechBrain's filterbank, whose filters stay as they are: made once, and moved with it.

    SpeechBrain makes them anew for every batch, and a GPU waits for them.
    """

    def __init__(self, **options):
        super().__init__(freeze=True, **options)
        points = self.all_freqs_mat.shape[1]
        of_each = (x.repeat(points, 1).transpose(0, 1) for x in (self.f_central, self.band))
        self.register_buffer("filters", super()._create_fbank_matrix(*of_each), persistent=False)

    def _create_fbank_matrix(self, f_central_mat: Tensor, band_mat: Tensor) -> Tensor:
        return self.filters


class Fbank(SpeechBrainFbank):
    """SpeechBrain's log-mel filterbank, each item limited to its own samples.

    A waveform is zeroed beyond its length, and the dynamic range is measured against the loudest
    valid frame of the item itself; without both, silence appended to a batch changes the features.

    Args:
        sample_rate: samples a second.
        n_fft: points of the Fourier transform.
        win_length_ms: window length in milliseconds.
        hop_length_ms: distance of two frames in milliseconds.
        n_mels: mel bins.
        top_db: values more than this many dB below the item's maximum are raised to that floor.
            The maximum is that of the whole utterance; ``None`` applies no floor, as a causal
            model needs it.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        n_fft: int = 400,
        win_length_ms: float = 25,
        hop_length_ms: float = 10,
        n_mels: int = 80,
        top_db: float | None = 80.0,
    ):
        if n_fft % 2:
            # A frame would be centred between two samples, and the last one fall away.
            raise ValueError(f"n_fft is {n_fft}; wanted an even number")
        window_samples = round(sample_rate * win_length_ms / 1000)
        if window_samples > n_fft:
            raise ValueError(
                f"A window of {win_length_ms} ms has {window_samples} samples at {sample_rate} Hz, "
                f"more than n_fft={n_fft}; raise n_fft."
            )
        super().__init__(
            sample_rate=sample_rate,
            n_fft=n_fft,
            win_length=win_length_ms,
            hop_length=hop_length_ms,
            n_mels=n_mels,
        )
        self.compute_fbanks = FixedFilterbank(
            sample_rate=sample_rate, n_fft=n_fft, n_mels=n_mels, f_max=sample_rate // 2
        )
        # A stream brings the zeros of its two ends itself.
        self.stream_STFT = STFT(
            sample_rate=sample_rate,
            n_fft=n_fft,
            win_length=win_length_ms,
            hop_length=hop_length_ms,
            center=False,
        )
        # The floor needs the lengths, which SpeechBrain's filterbank does not get.
        self.compute_fbanks.top_db = float("inf")
        self.top_db = top_db

    @property
    def hop_samples(self) -> int:
        """Samples between two frames."""
        return self.compute_STFT.hop_length

    def num_frames(self, num_samples: IntOrTensor) -> IntOrTensor:
        """Frames that so many samples (an integer or integers) become.

        Raises:
            ValueError: the count is negative or not an integer.

        >>> Fbank(sample_rate=8000).num_frames(8000)
        101
        """
        if isinstance(num_samples, Tensor):
            if num_samples.is_floating_point():
                raise ValueError(
                    f"num_samples has dtype {num_samples.dtype}; wanted integers. Relative lengths "
                    "must be multiplied by the padded length first."
                )
        elif num_samples < 0:
            raise ValueError(f"num_samples is {num_samples}; a count cannot be negative.")
        return 1 + num_samples // self.hop_samples

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward(self, wav_BS: Tensor, num_samples_B: Tensor | None = None) -> Tensor:
        """Features ``feats_BTM`` in dB, zero at and after an item's ``num_frames``.

        Args:
            wav_BS: waveforms between -1 and 1, padded with anything.
            num_samples_B: integer samples per item; ``None`` means all of ``wav_BS``.

        Raises:
            ValueError: the lengths are not one integer per item.
        """
        if num_samples_B is None:
            return self._floored(self._decibels(wav_BS, self.compute_STFT))
        if num_samples_B.is_floating_point() or num_samples_B.shape != wav_BS.shape[:1]:
            raise ValueError(
                f"num_samples_B is {num_samples_B.dtype} of shape {tuple(num_samples_B.shape)}; "
                f"wanted integers of shape ({wav_BS.shape[0]},), the samples of each item."
            )
        wav_BS = wav_BS.masked_fill(padding_mask(num_samples_B, wav_BS.shape[1]), 0.0)
        feats_BTM = self._decibels(wav_BS, self.compute_STFT)
        frames_B = self.num_frames(num_samples_B)
        padding_BT1 = padding_mask(frames_B, feats_BTM.shape[1]).unsqueeze(-1)
        return self._floored(feats_BTM, padding_BT1).masked_fill(padding_BT1, 0.0)

    @property
    def num_kept_samples(self) -> int:
        """Samples before the next ones that are still read, in a stream."""
        return self.compute_STFT.n_fft - self.hop_samples

    def check_streaming(self) -> None:
        """Checks that no frame depends on the whole utterance.

        Raises:
            ValueError: ``top_db`` is set: its floor depends on samples yet to come.
        """
        if self.top_db is not None:
            raise ValueError(
                f"top_db={self.top_db:g} limits features by the loudest frame of the utterance, "
                "which a stream does not know; build the filterbank with top_db=None."
            )

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward_streaming(
        self, wav_BS: Tensor, before_BS: Tensor, num_samples_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next frames of streams, those that end with the samples given.

        Args:
            wav_BS: the next samples of every stream, ``hop_samples`` for each frame.
            before_BS: the ``num_kept_samples`` before them, zeros before the first.
            num_samples_B: how many samples of each row count, integers; None means all.

        Returns:
            ``feats_BTM``, and the samples that the next call reads.
        """
        seen_BS = torch.cat([before_BS, wav_BS], dim=1)
        feats_BTM = self._decibels(seen_BS, self.stream_STFT)
        return feats_BTM, last_frames(seen_BS, before_BS.shape[1], num_samples_B)

    @fwd_default_precision(cast_inputs=torch.float32)
    def forward_in_pieces(self, wav_BS: Tensor, piece_samples: int) -> Tensor:
        """``forward(wav_BS)`` in memory for the features and a piece.

        Args:
            wav_BS: waveforms between -1 and 1, all of them valid.
            piece_samples: samples of a piece.
        """
        batch_size, num_samples = wav_BS.shape
        num_frames = self.num_frames(num_samples)
        feats_BTM = wav_BS.new_empty(batch_size, num_frames, self.compute_fbanks.n_mels)
        edge = self.compute_STFT.n_fft // 2
        step = max(1, piece_samples // self.hop_samples)
        for first in range(0, num_frames, step):
            last = min(first + step, num_frames) - 1
            # A frame is centred on its time; zeros stand before the recording and behind it.
            start, stop = first * self.hop_samples - edge, last * self.hop_samples + edge
            zeros = (max(-start, 0), max(stop - num_samples, 0))
            read_BS = F.pad(wav_BS[:, max(start, 0) : stop], zeros)
            feats_BTM[:, first : last + 1] = self._decibels(read_BS, self.stream_STFT)
        floor_B11 = self._floor(feats_BTM)
        return feats_BTM if floor_B11 is None else feats_BTM.clamp_(min=floor_B11)

    def _decibels(self, wav_BS: Tensor, stft: STFT) -> Tensor:
        if stft.window.device != wav_BS.device:
            # No buffer: SpeechBrain moves it anew for every batch, and a GPU waits for it.
            stft.window = stft.window.to(wav_BS.device)
        # SpeechBrain's power, but for how it sums two numbers, which takes five times as long.
        squares_BTF2 = stft(wav_BS).square()
        return self.compute_fbanks(squares_BTF2[..., 0] + squares_BTF2[..., 1])

    def _floored(self, feats_BTM: Tensor, padding_BT1: Tensor | None = None) -> Tensor:
        valid_BTM = feats_BTM
        if self.top_db is not None and padding_BT1 is not None:
            valid_BTM = feats_BTM.masked_fill(padding_BT1, -float("inf"))
        floor_B11 = self._floor(valid_BTM)
        return feats_BTM if floor_B11 is None else torch.maximum(feats_BTM, floor_B11)

    def _floor(self, feats_BTM: Tensor) -> Tensor | None:
        if self.top_db is None:
            return None
        return feats_BTM.amax(dim=(-2, -1), keepdim=True) - self.top_db
