"""`hf-mim predict CLASSIFIER --dataset SOURCE --output FILE`: writes the class of every image to a file."""

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting, settings_of

TEXT = """\
Write the predicted class of every image of SOURCE to FILE (.csv or .parquet), with the probability of each class, and,
where SOURCE has labels, the label and whether it was predicted; then the accuracy with its 95 % interval is printed.
CLASSIFIER is a folder that hf-mim evaluate finetune wrote, or any image classifier of transformers, also by its name on
the Hub. It sees images as its image processor states: size, crop, mean, standard deviation and range of values.

\b
hf-mim predict runs/classifier --dataset my_photos --output predictions.csv
hf-mim predict runs/classifier --dataset digits --split test --output predictions.parquet"""


def settings() -> list[Setting]:
    from hf_mim.classification import PredictArguments
    from hf_mim.embeddings.embed import OF_THE_ENCODER
    from hf_mim.evaluation.measure import EncoderArguments

    return settings_of(PredictArguments, "images and file") + settings_of(EncoderArguments, "model", OF_THE_ENCODER)


def run(classifier: str, **given: str):
    with told_in_one_line("nothing was written"):
        from transformers.utils.logging import disable_progress_bar

        from hf_mim.front_door import predict

        disable_progress_bar()
        print(predict(classifier, **given))


SUMMARY = "classify images with a fine-tuned checkpoint: a table of classes and probabilities"
command = Command("predict", run, ("CLASSIFIER",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
