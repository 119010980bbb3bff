"""How the values of any image become colours: which bands, stretched how, and what stands for pixels without data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hf_mim.checks import check_bands

# These shares of a band's values become black and white. What lies beyond them, such as hot pixels, is clipped.
PERCENTILES = 0.5, 99.5
NO_DATA = (0.80, 0.27, 0.80)  # a violet; a note says so


@dataclass(frozen=True)
class Display:
    """Shows an image, and everything else with the same values such as its reconstruction, in the same way.

    bands: which become red, green and blue, or the one that becomes grey, from 0.
    low, high: for each of them, the values that become black and white.
    """

    bands: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, pixels: Tensor, bands: Sequence[int] | None = None, stretch: bool = True) -> "Display":
        """For an image `[C, h, w]`, in which NaN stands for no data.

        bands: numbers from 1; default: the first three, or the first if there are fewer.
        stretch: take black and white from the values, for each band by itself; False: they are 0 and 255.
        """
        check_bands(bands, len(pixels))
        chosen = tuple(range(3 if len(pixels) >= 3 else 1)) if bands is None else tuple(band - 1 for band in bands)
        if not stretch:
            return cls(chosen, np.zeros(len(chosen)), np.full(len(chosen), 255.0))
        values = pixels[list(chosen)].double().flatten(1).cpu().numpy()
        valid = [band[np.isfinite(band)] for band in values]
        ends = np.array([np.percentile(band, PERCENTILES) if band.size else (0, 255) for band in valid])
        # A constant band has no contrast that could be shown: it becomes grey.
        flat = ends[:, 0] == ends[:, 1]
        ends[flat] += (-1, 1)
        return cls(chosen, ends[:, 0], ends[:, 1])

    def __call__(self, pixels: Tensor) -> np.ndarray:
        """`[C, h, w]` → RGB `[h, w, 3]` in 0..1. A pixel without data in any of the bands is violet."""
        values = pixels[list(self.bands)].double().permute(1, 2, 0).cpu().numpy()
        missing = np.isnan(values).any(axis=2)
        shown = ((values - self.low) / (self.high - self.low)).clip(0, 1)
        shown = np.broadcast_to(shown, (*missing.shape, 3)).copy()
        shown[missing] = NO_DATA
        return shown
