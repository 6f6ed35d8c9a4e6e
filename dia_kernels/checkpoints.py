"""Checkpoints of the authors and of pytorchcv, loaded into the networks of this library.

    from dia_kernels import checkpoints, models

    model = models.create("resnet164", num_classes=100, attention="dia")
    print(checkpoints.load(model, "model_best.pth.tar"))

A file is recognised by its keys, and so is the model; a key map is a list of rules, each a regular
expression and a template. Everything is checked before anything is copied. Sources of the names:
gbup-group/DIANet, ``models/cifar/``; pytorchcv, ``models/diaresnet.py`` and ``diaresnet_cifar.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

# What DataParallel, torch.compile and the classifier of dia_kernels.train put before every key.
_WRAPPERS = ("module.", "_orig_mod.", "network.")

# Names that an error or a report lists before it only counts.
_LISTED = 3


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one of the model. Nothing was loaded; the message says why."""


@dataclass(frozen=True)
class LoadReport:
    """What ``load`` did. ``str`` of it is for a reader.

    Attributes:
        source: whose names the file has.
        loaded: tensors of the model filled from the file.
        renamed: those among them that have another name in the file.
        merged: further tensors of the file, equal copies of one that was loaded.
        zeroed: the model's batch counters that the file lacks; they were set to 0.
        missing: the model's tensors that were left as they were.
        unexpected: the file's keys that the model has no place for.
        misshapen: the file's keys whose shape is not the model's, with both shapes.
        notes: what the keys cannot tell.
    """

    source: str
    loaded: int
    renamed: int
    merged: int
    zeroed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{self.loaded} tensors loaded, {self.renamed} of them renamed, {self.merged} equal copies merged"
        lines = [f"Names of {self.source}: {counts}."]
        if self.zeroed:
            lines.append(f"Not in the file and set to 0: {_some(self.zeroed)}.")
        lines += [f"{what[0].upper()}{what[1:]}." for what in self._wrong()]
        return "\n".join([*lines, *self.notes])

    def _wrong(self) -> list[str]:
        parts = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.misshapen))
        return [f"{what}: {_some(names)}" for what, names in parts if names]


@dataclass(frozen=True)
class _Family:
    """Networks with one way of naming; ``marker`` matches keys that no other family before it has."""

    name: str
    marker: str

    def has(self, keys: Iterable[str]) -> bool:
        marker = re.compile(self.marker)
        return any(marker.match(key) for key in keys)


_OURS = _Family("dia_kernels.models", r"stages\.\d+\.blocks\.\d+\.")
_AUTHORS_PRERESNET = _Family("the authors' PreResNet", r"layer\d+\.ModuleList\.\d+\.bn_additional\.")
_AUTHORS_RESNET = _Family("the authors' ResNet", r"layer\d+\.ModuleList\.\d+\.")
_AUTHORS_WRN = _Family("the authors' WRN", r"block\d+\.ModuleList\.\d+\.")
_AUTHORS_RESNEXT = _Family("the authors' ResNeXt", r"stage_\d+\.ModuleList\.\d+\.")
_PYTORCHCV_PRERESNET = _Family("pytorchcv's pre-activation networks", r"features\.post_activ\.")
_PYTORCHCV = _Family("pytorchcv's networks", r"features\.stage\d+\.unit\d+\.body\.")
_TORCHVISION = _Family("torchvision's ResNets", r"layer\d+\.\d+\.conv\d+\.")

# In the order in which they are tried.
_FAMILIES = (
    _OURS,
    _AUTHORS_PRERESNET,
    _AUTHORS_RESNET,
    _AUTHORS_WRN,
    _AUTHORS_RESNEXT,
    _PYTORCHCV_PRERESNET,
    _PYTORCHCV,
    _TORCHVISION,
)

_Rules: TypeAlias = tuple[tuple[str, str], ...]

# The last part of a key: weight, bias, running_mean, ...
_OF = r"(?P<of>\w+)"


def _authors_cell(stage: str) -> _Rules:
    """Rules for the cell that follows the regular expression ``stage``."""
    rules = []
    for theirs, path in (("ih", "input"), ("hh", "hidden")):
        into = f"stages.{{stage0}}.attention.{path}"
        for layer, linear in (("0", "reduce"), ("2", "expand")):
            rules.append((rf"{stage}\.lstm\.w_{theirs}\.0\.seq\.{layer}\.{_OF}", f"{into}_{linear}_{{of}}"))
        rules.append((rf"{stage}\.lstm\.w_{theirs}\.(?P<layer>\d+)\.{_OF}", f"{into}_{{of}}_l{{layer}}"))
    return tuple(rules)


def _pytorchcv_cell(attention: str) -> _Rules:
    """Rules from the attention of any unit of a stage to the template ``attention``."""
    lstm = r"features\.stage(?P<stage>\d+)\.unit\d+\.attention\.lstm"
    rules = []
    for theirs, path in (("x", "input"), ("h", "hidden")):
        for layer, linear in (("fc1", "reduce"), ("fc2", "expand")):
            rules.append((rf"{lstm}\.{theirs}_amps\.amp1\.{layer}\.{_OF}", f"{attention}.{path}_{linear}_{{of}}"))
        rules.append((rf"{lstm}\.{theirs}_amps\.amp(?P<layer>\d+)\.{_OF}", f"{attention}.{path}_{{of}}_l{{layer0}}"))
    return tuple(rules)


_LAYER = r"layer(?P<stage>\d+)"
_LAYER_BLOCK = rf"{_LAYER}\.ModuleList\.(?P<block>\d+)"
_WIDE = r"block(?P<stage>\d+)"
_WIDE_BLOCK = rf"{_WIDE}\.ModuleList\.(?P<block>\d+)"
_NEXT = r"stage_(?P<stage>\d+)"
_NEXT_BLOCK = rf"{_NEXT}\.ModuleList\.(?P<block>\d+)"
_UNIT = r"features\.stage(?P<stage>\d+)\.unit(?P<unit>\d+)"

# Of the rules for a file and a model the first whose expression is the whole key gives the new key. In a template
# {stage} is what the group of that name matched, and {stage0} is one less: pytorchcv counts from 1.
_RULES: dict[tuple[_Family, _Family], _Rules] = {
    (_AUTHORS_RESNET, _OURS): (
        (rf"conv1\.{_OF}", "stem.0.{of}"),
        (rf"bn1\.{_OF}", "stem.1.{of}"),
        (rf"{_LAYER_BLOCK}\.(?P<layer>conv\d|bn\d)\.{_OF}", "stages.{stage0}.blocks.{block}.{layer}.{of}"),
        (rf"{_LAYER_BLOCK}\.downsample\.(?P<k>\d)\.{_OF}", "stages.{stage0}.blocks.{block}.projection.{k}.{of}"),
        *_authors_cell(_LAYER),
        (rf"fc\.{_OF}", "classifier.{of}"),
    ),
    (_AUTHORS_PRERESNET, _OURS): (
        (rf"conv1\.{_OF}", "stem.{of}"),
        (rf"{_LAYER_BLOCK}\.(?P<layer>conv\d|bn\d)\.{_OF}", "stages.{stage0}.blocks.{block}.{layer}.{of}"),
        (rf"{_LAYER_BLOCK}\.bn_additional\.{_OF}", "stages.{stage0}.blocks.{block}.tail_bn.{of}"),
        (rf"{_LAYER_BLOCK}\.downsample\.0\.{_OF}", "stages.{stage0}.blocks.{block}.projection.{of}"),
        *_authors_cell(_LAYER),
        (rf"bn\.{_OF}", "head.0.{of}"),
        (rf"fc\.{_OF}", "classifier.{of}"),
    ),
    (_AUTHORS_WRN, _OURS): (
        (rf"conv1\.{_OF}", "stem.{of}"),
        (rf"{_WIDE_BLOCK}\.(?P<layer>conv\d|bn\d)\.{_OF}", "stages.{stage0}.blocks.{block}.{layer}.{of}"),
        (rf"{_WIDE_BLOCK}\.bn_additional\.{_OF}", "stages.{stage0}.blocks.{block}.tail_bn.{of}"),
        (rf"{_WIDE_BLOCK}\.convShortcut\.{_OF}", "stages.{stage0}.blocks.{block}.projection.{of}"),
        *_authors_cell(_WIDE),
        (rf"bn1\.{_OF}", "head.0.{of}"),
        (rf"fc\.{_OF}", "classifier.{of}"),
    ),
    (_AUTHORS_RESNEXT, _OURS): (
        (rf"conv_1_3x3\.{_OF}", "stem.0.{of}"),
        (rf"bn_1\.{_OF}", "stem.1.{of}"),
        (rf"{_NEXT_BLOCK}\.conv_reduce\.{_OF}", "stages.{stage0}.blocks.{block}.conv1.{of}"),
        (rf"{_NEXT_BLOCK}\.bn_reduce\.{_OF}", "stages.{stage0}.blocks.{block}.bn1.{of}"),
        (rf"{_NEXT_BLOCK}\.conv_conv\.{_OF}", "stages.{stage0}.blocks.{block}.conv2.{of}"),
        (rf"{_NEXT_BLOCK}\.bn\.{_OF}", "stages.{stage0}.blocks.{block}.bn2.{of}"),
        (rf"{_NEXT_BLOCK}\.conv_expand\.{_OF}", "stages.{stage0}.blocks.{block}.conv3.{of}"),
        (rf"{_NEXT_BLOCK}\.bn_expand\.{_OF}", "stages.{stage0}.blocks.{block}.bn3.{of}"),
        (rf"{_NEXT_BLOCK}\.shortcut\.shortcut_conv\.{_OF}", "stages.{stage0}.blocks.{block}.projection.0.{of}"),
        (rf"{_NEXT_BLOCK}\.shortcut\.shortcut_bn\.{_OF}", "stages.{stage0}.blocks.{block}.projection.1.{of}"),
        *_authors_cell(_NEXT),
        (rf"classifier\.{_OF}", "classifier.{of}"),
    ),
    # The stem of the networks for ImageNet has one more level: init_block.conv.conv.
    (_PYTORCHCV, _OURS): (
        (rf"features\.init_block\.(?:conv\.)?conv\.{_OF}", "stem.0.{of}"),
        (rf"features\.init_block\.(?:conv\.)?bn\.{_OF}", "stem.1.{of}"),
        (rf"{_UNIT}\.body\.conv(?P<k>\d)\.(?P<layer>conv|bn)\.{_OF}", "stages.{stage0}.blocks.{unit0}.{layer}{k}.{of}"),
        (rf"{_UNIT}\.identity_conv\.conv\.{_OF}", "stages.{stage0}.blocks.{unit0}.projection.0.{of}"),
        (rf"{_UNIT}\.identity_conv\.bn\.{_OF}", "stages.{stage0}.blocks.{unit0}.projection.1.{of}"),
        *_pytorchcv_cell("stages.{stage0}.attention"),
        (rf"output\.{_OF}", "classifier.{of}"),
    ),
    (_PYTORCHCV, _TORCHVISION): (
        (rf"features\.init_block\.(?:conv\.)?conv\.{_OF}", "conv1.{of}"),
        (rf"features\.init_block\.(?:conv\.)?bn\.{_OF}", "bn1.{of}"),
        (rf"{_UNIT}\.body\.conv(?P<k>\d)\.(?P<layer>conv|bn)\.{_OF}", "layer{stage}.{unit0}.{layer}{k}.{of}"),
        (rf"{_UNIT}\.identity_conv\.conv\.{_OF}", "layer{stage}.{unit0}.downsample.0.{of}"),
        (rf"{_UNIT}\.identity_conv\.bn\.{_OF}", "layer{stage}.{unit0}.downsample.1.{of}"),
        *_pytorchcv_cell("layer{stage}.0.attention"),
        (rf"output\.{_OF}", "fc.{of}"),
    ),
}

_STRIDES = (
    "The names do not tell which convolution of a bottleneck has the stride: the 3x3 in torchvision and in"
    " diaresnet50b and its like, the first in diaresnet50 and its like."
)


def key_map(keys: Iterable[str], model_keys: Iterable[str]) -> dict[str, str]:
    """The model's name for each key of a file; a pure function of names.

    Args:
        keys: of the file's state dict.
        model_keys: of the model's.

    Returns:
        ``{key: name}``, without the keys that no rule knows. Names may not be the model's, if it is another network;
        several keys may have one name: pytorchcv repeats the attention in every unit of a stage.

    Raises:
        CheckpointError: the file's keys are of no known form, or of one that has no map to the model's.
    """
    _, _, names = _recognise(list(keys), list(model_keys))
    return names


def load(model: nn.Module, file: str | os.PathLike[str] | Mapping[str, object], *, strict: bool = True) -> LoadReport:
    """Loads weights of this library, of the authors or of pytorchcv into ``model``; all of them, or none.

    Args:
        model: from ``dia_kernels.models.create``, for all three sources; or a ResNet with torchvision's names and
            one attention a stage under ``layer{s}.0.attention``, for pytorchcv's networks for ImageNet; or any
            network, for files with its own keys.
        file: path of a file that ``torch.load`` reads with ``weights_only=True``, or what it would return: a state
            dict, or a mapping with one under ``"state_dict"``. Shapes are the model's; dtypes and devices may differ.
        strict: False loads what fits and reports the rest.

    Returns:
        What was loaded, and from which source.

    Raises:
        CheckpointError: the file is no checkpoint, is of no known source, has copies of one tensor that differ, or
            (with ``strict``) does not fill the model exactly. The model is as it was.
        OSError: the file cannot be opened.
        TypeError: an argument is of the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    tensors = _read(file)
    places: dict[str, Tensor] = model.state_dict(keep_vars=True)
    source, target, names = _recognise(list(tensors), list(places))

    # A tensor that the model has under several names is one place, filled once.
    first_names: dict[int, str] = {}
    for name, place in places.items():
        first_names.setdefault(id(place), name)
    chosen: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    for key, name in names.items():
        if name in places:
            kept = chosen.setdefault(first_names[id(places[name])], key)
            if kept != key:
                copies.append((kept, key))
    different = [f"{kept} and {key}" for kept, key in copies if not torch.equal(tensors[kept], tensors[key])]
    if different:
        raise CheckpointError(f"file: copies of one tensor differ: {_some(different)}. Nothing was loaded.")

    fitting = {name: key for name, key in chosen.items() if tensors[key].shape == places[name].shape}
    absent = [name for name in first_names.values() if name not in chosen]
    zeroed = [name for name in absent if _is_counter_of(name, fitting)]
    strides = (source, target) == (_PYTORCHCV, _TORCHVISION) and any(".conv3." in name for name in fitting)
    report = LoadReport(
        source=source.name if source else "the model itself",
        loaded=len(fitting),
        renamed=sum(key != name for name, key in fitting.items()),
        merged=sum(kept in fitting.values() for kept, _ in copies),
        zeroed=tuple(zeroed),
        missing=tuple(name for name in absent if name not in zeroed),
        unexpected=tuple(key for key in tensors if names.get(key) not in places),
        misshapen=tuple(
            f"{key} {tuple(tensors[key].shape)} for {name} {tuple(places[name].shape)}"
            for name, key in chosen.items()
            if name not in fitting
        ),
        notes=(_STRIDES,) if strides else (),
    )
    wrong = report._wrong()
    if wrong and (strict or not fitting):
        raise CheckpointError(
            f"file: names of {report.source}, which do not fit the model. {'; '.join(wrong)}. Nothing was loaded."
        )
    if any(places[name].is_meta for name in fitting):
        raise CheckpointError("model: expected memory to load into, got tensors on the meta device")
    with torch.no_grad():
        for name, key in fitting.items():
            places[name].copy_(tensors[key])
        for name in zeroed:
            places[name].zero_()
    return report


def _read(file: str | os.PathLike[str] | Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict in ``file``."""
    content: object = file
    if isinstance(file, (str, os.PathLike)):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        # The reader of pickles fails in many ways on what is none.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"file: {os.fspath(file)} is no checkpoint that torch.load reads with weights_only=True"
                f" ({type(error).__name__}: {reason})"
            ) from error
    elif not isinstance(file, Mapping):
        raise TypeError(f"file: expected a path or a state dict, got {type(file).__name__}")
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"file: expected a state dict, got {type(content).__name__}")
    if not content:
        raise CheckpointError("file: expected a state dict, got an empty one")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"file: expected a state dict, got {type(value).__name__} under {key!r}")
        if value.is_meta:
            raise CheckpointError(f"file: expected values, got a tensor on the meta device under {key!r}")
    return dict(content)


def _recognise(keys: list[str], model_keys: list[str]) -> tuple[_Family | None, _Family | None, dict[str, str]]:
    """Families of the file and of the model, and the map of ``key_map``."""
    prefix, model_prefix = _wrapper(keys), _wrapper(model_keys)
    bare = {key: key.removeprefix(prefix) for key in keys}
    bare_model = {key.removeprefix(model_prefix) for key in model_keys}
    source, target = _family(bare.values()), _family(bare_model)
    if source and target and source is not target:
        rules = _RULES.get((source, target))
        if rules is None:
            raise CheckpointError(_no_map(source, target))
        names: dict[str, str | None] = {key: _renamed(name, rules) for key, name in bare.items()}
    elif (source and source is target) or not bare_model.isdisjoint(bare.values()):
        names = dict(bare)
    elif source:
        raise CheckpointError(_no_map(source, target))
    else:
        raise CheckpointError(f"file: keys of no known form: {_some(keys)}")
    return source, target, {key: model_prefix + name for key, name in names.items() if name is not None}


def _no_map(source: _Family, target: _Family | None) -> str:
    text = f"file: names of {source.name}, no map to those of {target.name if target else 'the model'}"
    if source is _PYTORCHCV_PRERESNET:
        text += " (their blocks have no norm before the attention, and project the activated input)"
    return text


def _wrapper(keys: list[str]) -> str:
    """What wrappers have put before every key."""
    prefix = ""
    while found := [w for w in _WRAPPERS if keys and all(key.startswith(prefix + w) for key in keys)]:
        prefix += found[0]
    return prefix


def _family(keys: Iterable[str]) -> _Family | None:
    keys = list(keys)
    return next((family for family in _FAMILIES if family.has(keys)), None)


def _renamed(key: str, rules: _Rules) -> str | None:
    """The key by the first rule that fits it; None without one."""
    for pattern, template in rules:
        if match := re.fullmatch(pattern, key):
            groups = match.groupdict()
            less = {f"{name}0": int(text) - 1 for name, text in groups.items() if text.isdigit()}
            return template.format(**groups, **less)
    return None


def _is_counter_of(name: str, filled: Mapping[str, str]) -> bool:
    """Whether ``name`` counts the batches of a norm that is filled; files from before PyTorch 0.4.1 lack it."""
    norm, _, last = name.rpartition(".")
    return last == "num_batches_tracked" and f"{norm}.running_mean" in filled


def _some(names: Iterable[str]) -> str:
    """A count, and the first few names."""
    names = list(names)
    more = ", ..." if len(names) > _LISTED else ""
    return f"{len(names)} ({', '.join(names[:_LISTED])}{more})"
