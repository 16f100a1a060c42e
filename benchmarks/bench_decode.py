"""How fast and how small decoding is: cached search against the same search without caches.

    python -m benchmarks.bench_decode --check
    python -m benchmarks.bench_decode --report
    python -m benchmarks.bench_decode --only memory per_token
    python -m benchmarks.bench_decode --device cuda

The networks have the decoders of conmambamamba_small and conmamba_small (4 layers, d_model 144,
5000 tokens) and random weights; a search runs a fixed number of tokens over random encoder output.
"Uncached" is SpeechBrain's S2STransformerBeamSearcher with its own scorers over the same networks.
Both sides of a ratio are timed in turn within one run, the fastest of the rounds counts.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.decoders import S2STransformerBeamSearcher
from speechbrain.decoders import scorer as speechbrain_scorers
from speechbrain.nnet.linear import Linear
from torch import nn

from benchmarks.report import (
    add_options,
    check_device,
    command_line,
    machine_slug,
    origin,
    write_report,
)
from common.tables import markdown_table
from decoding.beam_search import CachedBeamSearcher
from decoding.ctc_prefix_scorer import CTCScorer
from decoding.lm_scorers import LMScorer
from decoding.scorers import ScorerBuilder
from modules.lm import TransformerLM
from modules.TransformerASR import TransformerASR

VOCABULARY, D_MODEL = 5000, 144
BLANK, BOS, EOS = 0, 1, 2
FRAMES_PER_S = 25
LONG_S = 10.0


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        what: the setting.
        measured: as printed.
        target: as printed.
        reached: whether the target holds.
    """

    what: str
    measured: str
    target: str
    reached: bool


@dataclass(frozen=True)
class Setting:
    """What the command line decides.

    Attributes:
        tokens: per search.
        joint_tokens: per search with the large language model, which takes minutes without caches
            and gains from them the more, the longer the search is.
        rounds: of a timing.
    """

    tokens: int
    joint_tokens: int
    rounds: int


def network(decoder_module: str) -> TransformerASR:
    """The decoder of a small S2S model; one encoder layer stands for twelve, none is run."""
    torch.manual_seed(0)
    return TransformerASR(
        tgt_vocab=VOCABULARY,
        input_size=640,
        d_model=D_MODEL,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=4,
        d_ffn=1024,
        dropout=0.1,
        activation=nn.GELU,
        normalize_before=True,
        encoder_module="conmamba",
        decoder_module=decoder_module,
        attention_type="RelPosMHAXL",
        mamba_config={"d_state": 16, "expand": 2, "d_conv": 4, "bidirectional": True},
    ).eval()


def encoder_output(seconds: float, batch_size: int = 1) -> torch.Tensor:
    """Random (batch, frames, width) of the scale of a LayerNorm's output."""
    torch.manual_seed(1)
    return torch.randn(batch_size, round(seconds * FRAMES_PER_S) + 1, D_MODEL)


def search_options(frames: int, beam_size: int, tokens: int) -> dict[str, Any]:
    """A search of exactly ``tokens`` steps: no hypothesis may end before."""
    ratio = (tokens + 0.5) / frames
    return {
        "bos_index": BOS,
        "eos_index": EOS,
        "min_decode_ratio": ratio,
        "max_decode_ratio": ratio,
        "beam_size": beam_size,
        "temperature": 1.15,
        "using_eos_threshold": False,
    }


def fastest(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each run, all of them once per round, the fastest round of each.

    A round of many seconds is not repeated: what disturbs it is averaged within.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if torch.get_default_device().type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if sum(seconds[-1] for seconds in times) > LONG_S:
            break
    return [min(seconds) for seconds in times]


def speed_up(
    what: str, target: float, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> Result:
    """A line that compares two ways to the same result."""
    ours_s, theirs_s = fastest([ours, theirs], rounds)
    ratio = theirs_s / ours_s
    measured = f"{ratio:.1f} times ({ours_s:.2f} s against {theirs_s:.2f} s)"
    return Result(what, measured, f"at least {target:g} times faster", ratio >= target)


def search_pair(
    decoder_module: str, beam_size: int, tokens: int, with_lm: bool = False
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(cached, uncached) search of one utterance of 16 s."""
    model, memory_BTD = network(decoder_module), encoder_output(16.0)
    output = Linear(input_size=D_MODEL, n_neurons=VOCABULARY)
    options = search_options(memory_BTD.shape[1], beam_size, tokens)
    scorers: list[Any] = [None, None]
    if with_lm:
        ctc = Linear(input_size=D_MODEL, n_neurons=VOCABULARY)
        lm = large_lm()
        kinds = [
            (ScorerBuilder, CTCScorer, LMScorer, "lm"),
            (
                speechbrain_scorers.ScorerBuilder,
                speechbrain_scorers.CTCScorer,
                speechbrain_scorers.TransformerLMScorer,
                "transformerlm",
            ),
        ]
        scorers = [
            builder(
                weights={"ctc": 0.4, lm_key: 0.6},
                full_scorers=[lm_class(lm, temperature=1.15)],
                partial_scorers=[ctc_class(ctc, BLANK, EOS)],
            )
            for builder, ctc_class, lm_class, lm_key in kinds
        ]
    cached = CachedBeamSearcher(modules=[model, output], scorer=scorers[0], **options)
    uncached = S2STransformerBeamSearcher(modules=[model, output], scorer=scorers[1], **options)
    full = torch.ones(1)
    return lambda: cached(memory_BTD, full), lambda: uncached(memory_BTD.clone(), full)


def large_lm() -> TransformerLM:
    """The architecture of speechbrain/asr-transformer-transformerlm-librispeech."""
    torch.manual_seed(2)
    return TransformerLM(
        vocab=VOCABULARY,
        d_model=768,
        nhead=12,
        num_encoder_layers=12,
        num_decoder_layers=0,
        d_ffn=3072,
        dropout=0.0,
        activation=nn.GELU,
        normalize_before=False,
    ).eval()


def mamba_attention_alone(beam_size: int, target: float, setting: Setting) -> Result:
    """The published Mamba decoder against its uncached search."""
    ours, theirs = search_pair("mamba", beam_size, setting.tokens)
    ours()
    return speed_up(
        f"Mamba decoder, attention score alone, 16 s, beam {beam_size}, {setting.tokens} tokens: "
        "cached against uncached",
        target,
        ours,
        theirs,
        setting.rounds,
    )


def transformer_attention_alone(setting: Setting) -> Result:
    """The Transformer decoder against its uncached search."""
    ours, theirs = search_pair("transformer", 10, setting.tokens)
    ours()
    return speed_up(
        f"Transformer decoder, 16 s, beam 10, {setting.tokens} tokens: cached against uncached",
        4,
        ours,
        theirs,
        setting.rounds,
    )


def joint_with_large_lm(setting: Setting) -> Result:
    """CTC, attention and the large language model together."""
    ours, theirs = search_pair("mamba", 66, setting.joint_tokens, with_lm=True)
    return speed_up(
        f"joint CTC/attention with the large Transformer LM, 16 s, beam 66, {setting.joint_tokens} "
        "tokens: ours against SpeechBrain's search and scorers",
        5,
        ours,
        theirs,
        setting.rounds,
    )


def time_per_token(setting: Setting) -> Result:
    """A step of the Mamba decoder after short and after long audio."""
    model = network("mamba")
    tokens_N = torch.full((10,), 7)
    states = {
        seconds: model.init_decoder_state(
            encoder_output(seconds), torch.tensor([encoder_output(seconds).shape[1]])
        ).repeat(10)
        for seconds in (2.0, 120.0)
    }

    def steps(state) -> Callable[[], None]:
        def run() -> None:
            current = state
            for _ in range(20):
                _, current = model.decode_step(tokens_N, current)

        return run

    runs = [steps(state) for state in states.values()]
    fastest(runs, 1)
    short_s, long_s = fastest(runs, 10 * setting.rounds)
    difference = abs(long_s / short_s - 1)
    measured = f"{short_s / 20 * 1e3:.2f} ms and {long_s / 20 * 1e3:.2f} ms: {difference:.1%} apart"
    return Result(
        "Mamba decoder, time per token at 2 s and at 120 s of audio (10 beams)",
        measured,
        "within 10 % of each other",
        difference <= 0.10,
    )


def state_memory(setting: Setting) -> Result:
    """Bytes of the state of one beam after different audio and prefixes."""
    model, sizes = network("mamba"), []
    for seconds in (2.0, 120.0):
        memory_BTD = encoder_output(seconds)
        state = model.init_decoder_state(memory_BTD, torch.tensor([memory_BTD.shape[1]])).repeat(10)
        for _ in range(setting.tokens):
            sizes.append(state_bytes(state) / 10)
            _, state = model.decode_step(torch.full((10,), 7), state)
    same = min(sizes) == max(sizes)
    measured = f"{sizes[0] / 1024:.0f} KiB" + ("" if same else f" to {max(sizes) / 1024:.0f} KiB")
    return Result(
        f"Mamba decoder, state per beam, 2 s and 120 s of audio, 0 to {setting.tokens - 1} tokens",
        measured,
        "independent of audio and prefix",
        same,
    )


def state_bytes(state) -> int:
    """Bytes that a Mamba decoder's state keeps alive, each storage once."""
    storages = {}
    for mamba_state in (*state.layers.self_mambas, *state.layers.cross_mambas):
        for tensor in (mamba_state.conv, mamba_state.ssm):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def batch_throughput(setting: Setting) -> Result:
    """Sixteen utterances of 4 to 16 s at once and one after the other."""
    model, output = network("mamba"), Linear(input_size=D_MODEL, n_neurons=VOCABULARY)
    memory_BTD = encoder_output(16.0, batch_size=16)
    frames = memory_BTD.shape[1]
    lengths = torch.linspace(frames / 4, frames, 16).round().long()
    options = search_options(frames, 10, setting.tokens)
    searcher = CachedBeamSearcher(modules=[model, output], **options)

    def together() -> None:
        searcher(memory_BTD, lengths / frames)

    def one_by_one() -> None:
        for row, length in enumerate(lengths.tolist()):
            searcher(memory_BTD[row : row + 1, :length], torch.ones(1))

    together()
    return speed_up(
        "batch of 16 utterances of 4 to 16 s, beam 10, against one by one",
        2,
        together,
        one_by_one,
        setting.rounds,
    )


MEASUREMENTS: dict[str, Callable[[Setting], Result]] = {
    "mamba_beam_10": lambda setting: mamba_attention_alone(10, 15, setting),
    "mamba_beam_66": lambda setting: mamba_attention_alone(66, 20, setting),
    "joint": joint_with_large_lm,
    "per_token": time_per_token,
    "transformer": transformer_attention_alone,
    "memory": state_memory,
    "batch": batch_throughput,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, help="measure only these")
    parser.add_argument("--tokens", type=int, default=50, help="tokens per search")
    parser.add_argument("--joint_tokens", type=int, default=25, help="the same with the large LM")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side is timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    arguments = parser.parse_args(argv)
    check_device(parser, arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")

    setting = Setting(arguments.tokens, arguments.joint_tokens, arguments.rounds)
    results = []
    for name in arguments.only or MEASUREMENTS:
        results.append(MEASUREMENTS[name](setting))
        print(f"{results[-1].what}: {results[-1].measured}", flush=True)
    missed = [result for result in results if not result.reached]
    if arguments.report:
        rows = [[r.what, r.measured, r.target, "yes" if r.reached else "no"] for r in results]
        write_report(
            "decode" if arguments.device == "cpu" else f"decode_{machine_slug('cuda')}",
            "\n\n".join(
                [
                    "# Decoding",
                    origin(
                        command_line("bench_decode", argv),
                        ["torch", "speechbrain"],
                        arguments.device,
                    )
                    + f"\n- threads: {arguments.threads}, float32, random weights",
                    markdown_table(["setting", "measured", "target", "reached"], rows),
                ]
            ),
        )
    for result in missed:
        print(f"missed: {result.what}: {result.measured}, wanted {result.target}", file=sys.stderr)
    return 1 if missed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
