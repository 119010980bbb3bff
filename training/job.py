# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-mim"]
# ///
"""One file for a job in the cloud: it pretrains on a dataset of the Hub, measures, and pushes the model with its card.

    uv run training/job.py --dataset me/my_photos --repo me/photos_mae --size small --num_train_epochs 100
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN training/job.py --dataset me/my_photos --repo me/photos_mae

Every argument of `hf-mim pretrain` works, as a pair `--argument value`. If the images have labels, the run measures
k-NN, and a linear probe follows before the model goes up. `--hub_private_repo true` makes the repository a private one.
HF_TOKEN, or `hf auth login`, gives the token with write access. As long as hf-mim is not on PyPI, uv needs the folder
with its wheel: `python -m build`, then `uv run --find-links dist training/job.py ...`.
"""

import sys

from huggingface_hub import HfApi

import hf_mim
from hf_mim.hub.card import write_card
from hf_mim.hub.push import NOT_UPLOADED

# Settings of the run that the linear probe shares → their names there.
OF_IMAGES = {name: name for name in ("image_column", "missing_modality", "labels", "group")}
OF_IMAGES |= {"train_split": "train_split", "test_split": "test_split", "test_dataset": "test"}


def main(words: list[str]):
    names, values = words[::2], words[1::2]
    settings = {name.removeprefix("--"): value for name, value in zip(names, values, strict=False)}
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        sys.exit("error: job.py takes pairs, --argument value")
    if not {"dataset", "repo"} <= settings.keys():
        sys.exit("error: dataset and repo must be given, such as --dataset me/my_photos --repo me/photos_mae")
    hub, repo = HfApi(), settings.pop("repo")
    private = settings.get("hub_private_repo", "").lower() == "true" or None
    # Now: a token that is not allowed to do this ends the job here.
    address = hub.create_repo(repo, private=private, exist_ok=True)
    run = hf_mim.pretrain(**settings)
    about = {theirs: settings[name] for name, theirs in OF_IMAGES.items() if name in settings}
    try:
        result = hf_mim.evaluate("linear", run.folder, dataset=settings["dataset"], **about)
    except ValueError as error:  # such as: the images have no labels
        print(f"linear was not measured: {error}")
    else:
        print(result.headline())
    write_card(run.folder, repo, settings.get("license"))
    message = f"Pretrained on {settings['dataset']} and measured"
    hub.upload_folder(repo_id=repo, folder_path=run.folder, commit_message=message, ignore_patterns=NOT_UPLOADED)
    print(f"The model is at {address}")


if __name__ == "__main__":
    main(sys.argv[1:])
