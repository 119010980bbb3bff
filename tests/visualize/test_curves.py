"""The curves of a run show what was logged, and a picture is written whole or not at all."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_mim.visualize import plot_training


@pytest.fixture
def drawn(monkeypatch):
    """Name → points of each curve, and the height of each horizontal line."""
    found, plot, axhline = {}, Axes.plot, Axes.axhline

    def spy(axes, x, y, **kwargs):
        found[kwargs["label"]] = (list(x), list(y))
        return plot(axes, x, y, **kwargs)

    def spy_line(axes, y, **kwargs):
        found[kwargs["label"]] = y
        return axhline(axes, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(Axes, "axhline", spy_line)
    return found


LOG = [
    {"step": 0, "probe_knn": 0.25, "probe_rank_me": 3.0, "probe_std_mean": 9.0},
    {"step": 1, "loss": 2.0, "feature_std": 0.5, "learning_rate": 1e-4, "norm_l2": 1.9, "error_over_constant": 1.1},
    {"step": 5, "probe_knn": 0.5, "probe_rank_me": 4.0, "probe_std_mean": 9.0},
    {"step": 5, "loss": 1.0, "feature_std": 0.4, "learning_rate": 2e-4, "data_wait_share": 0.1, "grad_norm": None},
    {"step": 5, "train_loss": 1.5, "train_runtime": 9.0},
]


def test_the_curves_are_what_was_logged(drawn):
    plot_training(LOG)
    assert drawn == {
        "loss": ([1, 5], [2.0, 1.0]),
        "norm_l2": ([1], [1.9]),
        "error_over_constant": ([1], [1.1]),
        "a constant prediction": 1.0,
        "feature_std": ([1, 5], [0.5, 0.4]),
        "learning_rate": ([1, 5], [1e-4, 2e-4]),
        "data_wait_share": ([5], [0.1]),
        "probe_knn": ([0, 5], [0.25, 0.5]),
        "probe_rank_me": ([0, 5], [3.0, 4.0]),
    }


def test_a_log_with_nothing_in_it_gives_a_figure_that_says_so(drawn):
    figure = plot_training([])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["no loss was logged"]


def test_no_label_is_cut_or_hidden_by_another():
    figure = plot_training(LOG, "A run with a title")
    figure.draw_without_rendering()
    whole = figure.bbox
    texts = [figure._suptitle, figure._supxlabel, *(axes._left_title for axes in figure.axes)]
    for axes in figure.axes:
        for labels, place, limits in (
            (axes.get_xticklabels(), 0, axes.get_xlim()),
            (axes.get_yticklabels(), 1, axes.get_ylim()),
        ):
            texts += [text for text in labels if limits[0] <= text.get_position()[place] <= limits[1]]
    for text in texts:
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
    boxes = [axes._left_title.get_window_extent() for axes in figure.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


def test_a_figure_shows_itself_in_a_notebook_and_is_equal_from_run_to_run():
    assert plot_training(LOG)._repr_png_().startswith(b"\x89PNG")
    assert plot_training(LOG)._repr_png_() == plot_training(LOG)._repr_png_()


def test_a_picture_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "loss.png").write_text("old")

    def interrupted(figure, path, **kwargs):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_training(LOG).save(tmp_path / "loss.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fill_the_disk(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "loss.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        plot_training(LOG).save(tmp_path / "loss.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
