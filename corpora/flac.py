"""What a FLAC file says about itself, and whether that is true.

A preparation asks two numbers of hundreds of thousands of files. They stand at a fixed place in the
first 42 bytes (RFC 9639, section 8.2), so reading those bytes is all that it costs.
"""

import hashlib
import os
from typing import NamedTuple

import soundfile

_HEADER_BYTES = 42
_DECODE_BLOCK_SAMPLES = 1 << 18
_NO_MD5 = bytes(16)


class FlacError(ValueError):
    """A file that is not usable FLAC audio; the message is the reason."""


class StreamInfo(NamedTuple):
    """The STREAMINFO block. ``num_samples`` counts per channel and is 0 where unknown."""

    sample_rate: int
    channels: int
    bits_per_sample: int
    num_samples: int
    md5: bytes


def parse_stream_info(head: bytes) -> StreamInfo:
    """Read the STREAMINFO block from the beginning of a file.

    Args:
        head: the first 42 bytes.

    Raises:
        FlacError: the bytes are not the beginning of a FLAC file.
    """
    if not head:
        raise FlacError("empty file")
    if head[:4] != b"fLaC":
        raise FlacError(f"unreadable: not a FLAC file (begins with {head[:4]!r})")
    if len(head) < _HEADER_BYTES:
        raise FlacError(f"unreadable: ends within its header, after {len(head)} bytes")
    if head[4] & 0x7F != 0 or int.from_bytes(head[5:8], "big") != 34:
        raise FlacError("unreadable: damaged FLAC header (no STREAMINFO block)")
    packed = int.from_bytes(head[18:26], "big")
    info = StreamInfo(
        sample_rate=packed >> 44,
        channels=((packed >> 41) & 0x7) + 1,
        bits_per_sample=((packed >> 36) & 0x1F) + 1,
        num_samples=packed & ((1 << 36) - 1),
        md5=head[26:42],
    )
    if info.sample_rate == 0:
        raise FlacError("unreadable: damaged FLAC header (sampling rate 0)")
    return info


def read_stream_info(path: str) -> StreamInfo:
    """Read the STREAMINFO block of a file: one open, one read of 42 bytes.

    Raises:
        FlacError: the file is no FLAC file, or cannot be opened.
    """
    # os.open rather than open(): building Python's stream objects costs more than the read.
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            head = os.read(descriptor, _HEADER_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FlacError(f"unreadable: {error.strerror}") from error
    return parse_stream_info(head)


def check_flac(path: str, size_bytes: int, sample_rate: int, verify: bool = False) -> int:
    """Number of samples of a mono FLAC file, which is checked on the way.

    Args:
        path: the file.
        size_bytes: its size as the folder's listing gives it.
        sample_rate: the rate wanted, in Hz.
        verify: decode the whole file, and compare the decoded number of samples and (16-bit audio)
            the MD5 of the decoded samples with what the header says.

    Raises:
        FlacError: empty, unreadable, wrongly sampled, not mono, without a number of samples, or
            (``verify``) cut short or damaged.
    """
    if size_bytes == 0:
        raise FlacError("empty file")
    info = read_stream_info(path)
    if info.sample_rate != sample_rate:
        raise FlacError(f"wrongly sampled: {info.sample_rate} Hz instead of {sample_rate} Hz")
    if info.channels != 1:
        raise FlacError(f"{info.channels} channels instead of one")
    if info.num_samples == 0:
        # An encoder that writes to a pipe cannot go back to fill it in; libsndfile, with which
        # training reads, then cannot load the file.
        raise FlacError("empty, or of unknown length: its header says 0 samples; encode it again")
    if size_bytes <= _HEADER_BYTES:
        raise FlacError("cut short: nothing follows its header")
    if verify:
        _decode(path, info)
    return info.num_samples


def _decode(path: str, info: StreamInfo) -> None:
    compares_md5 = info.bits_per_sample == 16 and info.md5 != _NO_MD5
    digest = hashlib.md5(usedforsecurity=False)
    num_samples = 0
    try:
        with soundfile.SoundFile(path) as audio:
            while len(block := audio.read(_DECODE_BLOCK_SAMPLES, dtype="int16")):
                num_samples += len(block)
                if compares_md5:
                    digest.update(block.astype("<i2", copy=False).tobytes())
    except (soundfile.SoundFileError, OSError) as error:
        raise FlacError(f"damaged: {error}") from error
    if num_samples < info.num_samples:
        raise FlacError(
            f"cut short: {num_samples} samples instead of the {info.num_samples} of its header"
        )
    if compares_md5 and digest.digest() != info.md5:
        raise FlacError("damaged: its samples do not give the MD5 of its header")
