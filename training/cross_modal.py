"""Does a modality tell the other? `python training/cross_modal.py RUN DATASET luma,chroma [IMAGES]`.

RUN is a run of Interactive MIM on several modalities, and the third word is its `--image_column`. Each modality is
predicted on test images (at most IMAGES, 2,000) from the others alone: at all places with the others visible
everywhere, and at the places that stay when the encoder sees as many places as in training. The error is that of the
training loss. Beside it stands that of the mean predictor, which gives the mean of the training images at each place.
"""

import json
from collections.abc import Iterator

import torch

from hf_mim.cli.errors import run_script
from hf_mim.data import load_images
from hf_mim.data.sources import fixed_sample
from hf_mim.models.masking import gather, split_at_random
from hf_mim.visualize.viewer import Viewer

BATCH = 250


def batches(viewer: Viewer, images) -> Iterator[torch.Tensor]:
    """Normalised images `[B, C, H, W]`."""
    for start in range(0, len(images), BATCH):
        rows = images.select(range(start, min(start + BATCH, len(images))))
        yield viewer.encoder.preprocess(viewer.read(rows).pixels)


def cross_modal(viewer: Viewer, train, test) -> list[dict]:
    """A row for each modality and each number of visible places: error, that of the mean predictor, and their ratio."""
    model, grid = viewer.pretraining, viewer.grid
    names, places = list(model.config.modality_channels), grid[0] * grid[1]
    every = torch.arange(places)[None]

    def targets_and_predictions(pixels, seen: list[bool], count: int, noise):
        """`[B, M, Nm]` ids, and the targets and predictions `[B, Nm, P]` of all modalities there."""
        ids = every.expand(len(pixels), -1)
        context, hidden = (ids, ids) if count == places else split_at_random(noise, count)
        visible = torch.tensor(seen).expand(len(pixels), count, -1)
        output = model(pixels, context_ids=context, target_ids=hidden[:, None], visible=visible)
        return hidden, output.targets, output.predictions

    sums, seen_all = 0, [True] * len(names)
    for pixels in batches(viewer, train):
        sums = sums + targets_and_predictions(pixels, seen_all, places, None)[1].double().sum(0)
    means, rows = (sums / len(train)).float(), []
    widths = [part.shape[-1] for part in model._parts(means[None])]
    for number, name in enumerate(names):
        seen = [other != number for other in range(len(names))]
        for count in (places, model.config.num_visible(grid)):
            errors, random = [], torch.Generator().manual_seed(0)
            for pixels in batches(viewer, test):
                noise = torch.rand(len(pixels), places, generator=random)
                ids, targets, predictions = targets_and_predictions(pixels, seen, count, noise)
                guess = gather(means.expand(len(ids), -1, -1), ids)
                one, predicted, mean = (part.split(widths, -1)[number] for part in (targets, predictions, guess))
                errors.append(torch.stack([(x - one).square().mean((1, 2)) for x in (predicted, mean)]))
            error, constant = torch.cat(errors, dim=1).mean(1).tolist()
            about = {"predicted": name, "from": [other for other in names if other != name], "places_seen": count}
            rows.append(about | {"error": error, "mean_predictor": constant, "ratio": error / constant})
    return rows


@torch.no_grad()
def main(run: str, dataset: str, image_column: str, count: str = "2000"):
    viewer = Viewer.load(run)
    splits = (load_images(dataset, split, image_column=image_column) for split in ("train", "test"))
    rows = cross_modal(viewer, *(fixed_sample(images, int(count)) for images in splits))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run_script(main, __doc__)
