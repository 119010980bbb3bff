"""A checkpoint with the code that runs it: `trust_remote_code=True` loads it where hf_mim is not installed."""

import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from hf_mim import methods
from hf_mim.models.vit import MIMPreTrainedModel

ROLES = {
    "AutoConfig": "config",
    "AutoModel": "encoder",
    "AutoModelForPreTraining": "pretraining",
    "AutoModelForImageClassification": "classifier",
    "AutoBackbone": "backbone",
}


def write_remote_code(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write weights, config and model files; returns how to load them from `{dest}`.

    A flat folder of modules that import each other by `from .name import` is all that remote code can be, which is
    what `hf_mim/models` is.
    """
    modeling, method = Path(sys.modules[type(model).__module__].__file__), methods.of_config(model.config)
    classes = {auto: getattr(method, f"{role}_class") for auto, role in ROLES.items()}
    model.config.auto_map = {
        auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items() if cls is not None
    }
    model.save_pretrained(folder)
    for file in {str(modeling), *get_relative_import_files(modeling)}:
        shutil.copyfile(file, folder / Path(file).name)
    auto = next(auto for auto, cls in classes.items() if type(model) is cls)
    if auto == "AutoBackbone":  # which asks the Hub first, and fails for a folder
        auto = "AutoModel"
    return f'transformers.{auto}.from_pretrained("{{dest}}", trust_remote_code=True)'
