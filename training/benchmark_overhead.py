"""`training/benchmark.py overhead`: what guarding, watching and logging a run costs its steps."""

import statistics
import tempfile
import time


def add_overhead(subcommands):
    parser = subcommands.add_parser("overhead", help="training steps with and without guard, alarm and metrics.jsonl")
    parser.add_argument("--methods", nargs="+", default=["mae", "latent_mim", "stop_jepa"])
    parser.add_argument("--size", default="small")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=60, help="neighbouring steps, one with and one without")
    parser.set_defaults(run=benchmark_overhead)


def benchmark_overhead(args) -> dict:
    """One training of each method, every other step of which has none of what watches it: no votes, no signals of
    collapse, no keyed random numbers, no target update that can be skipped, no alarm and no metrics.jsonl.

    Neighbours are compared, so that what else the machine does falls on both; the median of their ratios counts. Each
    step is logged, where a run logs every 50th: the overhead of a run is lower.
    """
    result = {"settings": {k: v for k, v in vars(args).items() if k not in ("run", "json")}, "overhead": {}}
    print(f"{'':12}{'with, ms':>12}{'without, ms':>14}{'overhead':>12}")
    for method in args.methods:
        seconds = step_seconds(method, args)[4:]  # a warm-up
        pairs = list(zip(seconds[0::2], seconds[1::2], strict=True))
        watched, plain = (statistics.median(each) for each in zip(*pairs, strict=True))
        ratios = sorted(a / b - 1 for a, b in pairs)
        overhead = statistics.median(ratios)
        spread = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
        print(f"{method:12}{1000 * watched:12.1f}{1000 * plain:14.1f}{100 * overhead:10.2f} %")
        result["overhead"][method] = {"with": watched, "without": plain, "overhead": overhead, "quartiles": spread}
    return result


def step_seconds(method: str, args) -> list[float]:
    """Of each step with its log: the even ones are watched, the odd ones not."""
    import torch
    from transformers import TrainerCallback

    from hf_mim import methods
    from hf_mim.pretraining.trainer import MIMTrainer, MIMTrainingArguments

    class EveryOther(TrainerCallback):
        """Before all others at the beginning of a step."""

        def __init__(self):
            self.marks = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.marks.append(time.perf_counter())
            (watch if state.global_step % 2 == 0 else unwatch)()

    class SameMasks(TrainerCallback):
        """After all others: the steps of a pair draw alike. (StoP-JEPA's masks differ in size, its steps in time.)"""

        def on_step_begin(self, args, state, control, **kwargs):
            torch.manual_seed(state.global_step // 2)

    config = make_config(methods.get(method).config_class, args)
    images = torch.randint(0, 256, (64, 3, *config.training_size), dtype=torch.uint8)
    model = make_model(method, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = MIMTrainingArguments(
            output_dir=folder,
            max_steps=2 * args.pairs + 5,
            per_device_train_batch_size=args.batch_size,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-5,
        )
        clock = EveryOther()
        trainer = MIMTrainer(model, arguments, TensorImages(images), augment=to_float, callbacks=[clock])
        trainer.add_callback(SameMasks())
        trainer.callback_handler.callbacks = [
            callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ != "PrinterCallback"
        ]
        watch, unwatch = switches(trainer)
        trainer.train()
    return [later - earlier for earlier, later in zip(clock.marks, clock.marks[1:], strict=False)]


def make_config(config_class, args):
    return config_class(size=args.size, image_size=args.image_size, patch_size=args.patch_size)


def make_model(method: str, config):
    from transformers import AutoModelForPreTraining

    import hf_mim  # noqa: F401 (registers the models)

    return AutoModelForPreTraining.from_config(config)


def to_float(pixels):
    return pixels.float().div_(127.5).sub_(1)


class TensorImages:
    """Images in memory: loading is measured by `benchmark.py data`."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def switches(trainer):
    """Functions that switch all that watches a run on, and off."""
    from hf_mim.models import modeling_latent_mim, modeling_stop_jepa
    from hf_mim.pretraining.callbacks import MetricsFile
    from hf_mim.pretraining.collapse import CollapseAlarm
    from hf_mim.trainer_utils import StepSeeds

    def nothing(*args, **kwargs):
        return None

    off = {(trainer.guard, name): nothing for name in ("watch", "on_pre_optimizer_step", "on_step_end")}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MetricsFile | CollapseAlarm):
            off[callback, "on_log"] = nothing
        if isinstance(callback, StepSeeds):
            off[callback, "on_step_begin"] = nothing
    for module in (modeling_latent_mim, modeling_stop_jepa):
        off[module, "target_signals"] = lambda *args: {}
        off[module, "error_over_constant"] = lambda predictions, targets: targets.new_zeros(())
    on = {(thing, name): getattr(thing, name) for thing, name in off}

    def watch():
        for (thing, name), function in on.items():
            setattr(thing, name, function)

    def unwatch():
        for (thing, name), function in off.items():
            setattr(thing, name, function)
        trainer.guard.skip = None
        if hasattr(trainer.optimizer.optimizer, "found_inf"):
            del trainer.optimizer.optimizer.found_inf

    return watch, unwatch
