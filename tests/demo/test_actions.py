"""Everything between an event of the demo's page and the pictures on it, without gradio."""

import base64
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from demos import bad_uploads, photo, smooth, tiny_demo
from PIL import Image
from tiny import METHODS

from hf_mim.data.decode import MAX_PIXELS_VARIABLE
from hf_mim.data.processor import image_processor
from hf_mim.demo.app import LARGEST_IMAGE
from hf_mim.embeddings.search import Search
from hf_mim.models.pixels import ValueRange
from hf_mim.visualize.task import Task

ROWS, COLUMNS = 4, 6


def middle(picture: Image.Image, row: int, column: int) -> tuple[int, int]:
    return round((column + 0.5) * picture.width / COLUMNS), round((row + 0.5) * picture.height / ROWS)


def seen_by(model, monkeypatch) -> list[dict]:
    """The arguments that the model gets from now on."""
    found = []
    for name in ("forward", "reconstruct"):
        if hasattr(model, name):
            call = getattr(model, name)
            monkeypatch.setattr(
                model, name, lambda *args, _call=call, **given: found.append(given) or _call(*args, **given)
            )
    return found


def pictures_in(html: str) -> list[Image.Image]:
    data = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in data]


@pytest.mark.parametrize("method", METHODS)
def test_the_patches_that_were_clicked_on_are_exactly_those_that_the_model_has_to_predict(
    method, tmp_path, monkeypatch
):
    demo = tiny_demo(method)
    picked = demo.cleared(demo.pick(photo(tmp_path))[0])
    painted = [(0, 0), (1, 5), (3, 2), (2, 2), (2, 3)]
    for row, column in [*painted, (3, 5), (3, 5)]:  # a second click on a patch takes it back
        picked = demo.painted(picked, *middle(demo.mask_picture(picked), row, column))
    given = seen_by(demo.viewer.pretraining, monkeypatch)
    html = demo.prediction(picked)
    ids = {row * COLUMNS + column for row, column in painted}
    assert set(given[0]["target_ids"].flatten().tolist()) == ids and given[0]["target_ids"].numel() == len(ids)
    assert given[0]["context_ids"].flatten().tolist() == sorted(set(range(ROWS * COLUMNS)) - ids)
    assert len(pictures_in(html)) == 4 and "message" not in html


@pytest.mark.parametrize("method", METHODS)
def test_the_picture_to_click_on_has_stripes_just_where_the_model_sees_nothing(method, tmp_path):
    demo = tiny_demo(method)
    picked = demo.painted(demo.cleared(demo.pick(photo(tmp_path))[0]), 130, 200, brush=3)
    whole, masked = (np.asarray(demo.mask_picture(each), float) for each in (demo.cleared(picked), picked))
    changed = np.abs(whole - masked).max(axis=2)
    changed = changed.reshape(ROWS, changed.shape[0] // ROWS, COLUMNS, -1).mean(axis=(1, 3)) > 5
    assert np.array_equal(changed, picked.hidden.numpy())


def test_every_pixel_of_a_patch_belongs_to_it_and_clicks_beside_the_picture_to_its_edge():
    demo = tiny_demo()
    height, width = 16 * 21, 24 * 21  # as it is shown
    for row, column, down, right in itertools.product(range(ROWS), range(COLUMNS), (0, 83), (0, 83)):
        assert demo.patch_at((16, 24), column * 84 + right, row * 84 + down) == (row, column)
    assert demo.patch_at((16, 24), -5, height + 9) == (ROWS - 1, 0)
    assert demo.patch_at((16, 24), width, 0) == (0, COLUMNS - 1)


def test_the_brush_paints_its_neighbours_alike_and_stops_at_the_edge(tmp_path):
    demo = tiny_demo()
    picked = demo.painted(demo.cleared(demo.pick(photo(tmp_path))[0]), 0, 0, brush=3)
    assert picked.hidden.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    picked = demo.painted(picked, 84, 84, brush=3)  # the patch there is hidden: all below the brush are shown
    assert not picked.hidden.any()


@pytest.mark.parametrize("method", METHODS)
def test_the_share_of_hidden_patches_is_the_one_that_was_asked_for(method, tmp_path):
    demo = tiny_demo(method)
    picked, _ = demo.pick(photo(tmp_path))
    shares = [demo.at_random(picked, share).hidden.sum().item() for share in (0.01, 0.25, 0.5, 0.99)]
    assert shares == [1, 6, 12, 23]
    again = demo.at_random(once := demo.at_random(picked, 0.5), 0.5)
    assert not torch.equal(again.hidden, once.hidden)


@pytest.mark.parametrize("method", METHODS)
def test_without_paint_the_mask_is_one_that_the_method_draws(method, tmp_path):
    demo = tiny_demo(method)
    picked = demo.drawn(demo.pick(photo(tmp_path))[0])
    task, expected = demo.shown_task(picked), demo.viewer.draw_masks(1, seed=1)
    assert all(torch.equal(task.masks[name], expected[name]) for name in expected)
    assert 0 < demo.usual_share < 1 and len(pictures_in(demo.prediction(picked))) == 4


def test_a_mask_that_leaves_nothing_to_do_is_told_and_can_still_be_painted_on(tmp_path):
    demo = tiny_demo()
    picked = demo.cleared(demo.pick(photo(tmp_path))[0])
    assert "Some patches have to be hidden" in demo.prediction(picked)
    assert demo.painted(picked, 0, 0).hidden.sum() == 1


def test_one_hidden_patch_is_too_few_where_the_mean_of_the_targets_is_taken_off(tmp_path):
    demo = tiny_demo("stop_jepa")
    picked = demo.painted(demo.cleared(demo.pick(photo(tmp_path))[0]), 0, 0)
    assert "prediction needs two hidden patches at least" in demo.prediction(picked)
    assert len(pictures_in(demo.prediction(demo.painted(picked, 0, 200)))) == 4


def test_a_click_on_a_patch_compares_that_patch(tmp_path, monkeypatch):
    demo = tiny_demo(task=False)
    picked, _ = demo.pick(photo(tmp_path))
    picked = demo.compared(picked, *middle(demo.patch_picture(picked), 2, 5))
    assert picked.patch == (3, 6)
    similarity, components = pictures_in(demo.features(picked))
    brightest = np.asarray(similarity.convert("L").resize((COLUMNS, ROWS), Image.Resampling.BOX)).argmax()
    assert brightest == 2 * COLUMNS + 5 and components.size == similarity.size
    assert not demo.has_task


@pytest.mark.parametrize("name", ["text.png", "empty.jpg", "huge.png", "bands.npy", "cut.jpg", "moving.gif"])
def test_a_bad_upload_gives_a_message_that_names_the_file_and_no_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, str(LARGEST_IMAGE))
    told = bad_uploads(tmp_path)[name]
    picked, message = tiny_demo().pick(str(tmp_path / name))
    assert told in message and str(tmp_path) not in message
    assert (picked is None) == (name != "moving.gif")


def test_an_image_that_was_deleted_meanwhile_is_told(tmp_path):
    demo = tiny_demo()
    picked, _ = demo.pick(path := photo(tmp_path))
    (tmp_path / path).unlink()
    for action in (demo.prediction, demo.features):
        assert "no longer here" in action(picked)
    assert demo.features(None) == ""


def test_a_deep_image_is_shown_by_its_range_and_the_bands_that_were_chosen(tmp_path):
    values = smooth(channels=5)
    np.save(tmp_path / "deep.npy", (4095 * values).astype(np.uint16))
    demo = tiny_demo(num_channels=5, value_range=ValueRange((0.0,), (4095.0,), "uint16"), bands=[5, 1, 3])
    picked, note = demo.pick(str(tmp_path / "deep.npy"))
    shown = np.asarray(demo.patch_picture(picked).resize((24, 16)), float)
    small = torch.nn.functional.interpolate(
        torch.from_numpy(values).permute(2, 0, 1)[None], (16, 24), mode="bicubic", antialias=True
    )[0]
    for channel, band in enumerate((4, 0, 2)):
        assert np.corrcoef(shown[:8, :8, channel].ravel(), small[band, :8, :8].numpy().ravel())[0, 1] > 0.9
    assert note == "" and shown.max() > 240 and len(pictures_in(demo.prediction(picked))) == 4


def test_names_with_html_in_them_stay_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    nasty = "<img src=x onerror=alert(1)>"
    (tmp_path / f"{nasty}.png").write_text("no image")
    demo = tiny_demo()
    assert "<img" not in demo.pick(str(tmp_path / f"{nasty}.png"))[1]
    for number, name in enumerate((f"{nasty}a", f"{nasty}b") * 3):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        photo(folder, f"{number} <b>.png", seed=number)
    demo.viewer.pretraining.save_pretrained(tmp_path / "model")
    image_processor((16, 24), [0.5] * 3, [0.25] * 3).save_pretrained(tmp_path / "model")
    demo.search = Search(tmp_path / "model", tmp_path / "photos", k=4)
    html = demo.nearest(demo.pick(photo(tmp_path, seed=2))[0])
    assert "2 &lt;b&gt;.png" in html.split("<figcaption>")[1] and html.count("&lt;img") >= 4
    parser, found = HTMLParser(), []
    parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
    parser.feed(html)
    assert "b" not in dict(found) and not any("onerror" in names for _, names in found)
    assert len(pictures_in(html)) == 4


def test_a_task_is_made_of_the_image_that_was_picked(tmp_path):
    demo = tiny_demo()
    picked, _ = demo.pick(photo(tmp_path, seed=3))
    expected = Task.make("test", demo.viewer, [photo(tmp_path, seed=3)])
    assert torch.equal(demo.shown_task(picked).view.pixels, expected.view.pixels)
