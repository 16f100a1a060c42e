"""The search in C++: hands arrays to native.cpp and reads what comes back."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decoding.ctc_beam_search.hotwords import HotwordTree
from decoding.ctc_beam_search.hypothesis import CTCToken, Vocabulary
from decoding.ctc_beam_search.ngram import Ngram, arpa_blocks, damaged, first_words
from decoding.ctc_beam_search.settings import Found, Job, Settings, Wanted
from ops import build

_FOLDER = Path(__file__).parent
_KERNEL = build.Kernel(
    _FOLDER / "native.cpp",
    _FOLDER / "ngram.h",
    # Contracted products would round otherwise than the definition's.
    flags=("-pthread", "-ffp-contract=off"),
    uses_torch=False,
)

_Address, _Integer = ctypes.c_void_p, ctypes.c_int64


class _Search(ctypes.Structure):
    _fields_ = [
        *(
            (name, _Integer)
            for name in (
                "vocabulary",
                "blank",
                "beam_size",
                "prune_history",
                "score_boundary",
                "topk",
                "threads",
            )
        ),
        *(
            (name, ctypes.c_double)
            for name in (
                "beam_prune_logp",
                "token_prune_min_logp",
                "hotword_token_min_logp",
                "alpha",
                "beta",
                "unk_score_offset",
            )
        ),
        *((name, _Address) for name in ("ngram", "begins_word", "spelling_start", "spelling")),
    ]


class _Hotwords(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_int32),
        *(
            (name, _Address)
            for name in ("edges_start", "symbols", "targets", "failures", "gains", "advances")
        ),
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        ("state", ctypes.c_char_p),
        ("state_bytes", _Integer),
        ("log_probs", _Address),
        ("frames", _Integer),
        ("hotwords", ctypes.POINTER(_Hotwords)),
        ("wanted", _Integer),
        ("answer", _Address),
        ("answer_bytes", _Integer),
    ]


_TOKEN = np.dtype([("id", "i4"), ("start_frame", "i4"), ("end_frame", "i4"), ("log_prob", "f4")])
_SCORES = np.dtype([("score", "f8"), ("lm_score", "f8"), ("num_tokens", "i8")])


def unavailable() -> str | None:
    """Why the search cannot be built on this machine; builds it if need be."""
    return _KERNEL.prepare()


@functools.cache
def _library() -> ctypes.CDLL:
    library = _KERNEL.load()
    signatures = {
        "ctc_search": (None, [_Address, _Address, _Integer]),
        "ctc_free": (None, [_Address]),
        "ngram_new": (_Address, []),
        "ngram_free": (None, [_Address]),
        "ngram_read": (ctypes.c_int, [_Address, ctypes.c_char_p, _Integer]),
        "ngram_finish": (ctypes.c_int, [_Address]),
        "ngram_error": (ctypes.c_char_p, [_Address]),
        "ngram_order": (_Integer, [_Address]),
        "ngram_num_words": (_Integer, [_Address]),
        "ngram_knows": (ctypes.c_int, [_Address, ctypes.c_char_p]),
        "ngram_start": (ctypes.c_uint32, [_Address, ctypes.c_int]),
        "ngram_score": (
            ctypes.c_double,
            [_Address, ctypes.POINTER(ctypes.c_uint32), ctypes.c_char_p],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class NativeNgram(Ngram):
    """The n-gram of `ReferenceNgram`, in about 60 bytes for each line of the file."""

    def __init__(self, path: str | Path) -> None:
        library = _library()
        self.path = Path(path)
        self.handle = library.ngram_new()
        if not self.handle:
            raise MemoryError
        weakref.finalize(self, library.ngram_free, self.handle)
        for block in arpa_blocks(path):
            self._check(library.ngram_read(self.handle, block, len(block)), path)
        self._check(library.ngram_finish(self.handle), path)
        self.order = library.ngram_order(self.handle)
        self.num_words = library.ngram_num_words(self.handle)
        self.first_words = first_words(path)

    def _check(self, status: int, path: str | Path) -> None:
        if status < 0:
            raise MemoryError
        if status == 0:
            raise damaged(path, _library().ngram_error(self.handle).decode(errors="replace"))

    def __contains__(self, word: str) -> bool:
        return bool(_library().ngram_knows(self.handle, word.encode()))

    def log10_probs(self, words: Sequence[str], in_sentence: bool = True) -> list[float]:
        library = _library()
        state = ctypes.c_uint32(library.ngram_start(self.handle, in_sentence))
        return [library.ngram_score(self.handle, state, word.encode()) for word in words]


class NativeSearch:
    """The search of `ReferenceSearch`, far faster; arguments as there."""

    def __init__(
        self, settings: Settings, vocabulary: Vocabulary, ngram: NativeNgram | None
    ) -> None:
        self._library = _library()
        self._ngram = ngram
        begins_word = np.array(vocabulary.begins_word, np.uint8)
        lengths = [len(spelling) for spelling in vocabulary.spelling]
        spelling_start = np.cumsum([0, *lengths], dtype=np.int64)
        spelling = np.array([ord(c) for c in "".join(vocabulary.spelling)], np.uint32)
        self._arrays = begins_word, spelling_start, spelling
        self._search = _Search(
            len(vocabulary),
            vocabulary.blank,
            settings.beam_size,
            settings.prune_history,
            settings.score_boundary,
            settings.topk,
            settings.threads,
            settings.beam_prune_logp,
            settings.token_prune_min_logp,
            settings.hotword_token_min_logp,
            settings.alpha,
            settings.beta,
            settings.unk_score_offset,
            ngram and ngram.handle,
            *(array.ctypes.data for array in self._arrays),
        )
        self._hotwords: weakref.WeakKeyDictionary[HotwordTree, tuple] = weakref.WeakKeyDictionary()

    def run(self, jobs: Sequence[Job], wanted: Wanted) -> list[bytes] | list[list[Found]]:
        """States after the next frames, or hypotheses."""
        native = (_Job * len(jobs))(
            *(
                _Job(
                    job.state,
                    len(job.state or b""),
                    job.log_probs_TV.ctypes.data,
                    len(job.log_probs_TV),
                    job.hotwords and ctypes.pointer(self._native_hotwords(job.hotwords)),
                    wanted,
                )
                for job in jobs
            )
        )
        self._library.ctc_search(ctypes.byref(self._search), native, len(jobs))
        answers = [ctypes.string_at(job.answer, max(0, job.answer_bytes)) for job in native]
        for job in native:
            self._library.ctc_free(job.answer)
        if any(job.answer_bytes < 0 for job in native):
            raise MemoryError
        return answers if wanted is Wanted.STATE else [_found(answer) for answer in answers]

    def _native_hotwords(self, tree: HotwordTree) -> _Hotwords:
        if tree not in self._hotwords:
            # Of two threads that come first, the arrays of one are in use and must stay.
            edges = [sorted((ord(symbol), to) for symbol, to in of.items()) for of in tree.edges]
            arrays = (
                np.cumsum([0, *map(len, edges)], dtype=np.int32),
                np.array([symbol for of in edges for symbol, _ in of], np.uint32),
                np.array([to for of in edges for _, to in of], np.int32),
                np.array(tree.failures, np.int32),
                np.array(tree.gains, np.float64),
                np.array(tree.advances, np.float64),
            )
            structure = _Hotwords(tree.start, *(array.ctypes.data for array in arrays))
            self._hotwords.setdefault(tree, (structure, arrays))
        return self._hotwords[tree][0]


def _found(answer: bytes) -> list[Found]:
    (count,) = np.frombuffer(answer, np.int64, 1)
    at, result = 8, []
    for _ in range(count):
        score, lm_score, num_tokens = np.frombuffer(answer, _SCORES, 1, at)[0].tolist()
        at += _SCORES.itemsize
        tokens = np.frombuffer(answer, _TOKEN, num_tokens, at)
        at += tokens.nbytes
        result.append(Found(list(map(CTCToken._make, tokens.tolist())), score, lm_score))
    return result
