"""The files of results: none takes the place of another, of weights, or of a run; nothing that was measured is lost."""

import errno
import json
import os
import pkgutil
import shutil

import psutil
import pytest
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from small_runs import evaluate, photos

from hf_mim import lock
from hf_mim.cli import main
from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.knn import KNN
from hf_mim.evaluation.measure import Evaluation
from hf_mim.evaluation.result import Result
from hf_mim.files import replacing
from hf_mim.models.modeling_mae import MAEForPreTraining


def results(run):
    return sorted(path.name for path in (run / "results").glob("*.json"))


@pytest.mark.slow
def test_data_settings_and_encoders_that_differ_have_files_of_their_own(run, tmp_path):
    """10 % and 10 images, two folders of one name, a float, other weights, other images under the old names; what is
    the same in other words replaces its file."""
    for number, folder in enumerate(("a/photos", "b/photos")):
        photos(tmp_path / folder, seed=number)
    for budget in ("10%", "10"):
        assert evaluate("lowshot", run, "--dataset", "a/photos", "--draws", 1, "--budgets", budget) == 0
    assert len(results(run)) == 2 and all(name.startswith("lowshot_photos_") for name in results(run))
    shutil.rmtree(run / "results")
    calls = [("--dataset", folder, "--k", 3) for folder in ("a/photos", "b/photos")]
    calls += [(*calls[0], "--crop_fraction", share) for share in (0.75, 0.7500001)]
    calls += [(*calls[0], *more) for more in (["--untrained"], ["--train_split", "train", "--test", "b/photos"])]
    for number, words in enumerate(calls, start=1):
        assert evaluate("knn", run, *words) == 0
        assert len(results(run)) == number
    assert evaluate("knn", run, *calls[0], "--extract_batch_size", 3) == 0  # changes no number
    assert evaluate("knn", run, "--dataset", tmp_path / "a/photos", "--k", 3) == 0
    assert len(results(run)) == 6
    model = MAEForPreTraining.from_pretrained(run)
    model.encoder.layers[0].mlp.fc1.bias.data[0] += 1
    model.save_pretrained(run)
    assert evaluate("knn", run, *calls[0]) == 0 and len(results(run)) == 7
    photos(tmp_path / "a/photos", seed=9)  # other images under the same names
    assert evaluate("knn", run, *calls[0]) == 0 and len(results(run)) == 8
    contents = {Result.load(run / "results" / name).data["train"]["contents"] for name in results(run)}
    assert len(contents) == 4  # the card shows them, because all three are called photos


def test_a_card_shows_what_two_datasets_of_one_name_hold(run, tmp_path):
    for number, folder in enumerate(("a/photos", "b/photos")):
        photos(tmp_path / folder, seed=number)
        assert evaluate("knn", run, "--dataset", folder, "--k", 3) == 0
    assert main(["card", str(run)]) == 0
    text = (run / "README.md").read_text()
    for name in results(run):
        assert f"contents: {Result.load(run / 'results' / name).data['test']['contents']}" in text
    assert "copies" not in text
    held = {Result.load(run / "results" / name).data["test"]["contents"] for name in results(run)}
    assert evaluate("leave_one_out", run, "--dataset", "a/photos") == 0
    (name,) = (name for name in results(run) if name.startswith("leave_one_out"))
    assert Result.load(run / "results" / name).data["test"]["contents"] in held  # those of its test images


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "results", "notes.json"])
def test_output_may_replace_nothing_but_a_result(run, tmp_path, name, capsys):
    photos(tmp_path / "photos")
    (run / "results").mkdir()
    (run / "notes.json").write_text('{"protocol": "none"}')
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert evaluate("knn", run, "--dataset", "photos", "--k", 3, "--output", run / name) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: output must be ")
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for _ in range(2):  # new, and then a result
        assert evaluate("knn", run, "--dataset", "photos", "--k", 3, "--output", tmp_path / "knn.json") == 0


def test_copies_of_training_images_among_the_test_images_are_counted_and_told(run, tmp_path, capsys):
    photos(tmp_path / "photos"), photos(tmp_path / "others", seed=1)
    for number in range(3):
        shutil.copy(tmp_path / "photos" / "a" / "00.png", tmp_path / "others" / "a" / f"copy{number}.png")
    assert evaluate("knn", run, "--dataset", "photos", "--test", "others", "--k", 3) == 0
    note = "3 of the 27 test images are training images too, byte for byte."
    assert note in capsys.readouterr().out
    (name,) = results(run)
    result = Result.load(run / "results" / name)
    assert result.data["test"]["copies_of_training_images"] == 3 and note in result.notes
    assert main(["card", str(run)]) == 0 and "copies of training images: 3" in (run / "README.md").read_text()


def test_a_run_that_another_process_is_writing_can_be_evaluated_but_gets_no_card(run, tmp_path, living_owner, capsys):
    photos(tmp_path / "photos")
    living_owner(run)
    assert evaluate("knn", run, "--dataset", "photos", "--k", 3) == 0 and len(results(run)) == 1
    assert main(["export", str(run), "exported", "--to", "timm"]) == 0
    before = sorted(run.iterdir())
    assert main(["card", str(run)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: checkpoint {run} is in use by process {os.getppid()} on ")
    assert sorted(run.iterdir()) == before


@pytest.fixture
def living_owner():
    """living_owner(folder): the parent of this process holds its lock."""

    def own(folder):
        parent = psutil.Process(os.getppid())
        about = lock._about_this_process() | {"process": parent.pid, "started": parent.create_time()}
        (folder / lock.LOCK).write_text(json.dumps(about))

    return own


def test_the_result_of_a_checkpoint_that_its_run_deletes_meanwhile_is_kept_in_the_run(run, tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    checkpoint = shutil.move(run, tmp_path / "mine" / "checkpoint-3")
    at_once = Evaluation.__call__

    def slowly(evaluation):
        result = at_once(evaluation)
        shutil.rmtree(checkpoint)
        return result

    monkeypatch.setattr(Evaluation, "__call__", slowly)
    assert evaluate("knn", checkpoint, "--dataset", "photos", "--k", 3) == 0
    (path,) = (tmp_path / "mine").rglob("*.json")
    assert path.parent == tmp_path / "mine/results/checkpoint-3" and path.name.startswith("knn_photos_k_3_")
    assert Result.load(path).checkpoint_sha256 is not None


def other_weights(folder):
    """A training puts other weights in the place of these."""
    state = load_file(folder / "model.safetensors")
    with replacing(folder / "model.safetensors") as aside:
        save_file({name: tensor + 1 for name, tensor in state.items()}, aside, {"format": "pt"})


def test_weights_that_are_replaced_before_they_are_hashed_give_no_result(run, tmp_path):
    photos(tmp_path / "photos")
    evaluation = Evaluation("knn", str(run), {"dataset": "photos", "k": 3})
    other_weights(run)
    with pytest.raises(ValueError, match="got other weights, or was deleted, while it was read"):
        evaluation()


def test_weights_that_are_replaced_later_are_not_those_of_the_result(run, tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    sha256 = checkpoint_sha256(run)
    at_once = KNN.run
    monkeypatch.setattr(KNN, "run", lambda *arguments: other_weights(run) or at_once(*arguments))
    assert Evaluation("knn", str(run), {"dataset": "photos", "k": 3})().checkpoint_sha256 == sha256
    assert checkpoint_sha256(run) != sha256


@pytest.mark.parametrize("module", ["evaluation.encoder", "evaluation.finetune", "hub.export"])
def test_weights_that_are_replaced_while_they_are_loaded_are_refused(run, tmp_path, monkeypatch, capsys, module):
    photos(tmp_path / "photos")
    name = {"evaluation.encoder": "load_encoder", "evaluation.finetune": "load_classifier", "hub.export": "load_whole"}
    name = f"hf_mim.{module}.{name[module]}"
    at_once = pkgutil.resolve_name(name)
    monkeypatch.setattr(name, lambda *words, **more: (at_once(*words, **more), other_weights(run))[0])
    words = {
        "evaluation.encoder": ["evaluate", "knn", str(run), "--dataset", "photos"],
        "evaluation.finetune": ["evaluate", "finetune", str(run), "--dataset", "photos", "--batch_size", "4"],
        "hub.export": ["export", str(run), "exported", "--to", "timm"],
    }
    assert main(words[module]) == 2
    assert "got other weights" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "results").exists() and not (tmp_path / "exported").exists()


def test_a_result_that_cannot_be_saved_is_printed(run, tmp_path, monkeypatch, capsys):
    photos(tmp_path / "photos")

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Result, "save", full)
    assert evaluate("knn", run, "--dataset", "photos", "--k", 3) == 2
    told = capsys.readouterr()
    assert "knn: accuracy" in told.out and told.err.splitlines()[-1] == "error: [Errno 28] No space left on device"


def test_fine_tuning_puts_its_classifier_into_no_folder_that_holds_something(run, tmp_path, capsys):
    photos(tmp_path / "photos")
    other = shutil.copytree(run, tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    quick = "--dataset", "photos", "--epochs", 1, "--batch_size", 4
    for folder in (other, run, tmp_path / "photos"):
        assert evaluate("finetune", run, *quick, "--output_dir", folder) == 2
        assert "holds something already" in capsys.readouterr().err.splitlines()[-1]
    assert before == {path.name: path.read_bytes() for path in other.iterdir()} and not (run / "results").exists()
    assert evaluate("finetune", run, *quick, "--output_dir", tmp_path / "new") == 0
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
        x.name for x in (tmp_path / "new").iterdir()
    }


def test_without_a_home_features_are_not_kept_and_the_warning_says_what_to_do(run, tmp_path, monkeypatch, caplog):
    photos(tmp_path / "photos")
    for name in ("HOME", "HF_MIM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    assert evaluate("knn", run, "--dataset", "photos", "--k", 3) == 0
    assert "features are not kept: there is no home folder; --cache FOLDER or the variable HF_MIM_CACHE" in caplog.text


def no_home(path):
    """`Path.expanduser` of a user without a home."""
    if path.parts[:1] == ("~",):
        raise RuntimeError("Could not determine home directory.")
    return path


def test_a_result_names_no_folder_of_this_machine_and_no_token(tmp_path):
    about = {"path": str(tmp_path / "x"), "token": "hf_SECRET0123456789", "features": "last/mean/norm"}
    result = Result("knn", "accuracy", 0.5, about, {"source": f"{tmp_path}/photos"}, notes=[f"Read from {tmp_path}/x."])
    text = result.save(tmp_path / "r.json").read_text()
    assert str(tmp_path) not in text and "SECRET" not in text
    assert json.loads(text)["settings"] == {"path": "x", "token": "***", "features": "last/mean/norm"}


@pytest.mark.parametrize("below", ["datasets/x", ".."])
def test_a_library_that_cannot_write_into_its_cache_folder_is_told_with_the_variable(below):
    path = os.path.abspath(os.path.join(HF_HOME, below))
    with pytest.raises(Mistake, match="^source x cannot be read; the variable HF_HOME names another folder for such"):
        with told_in_one_line(""):
            raise ValueError("source x cannot be read") from OSError(errno.EROFS, "Read-only file system", path)
    for other in (OSError(errno.EROFS, "Read-only file system", "/elsewhere/x"), ValueError("no file")):
        with pytest.raises(Mistake) as error, told_in_one_line(""):
            raise other
        assert "HF_HOME" not in str(error.value)
