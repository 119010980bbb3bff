"""Finds out by a few passes where an encoder's layers are, and how their outputs hold the tokens.

A layer is one of the modules of the ModuleList that holds most of the weights: the blocks of a vision transformer, the
stages of a network whose maps shrink (Swin, ConvNeXt, ResNet). If the encoder's own `last_hidden_state` is neither the
output of the last of them nor its final norm, it is one more layer.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from hf_mim.evaluation.checkpoint import module_lists
from hf_mim.models.configuration_vit import pair

# Names of a norm that comes after pooling, so that `last_hidden_state` is without it: CLIP's, ConvNeXt's.
NORM_NAMES = ("norm", "layernorm", "layer_norm", "post_layernorm", "rms_norm")


@dataclass(frozen=True)
class Stream:
    """How a layer's output holds its tokens, for images of one size.

    width: D. grid: (rows, columns). num_prefix: tokens before the patches, such as CLS. num_suffix: tokens after them.
    channels_at: the axis of the channels in a map, 1 or 3; None if the output is `[B, tokens, D]`.
    is_raster: whether the patches are known to be in raster order.
    """

    width: int
    grid: tuple[int, int]
    num_prefix: int = 0
    num_suffix: int = 0
    channels_at: int | None = None
    is_raster: bool = True

    def tokens(self, output: Tensor) -> Tensor:
        """A layer's output → `[B, prefix + N, D]`, for images of any size."""
        if self.channels_at is not None:
            return output.flatten(2).transpose(1, 2) if self.channels_at == 1 else output.flatten(1, 2)
        return output[:, : output.shape[1] - self.num_suffix]


@dataclass
class Layers:
    """The layers of an encoder.

    modules: one for each layer; the last is None if `last_hidden_state` is a layer of its own.
    streams: how their outputs hold the tokens.
    norm: the final norm; None if there is none.
    stride: (height, width) of the part of an image that a token of the last layer stands for.
    pools_first: whether the model itself takes the mean of the tokens before the final norm, as ConvNeXt does.
    """

    modules: list[nn.Module | None]
    streams: list[Stream]
    norm: nn.Module | None
    stride: tuple[int, int]
    pools_first: bool

    def run(self, forward: Callable[[], object], wanted: set[int]) -> dict[int, Tensor]:
        """Call `forward` → number of a layer, from 1 → its tokens `[B, prefix + N, D]`."""
        outputs: dict[int, Tensor] = {}

        def keep(number, module, args, output):
            outputs[number] = first_tensor(output)

        with contextlib.ExitStack() as hooks:
            for number in wanted:
                if (module := self.modules[number - 1]) is not None:
                    hooks.enter_context(module.register_forward_hook(partial(keep, number)))
            result = forward()
        if len(self.modules) in wanted and self.modules[-1] is None:
            outputs[len(self.modules)] = own_output(result)
        return {number: self.streams[number - 1].tokens(output) for number, output in outputs.items()}


def find_layers(model: nn.Module, encode: Callable[[Tensor], object], images: Tensor) -> Layers:
    """The layers of a model, for images of this size.

    Args:
        encode: runs the model on images.
        images: `[1, C, H, W]`, noise. Patches of it are changed, to see which token is which patch.

    Raises:
        ValueError: in one line that does not name the model: it has no layers, or nobody can tell which tokens are
            patches.
    """
    size, config = tuple(images.shape[2:]), model.config
    patch = getattr(config, "patch_size", None)
    patch = pair(patch) if isinstance(patch, int | list | tuple) else None
    modules, outputs = called_modules(model, encode, images)
    if not modules:
        raise ValueError("it has no list of layers, each of which gives tokens or a map")
    before, last, norm, result = ends_of(model, modules, encode, images)
    own = own_output(result)
    place = patches_in(partial(input_of, modules[0], encode), images, patch, before, last)
    streams = [stream_of(output, size, patch, place, getattr(config, "hidden_size", None)) for output in outputs]
    own_stream = stream_of(own, size, patch, place, getattr(config, "hidden_size", None))
    mine, theirs = streams[-1].tokens(last), own_stream.tokens(own)
    if norm is not None and not same(norm(mine), theirs):
        norm = None
    if norm is None and same(mine, theirs):
        norm = norm_after_pooling(model, own_stream.width)
    elif norm is None:
        modules, streams = [*modules, None], [*streams, own_stream]
    pooled = getattr(result, "pooler_output", None)
    pools_first = isinstance(pooled, Tensor) and norm is not None
    pools_first = pools_first and same(norm(mine[:, own_stream.num_prefix :].mean(dim=1)), pooled.flatten(1))
    if not streams[-1].is_raster and is_as_map(model, encode, images, mine, theirs[:, own_stream.num_prefix :]):
        streams[-1] = replace(streams[-1], is_raster=True)
    return Layers(modules, streams, norm, stride_of(size, streams[-1].grid, patch), pools_first)


def first_tensor(output) -> Tensor | None:
    """The tensor in the output of a layer, which may be a tuple."""
    output = output[0] if isinstance(output, tuple | list) and output else output
    return output if isinstance(output, Tensor) else None


def own_output(result) -> Tensor:
    """`last_hidden_state` of what a model returns; of a backbone, its last map. ValueError if it has neither."""
    own = getattr(result, "last_hidden_state", None)
    maps = getattr(result, "feature_maps", None)
    own = maps[-1] if own is None and maps else own
    if not isinstance(own, Tensor):
        raise ValueError("it returns no last_hidden_state")
    return own


def same(a: Tensor, b: Tensor) -> bool:
    """Whether both have the same values, up to the rounding of another order of the same operations."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


def called_modules(model: nn.Module, encode, images: Tensor) -> tuple[list[nn.Module], list[Tensor]]:
    """(the modules of the list that are the layers, their outputs). A list counts if a pass calls each of its modules
    once, in order, and each gives tokens `[B, T, D]` or a map. Empty if there is none."""
    lists = list(module_lists(model).values())
    calls: list[tuple[nn.Module, Tensor | None]] = []
    with contextlib.ExitStack() as hooks:
        for module in {module for modules in lists for module in modules}:
            hooks.enter_context(
                module.register_forward_hook(lambda module, args, output: calls.append((module, first_tensor(output))))
            )
        encode(images)
    for outer in lists:
        modules = [module for item in outer for module in (item if isinstance(item, nn.ModuleList) else [item])]
        called = [call for call in calls if any(call[0] is module for module in modules)]
        outputs = [output for _, output in called if output is not None and output.ndim in (3, 4)]
        if [id(module) for module, _ in called] == [id(module) for module in modules] and len(outputs) == len(called):
            return modules, outputs
    return [], []


def ends_of(model: nn.Module, modules: list[nn.Module], encode, images: Tensor):
    """(input of the first layer, output of the last, the norm that takes this output, what the model returns)."""
    seen: dict[str, object] = {}

    def start(module, args, kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        seen["first"] = next(tensors, None)

    def end(module, args, output):
        seen["last"] = first_tensor(output)

    def norm(module, args, output):
        if args and args[0] is seen.get("last") and output.ndim == 3:  # the norm of a map may work on another axis
            seen.setdefault("norm", module)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(modules[0].register_forward_pre_hook(start, with_kwargs=True))
        hooks.enter_context(modules[-1].register_forward_hook(end))
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                hooks.enter_context(module.register_forward_hook(norm))
        result = encode(images)
    return seen["first"], seen["last"], seen.get("norm"), result


def input_of(module: nn.Module, encode, images: Tensor) -> Tensor:
    """What a layer is given for these images."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    with module.register_forward_pre_hook(keep, with_kwargs=True):
        encode(images)
    return seen[0]


def patches_in(tokens_of, images: Tensor, patch: tuple[int, int] | None, before, last: Tensor) -> tuple | None:
    """(number of tokens before the patches, number after them, their grid) in a plain vision transformer; else None.

    The first, second and last patch of an image are changed in turn: the token that changes most is that patch.

    Raises:
        ValueError: it is one, and its tokens are in another order.
    """
    if patch is None or last.ndim != 3 or before is None or before.shape[1:] != last.shape[1:]:
        return None
    rows, columns = patch_grid(images.shape[2:], patch)
    count = rows * columns
    if last.shape[1] < count:
        return None
    numbers = [0, min(1, count - 1), count - 1]
    changed = images[:1].repeat(4, 1, 1, 1)
    for image, number in zip(changed[1:], numbers, strict=True):
        top, left = number // columns * patch[0], number % columns * patch[1]
        image[:, top : top + patch[0], left : left + patch[1]] += 1
    tokens = tokens_of(changed).float()
    found = (tokens[1:] - tokens[:1]).abs().sum(dim=-1).argmax(dim=1).tolist()
    num_prefix = found[0]
    if found != [num_prefix + number for number in numbers] or num_prefix + count > last.shape[1]:
        raise ValueError(f"nobody can tell which of its {last.shape[1]} tokens are the {count} patches")
    return num_prefix, last.shape[1] - num_prefix - count, (rows, columns)


def stream_of(output: Tensor, size, patch, place: tuple | None, hidden_size: int | None) -> Stream:
    """How an output holds its tokens. Raises ValueError if that cannot be told."""
    if output.ndim == 3:
        count, width = output.shape[1:]
        if place is not None:
            num_prefix, num_suffix, grid = place
            if count == num_prefix + math.prod(grid) + num_suffix:
                return Stream(width, grid, num_prefix, num_suffix)
            if count == math.prod(grid):  # own output without CLS
                return Stream(width, grid)
        for num_prefix in (0, 1):  # of those with a CLS token: PVT, DINOv3's ConvNeXt
            grid = next((grid for grid in grids(size, patch) if math.prod(grid) == count - num_prefix), None)
            if grid is not None:
                return Stream(width, grid, num_prefix, is_raster=False)
    else:
        _, a, b, c = output.shape
        found = [axis for axis, grid in ((1, (b, c)), (3, (a, b))) if grid in set(grids(size, patch))]
        found = [3] if found == [1, 3] and c == hidden_size != a else found
        if found:
            return Stream(output.shape[found[0]], (b, c) if found[0] == 1 else (a, b), channels_at=found[0])
    shape = "×".join(map(str, output.shape[1:]))
    raise ValueError(f"nobody can tell the patches in an output of {shape} for an image of {size[0]}×{size[1]}")


def patch_grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the patches of an image."""
    return size[0] // patch[0], size[1] // patch[1]


def grids(size: tuple[int, int], patch: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """The grids that tokens of an image can have: one token for each patch, or for each square of any side."""
    if patch is not None:
        yield patch_grid(size, patch)
    for stride in range(1, max(size) + 1):
        yield from (_grid(size, stride), _grid(size, stride, math.ceil))


def _grid(size: tuple[int, int], stride: int, to_integer=math.floor) -> tuple[int, int]:
    return max(to_integer(size[0] / stride), 1), max(to_integer(size[1] / stride), 1)


def stride_of(size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the part of an image that belongs to a token."""
    if patch is not None and grid == patch_grid(size, patch):
        return patch
    strides = (s for s in range(max(size), 0, -1) if grid in (_grid(size, s), _grid(size, s, math.ceil)))
    side = max(strides, key=lambda s: (s & (s - 1) == 0, s))  # usually a power of 2
    return side, side


def norm_after_pooling(model: nn.Module, width: int) -> nn.Module | None:
    """The final norm of a model that applies it to the pooled token only."""
    norms = (getattr(model, name, None) for name in NORM_NAMES)
    shaped = (norm for norm in norms if getattr(norm, "weight", None) is not None)
    return next((norm for norm in shaped if norm.weight.shape == (width,)), None)


def is_as_map(model: nn.Module, encode, images: Tensor, tokens: Tensor, own: Tensor) -> bool:
    """Whether the model itself shows that tokens are in raster order: it makes of them a map, in `hidden_states` or
    `reshaped_hidden_states`, or its own output is the norm of one."""
    result = encode(images, output_hidden_states=True)
    maps = getattr(result, "reshaped_hidden_states", None) or getattr(result, "hidden_states", None)
    if not maps or not isinstance(maps[-1], Tensor) or maps[-1].ndim != 4:
        return False
    norm = norm_after_pooling(model, own.shape[-1])
    for axes in ((0, 1, 2, 3), (0, 2, 3, 1)):
        in_order = maps[-1].permute(*axes).flatten(1, 2)
        normed = norm is not None and in_order.shape == own.shape and same(norm(in_order), own)
        if same(in_order, tokens) or same(in_order, own) or normed:
            return True
    return False
