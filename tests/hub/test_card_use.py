"""The examples of a card run, the command writes it, and the published cards are what their files say."""

import re
import shutil

import pytest
from card_folders import CARDS, PICTURE_LIMIT, assert_links_resolve, assert_numbers_have_a_source, edit, make_folder
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig

from hf_mim.cli import main
from hf_mim.hub.card import TEMPLATE, model_card


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_examples_run(channels, tmp_path, monkeypatch):
    import numpy as np
    import tifffile

    from hf_mim.hub.export import export

    statistics = {"image_mean": [0.4] * channels, "image_std": [0.2] * channels}
    folder = make_folder(tmp_path / "run", "stop_jepa", num_channels=channels, **statistics)
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("image.png")
    layout = "contig" if channels > 1 else None
    array = np.zeros((24, 24, channels), dtype=np.uint8)
    tifffile.imwrite("image.tif", array, photometric="minisblack", planarconfig=layout)
    blocks = re.findall(r"```python\n(.*?)```", model_card(folder).text, re.DOTALL)
    assert len(blocks) == (4 if channels == 3 else 3)
    export(folder, tmp_path / "exported", to="remote-code")
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["output"].pooler_output.shape == (1, 32) and names["inputs"]["pixel_values"].shape[1] == channels
    if channels == 3:
        assert len(names["features"][0]) == 32


def test_a_classifier_has_a_card_of_its_task(folder, tmp_path, monkeypatch):
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    shutil.copy(folder / "preprocessor_config.json", tmp_path / "classifier")
    card = model_card(tmp_path / "classifier")
    assert card.data.pipeline_tag == "image-classification" and "An image classifier" in card.text
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("image.png")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[:3]:
        exec(block, names)
    assert len(names["labels"]) == 3


def damage(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    "arguments, change, message",
    [
        ([], lambda folder: shutil.rmtree(folder), "checkpoint must be a folder with config.json"),
        ([], lambda folder: (folder / "config.json").unlink(), "checkpoint must be a folder with config.json"),
        ([], lambda folder: damage(folder, "config.json", "{"), "config.json cannot be read"),
        ([], lambda folder: edit(folder / "config.json", hidden_size="wide"), "config.json cannot be read"),
        (
            [],
            lambda folder: ViTConfig().save_pretrained(folder),
            "must be MAE, Latent MIM, StoP-JEPA, SymMIM or",
        ),
        ([], lambda folder: damage(folder, "results/knn.json", "{"), "knn.json holds no result"),
        ([], lambda folder: damage(folder, "recipe.yaml", "a: [1"), "recipe.yaml cannot be read"),
        ([], lambda folder: damage(folder, "recipe.yaml", "license: [a]"), "license must be an identifier"),
        ([], lambda folder: edit(folder / "results/knn.json", data=None), "knn.json holds no result: data is"),
        (
            [],
            lambda folder: damage(folder, "trainer_state.json", "[]"),
            "trainer_state.json must hold names and values",
        ),
        (["--license", "Free for all"], lambda folder: None, "license must be an identifier"),
        (["--licence", "mit"], lambda folder: None, "card has no option licence"),
        (["another"], lambda folder: None, "card needs one CHECKPOINT"),
        (["--license"], lambda folder: None, "license needs a value"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, capsys, arguments, change, message):
    change(folder)
    assert main(["card", str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (folder / "README.md").exists()


def test_the_command_writes_the_card(folder, capsys):
    assert main(["card", str(folder), "--license", "mit", "--repo_id", "me/photos"]) == 0
    text = (folder / "README.md").read_text()
    assert "license: mit" in text and 'from_pretrained("me/photos")' in text and "\n# photos\n" in text
    assert str(folder / "README.md") in capsys.readouterr().out and not list(folder.glob("*.part"))


PUBLISHED = sorted(path.parent.name for path in CARDS.glob("*/README.md"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_of_this_repository_is_what_its_files_say(name):
    folder = CARDS / name
    card = ModelCard.load(folder / "README.md")
    assert card.content.strip() == model_card(folder).content.strip()
    assert_links_resolve(card, folder)
    assert_numbers_have_a_source(card, folder)
    assert all(path.stat().st_size < PICTURE_LIMIT for path in folder.glob("*.png"))


def test_the_list_of_cards_is_complete_and_the_template_is_the_one_in_use():
    listed = re.findall(r"\]\((\w+)/README\.md\)", (CARDS / "README.md").read_text())
    assert sorted(listed) == PUBLISHED and len(PUBLISHED) >= 4
    assert (CARDS / "template.md").read_text() == TEMPLATE.read_text()


def test_an_evaluation_writes_the_card_again_unless_somebody_has_edited_it(tmp_path, monkeypatch):
    import hf_mim
    from hf_mim.hub.card import write_card

    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "run", "mae", num_channels=1, image_mean=[0.5], image_std=[0.5])
    options = dict(dataset="digits", train_images=40, test_images=20, beside=False)
    card = write_card(folder)
    assert hf_mim.evaluate("knn", folder, **options, k=3).value is not None
    assert "3-NN" in card.read_text() or "| k | 3 |" in card.read_text()
    hf_mim.evaluate("knn", folder, **options, k=4, output=folder / "results" / "mine.json")
    assert "results/mine.json" in card.read_text()
    edited = card.read_text() + "\nMy own words.\n"
    card.write_text(edited)
    hf_mim.evaluate("knn", folder, **options, k=5)
    assert card.read_text() == edited


def test_a_folder_that_is_no_model_of_ours_and_a_damaged_one_have_no_card_of_ours(folder, tmp_path):
    from hf_mim.hub.card import refresh_card, unedited, write_card

    ViTConfig().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "README.md").write_text("# Theirs\n")
    assert not unedited(tmp_path / "vit") and not unedited("owner/name") and not unedited(folder)
    write_card(folder)
    assert unedited(folder)
    damage(folder, "recipe.yaml", "[")
    assert not unedited(folder)
    refresh_card(folder)  # warns
