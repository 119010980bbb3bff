"""Schedules: pure functions of `progress`, the share of the run that is done, in [0, 1].

A function of progress has nothing to save: after a resume it goes on from the step number alone. The models schedule
momentum and similarity target themselves, by the same `linear` and `cosine`.
"""

from hf_mim.models.target_encoder import cosine, linear

__all__ = ["cosine", "learning_rate", "linear", "weight_decay"]


def learning_rate(progress: float, peak: float, start: float = 0.0, final: float = 0.0, warmup: float = 0.0) -> float:
    """Linear from `start` to `peak` over the first `warmup` share of the run, then a half cosine down to `final`.

    All rates in the same unit. MAE: 0 → peak → 0; Latent MIM: peak/4 → peak → peak/4; I-JEPA: 2e-4 → 1e-3 → 1e-6.
    """
    if progress < warmup:
        return linear(start, peak, progress / warmup)
    return cosine(peak, final, (progress - warmup) / (1 - warmup)) if warmup < 1 else peak


def weight_decay(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`, as I-JEPA (arXiv 2301.08243, appendix A: .04 → .4)."""
    return cosine(start, end, progress)
