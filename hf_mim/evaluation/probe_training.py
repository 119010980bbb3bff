"""What linear and attentive probes share: many are trained together, held-out images choose, the test comes last."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_mim.checks import least, numbers, share
from hf_mim.data.labelled import LabelledImages
from hf_mim.data.splits import check_labels, generator, stratified_split
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.result import Result
from hf_mim.trainer_utils import learning_rate

LARGEST_PIECE = 2**24  # numbers of one temporary table: 64 MB
SearchGrid = Sequence[tuple[float, float]]  # (learning rate for a batch of 256, weight decay) of each probe


class Probes(Protocol):
    """H classifiers on one kind of features, each with its own learning rate and weight decay."""

    device: torch.device

    def step(self, features: Tensor, labels: Tensor, rate: float):
        """One optimizer step on a batch, at `rate` times each one's learning rate."""

    def predict(self, features: Tensor, ids: Tensor, k: int = 1) -> Tensor:
        """The k likeliest classes `[n, H, k]` of the rows `ids` of `features`, likeliest first, on the CPU."""


def fetch(features: Tensor, ids: Tensor, device: torch.device) -> Tensor:
    """Rows of features in the CPU's memory or on its disk, on the device; does not wait for the device's other work."""
    is_cuda = device.type == "cuda"
    rows = torch.empty(len(ids), *features.shape[1:], dtype=features.dtype, pin_memory=is_cuda)
    return torch.index_select(features, 0, ids, out=rows).to(device, non_blocking=is_cuda)


def pieces(ids: Tensor, row_size: int) -> Iterator[Tensor]:
    """`ids` in order, in pieces that make tables of bounded size, `row_size` numbers a row."""
    return iter(ids.split(max(1, LARGEST_PIECE // row_size)))


def mean_and_scale(features: Tensor, ids: Tensor, name: str, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What standardises each dimension over the images `ids`: mean [D] and `1 / sqrt(variance + eps)` [D], on the CPU.

    Features `[n, D]` or `[n, N, D]`; of tokens, over all tokens. It stands for the BatchNorm without affine that papers
    put before a probe (MAE, arXiv 2111.06377, appendix A.1; eps 1e-6). BatchNorm standardises by the statistics of a
    batch in training and by their running average at test; both estimate the mean and variance over the training
    images. Of frozen features these never change, so they are computed once, exactly, and hold for training and test.

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
    """What standardises features `[n, D]` by the statistics of `train` and divides by √D: for logistic regression.

    So one C means the same for any width. Raises as `mean_and_scale`.
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

    Learning rates are multiplied by batch size / 256, as MAE's, and fall to zero by half a cosine after `warmup`, a
    share of the steps. The batches of an epoch are of about one size, so that no step rests on a few images.
    `progress` shows a bar.
    """
    order = generator(seed, 1)  # the split's own stream would put the held-out images first
    batch_size = min(batch_size, len(ids))
    in_epoch = -(-len(ids) // batch_size)
    orders = (ids[torch.randperm(len(ids), generator=order)] for _ in range(epochs))
    batches = (batch for epoch in orders for batch in epoch.tensor_split(in_epoch))
    bar = tqdm(batches, "probes", epochs * in_epoch, leave=False, unit=" steps", disable=not progress)
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
    """The best probe on each kind of features, and its accuracy on the test images.

    Every probe of the grid is fitted on a part of the training images, and its accuracy on the held-out part chooses:
    on each kind of features the best probe, and the best of these for the value. Those that are chosen are fitted again
    on all training images, as a paper's probe is, and are the only ones that meet the test images. Of equal ones the
    first in the order of the grid is taken. Test labels are read last.

    Args:
        protocol: `Linear` or `Attentive`: the grid, the share held out and the seed.
        fit: (features, labels, ids, a grid for each of the features, number of classes) → probes for each of them.
        settings: for the result, beside the protocol's fields.
    """
    check_labels(train.read_labels())
    features, labels = extract(train, specs), train.read_labels()  # now without images that cannot be decoded
    num_classes, everything = int(labels.max()) + 1, torch.arange(len(labels))
    kept, held = stratified_split(labels, protocol.held_out, protocol.seed)
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
    return Result(
        protocol=protocol.name,
        metric="accuracy",
        value=top1[chosen],
        settings=asdict(protocol) | settings,
        data={"train": train.describe(), "test": test.describe()},
        scores={f"top1 {spec}": value for spec, value in zip(specs, top1, strict=True)} | top5,
        table=table,
        notes=describe_choice(str(specs[chosen]), grid, best[chosen], len(held)),
    )


def describe_choice(features: str, grid: SearchGrid, best: int, held_out: int) -> list[str]:
    """Which probe was chosen, and whether the grid was wide enough for it."""
    (rate, decay), rates = grid[best], sorted({rate for rate, _ in grid})
    notes = [f"Chosen on {held_out} held-out images: {features}, learning rate {rate:g}, weight decay {decay:g}."]
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        notes.append(f"The learning rate {rate:g} is at the end of those compared: one beyond may be better.")
    return notes


def check_probe_options(options):
    """Raise ValueError, in one line, for a learning rate, weight decay, … that no probe can have."""
    numbers(learning_rates=options.learning_rates)
    numbers(or_zero=True, weight_decays=options.weight_decays)
    least(1, epochs=options.epochs, batch_size=options.batch_size)
    least(0, seed=options.seed)
    share("(0, 1)", held_out=options.held_out)


def parse_pooled(text: str, protocol: str) -> FeatureSpec:
    """Features of one vector an image. Raises ValueError for tokens, and for what are no features."""
    spec = FeatureSpec.parse(text)
    if spec.pooling == "tokens":
        raise ValueError(f"features of {protocol} must be pooled, mean or cls, not {text}")
    return spec
