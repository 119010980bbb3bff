"""A real browser shows the page without an error, by day and on a phone, and without any request."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, FLAGS, HOW
from pages import CARDS, Page, assert_readable
from PIL import Image

from hf_mim.report.write import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"not installed: chromium; {HOW}"),
]


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess:
    usual = *FLAGS, "--hide-scrollbars", "--enable-logging=stderr", "--v=0"
    command = [CHROMIUM, *usual, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_loads_without_errors_of_the_console_and_as_it_was_written(count, tmp_path):
    folders = [CARDS / "cifar10_mae", CARDS / "digits_stop_jepa"][:count]
    path = write_report(folders, tmp_path / "page.html")
    shown = browse(path, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    page = Page(shown.stdout)
    assert_readable(page)
    assert page.all("img") == Page(path.read_text()).all("img")


def test_a_request_of_the_page_to_the_outside_would_be_refused_and_told(tmp_path):
    """So that the test above means something."""
    path = write_report([CARDS / "cifar10_mae"], tmp_path / "page.html")
    whole = path.read_text()
    path.write_text(whole.replace("</body>", '<img src="http://example.com/x.png"></body>'))
    assert path.read_text() != whole
    assert "CONSOLE" in browse(path, tmp_path / "profile", "--dump-dom").stderr


@pytest.mark.parametrize(("size", "scheme"), [("1280,1000", "light"), ("390,844", "light"), ("390,844", "dark")])
def test_the_page_fits_the_window_and_follows_its_colours(size, scheme, tmp_path):
    path, picture = write_report([CARDS / "cifar10_mae"], tmp_path / "page.html"), tmp_path / "page.png"
    dark = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    browse(path, tmp_path / "profile", f"--window-size={size}", f"--screenshot={picture}", dark)
    pixels = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert pixels.shape == tuple(map(int, reversed(size.split(","))))
    ground, edges = np.median(pixels), np.concatenate([pixels[:, :8], pixels[:, -8:]], axis=1)
    assert (ground > 230) == (scheme == "light") and (ground < 30) == (scheme == "dark")
    assert np.abs(pixels - ground).max() > 150  # there is text
    assert np.abs(edges - ground).max() < 5  # and none of it is cut by the window
