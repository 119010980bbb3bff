"""`uv run training/job.py`: uv reads what the file needs and installs it, and the model goes up to a Hub and loads."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from building import build, path_to_this_environment

REPOSITORY = Path(__file__).parents[2]
BIN = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
UV = shutil.which("uv", path=BIN)
LOAD = """
import hf_mim
from transformers import AutoModel
model = AutoModel.from_pretrained("tester/digits_mae")
print(type(model).__name__, model.config.hidden_size, hf_mim.__file__)
"""


def without_requirements(wheel: Path, folder: Path) -> Path:
    """A copy of a wheel that needs nothing: it brings a .pth file, through which it finds what this environment has."""
    copy = folder / wheel.name
    with zipfile.ZipFile(wheel) as file, zipfile.ZipFile(copy, "w") as changed:
        for name in file.namelist():
            text = file.read(name)
            if name.endswith("/METADATA"):
                text = b"\n".join(line for line in text.split(b"\n") if not line.startswith(b"Requires-Dist: "))
            if name.endswith("/RECORD"):
                text = b"\n".join(line.split(b",")[0] + b",," for line in [*text.splitlines(), b"needed.pth"]) + b"\n"
            changed.writestr(name, text)
        changed.writestr("needed.pth", path_to_this_environment())
    return copy


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="needs uv: pip install uv")
def test_a_job_pretrains_measures_and_pushes_a_model_that_loads(hub, once, tmp_path):
    (wheel,) = once("dist", build).glob("*.whl")
    found = tmp_path / "found"
    found.mkdir()
    without_requirements(wheel, found)
    environment = os.environ | hub.environment(tmp_path / "home") | {"UV_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)

    def uv_run(*command):
        uv = [UV, "run", "--python", sys.executable, "--no-index", "--find-links", found, *command]
        done = subprocess.run(uv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sizes = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --max_steps 2 --use_cpu true --knn false"
    job = [REPOSITORY / "training" / "job.py", "--dataset", "digits", "--repo", "tester/digits_mae", *sizes.split()]
    assert f"The model is at {hub.address}/tester/digits_mae" in uv_run(*job)
    card = hub.files("tester/digits_mae")["README.md"].decode()
    assert 'from_pretrained("tester/digits_mae")' in card and "linear classifier: accuracy" in card
    environment["HF_HOME"] = str(tmp_path / "other_home")  # nothing of the job is in this cache
    loaded = uv_run("--no-project", "--with", "hf-mim", "python", "-c", LOAD)
    assert loaded.startswith("MAEModel 16 ") and str(REPOSITORY) not in loaded
