"""What a Hub that is slow, busy or silent does to a trainer: a warning, in this process."""

import io
import os
import pickle
import signal
import socket
import threading
import time
import types
from concurrent import futures
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi, get_session, set_client_factory
from huggingface_hub.utils import _http, filter_repo_objects
from tiny_runs import arguments

from hf_mim.files import new_folder, replacing
from hf_mim.hub.push import NOT_UPLOADED, SILENCE, UNFINISHED, HubTrainer, end_silence
from hf_mim.pretraining.signals import Ended, ended_at_once


def test_pickled_arguments_hold_no_token(tmp_path):
    args = arguments(tmp_path, hub_token="hf_secret", max_steps=3)
    file = io.BytesIO()
    torch.save(args, file)
    assert b"hf_secret" not in file.getvalue()
    copy = pickle.loads(pickle.dumps(args))
    assert (copy.hub_token, copy.max_steps, args.hub_token) == (None, 3, "hf_secret")


class Refused(HubTrainer):
    """As if an upload had been refused."""

    def __init__(self, folder, **settings):
        settings = {"hub_private_repo": None, "hub_revision": None, "hub_token": None} | settings
        self.args = types.SimpleNamespace(output_dir=folder, hub_model_id="me/my model", **settings)
        self.hub_model_id = None

    def is_world_process_zero(self):
        return True


@pytest.fixture
def told(monkeypatch):
    """Warnings."""
    told = []
    monkeypatch.setattr("hf_mim.hub.push.logger.warning", told.append)
    return told


def test_the_warning_is_one_line_that_can_be_pasted(tmp_path, told):
    Refused(tmp_path / "a run")._warn(ValueError("500 for url\nFor more information see"))
    Refused(tmp_path, hub_private_repo=True, hub_revision="a branch")._warn(ValueError("x"))
    line, private = told
    assert "\n" not in line and "(500 for url)" in line
    excluded = (
        " --exclude '_*' --exclude '*/_*' --exclude '.*.partial/*' --exclude 'checkpoint-*' --exclude training_args.bin"
        " --exclude 'runs/*' --exclude '*tfevents*'"
    )
    assert line.endswith(f"hf upload 'me/my model' '{tmp_path}/a run' .{excluded}")
    assert private.endswith(f"{excluded} --private --revision 'a branch'")


def test_what_other_processes_write_beside_a_run_is_not_uploaded(tmp_path):
    kept = ["model.safetensors", "results/knn.json", "results/checkpoint-3/knn.json"]
    (tmp_path / "results").mkdir()
    with replacing(tmp_path / "results/knn.json") as result, new_folder(tmp_path / "timm") as export:
        result.touch()
        names = [str(path.relative_to(tmp_path)) for path in (result, export / "model.safetensors")]
    assert list(filter_repo_objects([*kept, *names, "_lock"], ignore_patterns=NOT_UPLOADED)) == kept
    assert list(filter_repo_objects([*kept, *names, "_lock"], ignore_patterns=UNFINISHED)) == kept


class Trainer:
    """What is asked of transformers' at its start."""

    def init_hf_repo(self, token=None, private=None):
        HfApi(self.endpoint, "hf_dummy").create_repo("tester/name", exist_ok=True)


class Started(Refused, Trainer):
    pass


@pytest.fixture
def usual_client():
    """The client of the Hub as it was."""
    before = _http._GLOBAL_CLIENT_FACTORY
    yield
    set_client_factory(before)


def test_a_hub_that_accepts_but_never_answers_is_a_warning(tmp_path, told, monkeypatch, usual_client):
    monkeypatch.setattr("hf_mim.hub.push.SILENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        trainer = Started(tmp_path)
        trainer.endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        trainer.init_hf_repo()
        trainer.init_hf_repo()
    assert len(told) == 2 and all("does not answer (" in line for line in told)


def test_a_client_with_a_limit_of_its_own_keeps_it(usual_client):
    end_silence()
    assert get_session().timeout.read == get_session().timeout.connect == SILENCE
    ours = _http._GLOBAL_CLIENT_FACTORY
    end_silence()
    assert _http._GLOBAL_CLIENT_FACTORY is ours

    def client():
        client = _http.default_client_factory()
        client.timeout = 7
        return client

    set_client_factory(client)
    end_silence()
    assert get_session().timeout.read == 7


@pytest.mark.parametrize("status", [408, 429, 503])
def test_a_hub_that_is_busy_at_the_start_is_a_warning(hub, status, tmp_path, told, usual_client):
    hub.failing, trainer = status, Started(tmp_path)
    trainer.endpoint = hub.address
    trainer.init_hf_repo()
    assert len(told) == 1 and str(status) in told[0]
    hub.failing = 403
    with pytest.raises(ValueError, match="cannot be used"):
        trainer.init_hf_repo()


def test_the_wait_for_an_upload_has_an_end(tmp_path, told, monkeypatch):
    monkeypatch.setattr("hf_mim.hub.push.LONGEST_WAIT", 0.05)
    trainer, failed, never = Refused(tmp_path), futures.Future(), futures.Future()
    failed.set_exception(ValueError("refused"))
    trainer.uploads = (failed, never)
    trainer._finish_current_push()
    assert ["refused" in line for line in told] == [True, False] and "not done after 0.05 seconds" in told[1]
    assert trainer.uploads == () and never.cancelled()


class Ending(Refused):
    """A signal asks it to end."""

    is_ending = True


def test_a_run_that_is_to_end_waits_for_no_upload_and_begins_none(tmp_path, told):
    trainer, never = Ending(tmp_path, hub_strategy="checkpoint"), futures.Future()
    trainer.uploads, begun = (never,), time.monotonic()
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert trainer.uploads == (never,) and not told
    trainer._finish_current_push()
    assert time.monotonic() - begun < 0.4 and "failed (a signal has ended it)" in told[0]


def test_a_signal_ends_the_last_upload_at_once(tmp_path, told):
    """Threads of the client may wait for the Hub for long; the main thread does not."""
    trainer = Refused(tmp_path)
    trainer.callback_handler, trainer.state, trainer.control = mock.Mock(), None, None
    trainer.save_model = trainer.save_state = trainer.create_model_card = trainer.init_hf_repo = mock.Mock()
    trainer._message = mock.Mock(return_value="MAE, step 3 of 3")
    over = threading.Event()
    trainer._upload = mock.Mock(side_effect=lambda *words, **more: over.wait(20))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Ended), ended_at_once():
        trainer.push_to_hub()
    assert not over.is_set() and not told
    over.set()
    assert trainer.push_to_hub() is True and not trainer._upload.call_args.kwargs["run_as_future"]
    assert trainer.push_to_hub(blocking=False) is True and trainer._upload.call_args.kwargs["run_as_future"]


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path, told, monkeypatch):
    def write_card(*arguments):
        raise PermissionError("README.md: denied")

    monkeypatch.setattr("hf_mim.hub.push.write_card", write_card)
    Refused(tmp_path).create_model_card()
    assert told == ["There is no model card: README.md: denied"]
