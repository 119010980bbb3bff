"""Draws of a few labelled images, and logistic regression on them against its definition and by hand."""

import math
import statistics

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score

from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.lowshot import LowShot, draw_images, fit_logistic

LABELS = torch.tensor([0] * 300 + [1] * 100 + [4] * 10)


def drawn_of_each_class(budget, **seeds):
    drawn = LABELS[draw_images(LABELS, budget, **{"seed": 0} | seeds)]
    return {label: int((drawn == label).sum()) for label in (0, 1, 4)}


def test_draws_take_the_same_number_of_each_class():
    assert drawn_of_each_class("0.1%") == {0: 1, 1: 1, 4: 1}
    assert drawn_of_each_class("5%") == {0: 7, 1: 7, 4: 7}  # a third of 5 % of 410
    assert drawn_of_each_class("12.5%") == {0: 17, 1: 17, 4: 10}, "a small class gives what it has"
    assert drawn_of_each_class("7") == {0: 7, 1: 7, 4: 7}


def test_draws_differ_by_seed_and_number_and_grow_with_the_budget():
    draws = {(seed, draw): draw_images(LABELS, "10%", seed, draw).tolist() for seed in (0, 1) for draw in (0, 1)}
    assert len({tuple(ids) for ids in draws.values()}) == 4
    torch.manual_seed(5)
    assert draws[1, 0] == draw_images(LABELS, "10%", 1, 0).tolist()
    assert set(draw_images(LABELS, "1%", 1, 0).tolist()) < set(draws[1, 0])


@pytest.mark.parametrize("budget", ["0%", "0", "101%", "-1", "1.5", "half", "%", ""])
def test_budgets_that_are_none_are_refused(budget):
    with pytest.raises(ValueError, match="budgets must be percentages such as 1% or images per class such as 5"):
        LowShot(budgets=[budget])


def test_a_class_smaller_than_the_budget_is_named_before_any_work(tiny_encoder, digits_splits):
    with pytest.raises(ValueError, match="budgets 11 asks for 11 images of each class, and class 4 has 10"):
        draw_images(LABELS, "11", seed=0)
    with pytest.raises(ValueError, match="budgets 500 asks for 500 images of each class"):
        LowShot(budgets=["5", "500"]).run(None, *digits_splits)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draws": 0}, "draws must be at least 1, not 0"),
        ({"c": [1.0, 0.0]}, "c must be numbers above 0"),
        ({"c": [1.0, math.nan]}, "c must be numbers above 0"),
        ({"c": [math.inf]}, "c must be numbers above 0"),
        ({"budgets": []}, "budgets must name at least one"),
        ({"features": "last/tokens/norm"}, "features of lowshot must be pooled, mean or cls, not last/tokens/norm"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowShot(**options)


def test_fit_minimises_the_loss_of_its_definition():
    random = torch.Generator().manual_seed(0)
    x, labels = torch.randn(30, 5, generator=random, dtype=torch.float64), torch.arange(30) % 3
    model = fit_logistic(x, labels, [2.0])
    weight, bias = (torch.tensor(v, requires_grad=True) for v in (model.coef_, model.intercept_))
    loss = 2.0 * torch.nn.functional.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
    (loss + weight.square().sum() / 2).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-2


def test_c_is_the_one_that_cross_validation_prefers():
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 2
    x = torch.randn(60, 200, generator=random)
    x[:, 0] += 4 * (labels - 0.5)  # one telling dimension among much noise
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    grid = [1e-6, 1e-3, 1.0, 1e3, 1e6]
    models = {c: LogisticRegression(C=c, max_iter=2000) for c in grid}
    worth = [cross_val_score(models[c], x.double().numpy(), labels.numpy(), cv=folds).mean() for c in grid]
    best = grid[worth.index(max(worth))]
    assert best != 1.0 and fit_logistic(x, labels, grid[::-1]).C == best
    assert fit_logistic(x[:2], labels[:2], [10.0, 1.0, 0.1]).C == 1.0, "single images: the middle one"


def test_groups_stay_in_one_fold_when_c_is_chosen():
    """Each group has a noise dimension of its own, so that a fold with all its images in training looks too good."""
    random, labels = torch.Generator().manual_seed(2), torch.arange(60) % 2
    groups = labels + 2 * (torch.arange(60) // 6)  # 20 groups of three images of one class
    x = torch.randn(60, 60, generator=random) * 0.3 + 3 * torch.nn.functional.one_hot(groups, 60)
    x[:, 59] += 2 * (labels - 0.5)
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    grid = [1e-4, 1e-2, 1.0, 1e2]
    arguments = dict(X=x.double().numpy(), y=labels.numpy(), groups=groups.numpy(), cv=folds)
    worth = [cross_val_score(LogisticRegression(C=c, max_iter=2000), **arguments).mean() for c in grid]
    assert fit_logistic(x, labels, grid, groups=groups).C == grid[worth.index(max(worth))]
    assert fit_logistic(x, labels, grid).C != fit_logistic(x, labels, grid, groups=groups).C
    assert fit_logistic(x, labels, [1.0, 2.0, 3.0], groups=labels).C == 2.0, "single groups: the middle one"


def test_every_draw_takes_the_c_that_cross_validation_prefers_on_it(capsys, monkeypatch):
    monkeypatch.setattr("hf_mim.progress.watched", lambda: True)
    random, labels = torch.Generator().manual_seed(3), torch.arange(400) % 2
    x = torch.randn(400, 200, generator=random)
    x[:, 0] += 4 * (labels - 0.5)

    class Split:
        describe, read_labels, read_groups = dict, lambda self: labels, lambda self: None

    def extract(split, specs):
        return [x]

    extract.progress, grid = True, [1e6, 1.0, 1e3, 1e-3]
    result = LowShot(budgets=["50"], draws=3, c=grid).run(extract, Split(), Split())
    chosen = [row["C"] for row in result.table]
    drawn = [draw_images(labels, "50", 0, draw) for draw in range(3)]
    z = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-6) / 200**0.5
    assert chosen == [fit_logistic(z[ids], labels[ids], grid).C for ids in drawn]
    assert len(set(chosen)) > 1
    assert "0/3" in capsys.readouterr().err, "a bar over the draws"


def test_value_is_the_mean_over_draws_and_test_labels_are_read_last(tiny_encoder, digits_splits):
    train, test = digits_splits
    extract, log = FeatureExtractor(tiny_encoder, progress=False), []

    class Watched:
        images = test.images

        def __len__(self):
            return len(test)

        def read_labels(self):
            log.append("labels")
            return test.read_labels()

        def describe(self):
            return {}

    def watched(split, specs):
        log.append("features")
        return extract(split, specs)

    watched.progress = False
    result = LowShot(budgets=["2", "10%"], draws=3, c=[1.0]).run(watched, train, Watched())
    assert log == ["features", "features", "labels"]
    drawn = [row["accuracy"] for row in result.table if row["budget"] == "2"]
    assert [row["images"] for row in result.table] == [20, 20, 20, 140, 140, 140]
    assert len(set(drawn)) > 1
    assert result.value == result.scores["top1 2"] == statistics.mean(drawn)
    assert result.scores["top1 2 standard deviation"] == statistics.stdev(drawn)
    assert 0.2 < result.value < result.scores["top1 10%"]
    again = LowShot(budgets=["2"], draws=3, c=[1.0]).run(extract, train, test)
    assert [row["accuracy"] for row in again.table] == drawn

    # The last draw of 10 % by scikit-learn alone.
    (x,), (z,) = extract(train, ["last/mean/norm"]), extract(test, ["last/mean/norm"])
    std, mean = torch.sqrt(x.var(0, correction=0) + 1e-6) * 32**0.5, x.mean(0)
    ids = draw_images(train.read_labels(), "10%", 0, 2)
    reference = LogisticRegression(max_iter=500).fit(((x[ids] - mean) / std).numpy(), train.read_labels()[ids].numpy())
    accuracy = reference.score(((z - mean) / std).numpy(), test.read_labels().numpy())
    assert result.table[-1]["accuracy"] == pytest.approx(accuracy, abs=0.01)
