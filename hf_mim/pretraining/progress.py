"""What a training shows while it runs: one line that is written over in a terminal or a notebook, else one per log."""

import time

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from hf_mim.progress import watched

UNITS = ("days", 86400), ("h", 3600), ("min", 60)


def duration(seconds: float) -> str:
    """Seconds in words with two digits, such as 3 min, 1.5 h or 12 days."""
    for unit, length in UNITS:
        if seconds >= 1.5 * length:
            count = seconds / length
            return f"{count:.1f} {unit}" if count < 9.95 and unit != "min" else f"{count:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"


def short(number: float) -> str:
    """A number with two digits, such as 9.4e-6."""
    return f"{number:.2g}".replace("e-0", "e-")


class MIMProgress(ProgressCallback):
    """Shows step, loss, rate, images per second, the share of waiting for images, the time left and the last probe.

    Somebody who watches sees one bar with them. Without a terminal or a notebook, or with `disable_tqdm`, each log is a
    line. The time left follows from the time since the first log, in which probes and checkpoints count too.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.probe = None, ""
        self.shows_bar = watched() and not args.disable_tqdm
        if state.is_world_process_zero and self.shows_bar:
            about = dict(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
            self.training_bar = tqdm(**about, bar_format="step {n_fmt} of {total_fmt} {bar} {desc}")
        self.current_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.disable_tqdm and watched():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        facts = facts_of(logs)
        if "loss" in logs:
            now = time.perf_counter(), state.global_step
            if self.first and self.first[1] < now[1] < state.max_steps:
                each = (now[0] - self.first[0]) / (now[1] - self.first[1])
                facts.append(f"{duration(each * (state.max_steps - now[1]))} left")
            self.first = self.first or now
        elif any(name.startswith("probe_") for name in logs):
            self.probe = " · ".join(facts)
        if self.training_bar is not None:
            if "loss" in logs:
                self.training_bar.set_description_str(" · ".join(filter(None, (*facts, self.probe))))
        elif facts:
            print(" · ".join([f"step {state.global_step:,} of {state.max_steps:,}", *facts]), flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def facts_of(logs: dict[str, float]) -> list[str]:
    """What one log says, in words."""
    if "train_runtime" in logs:
        return [f"trained for {duration(logs['train_runtime'])}"]
    facts = [f"loss {logs['loss']:.4g}"] if "loss" in logs else []
    if "learning_rate" in logs:
        facts.append(f"rate {short(logs['learning_rate'])}")
    if "images_per_second" in logs:
        facts.append(f"{logs['images_per_second']:,.0f} images/s")
        facts.append(f"{100 * logs['data_wait_share']:.0f} % waiting")
    facts += [f"{logs[name]} {name.replace('_', ' ')}" for name in ("skipped_steps", "broken_images") if name in logs]
    if "probe_knn" in logs:
        facts.append(f"probe: k-NN {100 * logs['probe_knn']:.1f} %")
    if "probe_rank_me" in logs:
        facts.append(f"{'' if 'probe_knn' in logs else 'probe: '}RankMe {logs['probe_rank_me']:.1f}")
    return facts + ([f"eval_loss {logs['eval_loss']:.4g}"] if "eval_loss" in logs else [])
