"""What a training shows while it runs."""

import pytest
import transformers.trainer
from tiny import make_model
from tiny_runs import Images, arguments
from transformers import TrainerCallback

from hf_mim.pretraining.progress import MIMProgress, duration, facts_of
from hf_mim.pretraining.trainer import MIMTrainer


class NotebookProgressCallback(TrainerCallback):
    """A stand-in for that of transformers, which needs IPython."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        print(f"a table of transformers: {logs}")


def shown(tmp_path, capsys, disable_tqdm=False, **settings):
    model = make_model("mae")
    args = arguments(tmp_path, max_steps=3, logging_steps=1, **settings)
    args.disable_tqdm = disable_tqdm
    trainer = MIMTrainer(model, args, Images(model))
    trainer.train()
    assert sum(isinstance(callback, MIMProgress) for callback in trainer.callback_handler.callbacks) == 1
    return capsys.readouterr()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_without_a_terminal_each_log_is_one_plain_line(tmp_path, capsys, disable_tqdm):
    told = shown(tmp_path, capsys, disable_tqdm)
    first, second, third, end = told.out.splitlines()
    assert first.startswith("step 1 of 3 · loss ") and "left" not in first, "nothing was measured yet"
    for part in ("step 2 of 3 · loss ", " · rate ", " images/s · ", " % waiting · ", " left"):
        assert part in second
    assert third.startswith("step 3 of 3 · loss ") and end.startswith("step 3 of 3 · trained for ")
    assert "{" not in told.out and "it/s" not in told.err


@pytest.mark.parametrize("notebook", [False, True])
def test_who_watches_sees_one_bar_and_no_dictionaries(tmp_path, capsys, monkeypatch, notebook):
    monkeypatch.setattr("hf_mim.pretraining.progress.watched", lambda: True)
    if notebook:
        monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    told = shown(tmp_path, capsys)
    last = told.err.split("\r")[-1]
    assert told.err.count("\n") == 1, "one bar, which is written over"
    assert last.startswith("step 3 of 3 ") and "loss " in last and "images/s" in last
    assert told.out == "" and "{" not in told.err


def test_a_user_keeps_a_callback_of_the_same_kind(tmp_path):
    mine = transformers.ProgressCallback()
    args = arguments(tmp_path)
    args.disable_tqdm = False
    model = make_model("mae")
    trainer = MIMTrainer(model, args, Images(model), callbacks=[mine])
    kinds = [type(one) for one in trainer.callback_handler.callbacks if isinstance(one, transformers.ProgressCallback)]
    assert mine in trainer.callback_handler.callbacks and kinds == [transformers.ProgressCallback, MIMProgress]


def test_a_log_in_words():
    step = {"loss": 0.51239, "learning_rate": 9.4e-6, "images_per_second": 1171.4, "data_wait_share": 0.021}
    assert facts_of(step) == ["loss 0.5124", "rate 9.4e-6", "1,171 images/s", "2 % waiting"]
    assert facts_of({"probe_knn": 0.4512, "probe_rank_me": 12.34}) == ["probe: k-NN 45.1 %", "RankMe 12.3"]
    assert facts_of({"probe_rank_me": 12.34}) == ["probe: RankMe 12.3"]
    assert facts_of({"eval_loss": 1.25, "eval_runtime": 3}) == ["eval_loss 1.25"]
    assert facts_of({"skipped_steps": 2}) == ["2 skipped steps"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.3, "0.3 s"), (59, "59 s"), (100, "2 min"), (5400, "1.5 h"), (147 * 3100, "5.3 days"), (3e6, "35 days")],
)
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words
