"""Which images a resumed run is given, if its batch is divided in another way than before."""

import pytest
from tiny import make_model
from tiny_runs import arguments, image_column

from hf_mim.data import DeviceAugment, ImageDataset, ImageStream
from hf_mim.pretraining.trainer import MIMTrainer

STEPS, SAVED = 9, 5


def images_of_each_step(folder, images, batch, accumulation, workers=0, resume=None):
    """The names of the images of each step."""
    given = {}

    class Recorder(MIMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            given.setdefault(self.state.global_step, []).extend(inputs["name"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "dataloader_num_workers": workers}
    Recorder(make_model("mae"), arguments(folder, **settings), images, augment=DeviceAugment()).train(resume)
    return [sorted(names) for names in given.values()]


def resumed_otherwise(folder, make_images, workers, later_batch, later_workers):
    """The steps after the checkpoint, of a run that goes on as it began (4 × 2 images) and of one that does not."""
    straight = images_of_each_step(folder, make_images(), 4, 2, workers)
    checkpoint, accumulation = str(folder / f"checkpoint-{SAVED}"), 8 // later_batch
    resumed = images_of_each_step(folder / "on", make_images(), later_batch, accumulation, later_workers, checkpoint)
    return straight[SAVED:], resumed


@pytest.mark.parametrize("count, alike", [(27, True), (29, False)])
def test_another_accumulation_keeps_the_images_of_a_step_or_the_resume_warns(tmp_path, caplog, count, alike):
    straight, resumed = resumed_otherwise(tmp_path, lambda: ImageDataset(image_column(count), size=24), 0, 8, 0)
    assert (resumed == straight) == alike
    told = [line for line in caplog.messages if line.startswith("gradient_accumulation_steps is 1 and was 2")]
    assert len(told) == (not alike) and all("of 29 images has 8 of them now and had 4" in line for line in told)


def make_stream():
    return ImageStream(image_column(32).to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=5), size=24)


def test_a_stream_without_workers_goes_on_with_the_same_images_in_other_batches(tmp_path, caplog):
    straight, resumed = resumed_otherwise(tmp_path, make_stream, 0, 8, 0)
    assert resumed == straight and "start of pass" not in caplog.text


@pytest.mark.parametrize("later_batch, later_workers", [(8, 2), (4, 0)], ids=["other batches", "other workers"])
def test_a_stream_that_is_divided_otherwise_goes_on_with_a_whole_pass(tmp_path, caplog, later_batch, later_workers):
    straight, resumed = resumed_otherwise(tmp_path, make_stream, 2, later_batch, later_workers)
    assert len(set(sum(resumed, []))) == 32 == len(sum(resumed, []))
    assert "the run goes on at the start of pass 3, not where it had stopped" in caplog.text
