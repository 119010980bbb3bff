"""How many directions features fill, by the eigenvalues of their matrices. All numbers are computed in float64."""

import torch
from torch import Tensor

# Variation below this share of the features' size is the rounding of float32; such features are constant.
ROUNDING = 1e-6
RANK_ME_EPSILON = 1e-7  # RankMe's ε, for float32 features
LIDAR_DELTA = 1e-4  # LiDAR's δ


def rank_me(features: Tensor) -> float:
    """How many directions features `[n, D]` fill, 1..min(n, D): RankMe (Garrido et al., ICML 2023, arXiv 2210.02885).

    It is exp(-Σ p log p), where p are the singular values of the features as shares of their sum, plus 1e-7. The
    features are *not* centred: a mean that all images share counts as one direction. Published values take 25,600
    images; below a few times D images, the number of images limits the value. Use it to compare encoders of one
    architecture on the same images.

    Raises (as all measures here):
        ValueError: fewer than 2 images, another shape, or numbers that are not finite.
    """
    check_features(features, "[n, D]")
    squares = _eigenvalues(exact(features))
    return _exp_entropy(squares.sqrt(), RANK_ME_EPSILON)


def effective_rank(features: Tensor) -> float:
    """How many directions hold the variance of features `[n, D]`: exp(entropy of the eigenvalues of the covariance).

    This is Roy & Vetterli's effective rank (EUSIPCO 2007) of the covariance matrix. RankMe is the same for the feature
    matrix: it includes the common mean, and weighs directions by standard deviation instead of variance. So this
    number is smaller, and falls first when a few directions take over. 1 where nothing varies.
    """
    check_features(features, "[n, D]")
    rows = exact(features)
    squares = _eigenvalues(rows - rows.mean(0))
    return _exp_entropy(squares * (squares > ROUNDING**2 * rows.square().sum()))


def lidar(views: Tensor) -> float:
    """In how many directions images differ more than views of one image do, for features `[n, q, D]` of q views of n
    images: LiDAR (Thilak et al., ICLR 2024, arXiv 2312.04000).

    It is exp(-Σ p log p), where p are the eigenvalues of W^(-1/2) B W^(-1/2) as shares of their sum, plus 1e-7. B is
    the covariance of the images' means, W the mean covariance of an image's views plus 1e-4 on its diagonal. Directions
    that only tell views apart count for nothing here, but for as much as others in RankMe. The most that it can be is
    min(n - 1, D). Published values take 1,000 images and 50 views.
    """
    if views.ndim == 3 and views.shape[1] < 2:
        raise ValueError("views must be at least 2 of each image, not 1")
    check_features(views, "[n, q, D]")
    views = exact(views)
    means = views.mean(1)
    inside = (views - means[:, None]).flatten(0, 1)
    within = inside.T @ inside / len(inside)
    within.diagonal().add_(LIDAR_DELTA)
    between = means - means.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)  # [D, n]
    return _exp_entropy(_eigenvalues(whitened.T), RANK_ME_EPSILON)


def alpha_req(features: Tensor) -> float:
    """How fast the variances of features `[n, D]` fall from direction to direction: α-ReQ (Agrawal et al., NeurIPS
    2022).

    The eigenvalues of the covariance, in falling order, are taken for a power law i^(-α) of their number i. α is the
    slope of the line through log(eigenvalue) over log(i) by least squares, in which number i has the weight 1 / i,
    because a sample tells small eigenvalues badly. Large: few directions hold the variance; 0: all hold the same. The
    paper finds the best encoders near 1. 0 also where fewer than two directions vary.
    """
    check_features(features, "[n, D]")
    rows = exact(features)
    values = _eigenvalues(rows - rows.mean(0)).flip(0)
    values = values[values > ROUNDING**2 * rows.square().sum()]
    if len(values) < 2:
        return 0.0
    number = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    weights = 1 / number / (1 / number).sum()
    x, y = number.log(), values.log()
    x, y = x - (weights * x).sum(), y - (weights * y).sum()
    return (-(weights * x * y).sum() / (weights * x * x).sum()).item()


def check_features(features: Tensor, shape: str):
    if features.ndim != shape.count(",") + 1 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(f"features must be floats {shape}, not {features.dtype} {list(features.shape)}")
    if len(features) < 2:
        raise ValueError("features must be of at least 2 images, not of 1")
    if features.ndim == 3 and features.shape[1] < 2:
        raise ValueError("tokens must be at least 2 for each image, not 1")
    if not torch.stack(features.aminmax()).isfinite().all():  # isfinite of the features would take as much memory again
        raise ValueError("features hold numbers that are not finite: the checkpoint is broken, or it overflows")


def exact(features: Tensor) -> Tensor:
    """In float64; on the CPU if the device has no float64."""
    return (features.cpu() if features.device.type == "mps" else features).detach().double()


def _eigenvalues(rows: Tensor) -> Tensor:
    """The squared singular values of `[n, D]`, from the smaller of the two Gram matrices."""
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    return torch.linalg.eigvalsh(gram).clamp(min=0)


def _exp_entropy(values: Tensor, epsilon: float = 0.0) -> float:
    """exp(entropy) of values ≥ 0 as shares of their sum; 1 where all are 0."""
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + epsilon
    return (-torch.xlogy(shares, shares).sum()).exp().item()
