"""The encoder as an ONNX graph."""

import importlib.util
import math
from pathlib import Path

import torch
from torch import nn

from hf_mim.models.heads import ClassificationHead
from hf_mim.models.vit import MIMPreTrainedModel

LARGEST_FILE = 2**31 - 2**20  # bytes of weights: a protobuf file holds 2**31, and the graph needs room


def check_onnx():
    """Raise ImportError if a package that torch needs to export is missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"to onnx needs {' and '.join(missing)}: pip install hf-mim[onnx]")


class Features(nn.Module):
    """The outputs of the graph: `last_hidden_state`, `pooler_output` and, for a classifier, `logits`."""

    def __init__(self, model: MIMPreTrainedModel):
        super().__init__()
        self.encoder = model.base_model
        self.classifier = model.classifier if isinstance(model, ClassificationHead) else None

    @property
    def outputs(self) -> list[str]:
        return ["last_hidden_state", "pooler_output"] + ([] if self.classifier is None else ["logits"])

    def forward(self, pixel_values):
        output = self.encoder(pixel_values)
        features = (output.last_hidden_state, output.pooler_output)
        return features if self.classifier is None else (*features, self.classifier(output.pooler_output))


def write_onnx(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write `model.onnx`: images `[B, C, H, W]` of the config's size, any B → `Features`. Weights that do not fit
    into it go to a second file. Returns how to load it from `{dest}`."""
    config, features = model.config, Features(model).eval()
    images = torch.zeros(2, config.num_channels, *config.image_height_width)
    size = 4 * sum(math.prod(tensor.shape) for tensor in features.state_dict().values())
    # Given the model itself, torch.onnx would silently fix B if it cannot keep it open. torch.export fails instead.
    program = torch.export.export(
        features, (images,), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}, strict=False
    )
    torch.onnx.export(
        program,
        (),
        folder / "model.onnx",
        input_names=["pixel_values"],
        output_names=features.outputs,
        dynamo=True,
        external_data=size > LARGEST_FILE,
        verbose=False,
    )
    return 'onnxruntime.InferenceSession("{dest}/model.onnx")'
