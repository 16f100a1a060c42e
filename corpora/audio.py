"""Reading recordings: what is wrong with one is said with its utterance."""

import numpy as np
import soundfile

from common.errors import UserError


def read_audio(
    wav: str, utterance_id: str, sample_rate: int, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Samples (S,) of a mono recording, float32.

    Args:
        start, stop: samples; by default all of it.

    Raises:
        UserError: the file cannot be read, has another rate or more channels.
    """
    try:
        samples, rate = soundfile.read(wav, start=start, stop=stop, dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{utterance_id}: {wav} cannot be read: {error}") from None
    if rate != sample_rate or samples.ndim != 1:
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        raise UserError(
            f"{utterance_id}: {wav} has {rate} Hz and {channels} channel(s); "
            f"{sample_rate} Hz mono is needed."
        )
    return samples
