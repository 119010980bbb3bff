"""What a card shows on its first screen, measured in a real browser."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from browser import CHROMIUM, FLAGS, HOW

CARDS = Path(__file__).parents[2] / "model_cards"
WIDTH, HEIGHT = 900, 1000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"not installed: chromium; {HOW}"),
]

# The text of a card stands on the Hub in 16 px, and its pictures are as wide as the text at most.
STYLE = "body {font: 16px/1.6 sans-serif; margin: 0 1rem} img {max-width: 100%} pre, table {font-size: 14px}"
MEASURE = """
addEventListener("load", () => {
  const bottom = (name) => Math.round(document.querySelector(name).getBoundingClientRect().bottom);
  const images = [...document.images].map((image) => image.naturalWidth);
  document.title = JSON.stringify({picture: bottom("img"), results: bottom("table"), load: bottom("pre"), images});
});
"""


@pytest.mark.parametrize("name", ["cifar10_mae", "cifar10_small_mae"])
def test_the_first_screen_of_a_card_shows_picture_results_and_how_to_load(name, tmp_path):
    from markdown_it import MarkdownIt

    text = (CARDS / name / "README.md").read_text().split("---\n", 2)[2]
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "from_pretrained" in re.search("<pre>.*?</pre>", body, re.DOTALL)[0]
    page = tmp_path / "card.html"
    base = f'<base href="{(CARDS / name).as_uri()}/">'
    page.write_text(f"<!doctype html><meta charset=utf-8>{base}<style>{STYLE}</style><script>{MEASURE}</script>{body}")
    options = f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={WIDTH},{HEIGHT}", "--dump-dom"
    command = [CHROMIUM, *FLAGS, *options, page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    places = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    assert all(places.pop("images")), "a picture is not there"
    assert max(places.values()) <= HEIGHT, places
