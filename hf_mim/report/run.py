"""What the report tells of a run: sentences, tables and pictures. Nothing here knows of HTML."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from hf_mim import methods
from hf_mim.companions import ENDS
from hf_mim.evaluation import PROTOCOLS
from hf_mim.evaluation.health import MEASURES
from hf_mim.evaluation.result import LONGEST_TABLE
from hf_mim.hub.card import dataset_name, recipe_text, size_text, source_text, training_data
from hf_mim.hub.card_text import plain, words
from hf_mim.hub.measured import Measured, headline, measurements, table, verdict
from hf_mim.pretraining.collapse import first_changes, is_judged, verdicts
from hf_mim.run_folder import CONFIG, CURVE, RESULTS, RunFacts, checkpoints, picture_path, picture_steps, pictures
from hf_mim.runs import Run
from hf_mim.scrub import last_name
from hf_mim.visualize.captions import CAPTIONS
from hf_mim.visualize.curves import plot_training

MOST_STEPS = 4  # whose pictures are shown, beside those of the end
MOST_CLASSES = 100


@dataclass
class Shown:
    """A picture: title, if it has none in itself; figure or file; what it shows in words."""

    title: str
    picture: Figure | Path
    alt: str


@dataclass
class InFull:
    """A measurement with its protocol, for a folded part of the page."""

    measured: Measured
    tables: dict[str, list[dict]]
    confusion: list[Shown]


@dataclass
class About:
    """All that a report tells of a run.

    facts: label → what was trained on what, in words.
    went, worries, health, compared: sentences. health_table: a row for each measure.
    results: the rows for readers. in_full: the same with all their settings.
    drawn: the last pictures. drawn_at: their step; None: the end. earlier: step → pictures.
    """

    name: str
    state: str
    is_at: str
    facts: dict[str, str]
    went: list[str]
    curves: Shown
    worries: list[str]
    health: list[str]
    health_table: list[dict]
    compared: list[str]
    results: list[dict]
    in_full: list[InFull] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    drawn: list[Shown] = field(default_factory=list)
    drawn_at: int | None = None
    earlier: dict[int, list[Shown]] = field(default_factory=dict)
    recipe: str = ""


def describe(run: Run, name: str) -> About:
    """Read what the folder of a run holds by now. Raises ValueError for a damaged file."""
    facts = RunFacts.read(run.folder) if (run.folder / CONFIG).is_file() else None
    rows = measurements(facts) if facts else []
    own = [row for row in rows if not row.note]
    worries, health, health_table = _health(run, facts)
    went = list(_went(run))
    curves = Shown("", plot_training(run.log), f"Curves over the optimizer steps. {' '.join(went)}")
    measured = facts.measured if facts else set()
    drawn, drawn_at, earlier = list(_drawn(run.folder)), None, _earlier(run.folder)
    if not drawn and earlier:
        drawn_at = max(earlier)
        drawn = earlier.pop(drawn_at)
    dataset = dataset_name(run.recipe, facts.training if facts else None)
    return About(
        name=name,
        state=run.state,
        is_at=_is_at(run),
        facts=dict(_facts(run, facts)),
        went=went,
        curves=curves,
        worries=worries,
        health=health,
        health_table=health_table,
        compared=[text for text in (headline(own), verdict(own)) if text],
        results=table(own),
        in_full=[_in_full(run.folder, row) for row in rows],
        not_measured=[protocol for protocol in PROTOCOLS if protocol not in measured],
        drawn=drawn,
        drawn_at=drawn_at,
        earlier=earlier,
        recipe=recipe_text(run.recipe, dataset) if run.recipe else "",
    )


def _is_at(run: Run) -> str:
    step = f"step {run.step:,}{f' of {run.max_steps:,}' if run.max_steps else ''}"
    if run.state == "running":
        return f"It trains now and is at {step}."
    if run.state == "ended":
        return f"The training has ended, after {step}."
    more = ", and hf-mim pretrain --resume goes on from its last checkpoint" if checkpoints(run.folder) else ""
    return f"The training has stopped at {step}{more}."


def _facts(run: Run, facts: RunFacts | None) -> Iterator[tuple[str, str]]:
    """What was trained on what. A fact that is not known is left out."""
    recipe, training = run.recipe, facts.training if facts else None
    if recipe.get("method"):
        row = _method(run)
        yield "Method", row.title if row else words(recipe["method"])
    width, depth, heads = (recipe.get(f"{x}") for x in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if width and depth:
        yield "Encoder", words(f"ViT, width {width}, depth {depth}, {heads} heads")
    if recipe.get("image_size"):
        channels, size, patch = recipe.get("num_channels"), recipe["image_size"], recipe.get("patch_size")
        yield "Input", words(f"{size_text(size)} pixels, channels: {channels}, patches of {size_text(patch)}")
    if modalities := recipe.get("modalities"):
        yield "Channels of modalities", words(dict(modalities))
    if recipe.get("dataset"):
        yield "Images", training_data(recipe, dataset_name(recipe, training), training)
    if training and training.data.get("nodata"):
        yield "Without data", words(training.data["nodata"])
    for name, title in {"init_from": "Started from", "target_from": "Frozen target"}.items():
        if recipe.get(name):
            yield title, source_text(recipe, name)
    if recipe.get("continue_from"):
        yield "Continued from", words(last_name(recipe["continue_from"]))
    if run.images_per_step > 1:
        yield "Images per step", f"{run.images_per_step:,.0f}"
        yield "Images seen", f"{run.step * run.images_per_step:,.0f}"
    if rates := [rate for entry in run.log if isinstance(rate := entry.get("learning_rate"), float)]:
        yield "Highest learning rate", f"{max(rates):.3g}"
    if seconds := sum(entry.get("seconds") or 0 for entry in run.log):
        yield "Time in steps", f"{seconds / 60:,.1f} minutes"
    if training:
        yield "Device", words(training.device)
        yield "Precision", words(training.settings.get("precision"))
        yield "Processes", words(training.settings.get("processes"))
    if facts and facts.license:
        yield "Licence", words(facts.license)


def _method(run: Run) -> methods.Method | None:
    try:
        return methods.get(str(run.recipe.get("method")))
    except ValueError:  # a method of a module that was not imported
        return None


def _went(run: Run) -> Iterator[str]:
    """How the training went, in sentences."""
    if loss := list(run.curve("loss").values()):
        yield f"The loss went from {loss[0]:.4g} to {loss[-1]:.4g}."
    else:
        yield "No loss was logged yet."
    if error := list(run.curve("error_over_constant").values()):
        found = "less than 1, so it has learned something" if error[-1] < 1 else "1 or more, so it has learned nothing"
        yield f"The error is {error[-1]:.3g} times that of the best constant prediction: {found} about its targets."
    if probe := list(run.curve("probe_knn").values()):
        told = f"The probe's k-NN accuracy went from {100 * probe[0]:.1f} % to {100 * probe[-1]:.1f} %"
        yield f"{told}; its best was {100 * max(probe):.1f} %."
    if rank := list(run.curve("probe_rank_me").values()):
        yield f"The directions that the features fill (RankMe) went from {rank[0]:.3g} to {rank[-1]:.3g}."


def _health(run: Run, facts: RunFacts | None) -> tuple[list[str], list[str], list[dict]]:
    """Worries, other sentences about the health of the features, and a row for each measure."""
    worries, said = verdicts(run.log)
    if worries and (method := _method(run)) and method.advice:
        worries.append(first_changes(method.advice, run.recipe))
    if not worries and not said and is_judged(run.log):
        said = ["The collapse alarm has seen no collapse in the log."]
    if facts and facts.health:
        notes = [plain(note) for note in facts.health.notes]
        worries += [note for note in notes if note.startswith("Worry")]
        said += [note for note in notes if note not in worries]
        return worries, said, [_measure(row) for row in facts.health.table if row.get("measure")]
    rows = []
    for measure in MEASURES:
        values = list(run.curve(f"probe_{measure.name}").values())
        if values:
            ends = {"at the last probe": values[-1], "at the first": values[0]}
            rows.append(
                {"measure": measure.name} | ends | {"worry": measure.worry(values[-1]), "meaning": measure.meaning}
            )
    past = [row["measure"] for row in rows if row["worry"] == "yes"]
    if past:
        worries.append(f"Worry: {', '.join(past)}.")
    elif rows:
        said.append("No measure of the probe is past its limit.")
    return worries, said or ([] if worries else ["Not measured yet."]), [_measure(row) for row in rows]


def _measure(row: dict) -> dict:
    return row | {"measure": words(row["measure"]).replace("_", " ")}


def _in_full(folder: Path, row: Measured) -> InFull:
    tables = {"Numbers": row.numbers, "Protocol": [{"setting": x, "value": words(y)} for x, y in row.settings.items()]}
    confusion = []
    for column, (name, result) in row.results.items():
        about = f" ({column})" if len(row.results) > 1 else ""
        if 0 < len(result.classes) <= MOST_CLASSES:
            tables[f"Classes{about}"] = result.classes
        if 0 < len(result.table) <= LONGEST_TABLE:
            tables[f"Details{about}"] = result.table
        path = folder / RESULTS / f"{name.removesuffix('.json')}{ENDS[2]}"
        if path.is_file():
            alt = f"Which classes were taken for which others{about}: a row for each class, the diagonal is right"
            confusion.append(Shown(f"Confusion of the classes{about}", path, alt))
    return InFull(row, tables, confusion)


def _drawn(folder: Path, step: int | None = None) -> Iterator[Shown]:
    """The pictures of the end or of a step. The curves are drawn anew from the log."""
    place = folder if step is None else picture_path(folder, "any", step).parent
    for name, path in pictures(place).items():
        if step is not None or path.name != CURVE:
            title = "" if name in CAPTIONS else plain(name)
            yield Shown(title, path, f"{CAPTIONS.get(name, f'The picture {plain(name)}')}.")


def _earlier(folder: Path) -> dict[int, list[Shown]]:
    """Pictures of a few of the steps that have some, the first and the last among them."""
    steps = picture_steps(folder)
    if len(steps) > MOST_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    return {step: found for step in steps if (found := list(_drawn(folder, step)))}
