"""`hf-mim pretrain` on images of one's own: folders, arrays, labels that lack, files that are broken."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Value
from PIL import Image
from small_runs import SMALL, run
from transformers import AutoImageProcessor, AutoModel

from hf_mim.cli import main
from hf_mim.pretraining.settings import read_yaml


def make_pictures(folder, count=80, formats=("png", "jpg", "bmp", "gif"), modes=("RGB", "L", "RGBA", "P")):
    """Nested class folders, sizes, formats and modes mixed."""
    random = np.random.default_rng(0)
    for index in range(count):
        kind = index % len(formats)
        path = folder / "photos" / ("cats" if index % 2 else "dogs") / f"{index}.{formats[kind]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = random.integers(20, 60, 2)
        mode = modes[index // 4 % len(modes)]
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.convert("RGB" if formats[kind] in ("jpg", "bmp") and mode in ("RGBA", "P") else mode).save(path)
    return folder


OWN_IMAGES = "--image_size 16,32 --patch_size 8 --max_steps 2 --dataloader_num_workers 0".split()


def test_a_folder_of_ones_own_images_with_a_broken_file(tmp_path, capsys, caplog):
    pictures = make_pictures(tmp_path / "pictures", count=150)
    (pictures / "photos" / "cats" / "broken.jpg").write_bytes(b"no jpeg")
    options = [*SMALL, *OWN_IMAGES, "--num_train_epochs", 1, "--max_steps", -1]
    run("--dataset", pictures, *options, "--output_dir", tmp_path / "run")
    assert "broken.jpg" in caplog.text
    assert "seen in pretraining without their labels" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "results" / "knn.json").read_text())
    train, test = result["data"]["train"], result["data"]["test"]
    assert result["settings"]["num_classes"] == 2 and test["seen_in_pretraining"] is True
    assert train["images"] + test["images"] == 150  # the broken one is left out here, and counted
    assert train.get("broken_images_left_out", 0) + test.get("broken_images_left_out", 0) == 1
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
        picture = Image.new("RGB", (40, 30)).convert(mode)
        assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 32)


def test_classes_of_the_test_dataset_are_matched_by_name(tmp_path):
    random = np.random.default_rng(0)
    patterns = {name: random.integers(0, 240, (16, 32)) for name in ("ant", "bee", "cow")}
    for source, names in (("one", ("ant", "bee", "cow")), ("two", ("bee", "cow"))):  # in two, bee is 0
        for name in names:
            (tmp_path / source / name).mkdir(parents=True)
            for number in range(10):
                Image.fromarray((patterns[name] + number).astype(np.uint8)).save(
                    tmp_path / source / name / f"{number}.png"
                )
    options = [*SMALL, *OWN_IMAGES, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "run"]
    run("--dataset", tmp_path / "one", "--test_dataset", tmp_path / "two", *options)
    scores = json.loads((tmp_path / "run" / "results" / "knn.json").read_text())["scores"]
    assert scores["raw pixels"] == 1.0


def draw_scans(folder, patients=16, each=5):
    """Noise of 16 × 32 pixels in folders of patients, and a table of their diagnoses."""
    rows, random = ["file_name,diagnosis"], np.random.default_rng(0)
    for patient in range(patients):
        (folder / f"P{patient:02}").mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 256, (16, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"P{patient:02}" / f"{number}.png")
            rows.append(f"P{patient:02}/{number}.png,{'ill' if patient % 2 else 'well'}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


@pytest.mark.slow
@pytest.mark.pictures
def test_folders_of_patients_are_not_measured_as_classes(tmp_path, capsys, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    scans = draw_scans(tmp_path / "scans")
    options = [*SMALL, *OWN_IMAGES, "--probe_every", 1, "--report_to", "tensorboard"]
    run("--dataset", scans, *options, "--output_dir", tmp_path / "run")
    line = capsys.readouterr().out.splitlines()[0]
    assert "no labels; the 16 folders (P00, P01, P02 and 13 more) are taken for groups" in line
    assert "if they are classes: --labels folder" in line
    assert not (tmp_path / "run" / "results" / "knn.json").exists()
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("probe_rank_me" in entry for entry in log) and not any("probe_knn" in entry for entry in log)
    probed = {path.parent.name for path in (tmp_path / "run" / "pictures").glob("*/pca.png")}
    assert probed == {f"step-{entry['step']}" for entry in log if "probe_rank_me" in entry and entry["step"]}
    events = accumulators.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("pca", "reconstructions"):
        assert {f"step-{event.step}" for event in events.Images(f"pictures/{name}")} == probed


def test_labels_and_groups_that_are_declared_are_in_the_result_and_in_the_card(tmp_path, capsys):
    scans = draw_scans(tmp_path / "scans")
    options = ["--dataset", scans, "--labels", "diagnosis", "--group", "folder"]
    run(*options, *SMALL, *OWN_IMAGES, "--output_dir", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "labels by column diagnosis, 2 classes: ill, well; 16 groups by column folder: P00, P01" in printed
    result = json.loads((tmp_path / "run" / "results" / "knn.json").read_text())
    about = {"labels": "column diagnosis", "group": "column folder", "num_classes": 2}
    assert result["settings"] | about == result["settings"]
    assert (result["data"]["train"]["images"], result["data"]["test"]["images"]) == (60, 20), "whole patients of five"
    assert "| labels | column diagnosis |\n| group | column folder |" in (tmp_path / "run" / "README.md").read_text()
    evaluate = ["evaluate", "linear", tmp_path / "run", *options, "--epochs", 2, "--cache", "none"]
    assert main([*map(str, evaluate), "--output", str(tmp_path / "linear.json")]) == 0
    result = json.loads((tmp_path / "linear.json").read_text())
    assert result["settings"]["labels"] == "column diagnosis" and result["settings"]["group"] == "column folder"
    assert "on 10 held-out images" in result["notes"][0], "two patients of five images"
    recipe = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert (recipe["labels"], recipe["group"]) == ("diagnosis", "folder")
    assert main(["pretrain", "--dataset", str(scans), "--label_column", "diagnosis"]) == 2
    assert "unknown argument label_column; did you mean labels?" in capsys.readouterr().err


def test_other_test_images_on_a_resume_are_refused(tmp_path, capsys):
    one, two = draw_scans(tmp_path / "one"), draw_scans(tmp_path / "two", patients=4)
    options = [*SMALL, *OWN_IMAGES, "--save_steps", 1, "--knn", "false", "--output_dir", tmp_path / "run"]
    run("--dataset", one, "--test_dataset", two, *options)
    (two / "P00" / "0.png").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert main(["pretrain", "--resume", "--output_dir", str(tmp_path / "run")]) == 2
    assert "is not what the run in" in (error := capsys.readouterr().err) and "it had 20 files and has 19" in error
    assert f"error: test_dataset {two} " in error


def test_images_of_which_some_have_no_label_are_pretrained_on(tmp_path):
    rows = {"image": [encoded_grey(seed) for seed in range(64)], "label": [None, 0, 1, 1] * 16}
    Dataset.from_dict(rows).to_parquet(tmp_path / "some.parquet")
    run("--dataset", tmp_path / "some.parquet", *SMALL, *OWN_IMAGES, "--output_dir", tmp_path / "run")
    data = json.loads((tmp_path / "run" / "results" / "knn.json").read_text())["data"]
    assert data["train"]["images"] + data["test"]["images"] == 48


def encoded_grey(seed) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_handful_of_images_is_pretrained_on_without_a_readout(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", count=4)
    options = [*SMALL, *OWN_IMAGES, "--per_device_train_batch_size", 2]
    run("--dataset", pictures / "photos", *options, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "results" / "knn.json").exists()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_more_than_one_broken_file_in_a_hundred_stops_the_run_with_one_line(tmp_path, capsys, workers):
    pictures = make_pictures(tmp_path / "pictures")
    for index in range(8):
        (pictures / "photos" / "cats" / f"broken{index}.jpg").write_bytes(b"no jpeg")
    options = [*SMALL, *OWN_IMAGES, "--max_steps", 20, "--dataloader_num_workers", workers]
    options += ["--image_mean", ".5,.5,.5", "--image_std", ".2,.2,.2"]  # nothing is measured at the start
    assert (
        main(["pretrain", "--dataset", str(pictures), *map(str, options), "--output_dir", str(tmp_path / "run")]) == 2
    )
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1 and "cannot be decoded" in error[0] and "broken" in error[0]


def test_broken_files_that_the_start_finds_are_refused_before_anything_is_written(tmp_path, capsys):
    pictures = make_pictures(tmp_path / "pictures")
    for index in range(8):
        (pictures / "photos" / "cats" / f"broken{index}.jpg").write_bytes(b"no jpeg")
    command = ["pretrain", "--dataset", str(pictures), *map(str, [*SMALL, *OWN_IMAGES])]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 8 of ") and "cannot be decoded; repair or remove them" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.pictures
def test_ten_channels_from_arrays_to_processor(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 10, 16, 16), dtype=np.uint8)
    features = Features(image=Array3D((10, 16, 16), "uint8"), label=Value("int64"))
    Dataset.from_dict({"image": list(pixels), "label": [0, 1] * 20}, features).save_to_disk(tmp_path / "bands")
    options = [*SMALL, *OWN_IMAGES, "--image_size", 16, "--num_channels", 10]
    run("--dataset", tmp_path / "bands", *options, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "reconstructions.png").exists()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(list(pixels[:2]), input_data_format="channels_first", return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 10, 16, 16)
    mean, std = (torch.tensor(x).view(10, 1, 1) for x in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(inputs["pixel_values"][1], (torch.tensor(pixels[1]) / 255 - mean) / std)
    assert AutoModel.from_pretrained(tmp_path / "run")(**inputs).last_hidden_state.shape == (2, 5, 16)
