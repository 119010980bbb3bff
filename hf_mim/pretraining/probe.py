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

logger = logging.getLogger(__name__)


class OnlineProbe(TrainerCallback):
    """k-NN accuracy and health of the features during training, before the first step and every `every` steps.

    They are logged as `probe_...` beside the loss. Every process measures the same for itself, nothing random is drawn
    from the training's numbers, and the time does not count as training time.

    Args:
        trainer: the `MIMTrainer`, whose model, normalisation and batch size for evaluation are used.
        train: `LabelledImages` that vote, or None: then only health is measured.
        test: `LabelledImages` to classify; without labels any `datasets.Dataset` of images.
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
            control.should_log = should_log  # what `log` takes back, though the loss is still to be logged

    def measure(self):
        """Log one measurement; features that are not finite are said, and left to the training to deal with."""
        trainer = self.trainer
        model = _unsharded(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).base_model)
        training = model.training
        try:
            trainer.log({f"probe_{name}": value for name, value in self.values(model).items()})
        except ValueError as error:
            logger.warning("no probe at step %d: %s", trainer.state.global_step, error)
        model.train(training)
        trainer.throughput.restart_clock()

    def values(self, model: nn.Module) -> dict[str, float]:
        """Health of the test images' features by an encoder, and `knn` where there are labels."""
        encoder = FrozenEncoder(model, *self.trainer.augment.statistics())
        extract = FeatureExtractor(encoder, self.trainer.args.per_device_eval_batch_size, progress=False)
        pooled, tokens = extract(self.test, ["last/mean/norm", "last/tokens/norm"])
        values = measure_health(pooled, tokens, encoder.grid)
        if self.train is not None:
            (features,), labels = extract(self.train, ["last/mean/norm"]), self.train.read_labels()
            predictions = knn_predict(features, labels, pooled, k=min(20, len(labels)))
            values["knn"] = (predictions == self.test.read_labels()).double().mean().item()
        return values


def _unsharded(model: nn.Module) -> nn.Module:
    """Of a sharded model (FSDP2) a whole copy, for which all ranks have to ask; any other as it is.

    A part of a sharded model cannot be called by itself: it would take itself for the root.
    """
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    copy.load_state_dict(whole, assign=True)
    return copy
