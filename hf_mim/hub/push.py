"""Uploads of a training run to the Hub: weights, config, image processor and our card together, by any `hub_strategy`.

If an upload fails, a warning gives the command that repeats it. The run goes on, and its folder is whole.
"""

import shlex
import shutil
import time
from concurrent import futures
from pathlib import Path

from huggingface_hub import constants, set_client_factory, upload_folder
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import _http
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_mim.files import PARTIAL, replacing
from hf_mim.hub.card import write_card
from hf_mim.hub.remote_code import add_code
from hf_mim.methods import of_config
from hf_mim.run_folder import CHECKPOINT, CONFIG

logger = logging.get_logger(__name__)

# The base of all errors of the HTTP client. Each major version of huggingface_hub uses another client.
HTTPError = HfHubHTTPError.__bases__[0]
# How an upload fails: the server refuses or breaks, no network, no token, a name that is no name (ValueError).
UPLOAD_ERRORS = (HTTPError, ConnectionError, LocalTokenNotFoundError, ValueError)
BUSY = (408, 429)  # 400 to 499 mean that the user is at fault, except these, which pass
SILENCE = 60  # seconds without a byte from the Hub; by default the client waits for ever
LONGEST_WAIT = 1800  # seconds for uploads in the background, before the next one or the end
LOOKS = 0.5  # seconds between two looks whether a signal asks to end
# Locks, files that another process is writing, and an export that is not whole yet.
UNFINISHED = ["_*", "*/_*", f".*{PARTIAL}/*"]
# What Trainer leaves out, its pickled arguments, which no model needs, and what reporting tools write: the names and
# first lines of TensorBoard's files tell the host and the folders of this machine.
NOT_UPLOADED = [*UNFINISHED, f"{CHECKPOINT}*", "training_args.bin", "runs/*", "*tfevents*"]
# The files of Trainer's checkpoint that users of the model need. The other files are for resuming.
MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


class HubTrainer:
    """A mixin that stands before `transformers.Trainer` among the bases. `uploads` are those in the background."""

    uploads: tuple[futures.Future, ...] = ()

    @property
    def is_ending(self) -> bool:
        """Whether a signal asks the training to end: then it waits for no upload, and begins none."""
        return False

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Make the repository. Trainer calls this before training, and each push again until the repository exists.

        Raises:
            ValueError: the Hub refuses the name or the token. If the Hub does not answer, that is only a warning before
                the training, and the client's own error later.
        """
        end_silence()
        try:
            super().init_hf_repo(token, private)
        except UPLOAD_ERRORS as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if (400 <= status < 500 and status not in BUSY) or not isinstance(error, HTTPError | ConnectionError):
                raise ValueError(f"hub_model_id {self._repo_name()} cannot be used: {_first_line(error)}") from error
            if hasattr(self, "state"):
                raise
            logger.warning(f"The Hub does not answer ({_first_line(error)}); each upload will try again")

    def create_model_card(self, license: str | None = None, **kwargs):
        """Write our card, from what the folder holds. Trainer's card is made for fine-tuned text models.

        `kwargs` are what Trainer would put into its own card; they are not used.
        """
        if not self.is_world_process_zero():
            return
        try:
            write_card(self.args.output_dir, self.hub_model_id or self.args.hub_model_id, license)
        except (ValueError, OSError) as error:  # a file beside the checkpoint is damaged; the checkpoint itself is good
            logger.warning(f"There is no model card: {_first_line(error)}")

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the model and upload the folder without its checkpoints, as Trainer does. Call it on every process.

        The folder is complete before anything is sent, with the model's code. The address is printed. Returns None if
        the upload failed. commit_message: default: the method, the step, and what goes up. `kwargs` go to
        `create_model_card`. What is raised while this waits, such as by a signal, ends the wait at once.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.save_state()
        self._complete(**kwargs)
        if not self.is_world_process_zero():
            return None
        commit_message = commit_message or self._message("weights, card, results and pictures")
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self._finish_current_push()
            settings = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
            settings |= {"run_as_future": not blocking, "ignore_patterns": NOT_UPLOADED}
            # In a thread: the client waits for its own threads before it lets an exception through.
            upload = futures.ThreadPoolExecutor(1).submit
            done = upload(self._upload, self.args.output_dir, commit_message, **settings).result()
            print(f"The model {'is' if blocking else 'goes'} up at {constants.ENDPOINT}/{self.hub_model_id}")
            return done
        except UPLOAD_ERRORS as error:
            self._warn(error)
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Upload the folder in the background, with the weights of this checkpoint and a card written now.

        If `hub_strategy` uploads the checkpoint too, all its files go, because a run is resumed from them.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or self.is_ending:
            return
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
            self._finish_current_push()  # it may be sending a checkpoint that `save_total_limit` is about to delete
        self._tell_failures()
        if self.uploads and not self.args.hub_always_push:
            return
        for pattern in MODEL_FILES:
            for path in Path(checkpoint_folder).glob(pattern):
                with replacing(Path(self.args.output_dir) / path.name) as aside:
                    shutil.copy(path, aside)
        self.save_state()
        self._complete()
        try:
            if self.hub_model_id is None:
                self.init_hf_repo()
            message = self._message("weights, card and logs, during the training")
            settings = {"run_as_future": True, "ignore_patterns": NOT_UPLOADED}
            self.uploads += (self._upload(self.args.output_dir, message, **settings),)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                name = "last-checkpoint" if last else Path(checkpoint_folder).name
                settings = {"run_as_future": True, "path_in_repo": name, "ignore_patterns": UNFINISHED}
                message = self._message(f"the checkpoint to resume from, as {name}")
                self.uploads += (self._upload(checkpoint_folder, message, **settings),)
        except UPLOAD_ERRORS as error:
            self._warn(error)

    def _complete(self, **kwargs):
        """Put the model's code and a new card beside the checkpoint. The card says whether the code is there."""
        if self.is_world_process_zero() and (Path(self.args.output_dir) / CONFIG).is_file():
            add_code(Path(self.args.output_dir))
        self.create_model_card(**kwargs)

    def _message(self, what: str) -> str:
        """What a commit holds, for those who read the history of the repository."""
        model = self.accelerator.unwrap_model(self.model)
        return f"{of_config(model.config).title}, step {self.state.global_step:,} of {self.state.max_steps:,}: {what}"

    def _upload(self, folder: str, message: str, **kwargs):
        settings = {"token": self.args.hub_token, "revision": self.args.hub_revision} | kwargs
        return upload_folder(repo_id=self.hub_model_id, folder_path=folder, commit_message=message, **settings)

    def _finish_current_push(self):
        """Wait for the uploads in the background, but not for ever."""
        end = time.monotonic() + LONGEST_WAIT
        while time.monotonic() < end and not self.is_ending and futures.wait(self.uploads, LOOKS).not_done:
            pass
        self._tell_failures()
        late, self.uploads = self.uploads, ()
        for job in late:
            job.cancel()  # this stops those that have not begun
        if late:
            reason = "a signal has ended it" if self.is_ending else f"not done after {LONGEST_WAIT} seconds"
            self._warn(TimeoutError(reason))

    def _tell_failures(self):
        """Warn of the uploads that failed: in the background, nobody sees their errors. Forget those that are done."""
        done = [job for job in self.uploads if job.done()]
        self.uploads = tuple(job for job in self.uploads if job not in done)
        for error in filter(None, (job.exception() for job in done)):
            self._warn(error)

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
            f"The upload to {self._repo_name()} failed ({_first_line(error)}); nothing is lost, and this command "
            f"repeats it: {shlex.join(words)}"
        )


def end_silence():
    """Make the Hub's client give up after `SILENCE` seconds without a byte, unless it has a limit of its own."""
    make_client = _http._GLOBAL_CLIENT_FACTORY  # perhaps the user's own, for a proxy; there is no public way to read it
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
    """What went wrong, without the client's advice on later lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
