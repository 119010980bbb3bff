"""Linear heads against torch's SGD, torch's BatchNorm and scikit-learn; the protocol against what it promises."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from hf_mim.data.splits import stratified_split
from hf_mim.evaluation import linear, probe_training
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.linear import Linear, LinearHeads, train_heads
from hf_mim.evaluation.probe_training import choose_and_test, describe_choice, mean_and_scale, train_together


def clusters(n=300, width=12, num_classes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (n,), generator=random)
    centers = torch.randn(num_classes, width, generator=random)
    return centers[labels] + torch.randn(n, width, generator=random) * 2 + 5, labels


def test_standardising_is_batch_norm_without_affine_over_the_training_images():
    x, _ = clusters()
    norm = nn.BatchNorm1d(12, eps=1e-6, affine=False, momentum=1.0)
    mean, scale = mean_and_scale(x, torch.arange(200), "x")
    torch.testing.assert_close((x[:200] - mean) * scale, norm(x[:200]), rtol=1e-4, atol=1e-5)
    tokens = x.view(100, 3, 12)
    torch.testing.assert_close(mean_and_scale(tokens, torch.arange(100), "x")[0], x.mean(0))


def test_standardising_is_exact_far_from_zero_and_of_constant_features(monkeypatch):
    monkeypatch.setattr(probe_training, "LARGEST_PIECE", 100)
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    x[:, 1] = 3.25
    mean, scale = mean_and_scale(x, torch.arange(5000), "x")
    torch.testing.assert_close(scale[0], 1 / (x[:, 0].double().var(correction=0) + 1e-6).sqrt().float())
    assert ((x[:, 1] - mean[1]) * scale[1]).abs().max() == 0


def test_each_head_is_the_one_that_torch_trains_alone(monkeypatch):
    monkeypatch.setattr(linear, "LARGEST_PIECE", 5 * 3 * 4)  # logits of five images at once
    x, labels = clusters(n=48)
    grid = [(0.3, 0.0), (0.05, 0.01), (0.01, 0.1)]
    heads = LinearHeads(*mean_and_scale(x, torch.arange(48), "x"), grid, 4, torch.device("cpu"))
    for rate in (1.0, 0.7, 0.2):
        heads.step(x, labels, rate)
    found = heads.logits(heads.standardise(x))
    standardised = nn.BatchNorm1d(12, eps=1e-6, affine=False)(x)
    for h, (learning_rate, weight_decay) in enumerate(grid):
        alone = nn.Linear(12, 4)
        nn.init.zeros_(alone.weight), nn.init.zeros_(alone.bias)
        groups = [{"params": [alone.weight], "weight_decay": weight_decay}, {"params": [alone.bias]}]
        optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
        for rate in (1.0, 0.7, 0.2):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate
            optimizer.zero_grad()
            F.cross_entropy(alone(standardised), labels).backward()
            optimizer.step()
        torch.testing.assert_close(found[:, h], alone(standardised), rtol=1e-4, atol=1e-5)


def test_a_head_does_not_depend_on_the_heads_and_features_beside_it():
    x, labels = clusters()
    ids = torch.arange(250)
    (alone,) = train_heads([x], labels, ids, [[(0.03, 0.001)]], 4, epochs=3, batch_size=32)
    many = train_heads([x.flip(1), x], labels, ids, [[(9.0, 0.0)], [(9.0, 1.0), (0.03, 0.001)]], 4, 3, 32)
    torch.testing.assert_close(many[1].weight[:, 1], alone.weight[:, 0], rtol=1e-4, atol=1e-6)


def test_convex_training_reaches_the_optimum_of_scikit_learn():
    x, labels = clusters(n=400)
    ids, decay = torch.arange(400), 0.02
    (head,) = train_heads([x], labels, ids, [[(0.1, decay)]], 4, epochs=100)
    z = head.standardise(x)
    reference = LogisticRegression(C=1 / (decay * 400), tol=1e-8, max_iter=1000).fit(z.numpy(), labels.numpy())
    probabilities = torch.from_numpy(reference.predict_proba(z.numpy())).float()
    torch.testing.assert_close(head.logits(z)[:, 0].softmax(dim=1), probabilities, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_probe_is_within_a_point_of_logistic_regression_on_digits(tiny_encoder, digits_splits):
    extract = FeatureExtractor(tiny_encoder, progress=False)
    train, test = digits_splits
    result = Linear(features=["last/mean/norm", "last/cls/raw"]).run(extract, train, test)
    for name in ("last/mean/norm", "last/cls/raw"):
        (x,), (z,) = extract(train, [name]), extract(test, [name])
        mean, scale = mean_and_scale(x, torch.arange(len(x)), name)
        reference = LogisticRegression(max_iter=500).fit(((x - mean) * scale).numpy(), train.read_labels().numpy())
        reference = reference.score(((z - mean) * scale).numpy(), test.read_labels().numpy())
        assert result.scores[f"top1 {name}"] >= reference - 0.01, (result.scores, reference)
    assert result.value in (result.scores["top1 last/mean/norm"], result.scores["top1 last/cls/raw"])
    assert result.value <= result.scores["top5"] <= 1


class Recorder:
    """Stands for probes of features that are the numbers of the rows."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches, self.rates = [], []

    def step(self, features, labels, rate):
        assert torch.equal(features[:, 0], labels)
        self.batches.append(features[:, 0].tolist())
        self.rates.append(rate)


def test_an_epoch_shows_every_row_once_in_even_batches_at_scheduled_rates():
    rows, ids, recorder = torch.arange(200), torch.arange(50, 180), Recorder()
    train_together([recorder], [rows[:, None]], rows, ids, epochs=2, batch_size=64, seed=0, warmup=0.5)
    assert [len(batch) for batch in recorder.batches] == [44, 43, 43] * 2
    first, second = sum(recorder.batches[:3], []), sum(recorder.batches[3:], [])
    assert sorted(first) == sorted(second) == ids.tolist() and first != second
    peak = 64 / 256
    expected = [0, peak / 3, 2 * peak / 3] + [peak * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert recorder.rates == pytest.approx(expected)


def test_the_order_of_training_does_not_depend_on_what_was_held_out():
    rows, recorder = torch.arange(1000), Recorder()
    held = set(stratified_split(rows % 4, 0.1, seed=0)[1].tolist())
    train_together([recorder], [rows[:, None]], rows, rows, epochs=1, batch_size=100, seed=0)
    shares = [len(held.intersection(batch)) / len(held) for batch in recorder.batches]
    assert max(shares) < 0.3, "held-out images come all over the epoch"


def test_training_shows_a_bar_of_its_steps_only_if_asked(capsys, monkeypatch):
    monkeypatch.setattr("hf_mim.progress.watched", lambda: True)
    rows = torch.arange(30)
    for progress in (False, True):
        assert capsys.readouterr().err == ""
        train_together([Recorder()], [rows[:, None]], rows, rows, epochs=2, batch_size=10, seed=0, progress=progress)
    assert "0/6" in capsys.readouterr().err


class Given:
    """Stands for an extractor of given features."""

    def __init__(self, features, log=None, num_layers=2):
        self.features, self.log = features, [] if log is None else log
        self.progress = False
        layers = SimpleNamespace(streams=[SimpleNamespace(width=8)] * num_layers)
        self.encoder = SimpleNamespace(
            device=torch.device("cpu"),
            num_prefix_tokens=1,
            num_layers=num_layers,
            norm=torch.nn.Identity(),
            layers=layers,
        )

    def __call__(self, split, specs):
        self.log.append(f"features of {split.name}")
        return [self.features[str(spec)][split.rows] for spec in specs]


class Rows:
    def __init__(self, labels, rows, name, log=None):
        self.labels, self.rows, self.name, self.log = labels, rows, name, [] if log is None else log

    def read_labels(self):
        self.log.append(f"labels of {self.name}")
        return self.labels[self.rows]

    def read_groups(self):
        return None

    def describe(self):
        return {"source": self.name}


def given(log=None, num_classes=4):
    x, labels = clusters(n=500, num_classes=num_classes)
    noise = torch.randn(500, 12, generator=torch.Generator().manual_seed(3))
    extract = Given({"last/mean/norm": noise, "last/cls/norm": x}, log)
    return extract, Rows(labels, slice(0, 400), "train", log), Rows(labels, slice(400, 500), "test", log)


def test_the_choice_is_made_before_a_test_label_is_read():
    log = []
    Linear(epochs=1).run(*given(log))
    assert log[-2:] == ["features of test", "labels of test"] and log.count("labels of test") == 1


class Memory:
    """Stands for probes that learnt the labels of their rows by heart and are wrong on all others."""

    def __init__(self, labels, ids, num_heads):
        self.ids, self.num_heads, self.asked = ids, num_heads, []
        self.classes = labels.clone()
        self.classes[~torch.isin(torch.arange(len(labels)), ids)] += 1

    def predict(self, features, ids, k=1):
        self.asked.append(ids)
        return self.classes[ids, None, None].expand(-1, self.num_heads, k)


def test_the_heads_that_choose_never_saw_the_images_that_choose():
    extract, train, test = given()
    fitted = []

    def fit(features, labels, ids, grids, num_classes):
        fitted.append([Memory(labels, ids, len(grid)) for grid in grids])
        return fitted[-1]

    options, specs = Linear(learning_rates=[0.1, 1], weight_decays=[0]), [FeatureSpec(), FeatureSpec(pooling="cls")]
    table = choose_and_test(options, fit, extract, train, test, specs).table
    assert [row["held_out"] for row in table] == [0] * 4
    (choosing, _), (final, _) = fitted
    (held,) = choosing.asked
    assert len(held) == 40 and sorted([*choosing.ids.tolist(), *held.tolist()]) == list(range(400))
    assert sorted(final.ids.tolist()) == list(range(400)), "the chosen ones are fitted on all training images"


def test_the_protocol_shows_a_bar_where_the_extractor_does(capsys, monkeypatch):
    monkeypatch.setattr("hf_mim.progress.watched", lambda: True)
    extract, train, test = given()
    for extract.progress in (False, True):
        assert capsys.readouterr().err == ""
        Linear(epochs=1).run(extract, train, test)
    assert "probes" in capsys.readouterr().err


def test_choice_falls_on_the_features_that_tell_the_classes_by_held_out_images():
    result = Linear(epochs=5).run(*given())
    assert result.value == result.scores["top1 last/cls/norm"] > 0.5 > result.scores["top1 last/mean/norm"]
    assert "last/cls/norm" in result.notes[0] and "40 held-out images" in result.notes[0]
    assert result.settings["features"] == ["last/mean/norm", "last/cls/norm"]
    assert "top5" not in result.scores, "of four classes the likeliest five are all"


def test_the_table_holds_every_head_and_only_the_chosen_ones_meet_the_test():
    result = Linear(epochs=2, learning_rates=[0.01, 0.1, 1.0], weight_decays=[0.0, 0.01]).run(*given(num_classes=7))
    assert len({tuple(row.items()) for row in result.table}) == 2 * 3 * 2
    for name in ("last/mean/norm", "last/cls/norm"):
        rows = [row for row in result.table if row["features"] == name]
        tested = [row for row in rows if row["test"] is not None]
        assert len(tested) == 1 and tested[0]["held_out"] == max(row["held_out"] for row in rows)
        assert tested[0]["test"] == result.scores[f"top1 {name}"]
    assert result.value < result.scores["top5"]


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not():
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        runs.append(Linear(epochs=2, seed=seed).run(*given()).table)
    assert runs[0] == runs[1] != runs[2]


def test_a_learning_rate_at_the_end_of_the_grid_is_reported():
    grid = [(rate, decay) for rate in (0.3, 0.01, 0.1) for decay in (0.0, 1.0)]
    assert "0.3 is at the end" in describe_choice("last/mean/norm", grid, 1, 40)[1]
    assert "0.01 is at the end" in describe_choice("last/mean/norm", grid, 2, 40)[1]
    assert len(describe_choice("last/mean/norm", grid, 4, 40)) == 1
    assert len(describe_choice("last/mean/norm", [(0.3, 0.0), (0.3, 1.0)], 1, 40)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rates": []}, "learning_rates must be numbers above 0, at least one"),
        ({"learning_rates": [0.1, 0]}, "learning_rates must be numbers above 0"),
        ({"learning_rates": [0.1, math.inf]}, "learning_rates must be numbers above 0"),
        ({"weight_decays": [0, math.nan]}, "weight_decays must be numbers 0 or more"),
        ({"weight_decays": [-0.1]}, "weight_decays must be numbers 0 or more"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"held_out": 1.0}, "held_out must lie in \\(0, 1\\), not 1.0"),
        ({"features": ["last/tokens/norm"]}, "features of linear must be pooled, mean or cls, not last/tokens/norm"),
        ({"features": ["best"]}, "such as last/mean/norm"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Linear(**options)


def test_one_class_and_broken_features_are_one_line_errors():
    extract, train, test = given()
    with pytest.raises(ValueError, match="two classes"):
        Linear().run(extract, Rows(torch.zeros(500, dtype=torch.long), slice(0, 400), "train"), test)
    extract.features["last/mean/norm"][7, 3] = torch.nan
    with pytest.raises(ValueError, match="features last/mean/norm hold numbers that are not finite"):
        Linear(epochs=1).run(extract, train, test)
