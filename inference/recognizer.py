"""A trained model as an object: audio in, transcripts out, the same in any batch."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from decoding.ctc_alignment import align_tokens
from decoding.ctc_beam_search import CTCBeamSearch, ctc_greedy
from inference.audio import AudioError, as_waveform, load_audio
from inference.bundle import Model, read_bundle, write_bundle
from inference.classes import build
from inference.transcript import Segment, Transcript
from inference.words import Placed, words_of
from modules.lengths import relative_lengths
from text.tokenizer import EOS_ID, vocabulary

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FileSource = str | os.PathLike | bytes | IO[bytes]
AudioSource = FileSource | np.ndarray | Tensor


@dataclass(frozen=True)
class SearchOptions:
    """How texts are searched for; None means as the model's recipe has it.

    Attributes:
        search: ``beam`` or ``greedy``.
        beam_size: hypotheses that are kept.
        hotwords: phrases that are preferred, with their boosts in nats (CTC and the CTC branch of
            joint models alike).
        ngram: ARPA file of words (CTC), plain or .gz.
        alpha: weight of the n-gram.
        beta: nats for each word, where there is an n-gram.
        alternatives: further texts that are wanted.
    """

    search: str = "beam"
    beam_size: int | None = None
    hotwords: Mapping[str, float] | None = None
    ngram: str | Path | None = None
    alpha: float | None = None
    beta: float | None = None
    alternatives: int = 0

    def __post_init__(self) -> None:
        if self.search not in ("beam", "greedy"):
            raise UserError(f"search is {self.search!r}; it must be beam or greedy.")


class Recognizer:
    """Transcribes audio with a trained model; one object serves many threads.

    >>> asr = Recognizer.from_run("results/demo")  # doctest: +SKIP
    >>> print(asr.transcribe("speech.mp3").text)  # doctest: +SKIP

    Args:
        model: in parts, float32 on the CPU; see the ``from_`` functions.
        device: cuda, cuda:1, mps or cpu; None takes the first of these that is there.
        precision: fp32, bf16 or fp16, of the network's products.
        threads: of the CPU, for the whole process; None leaves them as they are.

    Raises:
        UserError: a device or a precision that is not to be had here.
    """

    def __init__(
        self,
        model: Model,
        device: str | None = None,
        precision: str = "fp32",
        threads: int | None = None,
    ):
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}.")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = _device(device)
        self.precision = precision
        self.model = model
        for part in [model.encoder, *model.parts().values()]:
            part.to(self.device)
        model.encoder.normalize.to(self.device)
        self.sample_rate = model.encoder.compute_features.compute_STFT.sample_rate
        self._vocabulary = vocabulary(model.tokenizer)
        self._searches: dict[tuple, CTCBeamSearch] = {}

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
        bundle = Path(run) / "bundle"
        if bundle.is_dir():
            return cls.from_bundle(bundle, **options)
        with tempfile.TemporaryDirectory() as folder:
            return cls.from_bundle(write_bundle(run, Path(folder) / "bundle"), **options)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> "Recognizer":
        """The model in a folder (a bundle or a run), or in a repository of the Hugging Face hub.

        Raises:
            UserError: there is neither.
        """
        folder = Path(source)
        if folder.is_dir():
            is_run = not (folder / "config.json").is_file()
            return cls.from_run(folder, **options) if is_run else cls.from_bundle(folder, **options)
        return cls.from_bundle(_from_hub(str(source)), **options)

    def transcribe(
        self,
        audio: AudioSource,
        sample_rate: int | None = None,
        *,
        channel: int | None = None,
        **search: Any,
    ) -> Transcript:
        """What is said in one recording.

        Args:
            audio: a file's path, its bytes, an open binary file, or samples (S,) or (S, channels).
            sample_rate: of samples, in Hz; None means the model's.
            channel: the channel to take, counted from 0; None mixes all down.
            **search: see ``SearchOptions``.

        Raises:
            AudioError: the audio cannot be read or used.
            UserError: a search option that cannot be.
        """
        wav_S = self.load(audio, sample_rate, channel)
        return self.transcribe_batch([wav_S], **search)[0]

    def load(
        self, audio: AudioSource, sample_rate: int | None = None, channel: int | None = None
    ) -> np.ndarray:
        """The waveform (S,) that the model takes; arguments as in ``transcribe``."""
        if isinstance(audio, (np.ndarray, Tensor)):
            samples = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else audio
            rate = self.sample_rate if sample_rate is None else sample_rate
            return as_waveform(samples, rate, self.sample_rate, channel=channel)
        return load_audio(audio, self.sample_rate, channel)

    def transcribe_many(
        self,
        paths: Iterable[FileSource],
        *,
        batch_seconds: float = 120.0,
        channel: int | None = None,
        **search: Any,
    ) -> Iterator[tuple[FileSource, Transcript | AudioError]]:
        """Each path with its transcript, or with what is wrong with it, in their order.

        Args:
            paths: audio files, their bytes, or open binary files.
            batch_seconds: seconds of audio, padding included, that are encoded at once. Files of
                like lengths go together: some batches are read ahead.
            channel: as in ``transcribe``.
            **search: see ``SearchOptions``.
        """
        window: list[tuple[FileSource, np.ndarray | AudioError]] = []
        seconds = 0.0
        for path in paths:
            try:
                loaded: np.ndarray | AudioError = load_audio(path, self.sample_rate, channel)
                seconds += len(loaded) / self.sample_rate
            except AudioError as error:
                loaded = error
            window.append((path, loaded))
            if seconds >= _WINDOW_BATCHES * batch_seconds:
                yield from self._transcribe_window(window, batch_seconds, search)
                window, seconds = [], 0.0
        yield from self._transcribe_window(window, batch_seconds, search)

    def _transcribe_window(
        self,
        window: Sequence[tuple[FileSource, np.ndarray | AudioError]],
        batch_seconds: float,
        search: Mapping[str, Any],
    ) -> Iterator[tuple[FileSource, Transcript | AudioError]]:
        results: dict[int, Transcript] = {}
        lengths = {i: len(w) for i, (_, w) in enumerate(window) if isinstance(w, np.ndarray)}
        batch: list[int] = []
        for i in sorted(lengths, key=lambda i: -lengths[i]):
            longest_s = lengths[(batch or [i])[0]] / self.sample_rate
            if batch and (len(batch) + 1) * longest_s > batch_seconds:
                results |= self._numbered(batch, window, search)
                batch = []
            batch.append(i)
        results |= self._numbered(batch, window, search)
        for i, (path, loaded) in enumerate(window):
            yield path, results[i] if isinstance(loaded, np.ndarray) else loaded

    def _numbered(self, batch: list[int], window: Sequence, search: Mapping[str, Any]) -> dict:
        waveforms = [window[i][1] for i in batch]
        transcripts = self.transcribe_batch(waveforms, **search) if batch else []
        return dict(zip(batch, transcripts, strict=True))

    def transcribe_batch(self, waveforms: Sequence[np.ndarray], **search: Any) -> list[Transcript]:
        """Transcripts of waveforms (S,) at the model's rate, encoded at once.

        What is shorter than a frame of the filterbank holds no text.

        Args:
            **search: see ``SearchOptions``.
        """
        frame_samples = self.model.encoder.compute_features.compute_STFT.win_length
        spoken = [wav_S for wav_S in waveforms if len(wav_S) >= frame_samples]
        if len(spoken) < len(waveforms):
            found = iter(self.transcribe_batch(spoken, **search) if spoken else [])
            return [
                next(found)
                if len(wav_S) >= frame_samples
                else Transcript("", duration_s=len(wav_S) / self.sample_rate)
                for wav_S in waveforms
            ]
        try:
            options = SearchOptions(**search)
        except TypeError as error:
            raise UserError(f"transcribe: {error}") from None
        encoder_out_BTD, log_probs_BTV, num_frames_B = self.encode(waveforms)
        if self.model.kind == "s2s" and options.search == "beam":
            found = self._search_jointly(encoder_out_BTD, log_probs_BTV, num_frames_B, options)
        else:
            found = self._search_ctc(log_probs_BTV, num_frames_B, options)
        frame_s = self.model.encoder.stride_samples / self.sample_rate
        transcripts = []
        for (texts, placed), wav_S in zip(found, waveforms, strict=True):
            duration_s = len(wav_S) / self.sample_rate
            words, tokens = words_of(texts[0].split(), placed, frame_s, duration_s)
            segments = (Segment(texts[0], 0.0, duration_s),) if texts[0] else ()
            transcripts.append(
                Transcript(texts[0], words, tokens, segments, duration_s, tuple(texts[1:]))
            )
        return transcripts

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder output, CTC log probabilities (float32), and integer frames of each item."""
        lengths = [len(wav_S) for wav_S in waveforms]
        wav_BS = torch.zeros(len(waveforms), max([1, *lengths]))
        for row_S, wav_S in zip(wav_BS, waveforms, strict=True):
            row_S[: len(wav_S)] = torch.from_numpy(wav_S)
        num_samples_B = torch.tensor(lengths, device=self.device)
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            encoder_out_BTD, num_frames_B = self.model.encoder(
                wav_BS.to(self.device), num_samples_B
            )
            logits_BTV = self.model.ctc_lin(encoder_out_BTD)
        # An output layer may have more places than there are tokens.
        log_probs_BTV = logits_BTV.float().log_softmax(-1)
        return encoder_out_BTD.float(), log_probs_BTV, num_frames_B

    def _search_ctc(
        self, log_probs_BTV: Tensor, num_frames_B: Tensor, options: SearchOptions
    ) -> list[tuple[list[str], list[Placed]]]:
        log_probs = log_probs_BTV[..., : len(self._vocabulary)].cpu().numpy()
        frames = num_frames_B.cpu().numpy()
        if options.search == "greedy":
            blank = self.model.config["tokens"]["blank"]
            of_items = [
                [ctc_greedy(item[:count], blank)]
                for item, count in zip(log_probs, frames, strict=True)
            ]
            tokens_of_items = of_items
        else:
            search = self._ctc_search(options)
            try:
                hotwords = search.compile(options.hotwords)
            except ValueError as error:
                raise UserError(str(error)) from None
            hypotheses = search(log_probs, frames, hotwords)
            tokens_of_items = [[h.tokens for h in item] for item in hypotheses]
        return [
            (
                [self._text([token.id for token in tokens]) for tokens in item],
                [
                    Placed(
                        self._vocabulary[token.id],
                        token.start_frame,
                        token.end_frame,
                        token.log_prob,
                    )
                    for token in item[0]
                ],
            )
            for item in tokens_of_items
        ]

    def _ctc_search(self, options: SearchOptions) -> CTCBeamSearch:
        """The search of these options, made once: an n-gram takes a while to read."""
        given = {k: v for k, v in self.model.config["search"].items() if k in _CTC_SETTINGS}
        given |= {
            key: value
            for key, value in (
                ("beam_size", options.beam_size),
                ("ngram", None if options.ngram is None else str(options.ngram)),
                ("alpha", options.alpha),
                ("beta", options.beta),
            )
            if value is not None
        }
        given["topk"] = 1 + options.alternatives
        key = tuple(sorted(given.items()))
        if key not in self._searches:
            try:
                self._searches[key] = CTCBeamSearch(
                    self._vocabulary, self.model.config["tokens"]["blank"], **given
                )
            except (ValueError, OSError) as error:
                raise UserError(str(error)) from None
        return self._searches[key]

    @torch.inference_mode()
    def _search_jointly(
        self,
        encoder_out_BTD: Tensor,
        log_probs_BTV: Tensor,
        num_frames_B: Tensor,
        options: SearchOptions,
    ) -> list[tuple[list[str], list[Placed]]]:
        search = self._joint_search(options)
        wav_lens = relative_lengths(num_frames_B, encoder_out_BTD.shape[1])
        tokens_BKU, lengths_BK, _, _ = search(encoder_out_BTD, wav_lens)
        found = []
        for item, relative, log_probs_TV, count in zip(
            tokens_BKU, lengths_BK, log_probs_BTV, num_frames_B.tolist(), strict=True
        ):
            rows = [
                row[: round(float(length) * len(row))].tolist()
                for row, length in zip(item, relative, strict=True)
            ]
            kept = [[t for t in row if EOS_ID < t < len(self._vocabulary)] for row in rows]
            found.append(
                (
                    [self._text(tokens) for tokens in kept],
                    self._place(kept[0], log_probs_TV[:count]),
                )
            )
        return found

    def _joint_search(self, options: SearchOptions) -> Any:
        """A search of its own for every call: SpeechBrain's keeps its batch in itself."""
        built = {"Transformer": self.model.encoder.Transformer, **self.model.parts()}
        node = dict(self.model.config["search"])
        if options.beam_size is not None:
            node["beam_size"] = options.beam_size
        node |= {"return_topk": True, "topk": 1 + options.alternatives}
        return build(node, built)

    def _place(self, tokens: list[int], log_probs_TV: Tensor) -> list[Placed]:
        """Where the CTC branch has the tokens of a text that another search found."""
        aligned = align_tokens(log_probs_TV.cpu(), tokens, self.model.config["tokens"]["blank"])
        pieces = [self._vocabulary[token] for token in tokens]
        if aligned is None:
            return [Placed(piece, None, None, -np.inf) for piece in pieces]
        return [
            Placed(piece, span.start_frame, span.end_frame, span.log_prob)
            for piece, span in zip(pieces, aligned[0], strict=True)
        ]

    def _text(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(tokens)


_WINDOW_BATCHES = 4
_CTC_SETTINGS = (
    "beam_size",
    "beam_prune_logp",
    "token_prune_min_logp",
    "prune_history",
    "alpha",
    "beta",
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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device


def _from_hub(name: str) -> Path:
    """A repository of the hub, downloaded.

    Raises:
        UserError: it is not to be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise UserError(
            f"No model: {name!r} is no folder here and could not be downloaded from the hub "
            f"({type(error).__name__}). Train one (make demo), or give the folder of a run or a "
            "bundle."
        ) from None
