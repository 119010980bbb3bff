"""What has to be done for a comparison: jobs, each of which is a process, made of steps, each of which is a command."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from compare_plan import Comparison, file_name, spelled

from hf_mim.evaluation import load_protocol
from hf_mim.evaluation.measure import option_types
from hf_mim.pretraining.recipe import RunArguments, layered
from hf_mim.run_folder import TRAINING_RESULT, contents, result_path

PIXELS, SUPERVISED = "raw pixels", "supervised from scratch"  # rows
TRAINING, PROBE = "training", "probe"  # what a step measures, if that is no column of the table
# Augmentation that fine-tuning does not have.
ONLY_IN_PRETRAINING = ("crop_ratio", "crop_pixels", "vertical_flip_probability", "rotate90", "color_jitter")
ONLY_IN_PRETRAINING += ("grayscale_probability", "blur_probability")
# The supervised reference trains all layers alike, with no other augmentation than the runs.
NO_RATE = 1e-12  # changes no number but zeros: a rate has to be above 0
FROM_SCRATCH = {"layer_decay": 1.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "random_erase": 0.0}
FROM_SCRATCH |= {"randaugment_magnitude": 0.0, "batch_size": 128}


@dataclass
class Step:
    """One command of `hf-mim`, and what it is for.

    row, measures, seed: the place of its result: row and column of the table, or `TRAINING` or `PROBE`. The seed is
        None if the result stands for all seeds.
    words: the command without its options.
    options: what decides its result.
    places: options that decide nothing of it: where it is written, and whether others are measured beside.
    file: the result, which is there when the step is done.
    commit: of the code that was asked to do it.
    """

    row: str
    measures: str
    seed: int | None
    words: list[str]
    options: dict[str, Any]
    places: dict[str, Any]
    file: Path
    commit: str | None = None

    @property
    def is_done(self) -> bool:
        return self.file.is_file()

    @property
    def is_begun(self) -> bool:
        """Whether there is anything of its result, such as a checkpoint of a run."""
        return self.is_done or self.words == ["pretrain"] and bool(contents(self.places["output_dir"]))

    @property
    def arguments(self) -> list[str]:
        """The words after `hf-mim`."""
        options = (self.options | self.places).items()
        return self.words + [word for name, value in options for word in (f"--{name}", spelled(value))]

    @property
    def command(self) -> str:
        return shlex.join(["hf-mim", *self.arguments])


@dataclass(eq=False)
class Job:
    """Steps that one process does one after another: all but the first need the checkpoint of the first.

    needs: a job whose first step makes the checkpoint that this job needs.
    failure: why it ended before its last step.
    """

    name: str
    steps: list[Step]
    needs: "Job | None" = None
    failure: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of its results, which is that of the checkpoint."""
        return self.steps[0].file.parent.parent

    @property
    def left(self) -> list[Step]:
        return [step for step in self.steps if not step.is_done]


def jobs_of(comparison: Comparison, output: Path) -> list[Job]:
    """All jobs, the most urgent first. Each run has the folder `NAME_SEED` in `output`."""
    folders = {(run, seed): output / f"{file_name(run)}_{seed}" for seed in comparison.seeds for run in comparison.runs}
    runs = {
        (run, seed): Job(f"{run}, seed {seed}", list(run_steps(comparison, run, seed, folder)))
        for (run, seed), folder in folders.items()
    }
    found, first = list(runs.values()), next(iter(comparison.runs))
    for run in filter(comparison.start_row, comparison.runs):
        steps = start_steps(comparison, run, output / f"{file_name(run)}_start")
        found.append(Job(f"start of {run}", list(steps)))
    if "pixels" in comparison.references:
        checkpoint = first, comparison.seeds[0]
        steps = evaluations(comparison, PIXELS, None, folders[checkpoint], pixels=True)
        found.append(Job(PIXELS, list(steps), runs[checkpoint]))
    for seed in comparison.seeds if "supervised" in comparison.references else ():
        steps = supervised_steps(comparison, seed, folders[first, seed], output / f"supervised_{seed}")
        found.append(Job(f"{SUPERVISED}, seed {seed}", list(steps), runs[first, seed]))
    return found


def run_steps(comparison: Comparison, run: str, seed: int, folder: Path) -> Iterator[Step]:
    """Pretraining, its evaluation and, if this run stands for its kind of encoder, that of the untrained encoder."""
    steps = comparison.steps(run)
    options = layered({"dataset": comparison.dataset}, comparison.settings, comparison.runs[run])
    options |= {"max_steps": steps, "probe_every": max(1, steps // comparison.points), "seed": seed}
    places = {"output_dir": folder}
    yield Step(run, TRAINING, seed, ["pretrain"], options, places, result_path(folder, TRAINING_RESULT))
    yield from evaluations(comparison, run, seed, folder)
    if row := comparison.untrained_row(run):
        yield from evaluations(comparison, row, seed, folder, untrained=True, untrained_seed=seed)


def start_steps(comparison: Comparison, run: str, folder: Path) -> Iterator[Step]:
    """A run of one step that moves no weight, because only pretraining fits a checkpoint to other images, and its
    evaluation."""
    row, options = comparison.start_row(run), layered(comparison.settings, comparison.runs[run])
    options |= {"dataset": comparison.dataset, "seed": comparison.seeds[0]}
    options |= {"max_steps": 1, "learning_rate": NO_RATE, "probe_every": 0}
    places = {"output_dir": folder}
    yield Step(row, TRAINING, None, ["pretrain"], options, places, result_path(folder, TRAINING_RESULT))
    yield from evaluations(comparison, row, None, folder)


def supervised_steps(comparison: Comparison, seed: int, architecture: Path, folder: Path) -> Iterator[Step]:
    """Training of a classifier with the run's architecture from random weights, and the evaluation of its encoder."""
    file = result_path(folder, "compared", TRAINING)
    options = supervised_options(comparison) | {"untrained": True, "seed": seed}
    words, places = ["evaluate", "finetune", str(architecture)], {"output_dir": folder, "output": file}
    yield Step(SUPERVISED, TRAINING, seed, words, options, places, file)
    yield from evaluations(comparison, SUPERVISED, seed, folder)


def supervised_options(comparison: Comparison) -> dict[str, Any]:
    """Those of training from scratch with the crops and flips of the runs. Its passes over the labelled images follow
    from the budget; they are rounded up to whole steps."""
    run, config = comparison.first.run, comparison.first.config()
    same = {"crop_scale": list(run.crop_scale), "flip": run.flip_probability, "drop_path": config.drop_path_rate}
    options = FROM_SCRATCH | same | comparison.supervised
    _, source, own = comparison.arguments("finetune", options)
    images = len(source.load()[0])
    if images < own.batch_size:
        raise ValueError(f"batch_size of supervised must be at most the {images} labelled images, not {own.batch_size}")
    epochs = comparison.images / (images // own.batch_size * own.batch_size)  # the last, smaller batch is dropped
    return comparison.data_options("finetune") | options | {"epochs": epochs}


def missing_augmentation(run: RunArguments) -> list[str]:
    """The augmentation of the runs that the supervised reference cannot have."""
    usual = {f.name: f.default for f in fields(RunArguments)}
    return [name for name in ONLY_IN_PRETRAINING if getattr(run, name) != usual[name]]


def evaluations(comparison: Comparison, row: str, seed: int | None, checkpoint: Path, **more) -> Iterator[Step]:
    """A step for each column of the table whose protocol can measure the row.

    References that were not measured while they trained are also measured as a run is then, for the picture.

    more: options that make the row another than that of the checkpoint.
    """
    measured = {column: (comparison.protocol(column), comparison.own_options(column)) for column in comparison.evaluate}
    if row in (PIXELS, SUPERVISED):
        run = comparison.first.run
        images = {"train_images": min(run.probe_images, run.knn_train_images)}
        images |= {"test_images": min(run.probe_images // 4, run.knn_test_images)}
        measured[PROBE] = "knn", images
    for measures, (protocol, options) in measured.items():
        offered = option_types(load_protocol(protocol))
        if "pixels" in more and "pixels" not in offered:
            continue
        seeds = {"seed": seed} if protocol == "finetune" else {}  # it trains the encoder too
        options = comparison.data_options(protocol) | seeds | options
        options |= {name: value for name, value in more.items() if name in offered}
        file = result_path(checkpoint, "compared", file_name(measures), next(iter(more), ""))
        words = ["evaluate", protocol, str(checkpoint)]
        places = {"output": file} | ({"beside": False} if "beside" in offered else {})  # the references are rows here
        yield Step(row, measures, seed, words, options, places, file)
