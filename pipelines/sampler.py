"""Samplers: the samples of each step and rank, from a keyed permutation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.rng import Stream, random_bits

_ROUNDS = 6
_BLOCK = 16


def permute(positions: NDArray[np.int64], size: int, *key: int) -> NDArray[np.int64]:
    """Apply a keyed pseudo-random permutation of range(size) to positions, without building it.

    A Feistel network on the smallest even number of bits that can represent `size`, repeated until the value is in
    range (cycle walking; Black and Rogaway, CT-RSA 2002): a bijection for every size and key.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half_bits), values[outside] & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (random_bits(*key, round_number, right.view(np.int64)) & mask)
        values[outside] = (left << np.uint64(half_bits)) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


@dataclass(frozen=True)
class TrainSampler:
    """Training sampler: shuffled samples by (epoch, step, rank).

    Each epoch visits `steps_per_epoch * global_batch` distinct samples. The remaining N mod B samples, at the end of
    the epoch's permutation, are dropped; they differ per epoch.
    """

    num_samples: int
    global_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert self.global_batch % self.world_size == 0, "the world size must divide the global batch"

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.world_size

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions [local_batch] of this rank's samples in the global batch, contiguous."""
        return self.rank * self.local_batch + np.arange(self.local_batch, dtype=np.int64)

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """This rank's samples [local_batch] of a step."""
        block, within = divmod(step, _BLOCK)
        return _block_of(self, epoch, block)[within]


@lru_cache(maxsize=4)
def _block_of(sampler: TrainSampler, epoch: int, block: int) -> NDArray[np.int64]:
    """A rank's samples [steps, local_batch] of ``_BLOCK`` steps, which cost little more than those of one step."""
    steps = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, sampler.steps_per_epoch))
    positions = steps[:, None] * sampler.global_batch + sampler.positions
    samples = permute(positions, sampler.num_samples, sampler.seed, Stream.ORDER, epoch)
    samples.setflags(write=False)
    return samples


@dataclass(frozen=True)
class EvalSampler:
    """Evaluation sampler: each sample exactly once over all ranks, unshuffled, with equal step counts.

    In the last step, a rank may have fewer samples or none; the rest of its batch is padding.
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
        """This rank's samples [<= local_batch] of a step; independent of the epoch."""
        start = (step * self.world_size + self.rank) * self.local_batch
        return np.arange(start, min(start + self.local_batch, self.num_samples), dtype=np.int64)


@dataclass(frozen=True)
class SubsetSampler:
    """Sampler over a given list of samples, for one process."""

    samples: tuple[int, ...]
    local_batch: int

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.samples) // self.local_batch)

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Samples [<= local_batch] of a step; independent of the epoch."""
        start = step * self.local_batch
        return np.array(self.samples[start : start + self.local_batch], dtype=np.int64)


Sampler = TrainSampler | EvalSampler | SubsetSampler
