"""What MAE's pictures show is what the model saw and said."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hf_mim.data import DeviceAugment
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.visualize import plot_reconstructions, plot_training


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

    def oracle(pixel_values, noise, valid_pixels=None):
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


@pytest.mark.parametrize("num_channels", [1, 2, 3, 10])
def test_pictures_of_any_number_of_channels_are_written(tmp_path, num_channels):
    model = make_model(num_channels=num_channels)
    augment = DeviceAugment([0.5] * num_channels, [0.25] * num_channels)
    images = torch.randint(0, 256, (3, num_channels, 16, 24), dtype=torch.uint8)
    plot_reconstructions(model, images, augment, tmp_path / "a.png")
    plot_reconstructions(model, images, augment, tmp_path / "b.png")
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > picture.height > 100
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()  # the masks are the same


def test_a_picture_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "loss.png").write_text("old")

    def interrupted(figure, path, **kwargs):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plot_training([{"step": 1, "loss": 2.0}], tmp_path / "loss.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_curve_has_the_losses_and_spreads_of_the_log(tmp_path, monkeypatch):
    drawn = {}
    from matplotlib.axes import Axes

    plot = Axes.plot

    def spy(self, x, y, **kwargs):
        drawn[kwargs.get("label", "loss")] = (list(x), list(y))
        return plot(self, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    log = [
        {"step": 0, "probe_knn": 0.25, "probe_rank_me": 3.0, "probe_std_mean": 9.0},
        {"step": 1, "loss": 2.0, "feature_std": 0.5},
        {"step": 5, "probe_knn": 0.5, "probe_rank_me": 4.0, "probe_std_mean": 9.0},
        {"step": 5, "loss": 1.0, "feature_std": 0.4},
        {"step": 5, "train_loss": 1.5},
    ]
    plot_training(log, tmp_path / "loss.png")
    assert drawn == {
        "loss": ([1, 5], [2.0, 1.0]),
        "feature_std": ([1, 5], [0.5, 0.4]),
        "probe_knn": ([0, 5], [0.25, 0.5]),
        "probe_rank_me": ([0, 5], [3.0, 4.0]),
    }
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fill_the_disk(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "loss.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        plot_training([{"step": 1, "loss": 0.5}], tmp_path / "loss.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
