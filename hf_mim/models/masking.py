"""Which patches are context and which are to be predicted.

`split_at_random` is MAE's and Latent MIM's sampler, `split_checkerboard` that of SymMIM, `split_modalities` that of
Interactive MIM, and `sample_multi_block` that of I-JEPA (arXiv 2301.08243, section 3 and appendix A.1) and StoP
(arXiv 2308.00566). None loops over images.

Statistics of `sample_multi_block` with I-JEPA's scales, measured over 1,000 (14x14) and 500 (8x8) batches of 256.
"share" is the share of the grid's patches that the context has after it was cut to the smallest of the batch, "worst"
the same in the worst batch. The other columns say how often a patch there is in the context, or in any of the four
targets. The first line has the settings of the released sampler, and its biases: `mask_trim="raster"`,
`block_range="exclusive"`, `num_candidates=1`. The default is 4 candidates.

    grid    candidates  share  worst   in the context: corner  edge  centre   in a target: corner  edge  centre
    14x14   released     .24    .09    top row .75, bottom row .00            .06 at the top, .00 in the last row
    14x14   1            .29    .10                      .35   .34    .09                     .05   .24    .87
    14x14   2            .35    .20                      .41   .41    .09                     .04   .22    .88
    14x14   4            .41    .22                      .46   .47    .09                     .03   .20    .88
    14x14   8            .45    .32                      .46   .50    .11                     .03   .18    .87
    8x8     1            .30    .09                      .46   .37    .14                     .12   .34    .79
    8x8     4            .41    .22                      .57   .48    .16                     .08   .28    .79

So more candidates give larger contexts, and targets reach a little less often into the corners. Masks and their mirror
images stay equally likely. 256 images at 14x14 take 1.5 ms on one core.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .configuration_vit import check_at_least_1

Range = tuple[float, float]
MAX_REDRAWS = 100
TRIED = 64, 30  # images, and redraws, by which `BlockMasks.check_context` finds out whether a context is left


def split_at_random(noise: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Keep the `num_kept` patches with the smallest noise of each image (MAE, arXiv 2111.06377, section 3).

    Takes noise `[B, N]`. Returns the ids of the kept patches `[B, num_kept]` and of the others `[B, N - num_kept]`,
    both in the order of their noise.
    """
    order = noise.argsort(dim=1, stable=True)
    return order[:, :num_kept], order[:, num_kept:]


def patches_of_units(ids: Tensor, grid: tuple[int, int], unit: int) -> Tensor:
    """The patches of square units, `[B, K]` → `[B, K · unit²]`: those of the first unit come first, in raster order.

    Units are numbered in raster order too. The sides of the grid of patches must be divisible by `unit`.
    """
    columns = grid[1] // unit
    corners = (ids // columns * grid[1] + ids % columns) * unit
    inside = torch.arange(unit, device=ids.device)
    return (corners[..., None] + (inside[:, None] * grid[1] + inside).flatten()).flatten(1)


def split_modalities(
    noise: Tensor, num_kept: int, num_modalities: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep `num_kept` patches of each modality of each image, at other places in each modality.

    For each image the masks of the modalities are independent and uniform. At how many places several modalities are
    visible is drawn once for the batch, because its tensors have to be rectangular. The first modality keeps the
    patches with the smallest noise `[B, N]`. With the probability `dropout`, an image keeps one modality, drawn at
    random; the masked places of the others stay as they are.

    Returns the places where something is visible `[B, U]`, the masked places of each modality `[B, M, N - num_kept]`,
    and which modalities are visible at the former, bool `[B, U, M]`.
    """
    order, device = noise.argsort(dim=1, stable=True), noise.device
    # On the CPU, because the host needs the number of places. Each image has them in an order of its own.
    shown = torch.zeros(num_modalities, noise.shape[1], dtype=torch.bool)
    shown[0, :num_kept] = True
    for modality in shown[1:]:
        modality[torch.randperm(len(modality))[:num_kept]] = True
    some = shown.any(dim=0)
    masked = (~shown).nonzero()[:, 1].unflatten(0, (num_modalities, -1))
    visible = _on(device, shown[:, some].T.contiguous()).expand(len(noise), -1, -1)
    if dropout:
        one = torch.randint(num_modalities, (len(noise), 1, 1), device=device)
        one = one == torch.arange(num_modalities, device=device)
        visible = visible & (one | (torch.rand(len(noise), 1, 1, device=device) >= dropout))
    return order[:, _on(device, some.nonzero()[:, 0])], order[:, _on(device, masked)], visible


def checkerboard(grid: tuple[int, int], cell: int = 1, device: torch.device | str | None = None) -> Tensor:
    """Cells of `cell × cell` patches that alternate like the fields of a chessboard: bool `[N]`, True in the first."""
    rows, columns = (torch.arange(side, device=device) // cell for side in grid)
    return (rows[:, None] + columns).flatten() % 2 == 0


def split_checkerboard(grid: tuple[int, int], cell: int, inverted: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each image's patches into the two halves of a checkerboard; where `inverted`, they change places.

    Both halves of all images get the length of the smaller half, because tensors have to be rectangular. The noise
    decides which patches of a larger half are left out of the pass.

    Takes inverted, bool `[B]`, and noise `[B, N]` in [0, 1). Returns two tensors of ids `[B, n]`, each in the order of
    the noise.
    """
    first_rows, first_columns = (sum(place // cell % 2 == 0 for place in range(side)) for side in grid)
    count = first_rows * first_columns + (grid[0] - first_rows) * (grid[1] - first_columns)
    count = min(count, grid[0] * grid[1] - count)
    is_other = ~checkerboard(grid, cell, noise.device) ^ inverted[:, None]
    order = (noise + 2 * is_other).argsort(dim=1, stable=True)
    return order[:, :count], order[:, -count:]


def gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick from each image's tokens `[B, N, ...]` those named by its ids `[B, K]`: `[B, K, ...]`.

    Ids `[B·R, K]` are R picks for each image, those of the first image first: `[B·R, K, ...]`. Raises ValueError for
    another number of rows. It copies whole rows, which a CPU does four times as fast as `torch.gather` with expanded
    ids.
    """
    if len(ids) % len(tokens):
        raise ValueError(f"ids must have one row for each of {len(tokens)} images, or several, got {len(ids)} rows")
    first = torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
    picked = (first + ids.reshape(len(tokens), -1)).flatten()
    return tokens.flatten(0, 1).index_select(0, picked).unflatten(0, ids.shape)


@dataclass(frozen=True)
class BlockMasks:
    """Which target blocks and context block `sample_multi_block` draws; the defaults are those of I-JEPA.

    Args:
        num_targets: target blocks for each image, M.
        target_scale, context_scale: lowest and highest share of the grid's patches in one block.
        target_aspect_ratio: lowest and highest height / width of a target. The context block has the grid's own ratio.
        mask_trim: which patches are removed from a context that is too long: `random` ones, or the last in `raster`
            order (as in the released code).
        block_range: `inclusive` puts blocks anywhere. `exclusive` never puts them on the last row and column (as in the
            released code); a block as large as the grid is first made smaller by one.
        num_candidates: masks drawn for each image, of which the one with the largest context is kept.
    """

    num_targets: int = 4
    target_scale: Range = (0.15, 0.2)
    target_aspect_ratio: Range = (0.75, 1.5)
    context_scale: Range = (0.85, 1.0)
    mask_trim: Literal["random", "raster"] = "random"
    block_range: Literal["inclusive", "exclusive"] = "inclusive"
    num_candidates: int = 4

    def check(self, grid: tuple[int, int]) -> None:
        """Raise a ValueError that names the argument if no blocks can be drawn on a grid of `(rows, columns)`."""
        for name, known in (("mask_trim", ("random", "raster")), ("block_range", ("inclusive", "exclusive"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, not {getattr(self, name)!r}")
        check_at_least_1(self, "num_targets", "num_candidates")
        for name, most in (("target_scale", 1), ("context_scale", 1), ("target_aspect_ratio", math.inf)):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= most or math.isinf(bounds[1]):
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {most}, not {tuple(bounds)}")
        rows, columns = grid
        if self.block_range == "exclusive" and min(grid) < 2:
            raise ValueError(f"block_range='exclusive' needs two rows and columns of patches, not {rows}x{columns}")
        height, _ = _block_size(grid, self.target_scale[1], self.target_aspect_ratio[1], "inclusive")
        _, width = _block_size(grid, self.target_scale[1], self.target_aspect_ratio[0], "inclusive")
        if height > rows or width > columns:
            raise ValueError(
                f"target_scale={self.target_scale} with target_aspect_ratio={self.target_aspect_ratio} gives target "
                f"blocks up to {height} patches high and {width} wide, larger than the grid of {rows}x{columns} patches"
            )

    def check_context(self, grid: tuple[int, int]) -> None:
        """Raise a ValueError that names the argument if the largest targets almost never leave a context on this grid.

        It is for the start of a run: where the sizes do not tell, it draws masks and looks.
        """
        ratios = torch.linspace(*self.target_aspect_ratio, 33, device="cpu").tolist()
        sizes = {_block_size(grid, self.target_scale[1], ratio, self.block_range) for ratio in ratios}
        context = _block_size(grid, self.context_scale[0], grid[0] / grid[1], self.block_range)
        for size in sizes:
            if self.num_targets * math.prod(size) < math.prod(context):
                continue
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(0)
                blocks = (_places(grid, block, self.block_range) for block in (size, context))
                target_masks, context_masks = (_as_masks(places, grid) for places in blocks)
                without, redraws = TRIED
                while without and redraws:
                    _, drawn = _draw(without, target_masks, context_masks, self.num_targets, self.num_candidates)
                    without, redraws = int((~drawn.any(dim=1)).sum()), redraws - 1
            if without:
                raise ValueError(self.no_context(grid))

    def no_context(self, grid: tuple[int, int]) -> str:
        """The message about targets that leave no context on a grid."""
        if math.prod(grid) == 1:
            return "image_size must hold two patches at least, and there is one: lower patch_size or raise image_size"
        return (
            f"target_scale={self.target_scale} with num_targets={self.num_targets} leaves no context on a grid of "
            f"{grid[0]}x{grid[1]} patches: lower one of the two, or take more patches"
        )


@torch.compiler.disable  # the number of context patches depends on the data, so no compiled graph can hold it
@torch.no_grad()
def sample_multi_block(
    batch_size: int,
    grid: tuple[int, int],
    masking: BlockMasks = BlockMasks(),  # noqa: B008 (frozen)
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the target blocks of each image, and as its context one large block without the targets (I-JEPA, A.1).

    The sizes of the blocks are drawn once for the batch, because its tensors have to be rectangular; the places of the
    blocks are drawn for each image.
    Targets of one image may overlap each other. The context overlaps none of them and is never empty. All contexts are
    cut to the length of the smallest one in the batch. That costs less because each image draws `num_candidates` masks
    and keeps the one with the largest context.

    Args:
        grid: rows and columns of patches.
        masking: sizes and numbers of the blocks.
        device: where the ids go. They are drawn on the CPU, because the host needs their number: it would wait for an
            accelerator at every step. The copy from pinned memory makes nobody wait.

    Returns the context ids `[B, Nc]`, ascending, and target ids `[B, M, Nt]`, each block in raster order. Both are
    int64 and determined by `torch.manual_seed`. Raises ValueError as `BlockMasks.check` does, and if the targets leave
    no context.
    """
    masking.check(grid)
    at_scale, at_aspect, at_context = torch.rand(3).tolist()
    scale, aspect_ratio = _between(masking.target_scale, at_scale), _between(masking.target_aspect_ratio, at_aspect)
    target_blocks = _blocks_everywhere(grid, scale, aspect_ratio, masking.block_range)
    scale, aspect_ratio = _between(masking.context_scale, at_context), grid[0] / grid[1]
    context_blocks = _blocks_everywhere(grid, scale, aspect_ratio, masking.block_range)
    target_masks, context_masks = _as_masks(target_blocks, grid), _as_masks(context_blocks, grid)

    counts = masking.num_targets, masking.num_candidates
    places, context = _draw(batch_size, target_masks, context_masks, *counts)
    for _ in range(MAX_REDRAWS):
        empty = (~context.any(dim=1)).nonzero()[:, 0]
        if len(empty) == 0:
            break
        places[empty], context[empty] = _draw(len(empty), target_masks, context_masks, *counts)
    else:
        raise ValueError(masking.no_context(grid))

    return _on(device, _trim(context, masking.mask_trim)), _on(device, target_blocks[places])


def _on(device: torch.device | str | None, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on a device. The copy from pinned memory makes nobody wait."""
    if device is not None and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _between(bounds: Range, share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])


def _block_size(grid: tuple[int, int], scale: float, aspect_ratio: float, block_range: str) -> tuple[int, int]:
    area = int(scale * grid[0] * grid[1])
    height, width = round(math.sqrt(area * aspect_ratio)), round(math.sqrt(area / aspect_ratio))
    if block_range == "exclusive":
        height, width = min(height, grid[0] - 1), min(width, grid[1] - 1)
    return max(height, 1), max(width, 1)


def _blocks_everywhere(grid: tuple[int, int], scale: float, aspect_ratio: float, block_range: str) -> Tensor:
    """`_places` for a block of this share of the grid, with this height / width."""
    return _places(grid, _block_size(grid, scale, aspect_ratio, block_range), block_range)


def _places(grid: tuple[int, int], size: tuple[int, int], block_range: str) -> Tensor:
    """The patch ids of a block of this size, for each place where it fits: `[places, height * width]`."""
    rows, columns = (whole - side + (block_range == "inclusive") for whole, side in zip(grid, size, strict=True))
    corners = torch.arange(rows)[:, None] * grid[1] + torch.arange(columns)
    block = torch.arange(size[0])[:, None] * grid[1] + torch.arange(size[1])
    return corners.reshape(-1, 1) + block.reshape(1, -1)


def _as_masks(blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch ids `[places, n]` as booleans over the grid, `[places, N]`."""
    return torch.zeros(len(blocks), grid[0] * grid[1], dtype=torch.bool).scatter_(1, blocks, True)


def _draw(
    batch_size: int, target_masks: Tensor, context_masks: Tensor, num_targets: int, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """The draw with the largest context, for each image: places of its targets `[B, M]`, its context `[B, N]`."""
    places = torch.randint(len(target_masks), (batch_size * num_candidates, num_targets))
    context = context_masks[torch.randint(len(context_masks), (len(places),))]
    for place in places.unbind(dim=1):  # over the targets, not the images
        context &= ~target_masks[place]
    context = context.unflatten(0, (batch_size, num_candidates))
    images, best = torch.arange(batch_size), context.sum(dim=2).argmax(dim=1)
    return places.unflatten(0, context.shape[:2])[images, best], context[images, best]


def _trim(context: Tensor, mask_trim: str) -> Tensor:
    """Context masks `[B, N]` → ids `[B, Nc]`: every context is cut to Nc patches, the length of the smallest."""
    count = int(context.sum(dim=1).min())
    if mask_trim == "raster":
        kept = context & (context.cumsum(dim=1) <= count)
    else:
        order = torch.rand(context.shape).masked_fill_(~context, 2.0)
        kept = torch.zeros_like(context).scatter_(1, order.topk(count, largest=False, sorted=False).indices, True)
    return kept.nonzero()[:, 1].unflatten(0, (-1, count))
