"""The pictures of a run: how it went, and what the model predicts and has learned, during the run and at its end."""

import logging
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

from hf_mim.data.sources import fixed_sample
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.files import one_line
from hf_mim.pretraining.final_results import central_crop
from hf_mim.pretraining.probe import unsharded
from hf_mim.pretraining.recipe import RunArguments
from hf_mim.run_folder import CURVE, picture_path
from hf_mim.visualize import PICTURES, Viewer, fitting_pictures, plot_training

logger = logging.getLogger(__name__)

NUM_IMAGES = 8


class RunPictures(TrainerCallback):
    """Draws the same images every `run.probe_every` steps, and when `draw` is called.

    The time does not count as training time, and nothing is drawn from the training's random numbers. A picture that
    cannot be made is a warning, and does not end the run.

    Args:
        trainer: the `MIMTrainer`.
        images: the run's training images, undecoded.
        run: says which part of an image is seen, and which bands are shown.
    """

    def __init__(self, trainer, images, run: RunArguments):
        self.trainer, self.images, self.run, self.chosen = trainer, images, run, None
        self.folder = Path(trainer.args.output_dir)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.run.probe_every or state.global_step % self.run.probe_every or self.trainer.guard.signal:
            return
        model = unsharded(self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False))
        if state.is_world_process_zero:
            training = model.training
            self.draw(model.eval(), state.global_step)
            model.train(training)
        self.trainer.throughput.restart_clock()

    def draw(self, model: nn.Module, step: int | None = None):
        """Draw the curves, and the pictures that fit the model. Only the main process calls it.

        step: keep the pictures beside those of other steps; default: they are those of the run's end.
        """
        try:
            plot_training(self.trainer.state.log_history).save(self.folder / CURVE)
            viewer = self.viewer(model)
            if self.chosen is None:
                sample = fixed_sample(self.images, 4 * NUM_IMAGES)  # more, because some may be broken
                self.chosen = viewer.readable(sample, NUM_IMAGES)
            for name in fitting_pictures(viewer):
                path = picture_path(self.folder, name, step)
                path.parent.mkdir(parents=True, exist_ok=True)
                PICTURES[name].plot(viewer, self.chosen).save(path)
                if step is not None:
                    self.report(name, path, step)
        except (ValueError, OSError) as error:  # features that are not finite, a full disk
            logger.warning("not all pictures were made: %s", one_line(error))

    def report(self, name: str, path: Path, step: int):
        """Show a picture beside the curves, where `report_to` sends them to TensorBoard or Trackio."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                callback.tb_writer.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")
            elif isinstance(callback, TrackioCallback):
                import trackio  # it is there, because the callback uses it

                trackio.log({f"pictures/{name}": trackio.Image(path), "train/global_step": step})

    def viewer(self, model: nn.Module) -> Viewer:
        augment = self.trainer.augment
        sees = dict(value_range=augment.value_range, crop=central_crop(self.run, model.config))
        encoder = FrozenEncoder(model.base_model, *augment.statistics(), name=str(self.folder), **sees)
        return Viewer(encoder, model, self.run.bands)
