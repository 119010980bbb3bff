"""What hf_mim uses of transformers and huggingface_hub that these do not promise to keep.

Each entry is (module, attribute path, our file). A release that drops one fails here first, and says where to look.
The classes of a method's interface (`_supports_sdpa`, `_init_weights` and alike) are the documented way to write a
model for transformers and do not count.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_mim"
TRAINER = "transformers.trainer"
HOOKS = [
    ("transformers", "PreTrainedModel._upload_modified_files", "models/vit.py"),
    ("transformers", "PreTrainedModel._keys_to_ignore_on_load_unexpected", "models/vit.py"),
    ("transformers", "PreTrainedModel._keys_to_ignore_on_load_unexpected", "models/modeling_stop_jepa.py"),
    ("transformers", "PreTrainedModel._keep_in_fp32_modules_strict", "models/target_encoder.py"),
    ("transformers", "AutoModel._model_mapping", "auto_classes.py"),
    ("transformers.models.auto.modeling_auto", "MODEL_MAPPING._extra_content", "auto_classes.py"),
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING._extra_content", "auto_classes.py"),
    (TRAINER, "Trainer._get_output_dir", "pretraining/saving.py"),
    (TRAINER, "Trainer._save_checkpoint", "pretraining/saving.py"),
    (TRAINER, "Trainer._push_from_checkpoint", "pretraining/saving.py"),
    (TRAINER, "Trainer._push_from_checkpoint", "hub/push.py"),
    (TRAINER, "Trainer._finish_current_push", "hub/push.py"),
    (TRAINER, "Trainer._save_checkpoint", "pretraining/trainer.py"),
    (TRAINER, "Trainer._load_best_model", "pretraining/saving.py"),
    (TRAINER, "Trainer._finalize_training", "pretraining/saving.py"),
    (TRAINER, "Trainer._get_grad_norm", "pretraining/trainer.py"),
    (TRAINER, "Trainer._load_optimizer_and_scheduler", "pretraining/rates.py"),
    (TRAINER, "Trainer._init_training_state", "pretraining/trainer.py"),
    (TRAINER, "Trainer._init_training_state", "pretraining/saving.py"),
    ("huggingface_hub.utils", "_http", "hub/push.py"),
    ("huggingface_hub.errors", "HfHubHTTPError.__bases__", "hub/push.py"),
]
# Attributes that Trainer sets on itself, so that only its source has them.
SET_BY_TRAINER = [
    ("_train_batch_size", "pretraining/trainer.py"),
    ("_created_lr_scheduler", "pretraining/rates.py"),
]


@pytest.mark.parametrize(("module", "path", "file"), HOOKS, ids=lambda value: str(value).rpartition(".")[2])
def test_a_private_hook_that_we_use_is_there(module, path, file):
    found = importlib.import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{module} no longer has {path}; hf_mim/{file} relies on it"
        found = getattr(found, name)


@pytest.mark.parametrize(("name", "file"), SET_BY_TRAINER)
def test_an_attribute_that_trainer_sets_on_itself_is_there(name, file):
    source = inspect.getsource(importlib.import_module(TRAINER))
    assert f"self.{name} = " in source, f"Trainer no longer sets {name}; hf_mim/{file} relies on it"


def test_the_list_has_every_private_hook_of_a_trainer_model_or_client_that_the_package_uses():
    """Whatever private name of theirs stands in our code, as an override or as an attribute, is in the list."""
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel, Trainer
    from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping

    theirs = {
        name
        for cls in (Trainer, PreTrainedModel, HfApi, _BaseAutoModelClass, _LazyAutoMapping)
        for name in vars(cls)
        if re.fullmatch(r"_[a-z]\w*", name)
    }
    # The interface by which every model of transformers describes itself.
    theirs -= {name for name in theirs if re.match(r"_(supports|can|no_split|init_weights|is_|auto_class)", name)}
    listed = {(path.rpartition(".")[2], file) for _, path, file in HOOKS} | set(SET_BY_TRAINER)
    used = set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        for name in re.findall(r"(?:def |\.)(_[a-z]\w*)", path.read_text()):
            if name in theirs:
                used.add((name, file))
    assert used <= listed, f"not in the list: {sorted(used - listed)}"
