"""Small data and arguments for the tests of the trainer, and what they compare."""

import io

import datasets
import PIL.Image
import PIL.ImageChops
import torch
from transformers import TrainerCallback

from hf_mim.pretraining.trainer import MIMTrainingArguments


class Images(torch.utils.data.Dataset):
    """Noise images, each a function of its index; float, or uint8 as the data room gives them."""

    def __init__(self, model, length: int = 48, uint8: bool = False, **extra):
        self.shape, self.length, self.uint8 = (3, *model.config.training_size), length, uint8
        self.extra, self.epochs = extra, []

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        if self.uint8:
            image = torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=generator)
        else:
            image = torch.randn(self.shape, generator=generator)
        return {"pixel_values": image} | {name: value(index) for name, value in self.extra.items()}


def image_column(length: int, broken=()):
    """What load_images gives: undecoded images, here gradients that get brighter, some of them no PNG at all."""
    rows = []
    for index in range(length):
        file = io.BytesIO(b"no image" if index in broken else b"")
        if index not in broken:
            image = PIL.Image.linear_gradient("L").resize((24, 24))
            PIL.ImageChops.add(image, PIL.Image.new("L", (24, 24), index)).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": f"{index}.png"})
    return datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[i] for i in range(len(self.images)))


def arguments(tmp_path, **overrides):
    defaults = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", use_cpu=True)
    return MIMTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **defaults | overrides)


def flip_at_random(pixels):
    """A stand-in for the augmentation on the device."""
    flip = torch.rand(len(pixels), 1, 1, 1) < 0.5
    return torch.where(flip, pixels.flip(-1), pixels).float() / 128 - 1


class AtEachStep(TrainerCallback):
    """Calls `function(state, optimizer)` right after each optimizer step, before everything that comes after it."""

    def __init__(self, function):
        self.function = function

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.function(state, optimizer)


def snapshot(module):
    return [parameter.detach().double().clone() for parameter in module.parameters()]


def assert_same_weights(model, other, tolerance=0.0):
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance, name


def fixed_ids(model, length: int = 48):
    """What forward would draw for so many images, as functions of the image's index."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        masks = model.draw_masks(length, model.config.grid_size)
    return {name: drawn.__getitem__ for name, drawn in masks.items()}
