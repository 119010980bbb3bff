"""Bars of a measurement: an error never shares their line."""

import pytest

from hf_mim.evaluation.progress import progress_bar


def test_a_bar_goes_away_at_its_end_and_ends_its_line_before_an_error(capsys):
    with progress_bar(True, "features", 3, steps=range(3)) as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err.endswith("\r")
    with pytest.raises(ValueError), progress_bar(True, "features", 3) as bar:
        bar.update()
        raise ValueError
    assert capsys.readouterr().err.endswith("\n")
