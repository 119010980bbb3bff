"""Pixels without data are left out of every loss: what is left equals the loss of the rest, computed by hand."""

import numpy as np
import pytest
import torch
from passes import make
from tiny import only

from hf_mim import methods
from hf_mim.models.losses import mean_over
from hf_mim.models.masking import gather
from hf_mim.models.modeling_latent_mim import mean_pairwise_cosine
from hf_mim.models.signals import error_over_constant, target_signals

METHODS = [method.name for method in methods.rows() if method.takes_nodata]
OF_PIXELS = [name for name in METHODS if methods.get(name).predicts_pixels]


def images_and_valid(model, batch=3, share=0.3, seed=0):
    """Images with scattered pixels and whole patches without data. These are 0, as the augmentation leaves them."""
    torch.manual_seed(seed)
    shape = (batch, model.config.num_channels, *model.config.training_size)
    valid = torch.rand(shape) > share
    valid[:, :, :, : shape[3] // 2] = False
    valid[-1] = True
    return torch.randn(shape) * valid, valid


def run(model, images, valid=None, **masks):
    torch.manual_seed(1)
    return model(images, valid_pixels=valid, **masks)


@pytest.mark.parametrize("method", OF_PIXELS)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_reconstruction_loss_is_that_of_a_loop_over_the_valid_pixels(method, norm_pix_loss):
    model = make(method, norm_pix_loss=norm_pix_loss)
    images, valid = images_and_valid(model)
    output = run(model, images, valid)
    p = model.config.patch_size
    columns = model.config.image_size // p
    total, count = 0.0, 0
    for image in range(len(images)):
        for place, patch in enumerate(output.target_ids[image].tolist()):
            where = np.s_[:, patch // columns * p :, patch % columns * p :]
            values, known = (x[image].numpy()[where][:, :p, :p].transpose(1, 2, 0).ravel() for x in (images, valid))
            values = values[known].astype(np.float64)
            if norm_pix_loss and len(values):
                variance = values.var(ddof=1) if len(values) > 1 else 0.0
                values = (values - values.mean()) / np.sqrt(variance + 1e-6)
            predicted = output.predictions[image, place].detach().double().numpy()[known]
            total, count = total + ((predicted - values) ** 2).sum(), count + len(values)
    assert output.metrics.get("reconstruction", output.loss).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", OF_PIXELS)
def test_only_valid_pixels_pull_at_the_predictions(method):
    model = make(method, norm_pix_loss=True)
    images, valid = images_and_valid(model)
    output = run(model, images, valid)
    output.predictions.retain_grad()
    output.loss.backward()
    known = gather(model.valid_values(valid), output.target_ids)
    assert known.any() and not known.all()
    assert (output.predictions.grad[~known] == 0).all() and (output.predictions.grad[known] != 0).all()


@pytest.mark.parametrize("loss_type", ["patch_discrimination", "norm_l2"])
def test_the_loss_of_latent_mim_is_that_of_the_valid_patches_alone(loss_type):
    """Image by image, with only the patches that hold data, through the loss for images without nodata."""
    model = make("latent_mim", loss_type=loss_type).double()
    predictions, targets, visible = (torch.randn(3, 12, 48, dtype=torch.float64) for _ in range(3))
    valid = torch.rand(3, 12) > 0.4
    valid[2] = False
    loss, metrics = model.loss(predictions, targets, visible, valid)
    model.config.similarity_weight = 0.0
    alone, counts, cosines = [], [], []
    for image in range(2):
        parts = [x[image : image + 1, valid[image]] for x in (predictions, targets)]
        alone.append(model.loss(*parts, visible)[0])
        counts.append(valid[image].sum())
        cosines.append(mean_pairwise_cosine(parts[0]))
    expected = sum(x * n for x, n in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(metrics[loss_type], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["similarity_predictions"], sum(cosines) / 2, rtol=1e-9, atol=0)
    assert loss.isfinite()


def test_the_loss_of_stop_jepa_is_the_mean_over_the_valid_target_patches():
    model = make("stop_jepa").eval()
    images, valid = images_and_valid(model)
    output = run(model, images, valid)
    p = model.config.patch_size
    columns = model.config.image_size // p
    losses = []
    for image, block, place in np.ndindex(*output.target_ids.shape):
        row, column = divmod(int(output.target_ids[image, block, place]), columns)
        if valid[image, :, row * p : (row + 1) * p, column * p : (column + 1) * p].any():
            pair = output.predictions[image, block, place].double(), output.targets[image, block, place].double()
            losses.append(torch.nn.functional.smooth_l1_loss(*pair).item())
    assert 0 < len(losses) < output.target_ids.numel()
    assert output.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_valid_pixels_that_are_all_true_leave_the_loss(method):
    model = make(method).eval()
    images, _ = images_and_valid(model)
    whole = run(model, images, torch.ones_like(images, dtype=torch.bool))
    assert whole.loss.item() == pytest.approx(run(model, images).loss.item(), rel=1e-6)
    for name, value in run(model, images).metrics.items():
        torch.testing.assert_close(whole.metrics[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_data_gives_loss_and_gradient_zero(method):
    model = make(method, **only(method, similarity_weight=0.0)).train()
    images, valid = images_and_valid(model)
    loss = run(model, images * 0, torch.zeros_like(valid)).loss
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


def test_an_image_without_data_changes_neither_the_loss_of_the_others_nor_the_signs_of_collapse():
    torch.manual_seed(0)
    targets, predictions, ids = torch.randn(4, 9, 16), torch.randn(4, 9, 16), torch.arange(9).expand(4, 9)
    valid = torch.ones(4, 9, dtype=torch.bool)
    valid[3] = False
    expected = target_signals(targets[:3], ids[:3], 9)
    for found in (target_signals(targets, ids, 9, valid), target_signals(targets, valid=valid)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
    expected = error_over_constant(predictions[:3], targets[:3])
    torch.testing.assert_close(error_over_constant(predictions, targets, valid), expected)
    assert mean_over(targets, torch.zeros_like(targets, dtype=torch.bool)) == 0


@torch.no_grad()
def test_a_reconstruction_has_the_mean_and_deviation_of_the_valid_pixels():
    """The head gives 0, so that each masked patch becomes the mean of its valid pixels."""
    model = make("mae", norm_pix_loss=True, num_channels=1)
    model.decoder.head.weight.zero_()
    images, valid = images_and_valid(model, batch=1)
    images, valid = images + 5 * valid, valid.clone()
    torch.manual_seed(1)
    drawn, mask = model.reconstruct(images, valid_pixels=valid)
    p = model.config.patch_size
    for row, column in np.ndindex(*(side // p for side in images.shape[2:])):
        where = np.s_[0, 0, row * p : (row + 1) * p, column * p : (column + 1) * p]
        if mask[where].all() and valid[where].any():
            expected = images[where][valid[where]].mean()
            torch.testing.assert_close(drawn[where], expected.expand(p, p), rtol=1e-4, atol=1e-4)
