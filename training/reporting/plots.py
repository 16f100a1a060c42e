"""Learning curves of a run as one picture."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from common.files import atomic_write
from training.reporting.metrics_log import MetricsLog

# Okabe and Ito's colours, told apart with any colour vision.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"
# Losses that span more than this ratio are drawn on a logarithmic axis: a CTC loss falls from
# hundreds to single digits within the first epochs, and all that follows would be a flat line.
_LOGARITHMIC_FROM_RATIO = 20
_SMOOTHING_REACH = 0.01  # of the number of values, to either side


def plot_curves(
    metrics_jsonl: str | os.PathLike, png_path: str | os.PathLike, title: str | None = None
) -> None:
    """Draw losses, validation error rates and learning rate against optimiser steps.

    Needs no display and leaves pyplot's state alone. Panels without data say so.

    Args:
        metrics_jsonl: file of a :class:`training.reporting.metrics_log.MetricsLog`.
        png_path: picture to write; an older one is replaced when the new one is complete.
        title: a line above the panels, such as the name of the run.
    """
    entries = MetricsLog(metrics_jsonl).read()
    figure = Figure(figsize=(9.0, 9.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, error_axes, rate_axes = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 2))
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    _plot_losses(loss_axes, entries)
    _plot_error_rates(error_axes, entries)
    _plot_learning_rate(rate_axes, entries)
    for axes in (loss_axes, error_axes, rate_axes):
        _finish(axes)
    figure.align_ylabels()
    rate_axes.set_xlabel("optimiser steps")
    rate_axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    rate_axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _add_epochs(loss_axes, entries)
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


def _plot_error_rates(axes: Axes, entries: Sequence[dict]) -> None:
    for name, colour in (("wer", _ORANGE), ("cer", _GREEN)):
        steps, rates = _series(entries, name)
        if not len(rates):
            continue
        best = int(np.argmin(rates))
        label = f"{name.upper()}, best {rates[best]:.2f} % at step {steps[best]:,.0f}"
        axes.plot(steps, rates, "o-", color=colour, linewidth=1.8, markersize=3, label=label)
        axes.plot(steps[best], rates[best], "o", color=colour, markersize=8, markerfacecolor="none")
    if axes.lines:
        # A recogniser that only inserts words exceeds 100 %; that is not what one wants to see.
        axes.set_ylim(0, min(105, axes.get_ylim()[1]))
    axes.set_ylabel("validation error rate, %")


def _plot_learning_rate(axes: Axes, entries: Sequence[dict]) -> None:
    steps, rates = _series(entries, "lr")
    if len(rates):
        axes.plot(steps, rates, color=_GREY, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylabel("learning rate")


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(True, color="#DADCE0", linewidth=0.6)
    if not axes.lines:
        axes.text(
            0.5, 0.5, "no data yet", transform=axes.transAxes, ha="center", va="center", color=_GREY
        )
        axes.set_yticks([])
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")


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
