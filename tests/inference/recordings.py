"""Recordings to be read, good ones and bad ones."""

import struct
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16000


def tone(duration_s: float = 1.0, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A tone with some noise (S,), float32, peaks near 0.4."""
    time_s = np.arange(round(duration_s * sample_rate)) / sample_rate
    noise = np.random.default_rng(0).standard_normal(time_s.size)
    return (0.3 * np.sin(2 * np.pi * 220 * time_s) + 0.02 * noise).astype(np.float32)


def wav_bytes(data: bytes, *, claimed: int | None = None, is_float: bool = False) -> bytes:
    """A mono WAV file made by hand, whose header may claim another size of its data."""
    claimed = len(data) if claimed is None else claimed
    width = 4 if is_float else 2
    layout = (3 if is_float else 1, 1, SAMPLE_RATE, SAMPLE_RATE * width, width, 8 * width)
    chunks = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, *layout)
    chunks += b"data" + struct.pack("<I", claimed) + data
    riff_bytes = min(len(chunks) - len(data) + claimed, 0xFFFFFFFF)
    return b"RIFF" + struct.pack("<I", riff_bytes) + chunks


def cut(path: Path, source: Path, share: float = 0.5) -> Path:
    """Write the first part of a file's bytes."""
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def flac_with_total(content: bytes, total_samples: int) -> bytes:
    """A FLAC file whose header has another number of samples; 0 is unknown."""
    # STREAMINFO: 36 bits after rate, channels and width (RFC 9639, section 8.2).
    fields = int.from_bytes(content[18:26], "big") >> 36 << 36 | total_samples
    return content[:18] + fields.to_bytes(8, "big") + content[26:]


def flac_claiming(path: Path, total_samples: int) -> Path:
    """A FLAC file of one second whose header has another number of samples."""
    soundfile.write(path, tone(), SAMPLE_RATE)
    path.write_bytes(flac_with_total(path.read_bytes(), total_samples))
    return path


def make_video(path: Path, layout: str | None = "mono") -> Path:
    """Half a second of black, with a tone in every channel or without sound; needs PyAV."""
    import av

    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        if layout:
            sound = container.add_stream("aac", rate=44100, layout=layout)
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if layout:
            num_channels = av.AudioLayout(layout).nb_channels
            samples = np.repeat(tone(0.5, 44100), num_channels)[None]
            block = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
            block.sample_rate, block.pts = 44100, 0
            container.mux(sound.encode(block))
            container.mux(sound.encode(None))
    return path
