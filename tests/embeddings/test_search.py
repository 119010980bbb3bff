"""`hf-mim search`: the nearest images and the near-duplicates, from embeddings and from images."""

import csv

import numpy as np
import pytest
import torch
from pictures import scene, scenes, tiny_checkpoint
from PIL import Image

from hf_mim.cli import main
from hf_mim.data.embedded import png
from hf_mim.embeddings.collection import Whitening
from hf_mim.embeddings.embed import embed
from hf_mim.embeddings.search import Search, groups_of, near_pairs
from hf_mim.evaluation.knn import unit_vectors
from hf_mim.visualize.neighbours import plot_map


def altered(image: Image.Image, path, quality=60):
    """A near-duplicate: cropped by 5 % and compressed as JPEG."""
    left, top = (round(0.025 * side) for side in image.size)
    image.crop((left, top, image.width - left, image.height - top)).save(path, quality=quality)


@pytest.mark.slow
def test_a_planted_near_duplicate_is_first_among_a_thousand_images(checkpoint, photos):
    scenes(photos, 999)
    altered(scene(123), photos / "b" / "planted.jpg")
    (photos / "b" / "123.png").unlink()
    scene(1000).save(photos / "b" / "999.png")
    scene(123).save("query.png")
    search = Search(checkpoint, "photos", k=3)
    assert len(search.collection) == 1000
    ((first, second, _),) = search.nearest(["query.png"])
    assert first.name == "b/planted.jpg" and first.label == "b" and first.cosine > second.cosine + 0.05


def test_a_search_by_the_command_gives_a_table_a_csv_and_a_contact_sheet(checkpoint, photos, capsys):
    embed(checkpoint, dataset="photos", output="photos.parquet")
    words = ["photos/a/004.png", "photos/b/005.png", "--in", "photos.parquet", "--k", "4"]
    assert main(["search", str(checkpoint), *words]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(open("search.csv")))
    assert len(rows) == 8 and rows[0] | {"cosine": ""} == {
        "query": "photos/a/004.png",
        "rank": "1",
        "image": "a/004.png",
        "label": "a",
        "cosine": "",
    }
    assert rows[4]["image"] == "b/005.png" and float(rows[4]["cosine"]) > 0.9999 > float(rows[5]["cosine"])
    assert "b/005.png" in printed and "search.png" in printed
    assert Image.open("search.png").size[0] > Image.open("search.png").size[1]


@pytest.mark.parametrize("output", ["photos.parquet", "photos.npy", "embedded"])
def test_embeddings_and_images_give_the_same_neighbours(output, checkpoint, photos, monkeypatch):
    embed(checkpoint, dataset="photos", output=output)
    monkeypatch.setattr("hf_mim.embeddings.formats.READ", 7)
    of_file = Search(checkpoint, output, k=40).nearest(["photos/a/004.png"])[0]
    of_images = Search(checkpoint, "photos", k=40).nearest(["photos/a/004.png"])[0]
    assert [found.name for found in of_file] == [found.name for found in of_images]
    assert [found.cosine for found in of_file] == pytest.approx([found.cosine for found in of_images], abs=1e-6)


def test_whitened_features_are_uncorrelated_and_a_common_part_does_not_count(checkpoint, photos):
    collection = Search(checkpoint, "photos").collection
    torch.manual_seed(0)
    features = torch.randn(500, 6) * torch.tensor([9.0, 3.0, 1.0, 1.0, 1.0, 1.0]) @ torch.randn(6, 6)
    vars(collection)["_features"] = features
    collection.split.images = collection.split.images.select([row % 40 for row in range(500)])
    white = Whitening.of(collection)(features).double()
    variances = torch.linalg.eigvalsh((features - features.mean(0)).double().T.cov(correction=0))
    expected = variances / (variances + 0.1 * variances.mean())
    torch.testing.assert_close(white.T.cov(correction=0), torch.diag(expected), atol=1e-5, rtol=1e-4)
    vars(collection)["_features"] = features + 1000
    torch.testing.assert_close(Whitening.of(collection)(features + 1000).double().abs(), white.abs(), atol=2e-2, rtol=0)


def test_duplicates_are_found_in_groups(checkpoint, photos, capsys):
    altered(scene(3), photos / "a" / "copy.jpg", quality=90)
    for name in ("x", "y"):
        scene(8).save(photos / "b" / f"{name}.png")
    assert main(["search", str(checkpoint), "--in", "photos", "--duplicates", "--threshold", ".7"]) == 0
    printed = capsys.readouterr().out
    groups = {}
    for row in csv.DictReader(open("search.csv")):
        groups.setdefault(row["group"], []).append(row["image"])
    assert list(groups.values()) == [["a/008.png", "b/x.png", "b/y.png"], ["a/copy.jpg", "b/003.png"]]
    assert "5 of 43 images, in 2 groups" in printed
    assert main(["search", str(checkpoint), "--in", "photos", "--duplicates", "--threshold", "1"]) == 0
    assert "3 of 43 images, in 1 groups" in capsys.readouterr().out


def test_pairs_are_those_of_a_plain_loop(monkeypatch):
    units = unit_vectors(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    expected = {(i, j) for i in range(50) for j in range(i + 1, 50) if units[i] @ units[j] >= 0.98}
    monkeypatch.setattr("hf_mim.embeddings.search.LARGEST_TABLE", 400)
    pairs, cosines = near_pairs(units, 0.98)
    assert set(pairs) == expected and len(pairs) == len(expected) > 5
    assert min(cosines) >= 0.98
    monkeypatch.setattr("hf_mim.embeddings.search.MOST_PAIRS", 5)
    with pytest.raises(ValueError, match="threshold must be higher: 0.98 makes more than 5 pairs"):
        near_pairs(units, 0.98)


def test_pairs_that_share_an_image_are_one_group():
    groups = groups_of([(1, 5), (2, 3), (3, 9), (9, 5)], [0.99, 0.95, 0.96, 0.94])
    assert groups == [([1, 2, 3, 5, 9], [0.99, 0.95, 0.96, 0.99, 0.96])]
    assert groups_of([(4, 6), (1, 2)], [0.95, 0.97]) == [([1, 2], [0.97, 0.97]), ([4, 6], [0.95, 0.95])]


def test_images_of_a_table_have_pictures_too(checkpoint, photos):
    scene(0).save("query.png")
    assert main(["search", str(checkpoint), "query.png", "--in", "digits", "--k", "2", "--output", "near.png"]) == 0
    assert [row["image"] for row in csv.DictReader(open("near.csv"))][0].startswith("image ")
    picture = Search(checkpoint, "digits").picture({"bytes": png(Image.new("RGB", (9, 20), (1, 200, 3))), "path": None})
    assert picture.shape == (128, 128, 3) and np.array_equal(picture[5, 5], [1, 200, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("q.png", "in must be given: a file or folder of hf-mim embed"),
        ("--in photos", "search needs an image to search for, --duplicates or --map"),
        ("q.png --in photos --duplicates", "duplicates needs the collection alone; leave out the query q.png"),
        ("no.png --in photos", "no.png: there is no such file"),
        ("broken.png --in photos", "broken.png: not an image"),
        ("q.png --in photos --k 41", "k must be at most the 40 images of the collection, not 41"),
        ("q.png --in photos --output near.txt", "output must be a picture"),
        ("q.png --in photos --features last/tokens/norm", "features of search must be pooled"),
        ("q.png --in photos.npy --features last/cls/norm", "features must be among those in photos.npy"),
        ("q.png --in photos.npy --image_size 16", "image_size cannot be given together with embeddings"),
        ("q.png --in other.npy", "in must be embeddings of mae, and other.npy has those of other weights (other)"),
        ("q.png --in tokens.npy", "in must have pooled features, and tokens.npy has only last/tokens/norm"),
        ("--in few --duplicates", "duplicates need a collection of 10 images at least, not 4"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, checkpoint, photos, capsys):
    scene(0).save("q.png")
    photos.joinpath("../broken.png").write_bytes(b"no image")
    scenes(photos.parent / "few", 4)
    if "photos.npy" in words:
        embed(checkpoint, dataset="photos", output="photos.npy")
    if "tokens" in words:
        embed(checkpoint, dataset="photos", output="tokens.npy", features=["last/tokens/norm"])
    if "other" in words:
        embed(tiny_checkpoint(photos.parent / "other", seed=1), dataset="photos", output="other.npy")
    assert main(["search", str(checkpoint), *words.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert not list(photos.parent.glob("search.*")) and not list(photos.parent.glob("near.*"))


@pytest.mark.parametrize("where", ["photos.parquet", "photos"])
def test_a_map_shows_the_collection_with_its_pictures(where, checkpoint, photos, capsys, monkeypatch):
    if where != "photos":
        embed(checkpoint, dataset="photos", output=where)
    seen = {}

    def spy(features, pictures, labels, names):
        seen.update(features=features, pictures=pictures, labels=labels, names=names)
        return plot_map(features, pictures, labels, names)

    monkeypatch.setattr("hf_mim.embeddings.report.plot_map", spy)
    assert main(["search", str(checkpoint), "--in", where, "--map", "--output", "map.png"]) == 0
    assert "map.png" in capsys.readouterr().out and Image.open("map.png").size[0] > 500
    search = Search(checkpoint, where)
    rows = search.collection.rows
    assert len(seen["features"]) == len(search.collection) and seen["names"] == sorted(set(rows["label"]))
    assert [seen["names"][label] for label in seen["labels"]] == list(rows["label"])
    assert np.array_equal(seen["pictures"][3] * 255, search.picture(str(photos / rows["name"][3])))


def test_a_map_takes_no_query(checkpoint, photos, capsys):
    assert main(["search", str(checkpoint), "photos/a/004.png", "--in", "photos", "--map"]) == 2
    assert "map needs the collection alone" in capsys.readouterr().err
