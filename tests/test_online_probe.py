"""k-NN and health measured while training: the right numbers, and a training that does not notice."""

import pytest
import torch
from tiny import METHODS
from tiny_runs import image_column
from transformers import AutoModelForPreTraining

from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.health import measure_health
from hf_mim.evaluation.knn import KNN
from hf_mim.pretraining.probe import OnlineProbe
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining

TINY = {"size": "tiny", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "use_cpu": True}
TINY |= {"max_steps": 4, "per_device_train_batch_size": 16, "knn": False, "disable_tqdm": True, "probe_images": 40}
TINY |= {"image_mean": [0.5], "image_std": [0.3]}


def train(folder, **settings):
    """The run, trained and saved but without pictures and final measurements, and its log."""
    run = Pretraining(Recipe.resolve(TINY | settings | {"output_dir": str(folder)}))
    run.trainer.train()
    run.trainer.save_model()
    return run, run.trainer.state.log_history


def probe_of(run) -> OnlineProbe:
    return next(callback for callback in run.trainer.callback_handler.callbacks if isinstance(callback, OnlineProbe))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_with_a_probe_has_the_losses_of_one_without(method, tmp_path):
    options = {"method": method, "logging_steps": 1}
    _, without = train(tmp_path / "without", **options)
    _, probed = train(tmp_path / "probed", probe_every=2, **options)
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (without, probed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert [entry["step"] for entry in probed if "probe_knn" in entry] == [0, 2, 4]
    assert not any("probe_knn" in entry for entry in without)


def test_the_probe_logs_what_the_protocols_measure(tmp_path):
    run, log = train(tmp_path / "run", probe_every=4)
    train_images, test_images = run.readout.sample(40, 10)
    trained = AutoModelForPreTraining.from_pretrained(tmp_path / "run").base_model
    encoder = FrozenEncoder(trained, *run.augment.statistics())
    extract = FeatureExtractor(encoder, progress=False)
    last = next(entry for entry in reversed(log) if "probe_knn" in entry)
    assert last["probe_knn"] == KNN().run(extract, train_images, test_images).value
    health = measure_health(*extract(test_images, ["last/mean/norm", "last/tokens/norm"]), encoder.grid)
    assert {f"probe_{name}": value for name, value in health.items()}.items() <= last.items()
    first = next(entry for entry in log if "probe_knn" in entry)
    assert first["step"] == 0 and first["probe_rank_me"] != last["probe_rank_me"]


def test_without_labels_only_health_is_probed(tmp_path):
    image_column(64).to_parquet(tmp_path / "grey.parquet")
    options = {"dataset": str(tmp_path / "grey.parquet"), "image_size": 24, "patch_size": 8, "num_channels": 1}
    _, log = train(tmp_path / "run", probe_every=2, dataloader_num_workers=0, **options)
    probes = [entry for entry in log if "probe_rank_me" in entry]
    assert [entry["step"] for entry in probes] == [0, 2, 4] and "probe_knn" not in probes[0]


def test_the_model_trains_on_after_a_probe(tmp_path):
    run, _ = train(tmp_path / "run", probe_every=1)
    model = run.trainer.model.train()
    probe_of(run).measure()
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_the_probe_asks_only_our_own_image_processor_for_a_crop(tmp_path):
    run, _ = train(tmp_path / "run", probe_every=4)
    probe = probe_of(run)
    ours = probe.values(run.trainer.model.base_model)
    run.trainer.processing_class = object()  # that of another library
    assert probe.values(run.trainer.model.base_model) == ours


def test_a_negative_interval_is_an_error():
    with pytest.raises(ValueError, match="probe_every must be at least 0, not -1"):
        Recipe.resolve({"probe_every": -1})
