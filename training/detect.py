"""Train a detector on a checkpoint's encoder, and measure its mAP: a script to copy.

    python training/detect.py runs/mae --scenes 2000 --max_steps 500
    python training/detect.py runs/mae --dataset cppe-5 --image_size 448 --num_train_epochs 50 --bf16 true

The detector is transformers' Conditional DETR with our backbone: a plain ViT gives it one map of features. Without
`--dataset` it learns to find the shapes of drawn scenes. A dataset has a column `image` and a column `objects`, whose
fields are `bbox` (x, y, width, height in pixels) and `category`, as usual on the Hub. Every argument of transformers'
`TrainingArguments` works too (`--help`). mAP is that of COCO, by pycocotools (`pip install hf-mim[detect]`).
"""

import contextlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from transformers.image_transforms import center_to_corners_format

from hf_mim import methods
from hf_mim.data import WholeImage
from hf_mim.data.crop import image_size, load_crop
from hf_mim.data.processor import read_processor
from hf_mim.data.scenes import SHAPES, scenes


@dataclass
class Arguments:
    dataset: str | None = field(default=None, metadata={"help": "A folder or a Hub name; default: drawn scenes."})
    scenes: int = field(default=2000, metadata={"help": "Drawn scenes to train on; a tenth as many are for the test."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images; default: the checkpoint's."})
    num_queries: int = field(default=50, metadata={"help": "Boxes that the detector predicts for an image."})
    width: int = field(default=128, metadata={"help": "Width of the detector's encoder and decoder."})
    depth: int = field(default=3, metadata={"help": "Layers of the detector's encoder, and of its decoder."})
    num_train_images: int | None = field(default=None, metadata={"help": "At most so many training images."})


class Detections(torch.utils.data.Dataset):
    """Images resized to a square, with classes and boxes: `{"pixel_values", "labels"}` as DETR takes them.

    Args:
        rows: with `image`, and `objects`: {"bbox": x, y, width, height in pixels, "category": ids}.
        size: side of the images.
        mean, std: of the channels.
    """

    def __init__(self, rows, size: int, mean, std):
        self.rows, self.size = rows, size
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        width, height = image_size(row["image"], len(self.mean))
        pixels = load_crop(row["image"], WholeImage(), (self.size, self.size), len(self.mean), None).float() / 255
        boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float32).reshape(-1, 4)
        boxes = boxes / torch.tensor([width, height, width, height])
        labels = {
            "class_labels": torch.tensor(row["objects"]["category"], dtype=torch.int64),
            "boxes": torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1),
        }
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": labels}


def collate(samples: list[dict]) -> dict:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


def drawn(count: int, size: int, split: str):
    """Drawn scenes in the form of a dataset on the Hub."""
    rows = scenes(count, size, split=split)

    def objects(row):
        boxes = [[size * length for length in box] for box in row["boxes"]]
        return {"objects": {"bbox": boxes, "category": row["shapes"]}}

    return rows.map(objects).select_columns(["image", "objects"])


def load_backbone(checkpoint: str):
    """The checkpoint's encoder as feature maps. (AutoBackbone asks the Hub first, and fails for a folder.)"""
    return methods.of_config(AutoConfig.from_pretrained(checkpoint)).backbone_class.from_pretrained(checkpoint)


def make_detector(checkpoint: str, names: list[str], arguments: Arguments):
    """Conditional DETR on the checkpoint's encoder; all else is new."""
    backbone = load_backbone(checkpoint)
    config = ConditionalDetrConfig(
        backbone_config=backbone.config,
        num_queries=arguments.num_queries,
        d_model=arguments.width,
        encoder_layers=arguments.depth,
        decoder_layers=arguments.depth,
        encoder_ffn_dim=4 * arguments.width,
        decoder_ffn_dim=4 * arguments.width,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    detector = ConditionalDetrForObjectDetection(config)
    detector.model.backbone.model.load_state_dict(backbone.state_dict())
    return detector


def mean_average_precision(found: list[dict], true: list[dict], num_classes: int, size: int) -> dict[str, float]:
    """COCO's mAP and AP at an overlap of one half, of boxes as shares of the side.

    found: for each image `scores [n]`, `labels [n]` and `boxes [n, 4]` (corners). true: `class_labels` and `boxes`
    (centre, width, height).
    """
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number, "width": size, "height": size} for number in range(len(true))],
        "categories": [{"id": number, "name": str(number)} for number in range(num_classes)],
        "annotations": [],
    }
    for number, labels in enumerate(true):
        corners = center_to_corners_format(labels["boxes"]) * size
        for category, box in zip(labels["class_labels"].tolist(), corners.tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            about = {"image_id": number, "category_id": category, "bbox": [*box[:2], width, height], "iscrowd": 0}
            truth.dataset["annotations"].append(
                about | {"id": len(truth.dataset["annotations"]) + 1, "area": width * height}
            )
    rows = []
    for number, one in enumerate(found):
        sides = torch.cat([one["boxes"][:, :2], one["boxes"][:, 2:] - one["boxes"][:, :2]], dim=1) * size
        about = torch.cat([sides, one["scores"][:, None], one["labels"][:, None].float()], dim=1)
        rows.append(torch.cat([torch.full((len(about), 1), float(number)), about], dim=1))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth.createIndex()
        results = truth.loadRes(torch.cat(rows).double().numpy())
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"mAP": float(evaluation.stats[0]), "AP50": float(evaluation.stats[1])}


@torch.no_grad()
def measure(detector, loader, size: int) -> dict[str, float]:
    """mAP of the 100 best boxes of each image."""
    found, true = [], []
    for batch in loader:
        output = detector.eval()(batch["pixel_values"].to(detector.device))
        scores, best = output.logits.float().sigmoid().flatten(1).topk(min(100, output.logits[0].numel()), dim=1)
        corners = center_to_corners_format(output.pred_boxes.float())
        boxes = corners.gather(1, (best // output.logits.shape[2])[..., None].expand(-1, -1, 4))
        parts = (scores.cpu(), (best % output.logits.shape[2]).cpu(), boxes.cpu())
        found += [dict(zip(("scores", "labels", "boxes"), image, strict=True)) for image in zip(*parts, strict=True)]
        true += batch["labels"]
    return mean_average_precision(found, true, detector.config.num_labels, size)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.add_argument("checkpoint", help="a checkpoint of hf_mim: a folder or a name on the Hub")
    arguments, args, rest = parser.parse_args_into_dataclasses()
    checkpoint = rest.checkpoint
    args.remove_unused_columns, args.label_names = False, ["labels"]
    try:
        known = read_processor(checkpoint, 3)
    except (OSError, ValueError) as error:
        parser.error(f"checkpoint {checkpoint} cannot be read: {' '.join(str(error).split())}")
    size = arguments.image_size or load_backbone(checkpoint).config.image_height_width[0]
    if arguments.dataset is None:
        train, test = drawn(arguments.scenes, size, "train"), drawn(max(1, arguments.scenes // 10), size, "test")
        names = list(SHAPES)
    else:
        splits = load_dataset(arguments.dataset)
        train, test = splits["train"], splits["test" if "test" in splits else "validation"]
        names = train.features["objects"]["category"].feature.names
    if arguments.num_train_images:
        train = train.select(range(min(arguments.num_train_images, len(train))))
    train, test = (Detections(rows, size, known.mean, known.std) for rows in (train, test))
    detector = make_detector(checkpoint, names, arguments)
    trainer = Trainer(detector, args, data_collator=collate, train_dataset=train, eval_dataset=test)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():  # this process measures all test images: no other has a part of them
        result = measure(detector, DataLoader(test, args.per_device_eval_batch_size, collate_fn=collate), size)
        print(json.dumps(result))
        (Path(args.output_dir) / "detection.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
