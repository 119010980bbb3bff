"""The collapse alarm: it warns when the targets of a run no longer tell images apart, and says what to change first.

The limit of `target_std` is 0.2, chosen by the lowest value in each of our runs. Healthy runs on the digits and
CIFAR-10 (width 32 to 128, batch 4 to 128) have 0.27 (StoP-JEPA and I-JEPA) and 0.43 (Latent MIM). Runs that collapse
have 0.08 to 0.18 (StoP-JEPA without momentum) and 0.13 to 0.17 (Latent MIM without gap, discrimination and similarity
term). SymMIM has 0.65 in healthy runs on the digits (width 64), and 0.004 to 0.056 at 5,000 times the rate of its
recipe. Fresh weights, up to ViT-Base, begin at 0.56 to 0.74. The alarm does not see a partial collapse (0.29 to 0.36,
at widths 32 and 64). `target_cosine` and `error_over_constant` are logged and quoted but do not decide, because they
overlap: healthy runs show 0.97 and values above 1 too. `probe_std_mean` of StoP-JEPA's digits recipe falls to 0.037 and
recovers; without momentum it falls to 0.012.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object
from transformers import TrainerCallback

from hf_mim import methods

logger = logging.getLogger(__name__)

# Below this share of their size, targets have never told images apart, also if they began there: 0 is for images that
# are all alike. It lies far below 0.08, the lowest value of the runs that collapsed.
NEVER_APART = 0.02


@dataclass(frozen=True)
class Condition:
    """Holds when a logged value is below `limit` and below `share` of its value at the start of the run.

    Both are needed, because an untrained encoder may begin low, which is no collapse. Below `floor` it holds anyway.
    """

    name: str
    limit: float
    share: float
    says: str
    floor: float = 0.0


CONDITIONS = (
    Condition("target_std", 0.2, 0.4, "the targets collapse", NEVER_APART),
    # Stricter than the limits of `evaluation.health`, because healthy runs of small models fall below those.
    Condition("probe_std_mean", 0.02, 0.25, "the features collapse onto one vector"),
    Condition("probe_effective_rank", 1.5, 0.5, "the features collapse onto one direction"),
)
# Condition → the values beside it in the log that the warning quotes.
WITNESSES = {
    "target_std": ("target_cosine", "target_position_share", "error_over_constant"),
    "probe_std_mean": ("probe_mean_cosine", "probe_rank_me"),
    "probe_effective_rank": ("probe_rank_me", "probe_mean_cosine"),
}
PATIENCE = 2  # logs in a row that begin or end a condition, so that one noisy log does neither
POSITION_ONLY = 0.9  # above this share of variance, the targets tell only the place of a patch


def held_since(series: list[tuple[int, float]], condition: Condition) -> list[int | None]:
    """For each (step, value) of a run: the step since which the condition holds at this time, or None."""
    bound = max(min(condition.limit, condition.share * series[0][1]), condition.floor)
    since, against, verdicts = None, [], []
    for step, value in series:
        against = [*against, step] if (value < bound) == (since is None) else []
        if len(against) == PATIENCE:
            since, against = against[0] if since is None else None, []
        verdicts.append(since)
    return verdicts


class CollapseAlarm(TrainerCallback):
    """Warns in one line when the targets or the probed features collapse, and again if they recover and collapse again.

    It judges what is in the log anyway: the signals in the model's `metrics` (`models.signals.target_signals`), and the
    health that `OnlineProbe` logs. It reads `state.log_history`, so a resumed run goes on as if it had not stopped. It
    writes `collapsed`, 0 or 1, beside the signals into that history and into the log.

    Args:
        stop: end the run, with a checkpoint, at a log that shows a collapse (`--stop_on_collapse`).
    """

    def __init__(self, stop: bool = False):
        self.stop = stop

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        entry = state.log_history[-1]  # Trainer has put the log there, and its step
        collapsed = False
        for condition in CONDITIONS:
            seen = _judged(state.log_history, condition)
            if not seen or seen[-1] is not entry:
                continue
            before, since = [None, *held_since([(e["step"], e[condition.name]) for e in seen], condition)][-2:]
            if since is None:
                continue
            collapsed = True
            if before is None and state.is_world_process_zero:
                logger.warning(warning_text(condition, seen[0], entry, since, model.config, args))
        if "target_std" in logs:
            logs["collapsed"] = entry["collapsed"] = float(collapsed)
        if self.stop and any(gather_object([collapsed])):  # each process has probed for itself: all stop, or none
            control.should_save = control.should_training_stop = True


def verdicts(history: Sequence[dict]) -> tuple[list[str], list[str]]:
    """What the alarm says of a whole log, in sentences: (what is collapsed at its end, what was and recovered)."""
    now, before = [], []
    for condition in CONDITIONS:
        seen = _judged(history, condition)
        since = held_since([(e["step"], e[condition.name]) for e in seen], condition) if seen else []
        if since and since[-1] is not None:
            now.append(finding(condition, seen[0], seen[-1], since[-1]))
        elif held := [step for step in since if step is not None]:
            what = condition.says.replace("collapse", "collapsed", 1)
            before.append(f"From step {held[0]} {what}, and recovered later.")
    return now, before


def is_judged(history: Sequence[dict]) -> bool:
    """Whether a log has a value by which the alarm judges."""
    return any(_judged(history, condition) for condition in CONDITIONS)


def _judged(history: Sequence[dict], condition: Condition) -> list[dict]:
    """The entries with a value. The training itself deals with values that are not finite."""
    return [entry for entry in history if math.isfinite(entry.get(condition.name, math.nan))]


def warning_text(condition: Condition, start: dict, entry: dict, since: int, model_config, args) -> str:
    """The warning: what was seen, since when, and what to change first."""
    text = finding(condition, start, entry, since)
    return text if start[condition.name] < condition.floor else text + advice(model_config, args)


def finding(condition: Condition, start: dict, entry: dict, since: int) -> str:
    """What was seen, and since when."""
    says = condition.says
    if start[condition.name] < condition.floor:
        return (
            f"The targets have never told images apart: {condition.name} {start[condition.name]:.3g} at step "
            f"{start['step']} and {entry[condition.name]:.3g} at step {entry['step']}. Look at the images first: are "
            "they all alike, or blank? Then at their value_range, image_mean and image_std."
        )
    if condition.name == "target_std":
        position_only = entry.get("target_position_share", 0) > POSITION_ONLY
        says += ": they tell the place of a patch and not the image" if position_only else ": they are nearly constant"
    seen = ", ".join(
        f"{name} {entry[name]:.3g} (at step {start['step']}: {start[name]:.3g})"
        for name in (condition.name, *WITNESSES[condition.name])
        if name in entry and name in start
    )
    return f"Since step {since} {says}. At step {entry['step']}: {seen}."


def advice(config, args) -> str:
    """What to change first, with this run's values. Empty if the method's row has no advice."""
    try:
        settings = methods.of_config(config).advice
    except ValueError as error:  # a model whose method is not in the table can be trained too
        return f" There is no advice: {error}."
    if not settings:
        return ""
    values = {name: getattr(config, name) if hasattr(config, name) else getattr(args, name) for name in settings}
    return f" {first_changes(settings, values)}"


def first_changes(settings: Mapping[str, str], values: Mapping) -> str:
    """What to change first: `settings` are those of a method's `advice`, `values` the run's."""
    changes = "; ".join(f"{name} {better}, now {values.get(name)}" for name, better in settings.items())
    return f"Try first: {changes}."
