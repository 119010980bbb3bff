"""Images in: sources, crops in the workers, augmentation on the device, the embedded data, drawn scenes."""

# ruff: noqa: F401 (these names are what other rooms and users import from here)
from hf_mim.models.pixels import ImageFormatError, ValueRange

from .augment import IMAGENET_MEAN, IMAGENET_STD, DeviceAugment, channel_statistics, gaussian_blur
from .crop import CenterCrop, CenterWindow, NativeCrop, RandomCrop, WholeImage
from .dataset import BrokenImagesError, ImageDataset, ImageStream, check_broken
from .embedded import EMBEDDED, digits, textures
from .scenes import scenes
from .sources import load_images
