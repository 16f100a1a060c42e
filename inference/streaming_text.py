"""From log probabilities that come chunk by chunk to text: search, endpoints, transcript."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from decoding.ctc_beam_search import CTCHypothesis, CTCSearchState, CTCToken
from decoding.ctc_beam_search.search import CTCBeamSearch
from inference.search import SearchOptions, TextSearch
from inference.transcript import Segment, Token, Transcript, Word
from inference.words import words_of

# Of tokens that no search looks at; the searches want finite numbers.
_IMPROBABLE = np.float32(-1e5)


@dataclass(frozen=True)
class Endpoints:
    """Where the text of a stream is cut into segments: the first of three rules that holds.

    Attributes:
        silence_s: so much silence before any word of the segment,
        pause_s: so much behind a word of it,
        max_segment_s: or so long a segment: it ends before its last word, which may go on. A
            segment of one word ends when it is twice as long.

    Raises:
        UserError: a value that is not above zero.
    """

    silence_s: float = 2.4
    pause_s: float = 1.2
    max_segment_s: float = 20.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise UserError(f"endpoints: {name} is {value}; it must be above 0 seconds.")


class Frames(NamedTuple):
    """Log probabilities of frames, as far as a search looks at them.

    Attributes:
        counts_T: tokens of each frame,
        ids: these tokens, frame by frame,
        log_probs: and their log probabilities.
    """

    counts_T: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


class ClosedSegment(NamedTuple):
    """A finished segment; frames are counted from the beginning of the stream.

    Attributes:
        tokens: as the search found them.
        start_frame, end_frame: of the segment.
        text: what they spell.
        words, placed: with their times, once they have been spelled.
    """

    tokens: list[CTCToken]
    start_frame: int
    end_frame: int
    text: str = ""
    words: tuple[Word, ...] = ()
    placed: tuple[Token, ...] = ()


@dataclass
class TextState:
    """The text of a stream so far.

    Attributes:
        search: of the open segment, one row.
        heard: frames of the open segment.
        first_frame: of the open segment.
        num_frames: of the stream.
        closed: the segments before it.
    """

    search: CTCSearchState
    heard: list[Frames] = field(default_factory=list)
    first_frame: int = 0
    num_frames: int = 0
    closed: list[ClosedSegment] = field(default_factory=list)

    def copy(self) -> TextState:
        """One that goes on for itself."""
        return dataclasses.replace(self, heard=[*self.heard], closed=[*self.closed])


class StreamSearch:
    """Searches the texts of streams.

    Args:
        texts: of the model.
        options: of the search.
        endpoints: None leaves a stream in one segment.
        frame_s: seconds from one frame to the next.

    Raises:
        UserError: an option that streams do not have.
    """

    def __init__(
        self,
        texts: TextSearch,
        options: SearchOptions,
        endpoints: Endpoints | None,
        frame_s: float,
    ):
        self._texts, self._endpoints, self._frame_s = texts, endpoints, frame_s
        self._search, self._hotwords = texts.of_streams(options)
        self._beams = self._search
        self._least: float | None = None
        if isinstance(self._search, CTCBeamSearch):
            settings = self._search.settings
            self._beams = self._search.with_topk(settings.beam_size)
            self._least = min(settings.token_prune_min_logp, settings.hotword_token_min_logp)

    def start(self) -> TextState:
        """A stream before its first frame."""
        return TextState(self._started())

    def advance(self, states: Sequence[TextState], log_probs: Sequence[np.ndarray]) -> None:
        """Goes on with the next frames (T, V) of each stream; endpoints hold at their ends."""
        num_frames = [len(frames_TV) for frames_TV in log_probs]
        padded_BTV = np.zeros((len(states), max(num_frames), log_probs[0].shape[1]), np.float32)
        for row_TV, frames_TV in zip(padded_BTV, log_probs, strict=True):
            row_TV[: len(frames_TV)] = frames_TV
        search = CTCSearchState.joined([state.search for state in states])
        search = self._search.advance(search, padded_BTV, num_frames)
        for i, (state, frames_TV) in enumerate(zip(states, log_probs, strict=True)):
            state.search = search.select([i])
            state.heard.append(self._packed(frames_TV))
            state.num_frames += len(frames_TV)
        if self._endpoints is not None:
            for state, (best, *_) in zip(states, self._search.partial(search), strict=True):
                self._close_where_due(state, best, self._endpoints)

    def restarted(self, state: TextState) -> TextState:
        """``state`` with the search that its frames lead to, and the texts of its segments."""
        frames_TV = self._unpacked(state.heard)
        search = self._search.advance(self._started(), frames_TV[None])
        closed = [self._spelled(segment) for segment in state.closed]
        return dataclasses.replace(state, search=search, closed=closed)

    def words(self, state: TextState) -> tuple[list[str], list[str]]:
        """The words so far: those that will stay, and those that may change or go on."""
        closed = [word for segment in state.closed for word in segment.text.split()]
        beams = [self._words(beam.tokens) for beam in self._beams.partial(state.search)[0]]
        # Whatever comes, the text is one of the beams' and more; its last word may go on.
        complete = [words[:-1] for words in beams]
        num_stable = sum(
            1
            for _ in itertools.takewhile(
                lambda words: len(set(words)) == 1, zip(*complete, strict=False)
            )
        )
        return closed + beams[0][:num_stable], beams[0][num_stable:]

    def transcript(self, state: TextState, duration_s: float) -> Transcript:
        """The text if the stream ends here, after ``duration_s``; ``state`` may go on."""
        ((best, *_),) = self._search.finish(state.search)
        last = self._closed(state, best.tokens, state.num_frames)
        segments = [
            # The last frame may reach beyond the samples.
            self._spelled(segment, duration_s)
            if segment is last or segment.end_frame * self._frame_s > duration_s
            else segment
            for segment in (*state.closed, last)
        ]
        spoken = [segment for segment in segments if segment.text]
        return Transcript(
            " ".join(segment.text for segment in spoken),
            tuple(word for segment in spoken for word in segment.words),
            tuple(token for segment in spoken for token in segment.placed),
            tuple(
                Segment(
                    segment.text,
                    self._seconds(segment.start_frame, duration_s),
                    duration_s
                    if segment is segments[-1]
                    else self._seconds(segment.end_frame, duration_s),
                )
                for segment in spoken
            ),
            duration_s,
        )

    def segments(self, state: TextState) -> tuple[Segment, ...]:
        """The closed segments that have a text."""
        return tuple(
            Segment(
                segment.text,
                self._seconds(segment.start_frame),
                self._seconds(segment.end_frame),
            )
            for segment in state.closed
            if segment.text
        )

    def _close_where_due(self, state: TextState, best: CTCHypothesis, rules: Endpoints) -> None:
        frames, words = state.num_frames - state.first_frame, best.words
        silence_s = (frames - (words[-1].end_frame if words else 0)) * self._frame_s
        if silence_s >= (rules.pause_s if words else rules.silence_s):
            ((final, *_),) = self._search.finish(state.search)
            spoken = final.tokens[-1].end_frame if final.tokens else 0
            # Within the silence: a word may begin at the end of these frames.
            self._close(state, final.tokens, (spoken + frames) // 2)
        elif frames * self._frame_s >= rules.max_segment_s and words:
            # The last word may go on: the next segment begins with it.
            last = best.tokens.index(words[-1].tokens[0])
            if last and not self._search.vocabulary.spelling[best.tokens[last - 1].id]:
                last -= 1
            before = best.tokens[last - 1].end_frame if last else 0
            # The word may have been probable before its most probable frames.
            frame = (before + best.tokens[last].start_frame) // 2
            if frame:
                self._close(state, best.tokens[:last], frame)
            elif frames * self._frame_s >= 2 * rules.max_segment_s:
                self._close(state, best.tokens, frames)

    def _close(self, state: TextState, tokens: Sequence[CTCToken], frame: int) -> None:
        """Ends the open segment with a frame of it; the frames behind that begin the next one."""
        segment = self._closed(state, tokens, state.first_frame + frame)
        if segment.tokens:
            # Spelled once: who asks for the text of a long stream waits for its last words alone.
            state.closed.append(self._spelled(segment))
        rest_TV = self._unpacked(state.heard)[frame:]
        state.first_frame += frame
        state.heard = [self._packed(rest_TV)] if len(rest_TV) else []
        state.search = self._started()
        if len(rest_TV):
            state.search = self._search.advance(state.search, rest_TV[None])

    @staticmethod
    def _closed(state: TextState, tokens: Sequence[CTCToken], end_frame: int) -> ClosedSegment:
        first = state.first_frame
        moved = [CTCToken(id_, a + first, b + first, p) for id_, a, b, p in tokens]
        return ClosedSegment(moved, first, end_frame)

    def _spelled(self, segment: ClosedSegment, duration_s: float = math.inf) -> ClosedSegment:
        text, placed = self._texts.found(segment.tokens)
        end_s = self._seconds(segment.end_frame, duration_s)
        words, tokens = words_of(text.split(), placed, self._frame_s, end_s)
        return segment._replace(text=" ".join(text.split()), words=words, placed=tokens)

    def _words(self, tokens: Sequence[CTCToken]) -> list[str]:
        return self._texts.found(tokens)[0].split()

    def _seconds(self, frame: int, duration_s: float = math.inf) -> float:
        return min(round(frame * self._frame_s, 3), duration_s)

    def _started(self) -> CTCSearchState:
        return self._search.start(1, self._hotwords)

    def _packed(self, frames_TV: np.ndarray) -> Frames:
        frames_TV = frames_TV[:, : len(self._search.vocabulary)]
        kept_TV = np.zeros(frames_TV.shape, bool)
        if self._least is not None:
            kept_TV = frames_TV > np.float32(self._least)
        np.put_along_axis(kept_TV, frames_TV.argmax(1)[:, None], True, 1)
        return Frames(
            kept_TV.sum(1).astype(np.int32),
            kept_TV.nonzero()[1].astype(np.int32),
            frames_TV[kept_TV].astype(np.float32),
        )

    def _unpacked(self, heard: Sequence[Frames]) -> np.ndarray:
        counts_T = np.concatenate([np.empty(0, np.int32), *(frames.counts_T for frames in heard)])
        frames_TV = np.full((len(counts_T), len(self._search.vocabulary)), _IMPROBABLE)
        if heard:
            rows = np.repeat(np.arange(len(counts_T)), counts_T)
            ids = np.concatenate([frames.ids for frames in heard])
            frames_TV[rows, ids] = np.concatenate([frames.log_probs for frames in heard])
        return frames_TV
