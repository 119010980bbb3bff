"""`hf-mim benchmark data SOURCE`: how many images one core loads."""

import functools
import io
import time
from dataclasses import dataclass
from pathlib import Path

from hf_mim.checks import least

DEEP_IMAGES = 32  # of each kind: 13 bands take much memory


@dataclass
class Benchmark:
    """Images/s of one core, against a plain PIL pipeline on the same crops.

    The plain pipeline is decode, crop, bicubic resize, flip, float, normalise, image by image. "ours" is the part that
    a data worker does, up to uint8; hf-mim plan takes it as --loader_images_per_second. "ours + augment" adds flip and
    normalisation in batches of 64, here on the same core; in training the device does them.

    Args:
        split: the split of the images
        size: side of the crops
        scale: share of the area that a crop takes
        num_images: how many images of the source to use at most
        repeats: rounds; the fastest counts
        cached: also measure images that were decoded before
        deep: also measure deep images, made from those of the source
    """

    source: str
    split: str = "train"
    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    num_images: int = 256
    repeats: int = 5
    cached: bool = False
    deep: bool = False

    def __post_init__(self):
        least(1, size=self.size, num_images=self.num_images, repeats=self.repeats)

    def __call__(self) -> dict:
        """Time both pipelines in turns, on one core, with the same bytes and crop boxes; then compare their crops."""
        import torch

        from hf_mim.data import DeviceAugment, ImageDataset, RandomCrop, load_images
        from hf_mim.data.crop import crop_rng

        torch.set_num_threads(1)
        images = load_images(self.source, self.split)
        images = images.select(range(min(len(images), self.num_images)))
        crop, size = RandomCrop(scale=tuple(self.scale)), (self.size, self.size)
        ours = ImageDataset(in_memory(images), size, crop=crop)
        encoded, indices = [row["bytes"] for row in ours.images["image"]], list(range(len(images)))
        boxes = [crop.box(*upright_size(data), size, crop_rng(0, 0, index)) for index, data in enumerate(encoded)]
        augment = DeviceAugment()

        def worker():
            return ours.__getitems__(indices)

        def worker_and_augment():
            for start in range(0, len(indices), 64):
                batch = ours.__getitems__(indices[start : start + 64])
                augment(torch.stack([sample["pixel_values"] for sample in batch]))

        def plain():
            for data, box in zip(encoded, boxes, strict=True):
                plain_pipeline(data, box, size)

        pipelines = {"plain": plain, "ours": worker, "ours + augment": worker_and_augment}
        pipelines |= as_a_run_loads(ours, augment) if self.cached else {}
        seconds = seconds_of_rounds(pipelines, self.repeats)
        rates = {name: len(indices) / min(values) for name, values in seconds.items()}
        result = {
            "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
            "speedup": round(rates["ours"] / rates["plain"], 2),
            "speedup_with_augment": round(rates["ours + augment"] / rates["plain"], 2),
            **({"cached_speedup": round(rates["run, cached"] / rates["run, decoded"], 2)} if self.cached else {}),
            "images": len(indices),
            "seconds": seconds,
        }
        print(f"{len(indices)} images, crops of {self.size} x {self.size}, scale {tuple(self.scale)}, one core\n")
        print(f"{'pipeline':<18}{'images/s':>10}{'ms/image':>10}{'speedup':>10}")
        for name, rate in rates.items():
            print(f"{name:<18}{rate:>10.0f}{1000 / rate:>10.2f}{rate / rates['plain']:>9.2f}x")
        result |= crop_differences(worker(), encoded, boxes, size)
        return result | deep_rates(encoded[:DEEP_IMAGES], crop, size, self.repeats) if self.deep else result


def as_a_run_loads(images, augment) -> dict:
    """What a run does for its batches of 64, with keys, names and augmentation: with decoding, and from a cache."""
    from hf_mim.data.cached import CachedImages, make_cache
    from hf_mim.data.dataset import collate

    images, indices = images.identify(), range(len(images))
    from_cache = CachedImages(images, make_cache(images, None, "", lambda line: None))
    batches = [indices[start : start + 64] for start in range(0, len(images), 64)]

    def decoded():
        for rows in batches:
            batch = collate(images.__getitems__(rows))
            augment(batch["pixel_values"], batch["augment_key"])

    def cached():
        for rows in batches:
            batch = from_cache.__getitems__(rows)
            augment(from_cache.crops(batch), batch["augment_key"])

    return {"run, decoded": decoded, "run, cached": cached}


def deep_rates(encoded: list[bytes], crop, size: tuple[int, int], repeats: int) -> dict:
    """Print and return the images/s of a data worker for deep images of the same sides as the source's.

    The 8-bit row has the pixels of the other rows, cut to 8 bits and losslessly compressed as they are.
    """
    import numpy as np
    import tifffile
    from PIL import Image

    from hf_mim.data import ImageDataset

    def grey(picture):
        return np.asarray(picture.convert("L"), np.uint16) * 16  # 12 bits

    def bands(picture):
        return np.stack([np.roll(grey(picture), band, axis=1) for band in range(13)], axis=2)

    def png(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "png")
        return file.getvalue()

    def tiff(array):
        file = io.BytesIO()
        about = dict(photometric="minisblack", planarconfig="contig") if array.ndim == 3 else {}
        tifffile.imwrite(file, array, compression="zlib", **about)
        return file.getvalue()

    kinds = {
        "8-bit grey PNG": (1, lambda picture: png((grey(picture) // 16).astype(np.uint8))),
        "16-bit grey PNG": (1, lambda picture: png(grey(picture))),
        "16-bit grey TIFF": (1, lambda picture: tiff(grey(picture))),
        "13 bands of 16 bits, TIFF": (13, lambda picture: tiff(bands(picture))),
    }
    loads = {}
    for name, (channels, write) in kinds.items():
        files = [write(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]
        dataset = ImageDataset(column_of(files), size, channels, crop, own_depth=True)
        loads[name] = functools.partial(dataset.__getitems__, list(range(len(files))))
    seconds = seconds_of_rounds(loads, repeats)
    rates = {name: round(len(encoded) / min(values), 1) for name, values in seconds.items()}
    print(f"\ndeep images of the same sides, {len(encoded)} of each kind\n")
    for name, rate in rates.items():
        print(f"{name:<28}{rate:>8.0f} images/s")
    return {"deep_images_per_second": rates, "deep_seconds": seconds}


def crop_differences(samples, encoded, boxes, size) -> dict:
    """Print how far our crops are from the plain ones of the same boxes; return mean and worst by way to decode."""
    from hf_mim.models.pixels import draft_reduction

    errors = {False: [], True: []}
    for sample, data, box in zip(samples, encoded, boxes, strict=True):
        difference = (sample["pixel_values"].int() - plain_crop(data, box, size).int()).abs().float().mean().item()
        drafted = data[:2] == b"\xff\xd8" and draft_reduction(box, size) > 1
        errors[drafted].append(difference)
    result = {}
    print("\nmean absolute difference of a crop to the plain one, in grey levels")
    for drafted, name in ((False, "decoded in full"), (True, "draft")):
        if errors[drafted]:
            mean, worst = sum(errors[drafted]) / len(errors[drafted]), max(errors[drafted])
            print(f"{name:<18}{len(errors[drafted]):>6} crops, mean {mean:.2f}, worst {worst:.2f}")
            result[f"difference_{name.replace(' ', '_')}"] = {
                "crops": len(errors[drafted]),
                "mean": mean,
                "worst": worst,
            }
    return result


def in_memory(images):
    """The same images with their bytes in the table, so that the disk is not measured."""
    return column_of([row["bytes"] or Path(row["path"]).read_bytes() for row in images["image"]])


def column_of(files: list[bytes]):
    """A dataset of these files."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    # No path, because datasets drops the bytes of files that it finds on the disk.
    rows = [{"bytes": data, "path": None} for data in files]
    return Dataset.from_dict({"image": rows}, features=Features(image=ImageFeature(decode=False)))


def upright_size(data: bytes) -> tuple[int, int]:
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def plain_crop(data: bytes, box, size):
    """uint8 [3, h, w] by PIL alone."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB"))
    image = image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain_pipeline(data: bytes, box, size):
    """What torchvision's transforms compute, image by image: float32 [3, h, w]."""
    import torch

    pixels = plain_crop(data, box, size)
    pixels = pixels.flip(-1) if torch.rand(()) < 0.5 else pixels
    pixels = pixels.contiguous().float().div(255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None]


def seconds_of_rounds(functions: dict, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each function in each round. In a round every function runs once."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return seconds
