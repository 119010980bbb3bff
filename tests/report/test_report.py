"""`hf-mim report`: what the page says, that it needs nothing outside, and that nothing in a run's files breaks it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from pages import CARDS, Page, assert_readable
from PIL import Image
from test_runs import make_run

from hf_mim.cli import main
from hf_mim.report import run as about_run
from hf_mim.report import write
from hf_mim.report.write import report, write_report
from hf_mim.runs import Run, RunComparison


@pytest.fixture(autouse=True)
def logs(monkeypatch) -> list:
    """The logs whose curves were drawn, here as a small figure, because the real one takes a second."""
    drawn = []
    monkeypatch.setattr(about_run, "plot_training", lambda log: drawn.append(log) or Figure((1, 1)))
    monkeypatch.setattr(RunComparison, "figure", lambda self: Figure((1, 1)))
    return drawn


@pytest.fixture
def digits(tmp_path) -> Path:
    """A run that has ended, with results and pictures."""
    return shutil.copytree(CARDS / "digits_mae", tmp_path / "digits_mae")


def page_of(*folders) -> Page:
    return Page(report([Run.read(folder) for folder in folders]))


def edit(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def log(folder: Path, *entries: dict):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_the_page_of_a_run_says_what_was_trained_and_measured(digits, logs):
    page = page_of(digits)
    assert_readable(page)
    told = "MAE", "digits, split train (1,437 images)", "The training has ended, after step 880", "width 128"
    told += (
        "Measured on digits: k-NN, accuracy 90.8 % (untrained 59.2 %, raw pixels 97.5 %).",
        "No measure is past its limit.",
        "mask_ratio: 0.75",
    )
    told += ("better than those of the untrained encoder in 1 of 1 measurements and better than raw pixels in 0 of 1",)
    for text in told:
        assert text in page.text.replace("\N{NO-BREAK SPACE}", " "), text
    assert re.search(r"k-NN: accuracy digits 90.8.% 59.2.% 97.5.%", page.text)
    assert len(page.all("img")) == 2
    assert logs == [Run.read(digits).log]  # the curves are drawn from the log as it is now
    assert len(page.all("details")) == 3  # two results and the recipe


def test_the_page_says_how_much_had_no_data(digits):
    path = digits / "results" / "training.json"
    edit(path, data=json.loads(path.read_text())["data"] | {"nodata": "6.2 % of the pixels, in 40 of 160 images"})
    assert "Without data 6.2 % of the pixels, in 40 of 160 images" in page_of(digits).text


def test_the_page_names_the_modalities_with_their_channels(tmp_path):
    folder = make_run(tmp_path / "run", method="interactive_mim", modalities=[["luma", 1], ["chroma", 2]])
    assert "Channels of modalities luma 1, chroma 2" in page_of(folder).text


def test_a_run_that_trains_and_one_that_has_stopped_have_pages(tmp_path):
    stopped = make_run(tmp_path / "stopped", (1, 10), ended=False)
    (stopped / "checkpoint-10").mkdir()
    picture = stopped / "pictures" / "step-10" / "pca.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(picture)
    page = page_of(stopped)
    assert "stopped at step 10 of 30, and hf-mim pretrain --resume goes on" in page.text
    assert "The loss went from 1 to 0.1." in page.text and "At step 10:" in page.text
    assert "Nothing was measured yet" in page.text and page.outside == []
    assert page.all("img")[0] | {"src": ""} == {
        "src": "",
        "width": "8",
        "height": "6",
        "alt": page.all("img")[0]["alt"],
    }
    assert "/home/somebody" not in page.source and "photos, split" in page.text


def test_several_runs_stand_side_by_side(digits, tmp_path):
    other = make_run(tmp_path / "other", (1, 10, 20))
    page = page_of(digits, other)
    assert_readable(page)
    assert page.texts.count("2 runs side by side") == 2  # title and heading
    assert [link["href"] for link in page.all("a")] == ["#run-1", "#run-2"]
    assert "hidden_size 128 192" in page.text and "linear_digits: accuracy 0.9667 –" in page.text
    assert "digits_mae" in page.texts and "other" in page.texts


MARK = "<script>alert(1)"


def test_html_in_names_notes_and_settings_stays_text(digits):
    folder = digits.rename(digits.parent / MARK)
    knn = folder / "results" / "knn.json"
    result = json.loads(knn.read_text())
    classes = [{"class": MARK, "images": 3, "accuracy": 0.5, MARK: MARK}]
    settings = result["settings"] | {MARK: MARK}
    edit(knn, classes=classes, notes=[MARK], settings=settings, metric=MARK, device=MARK)
    shutil.copy(knn, knn.with_name(f"{MARK}.json"))
    edit(folder / "results" / "health.json", notes=[MARK], table=[{"measure": MARK, "worry": MARK, MARK: MARK}])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {MARK: MARK, "method": MARK, "dataset": MARK}))
    Image.new("RGB", (8, 8)).save(folder / f"{MARK}.png")
    for page in (page_of(folder), page_of(folder, CARDS / "digits_mae")):
        assert_readable(page)
        assert page.text.count(MARK) > 10


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.6, 0.55, 0.5], "The collapse alarm has seen no collapse in the log."),
        ([0.6, 0.1, 0.1], "Since step 10 the targets collapse: they are nearly constant. At step 20: target_std 0.1"),
        ([0.6, 0.1, 0.1, 0.5, 0.5], "From step 10 the targets collapsed, and recovered later."),
    ],
)
def test_health_is_said_in_the_words_of_the_alarm(values, told, tmp_path):
    folder = make_run(tmp_path / "run", method="latent_mim", momentum_start=0.5)
    log(folder, *({"step": 10 * n, "loss": 1.0, "target_std": x} for n, x in enumerate(values)))
    page = page_of(folder)
    assert told in page.text
    assert ("momentum_start nearer to 1 (published 0.99), now 0.5" in page.text) == ("Since" in told)


def test_the_probe_of_a_run_that_trains_gives_a_table_of_health(tmp_path):
    folder = make_run(tmp_path / "run")
    probes = [{"probe_mean_cosine": 0.5, "probe_rank_me": 9.0}, {"probe_mean_cosine": 0.995, "probe_rank_me": 2.0}]
    log(folder, *({"step": 10 * n, "loss": 1.0} | probe for n, probe in enumerate(probes)))
    page = page_of(folder)
    assert "Worry: mean_cosine." in page.text and "mean cosine 0.995 0.5 yes between pooled features" in page.text


def test_a_file_that_is_no_picture_is_said(digits):
    (digits / "reconstructions.png").write_bytes(b"")
    page = page_of(digits)
    assert "A picture cannot be read: From above: images" in page.text and len(page.all("img")) == 1


def contrast(*colors: str) -> float:
    """By the definition of WCAG 2."""
    parts = [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors]
    linear = [[x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in part] for part in parts]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)


def test_all_text_has_enough_contrast_by_day_by_night_and_in_print():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (Path(write.__file__).with_name("page.css")).read_text()
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", style)]
    assert len(palettes) == 3
    for palette in palettes:
        inks = ("ink", "muted", "good", "now", "bad")
        pairs = [(palette[ink], palette[ground]) for ink in inks for ground in ("page", "box")]
        assert min(contrast(*pair) for pair in pairs) >= 4.5


def test_the_command_writes_the_page_and_replaces_an_older_one(digits, tmp_path, capsys, monkeypatch):
    assert main(["report", str(digits)]) == 0
    assert str(digits / "report.html") in capsys.readouterr().out
    first = (digits / "report.html").read_text()
    edit(digits / "results" / "knn.json", value=0.4321)
    assert write_report([digits]) == digits / "report.html"
    assert "43.2" in (digits / "report.html").read_text() and "43.2" not in first
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other")
    assert main(["report", str(digits), str(other)]) == 0 and (tmp_path / "report.html").is_file()
    assert main(["report", str(other), "--output", "new/folder/page.html"]) == 0
    assert (tmp_path / "new" / "folder" / "page.html").is_file() and not (other / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("empty", "RUN must be a folder that hf-mim pretrain has written, and empty holds no recipe.yaml"),
        ("nowhere", "RUN must be a folder that hf-mim pretrain has written, and nowhere holds no recipe.yaml"),
        ("run run", "RUN must be different folders, and one is given twice"),
        ("run --output notes.html", "output must be a new file or a report to replace, and notes.html is neither"),
        ("run --output empty", "output must be a file that can be written, and empty cannot: it is a folder"),
        ("run --output notes.html/page.html", "output must be a file that can be written"),
        ("run --format pdf", "report has no option format"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").write_text("<h1>mine</h1>")
    make_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "notes.html").read_text() == "<h1>mine</h1>"
