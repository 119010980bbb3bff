import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_mim.data.embedded import digits
from hf_mim.data.images import Images
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.health import (
    MEASURES,
    Health,
    dimension_std,
    effective_rank,
    mean_cosine,
    measure_health,
    position_readout,
    position_share,
    rank_me,
    token_cosine,
)
from hf_mim.evaluation.spectrum import alpha_req, lidar
from hf_mim.models.positions import sincos_table

GRID = (6, 8)
VIEWS = {"num_view_images": 20, "views": 3}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(count, rank, seed=0):
    return torch.linalg.qr(normal(count, rank, seed=seed)).Q


def position_codes(images, grid=GRID, width=32):
    return sincos_table(grid, width).expand(images, -1, -1)


@pytest.mark.parametrize("rank", [1, 5, 32])
@pytest.mark.parametrize("shape", [(200, 32), (40, 100)])
def test_both_ranks_of_a_matrix_with_equal_singular_values_are_its_rank(rank, shape):
    left = orthonormal(shape[0], rank)
    features = left @ orthonormal(shape[1], rank, seed=1).T
    assert rank_me(features) == pytest.approx(rank, rel=1e-3)
    centred = left - left.mean(0)  # equal singular values once more, without a mean
    centred = torch.linalg.qr(centred).Q @ orthonormal(shape[1], rank, seed=1).T
    assert effective_rank(centred) == pytest.approx(rank, rel=1e-3)


def test_rank_me_is_the_entropy_of_the_singular_values():
    features = normal(300, 64) * torch.linspace(0.01, 3, 64) + 2
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert rank_me(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert rank_me(features.T) == pytest.approx(rank_me(features), rel=1e-9)


def test_effective_rank_is_the_entropy_of_the_variances():
    features = normal(300, 64) * torch.linspace(0.01, 3, 64) + 2
    variances = np.linalg.eigvalsh(np.cov(features.double().numpy().T))
    shares = variances / variances.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert effective_rank(features) < rank_me(features - features.mean(0))  # variances are less even than deviations


def test_lidar_is_the_entropy_of_the_eigenvalues_of_discriminant_analysis():
    from scipy.linalg import eigh

    scales = torch.linspace(0.1, 2, 12)
    views = (normal(40, 1, 12) * scales + 0.3 * normal(40, 5, 12, seed=1) * scales.flip(0) + 7).double()
    means = views.numpy().mean(1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(image.T, bias=True) for image in views.numpy()], axis=0) + 1e-4 * np.eye(12)
    values = eigh(between, within, eigvals_only=True)
    shares = values / values.sum() + 1e-7
    assert lidar(views) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_lidar_counts_directions_that_tell_images_apart_and_rank_me_also_those_that_tell_views_apart():
    content, nuisance = 3 * normal(300, 1, 4), normal(300, 8, 12, seed=1)
    views = torch.cat([content.expand(-1, 8, -1) + 0.01 * normal(300, 8, 4, seed=2), nuisance], dim=-1)
    assert lidar(views) == pytest.approx(4, rel=0.03)
    assert rank_me(views.flatten(0, 1)) > 10
    assert lidar(torch.ones(9, 3, 5)) == pytest.approx(1, abs=1e-3)


def test_alpha_is_the_slope_of_a_power_law():
    for alpha in (0.5, 1.0, 2.0):
        rows = normal(300, 50).double()
        basis = torch.linalg.qr(rows - rows.mean(0)).Q
        features = basis * torch.arange(1, 51) ** (-alpha / 2)
        assert alpha_req(features + 3) == pytest.approx(alpha, abs=1e-6)
    features = normal(200, 40).double() * torch.linspace(0.1, 3, 40)
    values = np.sort(np.linalg.eigvalsh(np.cov(features.numpy().T)))[::-1]
    number = np.arange(1, 41)
    slope = np.polyfit(np.log(number), np.log(values), 1, w=np.sqrt(1 / number))[0]
    assert alpha_req(features) == pytest.approx(-slope, rel=1e-9)
    assert alpha_req(torch.ones(9, 5)) == 0


def test_cosines_are_means_over_all_pairs():
    features, tokens = normal(12, 5) + 0.5, normal(7, 6, 5) + 0.3
    pairs = [F.cosine_similarity(features[i], features[j], 0).item() for i in range(12) for j in range(12) if i != j]
    assert mean_cosine(features) == pytest.approx(np.mean(pairs), abs=1e-6)
    within = [
        F.cosine_similarity(image[i], image[j], 0).item()
        for image in tokens
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert token_cosine(tokens) == pytest.approx(np.mean(within), abs=1e-6)


def test_deviations_are_in_units_of_the_size_and_dead_dimensions_are_counted():
    features = normal(4000, 8)
    mean, least, dead = dimension_std(17 * features)
    assert mean == pytest.approx(1, abs=0.02) and least > 0.95 and dead == 0
    features[:, :2] = 3.0
    mean, least, dead = dimension_std(features)
    expected = features.std(0) / features.square().mean().sqrt()
    assert (mean, least, dead) == (pytest.approx(expected.mean().item(), abs=1e-6), 0, 0.25)


def test_position_codes_are_read_exactly_and_noise_is_not():
    assert position_readout(position_codes(20), GRID) == pytest.approx(1, abs=1e-3)
    assert position_readout(normal(400, 48, 16), GRID) == pytest.approx(0, abs=0.01)
    assert position_readout(position_codes(20) + normal(20, 48, 32), GRID) < 0.95


def test_the_read_out_is_ridge_regression_held_out_by_image():
    from sklearn.linear_model import Ridge

    tokens = (position_codes(11) + 0.5 * normal(11, 48, 32)).double()
    rows, columns = np.divmod(np.arange(48), 8)
    places = np.stack([rows - 2.5, columns - 3.5], 1)
    standard = (tokens - tokens.mean((0, 1))) / tokens.std((0, 1), correction=0)
    squared, spread = [], []
    for fold in range(5):
        held = np.arange(11) % 5 == fold
        train, test = standard[~held].flatten(0, 1).numpy(), standard[held].flatten(0, 1).numpy()
        model = Ridge(alpha=1e-3 * len(train), fit_intercept=False).fit(train, np.tile(places, (int((~held).sum()), 1)))
        truth = np.tile(places, (int(held.sum()), 1))
        squared.append((model.predict(test) - truth) ** 2)
        spread.append(truth**2)
    expected = (1 - np.concatenate(squared).sum(0) / np.concatenate(spread).sum(0)).mean()
    assert 0.5 < expected < 0.99
    assert position_readout(tokens, GRID) == pytest.approx(expected, abs=1e-5)


def test_position_share_finds_the_parts_of_a_mixture():
    place, image, rest = normal(1, 48, 16), normal(500, 1, 16, seed=1), normal(500, 48, 16, seed=2)
    assert position_share(place.expand(500, -1, -1)) == pytest.approx(1)
    assert position_share(rest) == pytest.approx(0, abs=1e-3)
    assert position_share(normal(3, 48, 16)) == pytest.approx(0, abs=0.05)  # unbiased: three images would give 1/3
    assert position_share(image + 0 * rest) == pytest.approx(0, abs=1e-9)
    # the place's own variance, as drawn, over that of the three
    drawn = place.var(1, correction=1).mean().item()
    assert position_share(100 + 2 * place + image + rest) == pytest.approx(4 * drawn / (4 * drawn + 2), abs=0.01)


def test_collapsed_features_read_as_collapsed():
    for value in (0.0, 0.3):  # 0.3 has no exact mean in binary
        pooled, tokens = torch.full((50, 32), value), torch.full((50, 48, 32), value)
        values = measure_health(pooled, tokens, GRID)
        assert values["rank_me"] == pytest.approx(1, abs=1e-2) and values["effective_rank"] == 1
        assert values["mean_cosine"] == pytest.approx(1) and values["token_cosine"] == pytest.approx(1)
        assert values["std_mean"] == pytest.approx(0, abs=1e-9) and values["dead_dimensions"] == 1
        assert values["position_readout"] == 0 and values["position_share"] == 0
    rounded = 0.3 + 1e-8 * normal(50, 32)  # float32 cannot hold this
    assert effective_rank(rounded) == 1


def test_tokens_in_pieces_are_measured_as_whole(monkeypatch):
    tokens = position_codes(13) + normal(13, 48, 32)
    whole = measure_health(tokens.mean(1), tokens, GRID)
    monkeypatch.setattr("hf_mim.evaluation.health._PIECE", 2 * 48 * 32)
    assert measure_health(tokens.mean(1), tokens, GRID) == pytest.approx(whole, rel=1e-9)


def test_half_precision_is_measured_in_float64():
    features = (normal(64, 16) + 30).bfloat16()
    assert mean_cosine(features) == mean_cosine(features.double())


@pytest.mark.parametrize(
    "measure, message",
    [
        (lambda: rank_me(torch.ones(1, 4)), "features must be of at least 2 images, not of 1"),
        (lambda: rank_me(torch.ones(4)), r"features must be floats \[n, D\], not torch.float32 \[4\]"),
        (lambda: mean_cosine(torch.ones(4, 4).long()), r"features must be floats \[n, D\], not torch.int64"),
        (lambda: token_cosine(torch.tensor([[[1.0], [torch.nan]]] * 2)), "features hold numbers that are not finite"),
        (lambda: dimension_std(torch.tensor([[1.0, torch.inf]] * 2)), "features hold numbers that are not finite"),
        (lambda: position_readout(torch.ones(3, 4, 2), (3, 3)), "grid must have the 4 patches of the tokens"),
        (lambda: position_share(torch.ones(3, 1, 2)), "tokens must be at least 2 for each image, not 1"),
        (lambda: Health(features="last/tokens/norm"), "features of health must be pooled, mean or cls, not last"),
        (lambda: lidar(torch.ones(3, 1, 4)), "views must be at least 2 of each image, not 1"),
        (lambda: Health(views=1), "views must be at least 2, not 1"),
        (lambda: Health(num_images=1), "num_images must be at least 2, not 1"),
    ],
)
def test_mistakes_are_named_in_one_line(measure, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        measure()
    assert "\n" not in str(error.value)


def test_the_protocol_measures_images_without_labels(tiny_encoder):
    images = Images(digits()[1].remove_columns("label"), "digits")
    extract = FeatureExtractor(tiny_encoder, progress=False)
    protocol = Health(num_images=200, num_token_images=40, **VIEWS)
    result = protocol.run(extract, images)
    assert [row["measure"] for row in result.table] == [measure.name for measure in MEASURES]
    values = {row["measure"]: row["value"] for row in result.table}
    assert result.value == values["rank_me"] and 1 < result.value < 32
    assert result.data == {"source": "digits", "images": 200, "token_images": 40}
    assert "on 200 images of digits" in str(result)
    # The encoder is untrained itself, of seed 0.
    assert {row["measure"]: row["untrained"] for row in result.table} == pytest.approx(values, rel=1e-6)
    assert protocol.run(extract, images).table == result.table
    other = Health(num_images=200, num_token_images=40, **VIEWS, seed=1).run(extract, images).table[0]
    assert other["untrained"] != pytest.approx(other["value"], rel=1e-3)
    assert "untrained" not in Health(num_images=50, **VIEWS, compare=False).run(extract, images).table[0]
    with pytest.raises(ValueError, match="images must be at least 2 to be compared, not 1"):
        protocol.run(extract, images.select([0]))


def test_lidar_sees_each_image_in_several_crops(tiny_encoder, monkeypatch):
    seen = []
    monkeypatch.setattr("hf_mim.evaluation.health.lidar", lambda views: seen.append(views) or 1.0)
    images = Images(digits()[1].remove_columns("label"), "digits")
    Health(num_images=50, **VIEWS, compare=False).run(FeatureExtractor(tiny_encoder, progress=False), images)
    (views,) = seen
    assert views.shape[:2] == (20, 3)
    apart = torch.cdist(views, views).amax((1, 2))  # of two crops of one image
    assert apart.min() > 0 and apart.mean() < torch.pdist(views.mean(1)).max()


def test_a_collapsed_encoder_gives_reason_to_worry(tiny_encoder):
    torch.nn.init.zeros_(tiny_encoder.model.norm.weight)
    torch.nn.init.ones_(tiny_encoder.model.norm.bias)
    images = Images(digits()[1].remove_columns("label"), "digits")
    result = Health(num_images=50, **VIEWS, compare=False).run(FeatureExtractor(tiny_encoder, progress=False), images)
    worried = {row["measure"] for row in result.table if row["worry"] == "yes"}
    assert {"rank_me_share", "effective_rank", "mean_cosine", "token_cosine", "std_mean", "dead_dimensions"} == worried
    assert "mean_cosine" in result.notes[0]


def test_it_is_cheap_enough_for_training():
    tokens = normal(512, 64, 128)
    pooled = tokens.mean(1)
    measure_health(pooled, tokens, (8, 8))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        measure_health(pooled, tokens, (8, 8))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2  # .3 on one core of a busy machine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_measures_the_same():
    tokens = position_codes(40) + normal(40, 48, 32)
    on_cpu = measure_health(tokens.mean(1), tokens, GRID)
    assert measure_health(tokens.mean(1).cuda(), tokens.cuda(), GRID) == pytest.approx(on_cpu, rel=1e-6)
