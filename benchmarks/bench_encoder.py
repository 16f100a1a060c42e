"""How fast and in how much memory encoders train: ConMamba beside SpeechBrain's Conformer.

    python -m benchmarks.bench_encoder              speed and memory from 4 to 240 seconds
    python -m benchmarks.bench_encoder --check      exit status 1 if ConMamba is not fast enough
    python -m benchmarks.bench_encoder --device cuda --precision bf16 --batch_size 16
    python -m benchmarks.bench_encoder --kernels --device cuda --precision bf16 --seconds 4 16
                                                    what a step launches, and how long it takes
    python -m benchmarks.bench_encoder --profile    where a whole training step of a recipe goes

A step is forward, backward and AdamW on unpadded frames at 25 a second, with dropout.
The two encoders take turns, so that whatever else the machine does meets both.
"""

import argparse
import ctypes
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import soundfile
import torch
from speechbrain.augment.freq_domain import SpectrogramDrop
from speechbrain.augment.time_domain import SpeedPerturb
from speechbrain.lobes.models.transformer.TransformerASR import (
    TransformerASR as SpeechBrainTransformerASR,
)
from speechbrain.nnet.linear import Linear
from speechbrain.processing.features import InputNormalization
from torch import Tensor, nn

from benchmarks.report import check_device, machine_slug, origin, write_report
from common.tables import markdown_table
from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.speech_encoder import SpeechEncoder
from modules.TransformerASR import TransformerASR
from training.brains.cast_weights import CastWeights
from training.brains.graphs import CudaRecorder, GraphedEncoder
from training.launch.allocator import keep_freed_memory

SAMPLE_RATE = 16000
FRAMES_PER_S = 25
D_MODEL = 144
VOCABULARY = 31
NETWORK = {
    "tgt_vocab": VOCABULARY,
    "d_model": D_MODEL,
    "nhead": 4,
    "num_encoder_layers": 12,
    "num_decoder_layers": 0,
    "d_ffn": 1024,
    "dropout": 0.1,
    "normalize_before": True,
    "attention_type": "RelPosMHAXL",
    "causal": False,
}
REQUIRED_RATIOS = {16: 1.25, 60: 2.0}
"""Seconds of audio per utterance, and how many times as fast ConMamba must train there."""

OPERATORS = {
    "scan, convolution and gate of the mixers": ("_MambaInner", "mamba_asr", "selective_scan"),
    "matrix products": ("mm", "linear", "matmul", "einsum"),
    "other convolutions": ("conv",),
    "normalisation": ("layer_norm", "batch_norm"),
    "dropout": ("Dropout", "dropout", "bernoulli"),
    "activations": ("gelu", "silu", "glu", "leaky_relu", "sigmoid", "softmax"),
    "CTC loss": ("ctc_loss",),
    "filterbank": ("fft", "stft"),
    "optimiser": ("adam", "foreach", "Optimizer"),
}
"""Parts of operator names, tried in turn; the rest moves and adds up numbers."""


def conmamba(**changes) -> nn.Module:
    """Ours: 12 layers, d_model 144, d_ffn 1024, but for the ``changes``."""
    options = NETWORK | changes
    return TransformerASR(input_size=options["d_model"], encoder_module="conmamba", **options)


def conformer(**changes) -> nn.Module:
    """SpeechBrain's own Conformer of the same size."""
    options = NETWORK | changes
    return SpeechBrainTransformerASR(
        input_size=options["d_model"], encoder_module="conformer", **options
    )


def training_step(
    network: nn.Module, src: Tensor, precision: str, ours: bool = False, graphs: bool = False
) -> Callable[[], None]:
    """A function that trains ``network`` by one step on ``src`` in fp32 or bf16.

    Args:
        ours: as the recipes train on a GPU, which cast all weights at once.
        graphs: as they do with ``cuda_graphs``.
    """
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    half = precision == "bf16"
    casts: CastWeights | None = None
    if ours and graphs:
        dtype = torch.bfloat16 if half else torch.float32
        network.encoder.forward = GraphedEncoder(network.encoder, 1, CudaRecorder(), dtype)
    elif ours and half and src.is_cuda:
        casts = CastWeights([network], torch.bfloat16)

    def step() -> None:
        cast = nullcontext() if casts is None else casts.in_place()
        with torch.autocast(src.device.type, torch.bfloat16, enabled=half), cast:
            loss = network.encode(src).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_gib(run: Callable[[], object], device: str) -> float | None:
    """Memory that ``run`` takes at its peak beyond what was taken before.

    None where a CPU's memory cannot be told (outside Linux).
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # What the allocator keeps from earlier runs would hide what this one takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")
    before_kib = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before_kib) / 2**20


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def limit_memory(gib: float) -> None:
    """Let an allocation beyond ``gib`` fail here, before the system ends some process."""
    if sys.platform == "linux":
        limit = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def available_gib() -> float:
    """Memory that is free now; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def measure(
    seconds: int, batch_size: int, repeats: int, device: str, precision: str, graphs: bool
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Median step time and peak memory of both networks; a network that does not fit is absent."""
    torch.manual_seed(0)
    src = torch.randn(batch_size, seconds * FRAMES_PER_S, D_MODEL, device=device)
    steps = {
        "conmamba": training_step(conmamba().to(device), src, precision, True, graphs),
        "conformer": training_step(conformer().to(device), src, precision),
    }
    peaks: dict[str, float | None] = {}
    for name, step in steps.items():
        try:
            step()
            # The second step captures, where steps are captured.
            peaks[name] = peak_gib(step, device)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
    durations = defaultdict(list)
    for _ in range(repeats):
        for name in peaks:
            durations[name].append(_seconds(steps[name], device))
    return {name: median(times) for name, times in durations.items()}, peaks


def compare(args: argparse.Namespace) -> list[str]:
    """Print and write the table; returns what falls short."""
    rows, short = [], []
    for seconds in args.seconds:
        step_s, peaks = measure(
            seconds, args.batch_size, args.repeats, args.device, args.precision, args.cuda_graphs
        )
        audio_s = seconds * args.batch_size
        cells = [f"{audio_s / step_s[name]:.1f}" if name in step_s else "-" for name in step_s]
        memory = [_gib(peaks, name) for name in ("conmamba", "conformer")]
        if "conformer" in step_s:
            ratio = step_s["conformer"] / step_s["conmamba"]
            rows.append([seconds, *cells, f"{ratio:.2f}", *memory])
            if ratio < REQUIRED_RATIOS.get(seconds, 0.0):
                short.append(
                    f"{seconds} s: ConMamba trains {ratio:.2f} times as fast as the Conformer; "
                    f"wanted {REQUIRED_RATIOS[seconds]}"
                )
        else:
            rows.append([seconds, *cells, "does not fit", "-", *memory])
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    header = [
        "seconds of audio",
        "ConMamba, s/s",
        "Conformer, s/s",
        "ratio",
        "ConMamba, GiB",
        "Conformer, GiB",
    ]
    text = (
        f"# Training speed of encoders\n\nForward, backward and AdamW; batch {args.batch_size}, "
        f"{args.precision}, {_where(args)}, no padding, 12 layers, d_model 144, d_ffn 1024, "
        f"medians of {args.repeats} steps in turns. s/s: seconds of audio trained on per second. "
        f"GiB: peak beyond parameters and their moments. The Conformer is SpeechBrain's own"
        f"{'; the ConMamba is captured as a CUDA graph' if args.cuda_graphs else ''}.\n\n"
        f"{markdown_table(header, rows)}\n\n{_origin(args.device)}"
    )
    kind = "encoder_graphs" if args.cuda_graphs else "encoder"
    write_report(f"{kind}_{_machine(args)}_{date.today().isoformat()}", text, args.report)
    return short


def _where(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return "on a GPU"
    return f"{args.threads} threads, at most {args.max_memory_gib:.0f} GiB"


def _machine(args: argparse.Namespace) -> str:
    if args.machine:
        return args.machine
    precision = "" if args.precision == "fp32" else f"_{args.precision}"
    return machine_slug(args.device) + precision


def _gib(peaks: dict[str, float | None], name: str) -> str:
    if name not in peaks:
        return "beyond the limit"
    return "not measured" if peaks[name] is None else f"{peaks[name]:.2f}"


class TrainingStep:
    """One step of the small CTC recipe, from audio files to new weights, with a clock in it."""

    def __init__(self, folder: Path, seconds: int, batch_size: int):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        self.paths = [folder / f"{i}.flac" for i in range(batch_size)]
        for path in self.paths:
            soundfile.write(path, 0.1 * rng.standard_normal(seconds * SAMPLE_RATE), SAMPLE_RATE)
        self.speed = SpeedPerturb(SAMPLE_RATE, speeds=[95, 100, 105])
        drop = {"replace": "mean", "drop_count_low": 1}
        self.drops = [
            SpectrogramDrop(6, 12, drop_count_high=5, dim=1, **drop),
            SpectrogramDrop(10, 20, drop_count_high=3, dim=2, **drop),
        ]
        front_end = ConvolutionFrontEnd((8, 10, 80))
        network = TransformerASR(input_size=640, encoder_module="conmamba", **NETWORK)
        self.encoder = SpeechEncoder(
            Fbank(n_fft=512),
            InputNormalization(norm_type="global", update_until_epoch=4),
            front_end,
            network,
        )
        self.output = Linear(input_size=D_MODEL, n_neurons=VOCABULARY)
        self.model = nn.ModuleList([front_end, network, self.output])
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens = torch.randint(1, VOCABULARY, (batch_size, 10 * seconds))
        self.stage_s: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def _timed(self, stage: str):
        started = time.perf_counter()
        yield
        self.stage_s[stage].append(time.perf_counter() - started)

    def run(self) -> None:
        """One step."""
        with self._timed("reading and speed perturbation"):
            waves = [
                torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in self.paths
            ]
            waves = [self.speed(wave[None])[0] for wave in waves]
            samples_B = torch.tensor([len(wave) for wave in waves])
            wav_BS = nn.utils.rnn.pad_sequence(waves, batch_first=True)
        with self._timed("filterbank and normalisation"):
            feats_BTM, feature_frames_B = self.encoder.features(wav_BS, samples_B, epoch=1)
        with self._timed("spectrogram drops"):
            for drop in self.drops:
                feats_BTM = drop(feats_BTM)
        with self._timed("front end, forward"):
            src, frames_B = self.encoder.frontend(feats_BTM, feature_frames_B)
        with self._timed("encoder, forward"):
            encoded_BTD = self.encoder.encode(src, frames_B)
        with self._timed("output and CTC loss, forward"):
            log_probs_BTV = self.output(encoded_BTD).log_softmax(-1)
            token_lengths_B = torch.full((len(self.paths),), self.tokens.shape[1])
            loss = nn.functional.ctc_loss(
                log_probs_BTV.transpose(0, 1),
                self.tokens,
                frames_B,
                token_lengths_B,
                zero_infinity=True,
            )
        self._backward(loss, encoded_BTD, src)
        with self._timed("clipping and AdamW"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _backward(self, loss: Tensor, encoded_BTD: Tensor, src: Tensor) -> None:
        marks = [time.perf_counter()]
        for tensor in (encoded_BTD, src):
            tensor.register_hook(lambda _: marks.append(time.perf_counter()))
        loss.backward()
        marks.append(time.perf_counter())
        names = ("output and CTC loss", "encoder", "front end")
        for name, start, end in zip(names, marks[:-1], marks[1:], strict=True):
            self.stage_s[f"{name}, backward"].append(end - start)


def profile(args: argparse.Namespace) -> None:
    """Print and write where a training step goes, by stage and by kind of operator."""
    with tempfile.TemporaryDirectory() as folder:
        step = TrainingStep(Path(folder), args.profile_seconds, args.batch_size)
        step.run()
        step.stage_s.clear()
        for _ in range(args.repeats):
            step.run()
        stage_s = {stage: median(times) for stage, times in step.stage_s.items()}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step.run()
    operator_s: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        operator_s[_kind(event.key)] += event.self_cpu_time_total / 1e6
    text = (
        f"# Where a training step goes\n\nSmall ConMamba CTC recipe: batch {args.batch_size} of "
        f"{args.profile_seconds} s, float32, {args.threads} threads. Stages: medians of "
        f"{args.repeats} steps. Operators: one profiled step, forward and backward.\n\n"
        f"{_shares('stage', stage_s)}\n\n{_shares('operators', operator_s)}\n\n{_origin()}"
    )
    write_report(f"training_step_{_machine(args)}_{date.today().isoformat()}", text, args.report)


def kernels(args: argparse.Namespace) -> None:
    """Print and write which kernels a step of each encoder launches, the longest first.

    On a CPU they are torch's operators.
    """
    on_gpu = args.device == "cuda"
    activity = (
        torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    )
    parts = []
    for seconds in args.seconds:
        src = torch.randn(args.batch_size, seconds * FRAMES_PER_S, D_MODEL, device=args.device)
        for name, make in (("ConMamba", conmamba), ("Conformer", conformer)):
            network, ours = make().to(args.device), name == "ConMamba"
            step = training_step(network, src, args.precision, ours, args.cuda_graphs)
            for _ in range(3):
                step()
            wall_ms = 1e3 * median(_seconds(step, args.device) for _ in range(args.repeats))
            with torch.profiler.profile(activities=[activity]) as profiler:
                step()
                if on_gpu:
                    torch.cuda.synchronize()
            rows = []
            for event in profiler.key_averages():
                us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                if us > 0 and (not on_gpu or event.device_type == torch.profiler.DeviceType.CUDA):
                    rows.append([event.key[:70], event.count, us / 1e3])
            rows.sort(key=lambda row: -row[2])
            busy_ms, launches = sum(row[2] for row in rows), sum(row[1] for row in rows)
            title = (
                f"{name}, {args.batch_size} x {seconds} s: {wall_ms:.1f} ms a step, "
                f"{launches} kernels in {busy_ms:.1f} ms"
            )
            sys.stdout.write(f"{title}\n")
            shown = [[key, count, f"{ms:.2f}"] for key, count, ms in rows[:18]]
            parts.append(f"## {title}\n\n{markdown_table(['kernel', 'calls', 'ms'], shown)}")
    text = "\n\n".join(["# Kernels of a training step", *parts, _origin(args.device)])
    write_report(f"kernels_{_machine(args)}_{date.today().isoformat()}", text, args.report)


def _seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _kind(operator: str) -> str:
    for kind, parts in OPERATORS.items():
        if any(part in operator for part in parts):
            return kind
    return "copies, sums, element-wise arithmetic"


def _shares(what: str, seconds: dict[str, float]) -> str:
    total_s = sum(seconds.values())
    rows = [
        [name, f"{1000 * s:.1f}", f"{100 * s / total_s:.1f}"]
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return markdown_table([what, "ms", "%"], [*rows, ["sum", f"{1000 * total_s:.1f}", "100"]])


def _origin(device: str = "cpu") -> str:
    command = f"python -m benchmarks.bench_encoder {' '.join(sys.argv[1:])}".rstrip()
    return origin(command, ["torch", "speechbrain"], device)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, "default: %(default)s"
    lengths = [4, 8, 16, 30, 60, 120, 240]
    add("--seconds", type=int, nargs="+", default=lengths, help=f"lengths of audio; {default}")
    add("--batch_size", type=int, default=4, help=f"utterances of a batch; {default}")
    add("--repeats", type=int, default=5, help=f"times are medians of so many steps; {default}")
    add("--threads", type=int, default=2, help=f"of the CPU; {default}")
    add(
        "--max_memory_gib",
        type=float,
        default=0.8 * available_gib(),
        help="what needs more is left out; default: 80 %% of what is free (%(default).1f)",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help=default)
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=default)
    parser.add_argument("--cuda_graphs", action="store_true", help="for ConMamba, as the key does")
    parser.add_argument("--machine", help="part of the report's file name; the processor's name")
    parser.add_argument(
        "--check", action="store_true", help="measure 16 and 60 s only; 1 on failure"
    )
    parser.add_argument("--report", action="store_true", help="write to benchmarks/reports")
    parser.add_argument("--profile", action="store_true", help="profile a training step instead")
    parser.add_argument("--kernels", action="store_true", help="list what a step launches instead")
    add("--profile_seconds", type=int, default=16, help=f"with --profile; {default}")
    args = parser.parse_args()
    check_device(parser, args.device)
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        # A GPU's driver reserves more than that.
        limit_memory(args.max_memory_gib)
    if args.profile:
        # As the recipes do.
        keep_freed_memory()
        profile(args)
        return
    if args.kernels:
        kernels(args)
        return
    if args.check:
        args.seconds = sorted(REQUIRED_RATIOS)
    short = compare(args)
    if args.check and short:
        sys.exit("\n".join(["Too slow:", *short]))


if __name__ == "__main__":
    main()
