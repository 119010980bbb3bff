"""Image classifiers as they are, behind the contract of an encoder: what they say of an image is its only feature."""

import shlex
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_mim.data import CenterCrop
from hf_mim.data.processor import InputSpec
from hf_mim.data.sources import source_name
from hf_mim.evaluation.checkpoint import LOADING_ERRORS, check_there, load_whole, loading_failure
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.evaluation.inputs import forward_arguments, unmasked

HEAD = "ForImageClassification"  # in the name of every classifier of transformers, and of ours


class TrainedClassifier(FrozenEncoder):
    """A classifier that fine-tuning wrote, or any of transformers. `extract` gives its logits, whatever the spec.

    It sees of an image what the checkpoint's image processor states, the central crop too.

    Attributes: those of `FrozenEncoder`, and `classes`, the names in the order of the ids.
    """

    def __init__(self, model: nn.Module, *about, **more):
        super().__init__(model, *about, **more)
        config = model.config
        self.classifier = model.eval()
        self.classes = [str(config.id2label[number]) for number in range(config.num_labels)]
        if len(self.classes) < 2 or config.problem_type == "multi_label_classification":
            what = "one answer" if len(self.classes) < 2 else "several answers for an image (multi_label)"
            raise ValueError(f"CLASSIFIER must choose one of several classes, and {self.name} gives {what}")

    @staticmethod
    def _read(checkpoint: str, trust_remote_code: bool) -> nn.Module:
        check_there(checkpoint, "CLASSIFIER")
        try:
            config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        except LOADING_ERRORS as error:
            raise ValueError(f"CLASSIFIER {checkpoint} cannot be loaded: {loading_failure(error)}") from error
        held = config.architectures or []
        if held and not any(HEAD in name for name in held):
            words = shlex.quote(checkpoint), shlex.quote(f"{source_name(checkpoint)}_classifier")
            make = "hf-mim evaluate finetune {} --dataset LABELLED_IMAGES --output_dir {}".format(*words)
            raise ValueError(
                f"CLASSIFIER must be an image classifier, and {checkpoint} holds {held[0]}; make one of it with: {make}"
            )
        options = {"unusable": "holds no image classifier that can be loaded", "part": "classifier"}
        return load_whole(AutoModelForImageClassification, checkpoint, trust_remote_code=trust_remote_code, **options)

    @staticmethod
    def _crop_of(known: InputSpec) -> CenterCrop | None:
        return None if known.crop_fraction is None else CenterCrop(known.crop_fraction)

    def check(self, spec: FeatureSpec):
        """Nothing to check: every spec gives the logits."""

    def feature_width(self, spec: FeatureSpec) -> int:
        return len(self.classes)

    @torch.no_grad()
    def extract(self, pixel_values: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
        """Normalised images `[B, C, H, W]` → logits `[B, number of classes]`, float32, once for each spec."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with unmasked(self.model), autocast:
            logits = self.classifier(**forward_arguments(self.classifier, pixel_values)).logits.float()
        return [logits for _ in specs]
