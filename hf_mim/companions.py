"""What stands beside a result: predictions and pictures beside its file, and the whole folder of a new classifier."""

import copy
import shlex
from pathlib import Path

from transformers import AutoConfig

from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.inputs import channels_of
from hf_mim.evaluation.result import Result
from hf_mim.files import replacing
from hf_mim.hub.card import write_card
from hf_mim.run_folder import FINETUNE_RESULT, STARTED_FROM, result_path
from hf_mim.visualize.confusion import plot_confusion
from hf_mim.visualize.curves import plot_epochs

CURVE_END = ".curve.png"
ENDS = (".predictions.csv", ".confusion.csv", ".confusion.png")


def save_beside(result: Result, path: Path) -> list[Path]:
    """Write `RESULT.predictions.csv`, `RESULT.confusion.csv` and `RESULT.confusion.png`, for a result `RESULT.json`,
    and for fine-tuning `RESULT.curve.png`.

    Returns the files; none for a protocol that classifies no images.
    """
    predictions = result.predictions
    if predictions is None:
        return []
    paths = [path.with_name(path.stem + end) for end in ENDS]
    predictions.save(paths[0])
    predictions.save_confusion(paths[1])
    figure = plot_confusion(predictions.confusion, predictions.classes, result.headline())
    with replacing(paths[2]) as aside:
        figure.savefig(aside, dpi=120, format="png")
    if any("test accuracy" in row for row in result.table):
        paths.append(path.with_name(path.stem + CURVE_END))
        plot_epochs(result.table, result.headline()).save(paths[-1])
    return paths


def fill_classifier_folder(folder: str | Path, result: Result) -> Path:
    """Put the result of a fine-tuning, what stands beside it and a card into the folder of the classifier.

    There it is a result of these weights. Those that the fine-tuning started from are in its settings.
    """
    folder, own = Path(folder), copy.copy(result)
    own.settings = result.settings | dict(zip(STARTED_FROM, (result.checkpoint, result.checkpoint_sha256), strict=True))
    own.checkpoint, own.checkpoint_sha256 = folder.absolute().name, checkpoint_sha256(folder)
    save_beside(own, own.save(result_path(folder, FINETUNE_RESULT)))
    return write_card(folder)


def how_to_use(folder: str | Path, dataset: str, result: Result) -> str:
    """The command and the lines of Python that use the classifier in a folder.

    dataset: what it was tested on; the command names the split too, because those of `train` were trained on.
    """
    split = result.data.get("test", {}).get("source", "").partition(", split ")[2] or "train"
    chosen = () if split == "train" else ("--split", split)
    words, name = shlex.join(("hf-mim", "predict", str(folder), "--dataset", dataset, *chosen)), str(folder)
    if channels_of(AutoConfig.from_pretrained(folder)) == 3:
        python = f"from transformers import pipeline\n    classifier = pipeline('image-classification', model={name!r})"
    else:  # pipelines make every image one of three channels
        python = (
            "from transformers import AutoModelForImageClassification\n"
            f"    classifier = AutoModelForImageClassification.from_pretrained({name!r})"
        )
    return (
        f"The classifier is in {folder}, with its results, pictures and card. It classifies images of any source:\n\n"
        f"    {words} --output predictions.csv\n\nThree lines of Python load it:\n\n    import hf_mim\n    {python}"
    )
