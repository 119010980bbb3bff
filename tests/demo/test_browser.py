"""The demo's page in a real browser. Needs gradio, playwright and Chromium, and is skipped where one is missing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM, FLAGS, HOW
from demos import bad_uploads, photo, tiny_demo
from tiny import METHODS

from hf_mim.cli import main
from hf_mim.data.decode import MAX_PIXELS_VARIABLE
from hf_mim.data.processor import image_processor
from hf_mim.demo.app import LARGEST_IMAGE, serve
from hf_mim.embeddings.search import Search

MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; {HOW}"),
]
WINDOWS = {"desktop": (1280, 1000), "phone": (390, 844)}
PATIENCE = 120_000  # milliseconds
ROWS, COLUMNS = 4, 6
NASTY = "<img src=x onerror=window.hacked=1>"


@contextmanager
def served(demo):
    """The address of the demo's page."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from hf_mim.demo.page import build

    page = build(demo)
    _, address, _ = serve(page)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    yield address
    page.close()


@contextmanager
def opened(address, window="desktop"):
    """The page in a browser. In the end it must have asked no other server, and its console must have no errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        width, height = WINDOWS[window]
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE)
        told, asked = [], []
        page.on("console", lambda message: message.type == "error" and told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        assert told == [] and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off at the right
        assert page.evaluate("window.hacked") is None
        browser.close()


def until(page, holds, what):
    end = time.monotonic() + PATIENCE / 1000
    while not holds():
        assert time.monotonic() < end, what
        page.wait_for_timeout(200)


def click(page, name, row, column):
    """On the middle of a patch, wherever the picture lies in its frame."""
    picture = page.locator(f"#{name} img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    width, height = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(box["width"] / width, box["height"] / height, 1)
    left, top = ((side - scale * own) / 2 for side, own in ((box["width"], width), (box["height"], height)))
    x, y = left + scale * width * (column + 0.5) / COLUMNS, top + scale * height * (row + 0.5) / ROWS
    picture.click(position={"x": x, "y": y})


def upload(page, path):
    page.locator("input[type=file]").first.set_input_files(path)


def spied(demo, monkeypatch) -> list[set[int]]:
    """The patches that the model was given to predict, from now on."""
    found, model = [], demo.viewer.pretraining
    for name in {"reconstruct", "forward"} & set(dir(model)):
        call = getattr(model, name)
        monkeypatch.setattr(
            model,
            name,
            lambda *args, _call=call, **given: (
                found.append(set(given["target_ids"].flatten().tolist())) or _call(*args, **given)
            ),
        )
    return found


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", METHODS)
def test_one_uploads_paints_clicks_and_sees_the_result(method, window, tmp_path, monkeypatch):
    demo = tiny_demo(method)
    with served(demo) as address, opened(address, window) as page:
        upload(page, photo(tmp_path))
        page.locator(".panels figure img").first.wait_for()
        page.get_by_role("button", name="Hide none").click()
        page.get_by_text("Some patches have to be hidden").wait_for()
        given = spied(demo, monkeypatch)
        painted = [(0, 0), (1, 5), (3, 2)]
        for count, (row, column) in enumerate(painted, start=1):
            before = page.locator("#mask img").get_attribute("src")
            click(page, "mask", row, column)
            until(page, lambda n=count: given and len(given[-1]) == n, f"{count} patches are hidden, not {given[-1:]}")
            until(page, lambda old=before: page.locator("#mask img").get_attribute("src") != old, "the mask is drawn")
        assert given[-1] == {row * COLUMNS + column for row, column in painted}
        page.get_by_role("tabpanel").locator(".panels figure img").first.wait_for()
        page.get_by_role("tab", name="Features").click()
        similarity = page.get_by_alt_text("similarity to the marked patch")
        before = similarity.get_attribute("src")
        click(page, "patch", 0, 5)
        until(page, lambda: similarity.get_attribute("src") != before, "another patch is compared")


def test_bad_uploads_give_messages_and_the_page_lives(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, str(LARGEST_IMAGE))
    demo, uploads = tiny_demo(), bad_uploads(tmp_path)
    (tmp_path / f"{NASTY}.png").write_text("no image")
    with served(demo) as address, opened(address) as page:
        for name, told in [*uploads.items(), (f"{NASTY}.png", "not an image")]:
            upload(page, tmp_path / name)
            page.get_by_role("alert").filter(has_text=told.partition(": ")[2] or told).wait_for()
        upload(page, photo(tmp_path))
        page.get_by_role("alert").wait_for(state="detached")
        page.locator(".panels figure img").first.wait_for()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_nearest_images_are_shown_with_their_names_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate((f"{NASTY}a", f"{NASTY}b") * 3):
        (folder := tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        photo(folder, f"{number} <b>.png", seed=number)
    demo = tiny_demo()
    save(demo, tmp_path / "model")
    demo.search = Search(tmp_path / "model", tmp_path / "photos", k=4)
    with served(demo) as address, opened(address) as page:
        upload(page, photo(tmp_path, seed=2))
        page.get_by_role("tab", name="Nearest").click()
        first = page.locator("figcaption").filter(has_text="cosine").first
        first.wait_for()
        assert first.inner_text().split("\n") == [f"{NASTY}a/2 <b>.png", f"{NASTY}a", "cosine 1.00"]


def save(demo, folder) -> Path:
    demo.viewer.pretraining.save_pretrained(folder)
    image_processor((16, 24), [0.5] * 3, [0.25] * 3).save_pretrained(folder)
    return folder


def test_a_space_runs_from_its_folder_alone(tmp_path):
    folder = save(tiny_demo("stop_jepa"), tmp_path / "run")
    (folder / "recipe.yaml").write_text("dataset: textures\n")
    assert main(["export", str(folder), str(tmp_path / "made"), "--to", "space"]) == 0
    shutil.rmtree(folder)
    (tmp_path / "made").rename(tmp_path / "space")
    (tmp_path / "empty").mkdir()
    command = [sys.executable, tmp_path / "space" / "app.py"]
    about = dict(cwd=tmp_path / "empty", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, **about) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.search(r"The demo is at (http://127\.0\.0\.1:\d+/)", line):
                    break
            assert found, "".join(lines)
            assert urllib.request.urlopen(found[1]).status == 200
            with opened(found[1]) as page:
                page.locator(".panels figure img").first.wait_for()  # of the first example
        finally:
            process.terminate()
