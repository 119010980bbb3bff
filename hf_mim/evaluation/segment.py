"""Semantic segmentation by frozen patch tokens: what lies where, read without training the encoder.

Two readers of the same tokens: a linear layer on each token (DINOv2, arXiv 2304.07193, section 7.4), and nearest
neighbours among the tokens of the training images, whose classes are known (Balažević et al., arXiv 2306.01667, section
3). Both score classes on the grid of patches; the scores are interpolated to the pixels of the mask.
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
from hf_mim.data.splits import generator
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import LARGEST_TABLE
from hf_mim.evaluation.metrics import class_iou, confusion_matrix, mean_iou
from hf_mim.evaluation.probe_training import check_probe_options, describe_choice, fetch, mean_and_scale
from hf_mim.evaluation.result import Result
from hf_mim.trainer_utils import learning_rate

MAX_CLASSES = 2**15 - 1
IGNORED = -1  # in what is read here, whatever ignore_index is in the files

Grid = tuple[int, int]  # rows and columns of patches


def upsample(scores: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Scores of patches `[B, N, C]` → of pixels `[B, C, h, w]`, bilinear between the centres of the patches.

    The same as `F.interpolate(mode="bilinear")` to rounding, by two matrix products: their gradient is the same in two
    runs on a GPU, where that of `F.interpolate` is not.
    """
    rows, columns = (
        F.interpolate(torch.eye(n, device=scores.device)[None], m, mode="linear")[0]
        for n, m in zip(grid, size, strict=True)
    )
    return rows.mT @ scores.mT.unflatten(2, grid) @ columns


def read_targets(
    data: MaskedImages, size: tuple[int, int], ignore_index: int | None, num_classes: int | None
) -> tuple[Tensor, int]:
    """All masks, brought to one size by their nearest pixels: int16 `[n, h, w]`, ignored pixels -1; number of classes.

    Raises:
        ValueError: one line that names the mask: an id that is not in 0..num_classes-1; or that none has two classes.
    """
    targets, largest = torch.empty(len(data), *size, dtype=torch.int16), -1
    for index, mask in enumerate(data.read_masks()):
        ids = class_ids(mask, ignore_index, f"the mask of {data.image_name(index)}")
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


def class_ids(mask: np.ndarray, ignore_index: int | None, name: str) -> np.ndarray:
    """A mask as int64, -1 where it is `ignore_index`. Raises ValueError for other negative ids."""
    counted = mask != ignore_index
    if (lowest := int(mask.min(where=counted, initial=0))) < 0:
        raise ValueError(f"{name} has the id {lowest}; ids of classes start at 0")
    return np.where(counted, mask.astype(np.int64), IGNORED)


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
    """A linear layer from a token to scores of classes for each (learning rate, weight decay), trained together.

    AdamW on the mean cross-entropy of labelled pixels, the rates falling to zero by half a cosine. Tokens are
    standardised by the mean and variance of all tokens of the images; the layers that are returned have that built in.

    Args:
        tokens: `[n, N, D]`, in the CPU's memory or on its disk.
        targets: `[n, h, w]`, -1 where a pixel does not count.
        images: which of the n to train on.
    """
    mean, scale = (x.to(device) for x in mean_and_scale(tokens, images, "of patches"))
    layers = [nn.Linear(len(mean), num_classes, device=device) for _ in heads]
    for layer in layers:
        nn.init.zeros_(layer.weight)  # the loss is convex: there is no start to choose
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
            for layer in layers:  # one at a time: only one head's scores of pixels are held
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
    """The mean IoU of each of the layers on these images, by pixels of the targets; see `train_token_heads`."""
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
    """Training tokens to look neighbours up in: unit vectors `[m, D]`, and the share `[m, C]` of each class there.

    At most `size` tokens, drawn from those that have a labelled pixel. Targets are `[n, rows·c, columns·c]`.
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
    """Scores of classes `[..., C]` of tokens `[..., D]`: the mean of the `shares [m, C]` of the k nearest of the bank
    `[m, D]` by cosine similarity, weighted by exp(similarity / temperature)."""
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
    """The class of every pixel by each reader of tokens (`[B, N, D]` → scores `[B, N, C]`): maps `[h, w]` of `sizes`.

    The maps lie in a temporary file, the scores of few images in memory.
    """
    areas = np.array([height * width for height, width in sizes])
    kind = np.uint8 if num_classes <= 256 else np.int16
    maps = {}
    for name in readers:
        with tempfile.TemporaryFile() as file:  # the mapping holds it until its last reader is gone
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
    """Of each reader the confusion `[C+1, C+1]`, and which ids have no class: their pixels are the last row. Reads the
    masks."""
    confusions = {name: torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64) for name in maps}
    unknown: set[int] = set()
    for index, mask in enumerate(data.read_masks()):
        ids = class_ids(mask, ignore_index, f"the mask of {data.image_name(index)}")
        if (beyond := ids >= num_classes).any():
            unknown.update(np.unique(ids[beyond]).tolist())
            ids[beyond] = num_classes
        for name, confusion in confusions.items():
            confusion += confusion_matrix(maps[name][index], ids, num_classes + 1, ignore_index=IGNORED)
    return confusions, sorted(unknown)


@dataclass
class Segment:
    """Mean IoU of segmentation by frozen patch tokens: by a linear layer (the headline) and by nearest neighbours.

    The whole image is resized to the encoder's size. Test masks are scored at their own size; training masks are read
    at `cells` × `cells` pixels for each patch. Heads are trained together on a part of the training images; the mean
    IoU on the others chooses one, which is trained again on all. Test masks are read last. Ids that only test masks
    have were never taught: together they are one more class, whose IoU is 0, and a note names them.

    Source: the linear layer DINOv2 (arXiv 2304.07193, section 7.4), the neighbours arXiv 2306.01667, section 3.

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
        temperature: of the votes' weights
        bank: training tokens that neighbours are looked up in, at most
        seed: of the held-out images, the order and the bank
    """

    name: ClassVar[str] = "segment"
    needs: ClassVar[str] = "masks"

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
        if FeatureSpec.parse(self.features).pooling != "tokens":
            raise ValueError(f"features of segment must be tokens, such as last/tokens/norm, not {self.features}")
        share(f"[2, {MAX_CLASSES}]", num_classes=self.num_classes)
        least(1, cells=self.cells)
        if not 1 <= self.k <= self.bank:
            raise ValueError(f"k must be between 1 and the {self.bank} tokens of the bank, not {self.k}")
        positive(temperature=self.temperature)

    def run(self, extract, train: MaskedImages, test: MaskedImages) -> Result:
        """Raises ValueError for fewer than two training images, or ids that are no class."""
        if len(test) == 0:
            raise ValueError("test must have at least 1 image, not 0")
        if len(train) < 2:
            raise ValueError(f"train must have at least 2 images, one of them to choose the head, not {len(train)}")
        extract = extract.replace(crop=WholeImage())  # a mask is of all that the image shows
        grid, device = extract.encoder.grid, extract.encoder.device
        (tokens,) = extract(train, [self.features])
        targets, num_classes = read_targets(
            train, (grid[0] * self.cells, grid[1] * self.cells), self.ignore_index, self.num_classes
        )
        head, choice = self._linear(tokens, targets, grid, num_classes, device)
        bank, shares = token_bank(tokens, targets, grid, num_classes, self.bank, self.seed)
        if len(bank) < self.k:
            raise ValueError(f"k must be at most the {len(bank)} tokens of the training images, not {self.k}")
        bank, shares = bank.to(device), shares.to(device)
        readers = {"linear": head, "knn": lambda x: neighbour_scores(bank, shares, x, self.k, self.temperature)}
        (tokens,) = extract(test, [self.features])
        maps = predict_masks(readers, tokens, grid, test.sizes, num_classes, device)
        confusions, unknown = score_masks(maps, test, num_classes, self.ignore_index)
        scores, table = _summary(confusions)
        notes = [f"Ids of the test masks that no training mask has: {unknown}. Their IoU is 0."] if unknown else []
        settings = asdict(self) | {
            "num_classes": num_classes,
            "image_size": extract.encoder.image_size,
            "crop": "the whole image, resized",
            "bank": len(bank),
            "heads": choice.pop("heads"),
        }
        return Result(
            self.name,
            "linear mIoU",
            scores["linear mIoU"],
            settings=settings,
            data={"train": train.describe(), "test": test.describe()},
            scores=scores,
            table=table,
            notes=choice.pop("notes") + notes,
        )

    def _linear(self, tokens, targets, grid, num_classes, device) -> tuple[nn.Linear, dict]:
        """The head that held-out images choose, trained on all training images; and how it was chosen."""
        options = [(rate, decay) for rate in self.learning_rates for decay in self.weight_decays]
        images = torch.randperm(len(tokens), generator=generator(self.seed, 1))
        count = min(max(round(self.held_out * len(tokens)), 1), len(tokens) - 1)
        held, kept = images[:count], images[count:]
        shared = (num_classes, self.epochs, self.batch_size, self.seed, device)
        heads = train_token_heads(tokens, targets, kept, grid, options, *shared)
        ious = head_scores(heads, tokens, targets, held, grid, self.batch_size)
        best = int(np.argmax(ious))
        (head,) = train_token_heads(tokens, targets, images, grid, [options[best]], *shared)
        rows = [
            {"learning_rate": rate, "weight_decay": decay, "held_out_miou": iou}
            for (rate, decay), iou in zip(options, ious, strict=True)
        ]
        return head, {"heads": rows, "notes": describe_choice(self.features, options, best, count)}


def _summary(confusions: dict[str, Tensor]) -> tuple[dict[str, float], list[dict]]:
    """Scores of each reader, and a row with their IoUs for each class that is predicted or there."""
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
