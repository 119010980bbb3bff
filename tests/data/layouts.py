"""Folders and tars that people have. The tests check each row, and the tables in docs/data.md are made of the rows."""

import json
import re


def spelled_out(pattern: str) -> list[str]:
    """All names of a pattern: "P[08-10]" is P08, P09 and P10."""
    found = re.search(r"\[(\d+)-(\d+)\]", pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    names = (f"{pattern[: found.start()]}{number:0{len(found[1])}}{pattern[found.end() :]}" for number in numbers)
    return [name for part in names for name in spelled_out(part)]


# Layout → (files, {split: {path: class}}, {what is left out: how many}).
LAYOUTS = {
    "flat": ("1.png 2.png", {"train": {"1.png": None, "2.png": None}}, {}),
    "classes": ("cat/1.png dog/1.png", {"train": {"cat/1.png": "cat", "dog/1.png": "dog"}}, {}),
    "splits of classes": (
        "train/cat/1.png train/dog/1.png test/cat/2.png",
        {"train": {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}, "test": {"test/cat/2.png": "cat"}},
        {},
    ),
    "a picture beside splits": (
        "logo.png train/cat/1.png test/cat/2.png",
        {"train": {"train/cat/1.png": None}, "test": {"test/cat/2.png": None}},
        {"beside the folders of splits": 1},
    ),
    "a picture beside train alone": (
        "logo.png train/cat/1.png",
        {"train": {"train/cat/1.png": None}},
        {"beside the folders of splits": 1},
    ),
    "STL-10": (
        "train/1.png test/2.png unlabeled/3.png",
        {"train": {"train/1.png": None}, "test": {"test/2.png": None}, "unlabeled": {"unlabeled/3.png": None}},
        {},
    ),
    "test beside classes": (
        "cat/1.png dog/1.png test/3.png",
        {"train": {"cat/1.png": "cat", "dog/1.png": "dog"}, "test": {"test/3.png": None}},
        {},
    ),
    "test beside pictures": ("1.png test/2.png", {"train": {"1.png": None}, "test": {"test/2.png": None}}, {}),
    "trains and planes": ("train/1.png plane/1.png", {"train": {"train/1.png": "train", "plane/1.png": "plane"}}, {}),
    "splits within classes": (
        "cat/train/1.png cat/test/2.png dog/train/1.png",
        {"train": {"cat/train/1.png": "cat", "dog/train/1.png": "dog"}, "test": {"cat/test/2.png": "cat"}},
        {},
    ),
    "images and masks": (
        "images/1.png masks/1.png",
        {"train": {"images/1.png": None}},
        {"in masks/": 1},
    ),
    "images, labels and previews": (
        "images/1.png labels/1.png preview/1.png",
        {"train": {"images/1.png": None}},
        {"in labels/": 1, "in preview/": 1},
    ),
    "ADE20K": (
        "images/training/1.jpg images/validation/2.jpg annotations/training/1.png annotations/validation/2.png",
        {"train": {"images/training/1.jpg": None}, "validation": {"images/validation/2.jpg": None}},
        {"in annotations/": 2},
    ),
    "COCO": (
        "train2017/1.jpg val2017/2.jpg annotations/panoptic_train2017/1.png",
        {"train": {"train2017/1.jpg": None}, "validation": {"val2017/2.jpg": None}},
        {"in annotations/": 1},
    ),
    "VOC": (
        "VOC2012/JPEGImages/1.jpg VOC2012/SegmentationClass/1.png VOC2012/SegmentationObject/1.png",
        {"train": {"VOC2012/JPEGImages/1.jpg": None}},
        {"in SegmentationClass/": 1, "in SegmentationObject/": 1},
    ),
    "DAVIS": (
        "JPEGImages/480p/bear/0.jpg JPEGImages/480p/cow/0.jpg Annotations/480p/bear/0.png",
        {"train": {"JPEGImages/480p/bear/0.jpg": "bear", "JPEGImages/480p/cow/0.jpg": "cow"}},
        {"in Annotations/": 1},
    ),
    "Cityscapes": (
        "leftImg8bit/train/ulm/1.png leftImg8bit/val/bonn/2.png gtFine/train/ulm/1.png gtFine/val/bonn/2.png",
        {"train": {"leftImg8bit/train/ulm/1.png": None}, "validation": {"leftImg8bit/val/bonn/2.png": None}},
        {"in gtFine/": 2},
    ),
    "CamVid": (
        "train/1.png trainannot/1.png test/2.png testannot/2.png",
        {"train": {"train/1.png": None}, "test": {"test/2.png": None}},
        {"in trainannot/": 1, "in testannot/": 1},
    ),
    "masks of train alone": (
        "train/1.jpg train_masks/1.png",
        {"train": {"train/1.jpg": None}},
        {"in train_masks/": 1},
    ),
    "splits of images and masks": (
        "train/images/1.png train/masks/1.png val/images/2.png val/masks/2.png",
        {"train": {"train/images/1.png": None}, "validation": {"val/images/2.png": None}},
        {"in masks/": 2},
    ),
    "a folder for each image": (
        "a1/images/a1.png a1/masks/7.png b2/images/b2.png b2/masks/8.png",
        {"train": {"a1/images/a1.png": "a1", "b2/images/b2.png": "b2"}},
        {"in masks/": 2},
    ),
    "MVTec AD": (
        "nut/train/good/0.png nut/test/bent/0.png nut/ground_truth/bent/0_mask.png "
        "pill/train/good/0.png pill/test/crack/0.png pill/ground_truth/crack/0_mask.png",
        {
            "train": {"nut/train/good/0.png": "nut", "pill/train/good/0.png": "pill"},
            "test": {"nut/test/bent/0.png": "nut", "pill/test/crack/0.png": "pill"},
        },
        {"in ground_truth/": 2},
    ),
    "masks by name": (
        "benign/1.png benign/1_mask.png benign/1_mask_1.png normal/2.png normal/2_mask.png",
        {"train": {"benign/1.png": "benign", "normal/2.png": "normal"}},
        {"masks by their names": 3},
    ),
    "masks beside pictures": ("1.png masks/1.png", {"train": {"1.png": None}}, {"in masks/": 1}),
    "masks beside a folder of the same names": (
        "photos/1.jpg photos/2.jpg mask/1.png mask/2.png",
        {"train": {"photos/1.jpg": None, "photos/2.jpg": None}},
        {"in mask/": 2},
    ),
    "masks that are classes": (
        "with_mask/1.png without_mask/2.png",
        {"train": {"with_mask/1.png": "with_mask", "without_mask/2.png": "without_mask"}},
        {},
    ),
    "patients": ("P[001-040]/[1-5].png", {"train": {"P[001-040]/[1-5].png": None}}, {}),
    "a few patients": ("patient_[1-4]/[1-50].png", {"train": {"patient_[1-4]/[1-50].png": None}}, {}),
    "patients within classes": (
        "ill/P[1-3]/[1-4].png well/P[4-6]/[1-4].png",
        {"train": {"ill/P[1-3]/[1-4].png": "ill", "well/P[4-6]/[1-4].png": "well"}},
        {},
    ),
    "days": ("2024-03-[01-12]/[1-30].png", {"train": {"2024-03-[01-12]/[1-30].png": None}}, {}),
    "numbered classes": (
        "[0-2]/[1-3].png",
        {"train": {"0/[1-3].png": "0", "1/[1-3].png": "1", "2/[1-3].png": "2"}},
        {},
    ),
    "many numbered folders": ("[00000-00042]/[1-20].png", {"train": {"[00000-00042]/[1-20].png": None}}, {}),
    "ImageNet": (
        "train/n01440764/[1-2].JPEG train/n01443537/[1-2].JPEG val/n01440764/3.JPEG",
        {
            "train": {"train/n01440764/[1-2].JPEG": "n01440764", "train/n01443537/[1-2].JPEG": "n01443537"},
            "validation": {"val/n01440764/3.JPEG": "n01440764"},
        },
        {},
    ),
    "many folders of few images": (
        " ".join(f"{name}/[1-6].png" for name in "ant bee cat dog eel fox gnu hen ibis jay kite".split()),
        {"train": {f"{name}/[1-6].png": None for name in "ant bee cat dog eel fox gnu hen ibis jay kite".split()}},
        {},
    ),
    "a test folder of no class": (
        "train/cat/1.png train/dog/1.png test/unknown/2.png",
        {"train": {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}, "test": {"test/unknown/2.png": None}},
        {},
    ),
    "an unpacked archive": (
        "data/v2/cat/1.png data/v2/dog/1.png",
        {"train": {"data/v2/cat/1.png": "cat", "data/v2/dog/1.png": "dog"}},
        {},
    ),
}

# What a tar holds → [(grey level, label)] without a stream, and in a stream.
TARS = {
    "numbers": ([("a.png", 1), ("a.cls", b"5"), ("b.png", 2), ("b.cls", b"7\n")], [(1, 5), (2, 7)], ...),
    "names": (
        [("a.png", 1), ("a.cls", b"dog"), ("b.png", 2), ("b.cls", b"cat")],
        [(1, "dog"), (2, "cat")],
        [(1, None), (2, None)],
    ),
    "a label is missing": ([("a.png", 1), ("b.png", 2), ("b.cls", b"3")], [(1, -1), (2, 3)], ...),
    "JSON": (
        [("a.jpg", 1), ("a.json", {"label": 3, "by": "me"}), ("b.jpg", 2), ("b.json", {"label": 0})],
        [(1, 3), (2, 0)],
        ...,
    ),
    "JSON without a label": ([("a.jpg", 1), ("a.json", {"by": "me"})], [(1, None)], ...),
    "damaged JSON": ([("a.jpg", 1), ("a.json", b"{")], [(1, None)], ...),
    "booleans": (
        [("a.jpg", 1), ("a.json", {"label": True}), ("b.jpg", 2), ("b.json", {"label": False})],
        [(1, 1), (2, 0)],
        ...,
    ),
    "mixed types in any case": (
        [("a.JPG", 1), ("b.jpeg", 2), ("c.PNG", 3), ("d.webp", 4), ("e.tif", 5), ("f.npy", 6)],
        [(i, None) for i in range(1, 7)],
        ...,
    ),
    "class folders": (
        [("./cat/a.png", 1), ("./dog/a.png", 2)],
        [(1, "cat"), (2, "dog")],
        [(1, None), (2, None)],
    ),
    "dots in names": (
        [("x.1.png", 1), ("x.1.cls", b"4"), ("x.2.png", 2), ("x.2.cls", b"6")],
        [(1, 4), (2, 6)],
        ...,
    ),
    "masks beside": ([("a.png", 1), ("a.seg.png", 200), ("b.png", 2), ("b.seg.png", 200)], [(1, None), (2, None)], ...),
    "mask of the same name": ([("a.jpg", 1), ("a.png", 200)], [(1, None)], ...),
    "macOS": (
        [("._a.png", b"x"), ("a.png", 1), ("__MACOSX/a.png", b"x"), (".hidden/b.png", b"x")],
        [(1, None)],
        ...,
    ),
    "other files": ([("README.md", b"hi"), ("a.png", 1), ("a.txt", b"a cat")], [(1, None)], ...),
    "folders of masks": (
        [("images/a.png", 1), ("images/b.png", 2), ("masks/a.png", 200)],
        [(1, None), (2, None)],
        None,
    ),
    "a label of another name": ([("a.png", 1), ("a.json", {"target": 1, "y": 2})], [(1, None)], ...),
    "patients": (
        [(f"P{number:02}/{image}.png", number) for number in range(1, 13) for image in (1, 2)],
        sorted([(number, None) for number in range(1, 13)] * 2),
        ...,
    ),
}


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def _code(files) -> str:
    return " ".join(f"`{file}`" for file in files)


def folder_table() -> str:
    """The table of docs/data.md on folders."""
    rows = []
    for name, (files, splits, left_out) in LAYOUTS.items():
        counts = {split: sum(len(spelled_out(path)) for path in paths) for split, paths in splits.items()}
        classes = sorted({label for paths in splits.values() for label in paths.values() if label})
        images = ", ".join(f"{split} {count}" for split, count in counts.items())
        out = ", ".join(f"{count} {what}" for what, count in left_out.items())
        rows.append([name, _code(files.split()), images, ", ".join(classes) or "none", out])
    return _table(["folder", "files", "images", "classes", "left out"], rows)


def tar_table() -> str:
    """The table of docs/data.md on tars."""
    rows = []
    for name, (files, whole, streamed) in TARS.items():
        shown = [f"{file}: {_content(content)}" if file.endswith(("cls", "json")) else file for file, content in files]
        shown = [*shown[:6], "…"] if len(shown) > 6 else shown
        streamed = whole if streamed is ... else streamed
        stream = "refused" if streamed is None else _labels(streamed) if streamed != whole else "the same"
        rows.append([name, _code(shown), str(len(whole)), _labels(whole), stream])
    return _table(["tar", "files", "images", "labels", "labels in a stream"], rows)


def _content(content) -> str:
    return content.decode().strip() if isinstance(content, bytes) else json.dumps(content)


def _labels(found: list) -> str:
    labels = dict.fromkeys("unknown" if label == -1 else label for _, label in found)
    return "none" if list(labels) == [None] else ", ".join(map(str, labels))
