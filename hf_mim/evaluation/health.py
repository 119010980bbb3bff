"""Are the features alive? Measures that need no labels, each with what it means and when to worry.

A pretraining loss can fall while the features collapse: onto one vector, onto a few directions, or onto the position of
the patch. Each measure here detects one of these. The field agrees on a threshold for hardly any of them. So compare
with the same encoder before training (the column `untrained`), and watch the trend in a run.

All numbers are computed in float64, in pieces of bounded memory, on the device of the features.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_mim.checks import least
from hf_mim.data import RandomCrop
from hf_mim.data.sources import fixed_sample
from hf_mim.data.splits import generator
from hf_mim.evaluation.probe_training import parse_features
from hf_mim.evaluation.result import Result
from hf_mim.evaluation.spectrum import ROUNDING, alpha_req, check_features, effective_rank, exact, lidar, rank_me

NUM_FOLDS = 5  # of the position read-out
RIDGE = 1e-3  # of the position read-out, for standardised tokens
DEAD = 0.01
_PIECE = 2**22  # numbers that are converted to float64 at once: 32 MB


def mean_cosine(features: Tensor) -> float:
    """The mean cosine between features `[n, D]` of two different images: 1 for a collapse onto one direction.

    It follows from the sum of the unit vectors u: |Σ u|² is the sum over all pairs, including n pairs of a vector with
    itself. Features that are zero count as equal to each other and orthogonal to the rest.
    """
    check_features(features, "[n, D]")
    units = _units(exact(features))
    count = len(units)
    return ((units.sum(0).square().sum() - count) / (count * (count - 1))).item()


def token_cosine(tokens: Tensor) -> float:
    """The mean cosine between two different tokens of one image, `[n, N, D]`: 1 where all tokens are the same."""
    check_features(tokens, "[n, N, D]")
    count = tokens.shape[1]
    total = sum(_units(piece).sum(1).square().sum() - len(piece) * count for piece in _pieces(tokens))
    return (total / (len(tokens) * count * (count - 1))).item()


def dimension_std(features: Tensor) -> tuple[float, float, float]:
    """(mean, smallest, share of dead ones) of the dimensions' standard deviations over images, features `[n, D]`.

    They are divided by the features' root mean square, so that the scale of the features has no effect. The mean is 1
    where all dimensions vary equally around zero, and 0 for a collapse onto one vector (Chen & He, CVPR 2021, figure
    2, plot nearly this). A dimension is dead below .01.
    """
    check_features(features, "[n, D]")
    rows = exact(features)
    size = rows.square().mean().sqrt()
    relative = rows.std(0) / size.clamp(min=torch.finfo(torch.float64).tiny)
    return tuple(torch.stack([relative.mean(), relative.min(), (relative < DEAD).double().mean()]).tolist())


def position_readout(tokens: Tensor, grid: tuple[int, int]) -> float:
    """R² with which a linear map tells the place of a patch from its token, for tokens `[n, N, D]` in raster order.

    A ridge regression from standardised tokens to (row, column) is fitted on four fifths of the images and tested on
    the fifth, for each fifth in turn. The result is the mean of the R² of rows and that of columns. 1: the tokens tell
    the place exactly; 0: no better than always saying the middle of the grid; below 0: there are too few tokens for
    the width, and the fit is noise.

    Raises:
        ValueError: also for a grid of another number of patches than tokens, or of one patch.
    """
    check_features(tokens, "[n, N, D]")
    if grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(f"grid must have the {tokens.shape[1]} patches of the tokens, not {grid}")
    places = _places(grid).to(exact(tokens[:1]).device)
    mean, scale = _standardization(tokens)
    folds = [tokens[number::NUM_FOLDS] for number in range(min(NUM_FOLDS, len(tokens)))]
    grams, products = [], []
    for fold in folds:
        gram, product = 0, 0
        for piece in _pieces(fold):
            rows = (piece - mean) * scale
            gram = gram + rows.flatten(0, 1).T @ rows.flatten(0, 1)
            product = product + rows.sum(0).T @ places
        grams.append(gram)
        products.append(product)
    error = 0
    for fold, gram, product in zip(folds, grams, products, strict=True):
        count = (len(tokens) - len(fold)) * tokens.shape[1]
        ridge = RIDGE * count * torch.eye(tokens.shape[2], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(sum(grams) - gram + ridge, sum(products) - product)
        # |y - Xw|² - |y|² of the fold that is left out, from the sums of that fold.
        error = error + (weights * (gram @ weights)).sum(0) - 2 * (weights * product).sum(0)
    return (-error / (len(tokens) * places.square().sum(0))).mean().item()


def position_share(tokens: Tensor) -> float:
    """The share of the variance of tokens `[n, N, D]` that the position alone explains, whatever the image.

    Two-way analysis of variance, token = mean + position + image + rest, with unbiased estimates of the three
    variances. 1 for pure position codes; 0 on average for tokens without any, so that a value may lie just below 0; 0
    where nothing varies.
    """
    check_features(tokens, "[n, N, D]")
    images, count, _ = tokens.shape
    start = exact(tokens[:1]).mean((0, 1))  # sums of squares lose fewer digits when a value near the mean is taken off
    places, total, by_image, size = 0, 0, 0, 0
    for piece in _pieces(tokens):
        size = size + piece.square().sum()
        piece = piece - start
        places = places + piece.sum(0)
        total = total + piece.square().sum()
        by_image = by_image + piece.sum(1).square().sum() / count
    common = places.sum(0).square().sum() / (images * count)
    by_place = places.square().sum() / images - common
    by_image, total = by_image - common, total - common
    rest = (total - by_place - by_image) / ((images - 1) * (count - 1))
    place = (by_place / (count - 1) - rest) / images
    image = (by_image / (images - 1) - rest) / count
    if total <= ROUNDING**2 * size:
        return 0.0
    return (place / (place + image + rest)).item()


def measure_health(pooled: Tensor, tokens: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """Name → value of every measure but LiDAR, for pooled features `[n, D]` and patch tokens `[m, N, D]`.

    Cheap enough to be called during training.
    """
    rank, (mean, least, dead) = rank_me(pooled), dimension_std(pooled)
    return {
        "rank_me": rank,
        "rank_me_share": rank / min(pooled.shape),
        "effective_rank": effective_rank(pooled),
        "alpha_req": alpha_req(pooled),
        "mean_cosine": mean_cosine(pooled),
        "token_cosine": token_cosine(tokens),
        "std_mean": mean,
        "std_min": least,
        "dead_dimensions": dead,
        "position_readout": position_readout(tokens, grid),
        "position_share": position_share(tokens),
    }


@dataclass(frozen=True)
class Measure:
    """How to read a measure. Beyond `limit` (`below` it, or above it) there is a reason to worry. A measure without a
    limit is only good for comparing."""

    name: str
    meaning: str
    limit: float | None = None
    below: bool = False

    def worry(self, value: float) -> str:
        if self.limit is None:
            return "compare"
        return "yes" if (value < self.limit if self.below else value > self.limit) else "no"


# This project chose the limits, the field has none: past a limit, little is left of what the measure looks for.
MEASURES = (
    Measure("rank_me", "directions that pooled features fill, up to min(images, width)"),
    Measure("rank_me_share", "the same as a share of that; below 0.1 few directions are left", 0.1, below=True),
    Measure(
        "effective_rank", "directions that hold their variance; below 2 one direction is nearly all", 2, below=True
    ),
    Measure("alpha_req", "slope of the fall of its variances; near 1 is best, above it few directions hold it"),
    Measure("lidar", "directions in which images differ more than crops of one image, up to min(images - 1, width)"),
    Measure("mean_cosine", "between pooled features of two images; above 0.99 all images look alike", 0.99),
    Measure("token_cosine", "between two tokens of one image; above 0.99 they all say the same", 0.99),
    Measure("std_mean", "spread of a dimension over images; 1: around zero, below 0.1: all alike", 0.1, below=True),
    Measure("std_min", "the same of the dimension that varies least"),
    Measure("dead_dimensions", "share of dimensions with a spread below 0.01; above 0.5 most are idle", 0.5),
    Measure("position_readout", "R² of a linear map from a patch's token to its place; high is usual"),
    Measure("position_share", "of a token's variance, what its place alone explains; above 0.9 nearly all", 0.9),
)
ON_THE_LIMITS = (
    "The limits are wide, and the field has agreed on none: compare with the same encoder untrained and with earlier "
    "checkpoints, on the same images."
)


@dataclass
class Health:
    """RankMe and other measures of collapse, without labels.

    They are measured on the pooled features of `num_images` images, and on the patch tokens of the same layer for the
    first `num_token_images` of these. LiDAR is measured on `views` random crops (a fifth to all of the image's area) of
    the first `num_view_images`. The headline is RankMe. `compare` also measures the same encoder with fresh
    weights: most measures have no accepted limits, and a number that was worse before training is no reason to worry.

    Sources: Garrido et al., ICML 2023 (arXiv 2210.02885) for RankMe; Thilak et al., ICLR 2024 (arXiv 2312.04000) for
    LiDAR; Agrawal et al., NeurIPS 2022 for α-ReQ.

    Args:
        features: layer/pooling/norm of the pooled features
        num_images: images, drawn at random; all if there are fewer
        num_token_images: how many of these give their patch tokens too
        num_view_images: how many of these are seen in several random crops, for LiDAR
        views: crops of each of these images
        compare: measure the same encoder with fresh weights too
        seed: for the choice of images and for the fresh weights
    """

    name: ClassVar[str] = "health"
    needs: ClassVar[str] = "images"
    unused: ClassVar[tuple[str, ...]] = ("pixels",)  # it judges an encoder

    features: str = "last/mean/norm"
    num_images: int = 2048
    num_token_images: int = 256
    num_view_images: int = 256
    views: int = 8
    compare: bool = True
    seed: int = 0

    def __post_init__(self):
        parse_features(self.features, self.name)
        least(2, num_images=self.num_images, num_token_images=self.num_token_images)
        least(2, num_view_images=self.num_view_images, views=self.views)
        least(0, seed=self.seed)

    def run(self, extract, images) -> Result:
        """Raises ValueError for fewer than 2 images."""
        if len(images) < 2:
            raise ValueError(f"images must be at least 2 to be compared, not {len(images)}")
        pooled_images = fixed_sample(images, self.num_images, random=generator(self.seed))
        token_images = pooled_images.select(range(min(self.num_token_images, len(pooled_images))))
        values = self._measure(extract, pooled_images, token_images)
        columns = {"value": values}
        if self.compare:
            untrained = extract.replace(encoder=extract.encoder.untrained(self.seed))
            columns["untrained"] = self._measure(untrained, pooled_images, token_images)
        table = [
            {"measure": measure.name}
            | {column: found[measure.name] for column, found in columns.items()}
            | {"worry": measure.worry(values[measure.name]), "meaning": measure.meaning}
            for measure in MEASURES
        ]
        worries = [row["measure"] for row in table if row["worry"] == "yes"]
        return Result(
            self.name,
            "RankMe",
            values["rank_me"],
            settings=asdict(self),
            data=pooled_images.describe() | {"token_images": len(token_images)},
            table=table,
            notes=[f"Worry: {', '.join(worries)}." if worries else "No measure is past its limit.", ON_THE_LIMITS],
        )

    def _measure(self, extract, pooled_images, token_images) -> dict[str, float]:
        spec = parse_features(self.features, self.name)
        (pooled,), (tokens,) = extract(pooled_images, [spec]), extract(token_images, [replace(spec, pooling="tokens")])
        values = measure_health(pooled, tokens, extract.encoder.grid)
        return values | {"lidar": self._lidar(extract, pooled_images, spec)}

    def _lidar(self, extract, images, spec) -> float:
        number = min(self.num_view_images, len(images))
        # A row of the images decides its crop, so that the same image in several rows is seen in several crops.
        repeated = images.select([index for index in range(number) for _ in range(self.views)])
        (features,) = extract.replace(crop=RandomCrop())(repeated, [spec])
        return lidar(features.unflatten(0, (number, self.views)))


def _pieces(tokens: Tensor) -> Iterator[Tensor]:
    """A few images at a time, in float64."""
    return map(exact, tokens.split(max(1, _PIECE // tokens[0].numel())))


def _units(rows: Tensor) -> Tensor:
    """Unit vectors `[..., D + 1]`; a zero vector points along the extra dimension."""
    lengths = rows.norm(dim=-1, keepdim=True)
    zero = lengths == 0
    return torch.cat([rows / lengths.masked_fill(zero, 1), zero.to(rows)], dim=-1)


def _places(grid: tuple[int, int]) -> Tensor:
    """The row and the column of each patch `[N, 2]`, centred. A side of length 1 tells nothing and is left out."""
    rows, columns = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in grid)
    places = torch.stack([rows.repeat_interleave(grid[1]), columns.repeat(grid[0])], dim=1)
    return places[:, [side > 1 for side in grid]]


def _standardization(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and 1 / standard deviation `[D]` over all tokens; 0 for a dimension that varies by rounding alone."""
    count = tokens.shape[0] * tokens.shape[1]
    mean = sum(piece.sum((0, 1)) for piece in _pieces(tokens)) / count
    deviation = (sum((piece - mean).square().sum((0, 1)) for piece in _pieces(tokens)) / count).sqrt()
    rounding = ROUNDING * (deviation.square() + mean.square()).mean().sqrt()
    return mean, torch.where(deviation > rounding, 1 / deviation, 0)
