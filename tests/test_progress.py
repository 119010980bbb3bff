"""Bars of a measurement: an error never shares their line."""

import time

import pytest

from hf_mim import progress
from hf_mim.progress import progress_bar, with_bar


def test_a_bar_goes_away_at_its_end_and_ends_its_line_before_an_error(capsys, monkeypatch):
    monkeypatch.setattr(progress, "watched", lambda: True)
    with progress_bar(True, "features", 3, steps=range(3)) as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err.endswith("\r")
    with pytest.raises(ValueError), progress_bar(True, "features", 3) as bar:
        bar.update()
        raise ValueError
    assert capsys.readouterr().err.endswith("\n")


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.1)
    for seconds in (0.0, 0.15):
        with progress_bar(True, "features", 1200, " images") as bar:
            bar.update(500)
            time.sleep(seconds)
            bar.update(500)
        lines = capsys.readouterr().err
        assert not seconds or lines.startswith("features: 1000 of 1200 images, 00:0")
        assert lines.count("\n") == (1 if seconds else 0) and "\r" not in lines


def test_only_the_first_process_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0)
    monkeypatch.setenv("RANK", "1")
    assert list(with_bar([1, 2], "images", 2)) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert list(with_bar([1, 2], "images", 2)) == [1, 2]
    assert "images: 2 of 2 images" in capsys.readouterr().err
