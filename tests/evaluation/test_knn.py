"""k-NN classification against a loop that does what the paper says."""

import json
import math

import pytest
import torch

from hf_mim.evaluation import knn
from hf_mim.evaluation.features import extract_features, mean_patch_token, raw_pixels
from hf_mim.evaluation.knn import evaluate_knn, knn_predict
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEModel


def features_and_labels(seed=0, n=60, m=25, classes=5):
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, 8, generator=generator), torch.randn(m, 8, generator=generator)
    return train, torch.randint(classes, (n,), generator=generator), test


def predict_by_loop(train, labels, test, k, temperature):
    predictions = []
    for feature in test:
        cosines = [torch.cosine_similarity(feature, other, dim=0).item() for other in train]
        votes = {}
        for similarity, label in sorted(zip(cosines, labels.tolist(), strict=True), reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / temperature)
        predictions.append(max(votes, key=votes.get))
    return predictions


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_predictions_are_those_of_a_loop_over_images(k):
    train, labels, test = features_and_labels()
    assert knn_predict(train, labels, test, k).tolist() == predict_by_loop(train, labels, test, k, 0.07)


def test_near_neighbours_outvote_many_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.1]])
    assert knn_predict(train, labels, test, k=4, temperature=0.07).item() == 0
    assert knn_predict(train, labels, test, k=4, temperature=100.0).item() == 1  # then every vote is the same


def test_chunks_do_not_change_the_result(monkeypatch):
    train, labels, test = features_and_labels()
    whole = knn_predict(train, labels, test)
    monkeypatch.setattr(knn, "LARGEST_TABLE", 3 * len(train))
    assert torch.equal(knn_predict(train, labels, test), whole)


def test_the_length_of_a_feature_does_not_count():
    train, labels, test = features_and_labels()
    scaled = train * torch.rand(len(train), 1) * 100 + 0
    assert torch.equal(knn_predict(scaled, labels, test * 7), knn_predict(train, labels, test))


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"k": 0}, "k must"), ({"k": 61}, "k must"), ({"temperature": 0}, "temp")]
)
def test_impossible_settings_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        knn_predict(*features_and_labels(), **kwargs)


def test_the_result_counts_correct_images_and_saves_its_protocol(tmp_path):
    train = (torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3))
    test = (torch.eye(4), torch.tensor([0, 1, 2, 0]))
    result = evaluate_knn(train, test, features="unit vectors", data={"train": "here"})
    result.save(tmp_path / "knn.json")
    saved = json.loads((tmp_path / "knn.json").read_text())
    assert saved["accuracy"] == 0.75
    assert saved["k"] == 12  # fewer training images than 20: all vote
    assert (saved["train_images"], saved["test_images"], saved["num_classes"]) == (12, 4, 4)
    assert saved["features"] == "unit vectors" and saved["temperature"] == 0.07 and "torch" in saved["versions"]


def test_features_are_the_mean_patch_token_without_cls_and_unknown_labels_are_left_out():
    torch.manual_seed(0)
    config = MAEConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    encoder = MAEModel(config).eval()
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    images = [{"pixel_values": p, "labels": label} for p, label in zip(pixels, [3, -1, 0, 1, -1], strict=True)]
    features, labels = extract_features(mean_patch_token(encoder), images, lambda x: x / 255, batch_size=2)
    assert labels.tolist() == [3, 0, 1]
    expected = encoder(pixels[[0, 2, 3]] / 255).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(features, expected)


def test_raw_pixels_are_averaged_down_to_32():
    images = torch.arange(64.0).view(1, 1, 1, 64).expand(2, 1, 64, 64)
    pixels = raw_pixels(images)
    assert pixels.shape == (2, 32 * 32)
    assert pixels[0, :3].tolist() == [0.5, 2.5, 4.5]
    assert torch.equal(raw_pixels(images[..., :8, :8]), images[..., :8, :8].flatten(1))
