"""Two gloo ranks on the CPU: `two_ranks.py` has them train, and they leave behind what the tests compare."""

import json
import os
import signal

import pytest
import torch
from tiny import METHODS, make_mean_model, make_model
from tiny_runs import AtEachStep, Images, Stream, arguments, assert_same_weights, fixed_ids, image_column, snapshot

from hf_mim.data import BrokenImagesError, DeviceAugment, ImageDataset, ImageStream, WholeImage
from hf_mim.pretraining.checkpoints import is_whole
from hf_mim.pretraining.trainer import MIMTrainer

SHARED = dict(max_steps=3, train_sampling_strategy="sequential", adam_epsilon=1e-3, learning_rate=0.01)


def train_on_given_masks(folder, method, batch_size):
    """A few steps in which nothing is random; on two ranks with half the batch each, or in one process."""
    model = make_mean_model(method)
    args = arguments(folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, **SHARED)
    MIMTrainer(model, args, Images(model, **fixed_ids(model))).train()
    return model


def train_on_drawn_masks(folder, **kwargs):
    """Returns the trainer, the masks of each step and the metrics of each step on this rank."""
    model, masks, metrics = make_model("mae"), [], []

    def record(module, args, output):
        masks.append(output.context_ids.tolist())
        metrics.append(output.metrics["feature_std"].item())

    model.register_forward_hook(record)
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=6)
    args.logging_first_step = False
    trainer = MIMTrainer(model, args, Images(model, 20))
    trainer.train(**kwargs)
    return trainer, masks, metrics


def stream_first_pixels(folder, make_stream, augment=None):
    """Which images of a stream this rank was given, told by their first pixel."""
    model, seen = make_model("mae"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["pixel_values"][:, 0, 0, 0].tolist()), with_kwargs=True
    )
    MIMTrainer(model, arguments(folder, max_steps=3), make_stream(model), augment=augment).train()
    return seen


def train_on_broken_images(folder):
    """Three of 200 images are broken, of which rank 0 meets two and rank 1 one. Returns what the run ends with."""
    images = ImageDataset(image_column(200, broken=[0, 5, 9]), size=24)
    args = arguments(folder, train_sampling_strategy="sequential", logging_steps=1)
    try:
        MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment()).train()
    except BrokenImagesError as error:
        return str(error)


def images_of_each_step(folder, batch_size, after_step=None, **kwargs):
    """The trainer, and the names and keys of the images that each step of this rank was given."""
    given = []

    class Recorder(MIMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            given.append(sorted(zip(inputs["name"], inputs["augment_key"].tolist(), strict=True)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(folder, max_steps=9, per_device_train_batch_size=batch_size, save_strategy="steps", save_steps=4)
    images = ImageDataset(image_column(26), size=24)  # an epoch ends within
    callbacks = [AtEachStep(after_step)] if after_step else []
    trainer = Recorder(make_model("stop_jepa"), args, images, augment=DeviceAugment(), callbacks=callbacks)
    trainer.train(**kwargs)
    return trainer, given


def tell_rank_1_to_stop(state, optimizer):
    if os.environ["RANK"] == "1" and state.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def train_with_a_nan_on_rank_1(folder):
    """Steps that this rank has counted as skipped, and whether the skipped one has changed the weights."""
    weights = []
    model = make_model("stop_jepa")
    images = Images(model, 16)
    give = images.__getitem__

    class WithNaN(Images):
        def __getitem__(self, index):
            sample = give(index)
            return {"pixel_values": sample["pixel_values"] * (torch.nan if index == 6 else 1)}

    args = arguments(folder, train_sampling_strategy="sequential", max_steps=2, per_device_train_batch_size=2)
    record = AtEachStep(lambda state, optimizer: weights.append(snapshot(model)))
    trainer = MIMTrainer(model, args, WithNaN(model, 16), callbacks=[record])
    trainer.train()
    weights.append(snapshot(model))
    encoder = len(list(model.encoder.parameters()))
    same = all(a.equal(b) for a, b in zip(weights[0][:encoder], weights[1][:encoder], strict=True))
    same &= all(a.equal(b) for a, b in zip(weights[1], weights[2], strict=True))
    return [trainer.guard.skipped, same]


def options_of_ddp(folder, **options):
    """What torch's DDP has taken of the options, and the losses of a run with them."""
    args = arguments(folder, max_steps=2, logging_steps=1, **options)
    trainer = MIMTrainer(make_model("stop_jepa"), args, Images(make_model("stop_jepa")))
    trainer.train()
    ddp = trainer.model_wrapped
    taken = [ddp.bucket_bytes_cap, ddp.broadcast_buffers, ddp.find_unused_parameters, ddp.static_graph]
    return taken, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def contrast_of_ranks(rank=None):
    """SymMIM's contrast of this rank's part of a batch, or of the whole one, with its gradient by the features."""
    model, generator = make_model("sym_mim").train(), torch.Generator().manual_seed(0)
    patches, tokens = torch.randn(8, 36, 48, generator=generator), torch.randn(8, 19, 32, generator=generator)
    own = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    seen = torch.arange(18).expand(8, -1)
    loss, _ = model.contrast(tokens[own], patches[own], (6, 6), seen[own])
    parameters = [*model.projector.parameters(), *model.predictor.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


DDP = dict(ddp_bucket_cap_mb=3, ddp_broadcast_buffers=True, ddp_find_unused_parameters=True, ddp_static_graph=True)


def train_ranks(folder, rank):
    for method in METHODS:
        model = train_on_given_masks(folder / "equal", method, batch_size=2)
        torch.save(model.state_dict(), folder / f"{method}_{rank}.pt")
    straight, masks, metrics = train_on_drawn_masks(folder / "run")
    resumed, later_masks, _ = train_on_drawn_masks(
        folder / "run", resume_from_checkpoint=str(folder / "run/checkpoint-3")
    )
    assert_same_weights(straight.model, resumed.model)
    found = dict(
        masks=masks,
        later_masks=later_masks,
        metrics=metrics,
        log=straight.state.log_history,
        total_flos=[trainer.state.total_flos for trainer in (straight, resumed)],
        learning_rate=arguments(folder, learning_rate=None, base_lr=1e-3).learning_rate,
        streamed=stream_first_pixels(folder / "stream", lambda model: Stream(Images(model, 24))),
        image_stream=stream_first_pixels(
            folder / "image_stream",
            lambda model: ImageStream(image_column(24).to_iterable_dataset(num_shards=2), size=24, crop=WholeImage()),
            augment=DeviceAugment().eval(),
        ),
        broken=train_on_broken_images(folder / "broken"),
    )
    found["images"] = images_of_each_step(folder / "images", batch_size=2)[1]
    stopped, _ = images_of_each_step(folder / "told", 2, after_step=tell_rank_1_to_stop)
    found["told"] = [stopped.state.global_step, stopped.guard.signal]
    found["nan"] = train_with_a_nan_on_rank_1(folder / "nan")
    torch.save(contrast_of_ranks(rank), folder / f"contrast_{rank}.pt")
    found["ddp"] = [options_of_ddp(folder / "ddp", **options) for options in ({}, DDP)]
    (folder / f"found_{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(two_ranks):
    """The folder in which two ranks have left their weights and findings, and the findings of both."""
    return two_ranks, [json.loads((two_ranks / f"found_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one_process_with_the_joint_batch(ranks, tmp_path, method):
    folder, _ = ranks
    alone = train_on_given_masks(tmp_path, method, batch_size=4)
    before = make_mean_model(method)
    with pytest.raises(AssertionError):
        assert_same_weights(alone, before, tolerance=1e-3)
    for rank in (0, 1):
        together = make_mean_model(method)
        together.load_state_dict(torch.load(folder / f"{method}_{rank}.pt"))
        assert_same_weights(alone, together, tolerance=1e-6)


def test_ranks_draw_different_masks(ranks):
    _, (first, second) = ranks
    assert all(ours != theirs for ours, theirs in zip(first["masks"], second["masks"], strict=True))


def test_resumed_ranks_go_on_with_their_own_masks(ranks):
    _, found = ranks  # that the weights are equal too, the ranks have checked themselves
    for rank in found:
        assert rank["later_masks"] == rank["masks"][3:]


def test_logged_metrics_are_means_over_ranks(ranks):
    _, (first, second) = ranks
    metrics = first["metrics"] + second["metrics"]
    for rank in (first, second):
        assert rank["log"][0]["feature_std"] == pytest.approx(sum(metrics) / 12, rel=1e-5)
    assert sum(first["metrics"]) != pytest.approx(sum(second["metrics"]), rel=1e-4)


def test_total_flos_are_those_of_all_ranks_and_of_all_parts_of_a_run(ranks):
    model = make_model("mae")
    grid = model.config.grid_size
    for rank in ranks[1]:
        assert rank["total_flos"] == [6 * 2 * model.step_flops(4, grid, model.draw_masks(4, grid))] * 2


def test_base_lr_counts_the_images_of_all_ranks(ranks):
    _, found = ranks
    assert [rank["learning_rate"] for rank in found] == [pytest.approx(1e-3 * 2 * 4 / 256)] * 2


@pytest.mark.parametrize("stream", ["streamed", "image_stream"])
def test_ranks_share_a_stream_without_overlap(ranks, stream):
    _, (first, second) = ranks
    assert len(set(first[stream])) == len(set(second[stream])) == 12
    assert not set(first[stream]) & set(second[stream])


def test_ranks_count_broken_images_together(ranks):
    _, found = ranks
    for rank in found:
        assert (
            rank["broken"].startswith("3 of 200 images cannot be decoded") and "0.png, 5.png, 9.png" in rank["broken"]
        )


@pytest.mark.parametrize("step", [4, 8])
def test_one_process_goes_on_with_the_images_that_two_would_have_had(ranks, tmp_path, step):
    folder, (first, second) = ranks
    checkpoint = str(folder / f"images/checkpoint-{step}")
    _, given = images_of_each_step(tmp_path, batch_size=4, resume_from_checkpoint=checkpoint)
    both = zip(first["images"], second["images"], strict=True)
    together = [sorted(map(tuple, ours + theirs)) for ours, theirs in both]
    assert len(together) == 9 and given == together[step:]
    with pytest.raises(ValueError, match="must stay 4, as in .* got 2 × 1 × 1$"):
        images_of_each_step(tmp_path, batch_size=2, resume_from_checkpoint=checkpoint)


def test_a_signal_to_one_rank_ends_all_at_the_same_whole_checkpoint(ranks):
    folder, found = ranks
    (step, number), other = found[0]["told"], found[1]["told"]
    assert other == [step, number] and step in (4, 5) and number == signal.SIGTERM
    assert is_whole(folder / f"told/checkpoint-{step}")


def test_ddp_takes_the_options_that_are_given_and_they_change_no_loss(ranks):
    for rank in ranks[1]:
        (usual, losses), (taken, same) = rank["ddp"]
        assert usual == [25 * 2**20, False, False, False] and taken == [3 * 2**20, True, True, True]
        assert len(losses) == 2 and same == pytest.approx(losses, rel=1e-6)


def test_a_contrast_of_two_ranks_is_that_of_the_joint_batch(ranks):
    """Keys and batch statistics are those of all ranks, and a trainer averages the gradients."""
    folder, _ = ranks
    first, second = (torch.load(folder / f"contrast_{rank}.pt") for rank in (0, 1))
    assert abs(first[0] - second[0]) > 0.01
    for one, other, together in zip(first, second, contrast_of_ranks(), strict=True):
        torch.testing.assert_close((one + other) / 2, together, rtol=1e-6, atol=1e-6)


def test_a_nan_on_one_rank_skips_the_step_on_all(ranks):
    _, found = ranks
    assert [rank["nan"] for rank in found] == [[1, True]] * 2
