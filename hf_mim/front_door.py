"""What `hf-mim pretrain`, `evaluate`, `embed` and `predict` do, as functions. The command line calls them and prints.

    import hf_mim

    run = hf_mim.pretrain("my_photos", method="mae", size="tiny", output_dir="runs/mine")
    run.plot()
    hf_mim.evaluate("knn", run, dataset="my_labelled_photos")
    hf_mim.embed(run, dataset="my_photos", output="photos.parquet")

Each option of a command is a keyword here, and takes a value of Python or the text that one would type. A mistake of
the user raises ValueError with the line that the command prints, before any work.

Each function imports what it needs: the imports of a pretraining take seconds that the others need not wait.
"""

import contextlib
import gc
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from hf_mim.files import one_line
from hf_mim.pretraining.settings import suggestion, to_type

if TYPE_CHECKING:
    from hf_mim.classification import Predicted
    from hf_mim.embeddings.embed import Embedded
    from hf_mim.evaluation.result import Result
    from hf_mim.pretraining.run import Pretraining
    from hf_mim.runs import Run


def pretrain(
    dataset: str | os.PathLike | None = None, *, recipe: str | os.PathLike | None = None, **settings: Any
) -> "Run":
    """Pretrain a model on images, and fill its run folder.

    Args:
        dataset: a folder of images, files, or a name on the Hub; default: the embedded textures.
        recipe: a YAML file of settings, which the keywords override.
        settings: all others, as `hf-mim pretrain --help-all` lists them: `method`, `size`, `output_dir`, ...

    Returns:
        The run: `run.model`, `run.results`, `run.plot()`, `run.folder`. On the other processes of a distributed run, it
        knows only the folder.

    Raises:
        ValueError: before anything is written: the settings or the images cannot work.
        Ended: a signal (SIGTERM, SIGHUP, or SIGINT of ^C or of a notebook's stop button) has ended the run. It has
            saved itself, and `pretrain(output_dir=..., resume=True)` goes on.
    """
    if dataset is not None:
        settings["dataset"] = dataset
    with _one_exception(), _environment_kept():
        return train(prepare(recipe, settings))


def prepare(recipe: str | os.PathLike | None, settings: dict[str, Any]) -> "Pretraining":
    """A run that is checked and ready to train. Nothing was written yet."""
    from hf_mim.pretraining.recipe import Recipe
    from hf_mim.pretraining.run import Pretraining

    return Pretraining(Recipe.read(recipe, settings))


def train(pretraining: "Pretraining") -> "Run":
    """Make a run, and leave nothing of it in this process: no workers, no process group, no memory on the device."""
    from accelerate import PartialState

    from hf_mim.pretraining.signals import Ended
    from hf_mim.runs import Run

    folder, is_main = pretraining.folder, pretraining.trainer.is_world_process_zero()
    try:
        ended_by = pretraining()
    except BaseException as error:
        if isinstance(error, RuntimeError) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again for each dead worker
        traceback.clear_frames(error.__traceback__)  # they hold the trainer
        raise
    finally:
        vars(pretraining).clear()  # it must be gone before the process group, or threads may outlive Python
        gc.collect()
        PartialState().destroy_process_group()
    if ended_by:
        again = f"hf_mim.pretrain(output_dir={str(folder)!r}, resume=True)"
        raise Ended(ended_by, f"{ended_by.name} has ended the run; go on with {again}")
    return Run.read(folder) if is_main else Run(folder, {}, [])


def evaluate(protocol: str, checkpoint: str | os.PathLike, **options: Any) -> "Result":
    """Measure the features of a checkpoint, and save the result, as `hf-mim evaluate` does. If the result is saved in
    `results/` of the checkpoint, and nobody has edited its card, the card is written anew.

    Args:
        protocol: knn, linear, attentive, lowshot, finetune, health, ...: `hf_mim.evaluation.PROTOCOLS`.
        checkpoint: a folder, or a name on the Hub, of any vision encoder that `AutoModel` loads.
        options: `dataset` and all others that `hf-mim evaluate PROTOCOL --help` lists.

    Returns:
        The result. `result.path` is its file, `result.beside` are the files beside it.

    Raises:
        ValueError: before any work: the options, the checkpoint or the images do not fit.
        NotKept: a file could not be written; the result is in the error.
    """
    from hf_mim.companions import fill_classifier_folder, save_beside
    from hf_mim.evaluation import load_protocol
    from hf_mim.evaluation.measure import Evaluation, option_types
    from hf_mim.evaluation.result import NotKept, check_result_path
    from hf_mim.hub.card import refresh_card, unedited
    from hf_mim.run_folder import RESULTS, evaluation_path

    checkpoint = os.fspath(checkpoint)
    with _one_exception():
        values = _typed(f"evaluate {protocol}", options, option_types(load_protocol(protocol)))
        chosen = Path(values["output"]) if values.get("output") else None
        check_result_path(chosen or evaluation_path(checkpoint, [protocol], ""), "output")
        evaluation, failure = Evaluation(protocol, checkpoint, values), None
        try:
            result = evaluation()
        except NotKept as error:
            result, failure = error.result, error
        try:
            path = chosen or evaluation_path(checkpoint, evaluation.names, evaluation.key)
            refresh = path.parent.resolve() == (Path(checkpoint) / RESULTS).resolve() and unedited(checkpoint)
            result.path = result.save(path)
            result.beside = save_beside(result, result.path)
            if refresh:
                refresh_card(checkpoint)
            if failure is None and values.get("output_dir"):  # of fine-tuning: the classifier is kept there
                fill_classifier_folder(values["output_dir"], result)
        except OSError as error:
            raise NotKept(one_line(error), result) from error
        if failure is not None:
            raise failure
        return result


def embed(checkpoint: str | os.PathLike, **options: Any) -> "Embedded":
    """Write the features of every image of a source to a file, as `hf-mim embed` does, whose help lists the options.

    Args:
        checkpoint: a folder, or a name on the Hub, of any vision encoder that `AutoModel` loads.
        options: `dataset`, `output`, `features` and so on.

    Raises:
        ValueError: before any work: the options, the checkpoint, the images or the output do not fit.
    """
    from hf_mim.embeddings import embed as embeddings

    with _one_exception():
        return embeddings.embed(os.fspath(checkpoint), **_typed("embed", options, embeddings.option_types()))


def predict(classifier: str | os.PathLike, **options: Any) -> "Predicted":
    """Write the predicted class of every image of a source to a file, as `hf-mim predict` does, whose help lists the
    options.

    Args:
        classifier: a folder that fine-tuning wrote, or any image classifier of transformers, also by its Hub name.
        options: `dataset`, `output` and so on.

    Raises:
        ValueError: before any work: the options, the classifier, the images or the output do not fit.
    """
    from hf_mim import classification
    from hf_mim.embeddings import embed as embeddings

    with _one_exception():
        types = embeddings.option_types(classification.PredictArguments)
        return classification.predict(os.fspath(classifier), **_typed("predict", options, types))


def _typed(command: str, options: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Options in their types. Raises ValueError, in the words of the command line, for one that the command lacks."""
    for name in options:
        if name not in types:
            raise ValueError(f"{command.rpartition(' ')[2]} has no option {name}{suggestion(name, types)}")
    return {name: to_type(name, value, types[name]) for name, value in options.items()}


@contextlib.contextmanager
def _one_exception() -> Iterator[None]:
    """Inside, a mistake is shown without the errors of libraries that led to it, so that a notebook shows one."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(one_line(error)) from None
    except ValueError as error:
        raise error from None


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Afterwards, the variable that a run sets for its data workers is as before."""
    from hf_mim.data.decode import MAX_PIXELS_VARIABLE

    before = os.environ.get(MAX_PIXELS_VARIABLE)
    try:
        yield
    finally:
        os.environ.pop(MAX_PIXELS_VARIABLE, None)
        if before is not None:
            os.environ[MAX_PIXELS_VARIABLE] = before
