"""Nothing private goes up: a run with a planted home, user, host and token, against the stand-in for the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
SECRETS = b"alicesecret", b"hostsecret", b"hf_SECRET0123456789", b"/home/", b"keysecret99"
RUN = (
    "--image_size 16 --patch_size 8 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --use_cpu true "
    "--per_device_train_batch_size 4 --max_steps 4 --save_steps 2 --dataloader_num_workers 0 --push_to_hub true "
    "--eval_strategy steps --eval_steps 2 --load_best_model_at_end true --metric_for_best_model loss "
    "--hub_model_id tester/private --hub_strategy all_checkpoints --hub_token hf_SECRET0123456789"
).split()
# Names the host, and imports the package from its folder.
SITE = "import platform, socket\nsocket.gethostname = platform.node = lambda: 'hostsecret'\n"
PUSH = "import sys, hf_mim, transformers as t; t.AutoModel.from_pretrained(sys.argv[1]).push_to_hub('model')"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("x") / "home" / "alicesecret"
    for number in range(20):
        path = home / "photos" / ("test" if number < 6 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(SITE)
    return home


@pytest.fixture(scope="module")
def start(hub, home):
    def start(*command):
        environment = os.environ | hub.environment(home / "cache") | {"HOME": str(home), "USER": "alicesecret"}
        environment |= {"LOGNAME": "alicesecret", "HOSTNAME": "hostsecret", "WANDB_API_KEY": "keysecret99"}
        environment |= {"PYTHONPATH": f"{home / 'site'}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, cwd=home, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done

    return start


@pytest.fixture(scope="module")
def run(start, home):
    """A run, an evaluation, a card: all by absolute paths, with a report for TensorBoard."""
    folder = home / "runs" / "mine"
    report = "--report_to", "tensorboard"
    start("-m", "hf_mim.cli", "pretrain", *RUN, *report, "--dataset", home / "photos", "--output_dir", folder)
    return folder


def leaks(files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [(name, secret) for name, data in files.items() for secret in SECRETS if secret in name.encode() + data]


@pytest.mark.slow
def test_no_secret_is_in_any_file_that_goes_up(hub, run):
    files = hub.files("tester/private")
    assert {"README.md", "recipe.yaml", "trainer_state.json", "results/knn.json"} <= files.keys()
    assert {
        f"checkpoint-{step}/{name}" for step in (2, 4) for name in ("training_args.bin", "trainer_state.json")
    } <= files.keys()
    assert not leaks(files)
    assert not any("tfevents" in name or name.startswith(("_", "runs/")) for name in files)
    assert list(run.rglob("*tfevents*"))  # they were written
    for _, commit in hub.repos["tester/private"]:  # also those in between
        assert not leaks(commit)
        assert "model.safetensors" not in commit or "preprocessor_config.json" in commit


@pytest.mark.slow
def test_whoever_uploads_the_folder_by_hand_uploads_no_secret_either(run):
    """All files but those that the advice of a failed upload leaves out."""
    kept = [path for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name]
    kept = [path for path in kept if not path.relative_to(run).parts[0].startswith("_")]
    assert not leaks({str(path.relative_to(run)): path.read_bytes() for path in kept})


@pytest.mark.slow
def test_the_recipe_runs_again_on_this_machine(start, run, home):
    assert yaml.safe_load((run / "recipe.yaml").read_text())["dataset"] == "photos"
    local = yaml.safe_load((run / "_local.yaml").read_text())
    assert local == {"dataset": str(home / "photos"), "output_dir": str(run)}
    again = "--push_to_hub", "false", "--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"
    start("-m", "hf_mim.cli", "pretrain", run / "recipe.yaml", *again, "--output_dir", home / "again")


@pytest.mark.slow
def test_a_model_that_is_pushed_alone_takes_no_local_file_with_it(hub, run, start):
    start("-c", PUSH, run)
    files = hub.files("tester/model")
    assert "recipe.yaml" in files and "_local.yaml" not in files and not leaks(files)
