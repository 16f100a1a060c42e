"""Audio of any format, rate and channel count as the waveform that a model takes."""

import io
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

MAX_SAMPLE_RATE = 655_350
"""The highest rate that FLAC can name, in Hz."""


class AudioError(ValueError):
    """Audio that cannot be read or used; the message says which and why."""


def load_audio(
    source: str | os.PathLike | bytes | IO[bytes], sample_rate: int, channel: int | None = None
) -> np.ndarray:
    """Samples (S,), float32, between -1 and 1.

    Args:
        source: a file's path, its bytes, or an open binary file.
        sample_rate: the model's rate, in Hz; other rates are resampled.
        channel: the channel to take, counted from 0; None mixes all down.

    Raises:
        AudioError: the audio is missing, empty, broken, of an impossible rate, or has no such
            channel.
    """
    name = str(source) if isinstance(source, (str, os.PathLike)) else "audio"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            raise AudioError(f"{name}: no such file")
        if not path.is_file():
            raise AudioError(f"{name}: is no regular file")
        if path.stat().st_size == 0:
            raise AudioError(f"{name}: the file is empty")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        samples_SC, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, MemoryError) as error:
        samples_SC, rate = _read_with_av(source, name, error)
    return as_waveform(samples_SC, rate, sample_rate, name, channel)


def as_waveform(
    samples: np.ndarray,
    rate: int,
    sample_rate: int,
    name: str = "audio",
    channel: int | None = None,
) -> np.ndarray:
    """Samples of any rate and channel count as (S,), float32, between -1 and 1.

    Args:
        samples: (S,) or (S, channels), integers or floating point.
        rate: of ``samples``, in Hz.
        sample_rate: wanted, in Hz.
        name: of the audio, for messages.
        channel: as in ``load_audio``.

    Raises:
        AudioError: see ``load_audio``; or samples that are not finite.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2):
        raise AudioError(f"{name}: samples have {samples.ndim} axes; wanted (S,) or (S, channels)")
    if not 0 < rate <= MAX_SAMPLE_RATE:
        raise AudioError(f"{name}: a sampling rate of {rate} Hz is impossible")
    if samples.dtype.kind in "iu":
        info = np.iinfo(samples.dtype)
        samples = (samples.astype(np.float64) - (info.max + info.min + 1) // 2) / (
            (info.max - info.min + 1) // 2
        )
    samples_SC = samples.astype(np.float32).reshape(len(samples), -1)
    channels = samples_SC.shape[1]
    if channel is not None and not 0 <= channel < channels:
        raise AudioError(f"{name}: there is no channel {channel}; it has {channels}, from 0")
    # A file that promises more than there is may come out short, but not with rubbish in it.
    if not np.isfinite(samples_SC).all():
        raise AudioError(f"{name}: some samples are not finite numbers")
    wav_S = samples_SC.mean(1) if channel is None else samples_SC[:, channel]
    peak = np.abs(wav_S).max(initial=0.0)
    if peak > 1:
        # A float file may go beyond full scale: quieter is the same speech, clipped is not.
        wav_S = wav_S / peak
    return resample(wav_S, rate, sample_rate)


def resample(wav_S: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """A waveform at another sampling rate (soxr, high quality), float32."""
    if rate != sample_rate:
        import soxr

        wav_S = soxr.resample(wav_S, rate, sample_rate)
    return np.ascontiguousarray(wav_S, dtype=np.float32)


def _read_with_av(source: Any, name: str, error: Exception) -> tuple[np.ndarray, int]:
    """What soundfile does not read, read by ffmpeg's libraries where PyAV is installed."""
    try:
        import av
    except ImportError:
        raise AudioError(
            f"{name}: cannot be read ({_first_line(error)}). Video, m4a and some more need PyAV: "
            "pip install -e '.[media]'"
        ) from None
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    if hasattr(file, "seek"):
        file.seek(0)
    try:
        with av.open(file if hasattr(file, "read") else os.fspath(file)) as container:
            if not container.streams.audio:
                raise AudioError(f"{name}: there is no sound in it")
            stream = container.streams.audio[0]
            rate = stream.rate
            resampler = av.AudioResampler(format="fltp", rate=rate)
            blocks = []
            for frame in container.decode(stream):
                blocks += [part.to_ndarray() for part in resampler.resample(frame)]
            blocks += [part.to_ndarray() for part in resampler.resample(None)]
    except (av.FFmpegError, OSError, ValueError, MemoryError) as av_error:
        if isinstance(av_error, AudioError):
            raise
        raise AudioError(f"{name}: cannot be read ({_first_line(error)})") from None
    if not blocks:
        raise AudioError(f"{name}: there is no sound in it")
    return np.concatenate(blocks, axis=1).T, rate


def _first_line(error: Exception) -> str:
    text = getattr(error, "error_string", "") or str(error)
    return text.strip().split("\n")[0].strip(". ") or "libsndfile refuses it"
