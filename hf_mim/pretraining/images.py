"""The images of a run as the trainer takes them: random crops, what is measured on them, augmentation on the device."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable

from datasets import Dataset
from transformers import PreTrainedConfig

from hf_mim import methods
from hf_mim.data import (
    DeviceAugment,
    ImageDataset,
    ImageStream,
    NativeCrop,
    RandomCrop,
    channel_statistics,
    check_broken,
)
from hf_mim.data.crop import image_size
from hf_mim.data.decode import BrokenImage, decoding, image_name
from hf_mim.data.nodata import IGNORE_TAGS, pages_line, tag_nodata
from hf_mim.data.sources import fixed_sample
from hf_mim.data.stacks import ZERO, parts_of
from hf_mim.data.value_range import find_value_range
from hf_mim.models.nodata import as_text
from hf_mim.models.pixels import ValueRange
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.final_results import Tell, find_test_split, fixed_view
from hf_mim.pretraining.recipe import Recipe, RunArguments
from hf_mim.progress import with_bar

NUM_SAMPLED = 1024  # images on which the values are measured, the same for each measurement
NUM_SIZES = 1024  # images whose sizes are compared with the window


def check_modalities(images, run: RunArguments, config: PreTrainedConfig):
    """Raise ValueError if the classes of the images are the modalities of the model: their folders hold parts."""
    names = list(getattr(config, "modality_channels", {}))
    label = (images.features or {}).get("label")
    if run.image_column is None and len(names) > 1 and set(getattr(label, "names", ())) >= set(names):
        raise ValueError(
            f"{run.dataset} has a folder for each of the modalities {', '.join(names)}; to read them as one image, "
            f"give --image_column {','.join(names)}"
        )


def counted_parts(run: RunArguments, config: PreTrainedConfig) -> str | None:
    """`image_column`; with missing_modality zero, it says how many channels each part has.

    Raises ValueError for parts that are the modalities of the model in another order, and, if some may be missing, for
    parts that are not those modalities.
    """
    names, parts = list(getattr(config, "modality_channels", {})), parts_of(run.image_column)
    if sorted(parts) == sorted(names) and list(parts) != names:
        raise ValueError(
            f"image_column must name the parts in the order of modalities, {','.join(names)}, not {run.image_column}"
        )
    if run.missing_modality != ZERO:
        return run.image_column
    counts = list(getattr(config, "modality_channels", {}).values())
    if len(counts) < 2:
        raise ValueError(
            f"missing_modality {ZERO} needs several modalities (interactive_mim), and {run.method} has one"
        )
    if len(parts) != len(counts) or any(own not in (None, n) for own, n in zip(parts.values(), counts, strict=True)):
        told = ", ".join(f"{name}: {count}" for name, count in config.modality_channels.items())
        raise ValueError(
            f"missing_modality {ZERO} needs as image_column one part for each of the modalities {{{told}}}, with as "
            f"many channels and in their order, not {run.image_column}"
        )
    return ",".join(f"{name}:{count}" for name, count in zip(parts, counts, strict=True))


def random_crops(
    images, run: RunArguments, config: PreTrainedConfig, args: MIMTrainingArguments
) -> ImageDataset | ImageStream:
    """Random crops in the size that the method trains on, in their own depth. A stream is shuffled within a buffer."""
    height, width = config.training_size
    if run.rotate90 and height != width:
        raise ValueError(
            f"rotate90 must be false for crops of {height} x {width} pixels: only square ones can be turned"
        )
    if run.crop_pixels is not None:
        crop = NativeCrop(run.crop_pixels)
        if abs(crop.pixels[0] * width - crop.pixels[1] * height) >= max(height, width):  # more than rounding
            right = f"{crop.pixels[0]},{round(crop.pixels[0] * width / height)}"
            raise ValueError(
                f"crop_pixels must have the proportions of the input, {height} x {width}, not "
                f"{crop.pixels[0]},{crop.pixels[1]}; {right} would be right"
            )
    else:
        try:
            crop = RandomCrop(run.crop_scale, run.crop_ratio)
        except ValueError as error:
            raise ValueError(f"crop_{error}") from None
    about = dict(crop=crop, seed=args.seed, own_depth=True)
    if run.nodata not in (None, IGNORE_TAGS):
        about["value_range"] = ValueRange((0.0,), (1.0,), nodata=run.nodata)  # its ends are measured later
    if isinstance(images, Dataset):
        return ImageDataset(images, config.training_size, config.num_channels, **about)
    images = images.shuffle(seed=args.data_seed, buffer_size=run.shuffle_buffer)
    return ImageStream(images, config.training_size, config.num_channels, **about)


def measured_crops(
    recipe: Recipe, images, config: PreTrainedConfig, args: MIMTrainingArguments
) -> tuple[ImageDataset | ImageStream, ValueRange | None, str | None, str | None]:
    """(`random_crops`, their value range, lines that say what was found, how many pixels have no data, in words). The
    recipe gets what was not given.

    Raises ValueError for pixels without data if the method cannot leave them out.
    """
    run, method = recipe.run, methods.get(recipe.run.method)
    check_modalities(images, run, config)
    given = run.nodata is not None
    if not given:
        run.nodata = tag_nodata(images)
    lacking = run.missing_modality == ZERO
    if lacking and run.nodata in (None, IGNORE_TAGS):
        run.nodata = math.nan  # so that pixels can be without data; whole numbers are never NaN
    crops = random_crops(images, run, config, args)
    crops = crops if given else crops.check_tags()
    value_range, found, missing = find_value_range(
        crops, run.value_range, config.num_channels, watching("range of values", images), lacking
    )
    found = "\n".join(line for line in (pages_line(images, config.num_channels), found) if line) or None
    if value_range is not None:
        run.value_range = value_range.as_list()
        if value_range.nodata is not None and not method.takes_nodata:
            raise ValueError(
                f"nodata {as_text(value_range.nodata)} needs a method whose forward takes valid_pixels, and "
                f"{method.name} has none (docs/new_method.md); --nodata none ignores the tags of files"
            )
    return crops, value_range, found, missing


def watching(what: str, images) -> Callable[[Iterable], Iterable]:
    """Passes `NUM_SAMPLED` of the images on with a progress bar."""
    total = min(NUM_SAMPLED, len(images)) if hasattr(images, "__len__") else NUM_SAMPLED
    return functools.partial(with_bar, desc=what, total=total)


def check_sample(images: ImageDataset | ImageStream):
    """Raise BrokenImagesError if too many images of the samples on which the run was measured are broken.

    A stream has checked itself while it was read.
    """
    if isinstance(images, ImageDataset):
        check_broken(images, read=NUM_SAMPLED)


def check_windows(images, crops: ImageDataset | ImageStream) -> str:
    """A line that says how the windows are cut, and how many images of a sample are smaller than they are.

    Raises ValueError if all images of the sample are smaller.
    """
    crop, sizes = crops.crop, []
    for row in fixed_sample(images, NUM_SIZES):
        with contextlib.suppress(BrokenImage), decoding(image_name(row["image"], "an image")):
            sizes.append(image_size(row["image"], crops.num_channels, crops.value_range))
    smaller = sum(crop.is_larger(*size) for size in sizes)
    if sizes and smaller == len(sizes):
        fits = max(min(height, width) for width, height in sizes)
        raise ValueError(
            f"crop_pixels {','.join(map(str, crop.pixels))} must fit into an image, and all {len(sizes):,} that were "
            f"looked at are smaller in a side; a square of {fits} fits into one"
        )
    resized = "not resized" if crop.pixels == crops.size else "resized to {} x {}".format(*crops.size)
    line = "crops: windows of {} x {} pixels, ".format(*crop.pixels) + resized
    count = f"{smaller:,} of {len(sizes):,} images are smaller"
    return f"{line}; {count}, and their largest such part is enlarged" if smaller else f"{line}; {count}"


def evaluation_images(
    run: RunArguments, config: PreTrainedConfig, value_range: ValueRange | None, tell: Tell = None
) -> ImageDataset | ImageStream:
    """Test images in the size that the method trains on, for `eval_loss`."""
    images, _, _ = find_test_split(run, tell=tell)
    if images is None:
        raise ValueError(f"eval_strategy needs test_dataset: {run.dataset} has no validation or test split")
    return fixed_view(images, config, run.knn_test_images, run, value_range, size=config.training_size)


def device_augment(recipe: Recipe, images: ImageDataset | ImageStream, config: PreTrainedConfig) -> DeviceAugment:
    """Augmentation and normalisation. If mean and std are not given, they are measured and put into the recipe."""
    run = recipe.run
    if run.image_mean is None:
        run.image_mean, run.image_std = (
            [round(x, 4) for x in values]
            for values in channel_statistics(images, watch=watching("mean and std", images))
        )
    if len(run.image_mean) != config.num_channels:
        raise ValueError(f"image_mean must have {config.num_channels} values (num_channels), not {run.image_mean}")
    return DeviceAugment(
        run.image_mean,
        run.image_std,
        run.flip_probability,
        run.grayscale_probability,
        run.blur_probability,
        run.blur_sigma,
        images.value_range,
        vertical_flip_probability=run.vertical_flip_probability,
        rotate90=run.rotate90,
        color_jitter=run.color_jitter,
    )
