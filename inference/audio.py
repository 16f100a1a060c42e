"""Audio of any format, rate and channel count as the waveform that a model takes."""

import contextlib
import io
import itertools
import logging
import numbers
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile

logger = logging.getLogger(__name__)

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 100, 655_350
"""In Hz. The highest is what FLAC can name; below the lowest there is no speech."""

MAX_CHANNELS = 1024
"""What libsndfile reads. An array with more has its axes the other way round."""

MEDIA_SUFFIXES = frozenset(
    {".3gp", ".aac", ".amr", ".avi", ".m4a", ".m4b", ".mkv", ".mov", ".mp4", ".webm", ".wma"}
)
"""Of files that PyAV reads and soundfile does not, in small letters."""

# Demuxers that read nothing but the file itself: a playlist would have them open others.
_CONTAINERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,mp3,mpeg,"
    "mpegts,ogg,rm,tta,w64,wav,wv"
)
_BLOCK_VALUES = 1 << 20
HEADROOM = 2.0**-40
"""What blocks are multiplied by meanwhile: sums of float32's greatest numbers stay numbers."""

_MAX_OGG_PAGE_BYTES = 65_307
# A decoder may keep a little to itself at the end of a whole file.
_MAX_MISSING_S = 0.1
# Silence that a container's times ask for; more in one place is a damaged time.
_MIN_GAP_S, _MAX_GAP_S = 0.1, 3600.0
# libsndfile's number for a file whose length nothing tells is the highest of 64 bits.
_KNOWN_FRAMES = 1 << 62
# Sizes from here on stand in headers written before the length was known.
_PLACEHOLDER_BYTES = 0x7FF00000
_CUT_CHUNK = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")


class AudioError(ValueError):
    """Audio that cannot be read or used; the message says which and why."""


def load_audio(
    source: str | os.PathLike | bytes | IO[bytes], sample_rate: int, channel: int | None = None
) -> np.ndarray:
    """Samples (S,), float32; full scale is 1.

    What can be read of a file that was cut short is returned, with a warning in the log.

    Args:
        source: a file's path, its bytes, or an open binary file.
        sample_rate: the model's rate, in Hz; other rates are resampled.
        channel: the channel to take, counted from 0; None mixes all down.

    Raises:
        AudioError: the audio is missing, empty, broken, of an impossible rate, or has no such
            channel.
    """
    name, file, size_bytes = _opened(source)
    if size_bytes == 0:
        raise AudioError(f"{name}: the file is empty")

    def waveform(rate: int, channels: int) -> _Waveform:
        return _Waveform(name, rate, channels, sample_rate, channel)

    try:
        return _read_with_soundfile(file, name, size_bytes, waveform)
    # A TypeError of a file that is called .raw, whatever is in it.
    except (soundfile.SoundFileError, OSError, MemoryError, TypeError) as error:
        return _read_with_av(file, name, error, waveform)


def as_waveform(
    samples: np.ndarray,
    rate: int,
    sample_rate: int,
    name: str = "audio",
    channel: int | None = None,
) -> np.ndarray:
    """Samples of any rate and channel count as (S,), float32; full scale is 1.

    Args:
        samples: (S,) or (S, channels), integers or floating point.
        rate: of ``samples``, in Hz.
        sample_rate: wanted, in Hz.
        name: of the audio, for messages.
        channel: as in ``load_audio``.

    Raises:
        AudioError: see ``load_audio``; or samples that are not finite.
    """
    samples_SC = with_channels(samples, name)
    channels = samples_SC.shape[1]
    waveform = _Waveform(name, rate, channels, sample_rate, channel)
    step = max(1, _BLOCK_VALUES // max(1, channels))
    for start in range(0, len(samples_SC), step):
        waveform.add(samples_SC[start : start + step])
    return waveform.finish()


def with_channels(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples (S,) or (S, channels) as (S, channels).

    Raises:
        AudioError: they have another shape, or are no numbers.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or 0 in samples.shape[1:] or samples.dtype.kind not in "iuf":
        raise AudioError(
            f"{name}: samples are {samples.dtype} of shape {samples.shape}; wanted numbers of "
            "shape (S,) or (S, channels)"
        )
    if samples.ndim == 2 and samples.shape[1] > MAX_CHANNELS:
        raise AudioError(
            f"{name}: samples of shape {samples.shape} would have {samples.shape[1]} channels; "
            "wanted (S, channels): give their transpose"
        )
    return samples[:, None] if samples.ndim == 1 else samples


def check_rate(rate: float, name: str) -> None:
    """Checks a sampling rate.

    Raises:
        AudioError: no recording has it.
    """
    is_number = isinstance(rate, numbers.Real)
    if not (is_number and MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE):
        raise AudioError(
            f"{name}: a sampling rate of {rate} Hz is impossible; it is between "
            f"{MIN_SAMPLE_RATE} and {MAX_SAMPLE_RATE} Hz"
        )


def resampler(rate: float, sample_rate: int) -> Any:
    """A stream of soxr's, whose ``resample_chunk`` takes and gives float32."""
    import soxr

    # Computed in double precision, so that one that starts anew, later, gives the same.
    return soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality="VHQ")


def mixed_down(block_SC: np.ndarray, name: str) -> tuple[np.ndarray, float]:
    """Samples (S,), float32, full scale being ``HEADROOM``, and the highest in full scales.

    Raises:
        AudioError: some samples are not finite.
    """
    if block_SC.dtype.kind in "iu":
        info = np.iinfo(block_SC.dtype)
        zero, full_scale = (info.max + info.min + 1) // 2, (info.max - info.min + 1) // 2
        block_SC = (block_SC.astype(np.float64) - zero) / full_scale
    peak = np.abs(block_SC).max(initial=0.0)
    if not peak <= np.finfo(np.float32).max:
        raise AudioError(f"{name}: some samples are not finite numbers")
    return (block_SC.astype(np.float32) * np.float32(HEADROOM)).mean(1), float(peak)


class _Waveform:
    """Samples of any rate and channel count, block by block, as those that a model takes.

    What is kept is the result: two hours of stereo would take gigabytes. It is in one piece from
    the start, since a copy of all blocks would double it.

    Args:
        name: of the audio, for messages.
        rate: of the blocks, in Hz.
        channels: of the blocks.
        sample_rate: wanted, in Hz.
        channel: as in ``load_audio``.

    Raises:
        AudioError: see ``as_waveform``.
    """

    def __init__(
        self, name: str, rate: int, channels: int, sample_rate: int, channel: int | None
    ) -> None:
        check_rate(rate, name)
        if channel is not None and not 0 <= channel < channels:
            raise AudioError(
                f"{name}: there is no channel {channel}; it has {channels}, counted from 0"
            )
        self.name = name
        self.rate = rate
        self._channels = slice(None) if channel is None else slice(channel, channel + 1)
        # Grows in place where the system can; numpy's arrays do not.
        self._samples = bytearray()
        self._peak = 1.0
        self._resampler: Any = None
        if rate != sample_rate:
            self._resampler = resampler(rate, sample_rate)

    def add(self, block_SC: np.ndarray) -> None:
        """Takes the samples that follow."""
        wav_S, peak = mixed_down(block_SC[:, self._channels], self.name)
        self._peak = max(self._peak, peak)
        self._append(wav_S)

    def add_silence(self, samples: int) -> None:
        """Takes so many zeros."""
        for start in range(0, samples, _BLOCK_VALUES):
            self._append(np.zeros(min(_BLOCK_VALUES, samples - start), np.float32))

    def finish(self) -> np.ndarray:
        """All samples (S,), float32; full scale is 1."""
        self._append(np.zeros(0, np.float32), last=True)
        wav_S = np.frombuffer(self._samples, np.float32)
        # A float file may go beyond full scale: quieter is the same speech, clipped is not.
        wav_S *= np.float32(1 / HEADROOM / self._peak)
        return wav_S

    def _append(self, wav_S: np.ndarray, last: bool = False) -> None:
        if self._resampler is not None:
            wav_S = self._resampler.resample_chunk(wav_S, last)
        self._samples += wav_S.tobytes()


class _InMemory(io.BytesIO):
    """A file's bytes; a seek to nowhere, which a broken header asks for, leads to the start.

    libsndfile calls it from C, where an exception would only be printed.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return super().seek(0)


def _opened(source: Any) -> tuple[str, Any, int]:
    """A name for messages, what the readers take, and its size in bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "audio", _InMemory(source), len(source)
    if not isinstance(source, (str, os.PathLike)):
        content = source.read() if hasattr(source, "read") else None
        if not isinstance(content, bytes):
            raise AudioError(
                f"audio is {type(source).__name__}; wanted a file's path, its bytes, a file open "
                "for reading in binary mode, or, of transcribe alone, an array of samples"
            )
        name = getattr(source, "name", None)
        return name if isinstance(name, str) else "audio", _InMemory(content), len(content)
    path = Path(source)
    try:
        if path.is_dir():
            raise AudioError(f"{source}: is a folder")
        with open(path, "rb") as stream:
            if not path.is_file():
                # A named pipe cannot go back, as the readers want to.
                content = stream.read()
                return str(source), _InMemory(content), len(content)
        # As bytes, since soundfile would encode a name that is no text.
        return str(source), os.fsencode(path.absolute()), path.stat().st_size
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise AudioError(f"{source}: {reason}") from None
    except ValueError as error:
        raise AudioError(f"{str(source)!r}: is no name of a file ({error})") from None


def _read_with_soundfile(
    file: Any, name: str, size_bytes: int, waveform: Callable[[int, int], "_Waveform"]
) -> np.ndarray:
    with soundfile.SoundFile(file) as audio:
        promised = audio.frames if audio.frames < _KNOWN_FRAMES else 0
        for held_bytes_text, read_bytes_text in _CUT_CHUNK.findall(audio.extra_info):
            held_bytes, read_bytes = int(held_bytes_text), int(read_bytes_text)
            if read_bytes and held_bytes < _PLACEHOLDER_BYTES:
                promised = max(promised, audio.frames * held_bytes // read_bytes)
        found = waveform(audio.samplerate, audio.channels)
        count, error = 0, None
        while error is None:
            block = np.full(
                (max(1, _BLOCK_VALUES // audio.channels), audio.channels), np.nan, np.float32
            )
            try:
                in_block = len(audio.read(out=block))
            except soundfile.SoundFileError as read_error:
                # The decoder does not say how far it came in this block.
                error = read_error
                in_block = int((~np.isnan(block[:, 0])).sum())
            if not in_block:
                break
            found.add(block[:in_block])
            count += in_block
        rate, kind = audio.samplerate, audio.format
    if not count and error is not None:
        raise error
    if not count and kind.startswith("WAV") and size_bytes > 4096:
        raise soundfile.SoundFileRuntimeError("its header says that there is no sound in it")
    if kind == "OGG" and _ends_early(file):
        logger.warning(
            "%s: cut short: %.1f s could be read, and what follows is missing", name, count / rate
        )
    _warn_of_missing(name, count / rate, promised / rate)
    return found.finish()


def _ends_early(file: Any) -> bool:
    """Whether the last page of an Ogg stream is not marked as the last (RFC 3533, section 6)."""
    with open(file, "rb") if isinstance(file, bytes) else contextlib.nullcontext(file) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _MAX_OGG_PAGE_BYTES))
        page = stream.read().rpartition(b"OggS")[2]
    return len(page) < 2 or not page[1] & 4


def _read_with_av(
    file: Any, name: str, error: Exception, waveform: Callable[[int, int], "_Waveform"]
) -> np.ndarray:
    """What soundfile does not read, read by ffmpeg's libraries where PyAV is installed."""
    try:
        import av
    except ImportError:
        raise AudioError(
            f"{name}: cannot be read ({_first_line(error)}). Video, m4a and some more need PyAV: "
            "pip install -e '.[media]'"
        ) from None
    if hasattr(file, "seek"):
        file.seek(0)
    found: _Waveform | None = None
    count, promised_s = 0, 0.0
    try:
        path_or_file = os.fsdecode(file) if isinstance(file, bytes) else file
        with av.open(path_or_file, options={"format_whitelist": _CONTAINERS}) as container:
            if not container.streams.audio:
                raise _NoSound
            stream = container.streams.audio[0]
            if stream.codec_context is None or not stream.rate:
                raise ValueError("an unknown codec")
            rate = stream.rate
            begin_s = (container.start_time or 0) / av.time_base
            longest_s = (container.duration or 0) / av.time_base
            if stream.duration and stream.time_base:
                promised_s = float(stream.duration * stream.time_base)
            # Interleaved: of eight channels in a plane each, PyAV 18 reads a ninth, and crashes.
            resampler = av.AudioResampler(format="flt", rate=rate)
            for frame in itertools.chain(container.decode(stream), [None]):
                if frame is not None and frame.time is not None:
                    # The sound of a video may begin later than it, or have a gap.
                    at_s = min(frame.time - begin_s, longest_s)
                    missing = round((at_s - count / rate) * rate)
                    if _MIN_GAP_S * rate < missing < _MAX_GAP_S * rate:
                        found = found or waveform(rate, len(frame.layout.channels))
                        found.add_silence(missing)
                        count += missing
                for part in resampler.resample(frame):
                    block_SC = part.to_ndarray().reshape(part.samples, -1)
                    found = found or waveform(rate, block_SC.shape[1])
                    found.add(block_SC)
                    count += len(block_SC)
    except AudioError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError):
        if found is None:
            raise AudioError(f"{name}: cannot be read ({_first_line(error)})") from None
    except _NoSound:
        pass
    if found is None:
        raise AudioError(f"{name}: there is no sound in it")
    _warn_of_missing(name, count / found.rate, promised_s)
    return found.finish()


class _NoSound(Exception):
    """A container without a stream of audio."""


def _warn_of_missing(name: str, found_s: float, promised_s: float) -> None:
    if promised_s - found_s > _MAX_MISSING_S:
        logger.warning(
            "%s: cut short or damaged: %.1f s could be read of the %.1f s that its header promises",
            name,
            found_s,
            promised_s,
        )


def _first_line(error: Exception) -> str:
    text = getattr(error, "error_string", "") or str(error)
    return text.strip().split("\n")[0].strip(". ") or "libsndfile refuses it"
