"""Cards tell what the files of a folder tell, and nothing else."""

import json
import re

import pytest
import yaml
from card_folders import assert_links_resolve, assert_numbers_have_a_source, edit, make_folder, numbers, section
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_mim import methods
from hf_mim.hub.card import TEMPLATE, model_card, write_card
from hf_mim.hub.card_text import is_hub_name, shown
from hf_mim.pretraining.recipe import Recipe
from hf_mim.scrub import scrubbed


@pytest.mark.parametrize("method", methods.names())
def test_a_card_of_each_method_parses_and_cites_its_papers(method, tmp_path):
    folder = make_folder(tmp_path / method, method)
    card = ModelCard.load(write_card(folder))
    title, papers = methods.get(method).title, list(methods.get(method).papers)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("hf_mim", "image-feature-extraction")
    assert card.data.datasets == ["owner/photos"] and card.data.license is None
    assert title in section(card, method)
    assert {tag.removeprefix("arxiv:") for tag in card.data.tags if tag.startswith("arxiv:")} == set(papers)
    assert re.findall(r"arXiv:(\d+\.\d+)", section(card, "Citation")) == papers
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_split) == (
        "image-classification",
        "owner/photos",
        "test",
    )
    assert (result.metric_type, result.metric_value, result.metric_name) == ("accuracy", 0.4567, "accuracy (knn)")
    index = yaml.safe_load(card.content.split("---")[1])["model-index"]
    assert model_index_to_eval_results(index)[0] == method
    assert ('<img src="reconstructions.png"' in section(card, method)) == methods.get(method).predicts_pixels
    assert "{" not in card.text.split("```bibtex")[0] and "\n\n\n" not in card.text
    assert_links_resolve(card, folder)
    assert_numbers_have_a_source(card, folder)


def test_the_prose_of_the_template_has_no_number_of_its_own():
    texts = [TEMPLATE.read_text().split("## How to use")[0], *(method.card_text for method in methods.rows())]
    prose = re.sub(r"{%.*?%}|{{.*?}}|https?:\S+|in 0\.\.1", "", "\n".join(texts))
    assert numbers(prose) == {2022, 2023, 2024}  # years of the papers


def test_another_number_in_a_results_file_is_another_number_in_the_card(folder):
    before = model_card(folder)
    edit(folder / "results" / "knn.json", value=0.4321)
    after = model_card(folder)
    told = before.content.replace("0.4567", "0.4321").replace("45.7 %", "43.2 %")
    assert after.content == told and before.content.count("45.7 %") == 3  # a sentence, the table, the folded part
    edit(folder / "results" / "training.json", device="cuda (a GPU)", value=1.111)
    compute = section(model_card(folder), "Compute")
    assert "| Device | cuda (a GPU) |" in compute and "| Last loss logged | 1.1110 |" in compute


@pytest.mark.parametrize(
    "name, title, text",
    [
        ("results/knn.json", "Results", "Not measured: there are no results"),
        ("results/knn.json", "Results in full", "Not measured: knn,"),
        ("results/health.json", "Health of the features", "Not measured"),
        ("results/training.json", "Compute", "| Device | not recorded |"),
        ("results/training.json", "Data and augmentation", "the number of images is not recorded"),
        ("recipe.yaml", "Recipe", "Not recorded"),
        ("recipe.yaml", "Data and augmentation", "Not recorded"),
        ("loss.png", "Training", "no picture of the loss"),
        ("reconstructions.png", "Training", "no picture of reconstructions"),
    ],
)
def test_what_is_missing_is_said_to_be_missing(folder, name, title, text):
    assert text not in section(model_card(folder), title)
    (folder / name).unlink()
    card = model_card(folder)
    assert text in section(card, title)
    assert "](" + name + ")" not in card.text


def test_a_run_without_a_record_of_its_own_has_what_trainer_kept(folder):
    (folder / "results" / "training.json").unlink()
    compute = section(model_card(folder), "Compute")
    rows = {"Seconds": "61.7", "Images per second": "88.9", "Optimizer steps": "37", "Images seen": "not recorded"}
    assert all(f"| {name} | {value} |" in compute for name, value in rows.items())
    (folder / "trainer_state.json").unlink()
    values = re.findall(r"^\| \w.* \| (.+) \|$", section(model_card(folder), "Compute"), re.MULTILINE)
    assert len(values) == 10 and set(values) == {"not recorded"}


def test_results_of_other_weights_and_of_untrained_ones_are_marked_and_kept_out_of_the_metadata(folder):
    card = model_card(folder)
    assert len(card.data.eval_results) == 1
    edit(folder / "results" / "knn.json", checkpoint_sha256="0" * 64)
    card = model_card(folder)
    assert "(of other weights)</summary>" in card.text and card.data.eval_results is None
    assert "Not measured: knn," in card.text
    edit(folder / "results" / "knn.json", checkpoint_sha256=None, settings={"untrained": True})
    card = model_card(folder)
    assert "(untrained encoder, to compare)</summary>" in card.text and card.data.eval_results is None
    assert "there are no results of these weights" in section(card, "Results")


def test_a_worry_of_the_health_check_is_among_the_limits(folder):
    assert "- Beyond the limit in the table of health: b." in section(model_card(folder), "Limits")
    assert "below 0.15 &#124; few" in section(model_card(folder), "Health of the features")  # one cell


def test_every_shape_of_data_is_told(folder):
    before = "| images | owner/photos, split train, 4,321 images → owner/photos, split test, 765 images |"
    assert before in model_card(folder).text
    edit(folder / "results" / "knn.json", data={"test": {"source": "a/b, split val", "images": 9, "seen": False}})
    assert "| a/b, split val, 9 images, seen: no |" in model_card(folder).text
    edit(folder / "results" / "knn.json", data={"source": "/videos/davis, split test", "sequences": ["dog", "cow"]})
    assert "| davis, split test, sequences: dog, cow |" in model_card(folder).text


def test_notes_of_a_result_stand_below_the_table(folder):
    edit(folder / "results" / "knn.json", notes=["Chosen on 77 images."])
    assert "\n\n- Chosen on 77 images.\n\n</details>" in section(model_card(folder), "Results in full")


def test_a_number_that_was_not_finite_is_not_a_result(folder):
    edit(folder / "results" / "knn.json", value=None)
    card = model_card(folder)
    assert "| k-NN: accuracy | owner/photos | not finite |" in section(card, "Results")
    assert "| accuracy | not finite |" in card.text and card.data.eval_results is None


def test_the_licence_is_given_taken_from_the_recipe_or_kept(tmp_path):
    folder = make_folder(tmp_path / "run")
    assert "| Licence | not given |" in model_card(folder).text
    write_card(folder, license="cc-by-nc-4.0")
    write_card(folder)
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-nc-4.0"
    licensed = make_folder(tmp_path / "licensed", license="apache-2.0")
    card = model_card(licensed)
    assert card.data.license == "apache-2.0" and "| Licence | apache-2.0 |" in card.text
    with pytest.raises(ValueError, match="license must be an identifier"):  # before the run, not at its end
        Recipe.resolve({"license": "Free for all"})


def test_no_path_of_the_machine_is_told(tmp_path):
    card = model_card(make_folder(tmp_path / "run", dataset=str(tmp_path / "my photos")))
    assert str(tmp_path) not in card.content and "my photos, split train" in card.text and not card.data.datasets
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("my photos", "my-photos")
    assert is_hub_name("owner/name:config") and not is_hub_name("../data/name") and not is_hub_name("digits")


@pytest.mark.parametrize(
    "text, told",
    [
        ("a held-out fifth of /home/me/x y/z, split train", "a held-out fifth of z, split train"),
        ("/home/me/a, b/c d/", "c d/"),
        ("~/photos", "photos"),
        ("~me/photos", "photos"),
        ("../../photos (left out: ./a.png)", "photos (left out: a.png)"),
        ("C:\\Users\\me\\photos", "photos"),
        ("path=/home/me/x:/home/me/y", "path=y"),
        ("https://me:word@host.org/a/b.tar?sig=x,y&z#w, split test", "https://host.org/a/b.tar, split test"),
        ("file:///home/me/photos", "photos"),
        (
            "last/mean/norm; J/F; a / b; (1)/2; owner/name; and/or",
            "last/mean/norm; J/F; a / b; (1)/2; owner/name; and/or",
        ),
    ],
)
def test_of_a_path_the_last_name_is_told_and_of_an_address_no_query(text, told):
    assert scrubbed(text) == told


def test_paths_in_settings_notes_and_data_are_told_by_their_last_name(folder):
    data = {"source": "https://host/a.tar?key=secret, split test", "folder": "secret/b", "images": 3}
    settings = {"cache": "/secret/c", "files": ["/secret/d", {"e": "~/secret/f"}], "features": "last/mean/norm"}
    edit(folder / "results" / "knn.json", data=data, settings=settings, notes=["Left out: /secret/g h/i.png"])
    for name in ("health", "training"):
        edit(folder / "results" / f"{name}.json", notes=["Read from /secret/j."], device="gpu at /secret/k")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"test_dataset": "secret/l", "deepspeed": "/secret/m.json"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = model_card(folder)
    assert "secret" not in card.content
    assert "| https://host/a.tar, split test, 3 images, folder: b |" in card.text
    assert "| cache | c |\n| files | d, e f |\n| features | last/mean/norm |" in card.text
    assert all(told in card.text for told in ("Left out: i.png", "Read from j.", "gpu at k", "test_dataset: l\n"))


def test_a_dataset_is_one_of_the_hub_only_if_the_run_has_noted_so(folder):
    path, data = folder / "results" / "training.json", {"source": "photos, split train", "images": 4321}
    for noted in ({"local": True}, {}):
        edit(path, data=data | noted)
        card = model_card(folder)
        assert card.data.datasets is None and "| Pretrained on | photos |" in card.text
    edit(path, data=data | {"local": False})
    card = model_card(folder)
    assert card.data.datasets == ["owner/photos"] and "| Pretrained on | owner/photos |" in card.text


def test_a_value_cannot_break_the_table(folder):
    bad = "a\n\n| b <i>\\"
    assert shown(bad) == "a &#124; b &#60;i&#62;&#92;"
    clean = section(model_card(folder), "Results in full").splitlines()
    data, scores = {"source": bad, bad: bad}, {bad: 0.5}
    edit(folder / "results" / "knn.json", metric=bad, settings={bad: [bad]}, data=data, scores=scores, notes=[bad])
    results = section(model_card(folder), "Results in full").splitlines()
    rows, before = ([line for line in lines if line.startswith("|")] for lines in (results, clean))
    assert len(rows) == len(before) == 8
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {3}
    assert f"- {shown(bad)}" in results and "<i>" not in "".join(results)


@pytest.mark.parametrize("name", ["health", "training"])
def test_the_numbers_of_other_weights_are_left_out(folder, name):
    edit(folder / "results" / f"{name}.json", checkpoint_sha256="0" * 64)
    card = model_card(folder)
    assert f"`results/{name}.json` is left out (of other weights)" in card.text
    if name == "health":
        assert "12.5" not in card.text and "health" in card.text.partition("Not measured: ")[2].split(".")[0]
        assert "Past the limit" not in card.text
    else:
        assert "5920" not in card.text and "| Device | not recorded |" in card.text


@pytest.mark.parametrize(
    ("value_range", "nodata", "words"),
    [
        (
            [0, 4095],
            None,
            "- scaled from its own depth: the values 0 to 4095 come to lie in 0..1, and values beyond are",
        ),
        (
            [0, 1, -30.5, 5],
            -9999.0,
            "the values 0 to 1, -30.5 to 5 of its channels, in this order, come to lie in 0..1",
        ),
        ([0, 255], float("nan"), "- without data where a value is not finite: there it is the mean of the channel"),
        ([-30, 5], -9999.0, "- without data where a value is -9999 or not finite: there it is the mean of the channel"),
        (["<b>", 5], "<i>", "the values &#60;b&#62; to 5 come"),
        ([5], None, "- standardised by mean"),
    ],
)
def test_the_range_of_the_values_and_pixels_without_data_are_told(folder, value_range, nodata, words):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"value_range": value_range, "nodata": nodata}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = section(model_card(folder), "Data and augmentation")
    assert words in told and ("without data" in told) == (nodata is not None) and "<i>" not in told
    assert ("scaled from its own depth" in told) == (len(value_range) > 1)


def test_a_card_says_that_images_lacked_a_modality_and_how_many(folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"missing_modality": "zero", "nodata": float("nan")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = "Some of the images lack a modality, which is masked as a whole there:"
    assert f"{told} how many is not recorded." in model_card(folder).content
    edit(
        folder / "results" / "training.json",
        data={"source": "x, split train", "images": 4321, "nodata": "6.2 % of the pixels, in 270 of 4,321 images"},
    )
    content = model_card(folder).content
    assert f"{told} without data are 6.2 % of the pixels, in 270 of 4,321 images." in content.split("## Results")[0]
    assert "- without data where it lacks a modality: there it is the mean" in content
    assert "lacks a modality and where a value is -1 or not finite" in _with_nodata(folder, recipe, -1)


def _with_nodata(folder, recipe, nodata) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"nodata": nodata}))
    return model_card(folder).content


def test_files_of_odd_content_make_a_card(folder):
    (folder / "recipe.yaml").write_text("dataset: /x\nimage_mean: 3\n1: 2\n")
    state = {"log_history": [1, {"loss": "low"}], "global_step": [3]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    edit(folder / "results" / "health.json", table=[{"measure": "a"}, {}, {"worry": "yes"}])
    (folder / "results" / "training.json").unlink()
    card = model_card(folder)
    told = section(card, "Data and augmentation")
    assert "x, split not recorded" in told and "cropped to not recorded of its area" in told
    assert "mean not recorded and standard deviation not recorded" in told
    assert "| First loss logged | low |" in card.text
    (folder / "trainer_state.json").write_text('{"log_history": 5}')
    assert "| First loss logged | not recorded |" in model_card(folder).text
