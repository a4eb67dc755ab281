"""Layers of a backbone: their numbers, and the part before a named one, which can be frozen."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dl2pa.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def parameters_before(backbone: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of the layers before a module, by ``layer_numbers``.

    Args:
        name: of a module of the backbone, such as `layer4` of a ResNet or `blocks.6`.

    Raises:
        UserError: the backbone has no such module, the module has no parameters, or no layers are before it.
    """
    numbers = layer_numbers(backbone)
    inside = [number for key, number in numbers.items() if key.startswith(f"{name}.")]
    parameters = dict(backbone.named_parameters())
    before = [parameters[key] for key, number in numbers.items() if inside and number < min(inside)]
    if not before:
        known = name in dict(backbone.named_modules())
        why = (
            "is the first layer with weights" if inside else "has no weights" if known else "is not a module"
        )
        names = ", ".join(_first_modules(numbers))
        message = f"{why} of the backbone" if inside or not known else why
        remedy = f"Use one of: {names}." if names else "Leave it out: the backbone has no such modules."
        raise UserError("model.freeze_before", name, message, remedy)
    return before


def modules_before(backbone: nn.Module, name: str) -> list[nn.Module]:
    """Modules that contain only layers before a module, the largest ones, with those without weights between them."""
    before = {id(parameter) for parameter in parameters_before(backbone, name)}
    return list(_fully_in(backbone, before, backbone.get_submodule(name)))


def _fully_in(module: nn.Module, before: set[int], end: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest parts of a module all of whose parameters are among `before`; stop at `end`."""
    for child in module.children():
        if child is end:
            return
        if all(id(parameter) in before for parameter in child.parameters()):
            yield child
        else:
            yield from _fully_in(child, before, end)
            if any(part is end for part in child.modules()):
                return


def _first_modules(numbers: dict[str, int]) -> list[str]:
    """Name of the outermost module that begins with a layer, for each layer but the first."""
    begins: dict[str, int] = {}
    for key, number in numbers.items():
        parts = key.split(".")
        for length in range(1, len(parts)):
            begins.setdefault(".".join(parts[:length]), number)
    names: dict[int, str] = {}
    for name, number in begins.items():
        names.setdefault(number, name)
    return [name for number, name in sorted(names.items()) if number > 0]


def layer_numbers(backbone: nn.Module) -> dict[str, int]:
    """Number of the layer of each parameter of a backbone, from 0 at the input.

    timm numbers the layers of its models. In other networks a layer is a block of a sequence of blocks, or a
    convolution or linear layer outside of blocks; normalization layers belong to the layer before them.
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        numbers: dict[str, int] = group_parameters(backbone, matcher(coarse=False), reverse=True)
        order = {number: index for index, number in enumerate(sorted(set(numbers.values())))}
        return {name: order[number] for name, number in numbers.items()}
    result: dict[str, int] = {}
    number = -1
    for prefix, module, whole in _units("", backbone):
        parameters = dict(module.named_parameters(prefix, recurse=whole))
        if whole and any(p.ndim > 1 for p in parameters.values()):
            number += 1
        result |= dict.fromkeys(parameters, max(number, 0))
    return result


def _units(
    prefix: str, module: nn.Module, in_container: bool = False
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the parts of a network in order, each with whether it is one layer; others yield their own parameters."""
    is_container = type(module) in _CONTAINERS
    whole = bool(prefix) and not is_container and (in_container or not _contains_blocks(module))
    yield prefix, module, whole
    for name, child in [] if whole else module.named_children():
        yield from _units(f"{prefix}.{name}" if prefix else name, child, is_container)


def _contains_blocks(module: nn.Module) -> bool:
    """Whether the module contains a sequence of blocks (modules with submodules)."""
    containers = [part for part in module.modules() if type(part) in _CONTAINERS]
    return any(next(block.children(), None) is not None for part in containers for block in part.children())
