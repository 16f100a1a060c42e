"""Audio of any format, rate and channel count as the waveform that a model takes."""

import contextlib
import io
import itertools
import logging
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
# By the first bytes of a file, what is sought in turn to find where the next recording begins: in
# Ogg a page that begins a stream after one that does not (RFC 3533, section 6), in FLAC a header
# (RFC 9639, section 6).
_JOINTS = {
    b"OggS": (re.compile(rb"OggS\0[\0\1\4\5]"), re.compile(rb"OggS\0[\2\6]\0{8}")),
    b"fLaC": (re.compile(rb"fLaC[\0\x80]\0\0\x22"),),
}
_JOINT_BYTES, _SCANNED_BYTES = 14, 1 << 20
# Behind an odd number of bytes there may be one more.
_WAV_BEGIN = re.compile(rb"\0?(RIFF.{4}WAVE)", re.DOTALL)
# What begins a frame of MP3, and a first frame that has its recording's size in place of sound.
_MP3_FRAME = rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\0-\xef]"
_MP3_SIZE = re.compile(
    _MP3_FRAME
    + rb".(?:..)?(?:.{9}|.{17}|.{32})(?:Xing|Info)\0{3}"
    + rb"(?:[\2\6\x0a\x0e]|[\3\7\x0b\x0f].{4})(.{4})",
    re.DOTALL,
)
_MP3_BEGIN = re.compile(rb"(?:TAG.{125})?(ID3|" + _MP3_FRAME + rb")", re.DOTALL)
# Of MPEG 1, and of MPEG 2 and 2.5, by their numbers in the head of a frame, which begin with 1.
_MP3_KBITS_PER_S = (
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_MP3_RATES = (44100, 48000, 32000)
# A size that is a little too small leaves out fewer frames than this.
_MP3_FRAMES = 8
# A decoder may keep a little to itself at the end of a whole file.
_MAX_MISSING_S = 0.1
# Silence that a container's times ask for; more in one place is a damaged time.
_MIN_GAP_S, _MAX_GAP_S = 0.1, 3600.0
# In a damaged recording it is what was lost, a block of a codec at least.
_MIN_LOSS_S = 0.01
# libsndfile's number for a file whose length nothing tells is the highest of 64 bits.
_KNOWN_FRAMES = 1 << 62
# Sizes from here on stand in headers written before the length was known.
_PLACEHOLDER_BYTES = 0x7FF00000
_CUT_CHUNK = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
# Beyond it one wrong sample makes speech hard to hear.
_LOUD_PEAK = 4.0


class AudioError(ValueError):
    """Audio that cannot be read or used; the message says which and why."""


class _TooLong(AudioError):
    """Audio beyond the duration that is allowed."""


def load_audio(
    source: str | os.PathLike | bytes | IO[bytes],
    sample_rate: int,
    channel: int | None = None,
    *,
    max_duration_s: float | None = None,
) -> np.ndarray:
    """Samples (S,), float32; full scale is 1.

    What can be read of a file that was cut short or damaged is returned, with a warning in the
    log. Recordings that were joined in one Ogg, FLAC, MP3 or WAV file are read one after another.

    Args:
        source: a file's path, its bytes, or an open binary file.
        sample_rate: the model's rate, in Hz; other rates are resampled.
        channel: the channel to take, counted from 0; None mixes all down.
        max_duration_s: the longest recording that is read; None reads any.

    Raises:
        AudioError: the audio is missing, empty, broken, too long, of an impossible rate, or has no
            such channel.
    """
    name, file, size_bytes = _opened(source)
    if size_bytes == 0:
        raise AudioError(f"{name}: the file is empty")

    def waveform(rate: int, channels: int) -> _Waveform:
        return _Waveform(name, rate, channels, sample_rate, channel, max_duration_s)

    try:
        joints = _joints(file)
        if not joints:
            reading = _read(file, name, size_bytes, waveform)
        else:
            reading = _read_parts(_parts(file, joints), name, waveform)
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({_first_line(error)})") from error
    if reading.missing is not None:
        logger.warning("%s: %s", name, reading.missing)
    return reading.found.finish()


def as_waveform(
    samples: np.ndarray,
    rate: int,
    sample_rate: int,
    channel: int | None = None,
    *,
    max_duration_s: float | None = None,
) -> np.ndarray:
    """Samples of any rate and channel count as (S,), float32; full scale is 1.

    Args:
        samples: (S,) or (S, channels), integers or floating point.
        rate: of ``samples``, in Hz.
        sample_rate: wanted, in Hz.
        channel: as in ``load_audio``.
        max_duration_s: as in ``load_audio``.

    Raises:
        AudioError: see ``load_audio``; or samples that are not finite.
    """
    name = "audio"
    samples_SC = with_channels(samples, name)
    channels = samples_SC.shape[1]
    waveform = _Waveform(name, rate, channels, sample_rate, channel, max_duration_s)
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
        max_duration_s: as in ``load_audio``.

    Raises:
        AudioError: see ``as_waveform``.
    """

    def __init__(
        self,
        name: str,
        rate: int,
        channels: int,
        sample_rate: int,
        channel: int | None,
        max_duration_s: float | None,
    ) -> None:
        check_rate(rate, name)
        self.name = name
        self.rate = rate
        self._channel = channel
        self._check_channel(channels)
        self._max_duration_s = max_duration_s
        self._joined_s, self._num_in = 0.0, 0
        # Grows in place where the system can; numpy's arrays do not.
        self._samples = bytearray()
        self._peak = 1.0
        self._resampler: Any = None
        if rate != sample_rate:
            self._resampler = resampler(rate, sample_rate)

    def add(self, block_SC: np.ndarray) -> None:
        """Takes the samples that follow."""
        # Channels may change within a file.
        self._check_channel(block_SC.shape[1])
        self._count(len(block_SC))
        if self._channel is not None:
            block_SC = block_SC[:, self._channel : self._channel + 1]
        wav_S, peak = mixed_down(block_SC, self.name)
        self._peak = max(self._peak, peak)
        self._append(wav_S)

    def add_silence(self, samples: int) -> None:
        """Takes so many zeros."""
        self._count(samples)
        for start in range(0, samples, _BLOCK_VALUES):
            self._append(np.zeros(min(_BLOCK_VALUES, samples - start), np.float32))

    def join(self, other: "_Waveform") -> None:
        """Takes what another one took; nothing can be added then."""
        self._end()
        other._end()
        self._joined_s += other.duration_s
        self._count(0)
        self._peak = max(self._peak, other._peak)
        self._samples += other._samples

    @property
    def duration_s(self) -> float:
        """Of what was taken."""
        return self._joined_s + self._num_in / self.rate

    def finish(self) -> np.ndarray:
        """All samples (S,), float32; full scale is 1."""
        if self._peak > _LOUD_PEAK:
            logger.warning(
                "%s: made quieter by a factor of %.3g, since its samples go so far beyond full "
                "scale",
                self.name,
                self._peak,
            )
        self._end()
        wav_S = np.frombuffer(self._samples, np.float32)
        # A float file may go beyond full scale: quieter is the same speech, clipped is not.
        wav_S *= np.float32(1 / HEADROOM / self._peak)
        return wav_S

    def _check_channel(self, channels: int) -> None:
        if self._channel is not None and not 0 <= self._channel < channels:
            raise AudioError(
                f"{self.name}: there is no channel {self._channel}; it has {channels}, counted "
                "from 0"
            )

    def _count(self, samples: int) -> None:
        self._num_in += samples
        if self._max_duration_s is not None and self.duration_s > self._max_duration_s:
            raise _TooLong(f"{self.name}: is longer than the {self._max_duration_s:g} s allowed")

    def _end(self) -> None:
        self._append(np.zeros(0, np.float32), last=True)
        self._resampler = None

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
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else "audio"
        try:
            content = source.read() if hasattr(source, "read") else None
        # Sockets, archives and whatever else can be read have errors of their own.
        except Exception as error:
            raise AudioError(f"{name}: cannot be read ({_first_line(error)})") from error
        if not isinstance(content, bytes):
            raise AudioError(
                f"audio is {type(source).__name__}; wanted a file's path, its bytes, a file open "
                "for reading in binary mode, or, of transcribe alone, an array of samples"
            )
        return name, _InMemory(content), len(content)
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


def _open(file: Any) -> contextlib.AbstractContextManager[IO[bytes]]:
    """What ``_opened`` gave, from its start."""
    if isinstance(file, bytes):
        return open(file, "rb")
    file.seek(0)
    return contextlib.nullcontext(file)


def _joints(file: Any) -> list[int]:
    """Where in a file recordings begin that were joined to the first, in bytes."""
    with _open(file) as stream:
        start = _tag_bytes(stream)
        stream.seek(start)
        magic = stream.read(4)
        if magic == b"RIFF":
            return _joints_of_wav(stream, start)
        patterns = _JOINTS.get(magic)
        if patterns is None:
            return _joints_of_mp3(stream, start)
        # Past where the first recording begins.
        joints, at, window = [], start + 1, b""
        stream.seek(at)
        wanted = itertools.cycle(patterns)
        pattern = next(wanted)
        while block := stream.read(_SCANNED_BYTES):
            window += block
            while (found := pattern.search(window)) is not None:
                if pattern is patterns[-1]:
                    joints.append(at + found.start())
                at, window = at + found.end(), window[found.end() :]
                pattern = next(wanted)
            searched = max(0, len(window) - _JOINT_BYTES)
            at, window = at + searched, window[searched:]
        return joints


def _joints_of_wav(stream: IO[bytes], start: int) -> list[int]:
    """Where a header follows at once on what the header before says is all of its recording."""
    joints: list[int] = []
    while True:
        stream.seek(start + 4)
        end = start + 8 + int.from_bytes(stream.read(4), "little")
        stream.seek(end)
        begin = _WAV_BEGIN.match(stream.read(13))
        if begin is None:
            return joints
        start = end + begin.start(1)
        joints.append(start)


def _joints_of_mp3(stream: IO[bytes], start: int) -> list[int]:
    """Where audio goes on behind what a first frame says is all of its recording.

    libmpg123 stops there; without such a frame it reads on.
    """
    joints: list[int] = []
    while True:
        stream.seek(start)
        frame = _MP3_SIZE.match(stream.read(256))
        size_bytes = int.from_bytes(frame[1], "big") if frame else 0
        if frame is None or size_bytes < len(frame[0]):
            return joints
        stream.seek(start + size_bytes)
        begin = _MP3_BEGIN.match(stream.read(256))
        if begin is None:
            return joints
        joint = start + size_bytes + begin.start(1)
        if not _begins_mp3(stream, joint):
            return joints
        joints.append(joint)
        stream.seek(joint)
        start = joint + _tag_bytes(stream)


def _begins_mp3(stream: IO[bytes], start: int) -> bool:
    """Whether there is the beginning of a recording: a tag, a size, or frame after frame."""
    stream.seek(start)
    head = stream.read(256)
    if head.startswith(b"ID3") or _MP3_SIZE.match(head):
        return True
    for _ in range(_MP3_FRAMES):
        stream.seek(start)
        head = stream.read(4)
        if not re.match(_MP3_FRAME, head, re.DOTALL) or len(head) < 4:
            return False
        is_second = not head[1] & 8
        bits, rate = head[2] >> 4, head[2] >> 2 & 3
        if not bits or rate == 3:
            return False
        rate_hz = _MP3_RATES[rate] >> (0 if not is_second else 1 if head[1] & 16 else 2)
        bits_per_s = 1000 * _MP3_KBITS_PER_S[is_second][bits - 1]
        start += (72 if is_second else 144) * bits_per_s // rate_hz + (head[2] >> 1 & 1)
    return True


def _tag_bytes(stream: IO[bytes]) -> int:
    """The size of the ID3 tag here, 0 if there is none."""
    head = stream.read(10)
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    return 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))


def _parts(file: Any, joints: list[int]) -> Iterator[_InMemory]:
    """The recordings that were joined in a file."""
    with _open(file) as stream:
        for start, end in itertools.pairwise([0, *joints, None]):
            stream.seek(start)
            yield _InMemory(stream.read(-1 if end is None else end - start))


@dataclass
class _Reading:
    """What a reader found in a file.

    Attributes:
        found: the samples.
        missing: what of the file is not among them, for a message; None if nothing.
        is_damaged: whether the reader did not come to the end.
    """

    found: _Waveform
    missing: str | None
    is_damaged: bool = False


def _read_parts(
    parts: Iterable[_InMemory], name: str, waveform: Callable[[int, int], _Waveform]
) -> _Reading:
    """All recordings that were joined in a file, but for those that cannot be read."""
    whole: _Waveform | None = None
    missing, unreadable = [], []
    number = 0
    for number, part in enumerate(parts, 1):
        try:
            reading = _read(part, name, len(part.getbuffer()), waveform)
        except _TooLong:
            raise
        except AudioError as error:
            unreadable.append(error)
            continue
        if reading.missing is not None:
            missing.append(f"recording {number} of those joined in it is {reading.missing}")
        if whole is None:
            whole = reading.found
        else:
            whole.join(reading.found)
    if whole is None:
        raise unreadable[0]
    if unreadable:
        reason = str(unreadable[0]).removeprefix(f"{name}: ")
        missing.append(
            f"{len(unreadable)} of the {number} recordings joined in it could not be read "
            f"({reason})"
        )
    return _Reading(whole, "; ".join(missing) or None)


def _read(
    file: Any, name: str, size_bytes: int, waveform: Callable[[int, int], _Waveform]
) -> _Reading:
    """A recording, read with what reads most of it."""
    try:
        first = _read_with_soundfile(file, size_bytes, waveform)
    # A TypeError of a file that is called .raw, whatever is in it.
    except (soundfile.SoundFileError, OSError, MemoryError, TypeError) as error:
        return _read_with_av(file, name, _first_line(error), waveform)
    if first.missing is None or not first.is_damaged:
        return first
    if _pyav() is None:
        first.missing = f"{first.missing}. PyAV may read more: pip install -e '.[media]'"
        return first
    try:
        reading = _read_with_av(file, name, "", waveform, is_damaged=True)
    except _TooLong:
        raise
    except AudioError:
        return first
    return reading if reading.found.duration_s > first.found.duration_s else first


def _read_with_soundfile(
    file: Any, size_bytes: int, waveform: Callable[[int, int], _Waveform]
) -> _Reading:
    if hasattr(file, "seek"):
        file.seek(0)
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
                # The decoder does not say how far it came in this block, and fills it with zeros
                # if it came beyond the promised end.
                error = read_error
                in_block = min(int((~np.isnan(block[:, 0])).sum()), audio.frames - count)
            if not in_block:
                break
            found.add(block[:in_block])
            count += in_block
        rate, kind = audio.samplerate, audio.format
    if not count and error is not None:
        raise error
    if not count and kind.startswith("WAV") and size_bytes > 4096:
        raise soundfile.SoundFileRuntimeError("its header says that there is no sound in it")
    # Of a file of unknown length soundfile looks for its place behind the end.
    is_damaged = error is not None and "psf_fseek" not in str(error)
    if (kind == "OGG" and _ends_early(file)) or (is_damaged and not promised):
        missing: str | None = _cut_short(count / rate)
    else:
        missing = _less_than_promised(count / rate, promised / rate)
    return _Reading(found, missing, is_damaged)


def _ends_early(file: Any) -> bool:
    """Whether the last page of an Ogg stream is not marked as the last (RFC 3533, section 6)."""
    with _open(file) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _MAX_OGG_PAGE_BYTES))
        page = stream.read().rpartition(b"OggS")[2]
    return len(page) < 2 or not page[1] & 4


def _pyav() -> Any:
    """PyAV; None where it is not installed."""
    try:
        import av
    except ImportError:
        return None
    return av


def _read_with_av(
    file: Any,
    name: str,
    reason: str,
    waveform: Callable[[int, int], _Waveform],
    is_damaged: bool = False,
) -> _Reading:
    """What soundfile does not read, read by ffmpeg's libraries where PyAV is installed.

    Args:
        file: as ``_opened`` gives it.
        name: of the audio, for messages.
        reason: why soundfile does not read it.
        waveform: makes what takes the samples, of their rate and channel count.
        is_damaged: whether soundfile read some of it, up to where it is damaged.

    Raises:
        AudioError: it cannot be read either.
    """
    av = _pyav()
    if av is None:
        raise AudioError(
            f"{name}: cannot be read ({reason}). Video, m4a and some more need PyAV: "
            "pip install -e '.[media]'"
        )
    if hasattr(file, "seek"):
        file.seek(0)
    found: _Waveform | None = None
    promised_s = silent_s = failed_s = 0.0
    is_cut = is_ogg = False

    def take(parts: list[Any]) -> None:
        nonlocal found
        for part in parts:
            block_SC = part.to_ndarray().reshape(part.samples, -1)
            found = found or waveform(rate, block_SC.shape[1])
            found.add(block_SC)

    try:
        path_or_file = os.fsdecode(file) if isinstance(file, bytes) else file
        with av.open(path_or_file, options={"format_whitelist": _CONTAINERS}) as container:
            is_ogg = container.format.name == "ogg"
            if not container.streams.audio:
                raise _NoSound
            stream = container.streams.audio[0]
            if stream.codec_context is None or not stream.rate:
                raise ValueError("an unknown codec")
            rate = stream.rate
            begin_s = (container.start_time or 0) / av.time_base
            longest_s = container.duration / av.time_base if container.duration else math.inf
            if stream.duration and stream.time_base:
                promised_s = float(stream.duration * stream.time_base)
            if stream.codec_context.name == "flac":
                # Else damaged blocks are noise.
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            resampler = resampled_kind = None
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    is_damaged = True
                    failed_s += float((packet.duration or 0) * (packet.time_base or 0))
                    continue
                for frame in frames:
                    if frame.time is not None:
                        # The sound of a video may begin later than it, or have a gap.
                        at_s = min(frame.time - begin_s, longest_s)
                        gap_s = at_s - (found.duration_s if found else 0.0)
                        if (_MIN_LOSS_S if is_damaged else _MIN_GAP_S) < gap_s < _MAX_GAP_S:
                            found = found or waveform(rate, len(frame.layout.channels))
                            found.add_silence(round(gap_s * rate))
                            silent_s += gap_s if is_damaged else 0.0
                    kind = frame.format.name, frame.layout.name, frame.sample_rate
                    if kind != resampled_kind:
                        resampled_kind = kind
                        take(resampler.resample(None) if resampler else [])
                        # Interleaved: of eight channels in a plane each, PyAV 18 reads a ninth,
                        # and crashes.
                        resampler = av.AudioResampler(format="flt", rate=rate)
                    take(resampler.resample(frame))
            take(resampler.resample(None) if resampler else [])
    except AudioError:
        raise
    except (av.FFmpegError, OSError, ValueError, MemoryError):
        is_cut = True
    except _NoSound:
        pass
    if found is None:
        if is_cut or is_damaged:
            raise AudioError(f"{name}: cannot be read ({reason})")
        raise AudioError(f"{name}: there is no sound in it")
    lost_s = max(silent_s + max(promised_s - found.duration_s, 0.0), failed_s)
    if is_damaged and lost_s > 0.0:
        missing: str | None = f"cut short or damaged: {lost_s:.2f} s could not be read"
    else:
        missing = _less_than_promised(found.duration_s, promised_s)
        if missing is None and (is_cut or (is_ogg and _ends_early(file))):
            missing = _cut_short(found.duration_s)
    return _Reading(found, missing)


class _NoSound(Exception):
    """A container without a stream of audio."""


def _less_than_promised(found_s: float, promised_s: float) -> str | None:
    if promised_s - found_s <= _MAX_MISSING_S:
        return None
    return (
        f"cut short or damaged: {found_s:.1f} s could be read of the {promised_s:.1f} s that its "
        "header promises"
    )


def _cut_short(found_s: float) -> str:
    return f"cut short: {found_s:.1f} s could be read, and what follows is missing"


def _first_line(error: Exception) -> str:
    text = getattr(error, "error_string", "") or str(error)
    return text.strip().split("\n")[0].strip(". ") or "libsndfile refuses it"
