"""What happens beside the step: random numbers, target update, weight decay, epochs, broken images, probe, logs.

No callback keeps anything that a checkpoint would have to hold: what they do follows from the step number.
"""

import contextlib
import json
import logging
import math
import os
import random
import re
import time
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from hf_mim import schedules
from hf_mim.data.dataset import MAX_BROKEN, BrokenImagesError, ImageStream, check_broken
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.health import measure_health
from hf_mim.evaluation.images import Images, LabelledImages
from hf_mim.evaluation.knn import knn_predict
from hf_mim.guard import StepGuard

logger = logging.getLogger(__name__)


class TargetUpdate(TrainerCallback):
    """Tells the model its progress before each step and moves its target after each optimizer step that was taken.

    Progress is the number of optimizer steps done before this one, over all of them. Under gradient accumulation this
    is once per optimizer step; a step that was skipped, by the loss scaler or by `guard`, moves nothing.
    """

    def __init__(self, guard: StepGuard):
        self.guard = guard

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_progress(state.global_step / state.max_steps)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not optimizer.step_was_skipped:
            model.update_target(state.global_step / state.max_steps, self.guard.skip)


class WeightDecay(TrainerCallback):
    """Sets the weight decay of the decayed parameter groups before each optimizer step (`weight_decay_end`)."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        value = schedules.weight_decay(state.global_step / state.max_steps, args.weight_decay, end)
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = value


# Learned tokens and position tables: a decay would pull them to zero, which says nothing about what they fit.
UNDECAYED_NAMES = re.compile(r"(^|\.)(\w+_tokens?|position_embeddings?)(\.|$)")


def decayed_parameters(model: nn.Module) -> list[str]:
    """The names of all matrices but tokens, tables, embeddings; so of neither biases nor norms, which are vectors."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in embeddings and not UNDECAYED_NAMES.search(name)
    ]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Random numbers from `seed` inside, on the CPU and `device`; outside they go on as if nothing had been drawn."""
    generators = [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]
    states = [generator.get_rng_state() for generator in generators]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)


class StepSeeds(TrainerCallback):
    """Random numbers (masks, noise, drop path) from seed, step and rank alone, never from the draws so far.

    So a run that is resumed draws what it would have drawn, and no two ranks draw the same masks.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        key = random.Random(f"{args.seed}/{state.global_step}/{args.process_index}")
        torch.manual_seed(key.getrandbits(63))


class DatasetEpoch(TrainerCallback):
    """Tells the training data which epoch begins, so that its crops can depend on (seed, epoch, index) alone.

    Accelerate does this for streams, but for map-style data only in a single process and until a resume skips batches.
    """

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if has_length(self.train_dataset) and hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.train_dataset, ImageStream):  # its passes end at other steps for each worker
            state.epoch = state.global_step / state.max_steps


class BrokenImages(TrainerCallback):
    """Stops the run, at the next log, when more than 1 % of the images cannot be decoded.

    The workers skip them and name each one. Of map-style data each process reads only its share, so they put their
    lists together; of a stream each process judges its own part.
    """

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_log(self, args, state, control, **kwargs):
        data = self.train_dataset
        if not hasattr(data, "num_broken"):
            return
        if args.world_size == 1 or not has_length(data):
            return check_broken(data)
        names = sorted(set(gather_object(data.broken())))
        if len(names) > MAX_BROKEN * len(data):
            raise BrokenImagesError(
                f"{len(names)} of {len(data)} images cannot be decoded; repair or remove them: {', '.join(names[:20])}"
            )


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
        model = _whole(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).base_model)
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


def _whole(model: nn.Module) -> nn.Module:
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


class Throughput(TrainerCallback):
    """Training images per second between two readings; evaluating and saving do not count as training time."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self.images, self.seconds, self.waiting, self.mark = 0, 0.0, 0.0, time.perf_counter()

    def _lap(self):
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    @contextlib.contextmanager
    def waits(self):
        """What happens inside is waiting for data."""
        start = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - start

    def read(self, device: torch.device) -> dict[str, float]:
        """Since the last reading: images per second, of all processes together; of this one, its seconds of training,
        those of them that it has waited for data, and its most memory on the device in GiB (on a CPU, what the process
        has now)."""
        self._lap()
        found = {"images_per_second": self.images / self.seconds}
        found |= {"seconds": self.seconds, "data_wait_seconds": self.waiting}
        if device.type == "cpu":
            found["memory_gib"] = psutil.Process().memory_info().rss / 2**30
        else:
            found["device_memory_gib"] = torch.accelerator.max_memory_allocated(device) / 2**30
            torch.accelerator.reset_peak_memory_stats(device)
        self._restart()
        return found

    def on_train_begin(self, args, state, control, **kwargs):
        self._restart()

    def on_step_end(self, args, state, control, **kwargs):
        self._lap()

    def restart_clock(self):
        """What has passed since the last step was no training."""
        self.mark = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self.restart_clock()

    def on_save(self, args, state, control, **kwargs):
        self.restart_clock()


class MIMProgress(ProgressCallback):
    """Trainer's progress bar, with the loss and the images per second on it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "images_per_second" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, {logs['images_per_second']:.0f} images/s")


class MetricsFile(TrainerCallback):
    """`metrics.jsonl` in the run folder: a line for each entry of the log, with its step and time (Unix seconds).

    A resumed run takes back the lines after the step that it goes on from.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / "metrics.jsonl"
        if not state.is_world_process_zero or not path.exists():
            return
        with _unless_the_disk_is_full(path):
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= state.global_step]
            aside = path.with_name("_metrics.jsonl")
            aside.write_text("".join(f"{line}\n" for line in lines))
            os.replace(aside, path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / "metrics.jsonl"
        entry = {"step": state.global_step, "time": round(time.time(), 3)} | {k: _plain(v) for k, v in logs.items()}
        with _unless_the_disk_is_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def _plain(value):
    """JSON has no word for a number that is not finite: null."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _step_of(line: str) -> float:
    """That of a line of metrics.jsonl; of half a line, which a kill can leave, infinity."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextlib.contextmanager
def _unless_the_disk_is_full(path: Path):
    """A log that cannot be written is no reason to end a run."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)
