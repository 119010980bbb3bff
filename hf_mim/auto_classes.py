"""Our models in transformers' Auto classes, without importing transformers.

`AutoModel` has to know the methods, whether hf_mim or transformers is imported first, and `import hf_mim` has to be
quick. It works in two steps:

1. An Auto class keeps the models that are registered with it in the dict `_extra_content` of its mapping. `install`
   replaces this dict by an `_OnFirstUse`: at once if the file that makes the mappings is imported already, or else
   through `_AfterImport` as soon as Python has run that file.
2. When somebody looks into it, `_OnFirstUse` registers the methods by the public `register` of the Auto class. This
   cannot happen earlier: transformers.modeling_layers imports the Auto classes, and our models import that module.
"""

import importlib
import importlib.abc
import sys
import threading
from typing import Any

from hf_mim import methods

AUTO = "transformers.models.auto."
# File of transformers → its Auto classes, and which class of a `Method` each of them loads.
FILES = {
    f"{AUTO}configuration_auto": {"AutoConfig": "config_class"},
    f"{AUTO}modeling_auto": {
        "AutoModel": "encoder_class",
        "AutoModelForPreTraining": "pretraining_class",
        "AutoModelForImageClassification": "classifier_class",
        "AutoBackbone": "backbone_class",
    },
    f"{AUTO}image_processing_auto": {"AutoImageProcessor": "image_processor_class"},
}
# The mappings that are not an attribute of their Auto class.
MAPPINGS = {"AutoConfig": "CONFIG_MAPPING", "AutoImageProcessor": "IMAGE_PROCESSOR_MAPPING"}


class _OnFirstUse(dict):
    """Registers all methods with an Auto class before each look into it. Methods may be added at any time."""

    def __init__(self, content: dict, auto_class: Any, role: str):
        super().__init__(content)
        self.auto_class, self.role, self.registered = auto_class, role, []
        self.lock, self.busy = threading.RLock(), False

    def fill(self):
        with self.lock:  # another thread waits until all methods are registered
            if self.busy:  # the Auto class looks into this dict while it registers
                return
            self.busy = True
            try:
                for method in methods.rows():
                    if method not in self.registered:
                        self.register(method)
                        self.registered.append(method)
            finally:
                self.busy = False

    def register(self, method: methods.Method):
        model_class = getattr(method, self.role)
        if self.role == "image_processor_class":  # one for each way to compute; ours has one
            self.auto_class.register(
                method.config_class, image_processor_classes={"pil": model_class, "torchvision": model_class}
            )
        elif model_class is not None:
            key = model_class.model_type if self.role == "config_class" else method.config_class
            self.auto_class.register(key, model_class)


def _after_filling(name: str):
    def look(self, *args):
        self.fill()
        return getattr(dict, name)(self, *args)

    return look


for _name in ("__contains__", "__getitem__", "__iter__", "__len__", "get", "items", "keys", "values"):
    setattr(_OnFirstUse, _name, _after_filling(_name))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the files of `FILES` as Python does, and calls `_prepare` after Python has run one."""

    def find_spec(self, name, path=None, target=None):
        if name not in FILES:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_prepare(module):
                run(module)
                _prepare(module)

            spec.loader.exec_module = run_and_prepare
        return spec


def _prepare(module):
    for name, role in FILES.get(module.__name__, {}).items():
        auto_class = getattr(module, name)
        mapping = getattr(module, MAPPINGS[name]) if name in MAPPINGS else auto_class._model_mapping
        if not isinstance(mapping._extra_content, _OnFirstUse):
            mapping._extra_content = _OnFirstUse(mapping._extra_content, auto_class, role)


def install():
    """Make the methods known to the Auto classes, now or when these are imported. A second call does nothing."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name in FILES:
        if name in sys.modules:
            _prepare(importlib.import_module(name))  # waits for another thread that is running the file
