"""Activation checkpointing: the blocks of a backbone compute their activations again in the backward pass.

A second computation has the bits of the first: random numbers and autocast as in the first
(`torch.utils.checkpoint`), and buffers such as BatchNorm's running statistics, which it does not change.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dl2pa.backbones.probe import probe_forward
from dl2pa.errors import UserError

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Buffers = list[tuple[nn.Module, str, Tensor]]


def checkpoint_activations(backbone: nn.Module, name: str, image_size: int) -> int:
    """Let every block keep only its inputs until the backward pass, in training mode; returns the number of blocks.

    Names of parameters and buffers do not change. A block that changes its input in place is left as it is.

    Raises:
        UserError: the network has no blocks.
    """
    found = list(blocks(backbone))
    writers = _writers(backbone, found, image_size)
    chosen = [block for block in found if block not in writers]
    if not chosen:
        message = f"{name} does not consist of blocks whose activations could be computed again"
        remedy = "Set train.checkpoint_activations=false; train.accumulate saves memory, too."
        raise UserError("train.checkpoint_activations", True, message, remedy)
    for block in chosen:
        # A bound method, because a copy of the module then calls the copy.
        block.forward = MethodType(_forward, block)
    return len(chosen)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of a network in order: modules that consist of others, but not of a sequence of similar blocks."""
    for child in module.children():
        if next(child.children(), None) is None:
            continue
        if type(child) in _SEQUENCES or any(_is_stage(part) for part in child.modules()):
            yield from blocks(child)
        else:
            yield child


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is a sequence of several blocks of one type."""
    children = list(module.children())
    has_parts = all(next(child.children(), None) is not None for child in children)
    return (
        isinstance(module, _SEQUENCES)
        and len(children) > 1
        and has_parts
        and len({*map(type, children)}) == 1
    )


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward pass of a block; replaces its `forward`."""
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    before = [(part, name, buffer.clone()) for part, name, buffer in _buffers(block)]
    # DenseNet appends to the list that it passes to its blocks.
    args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, before), **kwargs)


def _buffers(block: nn.Module) -> Buffers:
    return [
        (part, name, buffer) for part in block.modules() for name, buffer in part.named_buffers(recurse=False)
    ]


def _contexts(before: Buffers) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return _replaced([]), _replaced(before)


@contextmanager
def _replaced(buffers: Buffers) -> Generator[None]:
    """Replace buffers by others, which the block may change, and put back the original ones at the end."""
    originals = [(part, name, getattr(part, name)) for part, name, _ in buffers]
    try:
        for part, name, buffer in buffers:
            setattr(part, name, buffer)
        yield
    finally:
        for part, name, buffer in originals:
            setattr(part, name, buffer)


def _writers(backbone: nn.Module, candidates: list[nn.Module], image_size: int) -> set[nn.Module]:
    """Blocks that change their input in place, found by a forward pass on shapes."""
    writers: set[nn.Module] = set()
    versions: dict[nn.Module, list[int]] = {}

    def before(block: nn.Module, args: tuple[Any, ...]) -> None:
        versions[block] = _versions(args)

    def after(block: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if versions[block] != _versions(args):
            writers.add(block)

    hooks = [block.register_forward_pre_hook(before) for block in candidates]
    hooks += [block.register_forward_hook(after) for block in candidates]
    try:
        probe_forward(backbone, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return writers


def _versions(args: tuple[Any, ...]) -> list[int]:
    return [arg._version for arg in args if isinstance(arg, Tensor)]
