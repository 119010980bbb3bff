"""How a training run goes to the Hub: weights, config, image processor and our card together, by any `hub_strategy`.

An upload that fails is a warning that says how to make up for it; the run goes on, and its folder is whole.
"""

import shlex
import shutil
from concurrent import futures
from pathlib import Path

from huggingface_hub import set_client_factory, upload_folder
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import _http
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_mim.hub.card import write_card
from hf_mim.run_folder import CHECKPOINT

logger = logging.get_logger(__name__)

# The base of all errors of the HTTP client, which was another one in each major version of huggingface_hub.
HTTPError = HfHubHTTPError.__bases__[0]
# What an upload meets: refusals and failures of the server, no network, no token, a name that cannot be (ValueError).
UPLOAD_ERRORS = (HTTPError, ConnectionError, LocalTokenNotFoundError, ValueError)
BUSY = (408, 429)  # of 400 to 499, where the user is at fault, those that pass
SILENCE = 60  # seconds that the Hub may say nothing; by default the client waits for ever
LONGEST_WAIT = 1800  # seconds for uploads in the background, before the next one or the end
# As by Trainer, and its pickled arguments, which name folders of this machine and which loading a model needs not.
NOT_UPLOADED = ["_*", f"{CHECKPOINT}*", "training_args.bin"]
# What a checkpoint of Trainer has for a model's users; the rest is for resuming.
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


class HubTrainer:
    """Goes before `transformers.Trainer` among a trainer's bases."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Makes the repository. Trainer calls it before anything is trained, and each push again until it is there.

        Raises:
            ValueError: a name or a token that the Hub refuses. A Hub that does not answer is only a warning before the
                training, and the client's own error later.
        """
        self.push_in_progress = None
        end_silence()
        try:
            super().init_hf_repo(token, private)
        except UPLOAD_ERRORS as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if (400 <= status < 500 and status not in BUSY) or not isinstance(error, HTTPError | ConnectionError):
                raise ValueError(f"hub_model_id {self._repo_name()} cannot be had: {_first_line(error)}") from error
            if hasattr(self, "state"):
                raise
            logger.warning(f"The Hub does not answer ({_first_line(error)}); each upload tries again")

    def create_model_card(self, license: str | None = None, **kwargs):
        """Our card, from what the folder holds, in place of Trainer's, which knows a fine-tuned text model only.

        `kwargs` are what Trainer would put into its own.
        """
        if not self.is_world_process_zero():
            return
        try:
            write_card(self.args.output_dir, self.hub_model_id or self.args.hub_model_id, license)
        except (ValueError, OSError) as error:  # a file beside the checkpoint is damaged: the checkpoint is good
            logger.warning(f"There is no model card: {_first_line(error)}")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As Trainer's: saves the model and puts up the folder without its checkpoints. To be called on every process.

        The folder is complete before anything is sent. Returns None where the upload failed; `kwargs` as for
        `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.save_state()
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self._finish_current_push()
            return self._upload(
                self.args.output_dir,
                commit_message,
                token=token or self.args.hub_token,
                run_as_future=not blocking,
                ignore_patterns=NOT_UPLOADED,
                revision=revision or self.args.hub_revision,
            )
        except UPLOAD_ERRORS as error:
            self._warn(error)
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """As Trainer's, of the folder with the weights of this checkpoint and a card of this moment.

        A checkpoint that goes up too (`hub_strategy`) goes up whole: a run is resumed from it.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            self._finish_current_push()  # of a checkpoint that `save_total_limit` is about to delete
        push = self.push_in_progress
        if push is not None and not push.is_done() and not self.args.hub_always_push:
            return
        self._tell_failures()
        for pattern in MODEL_FILES:
            for path in Path(checkpoint_folder).glob(pattern):
                shutil.copy(path, self.args.output_dir)
        self.save_state()
        self.create_model_card()
        try:
            if self.hub_model_id is None:
                self.init_hf_repo()
            message = f"Training in progress, step {self.state.global_step}"
            jobs = [self._upload(self.args.output_dir, message, run_as_future=True, ignore_patterns=NOT_UPLOADED)]
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                name = "last-checkpoint" if last else Path(checkpoint_folder).name
                message += ", checkpoint"
                jobs.append(self._upload(checkpoint_folder, message, run_as_future=True, path_in_repo=name))
            self.push_in_progress = PushInProgress([*getattr(self.push_in_progress, "jobs", []), *jobs])
        except UPLOAD_ERRORS as error:
            self._warn(error)

    def _upload(self, folder: str, message: str, **kwargs):
        settings = {"token": self.args.hub_token, "revision": self.args.hub_revision} | kwargs
        return upload_folder(repo_id=self.hub_model_id, folder_path=folder, commit_message=message, **settings)

    def _finish_current_push(self):
        """Waits for uploads in the background, but not for ever."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        late = futures.wait(push.jobs, LONGEST_WAIT).not_done
        push.jobs = [job for job in push.jobs if job not in late]
        self._tell_failures()
        if late:
            for job in late:
                job.cancel()  # those that have not begun
            self._warn(TimeoutError(f"not done after {LONGEST_WAIT} seconds"))

    def _tell_failures(self):
        """Uploads in the background keep their errors to themselves."""
        push = getattr(self, "push_in_progress", None)
        if push is None or not push.is_done():
            return
        for error in filter(None, (job.exception() for job in push.jobs)):
            self._warn(error)
        self.push_in_progress = None

    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _warn(self, error: BaseException):
        if not self.is_world_process_zero():
            return
        words = ["hf", "upload", self._repo_name(), str(self.args.output_dir), "."]
        words += [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
        words += ["--private"] if self.args.hub_private_repo else []
        words += ["--revision", self.args.hub_revision] if self.args.hub_revision else []
        logger.warning(
            f"The upload to {self._repo_name()} failed ({_first_line(error)}); nothing is lost, and this repeats it: "
            f"{shlex.join(words)}"
        )


def end_silence():
    """From now on the Hub's client gives up after `SILENCE` seconds without a byte; other limits are kept."""
    make_client = _http._GLOBAL_CLIENT_FACTORY  # the user's, perhaps for a proxy; there is no public way to it
    if getattr(make_client, "ends_silence", False):
        return

    def client():
        client = make_client()
        if client.timeout.read is None:
            client.timeout = SILENCE
        return client

    client.ends_silence = True
    set_client_factory(client)


def _first_line(error: BaseException) -> str:
    """What happened, without the client's advice on later lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
