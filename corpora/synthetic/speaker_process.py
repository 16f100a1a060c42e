"""The process in which one voice speaks: a script without dependencies, so that it starts quickly.

Reads a job in JSON, ``{"voice": name, "prompts": [[text, pitch, words_per_minute], ...]}``, and
writes for each prompt a 32-bit number of samples and the samples, 16 bits each, both in the
machine's byte order.
"""

import array
import ctypes
import json
import struct
import sys

SAMPLE_RATE = 22050

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PARAMETER_RATE, _PARAMETER_VOLUME, _PARAMETER_PITCH = 1, 2, 3
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1
# Of 100: some voices clip at full volume.
_VOLUME = 60


class _Espeak:
    """espeak-ng through its C interface (speak_lib.h)."""

    def __init__(self, voice: str):
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._samples = array.array("h")
        data_path = espeakng_loader.get_data_path().encode()
        rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
        if rate != SAMPLE_RATE:
            raise RuntimeError(f"it starts with {rate} Hz instead of {SAMPLE_RATE} Hz")
        # The reference keeps the callback alive as long as the library may call it.
        self._callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError("it has no such voice")
        self._library.espeak_SetParameter(_PARAMETER_VOLUME, _VOLUME, 0)

    def say(self, text: str, pitch: int, words_per_minute: int) -> bytes:
        del self._samples[:]
        self._library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        content = text.encode()
        failed = self._library.espeak_Synth(
            content,
            ctypes.c_size_t(len(content) + 1),
            0,
            _POSITION_CHARACTER,
            0,
            _CHARACTERS_UTF8,
            None,
            None,
        )
        if failed or not self._samples:
            raise RuntimeError(f"it did not say {text!r}")
        return self._samples.tobytes()

    def _collect(self, samples: "ctypes._Pointer", num_samples: int, _events: object) -> int:
        if samples and num_samples > 0:
            self._samples.frombytes(ctypes.string_at(samples, 2 * num_samples))
        return 0


def _main() -> None:
    job = json.load(sys.stdin)
    espeak = _Espeak(job["voice"])
    for text, pitch, words_per_minute in job["prompts"]:
        samples = espeak.say(text, pitch, words_per_minute)
        sys.stdout.buffer.write(struct.pack("=I", len(samples) // 2) + samples)


if __name__ == "__main__":
    _main()
