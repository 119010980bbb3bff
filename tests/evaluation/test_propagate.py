"""Propagation on features whose answer is known, against a loop over patches, and through an encoder."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data.masks import MaskedImages
from hf_mim.data.videos import Videos, load_videos
from hf_mim.evaluation import propagate
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.metrics import boundary_f, region_similarity
from hf_mim.evaluation.propagate import Propagate, frame_size, label_map, label_shares, propagate_labels, propagate_step

GRID = (8, 10)


def random_features(frames: int, seed: int = 0, grid=GRID, width: int = 16) -> torch.Tensor:
    return torch.randn(frames, *grid, width, generator=torch.Generator().manual_seed(seed))


def random_shares(frames: int, labels: int, seed: int = 0, grid=GRID) -> torch.Tensor:
    return torch.rand(frames, *grid, labels, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def naive_step(queries, context, labels, k, temperature, neighbourhood):
    """Patch by patch, from the definition."""
    rows, columns, _ = queries.shape
    carried = torch.zeros(rows, columns, labels.shape[-1])
    for y in range(rows):
        for x in range(columns):
            found = []
            for f in range(len(context)):
                for v in range(rows):
                    for u in range(columns):
                        if max(abs(v - y), abs(u - x)) <= neighbourhood:
                            found.append((float(queries[y, x] @ context[f, v, u]), labels[f, v, u]))
            found = sorted(found, key=lambda pair: -pair[0])[:k]
            weights = [np.exp(similarity / temperature) for similarity, _ in found]
            carried[y, x] = sum(w * label for w, (_, label) in zip(weights, found, strict=True)) / sum(weights)
    return carried


@pytest.mark.parametrize("k, neighbourhood, frames", [(5, 2, 3), (1, 12, 2), (5, 0, 3), (40, 1, 2)])
def test_a_step_is_that_of_a_loop_over_patches(k, neighbourhood, frames, monkeypatch):
    queries = F.normalize(random_features(1, seed=1)[0], dim=-1)
    context, labels = F.normalize(random_features(frames, seed=2), dim=-1), random_shares(frames, 3)
    expected = naive_step(queries, context, labels, k, 0.1, neighbourhood)
    assert torch.allclose(propagate_step(queries, context, labels, k, 0.1, neighbourhood), expected, atol=1e-5)
    monkeypatch.setattr(propagate, "LARGEST_TABLE", 3 * frames * GRID[0] * GRID[1] ** 2)  # three rows at a time
    assert torch.allclose(propagate_step(queries, context, labels, k, 0.1, neighbourhood), expected, atol=1e-5)


def test_every_frame_is_labelled_from_the_first_and_the_last_few():
    features, first = random_features(6), random_shares(1, 2)[0]
    normal = F.normalize(features, dim=-1)
    expected = [first]
    for t in range(1, 6):
        past = [0, *range(max(1, t - 2), t)]
        expected.append(propagate_step(normal[t], normal[past], torch.stack([expected[i] for i in past])))
    assert torch.allclose(propagate_labels(features, first, queue=2), torch.stack(expected), atol=1e-6)
    alone = [propagate_step(normal[t], normal[:1], first[None]) for t in range(1, 6)]
    assert torch.allclose(propagate_labels(features, first, queue=0)[1:], torch.stack(alone), atol=1e-6)


def test_equal_frames_keep_the_mask():
    features, mask = random_features(1, width=64).expand(9, -1, -1, -1), np.zeros((64, 80), np.uint8)
    mask[16:40, 24:56] = 1  # on the edges of patches
    shares = propagate_labels(features, label_shares(mask, np.array([0, 1]), GRID))
    assert ((shares[-1, ..., 1] > 0.5).numpy() == mask[::8, ::8]).all()
    kept = label_map(shares[0], mask.shape)
    assert all((label_map(frame, mask.shape) == kept).float().mean() > 0.99 for frame in shares)


def test_a_moving_object_that_its_features_identify_is_followed_exactly():
    background, thing = torch.eye(16)[0], torch.eye(16)[1]
    features, truth = background.expand(7, *GRID, -1).clone(), torch.zeros(7, *GRID, dtype=torch.long)
    for t in range(7):
        features[t, 2:5, t : t + 3], truth[t, 2:5, t : t + 3] = thing, 1
    shares = propagate_labels(features, F.one_hot(truth[0]).float())
    for t in range(7):
        assert region_similarity(shares[t].argmax(-1), truth[t]) == 1


def test_a_twin_beyond_the_neighbourhood_is_not_seen():
    features = random_features(1, width=64)[0]
    moved = features.clone()
    moved[1, 1] = features[1, 6]  # the twin of a labelled patch, 5 columns away from it
    first = torch.zeros(*GRID, 2)
    first[..., 0], first[1, 6] = 1, torch.tensor([0.0, 1.0])
    frames = torch.stack([features, moved])
    assert propagate_labels(frames, first, neighbourhood=5)[1, 1, 1, 1] > 0.9
    assert propagate_labels(frames, first, neighbourhood=4)[1, 1, 1, 1] == 0


def test_shares_are_areas_and_void_is_no_label():
    mask = np.zeros((16, 16), np.uint8)
    mask[:4, :2], mask[8:, 8:], mask[:8, 8:12] = 1, 7, 255
    shares = label_shares(mask, np.array([0, 1, 7]), (2, 2))
    assert shares[..., 1].tolist() == [[8 / 64, 0], [0, 0]]
    assert shares[..., 2].tolist() == [[0, 0], [0, 1]]
    assert shares[..., 0].tolist() == [[56 / 64, 0.5], [1, 0]]


def test_small_objects_survive_and_absent_ones_stay_absent():
    shares = torch.zeros(4, 5, 3)
    shares[..., 0] = 1
    shares[1, 2] = torch.tensor([0.7, 0.3, 0.0])  # never the largest share, but the largest of its plane
    labels = label_map(shares, (32, 40))
    assert labels[12, 20] == 1 and labels[0, 0] == 0 and set(labels.unique().tolist()) == {0, 1}
    everywhere = torch.zeros(4, 5, 2)
    everywhere[..., 1] = 1
    assert (label_map(everywhere, (8, 8)) == 1).all()


@pytest.mark.parametrize(
    "size, short, expected", [((480, 854), 480, (480, 848)), ((854, 480), 240, (432, 240)), ((10, 90), 1, (16, 16))]
)
def test_frames_keep_their_aspect_in_whole_patches(size, short, expected):
    assert frame_size(size, (16, 16), short) == expected


def drawn_videos(frames: int = 6, size=(48, 64)) -> Videos:
    """Two squares, red and green, that move over a grey ground; in the second sequence only one."""
    images, masks, names = [], [], []
    for name, count in (("one", 1), ("two", 2)):
        for t in range(frames):
            picture, ids = np.full((*size, 3), 90, np.uint8), np.zeros(size, np.uint8)
            for number in range(1, count + 1):
                place = slice(8 + 20 * (number - 1), 24 + 20 * (number - 1)), slice(4 + 4 * t, 20 + 4 * t)
                picture[place], ids[place] = [(250, 20, 20), (20, 250, 20)][number - 1], number
            images.append(encoded(picture)), masks.append(encoded(ids)), names.append(name)
    columns = [("image", images), ("mask", masks)]
    return Videos(
        MaskedImages(*(Dataset.from_dict({c: v}, Features({c: ImageFeature(decode=False)})) for c, v in columns)), names
    )


def encoded(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def extract(tiny_encoder) -> FeatureExtractor:
    return FeatureExtractor(tiny_encoder, batch_size=16, progress=False)


def test_a_drawn_video_through_an_encoder(extract):
    videos = drawn_videos()
    protocol = Propagate(short_side=96)  # frames of 48×64 as 96×128: a grid of 12×16
    result = protocol.run(extract, videos)
    assert result.scores["J"] > 0.8 > result.scores["J&F of the first mask left where it is"]
    assert result.value == pytest.approx((result.scores["J"] + result.scores["F"]) / 2)
    assert [(row["sequence"], row["objects"], row["grid"]) for row in result.table] == [
        ("one", 1, "12×16"),
        ("two", 2, "12×16"),
    ]
    # Objects count alike: the second sequence has two of three, and its row is their mean.
    assert result.scores["J"] == pytest.approx((result.table[0]["J"] + 2 * result.table[1]["J"]) / 3)
    assert (
        result.settings["features"] == "last/tokens/norm" and "first and the last" in result.settings["scored_frames"]
    )
    assert protocol.run(extract.replace(batch_size=3, num_workers=2), videos).value == pytest.approx(result.value)
    assert protocol.run(extract, videos) == result


def test_scores_are_of_all_frames_but_the_first_and_the_last(extract):
    videos = drawn_videos()
    protocol = Propagate(short_side=48, sequences=["one"])
    result, truth = protocol.run(extract, videos), videos.read_masks("one")
    shares = protocol.predict(extract, videos, "one")
    predictions = [label_map(frame, (48, 64)).numpy() for frame in shares]
    middle = range(1, 5)
    assert result.scores["J"] == pytest.approx(np.mean([region_similarity(predictions[t], truth[t]) for t in middle]))
    assert result.scores["F"] == pytest.approx(np.mean([boundary_f(predictions[t], truth[t]) for t in middle]))
    still = np.mean([(region_similarity(truth[0], truth[t]) + boundary_f(truth[0], truth[t])) / 2 for t in middle])
    assert result.scores["J&F of the first mask left where it is"] == pytest.approx(still)


def test_no_answer_is_read_before_all_is_predicted(extract, monkeypatch):
    events = []
    read_masks, predict = Videos.read_masks, Propagate.predict
    monkeypatch.setattr(Videos, "read_masks", lambda self, name: events.append("read") or read_masks(self, name))
    monkeypatch.setattr(Propagate, "predict", lambda *args: [predict(*args), events.append("predicted")][0])
    Propagate(short_side=32).run(extract, drawn_videos())
    assert events == ["predicted", "predicted", "read", "read"]


def test_the_layer_and_the_norm_are_those_asked_for(extract):
    videos = drawn_videos()
    protocols = [Propagate(short_side=32), *(Propagate(f, short_side=32) for f in ("1/tokens/norm", "last/tokens/raw"))]
    values = {str(protocol.spec): protocol.predict(extract, videos, "two") for protocol in protocols}
    assert list(values) == ["last/tokens/norm", "1/tokens/norm", "last/tokens/raw"]
    shares = list(values.values())
    assert not torch.equal(shares[0], shares[1]) and not torch.equal(shares[0], shares[2])
    with pytest.raises(ValueError, match="need a layer that tiny has not"):
        Propagate("3/tokens/norm").run(extract, videos)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"queue": -1}, "queue must be at least 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"short_side": 0}, "short_side must be at least 1"),
        ({"features": "first/tokens/norm"}, "features must be layer/pooling/norm"),
        ({"features": "last/mean/norm"}, "features of propagate must be tokens, such as last/tokens/norm, not last/m"),
    ],
)
def test_options_are_checked_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        Propagate(**options)


def test_two_frames_leave_nothing_to_score(extract):
    with pytest.raises(ValueError, match="sequence one has 2 frames"):
        Propagate().run(extract, drawn_videos(frames=2))


def test_an_untrained_encoder_follows_a_swan_by_its_colour(extract, shared_data):
    videos = load_videos(shared_data / "davis2016_val")
    result = Propagate(short_side=96, sequences=["blackswan"]).run(extract, videos)
    assert result.table[0]["frames"] == 50 and result.table[0]["grid"] == "12×21"
    assert 0.3 < result.scores["J"] < 0.9
