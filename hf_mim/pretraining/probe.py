"""k-NN accuracy and health of the features while a run trains."""

import logging

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from hf_mim.data.images import Images
from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.health import measure_health
from hf_mim.evaluation.knn import knn_predict
from hf_mim.models.image_processing_mim import MIMImageProcessor
from hf_mim.pretraining.guard import full_tensor

logger = logging.getLogger(__name__)


class OnlineProbe(TrainerCallback):
    """Measures k-NN accuracy and health of the features, before the first step and then every `every` steps.

    They are logged as `probe_...` beside the loss. Every process measures the same by itself. The probe draws nothing
    from the training's random numbers, and its time does not count as training time.

    Args:
        trainer: the `MIMTrainer`; the probe uses its model, normalisation and batch size for evaluation.
        train: `LabelledImages` that vote, or None: then only health is measured.
        test: `LabelledImages` to classify; if there are no labels, any `datasets.Dataset` of images.
    """

    def __init__(self, trainer, every: int, train: LabelledImages | None, test: LabelledImages | Dataset):
        self.trainer, self.every, self.train = trainer, every, train
        self.test = test if isinstance(test, LabelledImages) else Images(test)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 and self.trainer.guard.signal is None:
            should_log = control.should_log
            self.measure()
            control.should_log = should_log  # `log` clears it, but the loss is still to be logged

    def measure(self):
        """Log one measurement. If the features are not finite, warn: the training itself deals with that."""
        trainer = self.trainer
        model = unsharded(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).base_model)
        training = model.training
        try:
            trainer.log({f"probe_{name}": value for name, value in self.values(model).items()})
        except ValueError as error:
            logger.warning("no probe at step %d: %s", trainer.state.global_step, error)
        model.train(training)
        trainer.throughput.restart_clock()

    def values(self, model: nn.Module) -> dict[str, float]:
        """Health of an encoder's features of the test images, and `knn` if there are labels."""
        augment = self.trainer.augment
        processor = self.trainer.processing_class
        crop = processor.crop() if isinstance(processor, MIMImageProcessor) else None
        encoder = FrozenEncoder(model, *augment.statistics(), value_range=augment.value_range, crop=crop)
        extract = FeatureExtractor(encoder, self.trainer.args.per_device_eval_batch_size, progress=False)
        pooled, tokens = extract(self.test, ["last/mean/norm", "last/tokens/norm"])
        values = measure_health(pooled, tokens, encoder.grid)
        if self.train is not None:
            (features,), labels = extract(self.train, ["last/mean/norm"]), self.train.read_labels()
            predictions = knn_predict(features, labels, pooled, k=min(20, len(labels)))
            values["knn"] = (predictions == self.test.read_labels()).double().mean().item()
        return values


def unsharded(model: nn.Module) -> nn.Module:
    """A whole copy of a sharded model (FSDP2), for which all ranks have to ask; any other model as it is.

    A part of a sharded model cannot be called by itself: it would take itself for the root.
    """
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict({name: full_tensor(tensor) for name, tensor in state.items()}, assign=True)
    return copy
