"""Learning curves of a run as one picture."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from common.files import atomic_write
from training.reporting.metrics_log import MetricsLog

# Okabe and Ito's colours, told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"
_COLOURS = {"wer": _ORANGE, "cer": _GREEN, "acc": _GREEN, "ppl": _ORANGE}
# Losses that span more than this ratio are drawn on a logarithmic axis: a CTC loss falls from
# hundreds to single digits within the first epochs, and all that follows would be a flat line.
_LOGARITHMIC_FROM_RATIO = 20
_SMOOTHING_REACH = 0.01  # of the number of values, to either side


def plot_curves(
    metrics_jsonl: str | os.PathLike, png_path: str | os.PathLike, title: str | None = None
) -> None:
    """Draw losses, what validations measured and learning rate against optimiser steps.

    Needs no display and leaves pyplot's state alone. There is a panel for what was measured: error
    rates of a recogniser, token accuracy of one with a decoder, perplexity of a language model.

    Args:
        metrics_jsonl: file of a :class:`training.reporting.metrics_log.MetricsLog`.
        png_path: picture to write; an older one is replaced when the new one is complete.
        title: a line above the panels, such as the name of the run.
    """
    entries = MetricsLog(metrics_jsonl).read()
    panels = [panel for panel in _PANELS if any(len(_series(entries, n)[1]) for n in panel.names)]
    panels = panels or [_PANELS[0]]
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(9.0, 1.0 + 0.8 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)
    all_axes = list(columns[:, 0])
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    for panel, axes in zip(panels, all_axes, strict=True):
        panel.draw(axes, entries)
        _finish(axes, panel.legend)
    figure.align_ylabels()
    last = all_axes[-1]
    last.set_xlabel("optimiser steps")
    last.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    last.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _add_epochs(all_axes[0], entries)
    with atomic_write(png_path, "wb") as file:
        figure.savefig(file, format="png")


def run_title(output_folder: str | os.PathLike, param_file: str | os.PathLike = "") -> str:
    """The recipe and the folder of a run: a folder alone may be called after a seed."""
    folder = "/".join(Path(output_folder).absolute().parts[1:][-3:])
    recipe = Path(param_file).stem
    # A run that is gone on with was begun with a copy in its own folder.
    return folder if recipe in ("", "recipe", "hyperparams") else f"{recipe}: {folder}"


def plot_sizes(
    points: Sequence[tuple[str, str, int, float, float, float]], png_path: str | os.PathLike
) -> None:
    """Draw word error rates against numbers of parameters, a colour for each split.

    Args:
        points: (run, split, parameters, WER, its lower and its upper bound), rates in percent.
        png_path: picture to write.
    """
    figure = Figure(figsize=(8.0, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    splits = list(dict.fromkeys(split for _, split, *_ in points))
    for split, colour in zip(splits, cycle((_BLUE, _ORANGE, _GREEN, _GREY))):
        of_split = sorted((point for point in points if point[1] == split), key=lambda p: p[2])
        names, _, sizes, rates, lows, highs = zip(*of_split, strict=True)
        reach = np.abs(np.stack([lows, highs]) - np.asarray(rates))
        axes.errorbar(sizes, rates, reach, fmt="o", color=colour, capsize=3, label=split)
        for name, size, rate in zip(names, sizes, rates, strict=True):
            offset = {"xytext": (6, 5), "textcoords": "offset points"}
            axes.annotate(name, (size, rate), fontsize="small", color=colour, **offset)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1e6:g} M")
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("parameters")
    axes.set_ylabel("WER, % (bars: 95 % intervals)")
    _finish(axes)
    with atomic_write(png_path, "wb") as file:
        figure.savefig(file, format="png")


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over each value and up to ``reach`` neighbours on either side.

    Centred, so that a falling curve is not drawn late as an exponential average would draw it.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    first = np.maximum(positions - reach, 0)
    last = np.minimum(positions + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _series(entries: Sequence[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries that have a number under ``name``."""
    points = [
        (entry["step"], entry[name])
        for entry in entries
        if isinstance(entry.get(name), int | float)
    ]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _plot_losses(axes: Axes, entries: Sequence[dict]) -> None:
    steps, train = _series(entries, "train_loss")
    if len(train):
        axes.plot(steps, train, color=_BLUE, alpha=0.22, linewidth=0.8)
        smoothed = smooth(train, round(_SMOOTHING_REACH * len(train)))
        axes.plot(steps, smoothed, color=_BLUE, linewidth=1.8, label="training, smoothed")
    valid_steps, valid = _series(entries, "valid_loss")
    if len(valid):
        axes.plot(
            valid_steps, valid, "o-", color=_ORANGE, linewidth=1.8, markersize=3, label="validation"
        )
    losses = np.concatenate([train, valid])
    if len(losses) and losses.min() > 0 and losses.max() > _LOGARITHMIC_FROM_RATIO * losses.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("loss")


def _plot_best(axes: Axes, entries: Sequence[dict], name: str, label: str, best_is: str) -> None:
    """A line of validations with a ring around the best."""
    steps, values = _series(entries, name)
    if not len(values):
        return
    colour = _COLOURS[name]
    best = int(np.argmin(values) if best_is == "min" else np.argmax(values))
    label = label.format(values[best]) + f" at step {steps[best]:,.0f}"
    axes.plot(steps, values, "o-", color=colour, linewidth=1.8, markersize=3, label=label)
    axes.plot(steps[best], values[best], "o", color=colour, markersize=8, markerfacecolor="none")


def _plot_error_rates(axes: Axes, entries: Sequence[dict]) -> None:
    _plot_best(axes, entries, "wer", "WER, best {:.2f} %", "min")
    _plot_best(axes, entries, "cer", "CER, best {:.2f} %", "min")
    # A recogniser that only inserts words exceeds 100 %; that is not what one wants to see.
    axes.set_ylim(0, min(105, axes.get_ylim()[1]))
    axes.set_ylabel("validation error rate, %")


def _plot_accuracy(axes: Axes, entries: Sequence[dict]) -> None:
    _plot_best(axes, entries, "acc", "tokens of the decoder, best {:.2f} %", "max")
    axes.set_ylabel("validation accuracy, %")


def _plot_perplexity(axes: Axes, entries: Sequence[dict]) -> None:
    _plot_best(axes, entries, "ppl", "perplexity, best {:.2f}", "min")
    axes.set_ylabel("validation perplexity")
    _, values = _series(entries, "ppl")
    if values.max() > _LOGARITHMIC_FROM_RATIO * values.min() > 0:
        axes.set_yscale("log")


def _plot_learning_rate(axes: Axes, entries: Sequence[dict]) -> None:
    steps, rates = _series(entries, "lr")
    if len(rates):
        axes.plot(steps, rates, color=_GREY, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylabel("learning rate")


def _finish(axes: Axes, loc: str = "upper right") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, color="#DADCE0", linewidth=0.6)
    if not axes.lines:
        axes.text(
            0.5, 0.5, "no data yet", transform=axes.transAxes, ha="center", va="center", color=_GREY
        )
        axes.set_yticks([])
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc=loc)


def _add_epochs(axes: Axes, entries: Sequence[dict]) -> None:
    """Mark the ends of epochs above ``axes`` if the entries tell them."""
    ends: dict[int, int] = {}
    for entry in entries:
        if isinstance(entry.get("epoch"), int):
            ends[entry["epoch"]] = max(entry["step"], ends.get(entry["epoch"], 0))
    if len(ends) < 2:
        return
    stride = -(-len(ends) // 10)
    marked = [epoch for epoch in sorted(ends) if epoch % stride == 0]
    above = axes.secondary_xaxis("top")
    above.set_xticks([ends[epoch] for epoch in marked], [str(epoch) for epoch in marked])
    above.tick_params(labelsize="small", colors=_GREY, length=3)
    above.set_xlabel("end of epoch", fontsize="small", color=_GREY)
    above.spines["top"].set_visible(False)


@dataclass(frozen=True)
class _Panel:
    """What a panel shows of the entries, how, how high it is, and where its curves are not."""

    names: tuple[str, ...]
    draw: Callable[[Axes, Sequence[dict]], None]
    height: int
    legend: str = "upper right"


_PANELS = (
    _Panel(("train_loss", "valid_loss"), _plot_losses, 4),
    _Panel(("wer", "cer"), _plot_error_rates, 4),
    _Panel(("acc",), _plot_accuracy, 3, "lower right"),
    _Panel(("ppl",), _plot_perplexity, 4),
    _Panel(("lr",), _plot_learning_rate, 2),
)
