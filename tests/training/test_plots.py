"""The picture of a run's learning curves."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from training.reporting import plots
from training.reporting.metrics_log import MetricsLog
from training.reporting.plots import plot_curves, plot_sizes, run_title, smooth


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


def panels(figure):
    return [axes.get_ylabel() for axes in figure.axes]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"step": 1, "train_loss": 5.0, "lr": 1e-3}], ["loss", "learning rate"]),
        (
            [{"step": 1, "train_loss": float("nan"), "wer": 130.0}],
            ["validation error rate, %"],
        ),
        (
            [{"step": 1, "valid_loss": 5.0, "ppl": 150.0, "lr": 1e-3}, {"step": 2, "ppl": 2.0}],
            ["loss", "validation perplexity", "learning rate"],
        ),
        (
            [{"step": 1, "valid_loss": 5.0, "acc": 30.0}, {"step": 2, "acc": 40.0, "wer": 90.0}],
            ["loss", "validation error rate, %", "validation accuracy, %"],
        ),
    ],
)
def test_there_is_a_panel_for_all_that_was_measured_and_none_else(drawn, entries, expected):
    figure, picture = drawn(entries)
    assert panels(figure) == expected
    assert picture.shape[1] == 1080
    assert not any(text.get_text() for axes in figure.axes for text in axes.texts)
    assert figure.axes[-1].get_xlabel() == "optimiser steps"


def test_before_anything_was_measured_the_picture_says_so(drawn):
    figure, picture = drawn([])
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["no data yet"]
    assert picture.size


def test_the_best_accuracy_is_the_highest_and_the_best_perplexity_the_lowest(drawn):
    entries = [
        {"step": 1, "acc": 30.0, "ppl": 9.0},
        {"step": 2, "acc": 50.0, "ppl": 8.0},
        {"step": 3, "acc": 40.0, "ppl": 7.0},
    ]
    figure, _ = drawn(entries)
    assert labels(figure.axes[0]) == ["tokens of the decoder, best 50.00 % at step 2"]
    assert labels(figure.axes[1]) == ["perplexity, best 7.00 at step 3"]


@pytest.mark.parametrize(
    ("folder", "file", "title"),
    [
        ("/r/CTC/small/3402", "hparams/CTC/conmamba.yaml", "conmamba: CTC/small/3402"),
        ("/demo", "demo.yaml", "demo: demo"),
        ("/r/CTC/small/3402", "/r/CTC/small/3402/recipe.yaml", "CTC/small/3402"),
        ("/a/b", "", "a/b"),
    ],
)
def test_a_run_is_called_after_its_recipe_and_its_folder(folder, file, title):
    assert run_title(folder, file) == title


def test_error_rates_are_drawn_against_parameters(tmp_path):
    points = [
        ("large", "test-clean", 30_000_000, 2.0, 1.8, 2.3),
        ("small", "test-clean", 9_000_000, 4.0, 3.5, 4.4),
        ("small", "test-other", 9_000_000, 9.0, 8.5, 9.7),
    ]
    plot_sizes(points, tmp_path / "sizes.png")
    assert imread(tmp_path / "sizes.png").shape == (660, 960, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.png"]


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
