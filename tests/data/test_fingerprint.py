"""The fingerprint of a source tells what has changed, and nothing else changes it."""

import os
import shutil

import pytest
from datasets import Dataset

from hf_mim.data.fingerprint import absolute_source, changes, fingerprint
from hf_mim.data.sources import hub_revision


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(name.encode() * 9)
    return tmp_path / "photos"


def test_each_change_is_told(folder):
    before = fingerprint(str(folder))
    (folder / "a" / "3.png").write_bytes(b"x")
    assert changes(before, fingerprint(str(folder))) == "it had 3 files and has 4"
    os.remove(folder / "a" / "1.png")
    assert changes(before, fingerprint(str(folder))) == "its files have other names"
    shutil.move(folder / "a" / "3.png", folder / "a" / "1.png")
    assert changes(before, fingerprint(str(folder))) == "its files have other sizes"
    (folder / "a" / "1.png").write_bytes(b"a/2.png" * 9)
    assert changes(before, fingerprint(str(folder))) == "its files have other contents"
    (folder / "a" / "1.png").write_bytes(b"a/1.png" * 9)
    assert changes(before, fingerprint(str(folder))) == ""


def test_place_time_and_other_files_change_nothing(folder, tmp_path):
    before = fingerprint(str(folder))
    (folder / "notes.txt").write_text("x")
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "a" / "1.png", (1, 1))
    assert fingerprint(str(tmp_path / "copy")) == before
    one = fingerprint(str(folder / "a" / "1.png"))
    assert one.startswith("1 files, 63 bytes") and changes(before, one) == "it had 3 files and has 1"


def test_what_is_not_local_has_none_and_keeps_its_name(folder, tmp_path, monkeypatch):
    assert fingerprint("digits") is fingerprint("owner/name") is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("photos", "./photos/", "~/photos", str(folder)):
        assert absolute_source(name) == str(folder)
    (tmp_path / "digits").mkdir()
    assert [absolute_source(name) for name in ("digits", "owner/name", None)] == ["digits", "owner/name", None]


def test_commits_of_the_hub_are_compared():
    one, other = "commit " + "a" * 40, "commit " + "b" * 40
    assert changes(one, one) == "" and changes(one, other) == f"it has {other}, and had {one}"
    data = Dataset.from_dict({"image": [1]})
    assert hub_revision(data) is None
    data.info.download_checksums = {f"hf://datasets/o/n@{'a' * 40}/data/{i}.parquet": None for i in range(2)}
    assert hub_revision(data) == "a" * 40
    data.info.download_checksums |= {f"hf://datasets/o/m@{'b' * 40}/data/0.parquet": None}
    assert hub_revision(data) is None, "files of two commits"
