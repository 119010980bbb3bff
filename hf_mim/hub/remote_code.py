"""A checkpoint with the code that runs it: `trust_remote_code=True` loads it where hf_mim is not installed."""

import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from hf_mim.models.vit import MIMPreTrainedModel

CLASSES = {
    "AutoModel": "Model",
    "AutoModelForPreTraining": "ForPreTraining",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoBackbone": "Backbone",
}


def write_remote_code(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write weights, config and model files; returns how to load them from `{dest}`.

    A flat folder of modules that import each other by `from .name import` is all that remote code can be, which is
    what `hf_mim/models` is.
    """
    modeling, config_class = Path(sys.modules[type(model).__module__].__file__), type(model.config)
    method = config_class.__name__.removesuffix("Config")
    model.config.auto_map = {
        "AutoConfig": f"{config_class.__module__.rpartition('.')[2]}.{config_class.__name__}",
        **{auto: f"{modeling.stem}.{method}{suffix}" for auto, suffix in CLASSES.items()},
    }
    model.save_pretrained(folder)
    for file in {str(modeling), *get_relative_import_files(modeling)}:
        shutil.copyfile(file, folder / Path(file).name)
    auto = next(auto for auto, suffix in CLASSES.items() if type(model).__name__ == f"{method}{suffix}")
    if auto == "AutoBackbone":  # which asks the Hub first, and fails for a folder
        auto = "AutoModel"
    return f'transformers.{auto}.from_pretrained("{{dest}}", trust_remote_code=True)'
