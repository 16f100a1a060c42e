"""The picture of a run's learning curves."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from training.reporting import plots
from training.reporting.metrics_log import MetricsLog
from training.reporting.plots import plot_curves, smooth


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw entries; give the figure that was saved and the picture's pixels."""

    def draw(entries, title=None):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        for entry in entries:
            log.append(**entry)
        figures = []

        class RecordedFigure(Figure):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                figures.append(self)

        monkeypatch.setattr(plots, "Figure", RecordedFigure)
        plot_curves(log.path, tmp_path / "curves.png", title)
        return figures[0], imread(tmp_path / "curves.png")

    return draw


def run_entries(steps=60):
    for step in range(1, steps + 1):
        epoch = 1 + (step - 1) // 20
        yield {"step": step, "epoch": epoch, "train_loss": 300.0 / step, "lr": 1e-4 * step}
        if step % 20 == 0:
            yield {
                "step": step,
                "epoch": epoch,
                "valid_loss": 400.0 / step,
                "wer": 100.0 - step,
                "cer": 50.0 - step / 2,
            }


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_three_panels_show_what_was_logged(drawn):
    figure, picture = drawn(run_entries(), "demo")
    losses, errors, rates = figure.axes[:3]
    assert picture.shape == (1080, 1080, 4)
    assert figure.get_suptitle() == "demo"
    raw, _smoothed, validation = losses.lines
    np.testing.assert_allclose(raw.get_ydata(), 300.0 / np.arange(1, 61))
    assert validation.get_xdata().tolist() == [20, 40, 60]
    assert labels(losses) == ["training, smoothed", "validation"]
    assert labels(errors) == [
        "WER, best 40.00 % at step 60",
        "CER, best 20.00 % at step 60",
    ]
    assert rates.lines[0].get_ydata()[-1] == pytest.approx(6e-3)
    assert rates.get_xlabel() == "optimiser steps"


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis(drawn):
    figure, _ = drawn({"step": step, "train_loss": 400.0 / step} for step in range(1, 50))
    assert figure.axes[0].get_yscale() == "log"


@pytest.mark.parametrize("loss", [lambda step: 3.0 - step / 50, lambda step: 10.0 - step])
def test_other_losses_are_drawn_on_a_linear_axis(drawn, loss):
    figure, _ = drawn({"step": step, "train_loss": loss(step)} for step in range(1, 50))
    assert figure.axes[0].get_yscale() == "linear"


def test_ends_of_epochs_are_marked_above(drawn):
    figure, _ = drawn(run_entries())
    (above,) = figure.axes[0].child_axes
    assert above.get_xticks().tolist() == [20, 40, 60]
    assert [text.get_text() for text in above.get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("entries", "empty_panels"),
    [
        ([], [0, 1, 2]),
        ([{"step": 1, "train_loss": 5.0, "lr": 1e-3}], [1]),
        ([{"step": 1, "train_loss": float("nan"), "wer": 130.0}], [0, 2]),
    ],
)
def test_missing_data_is_said_in_its_panel(drawn, entries, empty_panels):
    figure, picture = drawn(entries)
    assert picture.size > 0
    said = [
        i
        for i, axes in enumerate(figure.axes[:3])
        if "no data yet" in [text.get_text() for text in axes.texts]
    ]
    assert said == empty_panels


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(drawn, tmp_path, monkeypatch):
    drawn(run_entries())
    before = (tmp_path / "curves.png").read_bytes()

    def fail(self, file, **kwargs):
        file.write(b"half a picture")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_smoothing_is_the_mean_over_the_neighbours_there_are():
    values = np.array([4.0, 1.0, 7.0, 2.0, 9.0])
    np.testing.assert_allclose(smooth(values, 1), [2.5, 4.0, 10 / 3, 6.0, 5.5])
    np.testing.assert_allclose(smooth(values, 0), values)
    np.testing.assert_allclose(smooth(values, 9), np.full(5, values.mean()))
