"""What MAE reconstructs is where it belongs."""

from types import SimpleNamespace

import pytest
import torch

from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining


def make_model(norm_pix_loss=True, num_channels=3, image_size=(16, 24)):
    torch.manual_seed(0)
    return MAEForPreTraining(
        MAEConfig(
            image_size=list(image_size),
            patch_size=4,
            num_channels=num_channels,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            norm_pix_loss=norm_pix_loss,
        )
    ).eval()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_perfect_predictions_give_the_image_back_in_the_right_places(monkeypatch, norm_pix_loss):
    model = make_model(norm_pix_loss)
    images = torch.randn(2, 3, 16, 24)
    noise = torch.rand(2, 24)
    true = model(images, noise=noise)

    def oracle(pixel_values, valid_pixels=None, **masks):
        return SimpleNamespace(predictions=true.targets, target_ids=true.target_ids)

    monkeypatch.setattr(model, "forward", oracle)
    reconstruction, mask = model.reconstruct(images, noise=noise)
    torch.testing.assert_close(reconstruction, images, atol=1e-4, rtol=0)
    assert mask.float().mean() == 0.75
    shown = mask[0, 0, ::4, ::4].flatten().nonzero().flatten()
    assert set(shown.tolist()) == set(true.target_ids[0].tolist())


def test_visible_patches_are_pasted_and_masked_ones_are_predicted():
    model = make_model()
    images = torch.randn(2, 3, 16, 24)
    reconstruction, mask = model.reconstruct(images)
    mask = mask.expand_as(images)
    assert torch.equal(reconstruction[~mask], images[~mask])
    assert not torch.isclose(reconstruction[mask], images[mask]).any()
