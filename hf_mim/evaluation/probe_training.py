"""What linear and attentive probes share: many are trained together, held-out images choose, the test comes last."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from hf_mim.checks import least, numbers, share
from hf_mim.data.labelled import LabelledImages
from hf_mim.data.splits import check_labels, generator, stratified_split
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.result import Result
from hf_mim.progress import progress_bar
from hf_mim.trainer_utils import learning_rate

LARGEST_PIECE = 2**24  # numbers of one temporary table: 64 MB
SearchGrid = Sequence[tuple[float, float]]  # (learning rate for a batch of 256, weight decay) of each probe


class Probes(ABC):
    """H classifiers on one kind of features, each with its own learning rate and weight decay.

    Args:
        mean, scale: `[D]`, standardise the features; from `mean_and_scale`.
        grid: (learning rate, weight decay) of each classifier.
        device: where the classifiers compute.
    """

    row_size: int  # a subclass says how many numbers the largest table of `logits` holds for one image

    def __init__(self, mean: Tensor, scale: Tensor, grid: SearchGrid, device: torch.device):
        self.device, self.mean, self.scale = device, mean.to(device), scale.to(device)
        self.learning_rates, self.weight_decays = torch.tensor(grid, dtype=torch.float32, device=device).T  # [H] each

    def standardise(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale

    @abstractmethod
    def logits(self, standardised: Tensor) -> Tensor:
        """Standardised features of B images → `[B, H, C]`."""

    @abstractmethod
    def step(self, features: Tensor, labels: Tensor, rate: float):
        """One optimizer step on a batch. Each classifier's own learning rate is multiplied by `rate`."""

    @torch.no_grad()
    def predict(self, features: Tensor, ids: Tensor, k: int = 1) -> Tensor:
        """The k likeliest classes `[n, H, k]` for the rows `ids` of `features`, likeliest first, on the CPU."""
        found = []
        for piece in pieces(ids, max(features[0].numel(), self.row_size)):
            standardised = self.standardise(fetch(features, piece, self.device))
            found.append(self.logits(standardised).topk(k, dim=-1).indices)
        return torch.cat(found).cpu()


def fetch(features: Tensor, ids: Tensor, device: torch.device) -> Tensor:
    """Copy rows of features from the CPU's memory or disk to the device, without waiting for the device's work."""
    is_cuda = device.type == "cuda"
    rows = torch.empty(len(ids), *features.shape[1:], dtype=features.dtype, pin_memory=is_cuda)
    return torch.index_select(features, 0, ids, out=rows).to(device, non_blocking=is_cuda)


def pieces(ids: Tensor, row_size: int) -> Sequence[Tensor]:
    """`ids` in order, in pieces: a table of `row_size` numbers for each id of a piece has a bounded size."""
    return ids.split(max(1, LARGEST_PIECE // row_size))


def mean_and_scale(features: Tensor, ids: Tensor, name: str, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean [D] and `1 / sqrt(variance + eps)` [D] of features over the images `ids`, on the CPU: to standardise them.

    Features are `[n, D]`, or tokens `[n, N, D]`, whose statistics are over all tokens of all images. This replaces the
    BatchNorm without affine that papers put before a probe (MAE, arXiv 2111.06377, appendix A.1; eps 1e-6). BatchNorm
    estimates mean and variance over the training images, by the batch in training and by a running average at test.
    Frozen features never change, so here both are computed once, exactly, and used in training and test.

    Raises:
        ValueError: a feature is not finite.
    """
    total, squares, count = 0.0, 0.0, 0
    for piece in pieces(ids, 2 * features[0].numel()):
        rows = features.index_select(0, piece).flatten(0, -2).double()
        total, squares, count = total + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
    mean = total / count
    if not mean.isfinite().all():
        raise ValueError(f"the features {name} hold numbers that are not finite: the checkpoint is broken")
    scale = ((squares / count - mean.square()).clamp(min=0) + eps).rsqrt()
    return mean.float(), scale.float()


def standardiser(train: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """A function that standardises features `[n, D]` by the statistics of `train`, and divides them by √D.

    It is for logistic regression: thanks to √D, one C means the same for any width. Raises as `mean_and_scale`.
    """
    mean, scale = mean_and_scale(train, torch.arange(len(train)), name)
    scale = scale / len(scale) ** 0.5
    return lambda features: (features - mean) * scale


def train_together(
    probes: Sequence[Probes],
    features: Sequence[Tensor],
    labels: Tensor,
    ids: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
    warmup: float = 0.0,
    progress: bool = False,
):
    """Train the probes of all `features` on the same batches of the rows `ids`; one pass over the features an epoch.

    Learning rates are multiplied by batch size / 256, as MAE's. They rise during the share `warmup` of the steps, then
    fall to zero by half a cosine. The batches of an epoch have nearly the same size, so that no step depends on a few
    images. `progress` shows a bar.
    """
    order = generator(seed, 1)  # generator(seed) draws the split: its order would put the held-out images first
    batch_size = min(batch_size, len(ids))
    in_epoch = -(-len(ids) // batch_size)
    orders = (ids[torch.randperm(len(ids), generator=order)] for _ in range(epochs))
    batches = (batch for epoch in orders for batch in epoch.tensor_split(in_epoch))
    with progress_bar(progress, "probes", epochs * in_epoch, " steps", batches) as bar:
        for step, batch in enumerate(bar):
            rate = learning_rate(step / (epochs * in_epoch), peak=batch_size / 256, warmup=warmup)
            y = fetch(labels, batch, probes[0].device)
            for x, probe in zip(features, probes, strict=True):
                probe.step(fetch(x, batch, probe.device), y, rate)


def choose_and_test(
    protocol,
    fit: Callable[[Sequence[Tensor], Tensor, Tensor, Sequence[SearchGrid], int], Sequence[Probes]],
    extract: FeatureExtractor,
    train: LabelledImages,
    test: LabelledImages,
    specs: Sequence[FeatureSpec],
    **settings,
) -> Result:
    """Choose the best probe on each kind of features, and measure its accuracy on the test images.

    Every probe of the grid is fitted on a part of the training images. The accuracy on the held-out part chooses the
    best probe on each kind of features, and among these the one that gives the value; of equal ones, the first in the
    grid. The chosen probes are fitted again on all training images, as a paper's probe is. Only they are tested. Test
    labels are read last.

    Args:
        protocol: `Linear` or `Attentive`; it has the grid, the share held out and the seed.
        fit: (features, labels, ids, a grid for each kind of features, number of classes) → probes for each kind.
        settings: go to the result, beside the protocol's fields.
    """
    check_labels(train.read_labels())
    features, labels = extract(train, specs), train.read_labels()  # extract has left out images that it cannot decode
    num_classes, everything = int(labels.max()) + 1, torch.arange(len(labels))
    kept, held = stratified_split(labels, protocol.held_out, protocol.seed, train.read_groups())
    grid = [(rate, decay) for rate in protocol.learning_rates for decay in protocol.weight_decays]
    probes = fit(features, labels, kept, [grid] * len(specs), num_classes)
    found = torch.stack([probe.predict(x, held)[..., 0] for probe, x in zip(probes, features, strict=True)])
    accuracy = (found == labels[held, None]).double().mean(dim=1)  # [specs, H]
    best = accuracy.argmax(dim=1).tolist()
    chosen = int(accuracy.amax(dim=1).argmax())
    probes = fit(features, labels, everything, [[grid[i]] for i in best], num_classes)

    features = extract(test, specs)
    k = min(5, num_classes)
    found = [p.predict(x, torch.arange(len(x)), k)[:, 0] for p, x in zip(probes, features, strict=True)]
    test_labels = test.read_labels()
    hits = [(classes == test_labels[:, None]).double() for classes in found]  # [n, k]
    top1 = [hit[:, 0].mean().item() for hit in hits]
    top5 = {"top5": hits[chosen].sum(dim=1).mean().item()} if num_classes > 5 else {}
    table = [
        {"features": str(spec), "learning_rate": rate, "weight_decay": decay, "held_out": accuracy[s, h].item()}
        | {"test": top1[s] if h == best[s] else None}
        for s, spec in enumerate(specs)
        for h, (rate, decay) in enumerate(grid)
    ]
    result = Result(
        protocol=protocol.name,
        metric="accuracy",
        value=top1[chosen],
        settings=asdict(protocol) | settings,
        data={"train": train.describe(), "test": test.describe()},
        scores={f"top1 {spec}": value for spec, value in zip(specs, top1, strict=True)} | top5,
        table=table,
        notes=describe_choice(str(specs[chosen]), grid, best[chosen], len(held)),
    )
    result.predicted = found[chosen][:, 0]
    return result


def describe_choice(features: str, grid: SearchGrid, best: int, held_out: int) -> list[str]:
    """Notes: which probe was chosen, and whether the grid was wide enough."""
    (rate, decay), rates = grid[best], sorted({rate for rate, _ in grid})
    notes = [f"Chosen on {held_out} held-out images: {features}, learning rate {rate:g}, weight decay {decay:g}."]
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        notes.append(f"The learning rate {rate:g} is at the end of those compared: one beyond may be better.")
    return notes


def check_probe_options(options):
    """Raise ValueError, in one line, for an option of a probe that is out of range."""
    numbers(learning_rates=options.learning_rates)
    numbers(or_zero=True, weight_decays=options.weight_decays)
    least(1, epochs=options.epochs, batch_size=options.batch_size)
    least(0, seed=options.seed)
    share("(0, 1)", held_out=options.held_out)


def parse_features(text: str, protocol: str, tokens: bool = False) -> FeatureSpec:
    """The features that a protocol needs: pooled to one vector an image, or tokens. Raises ValueError for others."""
    spec = FeatureSpec.parse(text)
    if (spec.pooling == "tokens") != tokens:
        wanted = "tokens, such as last/tokens/norm" if tokens else "pooled, mean or cls"
        raise ValueError(f"features of {protocol} must be {wanted}, not {text}")
    return spec
