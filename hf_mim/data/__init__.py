"""Images in: sources, crops in the workers, augmentation on the device, the embedded digits, drawn scenes."""

from hf_mim.models.pixels import ImageFormatError, ValueRange

from .augment import IMAGENET_MEAN, IMAGENET_STD, DeviceAugment, channel_statistics, gaussian_blur
from .crop import CenterCrop, RandomCrop, WholeImage
from .dataset import BrokenImagesError, ImageDataset, ImageStream, check_broken
from .digits import digits
from .scenes import scenes
from .sources import load_images

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BrokenImagesError",
    "CenterCrop",
    "DeviceAugment",
    "ImageDataset",
    "ImageFormatError",
    "ImageStream",
    "RandomCrop",
    "ValueRange",
    "WholeImage",
    "channel_statistics",
    "check_broken",
    "digits",
    "gaussian_blur",
    "load_images",
    "scenes",
]
