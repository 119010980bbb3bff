"""The image processor that is saved with a checkpoint: what users of transformers alone prepare images by."""

from collections.abc import Sequence

from transformers.utils import logging


def image_processor(image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
    """A `ViTImageProcessor` that makes an image the encoder's input: whole, resized to (height, width), normalised.

    It takes pictures of any mode for 3 channels, grey ones for 1. PIL resizes images of up to 4 channels; for others
    the arrays have to come in the right size, with `input_data_format` given.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # importing it warns that torchvision is missing; without, it works by PIL
    try:
        from transformers import ViTImageProcessor

        return ViTImageProcessor(
            size={"height": image_size[0], "width": image_size[1]},
            resample=3,  # bicubic
            do_resize=len(mean) <= 4,
            do_convert_rgb=len(mean) == 3,
            image_mean=list(mean),
            image_std=list(std),
        )
    finally:
        logging.set_verbosity(verbosity)
