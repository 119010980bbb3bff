"""The options of transformers' `TrainingArguments` that a run does not take, each with the reason.

All others work: docs/trainer_options.md lists them with their tests.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_mim.checks import one_of
from hf_mim.pretraining.settings import default_of, suggestion

FOR_TEXT = "it is for language models"
# Name → why it must keep its default.
REFUSED = {
    "auto_find_batch_size": "it starts again with another batch size but with the weights and the rate of before; "
    "hf-mim plan tells what fits into the memory",
    "average_tokens_across_devices": FOR_TEXT,
    "bf16_full_eval": "eval_loss is measured in the precision of the training",
    "dataloader_in_order": "a resume needs the images in the same order as before",
    "deepspeed": "FSDP2 shards a run (docs/scaling.md)",
    "do_eval": "eval_strategy asks for evaluations",
    "do_predict": "only scripts of transformers read it",
    "do_train": "only scripts of transformers read it",
    "enable_jit_checkpoint": "SIGTERM and SIGINT always save a checkpoint here",
    "eval_use_gather_object": "it is for outputs that are no tensors, and takes tensors apart",
    "fp16_full_eval": "eval_loss is measured in the precision of the training",
    "ignore_data_skip": "a resumed run goes on with the images at which it stopped",
    "include_num_input_tokens_seen": FOR_TEXT,
    "label_smoothing_factor": "pretraining has no labels",
    "length_column_name": FOR_TEXT,
    "liger_kernel_config": FOR_TEXT,
    "local_rank": "the launcher sets it (torchrun, accelerate launch)",
    "logging_nan_inf_filter": "it waits for the device at each step; losses that are not finite are left out of the "
    "logged means without it",
    "lr_scheduler_kwargs": "start_lr_ratio, final_lr_ratio and decay_steps shape the schedule",
    "neftune_noise_alpha": FOR_TEXT,
    "optim_target_modules": "GaLore and APOLLO, which read it, decay other parameters than the recipes do",
    "parallelism_config": "FSDP2 alone splits a model (docs/scaling.md)",
    "remove_unused_columns": "the names of the images and the keys of their augmentation would be lost",
    "resume_from_checkpoint": "give it to MIMTrainer.train, or --resume to hf-mim pretrain",
    "save_on_each_node": "the first process writes the checkpoints, into a folder that all nodes share",
    "use_cache": FOR_TEXT,
    "use_liger_kernel": FOR_TEXT,
}
# Name → why it must keep its default in a recipe and on the command line. In Python it works.
PYTHON_ONLY = dict.fromkeys(
    (
        "batch_eval_metrics",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "include_for_metrics",
        "label_names",
        "prediction_loss_only",
    ),
    "it is about what a compute_metrics function gets, and only Python can give one",
)
PYTHON_ONLY["restore_callback_states_from_checkpoint"] = "only a callback that Python gives has a state to restore"

# The beginning of an optimizer's name → why it is refused.
OPTIMIZERS = {
    ("galore", "apollo"): "it decays other parameters than the recipes do",
    ("lomo", "adalomo"): "it steps before it is known whether the gradient is finite",
    ("schedule_free",): "it replaces the schedule of the recipes",
}
# Name in accelerator_config → (what it must be, why).
ACCELERATOR = {
    "split_batches": ((False,), "per_device_train_batch_size counts the images of one process"),
    "dispatch_batches": ((False, None), "each process reads its own images"),
    "use_seedable_sampler": ((True,), "the order of the images follows from data_seed"),
}


def check_options(cls: type, given: Mapping[str, Any], reasons: Mapping[str, str]):
    """Raise a ValueError of one line for the first option that has a reason to keep the default of `cls` and does not.

    Values may be text, as in a command line.
    """
    defaults = {field.name: default_of(field) for field in dataclasses.fields(cls)}
    for name, value in given.items():
        value = getattr(value, "value", value)  # of an enum
        if name in reasons and str(value).lower() != str(defaults[name]).lower():
            raise ValueError(f"{name} must stay {defaults[name]!r}, not {value!r}: {reasons[name]}")


def check_arguments(args):
    """Raise a ValueError of one line for what must keep its default, and for values that would do nothing or harm."""
    asks_by_strategy = args.eval_strategy != "no"  # then transformers sets do_eval, and a copy of `args` has it
    given = {name: getattr(args, name) for name in REFUSED if not (name == "do_eval" and asks_by_strategy)}
    check_options(type(args), given, REFUSED)
    for name in ("log_level", "log_level_replica", "dataloader_multiprocessing_context"):
        one_of(args.__dataclass_fields__[name].metadata["choices"], **{name: getattr(args, name)})
    one_of(("random", "sequential"), train_sampling_strategy=args.train_sampling_strategy)  # images have no length
    if "tpu" in str(args.debug):
        raise ValueError("debug must be underflow_overflow: tpu_metrics_debug needs a TPU")
    optim = getattr(args.optim, "value", args.optim)
    for beginnings, reason in OPTIMIZERS.items():
        if optim.startswith(beginnings):
            raise ValueError(f"optim must not be {optim}: {reason}")
    if args.ddp_static_graph and args.gradient_accumulation_steps > 1:
        raise ValueError("ddp_static_graph must stay None with gradient_accumulation_steps: torch fails with both")
    if isinstance(args.accelerator_config, dict):
        known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
        for name in args.accelerator_config.keys() - known:
            raise ValueError(f"accelerator_config has no {name}{suggestion(name, known)}")


def check_accelerator(config: AcceleratorConfig):
    """Raise a ValueError of one line for what would change the images of a step, or their order."""
    for name, (right, reason) in ACCELERATOR.items():
        if (value := getattr(config, name)) not in right:
            raise ValueError(f"accelerator_config: {name} must stay {right[0]}, not {value!r}: {reason}")
    if (config.gradient_accumulation_kwargs or {}).get("num_steps", 1) != 1:
        raise ValueError("accelerator_config must not have num_steps; give gradient_accumulation_steps")


def check_optimizer(args, model):
    """Raise an ImportError if the optimizer needs a package that is missing, a ValueError if `optim_args` does nothing.

    Trainer would find out only after the training has begun.
    """
    given = args.optim_args
    settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if given and "weight_decay" in given:
        raise ValueError(f"optim_args must not have weight_decay, got {given!r}; give it as weight_decay")
    args.optim_args = None
    without = Trainer.get_optimizer_cls_and_kwargs(args, model)
    args.optim_args = given
    if given and settings == without:
        raise ValueError(f"optim_args must be what optim {args.optim.value} reads; {given!r} changes nothing")
