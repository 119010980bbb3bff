import pytest
import torch

from hf_mim.data import WholeImage
from hf_mim.evaluation import local
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.local import Local, Scenes, as_classes, fit_probe


class Oracle:
    """An extractor whose encoder knows the answers, as far as `noise` lets it."""

    def __init__(self, encoder, noise=0.0, crop=None):
        self.encoder, self.noise, self.splits = encoder, noise, []

    def replace(self, encoder, crop):
        assert crop == WholeImage()
        oracle = Oracle(encoder, self.noise if encoder is self.encoder else 100.0)
        oracle.splits = self.splits
        return oracle

    def __call__(self, split, specs):
        self.splits.append(split)
        answers = split._answers
        count, distance = torch.tensor(answers["num_objects"][:]), torch.tensor(answers["distance"][:])
        codes = torch.eye(11)[count], torch.stack([torch.sin(freq * distance) for freq in (20, 40, 80, 160)], 1)
        noise = torch.randn(len(split), 15, generator=torch.Generator().manual_seed(len(split)))
        return [torch.cat(codes, 1).float() + self.noise * noise for _ in specs]


@pytest.fixture(autouse=True)
def small_scenes(monkeypatch):
    monkeypatch.setattr(local, "SIZES", (32, 32))


def rows(result, features):
    return {row["task"]: row for row in result.table if row["features"] == features}


def test_features_that_hold_the_answers_score_fully_and_noise_by_chance(tiny_encoder):
    result = Local(num_train=600, num_test=200).run(Oracle(tiny_encoder))
    known, noise, nothing = (rows(result, name) for name in ("encoder", "raw pixels", local.NOTHING))
    assert result.value == known["count"]["accuracy"] == 1
    assert known["count"]["R2"] > 0.99 and known["count"]["mean_absolute_error"] < 0.1
    assert known["distance"]["accuracy"] > 0.9 and known["distance"]["R2"] > 0.99
    for task, chance in (("count", 1 / 8), ("distance", 1 / 6)):
        assert noise[task]["accuracy"] == pytest.approx(chance, abs=0.08)
        assert nothing[task]["accuracy"] == pytest.approx(chance, abs=0.08)
        assert nothing[task]["R2"] == pytest.approx(0, abs=0.05)
    assert result.scores["count by chance"] == nothing["count"]["accuracy"]


def test_distances_fall_into_six_equal_bins_of_the_training_scenes(tiny_encoder):
    result = Local(num_train=240, num_test=10).run(Oracle(tiny_encoder))
    edges = torch.tensor(result.settings["bin_edges"], dtype=torch.float64)
    bins = as_classes("distance", Scenes(240, 32, 0, "train").read_labels(), edges)
    assert bins.bincount().tolist() == [40] * 6


def test_the_probe_chooses_a_strength_that_holds_on_fresh_features():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    train, fresh = (torch.randn(600, 100, generator=draw) / 10 for _ in range(2))
    train[:, :3], fresh[:, :3] = (x[:, :3] + torch.eye(3)[labels] / 5 for x in (train, fresh))
    accuracy = {c: local.fit_logistic(train, labels, [c]).score(fresh, labels) for c in local.CS}
    assert accuracy[local.CS[-1]] < max(accuracy.values()) - 0.04  # learnt by heart
    chosen = [accuracy[fit_probe(train, labels, seed).C] for seed in range(5)]
    assert sum(chosen) / 5 >= max(accuracy.values()) - 0.02, "other seeds hold out other images"


def test_test_answers_are_read_once_and_after_all_predictions(tiny_encoder, monkeypatch):
    events = []
    read, predict = Scenes.read_labels, local.fit_probe

    def reading(self):
        events.append("test" if "test" in self.name else "train")
        return read(self)

    def fitting(*arguments):
        events.append("fit")
        return predict(*arguments)

    monkeypatch.setattr(Scenes, "read_labels", reading)
    monkeypatch.setattr(local, "fit_probe", fitting)
    extract = FeatureExtractor(tiny_encoder, progress=False)
    Local(num_train=100, num_test=20).run(extract)
    assert events == ["train", "fit", "fit", "fit", "fit", "test"]


def test_answers_are_not_among_what_the_encoder_is_shown():
    assert Scenes(3, 32, 0, "test").images.column_names == ["image"]


@pytest.mark.slow
def test_two_runs_give_the_same_numbers_and_the_protocol_is_written_out(tiny_encoder):
    extract = FeatureExtractor(tiny_encoder, progress=False)
    protocol = Local(num_train=200, num_test=50, size=48)
    first, second = protocol.run(extract), protocol.run(extract)
    assert first.table == second.table and first.settings == second.settings
    assert first.settings["size"] == 48 and len(first.settings["bin_edges"]) == 5
    assert first.data["test"] == {"source": "scenes of 48 px, seed 0, split test", "images": 50}
    assert len(first.table) == 6 and set(first.scores) == {
        f"{task}{source}" for task in local.TASKS for source in ("", " from raw pixels", " by chance")
    }


def test_scenes_are_drawn_at_the_encoders_size_within_limits(tiny_encoder, monkeypatch):
    monkeypatch.setattr(local, "SIZES", (64, 128))
    for side, expected in ((32, 64), (96, 96), (224, 128)):
        tiny_encoder.image_size = (side, side)
        assert Local(num_train=100, num_test=10).run(Oracle(tiny_encoder)).settings["size"] == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": "last/tokens/norm"}, "features of local must be pooled, mean or cls, not last/tokens/norm"),
        ({"num_train": 10}, "num_train must be at least 100, not 10"),
        ({"num_test": 1}, "num_test must be at least 10, not 1"),
        ({"size": 8}, r"size must lie in \[16, 1024\], not 8"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_mistakes_are_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Local(**options)


def test_encoders_that_cannot_see_a_scene_are_refused(tiny_encoder):
    extract = FeatureExtractor(tiny_encoder, progress=False)
    with pytest.raises(ValueError, match="features 7/mean/norm need a layer that tiny has not"):
        Local(features="7/mean/norm").run(extract)
    tiny_encoder.num_channels = 13
    with pytest.raises(ValueError, match="scenes are pictures in colour, and tiny takes 13 channels"):
        Local().run(extract)
    tiny_encoder.image_size = (32, 64)
    with pytest.raises(ValueError, match="image_size must be square for scenes, not 32,64; give image_size=32"):
        Local().run(extract)
