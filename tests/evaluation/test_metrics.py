"""Metrics against references computed another way: scikit-learn, loops, all pairwise distances, numbers by hand."""

import socket

import evaluate
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score, top_k_accuracy_score
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_mim.evaluation.metrics import (
    boundary_f,
    boundary_map,
    class_iou,
    compute_metrics,
    confusion_matrix,
    mean_iou,
    object_scores,
    region_similarity,
    top_k_accuracy,
)
from hf_mim.evaluation.running_metrics import MeanIoU, TopKAccuracy


def square(top, left, side=20, size=(60, 80)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def blobs(seed: int, size=(48, 61)) -> np.ndarray:
    """A mask with several ragged parts, some at the border of the image."""
    noise = torch.rand(1, 1, 7, 9, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, size, mode="bicubic")[0, 0] > 0.6).numpy()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns(k):
    rng = np.random.default_rng(k)
    logits, labels = rng.normal(size=(200, 11)).astype(np.float32), np.tile(np.arange(11), 19)[:200]
    expected = top_k_accuracy_score(labels, logits, k=k)
    assert top_k_accuracy(logits, labels, [k])[f"top{k}_accuracy"] == pytest.approx(expected, abs=1e-12)


def test_equal_logits_are_as_good_as_argmax_and_nan_is_never_right():
    labels = torch.arange(10).repeat(3)
    assert top_k_accuracy(torch.zeros(30, 10), labels)["top1_accuracy"] == pytest.approx(0.1)
    assert top_k_accuracy(torch.zeros(30, 10), labels)["top5_accuracy"] == pytest.approx(0.5)
    for k in (1, 5, 10):  # 10 are all classes
        assert top_k_accuracy(torch.full((30, 10), torch.nan), labels, [k])[f"top{k}_accuracy"] == 0


def test_confusion_matrix_is_scikit_learns_without_the_ignored_pixels():
    rng = np.random.default_rng(0)
    predictions, targets = rng.integers(0, 5, (2, 3, 20, 30))
    targets[:, :4] = 255
    kept = targets != 255
    expected = sklearn_confusion(targets[kept], predictions[kept], labels=range(5))
    assert (confusion_matrix(predictions, targets.astype(np.uint8), 5, ignore_index=255).numpy() == expected).all()


def test_mean_iou_by_hand_with_an_absent_and_a_merely_predicted_class():
    targets = torch.tensor([[0, 0, 0, 0], [1, 1, 9, 9]])
    predictions = torch.tensor([[0, 0, 0, 1], [1, 2, 0, 3]])  # 2 is only predicted; 3 only where it is ignored
    confusion = confusion_matrix(predictions, targets, num_classes=4, ignore_index=9)
    iou = class_iou(confusion)
    assert iou[:3].tolist() == pytest.approx([3 / 4, 1 / 3, 0])
    assert iou[3].isnan()
    assert mean_iou(confusion) == pytest.approx((3 / 4 + 1 / 3 + 0) / 3)


def test_mean_iou_of_random_maps_is_scikit_learns():
    rng = np.random.default_rng(1)
    predictions, targets = rng.integers(0, 6, (2, 1000))
    expected = jaccard_score(targets, predictions, average="macro")
    assert mean_iou(confusion_matrix(predictions, targets, 6)) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0, 1, 7, 20, 35])
def test_j_of_shifted_squares(shift):
    overlap = 20 * max(0, 20 - shift)
    assert region_similarity(square(10, 5), square(10, 5 + shift)) == pytest.approx(overlap / (800 - overlap))


def test_empty_masks():
    empty, full = np.zeros((60, 80), bool), np.ones((60, 80), bool)
    assert region_similarity(empty, empty) == boundary_f(empty, empty) == 1
    assert region_similarity(empty, square(10, 10)) == boundary_f(empty, square(10, 10)) == 0
    assert boundary_f(square(10, 10), empty) == 0
    assert boundary_f(full, full) == 1  # neither has a boundary


def test_boundary_map_is_one_pixel_wide_and_leaves_out_the_border_of_the_image():
    expected = np.zeros((6, 7), bool)
    expected[1:4, 1], expected[1, 1:4], expected[1:4, 3], expected[3, 1:4] = True, True, True, True
    assert (boundary_map(square(2, 2, side=2, size=(6, 7))) == expected).all()
    corner = np.zeros((4, 5), bool)
    corner[2:, 3:] = True
    expected = np.zeros((4, 5), bool)
    expected[1:, 2], expected[1, 2:] = True, True
    assert (boundary_map(corner) == expected).all()


def reference_f(mask, truth, radius) -> float:
    """By the definition, pixel by pixel: a dilation by a disk, and distances of all pairs."""
    boundaries = []
    for m in (mask, truth):
        rows, columns = m.shape
        found = np.zeros_like(m)
        for y in range(rows):
            for x in range(columns):
                near = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
                near = [(min(b, rows - 1), min(a, columns - 1)) for b, a in near]
                found[y, x] = any(m[b, a] != m[y, x] for b, a in near)
        boundaries.append(found)
    ours, theirs = boundaries
    a, b = (torch.tensor(np.argwhere(x)).double() for x in boundaries)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    precision = (distances.min(dim=1).values <= radius).double().mean().item()
    offsets = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (offsets**2).sum(axis=0) <= radius**2
    recall = (theirs & binary_dilation(ours, disk)).sum() / theirs.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("radius", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_boundary_f_is_that_of_the_definition(seed, radius):
    mask, truth = blobs(seed), blobs(seed + 1) if seed % 2 else np.roll(blobs(seed), (2, 1), (0, 1))
    expected = reference_f(mask, truth, radius)
    assert 0 < expected < 1
    assert boundary_f(mask, truth, bound=radius) == pytest.approx(expected, abs=1e-12)


def test_boundary_f_forgives_what_is_within_the_tolerance():
    truth = square(40, 40, side=60, size=(240, 427))  # diagonal 489.9 pixels, tolerance ceil(3.92) = 4
    assert boundary_f(square(40, 44, side=60, size=(240, 427)), truth) == 1
    beyond = boundary_f(square(40, 45, side=60, size=(240, 427)), truth)
    # The outline is 61×61, 240 pixels. Beyond the tolerance lie the side that sticks out, and of the side within all
    # but 5 pixels at either end, which are near the top and the bottom.
    assert beyond == pytest.approx((240 - 61 - (61 - 10)) / 240)
    assert boundary_f(square(40, 45, side=60, size=(240, 427)), truth, bound=5) == 1
    assert boundary_f(square(150, 300, side=60, size=(240, 427)), truth) == 0


def test_the_tolerance_is_a_share_of_the_diagonal_rounded_up():
    size = (90, 100)  # diagonal 134.5 pixels, tolerance ceil(1.08) = 2; of the longer side it would be 1
    truth = square(30, 30, side=30, size=size)
    assert boundary_f(square(30, 32, side=30, size=size), truth) == 1
    assert boundary_f(square(30, 33, side=30, size=size), truth) < 1


def test_several_objects_and_void():
    truth = np.zeros((60, 80), np.uint8)
    truth[square(5, 5)], truth[square(30, 50)], truth[square(30, 5)] = 1, 2, 255
    prediction = np.where(truth == 2, 0, truth)
    prediction[truth == 255] = 1  # beside object 1: counted, it would halve its J
    assert object_scores(prediction, truth, [1, 2]).tolist() == [[1, 1], [0, 0]]
    assert object_scores(prediction, truth, [1], void=None)[0, 0] == pytest.approx(0.5)


def test_metrics_in_batches_are_metrics_of_all(tmp_path):
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(50, 7)), rng.integers(0, 7, 50)
    metric = TopKAccuracy()
    metric.add_batch(predictions=logits[:30], references=labels[:30])
    metric.add_batch(predictions=torch.tensor(logits[30:49]), references=torch.tensor(labels[30:49]))
    metric.add(prediction=logits[49], reference=labels[49])
    assert len(metric) == 50
    assert metric.compute() == pytest.approx(top_k_accuracy(logits, labels))
    assert metric.compute(predictions=logits[:9], references=labels[:9]) == top_k_accuracy(logits[:9], labels[:9])

    maps, truths = rng.integers(0, 3, (2, 4, 8, 9))
    metric = MeanIoU(num_classes=4, ignore_index=2)
    metric.add_batch(predictions=[maps[0], maps[1, :5]], references=[truths[0], truths[1, :5]])
    metric.add_batch(predictions=torch.tensor(maps[2:]), references=truths[2:])
    kept = [0, 2, 3]
    whole = confusion_matrix(maps[kept], truths[kept], 4, 2) + confusion_matrix(maps[1, :5], truths[1, :5], 4, 2)
    result = metric.compute()
    assert result["mean_iou"] == mean_iou(whole)
    assert result["pixel_accuracy"] == pytest.approx((whole.trace() / whole.sum()).item())
    assert np.isnan(result["class_iou"][3])


def test_metrics_need_no_network_and_leave_no_file(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for metric in (TopKAccuracy([1]), MeanIoU(2)):
        assert isinstance(metric, evaluate.Metric)
        assert {"predictions", "references"} == set(metric.features)
        assert metric.description and "Returns" in metric.inputs_description
    both = [TopKAccuracy([1]), TopKAccuracy([1])]  # two at once, in any order
    for metric, wrong in zip(both, (0, 1), strict=True):
        metric.add_batch(predictions=torch.eye(4), references=(torch.arange(4) + wrong) % 4)
    assert [metric.compute()["top1_accuracy"] for metric in both] == [1, 0]
    combined = evaluate.combine([TopKAccuracy([1]), TopKAccuracy([2])])
    assert set(combined.compute(predictions=np.eye(3), references=[0, 1, 0])) == {"top1_accuracy", "top2_accuracy"}
    assert not list(tmp_path.iterdir())


def test_trainer_reports_top1_and_top5(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.num_labels, config.output_hidden_states = 7, True
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    images, labels = torch.randn(20, 3, 8, 8), torch.randint(7, (20,))
    samples = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=8, use_cpu=True, disable_tqdm=True)
    metrics = Trainer(model, arguments, eval_dataset=samples, compute_metrics=compute_metrics).evaluate()
    with torch.no_grad():
        best = model(images).logits.argsort(dim=1, descending=True)
    for k in (1, 5):
        expected = (best[:, :k] == labels[:, None]).any(dim=1).float().mean().item()
        assert metrics[f"eval_top{k}_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: top_k_accuracy(torch.zeros(4, 3), torch.zeros(5)), r"labels \[n\], not \[4, 3\] and \[5\]"),
        (lambda: top_k_accuracy(torch.zeros(4, 3), torch.zeros(4)), "ks must be between 1 and the 3 classes"),
        (lambda: top_k_accuracy(torch.zeros(4, 9), torch.full((4,), -1)), "labels must be class ids in 0..8, not -1"),
        (lambda: confusion_matrix(torch.zeros(4), torch.full((4,), 255), 3), "targets must be .* 0..2, not 255..255"),
        (lambda: confusion_matrix(torch.zeros(4, 4), torch.zeros(16), 3), "one shape"),
        (lambda: mean_iou(torch.zeros(3, 3)), "no pixel"),
        (lambda: boundary_f(np.zeros((4, 4)), np.zeros((4, 5))), "of one size"),
        (lambda: MeanIoU(3).compute(), "nothing to compute"),
        (lambda: MeanIoU(3).add_batch(predictions=[[[0]]], references=[[[0]], [[1]]]), "not 1 and 2"),
    ],
)
def test_mistakes_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
