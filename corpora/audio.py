"""Reading recordings in any format of libsndfile: what is wrong with one is said with its name."""

import numpy as np
import soundfile

from common.errors import UserError

AUDIO_SUFFIXES = frozenset(
    {".aif", ".aiff", ".au", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".sph", ".w64", ".wav"}
)
"""Of files that are taken for recordings, in small letters."""

_DECODE_BLOCK_SAMPLES = 1 << 18
# libsndfile's number for a file whose length nothing tells.
_UNKNOWN_FRAMES = 2**63 - 1


class AudioFileError(ValueError):
    """A file that is no usable recording; the message is the reason."""


def check_audio(
    path: str, size_bytes: int, sample_rate: int, verify: bool = False, *, resample: bool = False
) -> int:
    """Number of samples of a mono recording at ``sample_rate``; its header is checked on the way.

    Args:
        path: the file.
        size_bytes: its size as the folder's listing gives it.
        sample_rate: the rate wanted, in Hz.
        verify: decode the whole file, and compare the number of samples with the header's.
        resample: recordings of other rates are taken, to be read with ``resample``.

    Raises:
        AudioFileError: empty, unreadable, wrongly sampled, not mono, without a number of samples,
            or (``verify``) cut short, damaged or with samples that are not finite.
    """
    if size_bytes == 0:
        raise AudioFileError("empty file")
    try:
        with soundfile.SoundFile(path) as audio:
            if audio.samplerate != sample_rate and not resample:
                raise AudioFileError(
                    f"wrongly sampled: {audio.samplerate} Hz instead of {sample_rate} Hz "
                    "(--resample True takes it)"
                )
            if audio.channels != 1:
                raise AudioFileError(f"{audio.channels} channels instead of one")
            if not 0 < audio.frames < _UNKNOWN_FRAMES:
                # An encoder that writes to a pipe cannot go back to fill it in.
                raise AudioFileError(
                    "empty, or of unknown length: its header says no number of samples; encode it "
                    "again"
                )
            if verify:
                _decode(audio)
            return round(audio.frames * sample_rate / audio.samplerate)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioFileError(f"unreadable: {_reason(error, path)}") from error


def read_audio(
    wav: str,
    utterance_id: str,
    sample_rate: int,
    start: int = 0,
    stop: int | None = None,
    *,
    resample: bool = False,
) -> np.ndarray:
    """Samples (S,) of a mono recording, float32.

    Args:
        start, stop: samples at ``sample_rate``; by default all of it.
        resample: from any other rate.

    Raises:
        UserError: the file cannot be read, has another rate or more channels, or samples that are
            not finite.
    """
    try:
        samples, rate = soundfile.read(wav, start=start, stop=stop, dtype="float32")
        if rate != sample_rate and resample and samples.ndim == 1:
            import soxr

            whole, rate = soundfile.read(wav, dtype="float32")
            samples, rate = soxr.resample(whole, rate, sample_rate)[start:stop], sample_rate
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise UserError(f"{utterance_id}: {wav} cannot be read: {_reason(error, wav)}") from None
    if rate != sample_rate or samples.ndim != 1:
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        hint = (
            ""
            if rate == sample_rate
            else f" Resample with --resample True, or train at that rate: --sample_rate {rate}."
        )
        raise UserError(
            f"{utterance_id}: {wav} has {rate} Hz and {channels} channel(s); "
            f"{sample_rate} Hz mono is needed.{hint}"
        )
    if not np.isfinite(samples).all():
        raise UserError(
            f"{utterance_id}: {wav}: some samples are not finite numbers. Write it again, or leave "
            "it out; --verify of librispeech_prepare.py or corpora.prepare lists all such files."
        )
    return samples


def _decode(audio: soundfile.SoundFile) -> None:
    num_samples = 0
    kind = "float32" if audio.subtype in ("FLOAT", "DOUBLE") else "int16"
    try:
        while len(block := audio.read(_DECODE_BLOCK_SAMPLES, dtype=kind)):
            if not np.isfinite(block).all():
                raise AudioFileError("some samples are not finite numbers")
            num_samples += len(block)
    except soundfile.SoundFileError as error:
        raise AudioFileError(f"cut short or damaged: {_reason(error)}") from error
    if num_samples < audio.frames:
        raise AudioFileError(
            f"cut short: {num_samples} samples instead of the {audio.frames} of its header"
        )


def _reason(error: Exception, path: str | None = None) -> str:
    """What stands in the way of reading; libsndfile itself calls much of it a system error."""
    if path is not None:
        try:
            with open(path, "rb"):
                pass
        except OSError as system_error:
            return system_error.strerror
    text = getattr(error, "error_string", "") or str(error)
    return text.strip() or f"libsndfile error {getattr(error, 'code', '')}".strip()
