"""What stands beside the file of a result: the prediction for each image, and the confusion of the classes."""

from pathlib import Path

from hf_mim.evaluation.result import Result
from hf_mim.files import replacing
from hf_mim.visualize.confusion import plot_confusion

ENDS = (".predictions.csv", ".confusion.csv", ".confusion.png")


def save_beside(result: Result, path: Path) -> list[Path]:
    """Write `RESULT.predictions.csv`, `RESULT.confusion.csv` and `RESULT.confusion.png`, for a result `RESULT.json`.

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
    return paths
