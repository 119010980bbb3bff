"""Runs of a few seconds."""

from hf_mim.cli import main, pretrain
from hf_mim.pretraining.recipe import Recipe

SMALL = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --per_device_train_batch_size 32 --use_cpu".split()
)


def run(*arguments):
    assert main(["pretrain", *map(str, arguments)]) == 0


def read_recipe(arguments) -> Recipe:
    """The recipe that a command line asks for."""
    words, values = pretrain.command.read(arguments)
    return Recipe.read(words[0] if words else None, values)
