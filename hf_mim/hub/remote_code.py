"""A checkpoint together with its code: `trust_remote_code=True` loads it where hf_mim is not installed."""

import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from hf_mim import auto_classes, methods
from hf_mim.models.vit import MIMPreTrainedModel


def write_remote_code(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write weights, config and model files; returns how to load them from `{dest}`.

    Remote code must be a flat folder of modules that import each other by `from .name import`. `hf_mim/models` is one.
    """
    method = methods.of_config(model.config)
    roles = [role for roles in auto_classes.FILES.values() for role in roles.items()]
    classes = {auto: getattr(method, role) for auto, role in roles}
    model.config.auto_map = {
        auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items() if cls is not None
    }
    model.save_pretrained(folder)
    for cls in (type(model), method.image_processor_class):
        code = Path(sys.modules[cls.__module__].__file__)
        for file in {str(code), *get_relative_import_files(code)}:
            shutil.copyfile(file, folder / Path(file).name)
    auto = next(auto for auto, cls in classes.items() if type(model) is cls)
    if auto == "AutoBackbone":  # it asks the Hub first, and fails for a folder
        auto = "AutoModel"
    return f'transformers.{auto}.from_pretrained("{{dest}}", trust_remote_code=True)'
