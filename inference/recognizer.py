"""A trained model as an object: audio in, transcripts out, the same in any batch."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from inference.audio import AudioError, as_waveform, load_audio
from inference.bundle import is_bundle, read_bundle, read_run
from inference.chunks import Chunks, check_lookahead, chunks_of
from inference.long_audio import MIN_SEGMENT_S, cut_at_pauses, join
from inference.model import Model
from inference.search import Found, SearchOptions, TextSearch, options_of
from inference.streaming_text import Endpoints, StreamSearch
from inference.transcript import Segment, Transcript
from inference.words import words_of
from inference.workers import Map, side_by_side, threads_of_caller

__all__ = ["PRECISIONS", "AudioSource", "Recognizer", "SearchOptions"]

MAX_SEGMENT_S = 30.0
BATCH_SECONDS = 120.0
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FileSource = str | os.PathLike | bytes | IO[bytes]
AudioSource = FileSource | np.ndarray | Tensor
_Loaded = tuple[FileSource, np.ndarray | AudioError]
Progress = Callable[[float, float], None]
"""Told the recordings and the seconds of audio that are newly done: shares of a long recording."""


def _untold(recordings: float, audio_s: float) -> None:
    """For who does not ask."""


class Recognizer:
    """Transcribes audio with a trained model; one object serves many threads.

    >>> asr = Recognizer.from_run("results/demo")  # doctest: +SKIP
    >>> print(asr.transcribe("speech.mp3").text)  # doctest: +SKIP

    Args:
        model: in parts, float32 on the CPU; see the ``from_`` functions.
        device: cuda, cuda:1, mps or cpu; None takes the first of these that is there.
        precision: fp32, bf16 or fp16, of the network's products.
        threads: of the CPU, for the whole process; None leaves them as they are.
        lookahead: of chunks: the share of one that the next one begins with. More of it makes fewer
            errors, the shorter the chunks the more so, and costs computation, with 0.5 twice that
            of 0; the longest wait stays one chunk. None: as the model's recipe has it.

    Raises:
        UserError: a device or a precision that is not to be had here, or an impossible lookahead.
    """

    # Of what is transcribed in chunks.
    endpoints: Endpoints | None = Endpoints()

    def __init__(
        self,
        model: Model,
        device: str | None = None,
        precision: str = "fp32",
        threads: int | None = None,
        lookahead: float | None = None,
    ):
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}.")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = _device(device)
        check_lookahead(model, lookahead)
        self.precision, self.lookahead = precision, lookahead
        self.model = model
        model.to(self.device)
        self.sample_rate = model.sample_rate
        self._search = TextSearch(model)
        self._process = os.getpid()

    @classmethod
    def from_bundle(cls, folder: str | os.PathLike, **options: Any) -> "Recognizer":
        """The model of a bundle; ``options`` as in the constructor.

        Raises:
            UserError: there is no bundle, or a damaged or newer one.
        """
        return cls(read_bundle(Path(folder)), **options)

    @classmethod
    def from_run(cls, run: str | os.PathLike, **options: Any) -> "Recognizer":
        """The model of a training run's output folder; ``options`` as in the constructor.

        Raises:
            UserError: the run has no model to evaluate, or one that cannot be bundled.
        """
        return cls(read_run(run), **options)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, revision: str | None = None, **options: Any
    ) -> "Recognizer":
        """The model in a folder (a bundle or a run), or in a repository of the Hugging Face hub.

        Args:
            source: the folder, or the repository's name; a folder of that name goes first.
            revision: of the repository: a branch, a tag or a commit.
            **options: as in the constructor.

        Raises:
            UserError: there is neither.
        """
        folder = Path(source)
        if folder.is_dir():
            return cls(read_bundle(folder) if is_bundle(folder) else read_run(folder), **options)
        from inference.hub import pull

        return cls(pull(os.fspath(source), revision), **options)

    def transcribe(
        self,
        audio: AudioSource,
        sample_rate: int | None = None,
        *,
        channel: int | None = None,
        max_duration_s: float | None = None,
        max_segment_s: float = MAX_SEGMENT_S,
        whole: bool = False,
        chunk_ms: float | None = None,
        batch_seconds: float = BATCH_SECONDS,
        progress: Progress = _untold,
        **search: Any,
    ) -> Transcript:
        """What is said in one recording of any length.

        Args:
            audio: a file's path, its bytes, an open binary file, or samples (S,) or (S, channels).
            sample_rate: of samples, in Hz; None means the model's.
            channel: the channel to take, counted from 0; None mixes all down.
            max_duration_s: a longer recording is refused; None takes any. A small file may hold
                hours, whose samples take 230 MB of memory for each.
            max_segment_s: a longer recording is cut in its pauses into segments of at most so many
                seconds, which are recognised like recordings of their own and joined.
            whole: encode the recording as one instead, every frame in sight of all others, in
                bounded memory; the text is that of the CTC branch. Mamba and ConMamba encoders.
            chunk_ms: recognise the recording as one, no frame in sight of what follows its chunk of
                so many milliseconds: what a `StreamingRecognizer` of such chunks gives.
            batch_seconds: seconds of audio that are encoded at once.
            progress: is told each share of the recording that is done, and its seconds.
            **search: see ``SearchOptions``.

        Raises:
            AudioError: the audio cannot be read or used.
            UserError: an option that cannot be.
        """
        self._check_process()
        options = self._search.pinned(options_of(search))
        how = _How(max_segment_s, whole, chunk_ms, batch_seconds, options, progress)
        wav_S = self.load(audio, sample_rate, channel, max_duration_s)
        is_long = len(wav_S) > max_segment_s * self.sample_rate
        with self._spread(how, self._cpu_workers if is_long else 0) as spread:
            return self._begin({0: wav_S}, how, spread)()[0]

    def load(
        self,
        audio: AudioSource,
        sample_rate: int | None = None,
        channel: int | None = None,
        max_duration_s: float | None = None,
    ) -> np.ndarray:
        """The waveform (S,) that the model takes; arguments as in ``transcribe``."""
        if isinstance(audio, (np.ndarray, Tensor)):
            samples = _as_array(audio) if isinstance(audio, Tensor) else audio
            rate = self.sample_rate if sample_rate is None else sample_rate
            return as_waveform(
                samples, rate, self.sample_rate, channel=channel, max_duration_s=max_duration_s
            )
        return load_audio(audio, self.sample_rate, channel, max_duration_s=max_duration_s)

    def transcribe_many(
        self,
        paths: Iterable[FileSource],
        *,
        batch_seconds: float = BATCH_SECONDS,
        channel: int | None = None,
        max_duration_s: float | None = None,
        max_segment_s: float = MAX_SEGMENT_S,
        whole: bool = False,
        chunk_ms: float | None = None,
        progress: Progress = _untold,
        **search: Any,
    ) -> Iterator[tuple[FileSource, Transcript | AudioError]]:
        """Each path with its transcript, or with what is wrong with it, in their order.

        Args:
            paths: audio files, their bytes, or open binary files.
            batch_seconds: seconds of audio, padding included, that are encoded at once. Files of
                like lengths go together: some batches are read ahead. A CPU has several batches
                at work, one for each thread, and together no more audio than this.
            channel, max_duration_s, max_segment_s, whole, chunk_ms: as in ``transcribe``.
            progress: is told how many recordings are newly done, and how many seconds of audio.
            **search: see ``SearchOptions``.
        """
        self._check_process()
        options = self._search.pinned(options_of(search))
        how = _How(max_segment_s, whole, chunk_ms, batch_seconds, options, progress)
        # A GPU computes while its only worker waits for it: files are read meanwhile.
        workers = self._cpu_workers if self.device.type == "cpu" else 1
        with self._spread(how, workers) as spread:
            begun: deque[_Begun] = deque()
            for window in self._windows(paths, channel, max_duration_s, batch_seconds):
                waveforms = {i: w for i, (_, w) in enumerate(window) if isinstance(w, np.ndarray)}
                begun.append(_Begun(window, self._begin(waveforms, how, spread)))
                # Workers go on with the next window while the results of one are awaited.
                if spread is map or len(begun) > 1:
                    yield from _finished(begun.popleft(), how.progress)
            for last in begun:
                yield from _finished(last, how.progress)

    def _windows(
        self,
        paths: Iterable[FileSource],
        channel: int | None,
        max_duration_s: float | None,
        batch_seconds: float,
    ) -> Iterator[list[_Loaded]]:
        """Recordings, some batches at a time."""
        window: list[_Loaded] = []
        seconds = 0.0
        for path in paths:
            try:
                wav_S = load_audio(path, self.sample_rate, channel, max_duration_s=max_duration_s)
                seconds += len(wav_S) / self.sample_rate
                window.append((path, wav_S))
            except AudioError as error:
                window.append((path, error))
            if seconds >= _WINDOW_BATCHES * batch_seconds:
                yield window
                window, seconds = [], 0.0
        yield window

    @property
    def _cpu_workers(self) -> int:
        """Batches that are worked on side by side on a CPU; 0 where that gains nothing.

        Operations on short recordings are too small to be shared by threads.
        """
        threads = threads_of_caller()
        return min(threads, _MAX_WORKERS) if self.device.type == "cpu" and threads > 1 else 0

    @contextlib.contextmanager
    def _spread(self, how: "_How", workers: int) -> Iterator[Map]:
        """The ``map`` that goes through batches."""
        if not workers or how.whole or how.chunk_ms is not None:
            yield map
            return
        with side_by_side(workers, max(1, threads_of_caller() // workers)) as spread:
            yield spread

    def _begin(
        self, waveforms: Mapping[int, np.ndarray], how: "_How", spread: Map
    ) -> Callable[[], dict[int, Transcript]]:
        """Begins to transcribe; what it returns waits for the transcripts.

        Waveforms of like lengths are encoded together.
        """
        if how.chunk_ms is not None:
            chunk_ms = how.chunk_ms
            return lambda: self._transcribe_in_chunks(waveforms, chunk_ms, how)
        if how.whole:
            return lambda: {i: self._transcribe_whole(w, how) for i, w in waveforms.items()}
        rate = self.sample_rate
        pieces = {
            i: cut_at_pauses(wav_S, rate, how.max_segment_s) for i, wav_S in waveforms.items()
        }
        parts = {
            (i, n): waveforms[i][piece.start : piece.stop]
            for i, of_one in pieces.items()
            for n, piece in enumerate(of_one)
        }
        batches = self._batches(parts, how.batch_seconds)
        transcripts = spread(
            lambda batch: self._transcribe_batch([parts[part] for part in batch], how.options),
            batches,
        )

        def finish() -> dict[int, Transcript]:
            samples = {i: sum(p.stop - p.start for p in of_one) for i, of_one in pieces.items()}
            found: dict[tuple[int, int], Transcript] = {}
            for batch, of_batch in zip(batches, transcripts, strict=True):
                found.update(zip(batch, of_batch, strict=True))
                for i, n in batch:
                    share = len(parts[i, n]) / samples[i] if samples[i] else 1.0
                    how.progress(share, share * len(waveforms[i]) / rate)
            return {
                i: join(of_one, [found[i, n] for n in range(len(of_one))], rate)
                if len(of_one) > 1
                else found[i, 0]
                for i, of_one in pieces.items()
            }

        return finish

    def _batches(
        self, parts: Mapping[tuple[int, int], np.ndarray], batch_seconds: float
    ) -> list[list[tuple[int, int]]]:
        """Parts that are encoded at once, those of like lengths together, the longest first."""
        if self.device.type == "cpu":
            batch_seconds = min(batch_seconds / max(1, self._cpu_workers), _CPU_BATCH_S)
        batches: list[list[tuple[int, int]]] = []
        for part in sorted(parts, key=lambda part: -len(parts[part])):
            longest_s = len(parts[(batches[-1] if batches else [part])[0]]) / self.sample_rate
            if batches and (len(batches[-1]) + 1) * longest_s <= batch_seconds:
                batches[-1].append(part)
            else:
                batches.append([part])
        return batches

    @torch.inference_mode()
    def _transcribe_whole(self, wav_S: np.ndarray, how: "_How") -> Transcript:
        duration_s = len(wav_S) / self.sample_rate
        if len(wav_S) < self.model.min_samples:
            how.progress(1.0, duration_s)
            return self._transcript(Found([[]], []), duration_s)
        with self._computing():
            encoder_out_TD = self._encode_in_pieces(
                wav_S, lambda share: how.progress(share, share * duration_s)
            )
            pieces = encoder_out_TD.split(_WHOLE_PIECE_FRAMES)
            log_probs = (self._log_probs(self.model.ctc_lin(p_TD[None])[0]) for p_TD in pieces)
            found = self._search.in_pieces(log_probs, how.options)
        return self._transcript(found, duration_s)

    @torch.inference_mode()
    def _transcribe_in_chunks(
        self, waveforms: Mapping[int, np.ndarray], chunk_ms: float, how: "_How"
    ) -> dict[int, Transcript]:
        chunks = self._chunks_of(chunk_ms)
        search = StreamSearch(self._search, how.options, self.endpoints, self.model.frame_s)
        transcripts = {}
        for i, wav_S in waveforms.items():
            duration_s, text = len(wav_S) / self.sample_rate, search.start()
            if len(wav_S) >= self.model.min_samples:
                for log_probs_TV in self._log_probs_in_chunks(wav_S, chunks, how.batch_seconds):
                    search.advance([text], [log_probs_TV.cpu().numpy()])
            transcripts[i] = search.transcript(text, duration_s)
            how.progress(1.0, duration_s)
        return transcripts

    def _chunks_of(self, chunk_ms: float) -> Chunks:
        return chunks_of(self.model, chunk_ms, lookahead=self.lookahead)

    def _log_probs_in_chunks(
        self, wav_S: np.ndarray, chunks: Chunks, batch_seconds: float
    ) -> Iterator[Tensor]:
        """Log probabilities (T, V) of each chunk, encoded at once or, of a long recording, not."""
        if len(wav_S) <= batch_seconds * self.sample_rate:
            _, log_probs_1TV, _ = self.encode([wav_S], chunks)
            yield from log_probs_1TV[0].split(chunks.step)
            return
        encoder = self.model.encoder
        state = encoder.initial_state(1, chunks.mask)
        size = chunks.frames * encoder.stride_samples
        frames = encoder.num_frames(len(wav_S))
        padded_S = F.pad(torch.from_numpy(wav_S), (encoder.lead_samples, 2 * size))
        for first in range(0, frames, chunks.step):
            count = min(chunks.frames, frames - first)
            start = first * encoder.stride_samples
            with self._computing():
                encoder_out_1TD, state = encoder.forward_streaming(
                    padded_S[None, start : start + size].to(self.device),
                    state,
                    torch.tensor([count], device=self.device) if count < chunks.frames else None,
                    chunks.mask,
                )
                logits_1TV = self.model.ctc_lin(encoder_out_1TD)
            yield self._log_probs(logits_1TV[0, :count])

    def transcribe_batch(self, waveforms: Sequence[np.ndarray], **search: Any) -> list[Transcript]:
        """Transcripts of waveforms (S,) at the model's rate, encoded at once.

        What is shorter than a frame of the filterbank holds no text.

        Args:
            **search: see ``SearchOptions``.
        """
        self._check_process()
        return self._transcribe_batch(waveforms, self._search.pinned(options_of(search)))

    def _transcribe_batch(
        self, waveforms: Sequence[np.ndarray], options: SearchOptions
    ) -> list[Transcript]:
        shortest = self.model.min_samples
        spoken = [wav_S for wav_S in waveforms if len(wav_S) >= shortest]
        found = iter(self._search(*self.encode(spoken), options) if spoken else [])
        return [
            self._transcript(
                next(found) if len(wav_S) >= shortest else Found([[]], []),
                len(wav_S) / self.sample_rate,
            )
            for wav_S in waveforms
        ]

    @torch.inference_mode()
    def encode(
        self, waveforms: Sequence[np.ndarray], chunks: Chunks | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder output, CTC log probabilities (both float32), and integer frames of each item.

        A recording of more than a minute goes through in pieces if it is alone and the encoder can:
        what comes out is the same, and at ten minutes a third of the time is saved.

        Args:
            chunks: behind whose ends a frame sees nothing; None shows it everything.
        """
        self._check_process()
        lengths = [len(wav_S) for wav_S in waveforms]
        is_long = len(lengths) == 1 and lengths[0] > _PLAIN_S * self.sample_rate
        if is_long and chunks is None and self._can_in_pieces:
            with self._computing():
                encoder_out_1TD = self._encode_in_pieces(waveforms[0])[None]
                logits_1TV = self.model.ctc_lin(encoder_out_1TD)
            num_frames_1 = torch.tensor([encoder_out_1TD.shape[1]], device=self.device)
            return encoder_out_1TD.float(), self._log_probs(logits_1TV), num_frames_1
        wav_BS = torch.zeros(len(waveforms), max([1, *lengths]))
        for row_S, wav_S in zip(wav_BS, waveforms, strict=True):
            row_S[: len(wav_S)] = torch.from_numpy(wav_S)
        num_samples_B = torch.tensor(lengths, device=self.device)
        with self._computing():
            encoder_out_BTD, num_frames_B = self.model.encoder(
                wav_BS.to(self.device), num_samples_B, None if chunks is None else chunks.mask
            )
            logits_BTV = self.model.ctc_lin(encoder_out_BTD)
        return encoder_out_BTD.float(), self._log_probs(logits_BTV), num_frames_B

    def _log_probs(self, logits: Tensor) -> Tensor:
        """Log probabilities in float32, which a search can rely on.

        Raises:
            UserError: they are no numbers.
        """
        log_probs = logits.float().log_softmax(-1)
        if not bool(log_probs.isfinite().all()):
            raise UserError(self._not_finite())
        return log_probs

    def _not_finite(self) -> str:
        hint = "" if self.precision == "fp32" else " Use --precision fp32."
        return f"The output of the network is not finite with precision {self.precision}.{hint}"

    @property
    def _can_in_pieces(self) -> bool:
        return hasattr(self.model.encoder.Transformer.encoder, "forward_in_pieces")

    def _encode_in_pieces(
        self, wav_S: np.ndarray, progress: Callable[[float], None] = lambda share: None
    ) -> Tensor:
        """Encoder output (T, D) of one recording of any length, in bounded memory."""
        try:
            return self.model.encoder.forward_in_pieces(
                torch.from_numpy(wav_S).to(self.device), progress=progress
            )
        except ValueError as error:
            raise UserError(f"whole: {error}") from None

    def _check_process(self) -> None:
        """Looks at the process and the threads of who calls, before anything is computed.

        Raises:
            UserError: this process is a copy of the recogniser's, which would wait for ever.
        """
        if os.getpid() != self._process and (self.device.type != "cpu" or threads_of_caller() > 1):
            raise UserError(
                "This recogniser was loaded in another process, of which this one is a copy "
                "(fork), without its threads. Load it in each process that uses it (gunicorn "
                "without --preload; multiprocessing with the method spawn), or load it with "
                "threads=1 on a CPU."
            )

    def _computing(self) -> torch.autocast:
        """The context of all that the network computes."""
        # Asked for the first time, for operations of this thread.
        threads_of_caller()
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _transcript(self, found: Found, duration_s: float) -> Transcript:
        # Different tokens may spell the same text.
        texts = list(dict.fromkeys(self._search.text(tokens) for tokens in found.hypotheses))
        words, tokens = words_of(texts[0].split(), found.placed, self.model.frame_s, duration_s)
        segments = (Segment(texts[0], 0.0, duration_s),) if texts[0] else ()
        return Transcript(texts[0], words, tokens, segments, duration_s, tuple(texts[1:]))


@dataclass(frozen=True)
class _How:
    """How recordings are gone through; see ``Recognizer.transcribe``."""

    max_segment_s: float
    whole: bool
    chunk_ms: float | None
    batch_seconds: float
    options: SearchOptions
    progress: Progress

    def __post_init__(self) -> None:
        if not self.max_segment_s >= MIN_SEGMENT_S:
            raise UserError(
                f"max_segment_s is {self.max_segment_s:g}; it must be at least {MIN_SEGMENT_S:g}."
            )
        if self.whole and self.chunk_ms is not None:
            raise UserError(
                "whole shows every frame the whole recording, chunk_ms does not: give one."
            )
        if self.whole and self.options.alternatives:
            raise UserError("alternatives: a recording that is encoded whole has one text.")


class _Begun(NamedTuple):
    """Recordings that are being transcribed, and what waits for their transcripts."""

    window: list[_Loaded]
    finish: Callable[[], dict[int, Transcript]]


def _finished(
    begun: _Begun, progress: Progress
) -> Iterator[tuple[FileSource, Transcript | AudioError]]:
    results = begun.finish()
    for i, (path, loaded) in enumerate(begun.window):
        if isinstance(loaded, AudioError):
            progress(1.0, 0.0)
        yield path, results[i] if isinstance(loaded, np.ndarray) else loaded


_WINDOW_BATCHES = 4
# More of them wait for Python's lock rather than compute.
_MAX_WORKERS = 8
# Larger batches outgrow the caches of a CPU, and have more padding.
_CPU_BATCH_S = 30.0
_WHOLE_PIECE_FRAMES = 4096
# A longer recording outgrows the caches of a CPU.
_PLAIN_S = 60.0


def _as_array(samples: Tensor) -> np.ndarray:
    # numpy has no bfloat16.
    return (
        samples.detach()
        .to("cpu", torch.float32 if samples.dtype == torch.bfloat16 else samples.dtype)
        .numpy()
    )


def _device(name: str | None) -> torch.device:
    """The device asked for, else CUDA before MPS before the CPU.

    Raises:
        UserError: it is not there.
    """
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        # One without content, such as meta, has nothing to give back.
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device
