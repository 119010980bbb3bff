"""Several runs in one table and one picture."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_mim.comparison import Row, mean_curve, plot_curves, spread, table
from hf_mim.run_folder import METRICS, logged


def cells(markdown: str) -> list[list[str]]:
    """The lines of a table below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()[2:]]


def test_the_spread_is_mean_and_sample_standard_deviation():
    # By hand: (.60 + .62 + .67) / 3 = .63; deviations -.03, -.01, .04; (.0009 + .0001 + .0016) / 2 = .0013.
    mean, deviation = spread([0.60, 0.62, 0.67])
    assert mean == pytest.approx(0.63, abs=1e-12) and deviation == pytest.approx(0.0013**0.5, abs=1e-12)
    assert spread([0.5]) == (0.5, None)


def test_the_table_has_shares_in_percent_and_other_measures_as_they_are():
    rows = [
        Row("MAE", {"20-NN": [0.60, 0.62, 0.67], "rank": [41.0, 43.0]}, [6400] * 3, [1.0, 2.0], ["cpu", "cpu"]),
        Row("raw pixels", {"20-NN": [0.394]}),
    ]
    assert table(rows).splitlines()[0] == "|  | 20-NN (%) | rank | images seen | minutes | device |"
    assert cells(table(rows)) == [
        ["MAE", "63.0 ± 3.6", "42.0 ± 1.4", "6,400", "1.5", "cpu"],
        ["raw pixels", "39.4", "", "", "", ""],
    ]


def test_notes_are_the_last_column_and_cannot_leave_their_cell():
    rows = [Row("MAE", {"knn": []}, notes=["seed 1 failed in training: a | b"]), Row("JEPA", {"knn": [0.5]})]
    assert table(rows).splitlines()[0].endswith("| note |")
    assert [line[-1] for line in cells(table(rows))] == ["seed 1 failed in training: a &#124; b", ""]


def test_a_curve_is_the_mean_of_the_seeds_that_have_come_so_far():
    curve = mean_curve([{0: 0.2, 64: 0.4, 128: 0.5}, {0: 0.3, 64: 0.6}])
    assert curve == [
        (0, pytest.approx(0.25), pytest.approx(0.005**0.5)),
        (64, pytest.approx(0.5), pytest.approx(0.02**0.5)),
        (128, 0.5, 0.0),
    ]


def test_the_picture_shows_mean_band_levels_and_the_untrained_encoder(tmp_path, monkeypatch):
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: [drawn.append(figure), savefig(figure, *args, **more)]
    )
    rows = [Row("MAE", curves=[{0: 0.2, 64: 0.4}, {0: 0.3, 64: 0.6}]), Row("raw pixels")]
    plot_curves(rows, {"raw pixels": 0.39}, tmp_path / "picture.png")
    (ax,) = drawn[0].axes
    run, untrained, pixels = ax.lines
    assert run.get_xydata().tolist() == [[0, 25], [64, 50]]
    assert untrained.get_ydata() == [25, 25] and untrained.get_color() == run.get_color()
    assert pixels.get_ydata() == [39, 39]
    low, high = ax.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((25 - 100 * 0.005**0.5, 50 + 100 * 0.02**0.5))
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["MAE", "raw pixels", "untrained, in the run's colour"]


def test_a_picture_without_any_curve_says_so(tmp_path):
    plot_curves([Row("MAE")], {}, tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size[0] > 500


def test_half_a_line_of_the_log_is_passed_over(tmp_path):
    lines = '{"step": 0, "probe_knn": 0.25}\n{"step": 5, "loss": 1}\n{"step": 5, "probe_knn": null}\n'
    (tmp_path / METRICS).write_text(lines + '{"step": 9, "probe_knn": 0.5}\n{"step": 12, "probe_kn')
    assert logged(tmp_path, "probe_knn") == {0: 0.25, 9: 0.5}
    assert logged(tmp_path / "nothing", "probe_knn") == {}
