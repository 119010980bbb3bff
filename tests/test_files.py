"""Files are written whole, errors are one line, and arguments are checked by name."""

import math
import sys

import pytest

from hf_mim.checks import least, numbers, one_of, positive, share
from hf_mim.files import check_writable, new_folder, one_line, replacing


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_or_folder_do_not_touch_each_others_half(tmp_path):
    """In one process, as on two machines whose processes have the same number."""
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # it ended last
    with pytest.raises(OSError), new_folder(tmp_path / "folder") as first, new_folder(tmp_path / "folder") as second:
        (first / "a").write_text("first")
        (second / "b").write_text("second")
    assert [path.name for path in tmp_path.rglob("*")] == ["file", "folder", "b"]


def test_what_can_be_written_passes_and_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path, "output_dir")
    check_writable(tmp_path / "a" / "b", "output_dir")
    check_writable(tmp_path / "file", "output", "file")
    check_writable(tmp_path / "new" / "file", "output", "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("file/below", "folder", "output must be a folder that can be written, and .*below cannot be made in .*file: "),
        ("file", "folder", "output must be a folder that can be written, and .*file cannot: Not a directory"),
        ("", "file", "output must be a file that can be written, and .* cannot: it is a folder"),
        ("file/below", "new folder", "output must be a folder that can be written"),
    ],
)
def test_what_cannot_be_written_is_one_line_that_names_the_argument(tmp_path, path, kind, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message) as error:
        check_writable(tmp_path / path, "output", kind)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_whose_permissions_promise_too_much_is_found_out():
    with pytest.raises(ValueError, match="and /proc/run cannot be made in /proc: "):
        check_writable("/proc/run", "output_dir")


def test_an_error_is_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("abcdef"), 3) == "abc"


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: least(1, a=1, b=0), "b must be at least 1, not 0"),
        (lambda: least(0, a=math.nan), "a must be at least 0, not nan"),
        (lambda: positive(a=0.1, b=0.0), "b must be above 0, not 0.0"),
        (lambda: share(a=1, b=1.1), r"b must lie in \[0, 1\], not 1.1"),
        (lambda: share("[0, 1)", a=0, b=1), r"b must lie in \[0, 1\), not 1"),
        (lambda: share("(0, 1]", a=1, b=0), r"b must lie in \(0, 1\], not 0"),
        (lambda: share("(0, 1)", a=math.nan), r"a must lie in \(0, 1\), not nan"),
        (lambda: one_of({"x": 1, "y": 2}, a="x", b="z"), "b must be one of x, y, not 'z'"),
        (lambda: one_of(("x", "y"), a=["x"]), "a must be one of x, y"),
        (lambda: numbers(a=[1], b=[]), "b must be numbers above 0, at least one"),
        (lambda: numbers(or_zero=True, a=[0], b=[math.inf]), "b must be numbers 0 or more, at least one"),
    ],
)
def test_a_value_that_cannot_be_is_named(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_none_is_a_default_that_is_settled_elsewhere():
    least(1, a=None)
    positive(a=None)
    share(a=None)
    one_of(["x"], a=None)
