"""Which samples make up a step: a keyed permutation, cut into global batches, virtual shards and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.rng import Stream, random_bits

_ROUNDS = 6
_BLOCK = 16


def permute(positions: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Images of positions under a keyed pseudo-random permutation of range(size), without building it.

    A Feistel network over the smallest even number of bits that holds `size`, walked until the value falls
    inside the range (Black and Rogaway, CT-RSA 2002): a bijection for every size and key.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (random_bits(*key, round_number, right.view(np.int64)) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


@dataclass(frozen=True)
class TrainSampler:
    """Samples of the training set by (epoch, step, rank).

    Each epoch visits `steps_per_epoch * global_batch` different samples; the N mod B left over are those at the
    end of that epoch's permutation, so other ones each epoch.
    """

    num_samples: int
    global_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert self.global_batch % self.world_size == 0, "the world size divides the global batch"

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.world_size

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions of this rank's samples within the global batch: one contiguous run."""
        return self.rank * self.local_batch + np.arange(self.local_batch, dtype=np.int64)

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """This rank's samples [local_batch] at `step` of `epoch`."""
        block, within = divmod(step, _BLOCK)
        return _block_of(self, epoch, block)[within]


@lru_cache(maxsize=4)
def _block_of(sampler: TrainSampler, epoch: int, block: int) -> NDArray[np.int64]:
    """A rank's samples of ``_BLOCK`` steps, [steps, local_batch]: together they take hardly longer than one step's."""
    steps = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, sampler.steps_per_epoch))
    places = steps[:, None] * sampler.global_batch + sampler.positions
    found = permute(places, sampler.num_samples, sampler.seed, Stream.ORDER, epoch)
    found.setflags(write=False)
    return found


@dataclass(frozen=True)
class EvalSampler:
    """Samples of an evaluation set in their own order, each exactly once over all ranks, equal step counts.

    At the last step a rank may have fewer samples than the others, or none: the rest of its batch is padding.
    """

    num_samples: int
    global_batch: int
    rank: int = 0
    world_size: int = 1

    @property
    def local_batch(self) -> int:
        return max(1, -(-self.global_batch // self.world_size))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // (self.local_batch * self.world_size))

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """This rank's samples [<= local_batch] at `step`; the epoch does not matter."""
        start = (step * self.world_size + self.rank) * self.local_batch
        return np.arange(start, min(start + self.local_batch, self.num_samples), dtype=np.int64)


@dataclass(frozen=True)
class SubsetSampler:
    """Samples named one by one, for one process: to look at them as evaluation prepares them."""

    samples: tuple[int, ...]
    local_batch: int

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.local_batch)

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The samples [<= local_batch] of a step; the epoch does not matter."""
        start = step * self.local_batch
        return np.array(self.samples[start : start + self.local_batch], dtype=np.int64)


Sampler = TrainSampler | EvalSampler | SubsetSampler
