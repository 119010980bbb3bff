"""`hf-mim predict`: the logits of fine-tuning's own evaluation, in a table, with what can be counted."""

import csv
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

import hf_mim
from hf_mim.cli import main
from hf_mim.data import CenterCrop, ImageDataset, load_images
from hf_mim.data.images import Images
from hf_mim.data.mix import MixAugment
from hf_mim.data.processor import image_processor
from hf_mim.evaluation import features
from hf_mim.evaluation.classifier import save_classifier
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.finetune import FinetuningArguments, FinetuningTrainer
from hf_mim.evaluation.predictions import interval
from hf_mim.evaluation.trained_classifier import TrainedClassifier
from hf_mim.models.pixels import ValueRange

SIZES = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
BATCH = 7


def make_classifier(folder, classes, channels=3, **seen):
    """A classifier with random weights, whose answers differ from image to image."""
    torch.manual_seed(3)
    config = hf_mim.MAEConfig(**SIZES, num_channels=channels, pooling="mean", id2label=dict(enumerate(classes)))
    model = hf_mim.MAEForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.linear.weight, std=3.0)
    size = seen.pop("size", (32, 32))
    save_classifier(model, folder, image_processor(size, [0.4] * channels, [0.2] * channels, **seen))
    return folder


def pictures(folder, classes=("cat", "dog", "fox"), count=30, channels=3, dtype=np.uint8, end="png"):
    """Noise around a level, in class folders. Not square, so that the crop counts."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number:02}.{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (44, 60, channels)) // 2 + 4 * number
        if end == "npy":
            np.save(path, pixels.astype(dtype))
        else:
            Image.fromarray(pixels.astype(dtype)).save(path)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pictures(tmp_path / "photos")


@pytest.fixture
def classifier(tmp_path):
    return make_classifier(tmp_path / "classifier", ["cat", "dog", "fox"])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finetunings_logits(folder, source, crop):
    """As `Finetune.run` gets them: Trainer's prediction, with its augmentation before the model."""
    encoder = FrozenEncoder.load(folder, device="cpu")
    model = AutoModelForImageClassification.from_pretrained(folder)
    augment = MixAugment(encoder.mean, encoder.std, nodata=encoder.has_nodata)
    augment.attach(model)
    images = load_images(str(source)).select_columns("image")
    images = ImageDataset(
        images, encoder.image_size, encoder.num_channels, crop, value_range=encoder.value_range, keep_empty=True
    )
    args = FinetuningArguments(str(folder / "x"), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=BATCH)
    return torch.from_numpy(FinetuningTrainer(model, args).predict(images).predictions)


@pytest.mark.parametrize(
    ("seen", "crop", "images"),
    [
        ({}, CenterCrop(), {}),
        ({"crop_fraction": 0.75}, CenterCrop(0.75), {}),
        (
            {"value_range": ValueRange.from_list([0, 1000], 5, "uint16")},
            CenterCrop(),
            {"channels": 5, "dtype": np.uint16, "end": "npy"},
        ),
    ],
    ids=["whole", "crop", "bands"],
)
def test_logits_are_those_of_finetunings_own_evaluation(tmp_path, seen, crop, images):
    source = pictures(tmp_path / "photos", **images)
    folder = make_classifier(tmp_path / "classifier", "abc", images.get("channels", 3), **seen)
    # In batches of the same length: on some processors the last bits depend on it.
    extract = FeatureExtractor(TrainedClassifier.load(folder, device="cpu"), BATCH, progress=False)
    (logits,) = extract(Images(load_images(str(source))), ["last/mean/norm"])
    expected = finetunings_logits(folder, source, crop)
    assert expected.std() > 0.1
    assert torch.equal(logits, expected)


def test_the_table_has_a_row_for_each_image_and_the_accuracy_is_that_of_its_rows(photos, classifier, capsys):
    words = ["predict", str(classifier), "--dataset", "photos", "--device", "cpu", "--output"]
    assert main([*words, "answers.csv"]) == 0
    rows = read("answers.csv")
    logits = finetunings_logits(classifier, "photos", CenterCrop())
    classes = ["cat", "dog", "fox"]
    assert [row["name"] for row in rows][:2] == ["cat/00.png", "cat/03.png"] and len(rows) == 30
    assert [row["predicted"] for row in rows] == [classes[number] for number in logits.argmax(1)]
    told = torch.tensor([[float(row[f"probability_{name}"]) for name in classes] for row in rows])
    torch.testing.assert_close(told, logits.softmax(1), atol=1e-5, rtol=1e-5)
    assert all(row["label"] == row["name"].split("/")[0] for row in rows)
    right = torch.tensor([float(row["right"] == "True") for row in rows])
    assert [row["right"] == "True" for row in rows] == [row["label"] == row["predicted"] for row in rows]
    low, high = interval(right.double())
    line = f"Accuracy {right.mean():.4f} (95 % interval {low:.4f} to {high:.4f}) on the 30 images whose label it knows."
    assert line in capsys.readouterr().out
    assert main([*words, "answers.parquet"]) == 0
    table = pq.read_table("answers.parquet").to_pylist()
    assert [row["predicted"] for row in table] == [row["predicted"] for row in rows]
    assert [row["right"] for row in table] == [bool(x) for x in right]


def test_labels_that_the_classifier_does_not_know_do_not_count(photos, tmp_path):
    folder = make_classifier(tmp_path / "two", ["dog", "cat"])  # in another order than the source's
    done = hf_mim.predict(folder, dataset=photos, output="answers.csv", device="cpu")
    rows = read("answers.csv")
    assert (done.labelled, done.unknown, done.others) == (20, 10, ["fox"])
    known = [row for row in rows if row["label"] != "fox"]
    assert done.accuracy == pytest.approx(np.mean([row["label"] == row["predicted"] for row in known]))
    assert all(row["right"] == "" for row in rows if row["label"] == "fox")
    assert "10 images have labels that are no classes of the classifier, and do not count: fox." in str(done)


def test_images_without_labels_have_classes_and_no_accuracy(photos, classifier):
    done = hf_mim.predict(classifier, dataset=photos, labels="none", output="answers.csv", device="cpu")
    assert done.accuracy is None and "label" not in str(done)
    assert list(read("answers.csv")[0])[-1] == "probability_fox"


def test_images_that_cannot_be_decoded_are_left_out_and_counted(photos, classifier, monkeypatch):
    monkeypatch.setattr(features, "MAX_BROKEN", 0.1)
    (photos / "dog" / "04.png").write_bytes(b"no image")
    done = hf_mim.predict(classifier, dataset=photos, output="answers.csv", device="cpu")
    rows = read("answers.csv")
    assert (done.images, done.broken, done.labelled) == (29, 1, 29)
    assert "dog/04.png" not in [row["name"] for row in rows] and "(1 more cannot be decoded)" in str(done)
    assert [int(row["row"]) for row in rows] == [row for row in range(30) if row != 11]
    whole = hf_mim.predict(classifier, dataset=pictures(photos.parent / "all"), output="all.csv", device="cpu")
    others = [row for row in read("all.csv") if row["name"] != "dog/04.png"]
    assert whole.images == 30 and [row["predicted"] for row in rows] == [row["predicted"] for row in others]


def test_a_classifier_of_transformers_and_classes_of_one_name(photos, tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, id2label={0: "crane", 1: "crane", 2: "cat"}))
    torch.nn.init.normal_(model.classifier.weight)
    model.eval().save_pretrained(tmp_path / "vit")
    image_processor((48, 48), [0.5] * 3, [0.5] * 3).save_pretrained(tmp_path / "vit")  # larger than the model's own
    hf_mim.predict(tmp_path / "vit", dataset=photos, output="answers.parquet", device="cpu")
    table = pq.read_table("answers.parquet")
    assert {"probability_crane 0", "probability_crane 1", "probability_cat"} <= set(table.column_names)
    pixels = hf_mim.MIMImageProcessor.from_pretrained(tmp_path / "vit")(
        [hf_mim.open_image(photos / name) for name in table["name"].to_pylist()], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**pixels, interpolate_pos_encoding=True).logits.softmax(1)[:, 2]
    torch.testing.assert_close(torch.tensor(table["probability_cat"].to_pylist()), expected, atol=1e-5, rtol=1e-4)
    model.config.id2label[2] = "crane 0"
    model.save_pretrained(tmp_path / "vit")
    hf_mim.predict(tmp_path / "vit", dataset=photos, output="again.parquet", device="cpu")
    columns = [name for name in pq.read_table("again.parquet").column_names if name.startswith("probability_")]
    assert columns == ["probability_crane 0", "probability_crane 1", "probability_crane 0 2"]


def test_mistakes_are_one_line_and_nothing_is_written(photos, classifier, tmp_path, capsys):
    torch.manual_seed(0)
    encoder = tmp_path / "my run"
    ViTModel(ViTConfig(**SIZES, intermediate_size=32)).save_pretrained(encoder)
    bands = make_classifier(tmp_path / "bands", "ab", channels=5)
    (tmp_path / "there.csv").write_text("kept")
    one = make_classifier(tmp_path / "one", ["a"])
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, message in (
        ([encoder], "CLASSIFIER must be an image classifier, and .*my run holds ViTModel; make one of it with: hf-mim "
         "evaluate finetune '.*my run' --dataset LABELLED_IMAGES --output_dir 'my run_classifier'$"),
        ([classifier, "--output", "there.csv"], "output must be a new file, and there.csv exists$"),
        ([classifier, "--output", "no/a.csv"], "output must be in a folder that exists, and there is no folder no$"),
        ([classifier, "--output", "a.txt"], "output must end with .csv or .parquet, not a.txt$"),
        ([bands], "num_channels=5, but the image has 3 "),
        ([one], "CLASSIFIER must choose one of several classes, and .*one gives one answer$"),
        ([tmp_path / "nothing"], "CLASSIFIER: there is no folder .*nothing$"),
        ([classifier, "--datset", "photos"], "predict has no option datset; did you mean dataset\\?$"),
    ):  # fmt: skip
        assert main(["predict", *map(str, words), "--dataset", "photos", "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("error: "), line
        assert re.search(message, line), line
    assert main(["predict", str(classifier)]) == 2
    assert "dataset must be given" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.csv").read_text() == "kept"


def test_embed_refuses_a_missing_folder_too(photos, classifier):
    for output in ("no/a.parquet", "no/folder"):
        with pytest.raises(ValueError, match="^output must be in a folder that exists, and there is no folder no$"):
            hf_mim.embed(classifier, dataset="photos", output=output)
    shutil.rmtree(photos)
