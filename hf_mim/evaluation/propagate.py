"""Carry object masks through a video by the similarity of patch tokens. Nothing is learned.

This is the protocol of Jabri et al. (NeurIPS 2020, arXiv 2006.14613, section 4.2) in DINO's version (Caron et al., ICCV
2021, arXiv 2104.14294, section 4.2.2 and appendix), scored as in DAVIS 2017 (Pont-Tuset et al., arXiv 1704.00675).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.checks import least, positive
from hf_mim.data import WholeImage
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.data.decode import BrokenImage, decoding, image_name
from hf_mim.data.videos import VOID, Videos
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import LARGEST_TABLE, FeatureExtractor
from hf_mim.evaluation.metrics import object_scores
from hf_mim.evaluation.probe_training import parse_features
from hf_mim.evaluation.result import Result
from hf_mim.models.pixels import scale_pixels
from hf_mim.progress import progress_bar


def propagate_labels(
    features: Iterable[Tensor],
    first: Tensor,
    k: int = 5,
    temperature: float = 0.1,
    neighbourhood: int = 12,
    queue: int = 7,
) -> Tensor:
    """Carry the labels of the first frame through all frames.

    Each frame takes its labels from the first frame, and from the soft labels of the last `queue` frames before it.

    Args:
        features: of each frame in order, `[rows, columns, D]`.
        first: shares of the labels in each patch of the first frame, `[rows, columns, K]`.
        k, temperature, neighbourhood: see `propagate_step`.

    Returns:
        Shares of labels `[frames, rows, columns, K]`; those of the first frame are `first`.
    """
    features = (F.normalize(frame.float(), dim=-1) for frame in features)
    start, labels, recent = next(features), [first], deque(maxlen=queue)
    for frame in features:
        context, theirs = (torch.stack(part) for part in zip((start, first), *recent, strict=True))
        labels.append(propagate_step(frame, context, theirs, k, temperature, neighbourhood))
        recent.append((frame, labels[-1]))
    return torch.stack(labels)


def propagate_step(
    queries: Tensor, context: Tensor, labels: Tensor, k: int = 5, temperature: float = 0.1, neighbourhood: int = 12
) -> Tensor:
    """Labels of one frame from the labels of other frames (the context).

    Every patch takes the mean label of the k context patches with the most similar features, weighted by exp(cosine /
    temperature). The k patches may be of any context frame, but at most `neighbourhood` rows and columns away.

    Args:
        queries: L2-normalised features of the frame, `[rows, columns, D]`.
        context: L2-normalised features of F frames, `[F, rows, columns, D]`.
        labels: of these F frames, `[F, rows, columns, K]`.

    Returns:
        `[rows, columns, K]`.
    """
    rows, columns = queries.shape[:2]
    across = torch.arange(columns, device=queries.device)
    is_near_across = (across[:, None] - across).abs() <= neighbourhood  # [columns, columns]
    block = max(1, LARGEST_TABLE // (len(context) * rows * columns**2))  # rows of queries at a time
    carried = []
    for top in range(0, rows, block):
        part = queries[top : top + block]
        low, high = max(0, top - neighbourhood), min(rows, top + len(part) + neighbourhood)
        down = torch.arange(top, top + len(part), device=queries.device)
        is_near_down = (down[:, None] - torch.arange(low, high, device=queries.device)).abs() <= neighbourhood
        # [block, columns, high-low, columns]
        is_near = is_near_down[:, None, :, None] & is_near_across[None, :, None, :]
        similarity = part.flatten(0, 1) @ context[:, low:high].flatten(0, 2).T  # [queries, F·(high-low)·columns]
        similarity.unflatten(1, (len(context), -1)).masked_fill_(~is_near.flatten(2).flatten(0, 1)[:, None], -torch.inf)
        best, nearest = similarity.topk(min(k, similarity.shape[1]), dim=1)
        weights = (best / temperature).softmax(dim=1)  # 0 for patches that are not near
        found = labels[:, low:high].flatten(0, 2)[nearest]  # [queries, k, K]
        carried.append((weights[..., None] * found).sum(dim=1))
    return torch.cat(carried).view(rows, columns, -1)


def label_shares(mask: np.ndarray, ids: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The share of the area of each patch that each of `ids` covers in a mask `[h, w]`: `[rows, columns, K]`."""
    planes = torch.from_numpy(mask == ids[:, None, None]).float()
    return F.adaptive_avg_pool2d(planes, grid).permute(1, 2, 0)


def label_map(shares: Tensor, size: tuple[int, int]) -> Tensor:
    """Shares `[rows, columns, K]` of one frame → the index of the label of each pixel, `[h, w]`.

    As in DINO's evaluation, each label's plane is enlarged bilinearly and stretched to 0..1; then the largest is taken.
    Otherwise small objects, which never fill a patch, would lose to the background. A constant plane is not stretched.
    """
    planes = F.interpolate(shares.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0]
    low, high = planes.amin(dim=(1, 2), keepdim=True), planes.amax(dim=(1, 2), keepdim=True)
    stretched = (planes - low) / (high - low)
    return torch.where(high > low, stretched, planes).argmax(dim=0)


def frame_size(size: tuple[int, int], patch_size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """The size (height, width) of this aspect whose short side is `short_side`, rounded to whole patches."""
    scale = short_side / min(size)
    return tuple(max(1, round(side * scale / patch)) * patch for side, patch in zip(size, patch_size, strict=True))


@dataclass
class Propagate:
    """J&F of object masks that are carried from the first frame through each video by patch tokens alone.

    L2-normalised features of frozen patch tokens label every frame from the first frame and the last few (Jabri et al.
    2020; Caron et al. 2021, DINO). J is the intersection over union of masks, F the agreement of their boundaries. Both
    are averaged over all frames except the first, which is given, and the last, which DAVIS 2017 leaves out; then over
    all objects of all sequences. The encoder's positions are resized to the grid that `short_side` gives.

    Args:
        features: layer/tokens/norm
        k: patches from which a patch takes its label
        temperature: a patch weighs exp(cosine / temperature)
        neighbourhood: how many rows and columns of patches an object may move
        queue: past frames from which labels come, beside the first
        short_side: pixels of a frame's short side; fewer for an encoder with small patches
        sequences: names of the sequences, or how many of them; default: all
    """

    features: str = "last/tokens/norm"
    k: int = 5
    temperature: float = 0.1
    neighbourhood: int = 12
    queue: int = 7
    short_side: int = 480
    sequences: int | list[str] | None = None

    name: ClassVar[str] = "propagate"
    needs: ClassVar[str] = "videos"
    # short_side tells the size, and frames are read only once.
    unused: ClassVar[tuple[str, ...]] = ("image_size", "cache", "pixels")

    def __post_init__(self):
        parse_features(self.features, self.name, tokens=True)
        least(1, k=self.k, short_side=self.short_side)
        least(0, neighbourhood=self.neighbourhood, queue=self.queue)
        positive(temperature=self.temperature)

    @property
    def spec(self) -> FeatureSpec:
        return FeatureSpec.parse(self.features)

    def run(self, extract: FeatureExtractor, videos: Videos) -> Result:
        """Predict all sequences, then read their masks. Raises ValueError for sequences without a frame to score."""
        extract.encoder.check(self.spec)
        chosen = videos.pick(self.sequences)
        for sequence in chosen:
            if len(videos.frames(sequence)) < 3:
                raise ValueError(f"sequence {sequence} has 2 frames; a third is needed: first and last are not scored")
        with progress_bar(extract.progress, "sequences", len(chosen), " sequences", chosen) as bar:
            shares = {sequence: self.predict(extract, videos, sequence) for sequence in bar}
        objects, kept, rows = [], [], []
        for sequence in chosen:
            scores, still = _score(videos, sequence, shares[sequence])
            objects, kept = objects + list(scores), kept + list(still)
            j, f = scores.mean(axis=0).tolist()
            row = {"sequence": sequence, "frames": len(shares[sequence]), "objects": len(scores)}
            row |= {"grid": "×".join(map(str, shares[sequence].shape[1:3])), "J&F": (j + f) / 2, "J": j, "F": f}
            rows.append(row)
        j, f = np.mean(objects, axis=0).tolist()
        return Result(
            protocol=self.name,
            metric="J&F",
            value=(j + f) / 2,
            settings=asdict(self)
            | {
                "labels_of_first_frame": "shares of patch areas",
                "label_maps": "enlarged bilinearly, each stretched to 0..1 in each frame, argmax",
                "scored_frames": "all but the first and the last",
                "mean_over": "frames, then objects of all sequences",
            },
            data=videos.describe(chosen),
            scores={"J": j, "F": f, "J&F of the first mask left where it is": float(np.mean(kept))},
            table=rows,
        )

    def predict(self, extract: FeatureExtractor, videos: Videos, sequence: str) -> Tensor:
        """Shares of background and objects in each patch of each frame, `[frames, rows, columns, 1 + objects]`, CPU."""
        encoder = extract.encoder
        size = frame_size(videos.size(sequence), encoder.patch_size, self.short_side)
        grid = tuple(side // patch for side, patch in zip(size, encoder.patch_size, strict=True))
        ids = np.concatenate([[0], videos.object_ids(sequence)])
        first = label_shares(videos.read_first_mask(sequence), ids, grid).to(encoder.device)
        features = self._features(extract, videos.frames(sequence), size, grid)
        return propagate_labels(features, first, self.k, self.temperature, self.neighbourhood, self.queue).cpu()

    def _features(self, extract: FeatureExtractor, frames, size, grid) -> Iterator[Tensor]:
        """The features of each frame, `[rows, columns, D]`. A batch has about as many tokens as a batch of images."""
        encoder = extract.encoder
        batch = max(1, extract.batch_size * np.prod(encoder.grid) // np.prod(grid))

        def load(value) -> Tensor:
            with decoding(image_name(value, "a frame")):
                value_range = encoder.value_range
                pixels = load_crop(value, WholeImage(), size, encoder.num_channels, crop_rng(0, 0, 0), value_range)
                return scale_pixels(pixels, value_range)

        with ThreadPoolExecutor(max(1, extract.num_workers)) as pool:
            for start in range(0, len(frames), batch):
                try:
                    pixels = torch.stack(list(pool.map(load, frames[start : start + batch]["image"])))
                except BrokenImage as error:
                    raise ValueError(f"a frame cannot be decoded: {error}") from error
                (tokens,) = encoder.extract(encoder.preprocess(pixels), [self.spec])
                yield from tokens.unflatten(1, grid)


def _score(videos: Videos, sequence: str, shares: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(J, F) of each object, `[objects, 2]`, as means over the scored frames: of the prediction, of the first mask."""
    masks, ids = videos.read_masks(sequence), videos.object_ids(sequence)
    names = np.concatenate([[0], ids])
    predicted, kept = [], []
    for shares_of_frame, truth in zip(shares[1:-1], masks[1:-1], strict=True):
        prediction = names[label_map(shares_of_frame, truth.shape).numpy()]
        predicted.append(object_scores(prediction, truth, ids, VOID))
        kept.append(object_scores(np.where(masks[0] == VOID, 0, masks[0]), truth, ids, VOID))
    return np.mean(predicted, axis=0), np.mean(kept, axis=0)
