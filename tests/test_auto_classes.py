"""transformers' Auto classes know our models in whatever order somebody imports the two packages."""

import subprocess
import sys

import pytest
from tiny import make_model

ORDERS = {
    "hf_mim first": "import hf_mim; from transformers import AutoConfig, AutoModel",
    "transformers first": "from transformers import AutoConfig, AutoModel; import hf_mim",
    "transformers used first": """
from transformers import AutoConfig, AutoModel, ViTConfig
assert len(AutoModel._model_mapping) > 100 and ViTConfig in AutoModel._model_mapping
import hf_mim""",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "mae"
    make_model("mae").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_our_models_in_any_order_of_imports(order, checkpoint):
    script = f"""
import sys
{ORDERS[order]}
if {order == "hf_mim first"}:
    assert "hf_mim.models" not in sys.modules, "transformers alone has imported the models of hf_mim"
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "mim_mae"
assert type(AutoModel.from_pretrained(sys.argv[1])) is hf_mim.MAEModel
assert type(AutoModel.from_config(AutoConfig.for_model("stop_jepa", num_hidden_layers=1))) is hf_mim.StopJepaModel
"""
    subprocess.run([sys.executable, "-c", script, checkpoint], check=True)


def test_importing_hf_mim_imports_neither_torch_nor_transformers():
    script = "import sys, hf_mim; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
