"""`hf-mim benchmark step` runs, and counts what it says."""

import json

import pytest
import torch
from tiny import METHODS, fields

import hf_mim
from hf_mim.benchmark import step
from hf_mim.cli import main
from hf_mim.models.configuration_vit import SIZES


@pytest.mark.slow
def test_step_measures_every_method_beside_transformers_and_counts_its_flops(monkeypatch, tmp_path):
    path = tmp_path / "step.json"
    monkeypatch.setitem(SIZES, "tiny", (192, 3, 3, 768))  # a quarter of its layers: counting takes long
    options = ["--size", "tiny", "--image_size", "64", "--patch_size", "8", "--batch_size", "2", "--steps", "1"]
    options += ["--warmup", "0", "--masks_per_image", "1,2", "--mask_draws", "2"]
    assert main(["benchmark", "step", *options, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    methods, settings = result["methods"], result["settings"]
    assert (settings["mask_draws"], settings["steps"], settings["batch_size"]) == (2, 1, 2)
    assert result["versions"]["torch"] and "git" in result
    assert len(result["matrix_seconds"]) == 5 and all(len(method["seconds"]) == 1 for method in methods.values())
    several = {f"{name}, 2 masks" for name in METHODS if "masks_per_image" in fields(name)}
    assert methods.keys() == {*METHODS, "transformers_mae"} | several
    for name in several:  # the target encoder, which needs no backward pass, runs once
        one, two = methods[name.removesuffix(", 2 masks")], methods[name]
        assert two["masks_per_second"] == 2 * two["images_per_second"]
        assert one["gflop_per_image"] < two["gflop_per_image"] < 2 * one["gflop_per_image"]
    assert all(m["images_per_second"] > 0 and 0 < m["share_of_ceiling"] < 1 for m in methods.values())
    # Ours computes less: the last decoder layer and the pixels of the masked patches only.
    assert 0.85 < methods["mae"]["gflop_per_image"] / methods["transformers_mae"]["gflop_per_image"] < 1


def test_a_method_is_measured_with_the_numbers_of_masks_that_it_takes():
    args = step.Benchmark([*METHODS], size="tiny", image_size=32, patch_size=4, masks_per_image=[1, 2, 4])
    found = step.contestants(args)
    assert [number for name, number in found if name == "stop_jepa"] == [1, 2, 4]
    assert [number for name, number in found if name == "sym_mim"] == [1, 2]
    assert [number for name, number in found if name == "mae"] == [1]
    args.masks_per_image = [4]
    assert ("mae", 1) in step.contestants(args) and ("stop_jepa", 4) in step.contestants(args)


def test_each_method_gets_the_fields_of_config_that_it_has():
    given = {"context_scale": [0.4, 0.6], "mask_ratio": 0.5}
    args = step.Benchmark(["mae", "stop_jepa"], size="tiny", image_size=32, patch_size=4, config=given)
    mae, stop_jepa = (step.make_config(method, args) for method in args.methods)
    assert mae.mask_ratio == 0.5 and stop_jepa.context_scale == [0.4, 0.6]


def test_config_does_not_make_another_method_of_a_variant():
    args = step.Benchmark(["ijepa", "stop_jepa"], image_size=32, patch_size=4, config={"position_noise_std": 0.5})
    assert [step.make_config(method, args).position_noise_std for method in args.methods] == [0.0, 0.5]


def test_counted_flops_are_those_of_the_formula():
    sizes = dict(size="tiny", image_size=64, patch_size=8)
    with torch.device("meta"):
        model = hf_mim.MAEForPreTraining(hf_mim.MAEConfig(**sizes))
    formula = model.step_flops(2, (8, 8), model.draw_masks(2, (8, 8), "meta"))
    assert step.count_flops("mae", step.Benchmark(**sizes, batch_size=2, mask_draws=1)) == formula / 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--methods", "mae", "--masks_per_image", "1,4"], "masks_per_image must be numbers that one of the methods"),
        (["--device", "gpu"], "device must be one of cpu, cuda, not 'gpu'"),
        (["--config", "{context_scal: 1}"], "config must have fields of mae, latent_mim, stop_jepa, "),
        (["--config", "{size: tiny}"], "config must have fields of mae, latent_mim, stop_jepa, sym_mim, "),
        (["--methods", "ijepa", "--config", "{position_noise_std: 1}"], "config must have fields of ijepa, not "),
        (["--config", "{mask_ratio: x}"], "mask_ratio must be a number, not 'x'"),
        (["--config", "{mask_ratio: 2}"], "mask_ratio must leave between 1 and 195 of the 196 patches visible"),
        (["--json", "."], "json must be a file, and . is a folder"),
        pytest.param(
            ["--device", "cuda"],
            "device must be cpu where there is no CUDA, not cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(capsys, monkeypatch, words, line):
    monkeypatch.setattr(step, "matrix_ceiling", lambda *_: pytest.fail("measured"))
    assert main(["benchmark", "step", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.parametrize("option", ["steps", "mask_draws"])
def test_nothing_to_average_is_one_line(capsys, option):
    assert main(["benchmark", "step", f"--{option}", "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} must be at least 1, not 0\n"
