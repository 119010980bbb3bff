"""A checkpoint together with its code: `trust_remote_code=True` loads it where hf_mim is not installed."""

import json
import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from hf_mim import auto_classes, methods
from hf_mim.data.processor import FILES
from hf_mim.files import replacing
from hf_mim.methods import Method
from hf_mim.models.image_processing_mim import MIMImageProcessor
from hf_mim.models.vit import MIMPreTrainedModel
from hf_mim.run_folder import CONFIG, read_config

MODELS = "hf_mim.models."


def write_remote_code(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write weights, config and model files; returns how to load them from `{dest}`."""
    method = methods.of_config(model.config)
    model.config.auto_map = auto_map(method)
    model.save_pretrained(folder)
    copy_code(method, folder)
    auto = next(auto for auto, cls in _classes(method).items() if type(model) is cls)
    if auto == "AutoBackbone":  # it asks the Hub first, and fails for a folder
        auto = "AutoModel"
    return f'transformers.{auto}.from_pretrained("{{dest}}", trust_remote_code=True)'


def add_code(folder: Path):
    """Put the code of one of our models, and its names in the configs, beside the checkpoint in a folder. Nothing is
    done for a method that somebody has registered: its author decides about its code.

    With them, the lines that the Hub shows for a checkpoint work: `from_pretrained(name, trust_remote_code=True)`.
    """
    method = methods.of_config(read_config(folder))
    if not all(cls.__module__.startswith(MODELS) for cls in _classes(method).values()):
        return
    copy_code(method, folder)
    _name_code(folder / CONFIG, auto_map(method))
    _name_code(folder / FILES[0], processor_map())


def auto_map(method: Method) -> dict[str, str]:
    """Auto class → the class that it loads, as a config names it."""
    return {auto: f"{_file(cls)}.{cls.__name__}" for auto, cls in _classes(method).items()}


def processor_map() -> dict[str, str]:
    """As `auto_map`, for the image processor's settings."""
    return {"AutoImageProcessor": f"{_file(MIMImageProcessor)}.{MIMImageProcessor.__name__}"}


def copy_code(method: Method, folder: Path):
    """Remote code must be a flat folder of modules that import each other by `from .name import`; `hf_mim/models` is
    one. Those that the method needs are copied."""
    for cls in _classes(method).values():
        code = Path(sys.modules[cls.__module__].__file__)
        for file in {str(code), *get_relative_import_files(code)}:
            with replacing(folder / Path(file).name) as aside:
                shutil.copyfile(file, aside)


def _classes(method: Method) -> dict[str, type]:
    roles = [role for roles in auto_classes.FILES.values() for role in roles.items()]
    return {auto: cls for auto, role in roles if (cls := getattr(method, role)) is not None}


def _file(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def _name_code(path: Path, names: dict[str, str]):
    if path.is_file():
        settings = json.loads(path.read_text())
        with replacing(path) as aside:
            aside.write_text(json.dumps(settings | {"auto_map": names}, indent=2, sort_keys=True) + "\n")
