"""Short runs of a tiny MAE for the tests of Trainer's options."""

from tiny import make_model
from tiny_runs import Images, arguments

from hf_mim.pretraining.trainer import MIMTrainer

LOGGED = dict(max_steps=2, logging_steps=1)


def make_trainer(folder, model=None, images=18, callbacks=None, kind=MIMTrainer, **settings):
    model = model or make_model("mae")
    options = dict(eval_dataset=Images(model, 7), callbacks=callbacks)
    return kind(model, arguments(folder, **LOGGED | settings), Images(model, images), **options)


def train(folder, *args, resume=None, **settings):
    trainer = make_trainer(folder, *args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps_of(trainer, name="loss"):
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
