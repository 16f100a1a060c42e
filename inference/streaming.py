"""Speech recognised while it comes: the text is that of the whole recording in the same chunks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from common.errors import UserError
from decoding.ctc_beam_search import CTCToken
from inference.chunks import CHUNK_MS, Chunks, chunks_of
from inference.locks import held_over_forks
from inference.model import Model
from inference.recognizer import Recognizer
from inference.search import options_of
from inference.streaming_audio import SampleState, SampleStream
from inference.streaming_text import (
    ClosedSegment,
    Endpoints,
    Frames,
    StreamSearch,
    TextState,
)
from inference.transcript import Segment, Transcript
from modules.Conmamba import for_streams

logger = logging.getLogger(__name__)

_FORMAT = "3"
_MAX_BATCH = 16
_ENDPOINTS = Endpoints()
# Others get their turn between the chunks of a stream that is behind.
_TURN_S = 1e-4


@dataclass(frozen=True)
class StreamResult:
    """The text of a stream so far.

    Attributes:
        stable: the beginning of the text, which stays whatever comes.
        unstable: the rest, which may change or go on.
        segments: those that an endpoint has closed, all of them stable.
        duration_s: seconds of audio that came.
    """

    stable: str
    unstable: str
    segments: tuple[Segment, ...]
    duration_s: float

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.stable} {self.unstable}".strip()


class Stream:
    """Audio that comes; made by `StreamingRecognizer.open`, and passed to its methods."""

    def __init__(self, samples: SampleStream, text: TextState, row: int, lead_samples: int):
        self._samples, self._text, self._row = samples, text, row
        # The encoder's input; a stream begins with zeros, see SpeechEncoder.lead_samples.
        self._waiting = [np.zeros(lead_samples, np.float32)]
        self._num_waiting = lead_samples
        self.is_finished = False
        # What went wrong with it, where it ended for that.
        self._failure: str | None = None

    @property
    def sample_rate(self) -> int:
        """Of the samples that it takes, in Hz."""
        return self._samples.rate

    def _push(self, wav_S: np.ndarray) -> None:
        self._waiting.append(wav_S)
        self._num_waiting += len(wav_S)

    def _first(self, num_samples: int) -> np.ndarray:
        """The samples that waited longest, which go on waiting."""
        if len(self._waiting) > 1:
            self._waiting = [np.concatenate(self._waiting)]
        return self._waiting[0][:num_samples]

    def _drop(self, num_samples: int, chunk_samples: int) -> None:
        """The first of those that ``_first`` gave."""
        rest_S = self._waiting[0][num_samples:]
        # A short view would keep all that it was cut from; long ones would be copied many times.
        self._waiting = [rest_S if len(rest_S) >= chunk_samples else rest_S.copy()]
        self._num_waiting = len(rest_S)


class StreamingRecognizer(Recognizer):
    """Recognises streams of speech, many at a time; one object serves many threads.

    >>> asr = StreamingRecognizer.from_run("results/demo_streaming")  # doctest: +SKIP
    >>> stream = asr.open(sample_rate=16000)  # doctest: +SKIP
    >>> asr.accept(stream, samples)  # doctest: +SKIP
    >>> print(asr.result(stream).text)  # doctest: +SKIP
    >>> print(asr.finish(stream).text)  # doctest: +SKIP

    Samples wait until somebody asks: ``result``, ``flush`` and ``finish`` encode what their stream
    has, and with it, in one batch, a chunk of every other stream that has a full one; ``step`` does
    so for all. The text of a stream is that of ``transcribe(..., chunk_ms=...)`` of the same audio,
    however it is cut. Of a joint model of CTC and attention it is that of the CTC branch, since the
    decoder reads whole utterances.

    Args:
        model: as in `Recognizer`; trained for chunks.
        chunk_ms: length of a chunk, which is the longest wait; a multiple of the model's frames.
            Where chunks overlap (``lookahead``) the next one begins before its end.
        left_context_chunks: chunks before its own that a frame sees, in an encoder that attends;
            None: as many as in training.
        endpoints: where the text is cut into segments; None: nowhere.
        max_batch: streams that are encoded at once.
        search: see ``SearchOptions``, as a mapping.
        **options: of `Recognizer`.

    Raises:
        UserError: the model does not stream, or an option cannot be.
    """

    def __init__(
        self,
        model: Model,
        *,
        chunk_ms: float = CHUNK_MS,
        left_context_chunks: int | None = None,
        endpoints: Endpoints | None = _ENDPOINTS,
        max_batch: int = _MAX_BATCH,
        search: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(model, **options)
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}; it must be at least 1.")
        self.chunk_ms, self.endpoints, self.max_batch = chunk_ms, endpoints, max_batch
        self._left_context_chunks = left_context_chunks
        self._chunks = self._chunks_of(chunk_ms)
        if model.kind == "s2s":
            logger.warning(
                "The decoder of this model reads whole utterances: streams have the text of its "
                "CTC branch, with somewhat more errors."
            )
        self._options = options_of(search or {})
        self._texts = StreamSearch(self._search, self._options, endpoints, model.frame_s)
        # Faster for the few rows of a chunk.
        self._encoder = for_streams(model.encoder)
        self._lead_samples = model.encoder.lead_samples
        self._chunk_samples = self._chunks.frames * model.encoder.stride_samples
        self._step_samples = self._chunks.step * model.encoder.stride_samples
        self._initial = model.encoder.initial_state(1, self._chunks.mask)
        self._state = self._initial.repeat(1)
        self._free = [0]
        self._streams: list[Stream] = []
        self._lock = held_over_forks(threading.RLock())
        self._model_id: str | None = None

    def _chunks_of(self, chunk_ms: float) -> Chunks:
        return chunks_of(self.model, chunk_ms, self._left_context_chunks, self.lookahead)

    @property
    def num_streams(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    def samples_needed(self, num_samples: int) -> int:
        """How many samples more, at the model's rate, until so many have all been encoded.

        It follows from the model, from its filterbank, its front end and the chunk; at most a
        chunk.
        """
        frames = self.model.encoder.num_frames(num_samples)
        steps = -(-frames // self._chunks.step)
        until = (steps - 1) * self._step_samples + self._chunk_samples
        return max(until - self._lead_samples - num_samples, 0)

    def open(self, sample_rate: int = 16000) -> Stream:
        """A new stream.

        Args:
            sample_rate: of its samples, in Hz.

        Raises:
            AudioError: no recording has such a rate.
        """
        self._check_process()
        samples = SampleStream(sample_rate, self.sample_rate)
        with self._lock:
            return self._add(Stream(samples, self._texts.start(), self._row(), self._lead_samples))

    def accept(self, stream: Stream, samples: np.ndarray | Tensor) -> None:
        """Takes the next samples of a stream, any number of them.

        Args:
            samples: (S,) or (S, channels), which are mixed down; integers or floating point, whose
                full scale is 1.

        Raises:
            UserError: the stream is finished, or of another recogniser.
            AudioError: samples of another shape, or that are not finite; the stream goes on without
                them.
        """
        if isinstance(samples, Tensor):
            samples = samples.detach().cpu()
            # numpy has no bfloat16.
            samples = (samples.float() if samples.is_floating_point() else samples).numpy()
        with self._lock:
            self._check(stream)
            stream._push(stream._samples.add(samples))

    def step(self) -> int:
        """Encodes, in one batch, a chunk of every stream that has a full one; returns how many.

        Of more streams than ``max_batch`` those go first that waited longest.
        """
        self._check_process()
        with self._lock:
            ready = [s for s in self._streams if s._num_waiting >= self._chunk_samples]
            batch = ready[: self.max_batch]
            if batch:
                self._encode(batch)
                # The others have their turn.
                rest = [stream for stream in self._streams if stream not in batch]
                self._streams = rest + [stream for stream in batch if not stream.is_finished]
            return len(batch)

    def result(self, stream: Stream) -> StreamResult:
        """The text so far, of all chunks that are full.

        Raises:
            UserError: the stream is finished, or of another recogniser.
        """
        with self._encoded(stream):
            stable, unstable = self._texts.words(stream._text)
            return StreamResult(
                " ".join(stable),
                " ".join(unstable),
                self._texts.segments(stream._text),
                stream._samples.num_in / stream.sample_rate,
            )

    def flush(self, stream: Stream) -> Transcript:
        """The text as if the audio ended here, its last word included; the stream goes on.

        Raises:
            UserError: the stream is finished, or of another recogniser.
        """
        with self._encoded(stream):
            return self._ended(stream)

    def finish(self, stream: Stream) -> Transcript:
        """The whole text; the stream takes no more.

        Raises:
            UserError: the stream is finished, or of another recogniser.
        """
        with self._encoded(stream):
            transcript = self._ended(stream)
            self._close(stream)
            return transcript

    def save(self, stream: Stream) -> bytes:
        """The stream as bytes, for ``restore`` in another process; the stream itself goes on.

        Raises:
            UserError: the stream is finished, or of another recogniser.
        """
        with self._encoded(stream):
            text, samples = stream._text, stream._samples.state
            row = self._state.select(self._rows([stream]))
            closed = [token for segment in text.closed for token in segment.tokens]
            ids, starts, ends, log_probs = zip(*closed, strict=True) if closed else ([],) * 4
            arrays = {
                "encoder": np.frombuffer(row.to_bytes(), np.uint8),
                "waiting": np.concatenate(stream._waiting),
                "history": samples.history_S,
                **{
                    f"heard.{name}": np.concatenate([empty, *(part[i] for part in text.heard)])
                    for i, (name, empty) in enumerate(_NO_FRAMES._asdict().items())
                },
                "closed.places": np.array([ids, starts, ends], np.int64),
                "closed.log_probs": np.array(log_probs, np.float64),
            }
            numbers = {
                "rate": stream.sample_rate,
                "num_in": samples.num_in,
                "num_out": samples.num_out,
                "first_frame": text.first_frame,
                "num_frames": text.num_frames,
                "closed": [[len(s.tokens), s.start_frame, s.end_frame] for s in text.closed],
            }
        metadata = {"format": _FORMAT, **self._description(), "numbers": json.dumps(numbers)}
        data = safetensors.numpy.save(arrays, metadata)
        return hashlib.sha256(data).digest() + data

    def restore(self, data: bytes) -> Stream:
        """The stream that ``save`` wrote.

        Raises:
            UserError: bytes of something else, damaged, of another version, of another model, or
                of a recogniser with other chunks, search or endpoints.
        """
        self._check_process()
        arrays, metadata = _read(data)
        for name, value in self._description().items():
            if metadata.get(name) != value:
                raise UserError(
                    f"restore: the stream's {name} is another than this recogniser's; restore it "
                    "where the model and all options are the same."
                )
        numbers = json.loads(metadata["numbers"])
        places, log_probs = arrays["closed.places"].tolist(), arrays["closed.log_probs"].tolist()
        tokens = iter([CTCToken(*token) for token in zip(*places, log_probs, strict=True)])
        closed = [
            ClosedSegment([next(tokens) for _ in range(count)], start, end)
            for count, start, end in numbers["closed"]
        ]
        heard = Frames(*(arrays[f"heard.{name}"] for name in Frames._fields))
        text = TextState(
            self._texts.start().search,
            [heard] if len(heard.counts_T) else [],
            numbers["first_frame"],
            numbers["num_frames"],
            closed,
        )
        samples = SampleState(numbers["num_in"], numbers["num_out"], arrays["history"])
        with self._lock:
            try:
                row = self._initial.from_bytes(arrays["encoder"].tobytes())
            except ValueError as error:
                raise UserError(f"restore: {error}") from None
            stream = Stream(
                SampleStream(numbers["rate"], self.sample_rate, samples),
                self._texts.restarted(text),
                self._row(),
                0,
            )
            stream._push(arrays["waiting"])
            self._put([stream], row)
            return self._add(stream)

    def _close(self, stream: Stream, failure: str | None = None) -> None:
        stream.is_finished, stream._failure = True, failure
        self._streams.remove(stream)
        self._free.append(stream._row)

    def _check(self, stream: Stream) -> None:
        if stream._failure is not None:
            raise UserError(stream._failure)
        if stream.is_finished:
            raise UserError("This stream is finished; open another one.")
        if stream not in self._streams:
            raise UserError("This stream belongs to another recogniser.")

    def _row(self) -> int:
        """A free row of the state, before its first frame."""
        if not self._free:
            size = self._state.batch_size
            more = max(1, size // 2)
            with torch.inference_mode():
                self._state = self._state.enlarged(more)
            self._free = list(range(size, size + more))
        return self._free.pop()

    def _add(self, stream: Stream) -> Stream:
        if not stream._text.num_frames:
            self._put([stream], self._initial)
        self._streams.append(stream)
        return stream

    def _rows(self, streams: Sequence[Stream]) -> Tensor:
        return torch.tensor([stream._row for stream in streams], device=self.device)

    @torch.inference_mode()
    def _put(self, streams: Sequence[Stream], rows: Any) -> None:
        self._state.put(self._rows(streams), rows)

    @contextmanager
    def _encoded(self, stream: Stream) -> Iterator[None]:
        """Holds the lock where no full chunk of the stream waits any more."""
        self._check_process()
        while True:
            with self._lock:
                self._check(stream)
                if stream._num_waiting < self._chunk_samples:
                    yield
                    return
                if stream in self._streams[self.max_batch :]:
                    self._streams.remove(stream)
                    self._streams.insert(0, stream)
                self.step()
                is_behind = stream._num_waiting >= self._chunk_samples
            if is_behind:
                # A lock that is taken again at once is never given to another thread.
                time.sleep(_TURN_S)

    @torch.inference_mode()
    def _encode(self, batch: Sequence[Stream]) -> None:
        """A full chunk of each, or, where that fails or is interrupted, nothing.

        A stream whose log probabilities are no numbers ends; the others go on.
        """
        wav_BS = np.stack([stream._first(self._chunk_samples) for stream in batch])
        is_all = [stream._row for stream in batch] == list(range(self._state.batch_size))
        state = self._state if is_all else self._state.select(self._rows(batch))
        log_probs_BTV, state = self._forward(wav_BS, state, None)
        is_finite_B = np.isfinite(log_probs_BTV).all(axis=(1, 2))
        if not is_finite_B.all():
            for stream, is_finite in zip(batch, is_finite_B, strict=True):
                if not is_finite:
                    self._close(stream, self._not_finite())
            return
        texts = [stream._text.copy() for stream in batch]
        self._texts.advance(texts, list(log_probs_BTV))
        if is_all:
            self._state = state
        else:
            self._put(batch, state)
        for stream, text in zip(batch, texts, strict=True):
            stream._drop(self._step_samples, self._chunk_samples)
            stream._text = text

    @torch.inference_mode()
    def _ended(self, stream: Stream) -> Transcript:
        """The text if the stream, which has no full chunk waiting, ends here."""
        samples, text = stream._samples.twin(), stream._text.copy()
        rest_S = np.concatenate([*stream._waiting, samples.add(np.zeros(0, np.float32), last=True)])
        duration_s = samples.num_out / self.sample_rate
        if samples.num_out < self.model.min_samples:
            return Transcript("", duration_s=duration_s)
        frames = self.model.encoder.num_frames(samples.num_out) - text.num_frames
        state = self._state.select(self._rows([stream]))
        for first in range(0, frames, self._chunks.step):
            count = min(self._chunks.frames, frames - first)
            wav_S = np.zeros(self._chunk_samples, np.float32)
            start = first * self.model.encoder.stride_samples
            chunk_S = rest_S[start : start + self._chunk_samples]
            wav_S[: len(chunk_S)] = chunk_S
            log_probs_1TV, state = self._forward(wav_S[None], state, count)
            log_probs_TV = log_probs_1TV[0, :count]
            if not np.isfinite(log_probs_TV).all():
                self._close(stream, self._not_finite())
                self._check(stream)
            self._texts.advance([text], [log_probs_TV])
        return self._texts.transcript(text, duration_s)

    def _forward(
        self, wav_BS: np.ndarray, state: Any, num_frames: int | None
    ) -> tuple[np.ndarray, Any]:
        """Log probabilities of a chunk of each row, and the next state."""
        partial = num_frames is not None and num_frames < self._chunks.frames
        num_frames_B = torch.tensor([num_frames], device=self.device) if partial else None
        with self._computing():
            encoder_out_BTD, later = self._encoder.forward_streaming(
                torch.from_numpy(wav_BS).to(self.device), state, num_frames_B, self._chunks.mask
            )
            logits_BTV = self.model.ctc_lin(encoder_out_BTD)
        if self.precision != "fp32":
            later = later.cast_as(state)
        return logits_BTV.float().log_softmax(-1).cpu().numpy(), later

    def _description(self) -> dict[str, str]:
        """What must be the same where a stream goes on."""
        if self._model_id is None:
            self._model_id = self.model.digest()
        endpoints = None if self.endpoints is None else dataclasses.asdict(self.endpoints)
        return {
            "model": self._model_id,
            "precision": self.precision,
            "chunks": self._chunks.describe(),
            "search": self._options.describe(),
            "endpoints": json.dumps(endpoints),
        }


_NO_FRAMES = Frames(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def _read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a saved stream."""
    size = hashlib.sha256().digest_size
    digest, data = data[:size], data[size:]
    if hashlib.sha256(data).digest() != digest:
        raise UserError("restore: these bytes hold no stream, or not all of one unchanged.")
    try:
        arrays = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        version = metadata["format"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"restore: these bytes hold no stream ({error}).") from None
    if version != _FORMAT or "encoder" not in arrays:
        raise UserError(
            f"restore: the stream has format {version!r}; this version reads {_FORMAT!r}. Begin "
            "the stream anew."
        )
    return arrays, metadata
