"""k-NN accuracy and health of the features while a run trains."""

import logging
from typing import Any

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

# What `keep_best` can follow. Other measures have no better and worse.
LARGER_IS_BETTER = ("probe_knn", "probe_rank_me", "probe_rank_me_share", "probe_effective_rank", "probe_std_mean")
LARGER_IS_BETTER += ("probe_std_min",)
SMALLER_IS_BETTER = ("probe_mean_cosine", "probe_token_cosine", "probe_dead_dimensions", "probe_position_share")
ALSO_CALLED = {"probe_knn_accuracy": "probe_knn"}


class OnlineProbe(TrainerCallback):
    """Measures k-NN accuracy and health of the features, before the first step and then every `every` steps.

    They are logged as `probe_...` beside the loss. Every process measures the same by itself. The probe draws nothing
    from the training's random numbers, and its time does not count as training time.

    Args:
        trainer: the `MIMTrainer`; the probe uses its model, normalisation and batch size for evaluation.
        train: `LabelledImages` that vote, or None: then only health is measured.
        test: `LabelledImages` to classify; if there are no labels, any `datasets.Dataset` of images.
        keep_best: a name of `LARGER_IS_BETTER` or `SMALLER_IS_BETTER`: the checkpoint with the best value is kept.
    """

    def __init__(
        self,
        trainer,
        every: int,
        train: LabelledImages | None,
        test: LabelledImages | Dataset,
        keep_best: str | None = None,
    ):
        self.trainer, self.every, self.train, self.keep_best = trainer, every, train, keep_best
        self.test: Any = test if isinstance(test, LabelledImages) else Images(test)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 and self.trainer.guard.signal is None:
            should_log = control.should_log
            values = self.measure()
            control.should_log = should_log  # `log` clears it, but the loss is still to be logged
            if self.keep_best is not None:
                value = values.get(self.keep_best)
                control.should_save |= self.trainer.note_best(value, self.keep_best in LARGER_IS_BETTER)

    def measure(self) -> dict[str, float]:
        """Log one measurement and return it. If the features are not finite, warn and return {}: the training itself
        deals with that."""
        trainer = self.trainer
        model = unsharded(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).base_model)
        training, logs = model.training, {}
        try:
            logs = {f"probe_{name}": value for name, value in self.values(model).items()}
            trainer.log(dict(logs))
        except ValueError as error:
            logger.warning("no probe at step %d: %s", trainer.state.global_step, error)
        model.train(training)
        trainer.throughput.restart_clock()
        return logs

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
