"""New sentences from recorded words: what is heard must be told from sound, not from context."""

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from corpora.audio import read_audio
from training.seeding import seeded
from training.splicing.segments import Segment

# A cut within a pause is no step in the waveform; this hides what hum or noise leaves of one.
_FADE_S = 0.005


class Splicing:
    """Puts a part of the utterances together anew from pieces of the same speaker's recordings.

    A network that sees few sentences knows them by heart and guesses the words that it does not
    hear. The new ones have no context to guess from, and are no longer than what they replace. Run
    in the loader's workers; idea after arXiv:2104.01393 (there with any speaker's words).

    Args:
        share: of the utterances that are replaced.
        seed: of the run.
        rows: training utterances (``wav``, ``spk_id``) by id.
        resample: recordings may have any rate.

    Words are what stands between spaces. Set ``epoch``, and the pieces by ``use``, before the
    loader's iterator is made: the workers get a copy then.
    """

    def __init__(self, share: float, seed: int, rows: Mapping[str, dict], resample: bool = False):
        self.resample = resample
        self.share = share
        self.seed = seed
        self.rows = rows
        self.epoch = 0
        self._segments: dict[str, list[Segment]] = {}

    @property
    def pieces(self) -> list[Segment]:
        """What utterances are put together from."""
        return [segment for segments in self._segments.values() for segment in segments]

    def use(self, segments: Collection[Segment]) -> None:
        """Take these pieces from now on; those of utterances that are not trained on are left."""
        by_speaker = defaultdict(list)
        for segment in segments:
            if segment.utterance_id in self.rows:
                by_speaker[self.rows[segment.utterance_id]["spk_id"]].append(segment)
        self._segments = dict(by_speaker)

    def __call__(
        self, wav_S: Tensor, words: str, utterance_id: str, sample_rate: int
    ) -> tuple[Tensor, str]:
        """The utterance as it came, or another one: (waveform, words)."""
        segments = self._segments.get(self.rows[utterance_id]["spk_id"], [])
        with seeded(self.seed, self.epoch, utterance_id, "splicing"):
            if float(torch.rand(())) >= self.share:
                return wav_S, words
            order = torch.randperm(len(segments)).tolist()
        chosen, room = [], len(wav_S)
        for segment in (segments[i] for i in order):
            if segment.stop - segment.start <= room:
                chosen.append(segment)
                room -= segment.stop - segment.start
            elif chosen:
                break
        if not chosen:
            return wav_S, words
        pieces = [self._read(segment, sample_rate) for segment in chosen]
        return torch.cat(pieces), " ".join(segment.words for segment in chosen)

    def _read(self, segment: Segment, sample_rate: int) -> Tensor:
        wav = self.rows[segment.utterance_id]["wav"]
        piece_S = torch.from_numpy(
            read_audio(
                wav,
                segment.utterance_id,
                sample_rate,
                segment.start,
                segment.stop,
                resample=self.resample,
            )
        )
        fade = min(round(_FADE_S * sample_rate), len(piece_S) // 2)
        if fade:
            ramp_S = torch.linspace(0, 1, fade)
            piece_S[:fade] *= ramp_S
            piece_S[-fade:] *= ramp_S.flip(0)
        return piece_S
