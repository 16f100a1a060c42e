"""What happens to speech between a mouth and a file: echoes, noise, distance."""

import numpy as np
from scipy.signal import fftconvolve, resample_poly


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Change the sampling rate; int16 in, float64 between -1 and 1 out."""
    divisor = np.gcd(rate, new_rate)
    return resample_poly(samples / 32768.0, new_rate // divisor, rate // divisor)


def reverberate(
    speech: np.ndarray,
    sample_rate: int,
    rt60_s: float,
    direct_to_reverberant_db: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Speech in a room whose echoes are noise that decays exponentially.

    Args:
        speech: (samples,), its end is kept: the result is as long as the input.
        sample_rate: in Hz.
        rt60_s: time in which the echoes fall by 60 dB.
        direct_to_reverberant_db: energy of the direct sound over that of the echoes.
        generator: draws the echoes.
    """
    time_s = np.arange(1, round(rt60_s * sample_rate)) / sample_rate
    echoes = generator.standard_normal(len(time_s)) * 10 ** (-3 * time_s / rt60_s)
    echoes *= 10 ** (-direct_to_reverberant_db / 20) / np.sqrt(np.sum(echoes**2))
    response = np.concatenate([[1.0], echoes])
    return fftconvolve(speech, response)[: len(speech)]


def coloured_noise(num_samples: int, slope: float, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose power falls with frequency as ``f ** -slope``, of unit power.

    Slope 0 is white, 1 pink, 2 brown noise.
    """
    spectrum = np.fft.rfft(generator.standard_normal(num_samples))
    frequency = np.arange(len(spectrum), dtype=float)
    frequency[0] = np.inf  # no constant part
    noise = np.fft.irfft(spectrum * frequency ** (-slope / 2), num_samples)
    return noise / np.sqrt(np.mean(noise**2))


def add_noise(
    speech: np.ndarray, snr_db: float, slope: float, generator: np.random.Generator
) -> np.ndarray:
    """Speech with coloured noise at a signal-to-noise ratio, both measured over the whole."""
    noise = coloured_noise(len(speech), slope, generator)
    return speech + noise * np.sqrt(np.mean(speech**2)) * 10 ** (-snr_db / 20)


def set_level(speech: np.ndarray, level_db: float) -> np.ndarray:
    """Scale to a root mean square in dB below full scale, or less where peaks would clip."""
    gain = 10 ** (level_db / 20) / np.sqrt(np.mean(speech**2))
    return speech * min(gain, 0.99 / np.max(np.abs(speech)))
