"""`hf-mim embed --streaming true`: the rows and bytes of the whole source, read in order, with nothing copied first."""

import io
import tarfile
import tracemalloc

import datasets
import pytest
import torch
from pictures import scene, scenes

from hf_mim.cli import main
from hf_mim.data import BrokenImagesError
from hf_mim.embeddings import parts, streamed
from hf_mim.embeddings.embed import embed
from hf_mim.embeddings.formats import Embeddings
from hf_mim.evaluation import cache, features
from hf_mim.evaluation.encoder import FrozenEncoder

KINDS = ["last/mean/norm", "last/tokens/norm"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for module in (cache, features, parts, streamed):
        monkeypatch.setattr(module, "CHUNK", 8)


def png(number: int) -> bytes:
    scene(number).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def parquet(tmp_path, count=21, broken=()):
    """A Parquet file of pictures with labels, in row groups of 8."""
    rows = [{"bytes": b"no" if n in broken else png(n), "path": f"{n:03}.png"} for n in range(count)]
    about = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    table = datasets.Dataset.from_dict({"image": rows, "label": [n % 2 for n in range(count)]}, features=about)
    table.to_parquet(str(tmp_path / "photos.parquet"), batch_size=8)
    return "photos.parquet"


def tars(tmp_path):
    """A folder of two tars."""
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"tars/{shard}.tar", "w") as tar:
            for number in range(10):
                data = png(10 * shard + number)
                info = tarfile.TarInfo(f"{shard}{number}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return "tars"


def folder(tmp_path):
    """Image files in class folders."""
    scenes(tmp_path / "photos", 11)
    return "photos"


def read(path, kind):
    return torch.cat(list(Embeddings(path).parts(kind)))


@pytest.mark.parametrize("source", [parquet, tars, folder], ids=["parquet", "tars", "folder"])
def test_a_stream_gives_the_rows_of_the_whole_source_and_nothing_is_copied(source, checkpoint, tmp_path, monkeypatch):
    dataset = source(tmp_path)
    whole = embed(checkpoint, dataset=dataset, output="whole.parquet", features=KINDS)
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *args, **more: pytest.fail("copied"))
    done = embed(checkpoint, dataset=dataset, output="stream.parquet", features=KINDS, streaming=True)
    assert done.images == whole.images
    for kind in KINDS:
        assert torch.equal(read("stream.parquet", kind), read("whole.parquet", kind))
    assert Embeddings("stream.parquet").rows == Embeddings("whole.parquet").rows
    about, other = Embeddings("stream.parquet").about, Embeddings("whole.parquet").about
    assert about == other | {"streaming": True}


def killed_after(monkeypatch, batches: int):
    """Let the encoder raise at this batch. Returns what counts the images that it encodes."""
    encode, seen = FrozenEncoder.extract, []

    def extract(self, pixels, specs):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return encode(self, pixels, specs)

    monkeypatch.setattr(FrozenEncoder, "extract", extract)
    return seen


@pytest.mark.parametrize("output", ["stream.parquet", "stream.npy"])
def test_killed_and_resumed_it_gives_the_same_bytes(output, checkpoint, tmp_path, monkeypatch):
    options = dict(dataset=parquet(tmp_path), output=output, streaming=True, extract_batch_size=4)
    embed(checkpoint, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("stream.*")}
    [path.unlink() for path in tmp_path.glob("stream.*")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(patch, 5)
        embed(checkpoint, **options)
    assert not (tmp_path / output).exists()
    seen = killed_after(monkeypatch, -1)
    embed(checkpoint, **options)
    assert sum(seen) == 21 - 16  # two whole parts were read past
    assert {path.name: path.read_bytes() for path in tmp_path.glob("stream.*")} == before


def test_ended_before_the_file_is_written_no_image_is_encoded_again(checkpoint, tmp_path, monkeypatch):
    options = dict(dataset=parquet(tmp_path), output="stream.parquet", streaming=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("hf_mim.embeddings.formats.write", lambda *args: (_ for _ in ()).throw(SystemExit))
        embed(checkpoint, **options)
    seen = killed_after(monkeypatch, -1)
    assert embed(checkpoint, **options).images == 21 and not seen


@pytest.mark.parametrize("count", [12, 30], ids=["fewer", "more"])
def test_another_source_under_the_same_name_is_refused_by_what_its_images_hold(count, checkpoint, tmp_path, capsys):
    options = ["--dataset", parquet(tmp_path), "--output", "stream.parquet", "--streaming"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_mim.embeddings.formats.write", lambda *args: (_ for _ in ()).throw(OSError("stopped")))
        assert main(["embed", str(checkpoint), *options]) == 2
    parquet(tmp_path, count)
    assert main(["embed", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "embedded before" in error and "must be deleted to begin again" in error


def test_one_worker_decodes_beside_the_encoder_and_more_are_refused(checkpoint, tmp_path, capsys):
    options = dict(dataset=parquet(tmp_path), streaming=True)
    embed(checkpoint, **options, output="none.npy")
    embed(checkpoint, **options, output="one.npy", num_workers=1)
    assert torch.equal(read("none.npy", KINDS[0]), read("one.npy", KINDS[0]))
    words = ["--dataset", "photos.parquet", "--streaming", "--num_workers", "2", "--output", "two.npy"]
    assert main(["embed", str(checkpoint), *words]) == 2
    assert "num_workers must be 0 or 1 with streaming, so that images keep" in capsys.readouterr().err
    assert not list(tmp_path.glob("*two*"))


def test_broken_images_are_left_out_up_to_one_in_a_hundred(checkpoint, tmp_path):
    done = embed(checkpoint, dataset=parquet(tmp_path, broken=[9]), output="one.npy", streaming=True)
    assert (done.images, done.broken) == (20, 1)
    assert Embeddings("one.npy").rows["row"] == [row for row in range(21) if row != 9]
    with pytest.raises(BrokenImagesError, match="2 images cannot be decoded: 009.png, 020.png; repair"):
        embed(checkpoint, dataset=parquet(tmp_path, broken=[9, 20]), output="two.npy", streaming=True)


def test_search_reads_the_pictures_that_it_shows_from_the_stream(checkpoint, tmp_path, monkeypatch):
    embed(checkpoint, dataset=parquet(tmp_path), output="stream.parquet", streaming=True)
    scene(7).save("query.png")
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *args, **more: pytest.fail("copied"))
    assert main(["search", str(checkpoint), "query.png", "--in", "stream.parquet", "--k", "3"]) == 0
    assert "007.png" in (tmp_path / "search.csv").read_text().splitlines()[1]
    assert (tmp_path / "search.png").is_file()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(checkpoint, tmp_path):
    peaks = []
    for count in (40, 160):
        parquet(tmp_path, count)
        tracemalloc.start()
        embed(checkpoint, dataset="photos.parquet", output=f"{count}.npy", features=KINDS[1:], streaming=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    features_of_more = 120 * 16 * 64 * 4
    assert peaks[1] - peaks[0] < features_of_more / 4
