"""Pretraining runs as they are now, finished or not: one line each, or several side by side.

from hf_mim.runs import Run, compare, find_runs  # hf_mim.pretrain returns a Run

runs = [Run.read("runs/mae"), Run.read("runs/stop")]
print(compare(runs).text())
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from hf_mim.comparison import COLORS, MARKERS
from hf_mim.data.stacks import ZERO
from hf_mim.evaluation.result import Result, format_number, format_table
from hf_mim.files import replacing
from hf_mim.hub.card import OF_THE_MACHINE
from hf_mim.hub.card_text import markdown_table, shown
from hf_mim.lock import LockedError, check_unlocked
from hf_mim.models.configuration_vit import SIZES
from hf_mim.run_folder import CONFIG, RECIPE, RunFacts, checkpoints, read_log, read_recipe, step_of
from hf_mim.scrub import last_name
from hf_mim.visualize.curves import plot_training
from hf_mim.visualize.style import GRID, INK, MUTED, Picture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the picture shows: name in the log → label.
CURVES = {"loss": "loss", "probe_knn": "probe: k-NN accuracy", "probe_rank_me": "probe: RankMe"}
# Settings that follow from others, or say where a run lies.
NOT_COMPARED = ("test_dataset_fingerprint", "dataset_fingerprint", "resume", "disable_tqdm", "save_", "license")


@dataclass(frozen=True)
class Run:
    """A run folder. `recipe` and `log` may be of a run that trains at this moment.

    log: the entries of the training's log, oldest first.
    """

    folder: Path
    recipe: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Raises ValueError if the folder holds no run, or a damaged one."""
        folder = Path(folder)
        recipe, log = read_recipe(folder), read_log(folder)
        if not recipe and not log:
            raise ValueError(f"RUN must be a folder that hf-mim pretrain has written, and {folder} holds no {RECIPE}")
        return cls(folder, recipe, log)

    def __fspath__(self) -> str:
        """A run may stand wherever its folder may."""
        return str(self.folder)

    @property
    def step(self) -> int:
        """The last optimizer step that was logged or saved."""
        saved = [step_of(path) for path in checkpoints(self.folder)[:1]]
        return max([entry.get("step", 0) for entry in self.log] + saved, default=0)

    @property
    def max_steps(self) -> int | None:
        """How many steps the run is to make, if it is known."""
        steps = self.recipe.get("max_steps")
        if isinstance(steps, int) and steps > 0:
            return steps
        epoch = max((entry.get("epoch") or 0 for entry in self.log), default=0)
        epochs = self.recipe.get("num_train_epochs")
        return round(self.step * epochs / epoch) if epoch and self.step and epochs else None

    @cached_property
    def state(self) -> str:
        """running: a process writes into the folder; ended: all steps are made; stopped: some are missing."""
        try:
            check_unlocked(self.folder, "RUN", logging.getLogger(__name__).warning)
        except LockedError:
            return "running"
        if any("train_runtime" in entry for entry in self.log[-3:]) and self.step >= (self.max_steps or 0):
            return "ended"
        return "stopped"

    @property
    def size(self) -> str:
        """The name of the size, or width×depth."""
        width, depth = self.recipe.get("hidden_size"), self.recipe.get("num_hidden_layers")
        if width is None or depth is None:
            return str(self.recipe.get("size", ""))
        return next((name for name, size in SIZES.items() if size[:2] == (width, depth)), f"{width}×{depth}")

    @property
    def images_per_step(self) -> float:
        """Images of an optimizer step on all processes; 1 if nothing was logged."""
        counts, before = [], 0
        for entry in self.log:
            if "images_per_second" in entry and entry.get("seconds") and entry["step"] > before:
                counts.append(entry["images_per_second"] * entry["seconds"] / (entry["step"] - before))
                before = entry["step"]
        return round(median(counts)) if counts else 1

    def curve(self, name: str) -> dict[int, float]:
        """Images seen → what was logged under a name."""
        found = {entry["step"]: entry[name] for entry in self.log if isinstance(entry.get(name), int | float)}
        return {step * self.images_per_step: value for step, value in sorted(found.items())}

    @cached_property
    def results(self) -> dict[str, float]:
        """Protocol, data and options → value, of the results of these weights."""
        if not (self.folder / CONFIG).is_file():
            return {}
        facts = RunFacts.read(self.folder)
        named = {name: result for name, result in facts.own_results.items() if result.value is not None}
        values = {_result_name(name, result): result.value for name, result in named.items()}
        return values | ({"health: RankMe": facts.health.value} if facts.health else {})

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The encoder of the run folder, in eval mode, as `AutoModel` loads it. Loaded when it is first asked for."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder).eval()

    def plot(self) -> Picture:
        """The loss over optimizer steps, and what else was logged. A notebook shows it; `.save(FILE)` keeps it."""
        return plot_training(self.log, self.folder.name)

    @cached_property
    def line(self) -> dict[str, Any]:
        """The row of a list of runs."""
        losses, probes = self.curve("loss"), self.curve("probe_knn")
        return {
            "run": str(self.folder),
            "method": self.recipe.get("method", ""),
            "size": self.size,
            "data": last_name(self.recipe["dataset"]) if self.recipe.get("dataset") else "",
            "step": f"{self.step:,} of {self.max_steps:,}" if self.max_steps else f"{self.step:,}",
            "state": self.state,
            "last loss": float(list(losses.values())[-1]) if losses else None,
            "best probe": max(probes.values()) if probes else None,
        }


def find_runs(folder: str | Path) -> list[Run]:
    """The runs in a folder and in the folders below it, by their paths. Raises ValueError if there are none."""
    if not Path(folder).is_dir():
        raise ValueError(f"FOLDER must be a folder with runs, and there is no folder {folder}")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_", "checkpoint-")))
        if RECIPE in files:
            found.append(Run.read(place))
    if not found:
        raise ValueError(f"FOLDER must hold runs of hf-mim pretrain, and there is no {RECIPE} in {folder}")
    return found


@dataclass(frozen=True)
class RunComparison:
    """Several runs side by side. rows: what is compared → one value for each run; None: the run has no such value."""

    runs: Sequence[Run]
    names: list[str]
    settings: dict[str, list]
    training: dict[str, list]
    results: dict[str, list]

    def _rows(self, text: Callable[[Any], str]) -> list[dict[str, str]]:
        sections = self.settings | self.training | self.results
        return [
            {"": text(name), **{text(run): text(_cell(x)) for run, x in zip(self.names, values, strict=True)}}
            for name, values in sections.items()
        ]

    def text(self) -> str:
        """Aligned columns: one for each run."""
        return format_table([{name or "measure": x for name, x in row.items()} for row in self._rows(str)], "")

    def markdown(self) -> str:
        return markdown_table(self._rows(shown))

    def as_json(self) -> dict[str, Any]:
        """Everything, curves too, for other programs."""
        curves = {name: [{str(x): y for x, y in run.curve(name).items()} for run in self.runs] for name in CURVES}
        parts = {"settings": self.settings, "training": self.training, "results": self.results, "curves": curves}
        return {"runs": self.names} | parts

    def figure(self) -> Picture:
        """Loss and probe of each run over the images that it has seen."""
        shown_curves = [name for name in CURVES if any(run.curve(name) for run in self.runs)] or ["loss"]
        figure = Picture(figsize=(8, 1 + 2.4 * len(shown_curves)), layout="constrained")
        axes = figure.subplots(len(shown_curves), sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, shown_curves, strict=True):
            for number, run in enumerate(self.runs):
                style: dict[str, Any] = {
                    "color": COLORS[number % len(COLORS)],
                    "marker": MARKERS[number % len(MARKERS)],
                }
                curve = run.curve(name)
                style |= {"markersize": 3 if len(curve) < 50 else 0, "linewidth": 1.5}
                ax.plot(list(curve), list(curve.values()), label=self.names[number], **style)
            ax.set_ylabel(CURVES[name], color=INK)
            ax.grid(color=GRID, linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(colors=MUTED)
        if len({run.recipe.get("method") for run in self.runs}) > 1:
            axes[0].set_title("losses of different methods cannot be compared", color=MUTED, fontsize=9)
        axes[-1].set_xlabel("images seen in pretraining", color=INK)
        axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes[-1].locator_params(axis="x", integer=True)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, labelcolor=INK)
        return figure

    def save(self, stem: str | Path) -> list[Path]:
        """Write `STEM.md`, `STEM.json` and `STEM.png`."""
        paths = [Path(f"{stem}{end}") for end in (".md", ".json", ".png")]
        for path in paths:
            with replacing(path) as aside:
                if path.suffix == ".png":
                    self.figure().savefig(aside, dpi=120, format="png")
                else:
                    content = self.markdown() if path.suffix == ".md" else json.dumps(self.as_json(), indent=2)
                    aside.write_text(content + "\n")
        return paths


def _setting(recipe: dict, name: str) -> Any:
    """A setting as it is compared. NaN is text, for it is not equal to itself; None where it only says that parts of
    images may be missing."""
    value = recipe.get(name)
    if name != "nodata" or value == value:
        return value
    return None if recipe.get("missing_modality") == ZERO else "values that are not finite"


def compare(runs: Sequence[Run]) -> RunComparison:
    """The settings in which runs differ, what the training took, and the results that one of them has at least."""
    names = _short_names([run.folder for run in runs])
    known = dict.fromkeys(name for run in runs for name in run.recipe)
    compared = [name for name in known if not name.startswith((*OF_THE_MACHINE, *NOT_COMPARED))]
    settings = {name: [_setting(run.recipe, name) for run in runs] for name in compared}
    settings = {name: values for name, values in settings.items() if any(x != values[0] for x in values)}
    for name in settings.keys() & {"dataset", "test_dataset"}:
        settings[name] = [None if value is None else last_name(value) for value in settings[name]]
    training: dict[str, list] = {
        "state": [run.state for run in runs],
        "step": [run.step for run in runs],
        "images seen": [round(run.step * run.images_per_step) for run in runs],
        "minutes of training": [sum(entry.get("seconds") or 0 for entry in run.log) / 60 for run in runs],
    }
    for name, label in CURVES.items():
        curves = [list(run.curve(name).values()) for run in runs]
        if any(curves):
            last, first = ([curve[at] if curve else None for curve in curves] for at in (-1, 0))
            training |= {f"{label}, first": first, f"{label}, last": last}
            if name != "loss":
                training[f"{label}, best"] = [max(curve, default=None) for curve in curves]
    measured = dict.fromkeys(name for run in runs for name in run.results)
    results = {name: [run.results.get(name) for run in runs] for name in measured}
    return RunComparison(runs, names, settings, training, results)


def _result_name(file: str, result: Result) -> str:
    """The name of a result's file without the hash at its end, which differs between runs."""
    stem = file.removesuffix(".json")
    head, _, key = stem.rpartition("_")
    return f"{head if head and len(key) == 8 and not set(key) - set('0123456789abcdef') else stem}: {result.metric}"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("RUN must be different folders, and one is given twice")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return format_number(value)
