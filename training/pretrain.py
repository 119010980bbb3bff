"""Pretrain a model on images: `hf-mim pretrain` as a script, for launchers and for copying.

    python training/pretrain.py training/recipes/digits_mae.yaml
    torchrun --nproc_per_node 8 training/pretrain.py training/recipes/imagenet_mae.yaml --dataset /path/to/imagenet
    accelerate launch training/pretrain.py training/recipes/cifar10_mae.yaml --dataset /path/to/cifar10

For data, a model or masks of your own, use the parts instead. `hf_mim/pretraining/run.py` shows how `Pretraining` puts
them together; the core is

    trainer = MIMTrainer(model, MIMTrainingArguments(output_dir=...), train_dataset=images, augment=DeviceAugment())
    trainer.train()
"""

import sys

from hf_mim.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
