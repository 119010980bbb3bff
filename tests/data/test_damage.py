"""Files of many images that are damaged: one line names the file, and a damaged image in it is left out and counted."""

import io
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from hf_mim.cli import main
from hf_mim.data import ImageDataset, ImageStream, load_images
from hf_mim.data.damage import DamagedFile, check_saved, file_being_read
from hf_mim.data.sources import first_split

COUNT, GROUP = 60, 20  # images of a file, and of a group of rows in it


def png(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two files of images as Parquet, as both forms of Arrow, and as `save_to_disk` writes them."""
    root = tmp_path_factory.mktemp("whole")
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "label": i % 2} for i in range(2 * COUNT)]
    images = Dataset.from_list(rows, features)
    images.save_to_disk(root / "saved", num_shards=2)
    table = images.data.table.combine_chunks()
    for kind in ("parquet", "stream", "file"):
        (root / kind).mkdir()
        for number, name in enumerate("ab"):
            part = table.slice(number * COUNT, COUNT)
            if kind == "parquet":
                pyarrow.parquet.write_table(part, root / kind / f"{name}.parquet", row_group_size=GROUP)
                continue
            make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
            with make(str(root / kind / f"{name}.arrow"), part.schema) as writer:
                writer.write_table(part, max_chunksize=GROUP)
    return root


def cut(data: bytearray) -> bytearray:
    return data[: len(data) * 2 // 3]


def a_group(data: bytearray) -> bytearray:
    """Overwrite the beginning of the second group of rows in a Parquet file."""
    group = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(bytes(data))).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    data[start : start + 200] = b"\x7f" * 200
    return data


def an_offset(data: bytearray) -> bytearray:
    """Let an image of the second file begin far behind the end of all."""
    lengths = np.cumsum([len(png(COUNT + number)) for number in range(6)]).astype(np.int32).tobytes()
    place = bytes(data).index(lengths)
    data[place + 11] ^= 0x40
    return data


def a_bit(data: bytearray) -> bytearray:
    """Change one bit of the pixels of an image."""
    data[bytes(data).index(png(COUNT + 30)[60:100]) + 20] ^= 4
    return data


def nothing(data: bytearray) -> bytearray:
    return bytearray()


DAMAGES = [("parquet", cut), ("parquet", a_group), ("parquet", nothing), ("stream", cut), ("stream", an_offset)]
DAMAGES += [("file", cut), ("file", an_offset), ("saved", cut), ("saved", an_offset), ("saved", nothing)]


def damaged_copy(whole, tmp_path, kind, damage):
    folder = shutil.copytree(whole / kind, tmp_path / kind)
    file = sorted([*folder.glob("*.arrow"), *folder.glob("*.parquet")])[1]
    file.write_bytes(damage(bytearray(file.read_bytes())))
    return folder, file


def read(folder, streaming: bool, num_workers: int = 0) -> ImageDataset | ImageStream:
    images = load_images(folder, streaming=streaming)
    images = (ImageStream if streaming else ImageDataset)(images, 16)
    for _ in DataLoader(images, 8, num_workers=num_workers):
        pass
    return images


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_a_damaged_file_is_named(whole, tmp_path, kind, damage, streaming):
    folder, file = damaged_copy(whole, tmp_path, kind, damage)
    with pytest.raises(ValueError) as error:
        read(folder, streaming)
    message = str(error.value)
    assert f"{file} is damaged (" in message and message.endswith("copy or make it again, or leave it out")
    assert "\n" not in message


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_dataset_without_images_is_told_to_be_empty(tmp_path, kind, streaming):
    images = Dataset.from_dict({"image": []}, Features(image=Image()))
    images.save_to_disk(tmp_path) if kind == "saved" else images.to_parquet(tmp_path / "train.parquet")
    known = kind == "saved" or not streaming  # a stream is known to be empty when it is read
    message = "^split 'train' of source '.*' is empty$" if known else "^source '.*' holds no image.*; it is empty$"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, streaming=streaming)


def test_a_split_without_images_hides_no_other_split(whole, tmp_path):
    images = load_from_disk(whole / "saved")
    DatasetDict(train=images, test=images.select([])).save_to_disk(tmp_path)
    assert len(load_images(tmp_path)) == len(images)
    with pytest.raises(ValueError, match="^split 'test' of source '.*' is empty$"):
        load_images(tmp_path, "test")
    assert first_split(("test", "train"), lambda name: load_images(tmp_path, name))[1] == "train"


def test_a_lost_folder_of_a_split_is_not_taken_for_an_empty_split(whole, tmp_path):
    images = load_from_disk(whole / "saved")
    DatasetDict(train=images, test=images).save_to_disk(tmp_path)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(ValueError, match="test not found"):
        load_images(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"splits": "train"}', '{"splits": []}', '{"splits": [1]}', "no"])
def test_a_damaged_list_of_splits_is_named(whole, tmp_path, text):
    DatasetDict(train=load_from_disk(whole / "saved")).save_to_disk(tmp_path)
    (tmp_path / "dataset_dict.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset_dict.json is damaged \("):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_damaged_description_of_a_saved_dataset_is_named(whole, tmp_path, name):
    folder = shutil.copytree(whole / "saved", tmp_path / "saved")
    (folder / name).write_text('{"_data_files": [{')
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_images(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"state.json is damaged \('_data_files'\)"):
        check_saved(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "saved"])
def test_a_damaged_image_in_a_file_is_left_out_and_counted(whole, tmp_path, kind, streaming):
    folder, _ = damaged_copy(whole, tmp_path, kind, a_bit)
    assert read(folder, streaming).broken() == [f"{COUNT + 30}.png"]
    assert read(whole / kind, streaming).num_broken() == 0


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_file_of_other_columns_is_named_and_not_called_damaged(whole, tmp_path, streaming):
    folder = shutil.copytree(whole / "parquet", tmp_path / "parquet")
    pyarrow.parquet.write_table(pyarrow.table({"picture": [png(0)]}), folder / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has other columns or types than the files before it"):
        read(folder, streaming)


def test_an_error_that_no_file_has_caused_names_none():
    try:
        raise ValueError("another")
    except ValueError as error:
        assert file_being_read(error) is None


TINY = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --decoder_hidden_size 16".split()
TINY += "--decoder_num_hidden_layers 1 --decoder_num_attention_heads 1 --image_size 16 --patch_size 8 --use_cpu".split()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_that_breaks_off_in_a_stream_ends_a_run_by_one_line_and_status_2(whole, tmp_path, workers, capsys):
    folder, file = damaged_copy(whole, tmp_path, "stream", cut)
    words = ["--dataset", str(folder), "--streaming", "--max_steps", "30", "--per_device_train_batch_size", "8"]
    words += ["--dataloader_num_workers", workers, "--image_mean", ".5,.5,.5", "--image_std", ".2,.2,.2"]
    words += ["--knn", "false", "--output_dir", str(tmp_path / "run"), "--shuffle_buffer", "1", "--disable_tqdm", *TINY]
    assert main(["pretrain", *words]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {file} is damaged (") and "Traceback" not in err
