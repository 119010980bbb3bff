"""Each schedule against its formula written out, at its ends, its peak, and everywhere between."""

import math

import pytest

from hf_mim import trainer_utils
from hf_mim.models.target_encoder import cosine


def test_learning_rate_is_linear_to_the_peak_then_half_a_cosine():
    for step in range(101):  # I-JEPA's rates
        progress = step / 100
        if progress < 0.2:
            expected = 2e-4 + (1e-3 - 2e-4) * progress / 0.2
        else:
            expected = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))
        got = trainer_utils.learning_rate(progress, peak=1e-3, start=2e-4, final=1e-6, warmup=0.2)
        assert got == pytest.approx(expected, rel=1e-12)


def test_learning_rate_meets_start_peak_and_final_exactly():
    rate = [trainer_utils.learning_rate(p, peak=1.0, start=0.25, final=0.125, warmup=0.1) for p in (0, 0.1, 1)]
    assert rate == [0.25, 1.0, 0.125]


def test_without_warmup_the_first_rate_is_the_peak():
    assert trainer_utils.learning_rate(0.0, peak=3.0, start=1.0) == 3.0


def test_warmup_over_the_whole_run_ends_at_the_peak():
    rate = [trainer_utils.learning_rate(p, peak=1.0, warmup=1.0) for p in (0, 0.5, 1)]
    assert rate == [0.0, 0.5, 1.0]


def test_weight_decay_goes_up_on_half_a_cosine():
    decay = [cosine(0.04, 0.4, p) for p in (0, 0.25, 0.5, 1)]
    assert decay == pytest.approx([0.04, 0.4 - 0.36 * (1 + math.sqrt(0.5)) / 2, 0.22, 0.4], rel=1e-12)


def test_constant_schedules_are_constant_to_the_bit():
    for progress in (0.0, 0.1, 1 / 3, 0.999, 1.0):
        assert cosine(0.05, 0.05, progress) == 0.05
        assert trainer_utils.linear(0.996, 0.996, progress) == 0.996
