"""Semantic segmentation from frozen patch tokens. The encoder is not trained.

Two readers score the classes of each patch from its token: a linear layer (DINOv2, arXiv 2304.07193, section 7.4), and
the nearest neighbours among the tokens of the training images (Balažević et al., arXiv 2306.01667, section 3). The
scores are then interpolated to the pixels of the mask.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.checks import least, positive, share
from hf_mim.data import WholeImage
from hf_mim.data.masks import MaskedImages
from hf_mim.data.splits import generator, random_split
from hf_mim.evaluation.features import LARGEST_TABLE
from hf_mim.evaluation.metrics import class_iou, confusion_matrix, mean_iou
from hf_mim.evaluation.probe_training import check_probe_options, describe_choice, fetch, mean_and_scale, parse_features
from hf_mim.evaluation.result import Result
from hf_mim.trainer_utils import learning_rate

MAX_CLASSES = 2**15 - 1
IGNORED = -1  # stands for ignore_index in every mask that is read here

Grid = tuple[int, int]  # rows and columns of patches


def upsample(scores: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Scores of patches `[B, N, C]` → scores of pixels `[B, C, h, w]`, bilinear between the centres of the patches.

    This equals `F.interpolate(mode="bilinear")` up to rounding. But the gradient of `F.interpolate` on a GPU differs
    from run to run; that of the two matrix products here does not.
    """
    rows, columns = (
        F.interpolate(torch.eye(n, device=scores.device)[None], m, mode="linear")[0]
        for n, m in zip(grid, size, strict=True)
    )
    return rows.mT @ scores.mT.unflatten(2, grid) @ columns


def read_targets(
    data: MaskedImages, size: tuple[int, int], ignore_index: int | None, num_classes: int | None
) -> tuple[Tensor, int]:
    """(all masks, number of classes). Masks are int16 `[n, h, w]`, resized by nearest pixels; ignored pixels are -1.

    Raises:
        ValueError: in one line: a mask has an id outside 0..num_classes-1, or all masks together hold fewer than two
            classes.
    """
    targets, largest = torch.empty(len(data), *size, dtype=torch.int16), -1
    for index, ids in enumerate(read_class_ids(data, ignore_index)):
        highest = int(ids.max())
        if highest >= (num_classes or MAX_CLASSES):
            allowed = f"num_classes={num_classes}" if num_classes else f"at most {MAX_CLASSES} classes"
            raise ValueError(
                f"the mask of {data.image_name(index)} has the id {highest}, which {allowed} leaves out; "
                "if it stands for no class, set ignore_index to it"
            )
        largest = max(largest, highest)
        rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(ids.shape, size, strict=True))
        targets[index] = torch.from_numpy(ids[rows[:, None], columns].astype(np.int16))
    if largest < 1:
        found = "only the class 0" if largest == 0 else f"no pixel but those of ignore_index={ignore_index}"
        raise ValueError(f"the masks of {data.name} hold {found}; at least two classes are needed")
    return targets, num_classes or largest + 1


def read_class_ids(data: MaskedImages, ignore_index: int | None) -> Iterator[np.ndarray]:
    """Each mask as int64 `[h, w]`, -1 where it is `ignore_index`. Raises ValueError for other negative ids."""
    for index, mask in enumerate(data.read_masks()):
        counted = mask != ignore_index
        if (lowest := int(mask.min(where=counted, initial=0))) < 0:
            raise ValueError(f"the mask of {data.image_name(index)} has the id {lowest}; ids of classes start at 0")
        yield np.where(counted, mask.astype(np.int64), IGNORED)


def train_token_heads(
    tokens: Tensor,
    targets: Tensor,
    images: Tensor,
    grid: Grid,
    heads: Sequence[tuple[float, float]],
    num_classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> list[nn.Linear]:
    """Train one linear layer, from a token to scores of classes, for each (learning rate, weight decay) in `heads`.

    AdamW minimises the mean cross-entropy of the labelled pixels; the learning rates fall to zero by half a cosine.
    Tokens are standardised by the mean and variance of all tokens of the images. The layers that are returned include
    this step: they take tokens as they are.

    Args:
        tokens: `[n, N, D]`, in the CPU's memory or on its disk.
        targets: `[n, h, w]`, -1 for pixels that do not count.
        images: ids of the images to train on.
    """
    mean, scale = (x.to(device) for x in mean_and_scale(tokens, images, "of patches"))
    layers = [nn.Linear(len(mean), num_classes, device=device) for _ in heads]
    for layer in layers:
        nn.init.zeros_(layer.weight)  # the loss is convex, so any start leads to the same minimum
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(
        [{"params": layer.parameters(), "weight_decay": decay} for layer, (_, decay) in zip(layers, heads, strict=True)]
    )
    order, in_epoch, step = generator(seed, 1), -(-len(images) // batch_size), 0
    for _ in range(epochs):
        for batch in images[torch.randperm(len(images), generator=order)].tensor_split(in_epoch):
            for group, (rate, _) in zip(optimizer.param_groups, heads, strict=True):
                group["lr"] = learning_rate(step / (epochs * in_epoch), peak=rate)
            x, y = (fetch(tokens, batch, device) - mean) * scale, fetch(targets, batch, device)[:, None].long()
            counted = y != IGNORED
            optimizer.zero_grad()
            for layer in layers:  # one at a time, so that memory holds the scores of one head only
                likelihood = upsample(layer(x), grid, targets.shape[1:]).log_softmax(dim=1).gather(1, y.clamp(min=0))
                (-(likelihood * counted).sum() / counted.sum().clamp(min=1)).backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        for layer in layers:
            layer.weight *= scale
            layer.bias -= layer.weight @ mean
    return layers


@torch.no_grad()
def head_scores(
    layers: Sequence[nn.Linear], tokens: Tensor, targets: Tensor, images: Tensor, grid: Grid, batch_size: int
) -> list[float]:
    """The mean IoU of each layer on these images, over the pixels of the targets; see `train_token_heads`."""
    device, num_classes = layers[0].weight.device, layers[0].out_features
    confusions = [torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device) for _ in layers]
    for batch in images.split(batch_size):
        x, y = fetch(tokens, batch, device), fetch(targets, batch, device)
        for layer, confusion in zip(layers, confusions, strict=True):
            predicted = upsample(layer(x), grid, y.shape[1:]).max(dim=1).indices
            confusion += confusion_matrix(predicted, y, num_classes, ignore_index=IGNORED)
    return [mean_iou(confusion) for confusion in confusions]


def token_bank(
    tokens: Tensor, targets: Tensor, grid: Grid, num_classes: int, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The bank in which neighbours are searched: tokens as unit vectors `[m, D]`, and their shares of classes `[m, C]`.

    At most `size` training tokens, drawn from those that have a labelled pixel. Targets are `[n, rows·c, columns·c]`.
    """
    cells = targets.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)  # [n, rows, columns, c, c]
    cells = cells.reshape(grid[0] * grid[1] * len(targets), -1)
    labelled = (cells != IGNORED).any(dim=1).nonzero()[:, 0]
    drawn = labelled[torch.randperm(len(labelled), generator=generator(seed))[:size]].sort().values
    cells = cells[drawn].long()
    counts = torch.zeros(len(drawn), num_classes + 1)
    counts.scatter_add_(1, cells.where(cells != IGNORED, num_classes), torch.ones(cells.shape))
    shares = F.normalize(counts[:, :num_classes], p=1, dim=1)
    return F.normalize(tokens.flatten(0, 1).index_select(0, drawn), dim=1), shares


def neighbour_scores(bank: Tensor, shares: Tensor, tokens: Tensor, k: int, temperature: float) -> Tensor:
    """Tokens `[..., D]` → scores of classes `[..., C]`: the mean of the `shares [m, C]` of the k tokens of the bank
    `[m, D]` with the highest cosine similarity, weighted by exp(similarity / temperature)."""
    queries, scores = F.normalize(tokens.flatten(0, -2), dim=1), []
    for chunk in queries.split(max(1, LARGEST_TABLE // max(len(bank), k * shares.shape[1]))):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weights = (similarity / temperature).softmax(dim=1)
        scores.append(torch.einsum("qk,qkc->qc", weights, shares[nearest]))
    return torch.cat(scores).unflatten(0, tokens.shape[:-1])


@torch.no_grad()
def predict_masks(
    readers: dict[str, Callable[[Tensor], Tensor]],
    tokens: Tensor,
    grid: Grid,
    sizes: Sequence[tuple[int, int]],
    num_classes: int,
    device: torch.device,
) -> dict[str, list[np.ndarray]]:
    """Reader → maps `[h, w]` of the given sizes: the class of every pixel of each image.

    A reader turns tokens `[B, N, D]` into scores `[B, N, C]`. The maps lie in a temporary file; memory holds the scores
    of a few images.
    """
    areas = np.prod(sizes, axis=1)
    kind = np.uint8 if num_classes <= 256 else np.int16
    maps = {}
    for name in readers:
        with tempfile.TemporaryFile() as file:  # memmap keeps the file alive after it is closed
            flat = np.memmap(file, kind, "w+", shape=int(areas.sum()))
        parts = np.split(flat, areas.cumsum()[:-1])
        maps[name] = [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]
    for images in _batches_of_one_size(sizes, num_classes):
        x = fetch(tokens, torch.tensor(images), device)
        for name, reader in readers.items():
            classes = upsample(reader(x), grid, sizes[images[0]]).max(dim=1).indices.cpu().numpy()
            for index, predicted in zip(images, classes, strict=True):
                maps[name][index][:] = predicted
    return maps


def _batches_of_one_size(sizes: Sequence[tuple[int, int]], num_classes: int) -> Iterator[list[int]]:
    for (height, width), group in groupby(range(len(sizes)), key=lambda index: sizes[index]):
        images, step = list(group), max(1, LARGEST_TABLE // (4 * height * width * num_classes))
        yield from (images[start : start + step] for start in range(0, len(images), step))


def score_masks(
    maps: dict[str, list[np.ndarray]], data: MaskedImages, num_classes: int, ignore_index: int | None
) -> tuple[dict[str, Tensor], list[int]]:
    """(reader → confusion matrix `[C+1, C+1]`, ids that have no class). The last row counts the pixels of such ids."""
    confusions = {name: torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64) for name in maps}
    unknown: set[int] = set()
    for index, ids in enumerate(read_class_ids(data, ignore_index)):
        if (beyond := ids >= num_classes).any():
            unknown.update(np.unique(ids[beyond]).tolist())
            ids[beyond] = num_classes
        for name, confusion in confusions.items():
            confusion += confusion_matrix(maps[name][index], ids, num_classes + 1, ignore_index=IGNORED)
    return confusions, sorted(unknown)


@dataclass
class Segment:
    """Mean IoU of segmentation from frozen patch tokens: by a linear layer (the headline) and by nearest neighbours.

    The whole image is resized to the encoder's size. Test masks are scored at their own size; training masks are read
    at `cells` × `cells` pixels for each patch. All heads are trained together on a part of the training images. The
    mean IoU on the other part chooses one head, which is trained again on all images. Test masks are read last. Ids
    that only test masks have count as one more class: its IoU is 0, and a note names the ids.

    Sources: DINOv2 (arXiv 2304.07193, section 7.4) for the linear layer, arXiv 2306.01667 (section 3) for neighbours.

    Args:
        features: layer/tokens/norm
        ignore_index: id of pixels that do not count
        num_classes: default: the largest id of training masks + 1
        learning_rates, weight_decays: compared on held-out images
        epochs: passes over the training images
        batch_size: images of a step
        held_out: share of the training images that chooses the head
        cells: pixels of a training mask for each patch, along each side
        k: neighbours that vote
        temperature: a vote weighs exp(similarity / temperature)
        bank: the most training tokens among which neighbours are searched
        seed: of the held-out images, the order and the bank
    """

    name: ClassVar[str] = "segment"
    needs: ClassVar[str] = "masks"
    unused: ClassVar[tuple[str, ...]] = ("pixels",)  # pixels are no tokens

    features: str = "last/tokens/norm"
    ignore_index: int | None = 255
    num_classes: int | None = None
    learning_rates: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 1.0])
    weight_decays: list[float] = field(default_factory=lambda: [0.0, 0.01])
    epochs: int = 20
    batch_size: int = 16
    held_out: float = 0.1
    cells: int = 4
    k: int = 30
    temperature: float = 0.07
    bank: int = 100_000
    seed: int = 0

    def __post_init__(self):
        check_probe_options(self)
        parse_features(self.features, self.name, tokens=True)
        share(f"[2, {MAX_CLASSES}]", num_classes=self.num_classes)
        least(1, cells=self.cells)
        if not 1 <= self.k <= self.bank:
            raise ValueError(f"k must be between 1 and the {self.bank} tokens of the bank, not {self.k}")
        positive(temperature=self.temperature)

    def run(self, extract, train: MaskedImages, test: MaskedImages) -> Result:
        """Raises ValueError for fewer than two training images, and for ids that are no class."""
        if len(test) == 0:
            raise ValueError("test must have at least 1 image, not 0")
        if len(train) < 2:
            raise ValueError(f"train must have at least 2 images, one of them to choose the head, not {len(train)}")
        extract = extract.replace(crop=WholeImage())  # a mask covers the whole image
        grid, device = extract.encoder.grid, extract.encoder.device
        (tokens,) = extract(train, [self.features])
        size = grid[0] * self.cells, grid[1] * self.cells
        targets, num_classes = read_targets(train, size, self.ignore_index, self.num_classes)
        head, heads, notes = self._linear(tokens, targets, grid, num_classes, device, train.read_groups())
        bank, shares = token_bank(tokens, targets, grid, num_classes, self.bank, self.seed)
        if len(bank) < self.k:
            raise ValueError(f"k must be at most the {len(bank)} tokens of the training images, not {self.k}")
        bank, shares = bank.to(device), shares.to(device)
        readers = {"linear": head, "knn": lambda x: neighbour_scores(bank, shares, x, self.k, self.temperature)}
        (tokens,) = extract(test, [self.features])
        maps = predict_masks(readers, tokens, grid, test.sizes, num_classes, device)
        confusions, unknown = score_masks(maps, test, num_classes, self.ignore_index)
        scores, table = _summary(confusions)
        if unknown:
            notes.append(f"Ids of the test masks that no training mask has: {unknown}. Their IoU is 0.")
        about = {"image_size": extract.encoder.image_size, "crop": "the whole image, resized", "heads": heads}
        return Result(
            self.name,
            "linear mIoU",
            scores["linear mIoU"],
            settings=asdict(self) | {"num_classes": num_classes, "bank": len(bank)} | about,
            data={"train": train.describe(), "test": test.describe()},
            scores=scores,
            table=table,
            notes=notes,
        )

    def _linear(self, tokens, targets, grid, num_classes, device, groups) -> tuple[nn.Linear, list[dict], list[str]]:
        """(the head that held-out images choose, trained on all training images; a row for each head; notes)."""
        options = [(rate, decay) for rate in self.learning_rates for decay in self.weight_decays]
        kept, held = random_split(len(tokens), self.held_out, self.seed, 1, groups=groups)
        images = torch.cat([held, kept])
        shared = (num_classes, self.epochs, self.batch_size, self.seed, device)
        heads = train_token_heads(tokens, targets, kept, grid, options, *shared)
        ious = head_scores(heads, tokens, targets, held, grid, self.batch_size)
        best = int(np.argmax(ious))
        (head,) = train_token_heads(tokens, targets, images, grid, [options[best]], *shared)
        rows = [
            {"learning_rate": rate, "weight_decay": decay, "held_out_miou": iou}
            for (rate, decay), iou in zip(options, ious, strict=True)
        ]
        return head, rows, describe_choice(self.features, options, best, len(held))


def _summary(confusions: dict[str, Tensor]) -> tuple[dict[str, float], list[dict]]:
    """(the scores of each reader, a table: for each class that is predicted or there, its IoU by each reader)."""
    scores = {f"{name} mIoU": mean_iou(confusion) for name, confusion in confusions.items()}
    scores |= {f"{name} pixel accuracy": (c.trace() / c.sum()).item() for name, c in confusions.items()}
    ious = {name: class_iou(confusion).tolist() for name, confusion in confusions.items()}
    rows = []
    for number, values in enumerate(zip(*ious.values(), strict=True)):
        if not all(map(math.isnan, values)):  # NaN: neither predicted nor there
            values = [None if math.isnan(value) else value for value in values]
            label = "unknown" if number == len(ious["knn"]) - 1 else number
            rows.append({"class": label} | dict(zip(ious, values, strict=True)))
    return scores, rows
