"""Segmentation by patch tokens, against references that are computed another way."""

import io
import json
import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from hf_mim.data import CenterCrop
from hf_mim.data.crop import load_crop
from hf_mim.data.masks import MaskedImages, load_masks
from hf_mim.evaluation import segment
from hf_mim.evaluation.data_arguments import MaskedArguments
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.segment import (
    Segment,
    head_scores,
    neighbour_scores,
    predict_masks,
    read_targets,
    score_masks,
    token_bank,
    train_token_heads,
    upsample,
)

CPU = torch.device("cpu")
COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 30]], np.uint8)


@dataclass
class MeanColours:
    """Stands for a FeatureExtractor: a patch's token is its mean colour."""

    encoder: SimpleNamespace
    crop: object = field(default_factory=CenterCrop)

    def replace(self, **changes):
        return replace(self, **changes)

    def __call__(self, split, specs):
        assert specs == ["last/tokens/norm"]
        size = self.encoder.image_size
        images = torch.stack([load_crop(row["image"], self.crop, size, 3, None) for row in split.images])
        return [F.avg_pool2d(images.float() / 255 - 0.5, 8).flatten(2).mT.contiguous()]


def mean_colours(image_size) -> MeanColours:
    grid = tuple(side // 8 for side in image_size)
    return MeanColours(SimpleNamespace(image_size=image_size, grid=grid, device=CPU))


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def masked(images, masks, name="scenes") -> MaskedImages:
    columns = {"image": [png(x) for x in images]}, {"mask": [png(x) for x in masks]}
    return MaskedImages(
        *(Dataset.from_dict(c, Features({key: ImageFeature(decode=False) for key in c})) for c in columns), name
    )


def coloured_scenes(count, size=(64, 96), block=32, seed=0):
    """Blocks whose colour is their class, a little noisy: (images, masks)."""
    rng = np.random.RandomState(seed)
    rows, columns = -(-size[0] // block), -(-size[1] // block)
    masks = rng.randint(0, len(COLOURS), (count, rows, columns)).astype(np.uint8)
    masks = masks.repeat(block, axis=1).repeat(block, axis=2)[:, : size[0], : size[1]]
    images = COLOURS[masks].astype(int) + rng.randint(-15, 16, (*masks.shape, 3))
    return images.clip(0, 255).astype(np.uint8), masks


def quick(**options) -> Segment:
    return Segment(**{"learning_rates": [0.1, 0.01], "weight_decays": [0.0], "epochs": 30, "k": 5} | options)


def run(train, test, image_size=(64, 96), **options):
    return quick(**options).run(mean_colours(image_size), train, test)


@pytest.mark.parametrize(("size", "image_size"), [((64, 96), (64, 96)), ((75, 101), (64, 96)), ((50, 120), (80, 64))])
def test_classes_that_are_colours_are_read_by_both(size, image_size):
    """At the encoder's size, at one that is no multiple of the patches, and where a centre crop would cut the image."""
    train, test = (masked(*coloured_scenes(n, size, block=32, seed=n)) for n in (12, 5))
    result = run(train, test, image_size)
    assert result.value == result.scores["linear mIoU"] > 0.8
    assert result.scores["knn mIoU"] > 0.8
    if size == image_size:
        assert result.scores["knn mIoU"] > 0.99 and result.value > 0.95
    assert [row["class"] for row in result.table] == [0, 1, 2, 3]


def test_two_runs_give_the_same_numbers():
    train, test = (masked(*coloured_scenes(n, seed=n)) for n in (6, 3))
    first, second = (run(train, test, epochs=2, bank=100) for _ in range(2))
    assert first == second
    assert run(train, test, epochs=2, bank=100, seed=1) != first


def test_what_is_ignored_counts_nowhere():
    """A third of each image is painted over by classes it has not; the id that marks it makes no difference."""
    results = []
    for garbage in (255, 9, 2):  # 2 is a class: then it does count
        pairs = []
        for count in (12, 5):
            images, masks = coloured_scenes(count, seed=count)
            masks[masks == 2] = 3  # so that 2 may serve as a mark
            images[:, :, :32] = COLOURS[np.random.RandomState(count).randint(0, 4, (count, 64, 32))]
            masks[:, :, :32] = garbage
            pairs.append(masked(images, masks))
        results.append(run(*pairs, ignore_index=255 if garbage == 2 else garbage, num_classes=4, epochs=5))
    ignored, as_9, counted = results
    assert ignored.scores == as_9.scores and ignored.table == as_9.table
    assert ignored.scores["knn mIoU"] > 0.9
    assert [row["class"] for row in ignored.table] == [0, 1, 3]
    assert [row["class"] for row in counted.table] == [0, 1, 2, 3]


def test_the_ignored_id_is_no_class():
    images, masks = coloured_scenes(3)
    masks[:, :10] = 255
    targets, num_classes = read_targets(masked(images, masks), (16, 24), ignore_index=255, num_classes=None)
    assert num_classes == 4 and targets.min() == -1 and targets.dtype == torch.int16


def test_targets_are_the_nearest_pixels():
    images, masks = coloured_scenes(2, size=(50, 70), block=7)
    targets, _ = read_targets(masked(images, masks), (16, 24), ignore_index=None, num_classes=None)
    reference = F.interpolate(torch.from_numpy(masks)[None].float(), (16, 24), mode="nearest-exact")[0]
    assert torch.equal(targets.float(), reference)


@pytest.mark.parametrize("size", [(28, 42), (30, 47), (3, 5)])
def test_upsampling_is_bilinear(size):
    scores = torch.randn(2, 7 * 6, 3, generator=torch.Generator().manual_seed(0))
    reference = F.interpolate(scores.mT.unflatten(2, (7, 6)), size, mode="bilinear")
    torch.testing.assert_close(upsample(scores, (7, 6), size), reference)


def test_a_head_on_single_cells_is_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(30, 16, 5, generator=generator)
    true = (2 * tokens[..., :3] + torch.randn(30, 16, 3, generator=generator)).argmax(-1)
    targets, labels = true.view(30, 4, 4).short(), true.flatten().numpy()
    tokens = tokens * torch.tensor([1, 9, 0.1, 1, 1]) + 3  # scales that standardisation has to undo
    heads = [(0.05, 0.0), (0.01, 0.0)]
    head, other = train_token_heads(tokens, targets, torch.arange(30), (4, 4), heads, 3, 100, 10, 0, CPU)
    reference = LogisticRegression(C=1e6, max_iter=1000).fit(tokens.flatten(0, 1).numpy(), labels)
    with torch.no_grad():
        loss = F.cross_entropy(head(tokens).flatten(0, 1), true.flatten()).item()
    assert loss == pytest.approx(log_loss(labels, reference.predict_proba(tokens.flatten(0, 1).numpy())), abs=2e-3)
    (alone,) = train_token_heads(tokens, targets, torch.arange(30), (4, 4), heads[1:], 3, 100, 10, 0, CPU)
    torch.testing.assert_close(alone.weight, other.weight)


def test_ignored_cells_do_not_pull_on_a_head():
    tokens = torch.randn(4, 16, 5, generator=torch.Generator().manual_seed(0))
    targets = (tokens[..., 0] > 0).view(4, 4, 4).short()
    shared = ((4, 4), [(0.1, 0.0)], 2, 3, 8, 0, CPU)
    (labelled,) = train_token_heads(tokens, targets, torch.arange(4), *shared)
    twice, half = tokens.repeat(2, 1, 1), torch.cat([targets, torch.full_like(targets, -1)])
    (with_ignored,) = train_token_heads(twice, half, torch.arange(8), *shared)  # the tokens' statistics are the same
    torch.testing.assert_close(with_ignored.weight, labelled.weight)
    (nothing,) = train_token_heads(tokens, torch.full_like(targets, -1), torch.arange(4), *shared)
    assert nothing.weight.abs().max() == 0


def test_held_out_scores_are_mean_iou_of_the_pixels():
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    tokens = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    targets = torch.tensor([[[0, 1], [1, -1]]], dtype=torch.int16)  # predicted 0 0 1 1
    assert head_scores([head], tokens, targets, torch.tensor([0]), (2, 2), 16) == [pytest.approx(0.5)]


def test_heads_are_chosen_on_images_that_they_did_not_train_on(monkeypatch):
    """All images train or choose, none both; the chosen head trains on all."""
    asked = []

    def record(call, position):
        return lambda *args: asked.append(set(args[position].tolist())) or call(*args)

    monkeypatch.setattr(segment, "train_token_heads", record(train_token_heads, 2))
    monkeypatch.setattr(segment, "head_scores", record(head_scores, 3))
    data = masked(*coloured_scenes(10))
    run(data, data, epochs=1, held_out=0.3)
    kept, held, everything = asked
    assert len(held) == 3 and kept.isdisjoint(held)
    assert kept | held == everything == set(range(10))
    asked.clear()
    groups = torch.arange(10) // 4
    grouped = MaskedImages(data.images, data._masks, groups=groups)
    run(grouped, data, epochs=1, held_out=0.3)
    kept, held, everything = (set(groups[list(ids)].tolist()) for ids in asked)
    assert kept.isdisjoint(held) and kept | held == everything == {0, 1, 2}


def test_the_bank_holds_the_share_of_each_class_in_a_patch():
    targets = torch.tensor([[[0, 0, -1, -1], [0, 1, -1, -1], [2, 2, 1, -1], [2, 2, -1, -1]]], dtype=torch.int16)
    tokens = torch.tensor([[[3.0, 4], [1, 0], [0, 2], [0, -5]]])
    bank, shares = token_bank(tokens, targets, (2, 2), 3, size=10, seed=0)
    assert bank.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 1], [0, -1]]  # the second has no class
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 1], [0, 1, 0]]
    assert len(token_bank(tokens, targets, (2, 2), 3, size=2, seed=0)[0]) == 2


def test_neighbours_vote_as_written_out(monkeypatch):
    monkeypatch.setattr("hf_mim.evaluation.segment.LARGEST_TABLE", 90)  # chunks of a few tokens
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(40, 6, generator=generator), dim=1)
    shares = torch.rand(40, 3, generator=generator)
    tokens = torch.randn(2, 9, 6, generator=generator)
    found = neighbour_scores(bank, shares, tokens, k=4, temperature=0.1)
    for token, scores in zip(tokens.reshape(18, 6).numpy(), found.reshape(18, 3), strict=True):
        similarity = bank.numpy() @ (token / np.linalg.norm(token))
        nearest = np.argsort(-similarity)[:4]
        weights = np.exp(similarity[nearest] / 0.1)
        np.testing.assert_allclose(scores, weights @ shares.numpy()[nearest] / weights.sum(), rtol=1e-4)


def test_maps_have_the_size_of_each_mask_and_the_order_of_the_images(monkeypatch):
    monkeypatch.setattr("hf_mim.evaluation.segment.LARGEST_TABLE", 4 * 3 * 8 * 12 * 2)  # two images at once
    sizes = [(8, 12), (8, 12), (8, 12), (5, 7), (8, 12)]
    tokens = F.one_hot(torch.tensor([0, 1, 2, 1, 0]), 3).float()[:, None].expand(5, 6, 3)
    maps = predict_masks({"same": lambda x: x}, tokens, (2, 3), sizes, 3, CPU)["same"]
    assert [found.shape for found in maps] == sizes
    assert [set(found.flatten().tolist()) for found in maps] == [{0}, {1}, {2}, {1}, {0}]


def test_ids_that_training_lacks_are_wrong_and_named():
    masks = np.array([[[0, 0, 1, 1], [7, 9, 1, 255]]], np.uint8)
    maps = {"linear": [np.array([[0, 1, 1, 1], [0, 0, 1, 0]], np.uint8)]}
    confusions, unknown = score_masks(maps, masked(np.zeros((1, 2, 4, 3), np.uint8), masks), 2, ignore_index=255)
    assert unknown == [7, 9]
    assert confusions["linear"].tolist() == [[1, 1, 0], [0, 3, 0], [2, 0, 0]]
    images, masks = coloured_scenes(6)
    test_masks = masks.copy()
    test_masks[0, :32] = 6
    result = run(masked(images, masks), masked(images, test_masks), epochs=2)
    assert result.table[-1] == {"class": "unknown", "linear": 0.0, "knn": 0.0}
    assert any("no training mask has: [6]" in note for note in result.notes)


def test_the_result_says_how_it_was_made_and_is_json(tmp_path):
    train, test = (masked(*coloured_scenes(n, seed=n)) for n in (6, 3))
    saved = json.loads(
        run(train, test, epochs=2).save(tmp_path / "result.json").read_text(), parse_constant=pytest.fail
    )
    assert saved["settings"]["image_size"] == [64, 96] and saved["settings"]["num_classes"] == 4
    assert [head["learning_rate"] for head in saved["settings"]["heads"]] == [0.1, 0.01]
    assert saved["data"]["test"] == {"source": "scenes", "images": 3}


def test_mistakes_are_named_in_one_line():
    images, masks = coloured_scenes(4)
    data = masked(images, masks)
    for call, message in [
        (lambda: Segment(features="last/mean/norm"), "features of segment must be tokens"),
        (lambda: Segment(k=0), "k must be between 1 and the 100000 tokens of the bank, not 0"),
        (lambda: Segment(learning_rates=[]), "learning_rates must be"),
        (lambda: run(data.select([0]), data), "train must have at least 2 images"),
        (lambda: run(data, data.select([])), "test must have at least 1 image"),
        (
            lambda: run(data, data, num_classes=3),
            "the mask of image . has the id 3, which num_classes=3 leaves out",
        ),
        (lambda: run(masked(images, masks * 0), data), "the masks of scenes hold only the class 0"),
        (lambda: run(masked(images, masks * 0 + 255), data), "hold no pixel but those of ignore_index=255"),
        (lambda: run(data, data, k=5000), "k must be at most the 384 tokens of the training images, not 5000"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("group", [None, "folder"])
def test_without_a_test_split_a_fifth_is_held_out_by_group(tmp_path, group):
    for number in range(20):
        for kind in ("images", "masks"):
            path = tmp_path / "water" / kind / f"scene{number // 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number % 2).save(path)
    loaded = [MaskedArguments(dataset=str(tmp_path / "water"), group=group).load() for _ in range(2)]
    train, test = ([images.image_name(i) for i in range(len(images))] for images in loaded[0])
    assert (len(train), len(test)) == (16, 4) and not set(train) & set(test)
    assert test == [loaded[1][1].image_name(i) for i in range(4)]
    assert loaded[0][1].describe()["source"] == "a held-out fifth of water, split train"
    scenes = [{os.path.dirname(name) for name in names} for names in (train, test)]
    assert group is None or not scenes[0] & scenes[1]


def test_camvid_runs_through_an_untrained_encoder(shared_data, tiny_encoder):
    encoder = FrozenEncoder(tiny_encoder.model, tiny_encoder.mean, tiny_encoder.std, (48, 64))
    extract = FeatureExtractor(encoder, progress=False)
    train, test = (load_masks(shared_data / "camvid", split) for split in ("val", "test"))
    train, test = train.select(range(0, 100, 10)), test.select(range(0, 230, 40))
    result = quick(ignore_index=11, epochs=5).run(extract, train, test)
    assert result.settings["num_classes"] == 11
    assert 0.3 < result.scores["linear pixel accuracy"] < 1  # road and sky, by place alone, are more
    assert 1 / 11 < result.value < 1
