"""How a training run is saved and resumed: checkpoints that are whole or absent, with the place in the data."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.utils import logging

from hf_mim.data.stream import EndlessStream
from hf_mim.files import one_line
from hf_mim.pretraining.checkpoints import (
    check,
    clear_staging,
    commit,
    newest_whole,
    rotate,
    write_manifest,
    written_aside,
)
from hf_mim.run_folder import CHECKPOINT, MANIFEST, STAGING, TRAINER_STATE

logger = logging.get_logger(__name__)


class CheckpointTrainer:
    """Goes before `transformers.Trainer` among a trainer's bases.

    A checkpoint that cannot be written, on a full disk, is a warning: the run goes on, and those before it are kept.
    """

    endless_stream: EndlessStream | None = None  # what a stream is read through
    _staging = False
    _resumed_from: str | None = None

    # ---- save

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial):
        run_folder, name = Path(self._get_output_dir(trial)), f"{CHECKPOINT}{self.state.global_step}"
        staged = run_folder / STAGING / name
        if self.args.should_save:
            clear_staging(run_folder)
        self.accelerator.wait_for_everyone()
        save = super()._save_checkpoint
        self._staging = True
        try:
            failures = _failures(lambda: (save(model, trial), self._save_place(staged)))
        finally:
            self._staging = False
        failures = self._of_all(failures)
        if not failures and self.args.should_save:
            failures = _failures(lambda: self._finish(staged, run_folder / name))
        failures = self._of_all(failures)
        if self.args.should_save:
            clear_staging(run_folder)
        if failures:
            last = newest_whole(run_folder) if self.is_world_process_zero() else None
            left = f"{last.name} is the newest to resume from" if last else "there is none to resume from yet"
            logger.warning(f"{name} could not be saved ({failures[0]}); the run goes on, and {left}")
            return
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_folder / name))
        if self.args.should_save:  # after the push, which waits for the upload of the one that goes now
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            for failure in _failures(lambda: rotate(run_folder, limit, best)):
                logger.warning(f"older checkpoints could not be deleted: {failure}")

    def _push_from_checkpoint(self, checkpoint_folder: str):
        if not self._staging:  # by Trainer, before the checkpoint has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_place(self, folder: Path):
        """Where this process stands in its stream."""
        if self.endless_stream is not None:
            steps = self.state.global_step - self._initial_global_step
            place = self.endless_stream.state(steps * self.args.gradient_accumulation_steps)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"stream_{self.args.process_index}.json").write_text(json.dumps(place))

    def _finish(self, staged: Path, final: Path):
        if self.state.best_model_checkpoint == str(staged):  # by its real name
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / TRAINER_STATE))
        write_manifest(staged, **self._about())
        commit(staged, final)

    def _about(self) -> dict:
        """What a resume has to agree with."""
        about = {"step": self.state.global_step, "processes": self.args.world_size}
        return about | {"images_per_step": self.args.images_per_step, "seed": self.args.seed}

    def _of_all(self, failures: list[str]) -> list[str]:
        """The failures of all processes, each of which has to ask."""
        return gather_object(failures) if self.args.world_size > 1 else failures

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As Trainer's; in the run folder, each file is the old or the new one, and never half of it, and a sharded
        model is saved whole."""
        if (output_dir or self.args.output_dir) != self.args.output_dir:
            return super().save_model(output_dir, _internal_call)
        with self._gathered(), disk_errors(), contextlib.ExitStack() as stack:
            folder = stack.enter_context(written_aside(self.args.output_dir)) if self.args.should_save else None
            super().save_model(folder and str(folder), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextlib.contextmanager
    def _gathered(self):
        """Under FSDP, weights are saved as a whole inside, as `from_pretrained` wants them."""
        if not self.is_fsdp_enabled:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        usual = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(usual)

    # ---- resume

    def checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The checkpoint to go on from: that which is named, or for True the newest whole one. The same on all ranks.

        Raises:
            ValueError: it is damaged; there is none; or it was made with other images in a step.
        """
        if asked and asked == self._resumed_from:
            return asked  # it has been checked
        found = [None, None]
        if asked and self.is_world_process_zero():
            try:
                found[0] = self._find_checkpoint(asked)
            except ValueError as error:
                found[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(found)
        checkpoint, error = found
        if error:
            raise ValueError(error)
        self._resumed_from = checkpoint
        return checkpoint

    def _find_checkpoint(self, asked: str | bool) -> str:
        if asked is True:
            asked = newest_whole(self.args.output_dir, tell=logger.warning)
            if asked is None:
                raise ValueError(
                    f"resume_from_checkpoint: {self.args.output_dir} has no whole checkpoint; move what is there away "
                    f"to begin again"
                )
        folder = Path(asked)
        if not folder.is_dir():
            raise ValueError(f"resume_from_checkpoint must be a checkpoint's folder, and there is none at {folder}")
        if not (folder / MANIFEST).exists():
            logger.warning(f"{folder} has no {MANIFEST}, so whether it is whole cannot be told")
            return str(folder)
        try:
            manifest = check(folder)
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {folder} {error}") from None
        if manifest.get("images_per_step", self.args.images_per_step) != self.args.images_per_step:
            args = self.args
            raise ValueError(
                f"per_device_train_batch_size × gradient_accumulation_steps × processes must stay "
                f"{manifest['images_per_step']}, as in {folder}, got {args.per_device_train_batch_size} × "
                f"{args.gradient_accumulation_steps} × {args.world_size}"
            )
        return str(folder)

    def stream_place(self, workers: int) -> dict | None:
        """Where this process goes on in its stream. With other processes or workers than before: at its next pass."""
        if self._resumed_from is None:
            return None
        places = [json.loads(path.read_text()) for path in Path(self._resumed_from).glob("stream_*.json")]
        own = Path(self._resumed_from) / f"stream_{self.args.process_index}.json"
        lanes = max(1, workers)
        if len(places) == self.args.world_size and own.exists():
            place = json.loads(own.read_text())
            if len(place["places"]) == lanes:
                return place
        epoch = 1 + max((epoch for place in places for epoch, _ in place["places"]), default=-1)
        logger.warning(
            f"The stream was read by {len(places)} processes and is now by {self.args.world_size}, or the number of "
            f"workers is another: it goes on with the start of pass {epoch + 1}, not where the run had stopped"
        )
        return {"batches": 0, "places": [[epoch, 0]] * lanes}


@contextlib.contextmanager
def disk_errors():
    """What safetensors and torch.save raise on a full or broken disk becomes an OSError as well."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise OSError(one_line(error, 200)) from error


def _failures(save: Callable) -> list[str]:
    """What the disk has to say against it, if anything."""
    try:
        with disk_errors():
            save()
    except OSError as error:
        return [str(error)]
    return []
