"""The card of a classifier that fine-tuning wrote, of our models or of others: made of `results/finetune.json`, the
pictures beside it, the config and the image processor."""

import shlex
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from hf_mim.checks import check_license
from hf_mim.data.processor import read_processor
from hf_mim.evaluation.checkpoint import LOADING_ERRORS, checkpoint_sha256, loading_failure
from hf_mim.evaluation.inputs import channels_of, native_size
from hf_mim.evaluation.result import Result, format_number
from hf_mim.hub.card_text import eval_result, fenced, is_hub_name, literal, markdown_table, plain, shown, shown_number
from hf_mim.methods import of_config
from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.run_folder import CONFIG, FINETUNE_RESULT, STARTED_FROM, card_license, result_path

TEMPLATE = Path(__file__).with_name("classifier_card.md")
MOST_CLASSES = 30  # that the card lists


def is_finetuned(folder: str | Path) -> bool:
    """Whether fine-tuning wrote this folder, and these weights: not if others were saved there since."""
    path = result_path(folder, FINETUNE_RESULT)
    if not (path.is_file() and (Path(folder) / CONFIG).is_file()):
        return False
    return Result.load(path).checkpoint_sha256 == checkpoint_sha256(folder)


def classifier_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a classifier. The arguments and errors are those of `hf_mim.hub.card.model_card`."""
    folder = Path(folder).absolute()
    path = result_path(folder, FINETUNE_RESULT)
    result, license = Result.load(path), check_license(license or card_license(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {loading_failure(error)}") from error
    channels = channels_of(config)
    seen = read_processor(folder, channels)
    name = plain(repo_id.rpartition("/")[2] if repo_id else folder.name)
    address = plain(repo_id or folder.name)
    method = of_config(config) if isinstance(config, MIMConfig) else None
    start, start_sha256 = (result.settings.get(key) for key in STARTED_FROM)
    beside = {end: path.with_name(f"{path.stem}.{end}.png") for end in ("confusion", "curve")}
    shown_here = {end: picture.relative_to(folder) for end, picture in beside.items() if picture.is_file()}
    settings = {key: value for key, value in result.settings.items() if key not in STARTED_FROM}
    return ModelCard.from_template(
        _metadata(name, result, license, start),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=shown(name),
        address=literal(address),
        shell_address=shlex.quote(address),
        architecture=shown((config.architectures or ["a classifier"])[0]),
        started_from=f"{shown(start)}{f' (sha256 {shown(start_sha256[:12])}…)' if start_sha256 else ''}",
        overview=_overview(config, result, license),
        result_file=path.relative_to(folder),
        scores=_table([{"measure": x, "value": y} for x, y in ({result.metric: result.value} | result.scores).items()]),
        notes=[shown(note) for note in result.notes],
        classes=_table(result.classes if len(result.classes) <= MOST_CLASSES else []),
        settings=_table([{"setting": name, "value": value} for name, value in settings.items()]),
        channels=channels,
        size="×".join(map(str, (seen and seen.size) or native_size(config) or ("any", "any"))),
        example_image="image.tif" if channels > 4 or (seen and seen.value_range) else "image.png",
        bibtex=fenced(method.bibtex, "bibtex") if method and method.bibtex else "",
        **shown_here,
    )


def _table(rows: list[dict]) -> str:
    return markdown_table(
        [{shown(x): shown(format_number(y) if isinstance(y, float) else y) for x, y in row.items()} for row in rows]
    )


def _overview(config: PreTrainedConfig, result: Result, license: str | None) -> list[tuple[str, str]]:
    names = [shown(config.id2label[number]) for number in range(config.num_labels)]
    more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    rows = [("Classes", f"{len(names)}: {', '.join(names[:MOST_CLASSES])}{more}")]
    for part, label in (("train", "Trained on"), ("test", "Tested on")):
        about = result.data.get(part, {})
        rows.append(
            (label, f"{shown_number(about.get('images'))} images of {shown(about.get('source', 'not recorded'))}")
        )
    return [*rows, ("Licence", license or "not given")]


def _metadata(name: str, result: Result, license: str | None, start) -> ModelCardData:
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license,
        base_model=start if is_hub_name(start) else None,
        tags=["hf_mim", "image-classification"],
        eval_results=[eval_result(result)] if result.value is not None else None,
    )
