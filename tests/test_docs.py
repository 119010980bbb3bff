"""Numbers in the docs are those of the files beside them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from hf_mim.comparison import Row, as_text, table
from hf_mim.evaluation.result import Result

REPOSITORY = Path(__file__).parents[1]
CARDS = REPOSITORY / "model_cards"


def test_the_numbers_in_the_docs_of_evaluation_are_those_of_the_results_files():
    results = [Result.load(path) for path in (CARDS / "cifar10_mae" / "results").glob("*.json")]
    trained, untrained = ({r.protocol: r for r in results if r.settings["untrained"] is bare} for bare in (False, True))

    def scores(protocol, *names):
        return [x.scores[name] for name in names for x in (trained[protocol], untrained[protocol])]

    linear = [f"top1 {features}" for features in ("last/mean/norm", "last/cls/norm")]
    budgets = [[f"top1 {budget}", f"top1 {budget} standard deviation"] for budget in ("1%", "10%", "5")]
    draws = [x.scores[name] for pair in budgets for x in (trained["lowshot"], untrained["lowshot"]) for name in pair]
    rank = trained["health"].table[0]
    expected = {name: [trained[name].value, untrained[name].value] for name in untrained}
    expected["linear"] += scores("linear", *linear)
    expected["lowshot"] = draws
    expected["segment"] += scores("segment", "knn mIoU")
    expected["propagate"].append(trained["propagate"].scores["J&F of the first mask left where it is"])
    expected["local"] += [trained["local"].scores[name] for name in ("count from raw pixels", "count by chance")]
    expected["local"] += [*scores("local", "distance"), trained["local"].scores["distance by chance"]]
    expected["health"] = [rank["value"] / 100, rank["untrained"] / 100]
    rows = re.findall(
        r"\| `(\w+)` \|[^|]*\|(.*)", (REPOSITORY / "docs" / "evaluation.md").read_text().split("## Numbers")[1]
    )
    told = {name: re.findall(r"\d+\.\d", cells) for name, cells in rows}
    assert told == {name: [f"{100 * value:.1f}" for value in values] for name, values in expected.items()}


@pytest.mark.parametrize(
    ("page", "comparison"),
    [
        ("docs/compare.md", "digits"),
        ("README.md", "textures"),
        ("docs/log.md", "cifar10_mae"),
        ("docs/log.md", "cifar10_mae_30_epochs"),
        ("docs/log.md", "cifar10_latent_mim_22_epochs"),
        ("docs/log.md", "cifar10_ijepa"),
        ("docs/log.md", "cifar10_latent_mim"),
        ("docs/log.md", "cifar10_latent_mim_300k"),
        ("docs/log.md", "cifar10_interactive_mim"),
        ("docs/log.md", "cifar10_sym_mim"),
        ("docs/start.md", "start_fashion"),
        ("docs/start.md", "start_imagenette_gray"),
        ("docs/start.md", "start_imagenette_bands"),
    ],
)
def test_the_table_of_a_comparison_is_that_of_its_record(page, comparison):
    rows = json.loads((REPOSITORY / "docs" / "comparisons" / f"{comparison}.json").read_text())["rows"]
    names = [field.name for field in dataclasses.fields(Row)]
    expected = table([Row(**{name: row[name] for name in names}) for row in rows])
    assert expected in (REPOSITORY / page).read_text()


def test_the_numbers_in_the_recipe_of_the_textures_are_those_of_the_record():
    record = json.loads((REPOSITORY / "docs" / "comparisons" / "textures.json").read_text())
    values = {row["name"].split(" encoder")[0]: as_text(row["values"]["20-NN"], percent=True) for row in record["rows"]}
    head = " ".join((REPOSITORY / "training/recipes/textures_mae.yaml").read_text().split("\n\n")[0].split("\n# "))
    assert f"trained {values['MAE']} %, untrained {values['untrained']} %, raw pixels {values['raw pixels']} %" in head
    assert f"commit {record['results'][0]['commit']}:" in head


def test_the_numbers_of_the_kept_weights_are_those_of_their_results():
    """In the log and the recipe."""
    results = CARDS / "cifar10_small_mae" / "results"
    linear, knn = Result.load(results / "linear.json"), Result.load(results / "knn_of_kept_weights.json")
    shares = {
        name: [f"{100 * x:.1f}" for x in (r.value, r.scores["untrained"], r.scores["raw pixels"])]
        for name, r in (("linear", linear), ("20-NN", knn))
    }
    log = (REPOSITORY / "docs" / "log.md").read_text()
    for name, values in shares.items():
        told = " | ".join(f"{value} %" for value in values)
        assert any(line.startswith(f"| {name}, ") and line.endswith(f"| {told} |") for line in log.splitlines())
    head = (REPOSITORY / "training/recipes/cifar10_small_mae.yaml").read_text().split("\n\n")[0]
    assert all(f"{value} %" in head for values in shares.values() for value in values[:1])


METHODS = {
    "MAE, 30 epochs": "cifar10_mae_30_epochs",
    "Latent MIM, 22 epochs": "cifar10_latent_mim_22_epochs",
    "MAE": "cifar10_mae",
    "Interactive MIM": "cifar10_interactive_mim",
    "SymMIM": "cifar10_sym_mim",
    "Latent MIM": "cifar10_latent_mim",
}


def rows_of(comparison):
    rows = json.loads((REPOSITORY / "docs" / "comparisons" / f"{comparison}.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def shares(row):
    return [as_text(row["values"][name], percent=True) for name in ("20-NN", "linear")]


def methods_on_cifar10():
    """The table of the README: one row from each record."""
    lines = ["| | 20-NN (%) | linear (%) | images seen | minutes | all values |", "|---|---|---|---|---|---|"]
    for name, file in METHODS.items():
        row = rows_of(file)[name.partition(",")[0]]
        minutes = sum(row["minutes"]) / len(row["minutes"])
        known = *shares(row), f"{row['images_seen'][0]:,}", f"{minutes:.0f}", f"[{file}](docs/comparisons/{file}.json)"
        lines.append(f"| {name} | {' | '.join(known)} |")
    for name in ("untrained encoder of MAE", "raw pixels"):
        lines.append(f"| {name} | {' | '.join(shares(rows_of(METHODS['MAE'])[name]))} | | | |")
    return "\n".join(lines)


def test_the_table_of_methods_in_the_readme_is_that_of_the_records():
    assert methods_on_cifar10() in (REPOSITORY / "README.md").read_text()


NO_RECIPE = ("MAE", "Latent MIM, 22 epochs")  # whose head has these numbers in these words


@pytest.mark.parametrize("title", [title for title in METHODS if title not in NO_RECIPE])
def test_the_numbers_of_a_recipe_of_cifar10_are_those_of_the_record(title):
    file = {"MAE, 30 epochs": "cifar10_30_epochs_mae"}.get(title, METHODS[title])
    rows, recipe = rows_of(METHODS[title]), REPOSITORY / f"training/recipes/{file}.yaml"
    name = title.partition(",")[0]
    (knn, linear), (bare_knn, bare_linear) = shares(rows[name]), shares(rows[f"untrained encoder of {name}"])
    told = f"probe {linear} %, untrained {bare_linear} %; 20-NN {knn} %, untrained {bare_knn} %"
    assert told in " ".join(recipe.read_text().split("\n# "))


def test_the_numbers_of_two_modalities_are_those_of_their_record():
    record = json.loads((REPOSITORY / "docs" / "comparisons" / "cifar10_luma_chroma.json").read_text())
    page = (REPOSITORY / "docs" / "modalities.md").read_text()
    with_dropout, without = record["cross_modal"].values()
    for title, predicted in (("brightness from colour", "luma"), ("colour from brightness", "chroma")):
        rows = [row for rows in (with_dropout, without) for row in rows if row["predicted"] == predicted]
        assert [row["places_seen"] for row in rows] == [64, 16, 64, 16]
        values = " | ".join(f"{row['ratio']:.3f}".removeprefix("0") for row in rows)
        assert f"| {title} | {values} |" in page
    for title, seen in (("both", "luma,chroma"), ("brightness", "luma"), ("colour", "chroma")):
        row = record["20-NN, modality_dropout 0.5"][seen]
        values = " | ".join(f"{100 * row[name]:.1f} %" for name in ("trained", "untrained", "raw pixels"))
        assert f"| {title} | {values} |" in page


@pytest.mark.parametrize(("context", "file"), [(".4 to .6", "_small_context"), (".85 to 1 (default)", "")])
def test_what_several_masks_gain_is_in_the_log_as_in_its_record(context, file):
    record = json.loads((REPOSITORY / f"docs/benchmarks/step_stop_jepa_masks{file}_cpu.json").read_text())
    one, four = record["methods"]["stop_jepa"], record["methods"]["stop_jepa, 4 masks"]
    rates = [x["masks_per_second"] for x in (one, four)]
    flops = 4 * one["gflop_per_image"] / four["gflop_per_image"]
    (row,) = re.findall(rf"^\| {re.escape(context)} \|(.*)", (REPOSITORY / "docs/log.md").read_text(), re.MULTILINE)
    told = re.findall(r"\d\.\d+", row)
    assert told[:3] + told[4:] == [f"{x:.2f}" for x in (*rates, rates[1] / rates[0], flops)]


def test_what_bfloat16_gains_on_a_cpu_is_in_the_log_as_in_its_records():
    folder, log = REPOSITORY / "docs" / "benchmarks", (REPOSITORY / "docs" / "log.md").read_text()
    kinds = ("float32", "bfloat16_before", "bfloat16")
    records = [json.loads((folder / f"step_width_192_{kind}_cpu.json").read_text())["methods"] for kind in kinds]
    for title, method in (
        ("MAE", "mae"),
        ("Latent MIM", "latent_mim"),
        ("StoP-JEPA", "stop_jepa"),
        ("SymMIM", "sym_mim"),
    ):
        rates = [record[method]["images_per_second"] for record in records]
        assert f"| {title} | {' | '.join(f'{x:.0f}' for x in rates)} | {rates[2] / rates[0]:.2f} |" in log


def test_the_search_of_i_jepa_in_the_log_is_that_of_its_record():
    record = json.loads((REPOSITORY / "docs" / "comparisons" / "cifar10_jepa_search.json").read_text())
    log, rows = (REPOSITORY / "docs" / "log.md").read_text().replace("**", ""), rows_of("cifar10_jepa_search")
    assert rows.keys() == record["probes"].keys()
    for name, probes in record["probes"].items():
        told = " | ".join([*shares(rows[name]), f"{probes[-1]['probe_rank_me']:.1f}"])
        settings = record["comparison"]["runs"][name]
        batch, rate = settings["per_device_train_batch_size"], f"{settings['learning_rate'] * 1e4:g}e-4"
        learned = ", learned positions" * ("position_embedding" in settings)
        steps = record["comparison"]["images"] // batch
        assert f"| {batch}, {steps:,}, {rate}{learned} | {told} |" in log


def test_what_fine_tuning_with_few_labels_gains_is_in_the_readme_and_the_log():
    record = REPOSITORY / "docs" / "comparisons" / "cifar10_finetune_1_percent.json"
    results = json.loads(record.read_text())["results"]
    arms = [[r["value"] for r in results if r["settings"]["untrained"] is bare] for bare in (False, True)]
    assert [len(arm) for arm in arms] == [3, 3]
    pretrained, scratch = (as_text(arm, percent=True) for arm in arms)
    told = f"fine-tuning reaches {pretrained} %, and the same training from random weights {scratch} %"
    assert told in (REPOSITORY / "README.md").read_text()
    log = (REPOSITORY / "docs" / "log.md").read_text()
    for name, arm, mean in zip(("pretrained", "from scratch"), arms, (pretrained, scratch), strict=True):
        assert f"| {name} | {' | '.join(f'{100 * value:.1f} %' for value in arm)} | {mean} % |" in log
