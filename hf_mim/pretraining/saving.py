"""How a training run is saved and resumed: checkpoints that are whole or absent, with the place in the data."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_mim.data.stream import EndlessStream
from hf_mim.files import disk_errors, quiet, replacing
from hf_mim.pretraining import checkpoints
from hf_mim.run_folder import CHECKPOINT, MANIFEST, STAGING, TRAINER_STATE, step_of

logger = logging.get_logger(__name__)


class CheckpointTrainer:
    """A mixin that must stand before `transformers.Trainer` among a trainer's bases.

    If a checkpoint cannot be written (a full disk), there is a warning. The run goes on and keeps older checkpoints.
    """

    endless_stream: EndlessStream | None = None  # set if the training data are a stream
    _staging = False
    _save_owed = False  # a checkpoint was not saved, because its step was skipped
    _unproved: Path | None = None  # the last checkpoint, until its weights have given a finite loss
    _resumed_from: str | None = None
    _best_before: tuple = ()  # a step that is the best, and the best value, step and checkpoint before it

    # ---- save

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._staging else folder

    def note_best(self, value: float | None, larger: bool) -> bool:
        """Whether a value that was measured after this step is the best so far, so that a checkpoint has to be saved.

        It is then kept. Every rank has to call this; the main process decides. None: nothing was measured.
        """
        state, best = self.state, self.state.best_metric
        is_best = value is not None and (best is None or (value > best if larger else value < best))
        (is_best,) = broadcast_object_list([is_best])
        if is_best:
            self._best_before = state.global_step, best, state.best_global_step, state.best_model_checkpoint
            state.best_metric, state.best_global_step = value, state.global_step
        return is_best

    def load_best(self) -> bool:
        """Load the weights of the best checkpoint, if there is one."""
        if self.state.best_model_checkpoint is None:
            return False
        with quiet():
            self._load_best_model()
        return True

    def _save_checkpoint(self, model, trial):
        self._save_whole(model, trial)
        state = self.state
        if state.global_step in self._best_before[:1] and not Path(state.best_model_checkpoint or "none").is_dir():
            _, state.best_metric, state.best_global_step, state.best_model_checkpoint = self._best_before

    def _finalize_training(self, *args, **kwargs):
        """As Trainer's, which deletes all checkpoints but the best one if it knows one and `save_total_limit` is 1."""
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = best if self.args.load_best_model_at_end else None
        output = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        return output

    def _save_whole(self, model, trial):
        self.guard.settle()
        self._save_owed = bool(self.guard.in_a_row and not self.guard.signal)
        if self._save_owed:  # these weights may be what gives no finite loss
            logger.warning(f"No checkpoint is saved at step {self.state.global_step}, because it was skipped")
            return
        run_folder, name = Path(self._get_output_dir(trial)), f"{CHECKPOINT}{self.state.global_step}"
        staged = run_folder / STAGING / name
        if self.args.should_save:
            checkpoints.clear_staging(run_folder)
        self.accelerator.wait_for_everyone()
        save = super()._save_checkpoint
        self._staging = True
        try:
            failures = _failures(lambda: (save(model, trial), self._save_place(staged)))
        finally:
            self._staging = False
        failures = gather_object(failures)  # each process hears of all failures
        if not failures and self.args.should_save:
            failures = _failures(lambda: self._finish(staged, run_folder / name))
        failures = gather_object(failures)
        if self.args.should_save:
            checkpoints.clear_staging(run_folder)
        if failures:
            last = checkpoints.newest_whole(run_folder) if self.is_world_process_zero() else None
            left = f"{last.name} is the newest to resume from" if last else "there is none to resume from yet"
            logger.warning(f"{name} could not be saved ({failures[0]}); the run goes on, and {left}")
            return
        if self.args.push_to_hub:
            for failure in _failures(lambda: self._push_from_checkpoint(str(run_folder / name))):
                logger.warning(f"{name} could not be uploaded ({failure}); the run goes on")
        self._unproved = run_folder / name
        self._rotate(run_folder, self.guard.proved)  # after the push, which waits for the upload of an older checkpoint

    def _rotate(self, run_folder: Path, proved: int | None = None):
        """Delete older checkpoints, but not the best one, the one before the decay, and the last one whose weights have
        given a finite loss."""
        if self.args.should_save:
            state = self.state
            keep = {f"{CHECKPOINT}{step}" for step in (state.best_global_step, self.args.decay_start(state.max_steps))}
            keep |= {Path(state.best_model_checkpoint).name} if state.best_model_checkpoint else set()
            about = run_folder, self.args.save_total_limit, keep, proved
            for failure in _failures(lambda: checkpoints.rotate(*about)):
                logger.warning(f"older checkpoints could not be deleted: {failure}")

    def after_step(self, finite: bool, step: int):
        """`guard` calls this when it knows whether the weights after `step` steps gave a finite loss and gradient."""
        if finite and self._unproved is not None and step >= step_of(self._unproved):
            self._rotate(self._unproved.parent)
            self._unproved = None
        if finite and self._save_owed:
            self.control.should_save = True

    def _push_from_checkpoint(self, checkpoint_folder: str):
        if not self._staging:  # Trainer calls this before the checkpoint has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_place(self, folder: Path):
        """Write down where this process stands in its stream."""
        if self.endless_stream is not None:
            steps = self.state.global_step - self._initial_global_step
            place = self.endless_stream.state(steps * self.args.gradient_accumulation_steps)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"stream_{self.args.process_index}.json").write_text(json.dumps(place))

    def _finish(self, staged: Path, final: Path):
        """On the main process: give the checkpoint its manifest and its name."""
        args, state = self.args, self.state
        if state.best_model_checkpoint is not None:
            best = final if state.best_model_checkpoint == str(staged) else state.best_model_checkpoint
            state.best_model_checkpoint = None  # a checkpoint may be moved; `_init_training_state` finds the best
            state.save_to_json(str(staged / TRAINER_STATE))
            state.best_model_checkpoint = str(best)
        about = {"step": state.global_step, "processes": args.world_size, "images_per_step": args.images_per_step}
        about |= {"gradient_accumulation_steps": args.gradient_accumulation_steps, "seed": args.seed}
        checkpoints.write_manifest(staged, **about)
        checkpoints.commit(staged, final)

    def _init_training_state(self, *args, **kwargs):
        """As Trainer's. The path of the best checkpoint follows from its step."""
        done, state = super()._init_training_state(*args, **kwargs), self.state
        best = Path(self.args.output_dir) / f"{CHECKPOINT}{state.best_global_step}"
        if state.best_model_checkpoint is None and state.best_global_step:
            if best.is_dir():
                state.best_model_checkpoint = str(best)
            else:  # it is in the folder of another run, or was deleted
                state.best_metric, state.best_global_step = None, None
        return done

    def save_state(self):
        """As Trainer's, without the path of the best checkpoint, because the file is uploaded. The file is the old or
        the new one, never half of it."""
        if self.is_world_process_zero():
            with replacing(Path(self.args.output_dir) / TRAINER_STATE) as aside:
                dataclasses.replace(self.state, best_model_checkpoint=None).save_to_json(str(aside))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As Trainer's. In the run folder a file is the old or the new one, never half of it; a sharded model is saved
        whole."""
        if (output_dir or self.args.output_dir) != self.args.output_dir:
            return super().save_model(output_dir, _internal_call)
        aside = checkpoints.written_aside(self.args.output_dir) if self.args.should_save else contextlib.nullcontext()
        with self._gathered(), disk_errors(), aside as folder:
            super().save_model(folder and str(folder), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(revision=self.args.hub_revision)

    @contextlib.contextmanager
    def _gathered(self):
        """Inside, FSDP saves whole weights, which `from_pretrained` can load."""
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
        """The checkpoint to resume from, the same on all ranks: the folder `asked`, or for True the newest whole one.

        Raises:
            ValueError: there is none, it is damaged, or it was made with another number of images per step.
        """
        if asked and asked == self._resumed_from:
            return asked  # it was checked before
        found = [None, None]
        if asked and self.is_world_process_zero():
            try:
                found[0] = self._find_checkpoint(asked)
            except ValueError as error:
                found[1] = str(error)
        checkpoint, error = broadcast_object_list(found)
        if error:
            raise ValueError(error)
        self._resumed_from = checkpoint
        return checkpoint

    def _find_checkpoint(self, asked: str | bool) -> str:
        args = self.args
        if asked is True:
            asked = checkpoints.newest_whole(args.output_dir, tell=logger.warning)
            if asked is None:
                raise ValueError(
                    f"resume_from_checkpoint: {args.output_dir} has no whole checkpoint; to begin again, move what is "
                    f"there away"
                )
        folder = Path(asked)
        if not folder.is_dir():
            raise ValueError(f"resume_from_checkpoint must be a checkpoint's folder, and there is none at {folder}")
        if missing := checkpoints.lacking(folder):
            raise ValueError(
                f"resume_from_checkpoint: {folder} has no {' and no '.join(missing)} (save_only_model leaves them "
                "out), so the run cannot go on from it; resume from another checkpoint, or begin a new run"
            )
        if not (folder / MANIFEST).exists():
            logger.warning(f"{folder} has no {MANIFEST}, so nothing can tell whether it is whole")
            return str(folder)
        try:
            manifest = checkpoints.check(folder)
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {folder} {error}") from None
        if manifest.get("seed", args.seed) != args.seed:
            raise ValueError(f"seed must stay {manifest['seed']}, as in {folder}, got {args.seed}")
        if manifest.get("images_per_step", args.images_per_step) != args.images_per_step:
            raise ValueError(
                f"per_device_train_batch_size × gradient_accumulation_steps × processes must stay "
                f"{manifest['images_per_step']}, as in {folder}, got {args.per_device_train_batch_size} × "
                f"{args.gradient_accumulation_steps} × {args.world_size}"
            )
        self._warn_of_another_end(manifest)
        return str(folder)

    def _warn_of_another_end(self, manifest: dict):
        """Warn if the last, smaller step of an epoch is not what it was, because the steps after it shift."""
        if not self.args.dataloader_drop_last or not has_length(self.train_dataset):
            return
        images, per_step = len(self.train_dataset), self.args.images_per_step
        now = self.args.gradient_accumulation_steps
        then = manifest.get("gradient_accumulation_steps", now)
        batches = per_step // now, per_step // then
        last = [images // batch * batch % per_step or per_step for batch in batches]
        if last[0] != last[1]:
            logger.warning(
                f"gradient_accumulation_steps is {now} and was {then}: the last step of an epoch of {images:,} images "
                f"has {last[0]} of them now and had {last[1]}, so the steps from here on are not given the images that "
                "they would have had"
            )

    def stream_place(self, workers: int) -> dict | None:
        """The place from which this process reads its stream after a resume; None for a new run.

        It is the start of the next pass with another number of processes or workers than before, or if several workers
        make batches of another size.
        """
        if self._resumed_from is None:
            return None
        held = {path.name: json.loads(path.read_text()) for path in Path(self._resumed_from).glob("stream_*.json")}
        own = held.get(f"stream_{self.args.process_index}.json")
        lanes, size = max(1, workers), self._train_batch_size
        same_batches = lanes == 1 or (own or {}).get("batch_size", size) == size
        if len(held) == self.args.world_size and own and len(own["places"]) == lanes and same_batches:
            return own
        epoch = 1 + max((epoch for place in held.values() for epoch, _ in place["places"]), default=-1)
        logger.warning(
            f"{len(held)} processes read the stream before and {self.args.world_size} do now, or the number of workers "
            f"or the size of their batches has changed: the run goes on at the start of pass {epoch + 1}, not where it "
            "had stopped"
        )
        return {"batches": 0, "places": [[epoch, 0]] * lanes}


def _failures(save: Callable) -> list[str]:
    """Call `save`. The disk's error, if there is one."""
    try:
        with disk_errors():
            save()
    except OSError as error:
        return [str(error)]
    return []
