"""Our models in transformers' Auto classes, without importing transformers.

`AutoModel` is to know the methods, whether hf_mim or transformers is imported first, and `import hf_mim` is to take no
time. It works in two steps:

1. An Auto class keeps what is registered with it in the dict `_extra_content` of its mapping. `install` puts an
   `_OnFirstUse` in its place: at once, if the file that makes the mappings has been imported, or else by `_AfterImport`
   as soon as Python has run that file.
2. `_OnFirstUse` registers the methods, by the public `register` of the Auto class, when somebody looks into it. This
   cannot happen earlier: transformers.modeling_layers imports the Auto classes, and our models import it.
"""

import importlib
import importlib.abc
import sys
import threading
from collections.abc import Callable

from hf_mim import methods

AUTO = "transformers.models.auto."
# File of transformers → its Auto classes, each with the class of a `Method` that it loads.
FILES = {
    f"{AUTO}configuration_auto": {"AutoConfig": "config_class"},
    f"{AUTO}modeling_auto": {
        "AutoModel": "encoder_class",
        "AutoModelForPreTraining": "pretraining_class",
        "AutoModelForImageClassification": "classifier_class",
        "AutoBackbone": "backbone_class",
    },
}


class _OnFirstUse(dict):
    """Calls `register` for each method before it is looked into; methods that come later are registered then."""

    def __init__(self, content: dict, register: Callable[[methods.Method], None]):
        super().__init__(content)
        self.register, self.registered = register, []
        self.lock, self.busy = threading.RLock(), False

    def fill(self):
        with self.lock:  # another thread waits until all are there
            if self.busy:  # `register` itself looks into it
                return
            self.busy = True
            try:
                for method in methods.rows():
                    if method not in self.registered:
                        self.register(method)
                        self.registered.append(method)
            finally:
                self.busy = False


def _after_filling(name: str):
    def look(self, *args):
        self.fill()
        return getattr(dict, name)(self, *args)

    return look


for _name in ("__contains__", "__getitem__", "__iter__", "__len__", "get", "items", "keys", "values"):
    setattr(_OnFirstUse, _name, _after_filling(_name))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the files as Python does, and calls `_prepare` after each of them has run."""

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
        if role == "config_class":
            mapping = module.CONFIG_MAPPING
        else:
            mapping = auto_class._model_mapping
        if not isinstance(mapping._extra_content, _OnFirstUse):
            mapping._extra_content = _OnFirstUse(mapping._extra_content, _registration(auto_class, role))


def _registration(auto_class, role: str) -> Callable[[methods.Method], None]:
    def register(method: methods.Method):
        model_class = getattr(method, role)
        if model_class is None:
            return
        key = model_class.model_type if role == "config_class" else method.config_class
        auto_class.register(key, model_class)

    return register


def install():
    """Let the Auto classes know the methods, now or when they are imported; a second call does nothing."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name in FILES:
        if name in sys.modules:
            _prepare(importlib.import_module(name))  # waits for another thread that is running the file
