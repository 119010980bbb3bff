"""A folder that is a Space on the Hub: the page of `hf-mim demo` for one checkpoint, with its weights."""

from pathlib import Path

import yaml

import hf_mim
from hf_mim import methods
from hf_mim.data import EMBEDDED
from hf_mim.hub.card_text import plain, shown
from hf_mim.models.vit import MIMPreTrainedModel
from hf_mim.run_folder import CARD, read_recipe

MODEL = "model"  # the folder of the checkpoint
GRADIO = "6.31.0"  # with which the page was tested; setup.cfg has it too
APP = '''\
"""The page of this Space: the demo of the checkpoint in {model}/."""

from pathlib import Path

from hf_mim.demo import launch

HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"  # images that the page offers: make this folder if you have some that may be public

launch(HERE / "{model}", examples=str(EXAMPLES) if EXAMPLES.is_dir() else {examples!r}, bands={bands!r})
'''
REQUIREMENTS = """\
# If pip finds no such release, say where it is: hf-mim[demo] @ git+https://… or the address of a wheel.
hf-mim[demo]=={version}
"""
TEXT = """\
# {name}

See what a checkpoint of {method} makes of an image: hide patches and look at its prediction there, click on a patch
and see which others are like it. The page is `hf-mim demo`, and the weights are in `{model}/`.

```bash
pip install -r requirements.txt
python app.py
```
"""


def write_space(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write the weights, app.py, requirements.txt, and the card with the Space's settings. Returns how to start it in
    `{dest}`."""
    model.save_pretrained(folder / MODEL)
    recipe = read_recipe(checkpoint) if Path(checkpoint).is_dir() else {}
    dataset = recipe.get("dataset")
    examples = dataset if dataset in EMBEDDED else None  # images of one's own stay here
    (folder / "app.py").write_text(APP.format(model=MODEL, examples=examples, bands=recipe.get("bands")))
    (folder / "requirements.txt").write_text(REQUIREMENTS.format(version=hf_mim.__version__))
    name, method = Path(str(checkpoint)).absolute().name, methods.of_config(model.config).title
    settings = {"title": plain(name), "sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py"}
    head = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    text = TEXT.format(name=shown(name), method=method, model=MODEL)
    (folder / CARD).write_text(f"---\n{head}---\n{text}", encoding="utf-8")
    return 'python "{dest}/app.py"'
