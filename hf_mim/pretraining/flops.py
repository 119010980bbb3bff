"""How many FLOPs a training step took, by the method's formula, from the sizes of the masks that it had.

A method with a formula has `step_flops(images, grid, masks) -> int` in its pretraining model: the FLOPs of the matrix
products in forward and backward pass for so many images of one process, a grid of `(rows, columns)` patches and the
masks of the pass, by name, as `draw_masks` returns them. It reads their shapes alone, so nothing waits for the device.
`hf_mim.testing.check_method` counts whether it is right.
"""

from collections.abc import Mapping

import torch


class StepFlops:
    """FLOPs of the steps of a model. Those of shapes that were seen before are not computed again."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def __call__(self, size: torch.Size, masks: Mapping[str, torch.Tensor]) -> int:
        """The FLOPs of a step on images of `size` `[B, C, H, W]`; 0 for a method without a formula. The output of the
        pass is given as `masks`, because it has them."""
        if not hasattr(self.model, "step_flops"):
            return 0
        shapes = size, *((name, value.shape) for name, value in masks.items() if isinstance(value, torch.Tensor))
        if shapes not in self.known:
            config = self.model.config
            sides = zip(size[2:], config.training_size, config.grid_size, strict=True)
            grid = tuple(side * patches // whole for side, whole, patches in sides)
            self.known[shapes] = self.model.step_flops(size[0], grid, masks)
        return self.known[shapes]
