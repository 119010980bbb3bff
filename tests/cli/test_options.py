"""How every command reads its options: spellings, suggestions, what is missing, `--help`; each mistake is one line."""

import json
import subprocess
import sys

import pytest

from hf_mim import __version__, methods
from hf_mim.cli import main, split_imports
from hf_mim.cli.convert import command as convert
from hf_mim.cli.export import settings as export_settings
from hf_mim.hub.export import WRITERS
from hf_mim.pretraining.settings import choices


def fails_with(capsys, line: str) -> str:
    """The one line on stderr of a command that must fail."""
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return err.removeprefix("error: ").rstrip()


COMMANDS = (
    "recipes, plan, benchmark, prepare, cache, pretrain, runs, compare, report, evaluate, predict, show, demo, embed, "
)
COMMANDS += "search, convert, export, card"
PROTOCOLS = "knn, leave_one_out, linear, attentive, lowshot, finetune, segment, propagate, local, health"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", f"unknown command train; did you mean pretrain? There is {COMMANDS}"),
        ("help", f"unknown command help; there is {COMMANDS}"),
        ("--verbose", f"unknown command --verbose; there is {COMMANDS}"),
        ("evaluate knnn ckpt", f"protocol must be one of {PROTOCOLS}, not knnn; did you mean knn?"),
        ("evaluate --dataset digits", "evaluate needs a protocol first: hf-mim evaluate PROTOCOL CHECKPOINT"),
        ("benchmark steps", "benchmark must be one of step, data, evaluate, not steps; did you mean step?"),
        ("benchmark data", "benchmark data needs one SOURCE, not none"),
        # What people type who come from other programs.
        ("pretrain --lr 1e-3", "unknown argument lr; did you mean base_lr or learning_rate?"),
        ("pretrain -lr 1e-3", "unknown argument lr; did you mean base_lr or learning_rate?"),
        ("pretrain --batch-size=8", "unknown argument batch_size; did you mean per_device_train_batch_size?"),
        ("pretrain --workers 4", "unknown argument workers; did you mean dataloader_num_workers?"),
        ("pretrain --num_workers 4", "unknown argument num_workers; did you mean dataloader_num_workers?"),
        ("pretrain --device cpu", "unknown argument device; did you mean use_cpu?"),
        ("pretrain --init owner/name", "unknown argument init; did you mean init_from?"),
        (
            "pretrain --resume_from_checkpoint x",
            "resume_from_checkpoint must stay None, not 'x': "
            "give it to MIMTrainer.train, or --resume to hf-mim pretrain",
        ),
        ("pretrain --do_train", "do_train must stay False, not 'true': only scripts of transformers read it"),
        ("pretrain --do_trai", "unknown argument do_trai"),
        ("pretrain --epochs 3", "unknown argument epochs; did you mean num_train_epochs?"),
        ("pretrain --arch vit_base", "unknown argument arch; did you mean method or size?"),
        ("pretrain --data folder", "unknown argument data; did you mean dataset?"),
        ("pretrain --no-knn", "unknown argument no_knn; did you mean knn?"),
        ("pretrain --zzzz 1", "unknown argument zzzz"),
        ("pretrain --=3", "unknown argument --"),
        ("evaluate knn ckpt --batch_size 4", "knn has no option batch_size; did you mean extract_batch_size?"),
        ("evaluate knn ckpt --workers 4", "knn has no option workers; did you mean num_workers?"),
        ("evaluate linear ckpt --lr 1", "linear has no option lr; did you mean learning_rates?"),
        (
            "evaluate finetune ckpt --num_train_epochs 1",
            "finetune has no option num_train_epochs; did you mean epochs?",
        ),
        ("evaluate local ckpt --dataset digits", "local has no option dataset"),
        ("convert a b --force", "convert has no option force; there is method and prefix and set"),
        ("convert a b --methd mae", "convert has no option methd; did you mean method?"),
        ("export a b --too timm", "export has no option too; did you mean to?"),
        ("card a --licence mit", "card has no option licence; did you mean license?"),
        # What is missing or too much.
        ("pretrain --base_lr", "base_lr needs a value: a number"),
        ("pretrain --base_lr --knn false", "base_lr needs a value: a number"),
        ("pretrain --base_lr=", "base_lr must be a number, not ''"),
        ("pretrain --size", "size needs a value: one of tiny, small, base, large, huge, giant"),
        ("pretrain --optim", "optim needs a value"),
        ("pretrain --dataset", "dataset needs a value"),
        ("pretrain --bf16 maybe", "bf16 must be true or false or none, not 'maybe'"),
        ("pretrain --streaming=maybe", "streaming must be true or false, not 'maybe'"),
        ("pretrain --streaming maybe", "streaming must be true or false, not 'maybe'"),
        ("pretrain --streaming nothere.yaml", "there is no recipe nothere.yaml"),
        ("pretrain a.yaml b.yaml", "'b.yaml' is one argument too many after the recipe a.yaml"),
        ("evaluate knn", "evaluate knn needs one CHECKPOINT, not none"),
        ("evaluate knn a b --dataset digits", "evaluate knn needs one CHECKPOINT, not a and b"),
        ("evaluate knn a --k", "k needs a value: a whole number"),
        ("convert a", "convert needs SOURCE and DEST, not a"),
        ("convert a b c", "convert needs SOURCE and DEST, not a and b and c"),
        (
            "convert a b --method",
            f"method needs a value: one of {', '.join(methods.names())}",
        ),
        ("convert a b --set --method mae", "set needs a value: name=value"),
        ("convert a b --set x=1 --set y", "--set needs name=value, not 'y'"),
        ("export a b", "export needs --to transformers, timm, remote-code, onnx or space"),
        ("export a b --to", "to needs a value: one of transformers, timm, remote-code, onnx, space"),
        ("export --to timm", "export needs CHECKPOINT and DEST, not none"),
        ("card --license mit", "card needs one CHECKPOINT, not none"),
        ("card a --repo_id", "repo_id needs a value"),
        ("pretrain --import", "import needs a value: the name of a Python module"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_would_be_right(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fails_with(capsys, line) == message
    assert not list(tmp_path.iterdir())


def test_a_recipe_file_gets_the_suggestions_of_the_command_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("lr: 1e-3\n")
    message = "unknown argument lr; did you mean base_lr or learning_rate?"
    assert fails_with(capsys, f"pretrain {tmp_path}/recipe.yaml") == message


@pytest.mark.parametrize("line", ["", "--help", "-h", "evaluate", "evaluate -h knn", "convert", "export", "card -h"])
def test_help_is_asked_for_in_several_ways(line, capsys):
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: hf-mim") and err == ""


@pytest.mark.parametrize("line", ["pretrain --zzz 1 --help", "evaluate knn a b -h", "card --help --license"])
def test_help_wins_over_mistakes(line, capsys):
    assert main(line.split()) == 0
    assert capsys.readouterr().out.startswith("Usage: hf-mim")


def test_the_program_lists_its_commands_in_their_order(capsys):
    assert main([]) == 0
    rows = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert [row.split()[0] for row in rows if row.startswith("  ") and row[2] != " "] == COMMANDS.split(", ")


def test_choices_that_are_written_by_hand_are_all_that_there_are():
    method, *_ = convert.settings
    to, _ = export_settings()
    assert (choices(method.hint), choices(to.hint)) == (methods.names(), list(WRITERS))


def test_several_settings_may_follow_set_or_have_one_each():
    line = "--set a=1 b=2,3 --method=mae source --set=c=4 d=5 dest"
    words, values = convert.read(line.split())
    assert words == ["source", "dest"]
    assert values == {"method": "mae", "set": ("a=1", "b=2,3", "c=4", "d=5")}


def test_modules_to_import_are_taken_from_wherever_they_stand():
    line = "pretrain --import one --method x --import=two.three --seed 1"
    assert split_imports(line.split()) == (["pretrain", "--method", "x", "--seed", "1"], ["one", "two.three"])


def test_versions_are_told(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"hf-mim {__version__} (torch ") and "transformers 5" in out


def test_help_imports_neither_torch_nor_transformers():
    script = """
import json, resource, sys
from hf_mim.cli import main
status = [main(line.split()) for line in ("--help", "pretrain --help", "--version", "convert --help", "export --help")]
heavy = [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules]
print("\\n" + json.dumps([status, heavy, resource.getrusage(resource.RUSAGE_SELF).ru_utime]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    status, heavy, seconds = json.loads(done.stdout.splitlines()[-1])
    assert status == [0] * 5 and heavy == [] and seconds <= 1
