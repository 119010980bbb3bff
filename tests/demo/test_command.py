"""`hf-mim demo`, up to the server; and the Space that `hf-mim export` writes."""

import importlib.util
import runpy
import socket

import pytest
import yaml
from demos import tiny_demo
from transformers import AutoModelForPreTraining

import hf_mim
import hf_mim.demo
from hf_mim.cli import main
from hf_mim.data.processor import image_processor
from hf_mim.demo.actions import Demo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a tiny model, whose recipe says what it was trained on."""
    folder = tmp_path_factory.mktemp("runs") / "tiny <run>"
    tiny_demo("latent_mim").viewer.pretraining.save_pretrained(folder)
    image_processor((16, 24), [0.5] * 3, [0.25] * 3).save_pretrained(folder)
    (folder / "recipe.yaml").write_text("dataset: textures\nbands: [3, 2, 1]\n")
    return folder


def fails(capsys, *words) -> str:
    assert main(["demo", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_without_the_extra_one_line_says_how_to_install_it(run, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "demo needs gradio: pip install hf-mim[demo]" in fails(capsys, run)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "many"], "port must be"),
        (["--port", "70000"], "host and port must be free to listen on, and 127.0.0.1:70000 is not"),
        (["--host", "192.0.2.1", "--port", "7860"], "host and port must be free to listen on, and 192.0.2.1:7860 is"),
        (["--max_image_pixels", "0"], "max_image_pixels must be at least 1"),
        (["--share", "true"], "demo has no option share"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(run, capsys, monkeypatch, words, told):
    monkeypatch.setattr("hf_mim.demo.app.check_gradio", lambda: None)
    monkeypatch.setattr(Demo, "load", lambda *_: pytest.fail("it was loaded"))
    assert told in fails(capsys, run, *words)


def test_a_port_that_is_taken_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr("hf_mim.demo.app.check_gradio", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"127.0.0.1:{port} is not: " in fails(capsys, run, "--port", port)


def test_a_run_offers_what_it_was_trained_on_and_its_bands(run):
    demo = Demo.load(run)
    assert len(demo.examples) == 8 and demo.viewer.bands == [3, 2, 1] and len(demo.thumbnails()) == 8
    assert demo.title == "tiny <run>: Latent MIM, 16 × 24 pixels, 4 × 6 patches"
    assert Demo.load(run, bands=[1]).viewer.bands == [1]


def test_a_space_has_the_weights_and_its_page_loads_them(run, tmp_path, monkeypatch, capsys):
    assert main(["export", str(run), str(tmp_path / "space"), "--to", "space"]) == 0
    assert capsys.readouterr().out.strip() == f'python "{tmp_path}/space/app.py"'
    folder = (tmp_path / "space").rename(tmp_path / "elsewhere")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "model", "requirements.txt"]
    assert f"hf-mim[demo]=={hf_mim.__version__}" in (folder / "requirements.txt").read_text().splitlines()
    head, text = (folder / "README.md").read_text().split("---\n")[1:]
    settings = yaml.safe_load(head)
    assert settings == settings | {"sdk": "gradio", "app_file": "app.py", "title": "tiny <run>"}
    assert "<run>" not in text and "Latent MIM" in text
    given = {}
    monkeypatch.setattr(
        hf_mim.demo, "launch", lambda checkpoint, **options: given.update(options, checkpoint=checkpoint)
    )
    runpy.run_path(str(folder / "app.py"))
    demo = Demo.load(**given)
    assert demo.viewer.bands == [3, 2, 1] and len(demo.examples) == 8 and demo.has_task
    ours = AutoModelForPreTraining.from_pretrained(run).state_dict()
    assert all(weight.equal(ours[name]) for name, weight in demo.viewer.pretraining.state_dict().items())
    (folder / "examples").mkdir()
    runpy.run_path(str(folder / "app.py"))
    assert given["examples"] == str(folder / "examples")


def test_a_space_has_no_images_of_ones_own(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in run.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    (mine / "recipe.yaml").write_text("dataset: patients\n")
    (mine / "_local.yaml").write_text(f"dataset: {tmp_path}/patients\n")
    assert main(["export", str(mine), str(tmp_path / "space"), "--to", "space"]) == 0
    assert not any("patients" in path.read_text() for path in (tmp_path / "space").glob("*.*"))
