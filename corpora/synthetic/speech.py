"""Text to speech by espeak-ng, the same samples every time.

espeak-ng draws from a generator that it never resets, so what it says depends on all that it said
before in the same process. Each voice therefore speaks in a process of its own, its sentences in
their order.
"""

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SCRIPT = Path(__file__).with_name("speaker_process.py")


class Prompt(NamedTuple):
    """One thing to say, and how: espeak-ng's pitch (0 to 99) and words per minute."""

    text: str
    pitch: int
    words_per_minute: int


def require_espeak() -> None:
    """Raise a `RuntimeError` that names the installation command, if espeak-ng is missing."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise RuntimeError(
            "the synthetic corpus is spoken by espeak-ng, which is not installed:"
            " pip install -e '.[demo]' (or pip install espeakng-loader)"
        )


def speak(voice: str, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Say some sentences with one voice.

    Args:
        voice: espeak-ng's name, such as ``en-us+f3``.
        prompts: what to say; another list may change the noise in the sounds of a sentence.

    Returns:
        int16 samples at `speaker_process.SAMPLE_RATE`, one array for each prompt.

    Raises:
        RuntimeError: espeak-ng is missing or has no such voice.
    """
    require_espeak()
    job = json.dumps({"voice": voice, "prompts": prompts})
    done = subprocess.run(
        [sys.executable, str(_SCRIPT)], input=job.encode(), capture_output=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"espeak-ng could not speak as {voice}: {reason}")
    utterances, place = [], 0
    while place < len(done.stdout):
        (num_samples,) = struct.unpack_from("=I", done.stdout, place)
        place += 4
        utterances.append(np.frombuffer(done.stdout, np.int16, num_samples, place))
        place += 2 * num_samples
    assert len(utterances) == len(prompts)
    return utterances
