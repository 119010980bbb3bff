"""The sdist and the wheel hold all that they should, and work outside the repository."""

import os
import shlex
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
from building import build, path_to_this_environment, repository_files

pytestmark = pytest.mark.slow
TINY = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --max_steps 2 --knn false --use_cpu"
# Commands of the README, and what each prints.
COMMANDS = {
    "hf-mim --version": "hf-mim 0.1.0 (torch",
    "hf-mim recipes": "cifar10_mae",
    f"hf-mim pretrain digits_mae --output_dir run {TINY}": "The checkpoint is in run",
    f"python -m torch.distributed.run --standalone --nproc_per_node 2 -m hf_mim.cli pretrain {TINY}": "2 processes",
    "hf-mim plan imagenet_mae --devices 64 --images_per_step 4096": "the run        249,600 steps",
    "hf-mim benchmark data textures --size 16 --num_images 8 --repeats 1": "8 images, crops of 16 x 16",
}


@pytest.fixture(scope="module")
def dist(once):
    return once("dist", build)


@pytest.fixture(scope="module")
def unpacked(dist):
    (folder,) = (dist / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def programs(dist, tmp_path_factory):
    """The bin folder of an environment into which the wheel was installed. What it needs is that of this one."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder, symlinks=True)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    done = run([*pip, "install", "--no-index", "--no-deps", wheel], folder)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(path_to_this_environment())
    return folder / "bin"


def run(command, folder, **environment):
    """Run a command in a folder. It does not see the PYTHONPATH of this process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_sdist_holds_the_files_of_the_repository_and_is_small(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or name.startswith("hf_mim.egg-info/")}
    weights = {name for name in repository_files() if name.endswith("/model.safetensors")}
    assert names - made == repository_files() - weights | {"model_cards/cifar10_small_mae/model.safetensors"}
    assert sdist.stat().st_size < 10_000_000


def test_the_wheel_holds_each_file_of_the_package_and_no_other(dist):
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name for name in repository_files() if name.startswith("hf_mim/")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works_outside_the_repository(programs, tmp_path, command):
    program, *words = shlex.split(command)
    done = run([programs / program, *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert COMMANDS[command] in done.stdout


def test_tests_run_in_the_unpacked_sdist(unpacked):
    files = "tests/test_docs.py tests/test_flagship.py tests/test_rooms.py tests/test_slurm.py tests/cli/test_recipe.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files.split()]
    done = run(command, unpacked, PYTHONPATH=str(unpacked))
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "failed" not in done.stdout
