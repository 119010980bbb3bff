"""What a comparison has found, as far as it has come: comparison.md, comparison.png and comparison.json."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_jobs import PIXELS, PROBE, SUPERVISED, TRAINING, Job, Step, missing_augmentation
from compare_plan import Comparison, images_per_step, spelled

from hf_mim.comparison import Row, as_text, plot_curves, spread, table
from hf_mim.evaluation.result import Result, installed_versions
from hf_mim.files import replacing
from hf_mim.hub.card_text import plain, shown
from hf_mim.run_folder import logged
from hf_mim.scrub import scrubbed_all

TABLE, PICTURE, RECORD = "comparison.md", "comparison.png", "comparison.json"
LIST = re.compile(r"\[\s+([^][{}]*?)\s+\]")  # in JSON, one that holds no other; it is written on one line
FIXED = "dataset", "images", "points"  # the arguments of a comparison that may not change


@dataclass
class Report:
    """Writes the three files again each time it is called.

    command: what the user has typed. at_once: processes at the same time.
    left_out: what is recorded of results that the comparison no longer has; they may come back.
    """

    comparison: Comparison
    jobs: Sequence[Job]
    output: Path
    command: str
    at_once: int
    left_out: list[dict[str, Any]]

    @property
    def steps(self) -> list[Step]:
        return [step for job in self.jobs for step in job.steps]

    def __call__(self):
        rows = self.rows()
        plot_curves(rows, self.levels(), self.output / PICTURE)
        for name, text in ((TABLE, self.text(rows)), (RECORD, self.record(rows))):
            with replacing(self.output / name) as aside:
                aside.write_text(text)

    def rows(self) -> list[Row]:
        """The lines of the table: runs, then references."""
        columns, first = self.comparison.evaluate, self.comparison.first.run
        untrained = filter(None, map(self.comparison.untrained_row, self.comparison.runs))
        starts = list(filter(None, map(self.comparison.start_row, self.comparison.runs)))
        names = [*self.comparison.runs, *starts, *untrained, PIXELS, SUPERVISED]
        rows = {name: Row(name, {column: [] for column in columns}) for name in names}
        classifiers = []
        self._add_states(rows)
        for step in self.steps:
            row = rows[step.row]
            if step.row in starts and step.measures == TRAINING:
                continue
            if step.words == ["pretrain"]:
                per_step = images_per_step(self.comparison.recipes[step.row])
                curve = logged(step.places["output_dir"], "probe_knn")
                row.curves.append({number * per_step: value for number, value in curve.items()})
            if not step.is_done or step.measures == PROBE:
                continue
            result = Result.load(step.file)
            if step.measures != TRAINING:
                row.values[step.measures] += [] if result.value is None else [result.value]
                continue
            row.minutes.append(result.seconds / 60)
            row.devices.append(result.device)
            if step.row == SUPERVISED:
                classifiers.append(result.value)
                row.images_seen.append(result.settings["steps"] * result.settings["batch_size"])
            else:
                row.images_seen.append(result.scores["images_seen"])
        if classifiers:
            rows[SUPERVISED].notes.append(f"its own classifier has {as_text(classifiers, percent=True)} %")
        if missing := missing_augmentation(first):
            rows[SUPERVISED].notes.append(f"without {' and '.join(missing)}")
        return [row for name, row in rows.items() if any(step.row == name for step in self.steps)]

    def _add_states(self, rows: dict[str, Row]):
        """Note in the rows what has failed, or how many seeds are done."""
        for step, failure in [(job.left[0], job.failure) for job in self.jobs if job.failure]:
            seed = "" if step.seed is None else f"seed {step.seed} "
            rows[step.row].notes.append(f"{seed}failed in {failure}")
        for name, row in rows.items():
            seeds = {step.seed for step in self.steps if step.row == name}
            left = {step.seed for step in self.steps if step.row == name and not step.is_done}
            if left and not row.notes:
                row.notes.append(f"{len(seeds - left)} of {len(seeds)} done")

    def levels(self) -> dict[str, float]:
        """The references that are measured as the runs are while they train, for the picture."""
        found = {}
        for step in self.steps:
            if step.measures == PROBE and step.is_done:
                found.setdefault(step.row, []).append(Result.load(step.file).value)
        return {name: spread(values)[0] for name, values in found.items()}

    def text(self, rows: list[Row]) -> str:
        comparison = self.comparison
        columns = []
        for name in comparison.evaluate:
            options = [f"--{key} {spelled(value)}" for key, value in comparison.own_options(name).items()]
            columns.append(f"{shown(name)} is {typed('hf-mim evaluate', comparison.protocol(name), *options)}")
        commits = sorted({step.commit for step in self.steps if step.is_done and step.commit}) or ["not known"]
        versions = [f"{name} {version}" for name, version in installed_versions().items()]
        return f"""{table(rows)}

Data: {shown(comparison.dataset)}. {", ".join(columns)}. ± is the sample standard deviation over the seeds
{spelled(comparison.seeds)}. Minutes are those of the training steps alone, on average, with {self.at_once} processes at
a time, each with one thread. Made by {typed(self.command)}, commit {", ".join(commits)}, {", ".join(versions)}.
Each value with its command is in {RECORD}.

![accuracy over images seen]({PICTURE})
"""

    def record(self, rows: list[Row]) -> str:
        """All of it as JSON. Results travel, so folders of this machine are left out."""
        values = {
            "command": self.command,
            "processes": self.at_once,
            "comparison": dataclasses.asdict(self.comparison),
            "versions": installed_versions(),
            "rows": [self._row_record(row) for row in rows],
            "results": list(self._results()),
            "left_out": self.left_out,
        }
        text = json.dumps(scrubbed_all(values), indent=1) + "\n"
        return LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)

    def _row_record(self, row: Row) -> dict[str, Any]:
        found = dataclasses.asdict(row) | {"curves": [sorted(curve.items()) for curve in row.curves]}
        spreads = {name: spread(values) for name, values in row.values.items() if values}
        names = "mean", "standard_deviation"
        return found | {"spread": {name: dict(zip(names, both, strict=True)) for name, both in spreads.items()}}

    def _results(self) -> Iterator[dict[str, Any]]:
        failures = {id(job.left[0]): job.failure for job in self.jobs if job.failure}
        for step in self.steps:
            result = Result.load(step.file) if step.is_done else None
            yield {
                "row": step.row,
                "measures": step.measures,
                "seed": step.seed,
                "value": result and result.value,
                "failure": failures.get(id(step)),
                "date": time.strftime("%Y-%m-%d", time.gmtime(step.file.stat().st_mtime)) if result else None,
                "commit": step.commit,
                "file": str(step.file.relative_to(self.output)),
                "command": step.command,
                "protocol": step.words[1:2],
                "options": step.options,
            }


def typed(*words: str) -> str:
    """A command as code in Markdown."""
    return f"`{plain(' '.join(words)).replace('`', '')}`"


def go_on(comparison: Comparison, jobs: Sequence[Job], output: Path, commit: str | None) -> list[dict[str, Any]]:
    """Take over what an earlier start has recorded in the folder: with which code each step was done.

    Returns what is recorded of other steps than those of the jobs. Raises ValueError, which names what has changed, if
    a step was begun with other settings.
    """
    path, before, known = output / RECORD, {}, {}
    if path.is_file():
        before = json.loads(path.read_text())
        known = {result["file"]: result for result in before["results"] + before["left_out"]}
    now = as_recorded({name: getattr(comparison, name) for name in FIXED})
    for step in [step for job in jobs for step in job.steps]:
        recorded, step.commit = known.pop(str(step.file.relative_to(output)), None), commit
        if not step.is_begun:
            continue
        if recorded is None:
            folder = step.file.parent.parent.name
            raise ValueError(f"output {output} holds {folder}, and {RECORD} does not tell how it was made")
        then = {name: before["comparison"][name] for name in FIXED} | recorded["options"]
        one, other = then | {"protocol": recorded["protocol"]}, now | as_recorded(step.options)
        check_equal(one, other | {"protocol": step.words[1:2]}, f"for the {step.measures} of {step.row} in {output}")
        step.commit = recorded["commit"] if step.is_done else commit
    return list(known.values())


def check_equal(then: dict[str, Any], now: dict[str, Any], place: str):
    """Raise ValueError if a setting is another than before."""
    for name in then | now:
        if then.get(name) != now.get(name):
            was, is_ = spelled(then.get(name)), spelled(now.get(name))
            raise ValueError(f"{name} is {is_}, and was {was} {place}: give another output")


def as_recorded(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they are read back from the record."""
    return json.loads(json.dumps(scrubbed_all(values)))
