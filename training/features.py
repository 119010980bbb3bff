"""Write the features of images, by a frozen encoder, to a Parquet file: a script to copy.

    python training/features.py runs/digits_mae --dataset digits --split test --output digits.parquet
    python training/features.py facebook/dinov2-base --dataset my_photos --features last/cls/norm last4/mean/norm

A checkpoint is a folder or a name on the Hub, of one of our models or of any vision encoder that `AutoModel` loads.
The file has a row for each image. The columns are the --features (layer/pooling/norm, see docs/evaluation.md), and
`label` and `path` if the images have them.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset

from hf_mim.data import load_images
from hf_mim.data.images import Images
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset", required=True, help='a folder, a file, a name on the Hub, or "digits"')
    parser.add_argument("--split", default="train")
    parser.add_argument("--labels", help="the column of the classes; folder: class folders; none: no labels")
    parser.add_argument("--features", nargs="+", default=["last/mean/norm"], help="layer/pooling/norm")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the checkpoint's")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    parser.add_argument("--output", type=Path, default=Path("features.parquet"))
    args = parser.parse_args()
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"output must lie in a folder that exists, and {args.output} does not")
    if os.path.lexists(args.output):
        raise ValueError(f"output must be a new file, and {args.output} exists")

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    encoder = FrozenEncoder.load(args.checkpoint, args.image_size, dtype=dtype)
    extract = FeatureExtractor(encoder, args.batch_size, args.num_workers)
    images = Images(load_images(args.dataset, args.split, labels=args.labels), f"{args.dataset}, split {args.split}")
    features = extract(images, args.features)  # this removes images that cannot be decoded from `images`

    columns = {name: tensor.flatten(1).numpy() for name, tensor in zip(args.features, features, strict=True)}
    rows = images.images
    if "label" in rows.column_names:
        columns["label"] = rows["label"][:]
    paths = [value.get("path") if isinstance(value, dict) else None for value in rows["image"]]
    if any(paths):
        columns["path"] = paths
    Dataset.from_dict(columns).to_parquet(args.output)
    print(f"{len(images):,} images, {', '.join(columns)}: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
