"""Pushing to a Hub and pulling from it by name, over HTTP against `minihub`; each side is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load, load_file

pytestmark = pytest.mark.pictures
REPOSITORY = Path(__file__).parents[2]


RUN = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --per_device_train_batch_size 32 --use_cpu "
    "--max_steps 4 --save_steps 2 --knn_train_images 200 --knn_test_images 100 --push_to_hub"
).split()


WHOLE = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "loss.png"}


WHOLE |= {"results/training.json", "results/health.json", "results/knn.json", "trainer_state.json"}


@pytest.fixture(autouse=True)
def the_hub_works(hub):
    yield
    hub.failing = None


def start(hub, folder, *command):
    """A process that knows no other Hub."""
    environment = os.environ | hub.environment(folder / "home") | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def pretrain(hub, folder, *options):
    return start(hub, folder, "-m", "hf_mim.cli", "pretrain", *RUN, "--output_dir", folder / "run", *options)


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """A run of two checkpoints that are all to go up, and what the process said."""
    folder = tmp_path_factory.mktemp("pushed")
    options = ["--hub_model_id", "tester/digits", "--hub_strategy", "all_checkpoints", "--hub_token", "hf_secret"]
    options += ["--save_total_limit", "1"]
    done = pretrain(hub, folder, *options)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


PULL = """
import sys
import torch
from transformers import AutoImageProcessor, AutoModel
import hf_mim
name, out = sys.argv[1:]
model, loading = AutoModel.from_pretrained(name, output_loading_info=True)
assert not loading["missing_keys"], loading
image = torch.arange(32 * 32).reshape(32, 32, 1).remainder(256).to(torch.uint8).numpy()
inputs = AutoImageProcessor.from_pretrained(name)(image, return_tensors="pt")
torch.save(model.eval()(**inputs).pooler_output, out)
"""


def features(hub, folder, name):
    """The features of one image, from the encoder and the image processor that a fresh process pulls by name."""
    folder.mkdir(parents=True, exist_ok=True)
    done = start(hub, folder, "-c", PULL, name, folder / "features.pt")
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "features.pt")


@pytest.mark.slow
def test_a_run_goes_up_whole_and_comes_down_by_its_name(hub, pushed, tmp_path):
    run, done = pushed
    files = hub.files("tester/digits")
    assert {name for name in files if not name.startswith("checkpoint")} >= WHOLE
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert "failed" not in done.stderr and not hub.unhandled
    pulled = features(hub, tmp_path / "a", "tester/digits")
    assert torch.equal(pulled, features(hub, tmp_path / "b", run))


@pytest.mark.slow
def test_the_card_on_the_hub_is_ours_and_names_the_repository(hub, pushed):
    run, _ = pushed
    text = hub.files("tester/digits")["README.md"].decode()
    assert text == (run / "README.md").read_text()
    assert 'from_pretrained("tester/digits")' in text and "fine-tuned" not in text.split("## How to use")[0]
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_name, result.metric_name) == ("textures", "accuracy (knn)")
    assert model_index_to_eval_results([{"name": "digits", "results": []}])[0] == "digits"


@pytest.mark.slow
def test_every_checkpoint_goes_up_though_the_run_folder_keeps_only_the_last(hub, pushed):
    run, _ = pushed
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    files = hub.files("tester/digits")
    assert {"checkpoint-2/optimizer.pt", "checkpoint-4/optimizer.pt"} <= files.keys()
    assert hub.messages[0] == "MAE, step 2 of 4: weights, card and logs, during the training"
    assert hub.messages[1] == "MAE, step 2 of 4: the checkpoint to resume from, as checkpoint-2"
    assert hub.messages[-1] == "MAE, step 4 of 4: weights, card, results and pictures"
    early = hub.repos["tester/digits"][1][1]
    halfway = load(files["checkpoint-2/model.safetensors"])
    assert all(torch.equal(tensor, halfway[name]) for name, tensor in load(early["model.safetensors"]).items())
    assert "| Optimizer steps | 2 |" in early["README.md"].decode()  # a card of its moment
    assert not load(early["model.safetensors"]).keys() - load_file(run / "model.safetensors").keys()


@pytest.mark.slow
def test_the_token_does_not_go_up(hub, pushed):
    files = hub.files("tester/digits")
    assert not any(b"hf_secret" in content for content in files.values())
    assert "training_args.bin" not in files and "checkpoint-4/training_args.bin" in files


PUSH_MODEL = """
import sys
from transformers import AutoModel, AutoModelForPreTraining
import hf_mim
run, whole = sys.argv[1:]
AutoModel.from_pretrained(run).push_to_hub("encoder")
AutoModelForPreTraining.from_pretrained(run).save_pretrained(whole, push_to_hub=True, repo_id="tester/whole")
"""


@pytest.mark.slow
def test_a_model_goes_up_with_the_card_and_image_processor_of_its_folder(hub, pushed, tmp_path):
    run, _ = pushed
    done = start(hub, tmp_path, "-c", PUSH_MODEL, run, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    expected = features(hub, tmp_path / "a", run)
    for name in ("tester/encoder", "tester/whole"):
        files = hub.files(name)
        assert files.keys() >= WHOLE
        assert files["README.md"] == (run / "README.md").read_bytes()
        assert torch.equal(features(hub, tmp_path / name, name), expected)
    assert not any(key.startswith("decoder") for key in load(hub.files("tester/encoder")["model.safetensors"]))


@pytest.mark.slow
def test_a_hub_that_fails_costs_a_warning_and_the_upload_can_be_repeated(hub, tmp_path):
    hub.failing = 500
    done = pretrain(hub, tmp_path, "--hub_model_id", "tester/later")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    *_, warning = (line for line in done.stderr.splitlines() if "hf upload" in line)
    assert "500" in warning and "tester/later" not in hub.repos
    run = tmp_path / "run"
    assert all((run / name).is_file() for name in WHOLE)
    hub.failing = None
    words = warning.partition("hf upload ")[2].replace("'", "").split()
    again = start(hub, tmp_path, "-c", "from huggingface_hub.cli.hf import main; main()", "upload", *words)
    assert again.returncode == 0, again.stderr
    assert hub.files("tester/later").keys() >= WHOLE
    assert features(hub, tmp_path / "a", "tester/later").shape == (1, 16)


@pytest.mark.slow
def test_uploads_that_fail_during_training_are_told_and_the_last_one_makes_up_for_them(hub, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, urllib.request\n"
        "from hf_mim.pretraining.run import Pretraining\n"
        "from hf_mim.cli.pretrain import command\n"
        "from hf_mim.pretraining.recipe import Recipe\n"
        "run = Pretraining(Recipe.read(None, command.read(sys.argv[1:])[1]))\n"
        "from transformers import TrainerCallback\n"
        "class Repair(TrainerCallback):\n"
        "    def on_train_end(self, args, state, control, **kwargs):\n"
        "        run.trainer._finish_current_push()\n"
        "        input()\n"
        "run.trainer.add_callback(Repair())\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "run()\n"
    )
    command = [sys.executable, script, *RUN, "--output_dir", tmp_path / "run", "--hub_model_id", "tester/patchy"]
    process = subprocess.Popen(
        [*map(str, command), "--hub_strategy", "every_save"],
        env=os.environ | hub.environment(tmp_path / "home") | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    hub.failing = 403  # which the client does not try again
    process.stdin.write("\n")
    process.stdin.flush()
    told = ""
    while "hf upload tester/patchy" not in told:
        told = process.stderr.readline()
        assert told, "the process ended without a warning"
    hub.failing = None
    process.communicate("\n")
    assert process.returncode == 0
    assert (
        hub.messages[-1].endswith("step 4 of 4: weights, card, results and pictures")
        and hub.files("tester/patchy").keys() >= WHOLE
    )


@pytest.mark.slow
def test_a_name_that_the_hub_refuses_is_told_before_anything_is_trained(hub, tmp_path):
    hub.failing = 401
    done = pretrain(hub, tmp_path, "--hub_model_id", "tester/mine")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: hub_model_id tester/mine cannot be used: ") and "401" in line


PULL_REMOTE_CODE = """
import runpy, sys
sys.modules["hf_mim"] = None  # not installed
import torch
from transformers import AutoModel
name, out = sys.argv[1:]
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
torch.save(model(torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)).pooler_output, out)
"""


PUSH_FOLDER = "import sys; from huggingface_hub import *; create_repo(sys.argv[1]); upload_folder(repo_id=sys.argv[1], "
PUSH_FOLDER += "folder_path=sys.argv[2])"


@pytest.mark.slow
def test_a_pushed_run_loads_where_hf_mim_is_not_by_the_lines_that_the_hub_shows(hub, pushed, tmp_path):
    """For `library_name: transformers` and an `auto_map`, these are `from_pretrained(name, trust_remote_code=True)`."""
    from transformers import AutoModel

    run, done = pushed
    assert f"The model is up at {hub.address}/tester/digits" in done.stdout
    card = ModelCard(hub.files("tester/digits")["README.md"].decode()).data.to_dict()
    assert card["library_name"] == "transformers"
    pull = start(hub, tmp_path, "-c", PULL_REMOTE_CODE, "tester/digits", tmp_path / "features.pt")
    assert pull.returncode == 0, pull.stderr
    pulled = torch.load(tmp_path / "features.pt")
    ours = AutoModel.from_pretrained(run).eval()(torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)).pooler_output
    torch.testing.assert_close(pulled, ours, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_code_goes_up_with_an_exported_checkpoint_and_runs_where_hf_mim_is_not(hub, pushed, tmp_path):
    from transformers import AutoModel

    from hf_mim.hub.card import write_card
    from hf_mim.hub.export import export

    run, _ = pushed
    export(run, tmp_path / "exported", to="remote-code")
    write_card(tmp_path / "exported", "tester/exported")
    assert start(hub, tmp_path, "-c", PUSH_FOLDER, "tester/exported", tmp_path / "exported").returncode == 0
    done = start(hub, tmp_path, "-c", PULL_REMOTE_CODE, "tester/exported", tmp_path / "features.pt")
    assert done.returncode == 0, done.stderr
    pulled = torch.load(tmp_path / "features.pt")
    ours = AutoModel.from_pretrained(run).eval()(torch.linspace(-1, 1, 1024).reshape(1, 1, 32, 32)).pooler_output
    torch.testing.assert_close(pulled, ours, atol=1e-6, rtol=0)
    card = hub.files("tester/exported")["README.md"].decode()
    assert 'from_pretrained("tester/exported", trust_remote_code=True)' in card and "hf-mim export" not in card
