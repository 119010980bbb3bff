"""A signal or a time-out ends a run that waits for images, at the last whole step."""

import os
import signal
import threading
import time

import pytest
import torch
from tiny import make_model
from tiny_runs import Images, arguments, snapshot

from hf_mim.pretraining import signals
from hf_mim.pretraining.checkpoints import newest_whole
from hf_mim.pretraining.signals import Ended, Listener, NoImagesError, ended_at_once
from hf_mim.pretraining.trainer import MIMTrainer, check_shared_memory

TWO_STEPS = dict(max_steps=6, logging_steps=1, train_sampling_strategy="sequential", save_strategy="no")


class Stalling(Images):
    """The source does not answer when it is asked for image `at`. One batch is read ahead of its step."""

    def __init__(self, model, at, then=None):
        super().__init__(model, 32)
        self.at, self.then = at, then

    def __getitem__(self, index):
        if index == self.at:
            if self.then:
                self.then()
            time.sleep(60)
        return super().__getitem__(index)


def ask(number):
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_run_that_waits_for_images_at_its_last_whole_step(tmp_path, monkeypatch, number):
    monkeypatch.setattr(signals, "GRACE", 0.2)
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    model = make_model("latent_mim")
    trainer = MIMTrainer(model, arguments(tmp_path, **TWO_STEPS), Stalling(model, 12, lambda: ask(number)))
    trainer.train()
    assert trainer.guard.signal == number and trainer.state.global_step == 2
    assert newest_whole(tmp_path).name == "checkpoint-2"

    through, resumed = make_model("latent_mim"), make_model("latent_mim")
    MIMTrainer(through, arguments(tmp_path / "through", **TWO_STEPS), Images(through, 32)).train()
    MIMTrainer(resumed, arguments(tmp_path, **TWO_STEPS), Images(resumed, 32)).train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(through), snapshot(resumed), strict=True))


def test_images_that_do_not_come_end_the_run_with_a_checkpoint(tmp_path):
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, data_timeout=0.5, **TWO_STEPS), Stalling(model, 12))
    with pytest.raises(NoImagesError, match="no images came for 0.5 s .*shared memory"):
        trainer.train()
    assert newest_whole(tmp_path).name == "checkpoint-2"


def test_the_first_images_may_take_longer_than_the_timeout():
    listener = Listener(timeout=0.1)
    with listener.listening(), listener.waiting():
        time.sleep(1.5)


def test_a_wait_that_is_too_long_is_told(monkeypatch, caplog):
    monkeypatch.setattr(signals, "PATIENCE", 0.1)
    listener = Listener(timeout=60)
    with listener.listening(), listener.waiting():
        time.sleep(1.5)
    assert len(caplog.messages) == 1 and "No images have come" in caplog.text and "/dev/shm" in caplog.text


def test_a_signal_while_nothing_waits_is_only_noted():
    listener = Listener(timeout=60)
    with listener.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert listener.asked == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_at_once():
            os.kill(os.getpid(), signal.SIGHUP)
        listener = Listener(timeout=60)
        with listener.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert listener.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_training_a_signal_ends_the_process_at_once():
    with pytest.raises(Ended) as error, ended_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert error.value.signal == signal.SIGTERM
    assert not isinstance(error.value, Exception)  # no library catches it as an error of its own
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_batches_that_do_not_fit_into_shared_memory_are_refused_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mim.pretraining.trainer.free_shared_memory", lambda: 8 * 2**20)
    args = arguments(tmp_path, per_device_train_batch_size=4, dataloader_num_workers=2)
    check_shared_memory(args, 2**19)  # 2 workers × 2 batches × 4 images × half a MiB
    with pytest.raises(ValueError, match="dataloader_num_workers must be smaller than 2, or 0: 4 batches .* 10 MiB"):
        check_shared_memory(args, 2**19 * 5 // 4)
    check_shared_memory(arguments(tmp_path, dataloader_num_workers=0), 2**40)


class Freed:
    """Python drops what is raised while it frees this."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def test_a_signal_whose_exception_python_drops_is_sent_again(capsys):
    begun = time.monotonic()
    with pytest.raises(Ended), ended_at_once():
        freed = Freed()
        del freed
        time.sleep(10)
    assert time.monotonic() - begun < 5 and "Traceback" not in capsys.readouterr().err


def test_a_second_signal_does_not_interrupt_what_ends(capsys):
    cleaned = False
    with pytest.raises(Ended), ended_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            freed = Failing()
            del freed
            cleaned = True
    assert cleaned and "Traceback" not in capsys.readouterr().err


class Failing:
    """As data workers that the signal has reached too."""

    def __del__(self):
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")


def test_a_process_that_was_forked_just_now_leaves_the_signal_to_the_other():
    with ended_at_once():
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_process_whose_thread_still_waits_ends_where_it_is(monkeypatch, capsys):
    statuses = []
    monkeypatch.setattr(signals, "LONGEST_END", 0.2)
    monkeypatch.setattr(os, "_exit", statuses.append)
    with pytest.raises(Ended), ended_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            time.sleep(1.2)
    assert statuses and set(statuses) == {75} and "SIGTERM has ended the process" in capsys.readouterr().err


def test_a_signal_after_the_last_step_ends_the_run_too(tmp_path):
    """While the trainer waits for its uploads."""
    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(tmp_path, max_steps=2), Images(model))
    trainer._finish_current_push = lambda: os.kill(os.getpid(), signal.SIGTERM)
    trainer.train()
    assert trainer.guard.signal == signal.SIGTERM and trainer.state.global_step == 2
