"""CTC beam search: numpy arrays in, texts with frames out, in C++ or Python, without torch."""

from decoding.ctc_beam_search.greedy import CTCGreedySearch
from decoding.ctc_beam_search.hotwords import HotwordTree
from decoding.ctc_beam_search.hypothesis import CTCHypothesis, CTCToken, CTCWord
from decoding.ctc_beam_search.ngram import Ngram
from decoding.ctc_beam_search.search import (
    CTCBeamSearch,
    CTCSearchState,
    ctc_greedy,
    greedy_path,
    read_ngram,
)

__all__ = [
    "CTCBeamSearch",
    "CTCGreedySearch",
    "CTCHypothesis",
    "CTCSearchState",
    "CTCToken",
    "CTCWord",
    "HotwordTree",
    "Ngram",
    "ctc_greedy",
    "greedy_path",
    "read_ngram",
]
