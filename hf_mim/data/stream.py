"""A stream without an end for training. It knows how far each worker has read, so that a resume is exact."""

from collections.abc import Iterator
from itertools import count

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .dataset import ImageStream

RING = 64  # batches of each worker whose places are remembered; more than a DataLoader prepares ahead


class EndlessStream(IterableDataset):
    """The samples of an `ImageStream`, pass after pass, each worker through its own shards.

    Batch b of a DataLoader always comes from worker b mod W. So the number of batches that were used tells how many
    each worker has given: after 5 batches of 2 workers, worker 0 has given 3 and worker 1 has given 2. After each
    batch, the worker notes its place in shared memory: (epoch, images read in this epoch). A resume reads up to this
    place without decoding, through a shuffle buffer too.

    Args:
        stream: this rank's part.
        batch_size: of the DataLoader.
        num_workers: of the DataLoader; 0 for none.
        start: a `state()` to continue from, made with as many workers and, if there are several, the same batch size.

    Raises:
        ValueError: while reading, if a worker's part of the stream has no image.
    """

    def __init__(self, stream: ImageStream, batch_size: int, num_workers: int, start: dict | None = None):
        self.stream, self.batch_size, self.lanes = stream, batch_size, max(1, num_workers)
        places = [[0, 0]] * self.lanes if start is None else start["places"]
        # The first batch of a DataLoader always comes from worker 0. So a resume reads the unfinished round of the
        # workers again, and the trainer skips so many batches of it.
        self.skipped_batches = 0 if start is None else start["batches"]
        self._places = torch.zeros(self.lanes, RING, 2, dtype=torch.int64).share_memory_()
        self._places[:, 0] = torch.tensor(places)

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        places = self._places[info.id if info else 0]
        first, skip = places[0].tolist()
        given = 0
        for epoch in count(first):
            position = 0
            for position, sample in self.stream.read(epoch, skip):
                given += 1
                if given % self.batch_size == 0:
                    places[given // self.batch_size % RING] = torch.tensor([epoch, position])
                yield sample
            if position == 0 and skip == 0:
                raise ValueError("train_dataset has a shard without images; leave it out, or use fewer workers")
            skip = 0

    def state(self, batches: int) -> dict:
        """Where to continue after so many batches since `start`, without `skipped_batches`. Can be saved as JSON."""
        batches += self.skipped_batches
        places = self._places[:, batches // self.lanes % RING].tolist()
        return {"batches": batches % self.lanes, "places": places, "batch_size": self.batch_size}
