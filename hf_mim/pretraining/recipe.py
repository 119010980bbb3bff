"""A run's settings: a YAML file and a command line become checked, typed arguments of run, model and training.

Settings are flat: one name has one meaning. Each is an argument of the run (`RunArguments`), of the method's config
class or of `MIMTrainingArguments`. The command line overrides the file, and the file overrides the defaults. Those are
the defaults of the classes, overridden by `DEFAULTS`, overridden by the method's row in `hf_mim.methods`.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from transformers import PreTrainedConfig

from hf_mim import methods
from hf_mim.checks import check_bands, check_license, check_statistics, least, one_of
from hf_mim.data.crop import window_pixels
from hf_mim.data.embedded import EMBEDDED
from hf_mim.data.fingerprint import absolute_source
from hf_mim.data.nodata import check_nodata
from hf_mim.data.stacks import check_parts
from hf_mim.files import replacing
from hf_mim.pretraining.layers import END, fresh_folder, held_settings, layered, settings_in
from hf_mim.pretraining.longer import settings_of_continued
from hf_mim.pretraining.probe import ALSO_CALLED, LARGER_IS_BETTER, SMALLER_IS_BETTER
from hf_mim.pretraining.recipe_files import recipe_path
from hf_mim.pretraining.settings import YamlDumper, plain, read_yaml, suggestion, to_type
from hf_mim.pretraining.start import settings_of_sources
from hf_mim.pretraining.trainer import MIMTrainingArguments
from hf_mim.pretraining.trainer_options import PYTHON_ONLY, REFUSED, check_options
from hf_mim.run_folder import LOCAL, RECIPE
from hf_mim.scrub import public_source, scrubbed_all

DEFAULTS = {
    "num_train_epochs": 100,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "dataloader_num_workers": min(4, os.cpu_count() or 1),
    "save_total_limit": 2,  # if a file of the last is damaged, the run resumes from the one before
}
NOT_OFFERED = REFUSED | PYTHON_ONLY  # options of transformers that must keep their default
SECRET = {"hub_token"}
SOURCES = ("dataset", "test_dataset", "init_from", "target_from", "continue_from")  # what may lie on this machine
OF_ONE_START = {"resume", "accept_changed_data"}  # these belong to one start of a run, not to its recipe
# Defaults that decide the result of a run. recipe.yaml records them, so that a later version repeats the run.
RECORDED = ("base_lr", "learning_rate", "start_lr_ratio", "final_lr_ratio", "weight_decay", "weight_decay_end")
RECORDED += ("adam_beta1", "adam_beta2", "max_grad_norm", "gradient_accumulation_steps", "seed")


@dataclass
class RunArguments:
    """The arguments of a run that belong neither to the model nor to the training. `--help-all` prints these texts.

    Args:
        method: the pretraining method
        dataset: a folder of images, Parquet or Arrow files, WebDataset tars, a save_to_disk folder, the name of a
            dataset on the Hub (owner/name or owner/name:config), or "textures" or "digits" (embedded)
        train_split: the split to train on
        test_dataset: images for the k-NN test; default: dataset
        test_split: split of test_dataset; default: validation or test, else training images are used
        image_column: the column of the images; or columns or folders of the parts of an image, whose channels are
            stacked, such as rgb,ir; default: found by its type
        missing_modality: what an image is that lacks a part: error, or zero, the part is masked as a whole there
        labels: where the classes are, which no method needs and only measurements use: a column; folder: class folders;
            none: there are none; default: a column that declares itself, or folders that look like classes
        group: a column of patients, scenes or the like, or folder: images of a group stay on one side of a split that
            the run makes
        streaming: read the images while training; needs max_steps
        shuffle_buffer: with streaming, images that each worker holds and draws from at random
        crop_scale: smallest and largest share of the image's area that a crop takes
        crop_ratio: smallest and largest width / height of a crop, relative to that of image_size
        crop_pixels: side, or height,width: each crop is a window of so many pixels of the image at a random place,
            resized only if the model's input has another size; instead of crop_scale and crop_ratio
        flip_probability: probability of a left-right flip
        vertical_flip_probability: probability of an upside-down flip, for images without an "up"
        rotate90: turn each image by a random multiple of 90 degrees; square crops only
        color_jitter: strength S of random contrast and brightness of each channel: a gain within 1 - S..1 + S, and an
            offset within -S..S of the range of values
        grayscale_probability: probability that an image turns grey
        blur_probability: probability of a Gaussian blur
        blur_sigma: smallest and largest standard deviation of the blur, in pixels
        image_mean, image_std: for each channel, pixels in [0, 1]; default: measured on 1,024 images
        value_range: low,high or such a pair for each channel: the values of the images that become 0 and 1, -30,5 for
            decibels; default: 0..255 for 8 bits, else measured on 1,024 images
        nodata: the value of pixels without data, in the depth of the images, or nan: loss and measures leave them out;
            none: no such value, whatever tags say; default: what the tags of TIFF and DICOM files say
        max_image_pixels: of one image; larger ones are refused; default: 178,956,970
        cache_images: decode 8-bit images once, and crop them on the device, where decoding is slower than training; or
            the folder that hf-mim cache has made of them
        knn: measure the features at the end by 20-NN, if there are labels
        knn_train_images: labelled images that vote, at most
        knn_test_images: labelled images that are classified, at most
        probe_every: steps from one measurement of the features (health, with labels k-NN) to the next; 0: none
        probe_images: images that vote in such a measurement, at most; a quarter as many are classified
        bands: which bands of an image the run's pictures show as red, green and blue, such as 4,3,2, or the one that
            they show as grey; default: the first three
        init_from: a checkpoint to start from, a folder or a name on the Hub: one of this method gives all its weights,
            any other that convert reads gives its encoder; sizes of the model that are not given follow from it
        init_from_sha256: the run itself writes it: the hash of these weights
        target_from: a checkpoint whose encoder is the frozen target of latent_mim, stop_jepa or ijepa, in place of a
            moving average; of any width, for the same image size, patch size and channels
        target_from_sha256: the run itself writes it: the hash of these weights
        continue_from: also --continue: the folder of a run with lr_scheduler_type warmup_stable_decay or constant. This
            one makes it longer, from its last checkpoint before the decay; give num_train_epochs or max_steps
        keep_best: with probe_every, keep the checkpoint in which this is best: probe_knn (probe_knn_accuracy),
            probe_rank_me, probe_mean_cosine and so on
        export_best: make the best checkpoint by keep_best the model of the run folder
        license: the checkpoint's license, for its card: apache-2.0, cc-by-nc-4.0, ...
        resume: continue the run in output_dir, with the settings in its recipe.yaml
        dataset_fingerprint, test_dataset_fingerprint: the run itself writes them: what the files of dataset and
            test_dataset were; a resume compares them
        accept_changed_data: with resume, go on although the images are others than before
    """

    method: str = "mae"
    dataset: str | None = "textures"
    train_split: str = "train"
    test_dataset: str | None = None
    test_split: str | None = None
    image_column: str | list[str] | None = None
    missing_modality: Literal["error", "zero"] = "error"
    labels: str | None = None
    group: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    crop_pixels: int | tuple[int, int] | None = None
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    rotate90: bool = False
    color_jitter: float = 0.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    value_range: list[float] | None = None
    nodata: float | Literal["none"] | None = None
    max_image_pixels: int | None = None
    cache_images: bool | str = False
    knn: bool = True
    knn_train_images: int = 10_000
    knn_test_images: int = 2_000
    probe_every: int = 0
    probe_images: int = 2000
    bands: list[int] | None = None
    keep_best: str | None = None
    export_best: bool = False
    init_from: str | None = None
    init_from_sha256: str | None = None
    target_from: str | None = None
    target_from_sha256: str | None = None
    continue_from: str | None = None
    license: str | None = None
    resume: bool = False
    dataset_fingerprint: str | None = None
    test_dataset_fingerprint: str | None = None
    accept_changed_data: bool = False

    def __post_init__(self):
        methods.get(self.method)
        if not self.dataset:
            raise ValueError('dataset must be given: a folder, files, the name of a dataset on the Hub, or "textures"')
        if self.crop_pixels is not None:
            window_pixels(self.crop_pixels)
        check_statistics(self.image_mean, self.image_std)
        check_license(self.license)
        check_bands(self.bands)
        check_nodata(self.nodata)
        self.image_column = check_parts(self.image_column, self.missing_modality, self.cache_images)
        for name in ("knn_train_images", "knn_test_images", "shuffle_buffer"):
            least(1, **{name: getattr(self, name)})
        least(0, probe_every=self.probe_every)
        least(8, probe_images=self.probe_images)
        self.keep_best = ALSO_CALLED.get(self.keep_best, self.keep_best)
        one_of((*LARGER_IS_BETTER, *SMALLER_IS_BETTER), keep_best=self.keep_best)
        if self.keep_best is not None and not self.probe_every:
            raise ValueError(
                f"keep_best {self.keep_best} needs probe_every, the steps from one measurement to the next"
            )
        if self.export_best and self.keep_best is None:
            raise ValueError("export_best needs keep_best, which says what is best, such as probe_knn")


def model_fields(method: str) -> dict[str, Any]:
    """Name → type of the arguments that a method's config class adds to those of transformers."""
    inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    own = [f for f in dataclasses.fields(methods.get(method).config_class) if f.name not in inherited]
    return {f.name: f.type for f in own if not f.name.startswith("_")}


RUN_FIELDS = get_type_hints(RunArguments)
TRAINING_FIELDS = {
    f.name: get_type_hints(MIMTrainingArguments)[f.name]
    for f in dataclasses.fields(MIMTrainingArguments)
    if f.name not in NOT_OFFERED
}


def all_fields() -> dict[str, Any]:
    """Name → type of every argument of `hf-mim pretrain`, for all methods."""
    fields = {name: hint for method in methods.rows() for name, hint in model_fields(method.name).items()}
    return fields | TRAINING_FIELDS | RUN_FIELDS | {"method": Literal[tuple(methods.names())]}


def embedded_settings(method: methods.Method, data: str) -> dict[str, Any]:
    """A method's defaults for embedded data: those in its row, or in the recipe file that the row names.

    A method without them takes those for other embedded data, or those of the first method as far as it has such
    arguments, so that its model is small.
    """
    own = method.embedded or methods.rows()[0].embedded
    given = own.get(data) or next(iter(own.values()))
    settings = read_yaml(given) if isinstance(given, Path) else given
    known = (RUN_FIELDS | TRAINING_FIELDS | model_fields(method.name)).keys() - {"method", "dataset"}
    return {name: value for name, value in settings.items() if name in known}


@dataclass
class Recipe:
    """A run's settings: typed, with our defaults. `model` and `training` are keyword arguments of their classes."""

    run: RunArguments
    model: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike | None, given: dict[str, Any]) -> "Recipe":
        """A recipe, by its file or by its name in hf_mim, overridden by the settings `given`. With `resume` and no
        recipe, the one in `output_dir`."""
        path = path and recipe_path(path)
        given = {"continue_from" if name == "continue" else name: value for name, value in given.items()}
        if given.get("continue_from"):
            if path or given.get("init_from") or given.get("target_from") or str(given.get("resume")).lower() == "true":
                raise ValueError(
                    "continue takes the settings and weights of its run; give no recipe, init_from or resume"
                )
            layers = [settings_of_continued(Path(given["continue_from"]).expanduser())]
        elif path is None and str(given.get("resume")).lower() == "true" and "output_dir" in given:
            layers = held_settings(Path(given["output_dir"]).expanduser())
        elif path and Path(path).name == RECIPE and Path(path).is_file():  # of a run: beside it is where its data were
            layers = settings_in(Path(path).parent)
        else:
            layers = [read_yaml(path)] if path else []
        return cls.resolve(*settings_of_sources(*layers, given), *layers, given)

    @classmethod
    def resolve(cls, *layers: dict[str, Any]) -> "Recipe":
        """A recipe from layers of settings (file, command line). Each overrides those before it, and all the defaults.

        Raises ValueError for an unknown argument, for a value of the wrong type and for an option that is refused.
        """
        for layer in layers:
            check_options(MIMTrainingArguments, layer, NOT_OFFERED)
        layers = [
            {name: _typed(name, value) for name, value in layer.items() if name not in NOT_OFFERED} for layer in layers
        ]
        for layer in layers:
            if layer.get("crop_pixels") and (others := {"crop_scale", "crop_ratio"} & layer.keys()):
                raise ValueError(f"crop_pixels cannot be given together with {min(others)}; give one of them")
        given = {name: value for layer in layers for name, value in layer.items()}
        method = methods.get(given.get("method", RunArguments.method))
        of_the_model = model_fields(method.name)
        for name in given:
            if name not in RUN_FIELDS | TRAINING_FIELDS | of_the_model:
                owners = ", ".join(other.name for other in methods.rows() if name in model_fields(other.name))
                raise ValueError(f"{name} is an argument of {owners}, not of method {method.name}")
        for name, value in method.settings.items():
            if given.get(name, value) != value:
                raise ValueError(
                    f"{name} must be {value} for method {method.name}, not {given[name]}; "
                    f"method {method.variant_of} takes other values"
                )
        defaults = DEFAULTS | method.training_defaults
        defaults |= {"dataset": next(iter(method.embedded), RunArguments.dataset)}
        if (data := given.get("dataset", defaults["dataset"])) in EMBEDDED:
            defaults |= embedded_settings(method, data)
        if given.get("streaming"):
            defaults.pop("cache_images", None)  # a stream is never whole
        if given.get("cache_images"):
            defaults["dataloader_num_workers"] = 0  # nothing is left to do for them
        defaults |= {"method": method.name} | method.settings
        settings = layered(defaults, *layers)
        run, model, training = (
            {name: to_type(name, settings[name], field_type(name)) for name in names if name in settings}
            for names in (RUN_FIELDS, of_the_model, TRAINING_FIELDS)
        )
        recipe = cls(RunArguments(**run), model, training)
        if not recipe.training.get("output_dir"):
            recipe.training["output_dir"] = fresh_folder(recipe.run)
        return recipe

    def config(self):
        """The method's config. Making it checks its values."""
        return methods.get(self.run.method).config_class(**self.model)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Every setting that decides the run, by section. `Recipe.resolve` makes the same recipe from them."""
        unused = OF_ONE_START | ({"crop_scale", "crop_ratio"} if self.run.crop_pixels else set())
        run = {name: value for name, value in vars(self.run).items() if value is not None and name not in unused}
        config = self.config()
        model = {name: getattr(config, name) for name in model_fields(self.run.method)}
        recorded = {name: getattr(MIMTrainingArguments, name, None) for name in RECORDED} | self.training
        training = {name: value for name, value in recorded.items() if value is not None and name not in SECRET}
        return {title: plain(section) for title, section in (("run", run), ("model", model), ("training", training))}

    def save(self, folder: Path):
        """Write `settings` as a YAML file that `hf-mim pretrain` takes, and beside it where its local data are.

        A resume keeps the names of the data as they were given first, because the recipe is uploaded.
        """
        settings, local = self.settings(), {}
        before = held_settings(folder)
        for name in SOURCES:
            given = getattr(self.run, name)
            path = absolute_source(given)
            if len(before) == 2 and before[1].get(name) == path is not None:
                settings["run"][name], local[name] = before[0][name], path
            elif path != given or given and os.path.isabs(given):
                settings["run"][name], local[name] = public_source(given), path
        for section in settings.values():
            for name, value in section.items():
                if name not in local and (told := scrubbed_all(value)) != value:
                    section[name], local[name] = told, value
        sections = [
            f"# {title}\n" + "".join(yaml.dump({name: value}, Dumper=YamlDumper) for name, value in section.items())
            for title, section in settings.items()
        ]
        texts = {LOCAL: yaml.safe_dump(local, allow_unicode=True), RECIPE: "\n".join([*sections, f"{END}\n"])}
        for name, text in texts.items():
            with replacing(folder / name) as aside:
                aside.write_text(text)


def _typed(name: str, value: Any) -> Any:
    """A setting in the type of its argument. An alias of a method becomes the method's name."""
    return methods.get(value).name if name == "method" else to_type(name, value, field_type(name))


def field_type(name: str):
    """The type of an argument. Raises ValueError for an unknown name, with the nearest known one."""
    fields = all_fields()
    if name not in fields:
        raise ValueError(f"unknown argument {name}{suggestion(name, fields)}")
    return fields[name]
