"""Checkpoints in the hands of users: plain transformers code, and our scripts on a name on the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from minihub import MiniHub
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from hf_mim import LatentMIMConfig, LatentMIMForPreTraining, MAEBackbone, MAEConfig, MAEForPreTraining
from hf_mim.data.labelled import load_labelled
from hf_mim.data.processor import image_processor

REPOSITORY = Path(__file__).parents[2]
TINY = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    MAEForPreTraining(MAEConfig(**TINY)).save_pretrained(folder)
    image_processor((32, 32), [0.4] * 3, [0.3] * 3).save_pretrained(folder)
    return folder


def run(*command, **environment):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_upernet_segments_with_a_checkpoint_as_its_backbone(checkpoint):
    backbone = MAEBackbone.from_pretrained(checkpoint, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone.config, num_labels=5, hidden_size=16, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config)
    assert not any(model.backbone.load_state_dict(backbone.state_dict()))
    output = model(torch.randn(2, 3, 48, 64), labels=torch.randint(5, (2, 48, 64)))
    assert output.logits.shape == (2, 5, 48, 64)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "backbone.encoder.layers" in name)


PLAIN = """
import sys
import hf_mim
import datasets
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline
checkpoint, images, out = sys.argv[1:]
data = datasets.load_from_disk(images)
processor = AutoImageProcessor.from_pretrained(checkpoint)
data.set_transform(lambda rows: processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    | {"labels": rows["label"]})
names = dict(enumerate(data.features["label"].names))
model = AutoModelForImageClassification.from_pretrained(checkpoint, id2label=names, pooling="mean")
args = TrainingArguments(out, max_steps=30, learning_rate=3e-3, per_device_train_batch_size=32, use_cpu=True,
    remove_unused_columns=False, save_strategy="no", logging_steps=5, disable_tqdm=True)
trainer = Trainer(model, args, train_dataset=data)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0] - 0.1, losses
trainer.save_model(out)
processor.save_pretrained(out)
data.reset_format()
found = pipeline("image-classification", model=out)(data[0]["image"].convert("RGB"), top_k=10)
assert {answer["label"] for answer in found} == set(names.values())
"""


@pytest.mark.slow
def test_a_plain_trainer_and_a_pipeline_need_nothing_of_hf_mim_but_the_import(checkpoint, tmp_path):
    rows = load_labelled("digits")[0].select(range(256)).images
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "digits")
    (tmp_path / "script.py").write_text(PLAIN)
    run(tmp_path / "script.py", checkpoint, tmp_path / "digits", tmp_path / "out", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_embed_and_the_script_take_a_name_on_the_hub(tmp_path):
    torch.manual_seed(0)
    model = LatentMIMForPreTraining(LatentMIMConfig(**TINY, decoder_num_hidden_layers=1, patch_gap=2))
    model.save_pretrained(tmp_path / "latent")
    image_processor((32, 32), [0.4] * 3, [0.3] * 3).save_pretrained(tmp_path / "latent")
    hub = MiniHub()
    try:
        environment = hub.environment(tmp_path / "home")
        push = "from huggingface_hub import HfApi; import sys; api = HfApi(); api.create_repo('tester/latent')\n"
        push += "api.upload_folder(repo_id='tester/latent', folder_path=sys.argv[1])"
        run("-c", push, tmp_path / "latent", **environment)
        options = ["--dataset", "digits", "--output", tmp_path / "f.parquet", "--split", "test"]
        run("-m", "hf_mim.cli", "embed", "tester/latent", *options, **environment)
        assert (tmp_path / "f.parquet").exists()
        options = [
            "--dataset",
            "digits",
            "--epochs",
            1,
            "--flip",
            0,
            "--output_dir",
            tmp_path / "out",
            "--use_cpu",
            "true",
        ]
        run(REPOSITORY / "training" / "finetune.py", "tester/latent", *options, **environment)
        assert (tmp_path / "out" / "model.safetensors").exists()
    finally:
        hub.close()
