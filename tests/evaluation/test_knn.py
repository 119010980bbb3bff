"""k-NN classification against scikit-learn and against loops that do what the papers say."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation import knn
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.knn import KNN, LeaveOneOut, knn_predict, knn_sweep, nearest_other


def features_and_labels(seed=0, n=600, m=250, classes=5, width=8):
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, width, generator=generator), torch.randn(m, width, generator=generator)
    return train, torch.randint(classes, (n,), generator=generator), test


def predict_by_scikit_learn(train, labels, test, k, temperature):
    model = KNeighborsClassifier(
        k, weights=lambda distance: np.exp(-distance / temperature), algorithm="brute", metric="cosine"
    )
    return model.fit(train.double().numpy(), labels.numpy()).predict(test.double().numpy()).tolist()


def predict_by_loop(train, labels, test, k, temperature, num_classes=5):
    """Ties are settled as documented: of equally near images the first, of equal classes the first."""
    predictions = []
    train = train.double() / train.double().norm(dim=1, keepdim=True)
    for feature in test.double():
        cosines = [round((feature / feature.norm() @ other).item(), 13) for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]  # stable
        votes = [0.0] * num_classes
        for i in nearest:
            votes[labels[i]] += math.exp((cosines[i] - 1) / temperature)
        predictions.append(next(c for c in range(num_classes) if votes[c] >= max(votes) * (1 - 1e-9)))
    return predictions


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (600, 0.2)])
def test_random_features_are_classified_as_by_scikit_learn(k, temperature):
    train, labels, test = features_and_labels()
    expected = predict_by_scikit_learn(train, labels, test, k, temperature)
    assert knn_predict(train, labels, test, k, temperature).tolist() == expected


@pytest.mark.parametrize("k", [3, 4, 12])
def test_tied_votes_and_tied_neighbours_within_k_are_settled_as_by_scikit_learn(k):
    # Corners of a cube, each four times with one label: every neighbour has twins, and the votes of classes tie.
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    labels = torch.tensor([0, 1, 1, 0, 2, 0, 1, 2]).repeat_interleave(4)
    train, test = corners.repeat_interleave(4, dim=0), torch.eye(3)
    if k == 12:  # 16 corners are equally near: which 12 of them is a matter of convention
        assert knn_predict(train, labels, test, k).tolist() == predict_by_loop(train, labels, test, k, 0.07)
    else:
        near = torch.cat([corners, corners[:1]])  # the corners themselves have one nearest set of four twins
        expected = predict_by_scikit_learn(train, labels, near, k, 0.07)
        assert knn_predict(train, labels, near, k).tolist() == expected


@pytest.mark.parametrize("k", [1, 7, 20])
def test_of_equally_near_images_the_first_vote(k):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 16, generator=generator)
    copies = torch.randint(40, (400,), generator=generator)
    train, labels = base[copies] * (1 + copies[:, None]), torch.randint(5, (400,), generator=generator)
    test = torch.randn(60, 16, generator=generator)
    assert knn_predict(train, labels, test, k).tolist() == predict_by_loop(train, labels, test, k, 0.07)


def test_near_neighbours_outvote_many_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[1.0, 0.1]])
    assert knn_predict(train, labels, test, k=4, temperature=0.07).item() == 0
    assert knn_predict(train, labels, test, k=4, temperature=100.0).item() == 1  # then every vote is the same


def test_chunks_do_not_change_the_result(monkeypatch):
    train, labels, test = features_and_labels()
    whole, other = knn_predict(train, labels, test), nearest_other(train)
    monkeypatch.setattr(knn, "LARGEST_TABLE", 7 * 21 * knn.GROUP)
    assert torch.equal(knn_predict(train, labels, test), whole)
    assert torch.equal(nearest_other(train), other)


@pytest.mark.parametrize("columns", [2571, 2560, 90])
def test_the_largest_of_a_table_are_those_of_topk(columns):
    table = torch.randn(40, columns, generator=torch.Generator().manual_seed(0))
    table[:, ::7] = table[:, :1]  # ties, within groups and across
    values, ids = knn.largest(table, 12)
    assert torch.equal(values, table.topk(12, dim=1).values)
    assert torch.equal(table.gather(1, ids), values) and all(len(set(row)) == 12 for row in ids.tolist())


def test_the_length_of_a_feature_does_not_count():
    train, labels, test = features_and_labels()
    scaled = train * (0.1 + torch.rand(len(train), 1)) * 100
    assert torch.equal(knn_predict(scaled, labels, test * 7), knn_predict(train, labels, test))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_large_and_small_features_are_classified_as_others(scale):
    train, labels, test = features_and_labels()
    assert torch.equal(knn_predict(train * scale, labels, test * scale), knn_predict(train, labels, test))


def test_class_ids_may_have_gaps_and_be_large():
    train, labels, test = features_and_labels()
    ids = torch.tensor([3, 10**9, 0, 77, 12345])
    predictions = knn_predict(train, ids[labels], test)
    order = ids.argsort().argsort()  # ties go to the first id
    assert torch.equal(predictions, ids.sort().values[knn_predict(train, order[labels], test)])


def test_of_collapsed_features_the_true_neighbours_are_found():
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 16, generator=generator)
    train, test = (centre + 1e-3 * torch.randn(n, 16, generator=generator) for n in (3000, 40))
    labels = torch.randint(5, (3000,), generator=generator)
    assert knn_predict(train, labels, test, 7).tolist() == predict_by_loop(train, labels, test, 7, 0.07)


def test_one_search_gives_every_k_and_temperature():
    train, labels, test = features_and_labels()
    for (k, temperature), predictions in knn_sweep(train, labels, test, [1, 30, 5], [0.07, 1.0]).items():
        assert torch.equal(predictions, knn_predict(train, labels, test, k, temperature))


def test_of_equally_near_images_the_first_vote_for_every_k_of_a_search():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(20, 16, generator=generator)[torch.randint(20, (400,), generator=generator)]  # 20 twins each
    labels = torch.randint(5, (400,), generator=generator)
    test = torch.randn(30, 16, generator=generator)
    for (k, temperature), predictions in knn_sweep(train, labels, test, [1, 5, 70], [0.07]).items():
        assert predictions.tolist() == predict_by_loop(train, labels, test, k, temperature)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"k": 0}, "k must"), ({"k": 601}, "k must"), ({"temperature": 0}, "temp")]
)
def test_impossible_settings_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        knn_predict(*features_and_labels(), **kwargs)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_nearest_other_image_is_that_of_scikit_learn(offset):
    features = features_and_labels()[0] + offset  # residual streams have a large common part
    _, expected = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(features.double()).kneighbors()
    assert nearest_other(features).tolist() == expected[:, 0].tolist()


def test_one_outlier_does_not_hide_the_neighbours_of_others():
    features = features_and_labels()[0]
    features[5] *= 1e6
    _, expected = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(features.double()).kneighbors()
    assert nearest_other(features).tolist() == expected[:, 0].tolist()


def test_an_image_is_not_its_own_neighbour_but_its_twin_is():
    features = torch.randn(6, 4).repeat(2, 1)
    assert nearest_other(features).tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]


def test_with_groups_the_nearest_of_another_group_counts():
    features, groups = features_and_labels()[0], torch.arange(len(features_and_labels()[0])) // 3
    distance = torch.cdist(features.double(), features.double())
    distance[groups[:, None] == groups] = torch.inf
    assert nearest_other(features, groups).tolist() == distance.argmin(1).tolist()
    assert not (groups[nearest_other(features, groups)] == groups).any()


def test_leave_one_out_leaves_out_the_group(tiny_encoder, digits_splits):
    """Each image is there twice, as one group: without groups each finds its twin."""
    test = digits_splits[1].select([index // 2 for index in range(80)])
    twins = test.images.add_column("group", [str(index // 2) for index in range(80)])
    extract, protocol = FeatureExtractor(tiny_encoder, progress=False), LeaveOneOut()
    assert protocol.run(extract, test, test).value == 1
    alone = protocol.run(extract, test, test.select(range(0, 80, 2))).value
    assert protocol.run(extract, test, LabelledImages(twins, group="column group")).value == alone < 1
    with pytest.raises(ValueError, match="group must tell two groups at least in the test images"):
        protocol.run(extract, test, LabelledImages(twins.select([0, 1])))


def test_the_protocol_counts_correct_images_and_says_what_it_did(tiny_encoder, digits_splits):
    train, test = digits_splits[0].select(range(300)), digits_splits[1].select(range(100))
    extract = FeatureExtractor(tiny_encoder, progress=False)
    result = KNN(k=5, ks=[1], temperatures=[]).run(extract, train, test)
    (train_features,), (test_features,) = extract(train, ["last/mean/norm"]), extract(test, ["last/mean/norm"])
    predictions = knn_predict(train_features, train.read_labels(), test_features, k=5)
    assert result.value == (predictions == test.read_labels()).double().mean().item() > 0.3
    assert result.settings["k"] == 5 and result.settings["features"] == "last/mean/norm"
    assert (result.data["train"]["images"], result.data["test"]["images"]) == (300, 100)
    assert [row["k"] for row in result.table] == [1, 5] and result.table[1]["T 0.07"] == result.value


def test_leave_one_out_is_latent_mims(tiny_encoder, digits_splits):
    test = digits_splits[1].select(range(100))
    extract = FeatureExtractor(tiny_encoder, progress=False)
    (tokens,) = extract(test, ["last/tokens/raw"])
    distance = torch.cdist(tokens.mean(1), tokens.mean(1)).fill_diagonal_(torch.inf)
    labels = test.read_labels()
    expected = (labels[distance.argmin(1)] == labels).double().mean().item()
    assert LeaveOneOut().run(extract, digits_splits[0], test).value == expected


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (lambda: KNN(k=0), "k must be at least 1, not 0"),
        (lambda: KNN(temperatures=[0.1, 0.0]), "temperatures must be above 0, not 0.0"),
        (lambda: KNN(temperature=math.nan), "temperature must be above 0, not nan"),
        (lambda: LeaveOneOut("last/tokens/raw"), "features of leave_one_out must be pooled, mean or cls"),
        (lambda: KNN(features="last/mean"), "features must be layer/pooling/norm"),
    ],
)
def test_options_out_of_range_are_errors(protocol, message):
    with pytest.raises(ValueError, match=message):
        protocol()


def test_fewer_images_than_k_are_an_error(tiny_encoder, digits_splits):
    train = digits_splits[0].select(range(10))
    with pytest.raises(ValueError, match="k must be at most the 10 training images, not 20"):
        KNN().run(FeatureExtractor(tiny_encoder), train, digits_splits[1])
