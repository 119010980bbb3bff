"""Position tables for any grid.

The methods add a fixed sine-cosine code to each patch (MAE, appendix A.1; I-JEPA; Latent MIM). Their released
tables agree on a layout that is easy to get wrong: the *column* code fills the first half of the width, the row code
the second, `[sin w | cos w | sin h | cos h]`, with frequencies `10000^(-i / (D/4))`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_vit import MIMConfig


def sincos_table(grid: tuple[int, int], width: int, num_prefix_tokens: int = 0, rescaled: bool = False) -> torch.Tensor:
    """Sine-cosine codes `[prefix + N, D]` (float32) of a `(rows, columns)` grid in raster order.

    The rows of prefix tokens (CLS) are zero. The places of patches are integers. With `rescaled` they are those of
    Latent MIM, `linspace(0, 1, n) · n`, whose steps are n/(n-1). `width` must be divisible by 4.
    """
    assert width % 4 == 0, f"width {width} is not divisible by 4"
    rows, columns = (
        torch.linspace(0, 1, n, dtype=torch.float64) * n if rescaled else torch.arange(n, dtype=torch.float64)
        for n in grid
    )
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row_codes, column_codes = (
        torch.cat([angles.sin(), angles.cos()], dim=-1)
        for angles in (rows[:, None] * frequencies, columns[:, None] * frequencies)
    )
    codes = column_codes[None].expand(grid[0], -1, -1), row_codes[:, None].expand(-1, grid[1], -1)
    return F.pad(torch.cat(codes, dim=-1).flatten(0, 1), (0, 0, num_prefix_tokens, 0)).float()


def resize_table(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int = 0
) -> torch.Tensor:
    """A `[prefix + N, D]` table resampled (bicubic) from `old_grid` to `new_grid`; prefix rows stay as they are."""
    prefix, patches = table[:num_prefix_tokens], table[num_prefix_tokens:]
    image = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.flatten(2)[0].T.to(table.dtype)])


class PositionEmbeddings(nn.Module):
    """The position table of one network of this width: a buffer of sine-cosine codes, or a learned parameter.

    `config` says which (`learned_positions`, `rescaled_positions`), for which grid, and whether there is a CLS token.
    The whole table is saved with the checkpoint, the row of the CLS token too: other people's fine-tuned weights have
    changed that row. Registers have no row; their positions are zero.
    """

    def __init__(self, config: MIMConfig, width: int):
        super().__init__()
        self.grid, self.width, self.num_rows = config.grid_size, width, int(config.use_cls_token)  # before the patches
        self.num_registers = config.num_register_tokens
        self.learned, self.rescaled = config.learned_positions, config.rescaled_positions
        table = torch.empty(self.num_rows + math.prod(self.grid), width)
        if self.learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def init_weights(self) -> None:
        if self.learned:
            init.trunc_normal_(self.table, std=0.02)
        else:
            table = sincos_table(self.grid, self.width, self.num_rows, self.rescaled)
            init.copy_(self.table, table.to(self.table))

    def forward(self, grid: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions of the prefix `[prefix, D]` and of the patches `[N, D]` of a `(rows, columns)` grid.

        The table is resampled for a grid that is not the trained one.
        """
        table = self.table
        if tuple(grid) != self.grid:
            table = resize_table(table, self.grid, grid, self.num_rows)
        table = table.to(dtype)
        prefix, places = table[: self.num_rows], table[self.num_rows :]
        return (F.pad(prefix, (0, 0, 0, self.num_registers)) if self.num_registers else prefix), places
