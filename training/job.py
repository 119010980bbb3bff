# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-mim"]
# ///
"""One file for a job in the cloud: it pretrains on a dataset of the Hub, measures, and pushes the model with its card.

    uv run training/job.py --dataset me/my_photos --repo me/photos_mae --size small --num_train_epochs 100
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN training/job.py --dataset me/my_photos --repo me/photos_mae

Every argument of `hf-mim pretrain` works, as a pair `--argument value`. If the images have labels, the protocols that
need labels measure the features before the model goes up. HF_TOKEN, or `hf auth login`, gives the token with write
access. As long as hf-mim is not on PyPI, give its wheel: `uv run --with dist/hf_mim-0.1.0-py3-none-any.whl ...`.
"""

import sys

from huggingface_hub import HfApi

import hf_mim
from hf_mim.hub.card import write_card
from hf_mim.hub.push import NOT_UPLOADED

PROTOCOLS = ("knn", "linear")
OF_IMAGES = ("image_column", "labels", "train_split", "test_split")  # settings of the run that the protocols share


def main(words: list[str]):
    names, values = words[::2], words[1::2]
    settings = {name.removeprefix("--"): value for name, value in zip(names, values, strict=False)}
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        sys.exit("error: job.py takes pairs, --argument value")
    if not {"dataset", "repo"} <= settings.keys():
        sys.exit("error: dataset and repo must be given, such as --dataset me/my_photos --repo me/photos_mae")
    hub, repo = HfApi(), settings.pop("repo")
    address = hub.create_repo(repo, exist_ok=True)  # now: a token that is not allowed to do this ends the job here
    run = hf_mim.pretrain(**settings)
    about = {name: settings[name] for name in OF_IMAGES if name in settings}
    for protocol in PROTOCOLS:
        try:
            result = hf_mim.evaluate(protocol, run.folder, dataset=settings["dataset"], **about)
        except ValueError as error:  # such as: the images have no labels
            print(f"{protocol} was not measured: {error}")
        else:
            print(f"{protocol}: {result.metric} {result.value:.4f}")
    write_card(run.folder, repo, settings.get("license"))
    message = f"Pretrained on {settings['dataset']} and measured"
    hub.upload_folder(repo_id=repo, folder_path=run.folder, commit_message=message, ignore_patterns=NOT_UPLOADED)
    print(f"The model is at {address}")


if __name__ == "__main__":
    main(sys.argv[1:])
