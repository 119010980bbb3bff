"""What `hf-mim evaluate finetune --output_dir FOLDER` leaves there, and what it says."""

import csv
import re
import shlex

import pytest
import torch
from PIL import Image
from test_predict import SIZES, pictures
from transformers import TrainerCallback, ViTConfig, ViTModel

import hf_mim
from hf_mim.cli import main
from hf_mim.companions import how_to_use
from hf_mim.data.labelled import load_labelled
from hf_mim.data.processor import image_processor
from hf_mim.evaluation import finetune, finetune_result
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.finetune import Finetune
from hf_mim.evaluation.result import Result
from hf_mim.hub.card import model_card

QUICK = dict(batch_size=8, base_lr=0.05, mixup=0, cutmix=0, drop_path=0, randaugment_magnitude=0)


def pretrained(folder, channels=3):
    torch.manual_seed(0)
    hf_mim.MAEForPreTraining(hf_mim.MAEConfig(**SIZES, num_channels=channels)).save_pretrained(folder)
    image_processor((32, 32), [0.4] * channels, [0.2] * channels).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    return pictures(tmp_path / "photos")


def words(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_the_folder_is_whole_and_what_is_printed_can_be_pasted(photos, tmp_path, capsys):
    pretrained(tmp_path / "run")
    begin = ["evaluate", "finetune", "run", "--dataset", "photos", "--epochs", "2", "--output_dir", "classifier"]
    assert main([*begin, *words(QUICK)]) == 0
    folder, printed = tmp_path / "classifier", capsys.readouterr().out
    names = {path.name for path in (folder / "results").iterdir()}
    ends = "json", "predictions.csv", "confusion.csv", "confusion.png", "curve.png"
    assert names == {f"finetune.{end}" for end in ends}
    for end in ("confusion", "curve"):
        with Image.open(folder / "results" / f"finetune.{end}.png") as picture:
            assert min(picture.size) > 200
    result = Result.load(folder / "results/finetune.json")
    (first,) = map(Result.load, (tmp_path / "run/results").glob("*.json"))
    assert (result.value, result.table, result.scores) == (first.value, first.table, first.scores)
    assert result.checkpoint_sha256 == checkpoint_sha256(folder) and result.checkpoint == "classifier"
    start = [result.settings[name] for name in ("started_from", "started_from_sha256")]
    assert start == ["run", first.checkpoint_sha256]
    assert [row["epoch"] for row in result.table] == [1, 2] and result.table[-1]["test accuracy"] == result.value

    command = re.search(r"hf-mim (predict classifier .*)", printed)[1]
    assert command == "predict classifier --dataset photos --output predictions.csv"
    assert main(shlex.split(command)) == 0
    with open("predictions.csv", newline="") as file:
        told = {row["name"]: row["predicted"] for row in csv.DictReader(file)}
    with open(folder / "results/finetune.predictions.csv", newline="") as file:
        tested = {row["image"]: row["predicted"] for row in csv.DictReader(file)}
    assert tested.items() <= told.items() and len(tested) == result.data["test"]["images"]
    found = {}
    exec("\n".join(line.strip() for line in printed.split("Python load it:")[1].strip().splitlines()), found)
    name, answer = next(iter(told.items()))
    assert found["classifier"](str(photos / name), top_k=1)[0]["label"] == answer


@pytest.mark.parametrize(
    ("source", "chosen"), [("digits, split test", " --split test"), ("a held-out fifth of digits, split train", "")]
)
def test_the_printed_command_classifies_the_images_of_the_test(tmp_path, source, chosen):
    """The default split of predict is train, and an accuracy on images that were trained on tells nothing."""
    hf_mim.MAEConfig(**SIZES).save_pretrained(tmp_path)
    result = Result("finetune", "top-1 accuracy", 0.5, {}, {"test": {"source": source}})
    command = f"predict {tmp_path} --dataset digits{chosen} --output predictions.csv"
    assert command in how_to_use(tmp_path, "digits", result)


def test_the_card_has_the_result_the_pictures_and_examples_that_run(photos, tmp_path):
    pretrained(tmp_path / "run")
    result = hf_mim.evaluate("finetune", "run", dataset="photos", epochs=1, output_dir="classifier", **QUICK)
    text = (tmp_path / "classifier/README.md").read_text()
    assert f"| top-1 accuracy | {result.value:.4f} |" in text or f"| top-1 accuracy | {result.value:.4g} |" in text
    assert "fine-tuned from run (sha256" in text and "Pretrained" not in text.split("## Training")[0]
    for place in re.findall(r"\]\((results/[^)]+)\)", text):
        assert (tmp_path / "classifier" / place).is_file(), place
    assert text.count("![") == 2 and "| Classes | 3: cat, dog, fox |" in text
    card = model_card(tmp_path / "classifier", license="apache-2.0")
    assert card.data.pipeline_tag == "image-classification" and card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_value == pytest.approx(result.value)
    Image.linear_gradient("L").save("image.png")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert len(names["labels"]) == 3 and names["output"].logits.shape == (1, 3)


def test_a_classifier_of_transformers_has_a_card_too(photos, tmp_path):
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, intermediate_size=32)).save_pretrained(tmp_path / "vit")
    image_processor((32, 32), [0.4] * 3, [0.2] * 3).save_pretrained(tmp_path / "vit")
    hf_mim.evaluate("finetune", "vit", dataset="photos", epochs=1, output_dir="classifier", **QUICK)
    text = (tmp_path / "classifier/README.md").read_text()
    assert "An image classifier: ViTForImageClassification, fine-tuned from vit" in text and "## Citation" not in text


def test_weights_that_were_saved_since_do_not_have_the_card_of_the_old_ones(photos, tmp_path):
    pretrained(tmp_path / "run")
    hf_mim.evaluate("finetune", "run", dataset="photos", epochs=1, output_dir="classifier", **QUICK)
    model = hf_mim.MAEForImageClassification.from_pretrained("classifier")
    model.classifier.linear.bias.data += 1
    model.save_pretrained("classifier")
    assert "of other weights" in model_card(tmp_path / "classifier").text


class Weights(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_curve_changes_no_weight_and_knows_the_accuracy_of_every_epoch(photos, tmp_path, monkeypatch):
    """With all randomness of the recipe; the accuracy in the middle is that of a run which is stopped there."""
    folder = pretrained(tmp_path / "run")
    extract = FeatureExtractor(FrozenEncoder.load(folder, device="cpu"), progress=False)
    ends, make = [], finetune.make_trainer

    def watched(*arguments):
        trainer = make(*arguments)
        trainer.add_callback(weights := Weights())
        ends.append(weights)
        return trainer

    monkeypatch.setattr(finetune, "make_trainer", watched)
    options = dict(epochs=3, batch_size=8, base_lr=0.05)
    curves = []
    for points in (20, 1):
        monkeypatch.setattr(finetune_result.AccuracyCurve, "POINTS", points)
        result = Finetune(**options).run(extract, *load_labelled("photos"))
        curves.append([row["test accuracy"] for row in result.table])
        assert curves[-1][-1] == result.value
    assert torch.equal(ends[0].found, ends[1].found)
    assert None not in curves[0] and curves[1][:2] == [None, None]
