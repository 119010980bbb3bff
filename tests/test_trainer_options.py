"""Every option of transformers' TrainingArguments works here, or is refused with the reason: none is ignored.

    python tests/test_trainer_options.py    # writes docs/trainer_options.md from TESTS and the package's own tables

When transformers adds an option, `test_every_option_has_one_verdict` fails: write a test of its effect and name it in
`TESTS`, or refuse the option in `hf_mim/pretraining/trainer_options.py`.
"""

import ast
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny import make_model
from tiny_runs import Images, Stream, arguments
from transformers import TrainingArguments

from hf_mim.cli import main
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.settings import default_of
from hf_mim.pretraining.trainer import MIMTrainer
from hf_mim.pretraining.trainer_options import PYTHON_ONLY, REFUSED

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "trainer_options.md"
INTRODUCTION = """\
# The options of transformers' Trainer

`hf-mim pretrain` and `MIMTrainingArguments` take the options of `transformers.TrainingArguments`. These are all {} of
them. None is accepted and ignored: each works and has a test (in `tests/`) that fails without it, or is refused in one
line with the reason. Values that would do nothing or harm are refused in the same way, such as
`train_sampling_strategy group_by_length` (images have no length) and `fp16` on a CPU.

`tests/test_trainer_options.py` writes this page, and fails when transformers has an option that is not on it.

| option | | test, or the reason |
|---|---|---|
"""
# Test → the options of which it shows the effect.
TESTS = {
    "hub/test_push_options.py": {
        "test_a_push_waits_for_no_other_if_all_are_asked_for": "hub_always_push",
        "test_name_token_privacy_and_revision_reach_the_hub": "hub_model_id hub_private_repo hub_revision hub_token",
        "test_what_goes_up_is_what_the_strategy_says": "hub_strategy push_to_hub",
    },
    "test_checkpoints.py": {
        "test_a_run_leaves_whole_checkpoints_by_the_limit_and_nothing_else": "output_dir save_steps save_total_limit",
    },
    "test_distributed.py": {
        "test_ddp_takes_the_options_that_are_given_and_they_change_no_loss": (
            "ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph"
        ),
    },
    "test_options_of_results.py": {
        "test_checkpoints_are_saved_when_they_are_asked_for": "save_strategy",
        "test_compute_metrics_gets_predictions_and_targets_of_all_images": "include_for_metrics prediction_loss_only",
        "test_evaluations_come_when_they_are_asked_for": "eval_delay eval_on_start eval_steps eval_strategy",
        "test_logs_come_when_they_are_asked_for": "logging_first_step logging_steps logging_strategy",
        "test_metrics_can_be_computed_by_batches_and_predictions_kept_apart": (
            "batch_eval_metrics eval_do_concat_batches per_device_eval_batch_size"
        ),
        "test_only_the_loss_is_kept_unless_predictions_are_asked_for": "label_names",
        "test_predictions_leave_the_device_every_so_many_batches": "eval_accumulation_steps",
        "test_reports_go_to_each_of_the_places_that_are_named": "report_to",
        "test_reports_have_the_names_that_are_given": (
            "project run_name trackio_bucket_id trackio_space_id trackio_static_space_id"
        ),
        "test_the_best_checkpoint_by_the_measure_that_is_named_is_loaded_at_the_end": (
            "greater_is_better load_best_model_at_end metric_for_best_model"
        ),
        "test_the_level_of_logs_hangs_on_the_process": "log_level log_level_replica log_on_each_node",
        "test_the_state_of_a_callback_is_restored_if_that_is_asked_for": "restore_callback_states_from_checkpoint",
        "test_there_is_a_bar_unless_it_is_switched_off": "disable_tqdm",
    },
    "test_options_of_steps.py": {
        "test_a_gradient_is_clipped_to_the_norm_that_is_given": "max_grad_norm",
        "test_a_run_has_as_many_epochs_as_are_asked_for": "num_train_epochs",
        "test_activation_checkpointing_computes_layers_twice_and_changes_nothing": (
            "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
            "gradient_checkpointing_kwargs"
        ),
        "test_adamw_has_the_betas_and_the_epsilon_that_are_given": "adam_beta1 adam_beta2 adam_epsilon",
        "test_data_seed_decides_the_order_of_the_images_and_seed_the_masks": "data_seed seed",
        "test_device_backend_and_timeout_reach_the_process_group": "ddp_backend ddp_timeout use_cpu",
        "test_fsdp_is_set_up_as_fsdp_config_says": "fsdp fsdp_config",
        "test_full_determinism_is_asked_of_torch_with_the_seed": "full_determinism",
        "test_half_precisions_reach_the_accelerator": "bf16 fp16",
        "test_images_come_in_their_own_order_if_that_is_asked_for": (
            "per_device_train_batch_size train_sampling_strategy"
        ),
        "test_memory_is_measured_if_that_is_asked_for": "skip_memory_metrics",
        "test_memory_is_pinned_for_a_gpu_unless_that_is_refused": "dataloader_pin_memory",
        "test_tf32_is_switched_as_it_is_asked_for": "tf32",
        "test_the_accelerator_has_the_settings_that_are_given_and_each_rank_its_own_images": "accelerator_config",
        "test_the_cache_of_the_device_is_emptied_every_so_many_steps": "torch_empty_cache_steps",
        "test_the_loader_is_as_it_is_asked_for": (
            "dataloader_drop_last dataloader_multiprocessing_context dataloader_num_workers "
            "dataloader_persistent_workers dataloader_prefetch_factor"
        ),
        "test_the_optimizer_is_the_one_that_is_named_with_its_own_arguments": "optim optim_args",
        "test_the_search_for_overflows_names_the_layer_and_ends_the_run": "debug",
        "test_torch_compiles_with_the_backend_and_the_mode_that_are_given": (
            "torch_compile torch_compile_backend torch_compile_mode"
        ),
    },
    "test_rates.py": {
        "test_warmup_stable_decay_rises_stays_and_falls_and_takes_all_else_along": "lr_scheduler_type",
    },
    "test_resume_settings.py": {
        "test_a_run_that_saved_only_its_model_is_not_resumed": "save_only_model",
    },
    "test_trainer.py": {
        "test_base_lr_is_for_256_images_per_optimizer_step": "gradient_accumulation_steps",
        "test_explicit_learning_rate_wins": "learning_rate",
        "test_model_is_told_its_progress_once_before_each_step": "max_steps",
        "test_rates_and_decays_equal_their_formulas_at_every_step": "warmup_steps weight_decay",
    },
}
NOTES = {
    "dataloader_drop_last": "a stream has no last batch",
    "dataloader_persistent_workers": "those of a stream always stay",
    "dataloader_pin_memory": "off on a CPU",
    "ddp_backend": "one process needs none",
    "ddp_timeout": "transformers does not pass it on with `use_cpu`",
    "optim_args": "refused if it changes nothing",
}
SHOWN_BY = [
    (option, f"{file}::{test}")
    for file, tests in TESTS.items()
    for test, names in tests.items()
    for option in names.split()
]


def page() -> str:
    rows = {name: ("refused", f"stays {default(name)!r}: {reason}") for name, reason in REFUSED.items()}
    rows |= {name: ("works", f"`{test}`") for name, test in SHOWN_BY}
    rows |= {name: ("works", f"{rows[name][1]}; {note}") for name, note in NOTES.items()}
    for name, reason in PYTHON_ONLY.items():
        rows[name] = ("works in Python", f"{rows[name][1]}; refused in recipes: {reason}")
    return INTRODUCTION.format(len(rows)) + "".join(
        f"| `{name}` | {' | '.join(rows[name])} |\n" for name in sorted(rows)
    )


def default(name: str):
    return default_of(MIMTrainingArguments.__dataclass_fields__[name])


def test_every_option_has_one_verdict():
    verdicts = Counter([*(name for name, _ in SHOWN_BY), *REFUSED])
    assert [name for name, count in verdicts.items() if count > 1] == []
    assert verdicts.keys() == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not PYTHON_ONLY.keys() & REFUSED.keys()


def test_the_page_in_docs_is_made_from_these_tables():
    assert PAGE.read_text() == page()


def code_of(test: str) -> str:
    """The code of a test, and of all that it uses from its file and from the helpers."""
    path, name = test.split("::")
    sources, parts = [(HERE / file).read_text() for file in ("tiny_runs.py", "option_runs.py", path)], {}
    for node in (node for source in sources for node in ast.parse(source).body):
        targets = [node] if hasattr(node, "name") else getattr(node, "targets", [])
        parts |= {getattr(target, "name", getattr(target, "id", "")): node for target in targets}
    assert name in parts
    # What two ranks do is in a function that another process calls.
    todo, code = [name, *["train_ranks"] * ("train_ranks" in parts)], {}
    while todo:
        name = todo.pop()
        if name in parts and name not in code:
            code[name] = ast.unparse(parts[name])
            todo += [node.id for node in ast.walk(parts[name]) if isinstance(node, ast.Name)]
    return "\n".join(code.values())


@pytest.mark.parametrize(("option", "test"), SHOWN_BY)
def test_a_test_that_is_named_is_there_and_gives_the_option(option, test):
    assert re.search(rf"\b{option}\b", code_of(test))


# ---- what is refused


def another(name: str):
    """A value that an option does not have by default."""
    return {bool: not default(name), float: 0.5, int: 3}.get(type(default(name)), "other")


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_is_refused_tells_the_reason_in_one_line(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"{name} must stay {default(name)!r}, not {{!r}}: {REFUSED[name]}".format
    with pytest.raises(ValueError) as error:
        arguments(tmp_path, **{name: another(name)})
    assert str(error.value) == line(another(name))
    assert main(["pretrain", f"--{name}", str(another(name))]) == 2
    assert capsys.readouterr().err == f"error: {line(str(another(name)))}\n"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({name: another(name)}))
    with pytest.raises(ValueError) as error:
        Recipe.read("recipe.yaml", {})
    assert str(error.value) == line(another(name))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", PYTHON_ONLY)
def test_an_option_for_python_tells_so_in_one_line(name, capsys):
    assert main(["pretrain", f"--{name}", "other"]) == 2
    reason = f"error: {name} must stay {default(name)!r}, not 'other': {PYTHON_ONLY[name]}\n"
    assert capsys.readouterr().err == reason


def test_an_option_that_must_keep_its_default_may_be_given_with_it():
    given = {name: default(name) for name in REFUSED | PYTHON_ONLY}
    assert Recipe.resolve(given).training == Recipe.resolve().training
    as_text = {name: str(value).lower() for name, value in given.items()}
    assert Recipe.resolve(as_text).training == Recipe.resolve().training


def test_a_copy_of_arguments_is_accepted(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    assert args.do_eval and dataclasses.replace(args, seed=7).seed == 7  # transformers has set do_eval


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (dict(log_level="loud"), "log_level must be one of detail, debug, info, .* not 'loud'"),
        (dict(log_level_replica="loud"), "log_level_replica must be one of"),
        (
            dict(dataloader_multiprocessing_context="threads"),
            "dataloader_multiprocessing_context must be one of fork, ",
        ),
        (dict(train_sampling_strategy="group_by_length"), "train_sampling_strategy must be one of random, sequential"),
        (dict(debug="tpu_metrics_debug"), "debug must be underflow_overflow: tpu_metrics_debug needs a TPU"),
        (dict(optim="lomo"), "optim must not be lomo: it steps before"),
        (dict(optim="galore_adamw_8bit"), "optim must not be galore_adamw_8bit: it decays other parameters"),
        (dict(optim="schedule_free_sgd"), "optim must not be schedule_free_sgd: it replaces the schedule"),
        (dict(ddp_static_graph=True, gradient_accumulation_steps=2), "ddp_static_graph must stay None with"),
        (dict(fp16=True), "fp16 needs a GPU: "),
        (
            dict(accelerator_config={"split_batches": True}),
            "accelerator_config: split_batches must stay False, not True",
        ),
        (dict(accelerator_config={"dispatch_batches": True}), "accelerator_config: dispatch_batches must stay False"),
        (
            dict(accelerator_config={"use_seedable_sampler": False}),
            "accelerator_config: use_seedable_sampler must stay ",
        ),
        (
            dict(accelerator_config={"evenbatches": 1}),
            "accelerator_config has no evenbatches; did you mean even_batches?",
        ),
        (
            dict(accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}}),
            "accelerator_config must not have num_steps; give gradient_accumulation_steps",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_value_that_would_do_nothing_or_harm_is_refused(tmp_path, given, line):
    with pytest.raises(ValueError, match=f"^{line}") as error:
        arguments(tmp_path, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            dict(optim_args="momentum=0.9"),
            "optim_args must be what optim adamw_torch_fused reads; 'momentum=0.9' changes",
        ),
        (dict(optim="sgd", optim_args="mommentum=0.9"), "optim_args must be what optim sgd reads"),
        (dict(optim="sgd", optim_args="weight_decay=0.1"), "optim_args must not have weight_decay"),
        (dict(optim="adamw_8bit"), "You need to install `bitsandbytes`"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused_before_the_training(tmp_path, given, line, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises((ValueError, ImportError), match=f"^{line}"):
        MIMTrainer(make_model("mae"), arguments(tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_a_stream_has_its_own_order(tmp_path):
    model = make_model("mae")
    with pytest.raises(
        ValueError, match="^train_sampling_strategy must stay random for a train_dataset without a length"
    ):
        MIMTrainer(model, arguments(tmp_path, train_sampling_strategy="sequential"), Stream(Images(model)))


if __name__ == "__main__":
    PAGE.write_text(page())
