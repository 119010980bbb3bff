"""The collapse alarm: says when the targets of a run no longer tell images apart, and what to change first.

Lowest `target_std` seen, limit 0.2: in healthy runs on the digits and CIFAR-10 (width 32 to 128, batch 4 to 128) 0.27
for StoP-JEPA and I-JEPA, 0.43 for Latent MIM; in runs that collapse, 0.08 to 0.18 for StoP-JEPA without momentum, 0.13
to 0.17 for Latent MIM without gap, discrimination and similarity term. Fresh weights, up to ViT-Base, begin at 0.56 to
0.74. `target_cosine` and `error_over_constant` overlap (0.97 and above 1 are seen in healthy runs), so they are logged
and quoted, and do not decide. Partial collapse (0.29 to 0.36, at widths 32 and 64) is not called. `probe_std_mean` of
the digits recipe of StoP-JEPA falls to 0.037 and recovers, and to 0.012 without momentum.
"""

import logging
import math
from dataclasses import dataclass

from accelerate.utils import gather_object
from transformers import TrainerCallback

from hf_mim import methods

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Condition:
    """A value of the log that falls below `limit` and below `share` of what it was at the start of the run.

    Both are needed: an untrained encoder may begin low, which is no collapse.
    """

    name: str
    limit: float
    share: float
    says: str

    def bound(self, start: float) -> float:
        return min(self.limit, self.share * start)


CONDITIONS = (
    Condition("target_std", 0.2, 0.4, "the targets collapse"),
    # Stricter than the limits of `evaluation.health`, which healthy runs of small models pass.
    Condition("probe_std_mean", 0.02, 0.25, "the features collapse onto one vector"),
    Condition("probe_effective_rank", 1.5, 0.5, "the features collapse onto one direction"),
)
# Logged beside it, for the warning to quote.
WITNESSES = {
    "target_std": ("target_cosine", "target_position_share", "error_over_constant"),
    "probe_std_mean": ("probe_mean_cosine", "probe_rank_me"),
    "probe_effective_rank": ("probe_rank_me", "probe_mean_cosine"),
}
PATIENCE = 2  # logs in a row that begin a condition, and that end it: one noisy log does neither
POSITION_ONLY = 0.9  # the share of variance from which on the place is said to be all that the targets tell


def held_since(series: list[tuple[int, float]], condition: Condition) -> list[int | None]:
    """For each of a run's (step, value): the step since which the condition holds by then, or None."""
    bound, since, against, verdicts = condition.bound(series[0][1]), None, [], []
    for step, value in series:
        against = [*against, step] if (value < bound) == (since is None) else []
        if len(against) == PATIENCE:
            since, against = against[0] if since is None else None, []
        verdicts.append(since)
    return verdicts


class CollapseAlarm(TrainerCallback):
    """Warns, in one line, when the targets or the probed features collapse, and when they do again after a recovery.

    It judges what is in the log anyway: the signals of the model's `metrics` (`models.signals.target_signals`), and the
    health that `OnlineProbe` logs. All of it follows from `state.log_history`, so a resumed run goes on as if it had
    not stopped. It writes `collapsed`, 0 or 1, beside the signals into that history and into the log.

    Args:
        stop: end the run, with a checkpoint, at a log that shows a collapse (`--stop_on_collapse`).
    """

    def __init__(self, stop: bool = False):
        self.stop = stop

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        entry = state.log_history[-1]  # Trainer has put the log there, with its step
        collapsed = False
        for condition in CONDITIONS:
            # What is not finite is left to the training to deal with.
            seen = [e for e in state.log_history if math.isfinite(e.get(condition.name, math.nan))]
            if not seen or seen[-1] is not entry:
                continue
            before, since = [None, *held_since([(e["step"], e[condition.name]) for e in seen], condition)][-2:]
            if since is None:
                continue
            collapsed = True
            if before is None and state.is_world_process_zero:
                logger.warning(describe(condition, seen[0], entry, since, model.config, args))
        if "target_std" in logs:
            logs["collapsed"] = entry["collapsed"] = float(collapsed)
        if self.stop and args.world_size > 1:  # each process has probed for itself: all stop, or none
            collapsed = any(gather_object([collapsed]))
        if self.stop and collapsed:
            control.should_save = control.should_training_stop = True


def describe(condition: Condition, start: dict, entry: dict, since: int, model_config, args) -> str:
    """The warning: what was seen, since when, and what to change first."""
    says = condition.says
    if condition.name == "target_std":
        position_only = entry.get("target_position_share", 0) > POSITION_ONLY
        says += ": they tell the place of a patch and not the image" if position_only else ": they are nearly constant"
    seen = ", ".join(
        f"{name} {entry[name]:.3g} (at step {start['step']}: {start[name]:.3g})"
        for name in (condition.name, *WITNESSES[condition.name])
        if name in entry and name in start
    )
    text = f"Since step {since} {says}. At step {entry['step']}: {seen}."
    return text + advice(model_config, args)


def advice(config, args) -> str:
    """What to change first, beside what it is in this run; nothing if the method's row has no advice."""
    try:
        settings = methods.of_config(config).advice
    except ValueError as error:  # a model that is not in the table can be trained too
        return f" There is no advice: {error}."
    if not settings:
        return ""
    values = {name: getattr(config, name) if hasattr(config, name) else getattr(args, name) for name in settings}
    changes = "; ".join(f"{name} {better}, here {values[name]}" for name, better in settings.items())
    return f" What users change first: {changes}."
