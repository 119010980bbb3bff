"""`hf-mim runs` and `hf-mim compare`: what run folders hold, also of runs that still train."""

import json
import re

import psutil
import pytest
import yaml
from PIL import Image

from hf_mim.cli import main
from hf_mim.evaluation.result import Result
from hf_mim.files import sha256
from hf_mim.lock import locked
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.runs import Run, compare, find_runs

RECIPE = {"method": "mae", "dataset": "/home/somebody/photos", "hidden_size": 192, "num_hidden_layers": 12}
RECIPE |= {"base_lr": 1e-3, "max_steps": 30, "output_dir": "x", "num_train_epochs": 100.0}


def make_run(folder, steps=(1, 10, 20, 30), batch=32, ended=True, **recipe):
    """A run that logged at these steps, with the loss 1 / step and the probe's accuracy step / 100."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | recipe))
    lines, before = [{"step": 0, "probe_knn": 0.0}], 0
    for step in steps:
        lap = {"seconds": 2.0 * (step - before), "images_per_second": batch / 2}
        lines.append({"step": step, "loss": 1 / step, "probe_knn": step / 100, "epoch": step / 5, **lap})
        before = step
    lines += [{"step": steps[-1], "train_runtime": 60.0}] if ended else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_are_listed_with_how_far_they_are(tmp_path, capsys):
    make_run(tmp_path / "runs" / "done")
    make_run(tmp_path / "runs" / "more" / "stopped", (1, 10), ended=False, hidden_size=100)
    (going := make_run(tmp_path / "runs" / "going", (1, 20), ended=False) / "checkpoint-25").mkdir()
    make_run(tmp_path / "runs" / "going" / "_saving")  # half-written files of a run are no run
    with locked(going.parent, "output_dir"):
        # A lock of this process counts as free, so another one is written in its place.
        lock = going.parent / "_lock"
        owner = json.loads(lock.read_text()) | {"process": 1, "started": psutil.Process(1).create_time()}
        mine = lock.read_text()
        lock.write_text(json.dumps(owner))
        assert main(["runs", str(tmp_path / "runs")]) == 0
        lock.write_text(mine)
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert head.split() == "run method size data step state last loss best probe".split()
    cells = {line.split()[0].rpartition("/")[2]: re.split(r"\s{2,}", line)[1:] for line in lines}
    assert cells == {
        "done": ["mae", "tiny", "photos", "30 of 30", "ended", "0.0333", "0.3000"],
        "going": ["mae", "tiny", "photos", "25 of 30", "running", "0.0500", "0.2000"],
        "stopped": ["mae", "100×12", "photos", "10 of 30", "stopped", "0.1000", "0.1000"],
    }


def test_a_comparison_has_what_differs_the_curves_over_images_and_the_results(tmp_path, capsys):
    folders = [make_run(tmp_path / "a" / "mae"), make_run(tmp_path / "b" / "mae", (1, 10, 15), 64, base_lr=0.01)]
    sizes = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    MAEForPreTraining(MAEConfig(**sizes)).save_pretrained(folders[1])
    own = sha256(folders[1] / "model.safetensors")
    for name, about in {
        "knn_photos_0a1b2c3d": {"checkpoint_sha256": own},
        "knn_other_0a1b2c3d": {"checkpoint_sha256": "other weights"},
    }.items():
        result = Result("knn", "accuracy", 0.75, {}, {}, **about)
        result.save(folders[1] / "results" / f"{name}.json")
    found = compare([Run.read(folder) for folder in folders])
    assert found.names == ["a/mae", "b/mae"] and found.settings == {"base_lr": [0.001, 0.01]}
    assert found.training["images seen"] == [960, 960] and found.training["step"] == [30, 15]
    assert found.training["probe: k-NN accuracy, best"] == [0.3, 0.15]
    assert found.training["loss, last"] == [1 / 30, 1 / 15] and found.training["minutes of training"] == [1.0, 0.5]
    assert found.results == {"knn_photos: accuracy": [None, 0.75]}
    (top, *_) = found.figure().axes
    assert [list(line.get_xdata()) for line in top.lines] == [[32, 320, 640, 960], [64, 640, 960]]
    (*_, lowest) = found.figure().axes
    lowest.set_xlim(4, 8)
    assert not (lowest.get_xticks() % 1).any()  # images are counted
    output = tmp_path / "both"
    assert main(["compare", *map(str, folders), "--output", str(output), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "both.json").read_text()) and printed["runs"] == ["a/mae", "b/mae"]
    assert printed["curves"]["probe_knn"][1] == {"0": 0.0, "64": 0.01, "640": 0.1, "960": 0.15}
    assert "| base_lr | 0.0010 | 0.0100 |" in (tmp_path / "both.md").read_text()
    assert Image.open(tmp_path / "both.png").size[0] > 500


def test_steps_that_a_resumed_run_made_again_count_once(tmp_path):
    run = Run.read(make_run(tmp_path / "run", (1, 10, 20, 15, 30)))
    assert [entry["step"] for entry in run.log] == [0, 1, 10, 15, 30, 30]
    assert list(run.curve("loss")) == [32, 320, 480, 960]


def test_places_and_times_of_a_run_are_no_settings_that_differ(tmp_path):
    runs = [make_run(tmp_path / name, output_dir=name, save_steps=n, logging_steps=n) for n, name in enumerate("ab")]
    assert compare([Run.read(run) for run in runs]).settings == {}


def test_a_value_that_is_not_a_number_is_equal_to_itself_and_told_in_words(tmp_path):
    lacking = {"missing_modality": "zero", "nodata": float("nan")}  # the run has set it, not the user
    runs = [Run.read(make_run(tmp_path / str(n), **about)) for n, about in enumerate((lacking, lacking, {}))]
    assert compare(runs[:2]).settings == {}
    assert "nodata" not in compare(runs).settings
    stripes = Run.read(make_run(tmp_path / "stripes", nodata=float("nan")))
    assert compare([runs[2], stripes]).settings == {"nodata": [None, "values that are not finite"]}


def test_markdown_of_names_from_outside_stays_text(tmp_path):
    runs = [make_run(tmp_path / name, method=name) for name in ("a", "<b>|")]
    assert "<b>" not in compare(find_runs(tmp_path)).markdown() and len(runs) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("runs nowhere", "FOLDER must be a folder with runs, and there is no folder nowhere"),
        ("runs empty", "FOLDER must hold runs of hf-mim pretrain, and there is no recipe.yaml in empty"),
        ("runs run --format json", "runs has no option format; there is none"),
        ("compare", ""),
        ("compare empty", "RUN must be a folder that hf-mim pretrain has written, and empty holds no recipe.yaml"),
        ("compare run run", "RUN must be different folders, and one is given twice"),
        ("compare run --format html", "format must be one of text, markdown, json, not 'html'"),
        ("compare run --output run/recipe.yaml/y", "output must be a file that can be written"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "run")
    assert main(words.split()) == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]
