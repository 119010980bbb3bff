import time

import pytest
import torch

from hf_mim.cli import main
from hf_mim.models.configuration_stop_jepa import StopJepaConfig
from hf_mim.models.masking import BlockMasks, gather, sample_multi_block, split_at_random

RELEASED = {"mask_trim": "raster", "block_range": "exclusive", "num_candidates": 1}
GRIDS = [(14, 14), (8, 8), (6, 6), (7, 12), (16, 5)]


def frequency_maps(grid, batches, batch_size=256, **kwargs):
    """How often each patch is in the context and in any target, [gh, gw] each, and the mean share of the context."""
    size = grid[0] * grid[1]
    context, target, share = torch.zeros(size), torch.zeros(size), 0.0
    for _ in range(batches):
        context_ids, target_ids = sample_multi_block(batch_size, grid, BlockMasks(**kwargs))
        context += torch.bincount(context_ids.flatten(), minlength=size)
        target += torch.zeros(batch_size, size).scatter_(1, target_ids.flatten(1), 1.0).sum(0)
        share += context_ids.shape[1] / size
    images = batches * batch_size
    return context.view(grid) / images, target.view(grid) / images, share / batches


def test_the_smallest_noise_is_kept_and_the_rest_follows_in_order():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.2, 0.1, 0.2]])
    kept, masked = split_at_random(noise, 2)
    assert kept.tolist() == [[1, 3], [2, 0]]
    assert masked.tolist() == [[0, 2], [1, 3]]
    kept, masked = split_at_random(torch.zeros(2, 300), 75)
    # ties keep raster order
    assert torch.cat([kept, masked], dim=1).tolist() == [list(range(300))] * 2


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_gather_picks_each_image_its_own_tokens_and_sends_gradients_back(shape):
    tokens = torch.randn(3, 5, *shape, requires_grad=True)
    ids = torch.tensor([[4, 0], [1, 1], [2, 3]])
    picked = gather(tokens, ids)
    assert torch.equal(picked, torch.stack([tokens[b, ids[b]] for b in range(3)]))
    picked.sum().backward()
    times_read = torch.tensor([[1, 0, 0, 0, 1], [0, 2, 0, 0, 0], [0, 0, 1, 1, 0]])
    assert torch.equal(tokens.grad, times_read.view(3, 5, *[1] * len(shape)).expand_as(tokens).float())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kwargs", [{}, RELEASED], ids=["unbiased", "released"])
def test_contexts_and_targets_never_overlap_and_ids_are_ascending_and_in_the_grid(grid, kwargs):
    for seed in range(20):
        torch.manual_seed(seed)
        context_ids, target_ids = sample_multi_block(64, grid, BlockMasks(**kwargs))
        assert context_ids.shape[1] >= 1 and target_ids.shape[:2] == (64, 4)
        assert context_ids.dtype == target_ids.dtype == torch.int64
        for ids in (context_ids, target_ids):
            assert (ids.diff(dim=-1) > 0).all() and ids.min() >= 0 and ids.max() < grid[0] * grid[1]
        targets = torch.zeros(64, grid[0] * grid[1]).scatter_(1, target_ids.flatten(1), 1.0)
        assert targets.gather(1, context_ids).sum() == 0


def test_every_target_is_one_full_block_of_the_scale_and_shape_asked_for():
    masking = BlockMasks(target_scale=(0.15, 0.2), target_aspect_ratio=(0.75, 1.5))
    for seed in range(50):
        torch.manual_seed(seed)
        _, target_ids = sample_multi_block(16, (14, 14), masking)
        rows, columns = target_ids // 14, target_ids % 14
        heights = rows.amax(-1) - rows.amin(-1) + 1
        widths = columns.amax(-1) - columns.amin(-1) + 1
        assert heights.unique().numel() == widths.unique().numel() == 1  # one size for the batch
        height, width = heights[0, 0].item(), widths[0, 0].item()
        assert height * width == target_ids.shape[2]  # ids are distinct, so the block is full
        assert 0.15 * 196 - 4 <= height * width <= 0.2 * 196 + 4  # sides are rounded to whole patches
        assert 0.75 - 0.2 <= height / width <= 1.5 + 0.3


@pytest.mark.parametrize("grid", [pytest.param((14, 14), marks=pytest.mark.slow), (8, 8), (7, 12)])
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_unbiased_frequencies_are_symmetric_under_flips_and_leave_out_no_row_or_column(grid, num_candidates):
    torch.manual_seed(0)
    context, target, _ = frequency_maps(grid, batches=400, num_candidates=num_candidates)
    for frequencies in (context, target):
        for flipped in (frequencies.flip(0), frequencies.flip(1)):
            assert (frequencies - flipped).abs().max() < 0.03 * frequencies.mean()
        assert frequencies.min() > 0.02


def test_the_released_sampler_favours_the_top_and_never_uses_the_last_row_and_column():
    torch.manual_seed(0)
    context, target, share = frequency_maps((14, 14), batches=200, **RELEASED)
    assert context[0].mean() == pytest.approx(0.75, abs=0.02)
    for frequencies in (context, target):
        assert frequencies[-1].max() == frequencies[:, -1].max() == 0
    assert share * 196 == pytest.approx(48, abs=3)  # 49 tokens measured on the released code


def test_trimming_by_raster_alone_is_what_starves_the_bottom():
    torch.manual_seed(0)
    raster, _, _ = frequency_maps((14, 14), batches=100, mask_trim="raster", num_candidates=1)
    random, _, _ = frequency_maps((14, 14), batches=100, mask_trim="random", num_candidates=1)
    assert raster[0].mean() > 5 * raster[-1].mean()
    assert random[0].mean().item() == pytest.approx(random[-1].mean().item(), rel=0.05)


@pytest.mark.parametrize(
    ("grid", "one", "four"), [pytest.param((14, 14), 0.29, 0.41, marks=pytest.mark.slow), ((8, 8), 0.30, 0.41)]
)
def test_four_candidates_keep_the_context_of_a_large_batch_large(grid, one, four):
    torch.manual_seed(0)
    assert frequency_maps(grid, batches=300, num_candidates=1)[2] == pytest.approx(one, abs=0.02)
    assert frequency_maps(grid, batches=300, num_candidates=4)[2] == pytest.approx(four, abs=0.02)


def test_the_context_is_never_empty_where_targets_often_cover_everything():
    torch.manual_seed(0)
    for _ in range(50):
        context_ids, target_ids = sample_multi_block(256, (4, 4), BlockMasks(target_scale=(0.4, 0.6), num_candidates=1))
        assert context_ids.shape[1] >= 1
        covered = torch.zeros(256, 16).scatter_(1, target_ids.flatten(1), 1.0)
        assert covered.gather(1, context_ids).sum() == 0


def test_targets_that_leave_no_context_are_an_error_that_names_them():
    with pytest.raises(
        ValueError, match=r"target_scale=\(1.0, 1.0\) with num_targets=4 leaves no context on a grid of 4x4"
    ):
        sample_multi_block(2, (4, 4), BlockMasks(target_scale=(1.0, 1.0), target_aspect_ratio=(1.0, 1.0)))


@pytest.mark.parametrize(
    ("grid", "kwargs", "message"),
    [
        ((1, 1), {}, "image_size must hold two patches at least, and there is one"),
        ((4, 4), {"target_scale": (1.0, 1.0), "target_aspect_ratio": (1.0, 1.0)}, "leaves no context on a grid of 4x4"),
        ((2, 2), {"num_targets": 40}, "target_scale=.* with num_targets=40 leaves no context on a grid of 2x2 patches"),
        (
            (14, 14),
            {"context_scale": (0.001, 1.0), "target_scale": (0.9, 0.95), "target_aspect_ratio": (1, 1)},
            "no context",
        ),
        ((14, 14), {"target_aspect_ratio": (0.75, float("inf"))}, "target_aspect_ratio must be"),
        ((14, 14), {"target_scale": (0.1, float("nan"))}, "target_scale must be"),
    ],
)
def test_a_geometry_without_context_is_refused_with_the_config(grid, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        StopJepaConfig(image_size=[8 * side for side in grid], patch_size=8, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (2, 3), (4, 4), (14, 14)])
def test_a_geometry_that_is_accepted_can_be_drawn_and_the_check_draws_nothing_from_the_generator(grid):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = StopJepaConfig(image_size=[8 * side for side in grid], patch_size=8)
    assert torch.equal(before, torch.get_rng_state())
    for _ in range(50):
        assert sample_multi_block(64, grid, config.masking)[0].shape[1] >= 1


@pytest.mark.parametrize("method", ["mae", "latent_mim", "stop_jepa", "ijepa"])
def test_an_image_of_one_patch_is_refused_before_anything_is_written(method, tmp_path, capsys):
    words = (
        f"--method {method} --size tiny --image_size 8 --patch_size 8 --use_cpu true --output_dir {tmp_path / 'run'}"
    )
    assert main(["pretrain", *words.split()]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ") and not (tmp_path / "run").exists()


def test_the_seed_settles_the_masks():
    def draw(seed):
        torch.manual_seed(seed)
        return sample_multi_block(32, (14, 14))

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_images_of_a_batch_have_different_masks():
    torch.manual_seed(0)
    context_ids, target_ids = sample_multi_block(16, (14, 14))
    assert len(context_ids.unique(dim=0)) == len(target_ids.flatten(1).unique(dim=0)) == 16


@pytest.mark.parametrize(
    ("grid", "kwargs", "message"),
    [
        ((3, 40), {}, r"target_scale=\(0.15, 0.2\) with target_aspect_ratio=\(0.75, 1.5\).*grid of 3x40"),
        ((40, 3), {}, r"up to 6 patches high and 6 wide, larger than the grid of 40x3"),
        ((14, 14), {"target_aspect_ratio": (0.1, 10.0)}, "target_aspect_ratio"),
        ((14, 14), {"target_scale": (0.2, 0.15)}, r"target_scale must be .* not \(0.2, 0.15\)"),
        ((14, 14), {"target_scale": (0.5, 1.5)}, "target_scale must be"),
        ((14, 14), {"context_scale": (0, 1)}, "context_scale must be"),
        ((14, 14), {"mask_trim": "rand"}, "mask_trim must be 'random' or 'raster', not 'rand'"),
        ((14, 14), {"block_range": "all"}, "block_range must be 'inclusive' or 'exclusive', not 'all'"),
        ((14, 14), {"num_targets": 0}, "num_targets must be at least 1, not 0"),
        ((14, 14), {"num_candidates": 0}, "num_candidates must be at least 1, not 0"),
        (
            (1, 9),
            {"block_range": "exclusive"},
            "block_range='exclusive' needs two rows and columns of patches, not 1x9",
        ),
    ],
)
def test_impossible_blocks_are_one_line_errors(grid, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        BlockMasks(**kwargs).check(grid)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        sample_multi_block(2, grid, BlockMasks(**kwargs))


def test_masks_for_256_images_take_less_than_5_ms_on_one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(30):
            start = time.process_time()  # which leaves out what other processes take
            sample_multi_block(256, (14, 14))
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert sorted(times)[len(times) // 4] < 0.005  # the lower quartile: a busy machine slows some of them
