"""`hf-mim plan MODEL [--argument value ...]`: what a recipe needs on many devices."""

import json
from pathlib import Path

from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.cli.options import Command, Setting, settings_of
from hf_mim.cli.pretrain import settings as settings_of_runs

TEXT = """\
Plan a recipe on many devices: memory, traffic, time, loading. All is computed, not measured, and no GPU is needed.
MODEL is a recipe (a YAML file, or a name of hf-mim recipes) or a size (tiny ... giant), which means the ImageNet recipe
of --method with a model of that size. All arguments of hf-mim pretrain override the recipe.

\b
hf-mim plan imagenet_mae --devices 64 --images_per_step 4096
hf-mim plan huge --method stop_jepa --devices 512 --images_per_step 2048 --json plan.json
hf-mim plan giant --patch_size 14 --devices 8 --activation_checkpointing true"""


# What launchers call the devices.
OF_LAUNCHERS = ("nodes", "num_nodes", "nnodes", "gpus", "num_gpus", "gpus_per_node", "nproc_per_node", "world_size")


class Plan(Command):
    """Knows the words of launchers."""

    def unknown(self, option: str, args: list[str]) -> str:
        name = option.lstrip("-").replace("-", "_")
        if name not in OF_LAUNCHERS:
            return super().unknown(option, args)
        return (
            f"plan has no option {name}; give devices, the number of all, and devices_per_node (default: 8): two nodes "
            "of 8 are --devices 16"
        )


def settings() -> list[Setting]:
    from hf_mim.planning.plan import Cluster

    own = [
        *settings_of(Cluster, "the plan"),
        Setting("json", str, text="write the numbers here too", section="the plan"),
    ]
    return own + settings_of_runs()


def run(model: str, **given: str):
    with told_in_one_line("nothing was written"):
        from typing import get_type_hints

        from transformers.utils import logging

        from hf_mim.files import check_file, replacing
        from hf_mim.planning.plan import Cluster, plan, read_model
        from hf_mim.planning.table import table
        from hf_mim.pretraining.settings import to_type

        logging.set_verbosity_error()
        if given.get("link_gbps", ",").count(",") != 1:
            raise Mistake(
                "link_gbps must be two rates in Gbit/s, inside a node and between two, such as 3600,400, not "
                f"{given['link_gbps']}"
            )
        path, hints = given.pop("json", None), get_type_hints(Cluster)
        if path is not None:
            check_file(Path(path), "json")
        cluster = Cluster(**{name: to_type(name, given.pop(name), hints[name]) for name in hints if name in given})
        result = plan(read_model(model, given), cluster)
        if path is not None:
            with replacing(path) as file:
                file.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


SUMMARY = "what a recipe needs on many devices: memory, traffic, time"
command = Plan("plan", run, ("MODEL",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
