"""How fast the CTC search is: beside SpeechBrain's at the same pruning, and beside the encoder.

    python -m benchmarks.bench_ctc_search --check
    python -m benchmarks.bench_ctc_search --report
    python -m benchmarks.bench_ctc_search --outputs outputs.npz   # of a trained model

An utterance of 16 s is searched: 400 frames of 31 characters that look like a trained model's, or
the first 400 of those in a file with the arrays ``log_probs`` (frames, tokens) and ``vocabulary``,
the blank first. The encoder is conmamba_small's without its front end, weights at random. Times are
CPU time of one thread, medians of rounds in which all take turns.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.decoders.ctc import CTCBeamSearcher
from torch import nn

from benchmarks.ctc_outputs import CHARACTERS, ctc_log_probs, lexicon, sentences, spelled
from benchmarks.report import add_options, command_line, origin, write_report
from benchmarks.targets import Target, table, verdict
from common.tables import markdown_table
from decoding.ctc_beam_search import CTCBeamSearch
from modules.TransformerASR import TransformerASR
from tools.make_ngram import estimate, write_arpa

FRAMES = 400
LEXICON = lexicon(1000)
PRUNINGS = {
    "beam 16, as in the YAML files": (16, -12.0, -1.2, False),
    "beam 100, as in the YAML files": (100, -12.0, -1.2, False),
    "beam 16, SpeechBrain's defaults": (16, -10.0, -5.0, True),
    "beam 100, SpeechBrain's defaults": (100, -10.0, -5.0, True),
}
"""Beam size and thresholds of beams and tokens in nats, and whether history is pruned."""


def generated_outputs() -> np.ndarray:
    """Log probabilities (frames, tokens) of one long utterance."""
    tokens = spelled(" ".join(sentences(LEXICON, 12)), CHARACTERS)
    return ctc_log_probs(tokens, len(CHARACTERS), doubt=0.5)


def ngram_file(folder: str) -> Path:
    """A trigram of words."""
    path = Path(folder) / "words.arpa"
    with path.open("w", encoding="utf-8") as stream:
        text = (sentence.split() for sentence in sentences(LEXICON, 5000, seed=1))
        write_arpa(estimate(text, 3), stream)
    return path


def encoder() -> Callable[[], object]:
    """The encoder of conmamba_small over one utterance."""
    torch.manual_seed(0)
    network = TransformerASR(
        tgt_vocab=len(CHARACTERS),
        input_size=640,
        d_model=144,
        nhead=4,
        num_encoder_layers=12,
        num_decoder_layers=0,
        d_ffn=1024,
        activation=nn.GELU,
        normalize_before=True,
        encoder_module="conmamba",
        attention_type="RelPosMHAXL",
        mamba_config={"d_state": 16, "expand": 2, "d_conv": 4, "bidirectional": True},
    ).eval()
    features_BTD = torch.randn(1, FRAMES, 640)
    return torch.inference_mode()(lambda: network.encode(features_BTD))


def searches(
    log_probs_TV: np.ndarray, vocabulary: list[str], pruning: tuple, ngram: Path | None
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, SpeechBrain's) search of an utterance.

    Raises:
        RuntimeError: they find different texts.
    """
    names = ("beam_size", "beam_prune_logp", "token_prune_min_logp", "prune_history")
    options = dict(zip(names, pruning, strict=True))
    ours = CTCBeamSearch(vocabulary, ngram=ngram, backend="native", **options)
    theirs = CTCBeamSearcher(0, vocabulary, kenlm_model_path=ngram and str(ngram), **options)
    log_probs_BTV, tensor_BTV = log_probs_TV[None], torch.from_numpy(log_probs_TV[None])
    texts = ours(log_probs_BTV)[0][0].text, theirs(tensor_BTV)[0][0].text
    if texts[0] != texts[1]:
        raise RuntimeError(f"The searches differ: {texts[0]!r} and {texts[1]!r}.")
    return lambda: ours(log_probs_BTV), lambda: theirs(tensor_BTV)


def cpu_medians_ms(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Milliseconds of CPU time of each."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of_call in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            of_call.append((time.process_time() - start) * 1e3)
    return list(map(statistics.median, times))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--outputs", type=Path, help="log probabilities of a trained model (.npz)")
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)

    vocabulary, log_probs_TV = CHARACTERS, generated_outputs()
    if arguments.outputs:
        with np.load(arguments.outputs) as file:
            vocabulary, log_probs_TV = file["vocabulary"].tolist(), file["log_probs"]
    log_probs_TV = np.ascontiguousarray(log_probs_TV[:FRAMES, : len(vocabulary)], np.float32)

    rows, targets, encode = [], [], encoder()
    with tempfile.TemporaryDirectory() as folder:
        # SpeechBrain's search asks kenlm about its n-gram.
        ngrams = [None, ngram_file(folder)] if find_spec("kenlm") else [None]
        for ngram in ngrams:
            for name, pruning in PRUNINGS.items():
                setting = name + (", trigram" if ngram else "")
                calls = [encode, *searches(log_probs_TV, vocabulary, pruning, ngram)]
                encoder_ms, ours_ms, theirs_ms = cpu_medians_ms(calls, arguments.rounds)
                rows.append(
                    [
                        setting,
                        f"{ours_ms:.2f} ms",
                        f"{theirs_ms:.1f} ms",
                        f"{theirs_ms / ours_ms:.0f}",
                        f"{encoder_ms:.0f} ms",
                        f"{ours_ms / encoder_ms:.4f}",
                    ]
                )
                print(": ".join([setting, ", ".join(rows[-1][1:])]), file=sys.stderr, flush=True)
                targets.append(
                    Target(f"{setting}: times as fast", theirs_ms / ours_ms, 10, True, "")
                )
                if pruning[0] == 16:
                    targets.append(
                        Target(f"{setting}: of the encoder", ours_ms / encoder_ms, 0.4, False, "")
                    )
    header = ["search", "ours", "SpeechBrain's", "times as fast", "encoder", "ours / encoder"]
    write_report(
        "ctc_search",
        "\n\n".join(
            [
                "# CTC beam search",
                origin(command_line("bench_ctc_search", argv), ["torch", "speechbrain", "numpy"]),
                "16 s in 400 frames; CPU time of one thread, medians.",
                markdown_table(header, rows),
                table(targets),
            ]
        ),
        arguments.report,
    )
    return verdict(targets, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
