"""The benchmark of loading runs, measures what it says, and shows the crops to be right."""

import json
from pathlib import Path

import pytest

from hf_mim.cli import main


def run(*arguments) -> dict:
    assert main(["benchmark", "data", *map(str, arguments)]) == 0
    return json.loads(Path(arguments[-1]).read_text())


def test_data_counts_full_and_drafted_crops_of_a_folder(tmp_path, picture, capsys):
    for number in range(4):
        picture(200, 160, seed=number).save(tmp_path / f"{number}.jpg", quality=95)
        picture(200, 160, seed=number).save(tmp_path / f"{number}.png")
    options = ("--size", 16, "--repeats", 2, "--deep", "--json", tmp_path / "data.json")
    result = run(tmp_path, *options)
    full, drafted = result["difference_decoded_in_full"], result["difference_draft"]
    assert (full["crops"], drafted["crops"], result["images"]) == (4, 4, 8)
    assert full["worst"] < 1 and drafted["worst"] < 4
    assert result["images_per_second"].keys() == {"plain", "ours", "ours + augment"}
    assert result["machine"]["cores"] >= 1 and result["versions"]["pillow"]
    assert result["settings"]["source"] == tmp_path.name and result["settings"]["repeats"] == 2
    assert {len(values) for values in (result["seconds"] | result["deep_seconds"]).values()} == {2}
    assert len(result["deep_images_per_second"]) == 4 and min(result["deep_images_per_second"].values()) > 0
    assert "speedup" in capsys.readouterr().out


@pytest.mark.slow
def test_loading_is_faster_than_a_plain_pipeline(shared_data, tmp_path):
    options = (shared_data / "jpeg_fullsize", "--json", tmp_path / "data.json")
    result = run(*options)
    assert result["speedup"] > 1.3
    assert result["difference_decoded_in_full"]["worst"] < 1 and result["difference_draft"]["worst"] < 4
