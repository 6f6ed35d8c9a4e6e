"""Raw operators called with wrong arguments: each call must be refused, or give the right result.

A program of its own, because the fault that it looks for ends the process; tests/test_fuzz.py runs it under the address
sanitizer. A case is made from its seed and number alone, and is written down before it runs, so that the last line of
the log is the case that crashed. ``python tests/operator_fuzzing.py --first 17 --cases 1`` runs case 17 again.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dia_kernels import backends, masks, operators
from dia_kernels.cells import split_parameters
from dia_kernels.schemas import RESULT_MAPS

NAN = float("nan")
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Sizes beyond any memory and near the end of what 64 bits count.
HUGE = (1 << 45, 1 << 61)
#: Elements of a tensor that further faults may copy.
MOST_COPIED = 1 << 20


@dataclass
class Call:
    """A call of an operator: its arguments by name, in order."""

    operator: str
    arguments: dict[str, object]

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(f'{name}={text_of(value)}' for name, value in self.arguments.items())})"


def text_of(value: object) -> str:
    """A tensor by what matters of it, anything else as it is."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout != torch.strided:
        return f"<{value.dtype} {tuple(value.shape)} {value.layout}>"
    return (
        f"<{value.dtype} {tuple(value.shape)} strides {value.stride()} offset {value.storage_offset()} {value.device}>"
    )


def names_of(operator: str) -> list[str]:
    return [argument.name for argument in getattr(operators.native, operator)._schema.arguments]


def entry(of: operators.Operators, operator: str) -> Callable[..., object]:
    """The operator; one that takes what several steps left, with the same of two."""
    called = getattr(of, operator)
    if operator != "parameter_gradients":
        return called
    return lambda factors, tables, h, bottleneck: called([factors] * 2, [tables] * 2, [h] * 2, bottleneck)


# --- calls that are right ---------------------------------------------------------------------------


def in_guards(rng: random.Random, t: Tensor) -> Tensor:
    """A copy of ``t`` at some place and strides in memory whose other elements are NaN."""
    if t.ndim == 0 or rng.random() < 0.4:
        return t.clone()
    order = list(range(t.ndim))
    if rng.random() < 0.5:
        rng.shuffle(order)
    pads = [rng.choice((0, 0, 0, 1, 2)) for _ in order]
    step = rng.choice((1, 1, 2))
    sizes = [t.shape[d] + pad for d, pad in zip(order, pads, strict=True)]
    sizes[-1] *= step
    count = torch.Size(sizes).numel()
    phase = rng.randrange(16)
    memory = torch.full((phase + count,), NAN, dtype=t.dtype)
    wide = memory[phase:].view(sizes)
    for d, (axis, pad) in enumerate(zip(order, pads, strict=True)):
        wide = wide.narrow(d, pad // 2, (t.shape[axis]) * (step if d == t.ndim - 1 else 1))
    wide = wide[..., ::step].permute([order.index(d) for d in range(t.ndim)])
    return wide.copy_(t)


#: Those of maps that may have no channels: a cell has at least one, and a norm with buffers too.
CHANNELS_OR_NONE = ("pool", "statistics", "rescale", "rescale_backward", "norm_pool", "norm_pool_backward")
CHANNELS_OR_NONE += ("norm_rescale", "norm_rescale_backward")


class Maker:
    """Tensors of one valid problem, with a map of ``dtype``; ``masked``: whether its ReLU may have a mask."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, masked: bool) -> None:
        self.rng = rng
        self.masked = masked
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))
        self.dtype = dtype
        self.table_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.n = rng.choice((0, 1, 1, 2, 3, 9))
        self.c = rng.choice((1, 2, 3, 8, 12, 25, 40))
        self.m = rng.randint(1, self.c)
        self.channel_dim = rng.choice((1, -1))
        spatial = [rng.choice((0, 1, 2, 3, 5, 7)) for _ in range(rng.randint(1, 3))]
        self.shape = (self.n, self.c, *spatial) if self.channel_dim == 1 else (self.n, *spatial, self.c)
        self.flags = {"channel_dim": self.channel_dim, "relu": self.flag(), "tanh_output": self.flag()}

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def draw(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(sizes, generator=self.generator, dtype=torch.float64).to(dtype or self.table_dtype)
        return in_guards(self.rng, drawn)

    def map(self) -> Tensor:
        return self.draw(*self.shape, dtype=self.dtype)

    def table(self) -> Tensor:
        return self.draw(self.n, self.c)

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.flag() else None

    def parameters(self) -> dict[str, Tensor]:
        shapes = {"reduce_weight": (self.m, self.c), "reduce_bias": (self.m,)}
        shapes |= {"expand_weight": (4 * self.c, self.m), "expand_bias": (4 * self.c,)}
        return {
            f"{path}_{name}": self.draw(*shape) / self.m**0.5
            for path in ("input", "hidden")
            for name, shape in shapes.items()
        }

    def step(self) -> dict[str, object]:
        state = self.flag()
        given = {name: self.table() if state else None for name in ("h", "c")}
        return {"x": self.map(), "shortcut": self.maybe(self.map)} | given | self.parameters() | self.flags

    def tail(self) -> dict[str, object]:
        arguments = self.step()
        arguments["z"] = arguments.pop("x")
        given = self.flag()
        arguments |= {name: self.maybe(lambda: self.draw(self.c)) for name in ("gamma", "beta")}
        arguments["mean"] = self.draw(self.c) if given else None
        arguments["var"] = self.draw(self.c).square() + 0.5 if given else None
        return arguments | {"eps": self.rng.choice((1e-5, 0.1))}

    def keeps_mask(self, x: Tensor) -> bool:
        return self.flags["relu"] and self.masked and masks.fits(x, self.channel_dim) and self.flag()

    def needs(self, *names: str) -> dict[str, bool]:
        return {f"need_{name}": self.flag() for name in names}

    def as_factors(self, arguments: dict[str, object]) -> dict[str, bool]:
        return {"as_factors": arguments["h"] is not None and self.flag()}

    def incoming(self) -> dict[str, Tensor | None]:
        return {"dy": self.maybe(self.map), "dh": self.maybe(self.table), "dc": self.maybe(self.table)}

    def arguments(self, operator: str) -> dict[str, object]:
        """All arguments of a valid call, by name, in any order."""
        if self.rng.random() < 0.05 and operator in CHANNELS_OR_NONE:
            self.c = 0
            self.shape = tuple(0 if d == self.channel_dim % len(self.shape) else k for d, k in enumerate(self.shape))
        if operator in ("pool", "statistics"):
            return {names_of(operator)[0]: self.map(), "channel_dim": self.channel_dim}
        if operator == "rescale":
            return {"x": self.map(), "scale": self.table(), "shortcut": self.maybe(self.map)} | self.flags
        if operator == "rescale_backward":
            maps = {"dy": self.map(), "x": self.map(), "y": self.maybe(self.map), "scale": self.table()}
            return maps | self.flags | self.needs("x", "scale", "shortcut")
        if operator in ("step", "step_"):
            arguments = self.step()
            return arguments | {"keep_tables": self.flag(), "keep_mask": self.keeps_mask(arguments["x"])}
        if operator == "parameter_gradients":
            return {
                "factors": self.draw(self.n * (4 * self.c + 2 * self.m)),
                "tables": self.draw(self.n * (5 * self.c + 2 * self.m) + self.rng.choice((0, 7))),
                "h": self.table(),
                "bottleneck": self.m,
            }
        if operator == "step_backward":
            arguments = self.step() | {"keep_tables": True}
            kept = self.keeps_mask(arguments["x"])
            y, _, new_c, tables, mask = operators.plain.step(*ordered("step", arguments | {"keep_mask": kept}))
            arguments |= self.incoming() | {"y": mask if kept else y, "new_c": new_c, "tables": tables}
            return arguments | self.needs("x", "shortcut", "state", "parameters") | self.as_factors(arguments)
        if operator.startswith("norm_"):
            return self.norm_apart(operator)
        arguments = self.tail()
        kept = arguments["keep_mask"] = self.keeps_mask(arguments["z"])
        if operator == "tail":
            return arguments
        if operator == "tail_join":
            given = {name: self.draw(self.c) for name in ("mean", "var")}
            given["var"] = given["var"].square() + 0.5
            return arguments | given | {"means": self.draw(self.n, self.c, dtype=torch.float64)}
        if operator == "tail_tracking_":
            return arguments | self.buffers()
        y, new_h, new_c, tables, *_, mask = operators.plain.tail(*ordered("tail", arguments))
        arguments |= self.incoming() | {"y": mask if kept else y, "new_c": new_c, "tables": tables}
        if operator == "tail_spread":
            arguments["y"] = arguments["y"] if self.flags["relu"] else None
            return arguments | {"new_h": new_h, "dp": self.table(), "shares": self.draw(2, self.c)}
        arguments["batch"] = arguments["mean"] is None
        asked = self.needs("z", "shortcut", "state", "parameters", "affine")
        return arguments | asked | self.as_factors(arguments)

    def buffers(self) -> dict[str, object]:
        given = {name: self.draw(self.c).contiguous() for name in ("running_mean", "running_var")}
        return given | {"batches": torch.tensor(3), "factor": self.rng.choice((0.1, 0.9))}

    def norm_apart(self, operator: str) -> dict[str, object]:
        """Of the parts of a tail around a cell of any kind."""
        arguments = {
            k: v for k, v in self.tail().items() if k in ("z", "shortcut", "gamma", "beta", "mean", "var", "eps")
        }
        arguments |= self.flags | {"with_variance": self.flag(), "with_extreme": self.flag(), "keep_tokens": False}
        if operator == "norm_pool":
            return arguments
        if operator == "norm_pool_tracking_":
            return arguments | self.buffers()
        pooled = operators.plain.norm_pool(*ordered("norm_pool", arguments))
        p, tables, _, _, variance, extreme, where, *_ = pooled
        kept = self.keeps_mask(arguments["z"])
        arguments |= {"tables": tables, "scale": self.table(), "keep_mask": kept}
        arguments |= dict.fromkeys(("token_of_g", "token_of_handed"))
        if operator == "norm_rescale":
            return arguments
        y, mask = operators.plain.norm_rescale(*ordered("norm_rescale", arguments))
        arguments |= {"dy": self.map(), "y": (mask if kept else y) if self.flags["relu"] else None}
        arguments |= {"g": self.map(), "handed": self.draw(3, self.n, self.c), "dp": p}
        wanted = arguments["with_variance"], arguments["with_extreme"]
        of_variance = self.draw(self.n, self.c, dtype=torch.float64), variance
        of_extreme = self.table(), extreme, where
        given = (of_variance if wanted[0] else (None,) * 2) + (of_extreme if wanted[1] else (None,) * 3)
        arguments |= dict(zip(("dvariance", "variance", "dextreme", "extreme", "where"), given, strict=True))
        return arguments | {"batch": arguments["mean"] is None} | self.needs("g", "z")


def ordered(operator: str, arguments: dict[str, object]) -> list[object]:
    return [arguments[name] for name in names_of(operator)]


# --- what can be wrong with a tensor -----------------------------------------------------------------


def resized(rng: random.Random, t: Tensor) -> Tensor:
    """Another size in one dimension: one more or less, none, or beyond any memory."""
    if t.ndim == 0:
        return t.reshape(1)
    d = rng.randrange(t.ndim)
    sizes = list(t.shape)
    sizes[d] = rng.choice((sizes[d] + 1, max(sizes[d] - 1, 0), 0, 2 * sizes[d]))
    return torch.randn(sizes).to(t.dtype)


def enormous(rng: random.Random, t: Tensor) -> Tensor:
    d = rng.randrange(max(t.ndim, 1))
    sizes = [1] * t.ndim
    sizes[d : d + 1] = [rng.choice(HUGE)]
    return torch.ones((), dtype=t.dtype).expand(sizes)


def other_rank(rng: random.Random, t: Tensor) -> Tensor:
    choices = [lambda: t.unsqueeze(rng.randint(0, t.ndim)), lambda: t.reshape(-1), lambda: t.mT if t.ndim > 1 else t]
    if t.ndim and t.shape[0]:
        choices.append(lambda: t[0])
    return rng.choice(choices)()


def other_dtype(rng: random.Random, t: Tensor) -> Tensor:
    return t.to(rng.choice((*FLOATING, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8)))


def elsewhere(_: random.Random, t: Tensor) -> Tensor:
    return t.to("meta")


def other_layout(rng: random.Random, t: Tensor) -> Tensor:
    if t.ndim == 2 and rng.random() < 0.5:
        return t.to_sparse_csr()
    if t.dtype == torch.float32 and 0 < t.ndim <= 5 and t.numel() and rng.random() < 0.5:
        return t.to_mkldnn()
    return t.to_sparse()


def odd_bits(rng: random.Random, t: Tensor) -> Tensor:
    """Tensors whose memory is not what they say: with a pending minus, or with none at all."""
    if t.dtype != torch.bool and rng.random() < 0.5:
        return torch._neg_view(t)
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def overlapping(rng: random.Random, t: Tensor) -> Tensor:
    """The same sizes at strides that cross each other."""
    memory = torch.randn(2 * t.numel() + 1).to(t.dtype)
    room = len(memory)
    strides = []
    for size in t.shape:
        strides.append(rng.randint(0, max(room - 1, 0) // max(size - 1, 1)))
        room -= strides[-1] * max(size - 1, 0)
    return memory.as_strided(t.shape, strides)


def freed(rng: random.Random, t: Tensor) -> Tensor:
    """A tensor whose storage was given back, wholly or in part, as sharded training does."""
    t = t.clone()
    t.untyped_storage().resize_(rng.choice((0, t.untyped_storage().nbytes() // 2)))
    return t


def with_gradient(_: random.Random, t: Tensor) -> Tensor:
    return t.detach().requires_grad_() if t.dtype.is_floating_point else t


FAULTS = (
    resized, enormous, other_rank, other_dtype, elsewhere, other_layout, odd_bits, overlapping, with_gradient,
)  # fmt: skip


def corrupt(rng: random.Random, call: Call) -> str:
    """Changes one argument of the call; returns which, and how."""
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    if isinstance(value, bool):
        call.arguments[name] = not value
    elif isinstance(value, int):
        call.arguments[name] = rng.choice((0, 1, -1, 2, -2, 3, -3, (1 << 62), -(1 << 63)))
    elif isinstance(value, float):
        call.arguments[name] = rng.choice((NAN, float("inf"), -1.0, 0.0, 1e300))
    elif value is None or rng.random() < 0.1:
        others = [t for other, t in call.tensors().items() if other != name]
        call.arguments[name] = rng.choice([*others, None])
    elif isinstance(value, Tensor) and rng.random() < 0.1:
        other = rng.choice(list(call.tensors()))
        call.arguments[name], call.arguments[other] = call.arguments[other], value
        return f"{name} <-> {other}"
    elif call.operator == "step_" and name != "x" and rng.random() < 0.5:
        call.arguments[name] = within(rng, call.arguments["x"], value)
        return f"{name} within x"
    else:
        fault = rng.choice(FAULTS)
        if value.numel() > MOST_COPIED:
            return f"{name} as it was"  # made enormous before: hours of copying
        others = call.tensors().values()
        if fault is enormous and any(t.layout != torch.strided for t in others):
            return f"{name} as it was"  # the reference's, for another's layout: years of work
        if fault is other_layout and any(t.numel() > MOST_COPIED for t in others):
            return f"{name} as it was"
        if fault is enormous and call.operator in ("pool", "statistics", "norm_pool", "norm_pool_tracking_"):
            return f"{name} as it was"  # nothing else is there that it would not fit: years of work, and right
        if fault is odd_bits and call.operator in TRACKING:
            return f"{name} as it was"  # what PyTorch does for these it does for one tensor that is written, no more
        try:
            call.arguments[name] = fault(rng, value)
        except (RuntimeError, NotImplementedError, TypeError):  # of a tensor that was already made wrong
            return f"{name} as it was"
        return f"{name} {fault.__name__}"
    return f"{name} = {text_of(call.arguments[name])}"


def within(rng: random.Random, x: object, t: Tensor) -> Tensor:
    """A view shaped like ``t`` of the memory of ``x``, which is written over."""
    if not isinstance(x, Tensor) or x.dtype != t.dtype or not has_memory(x):
        return t
    room = x.untyped_storage().nbytes() // x.element_size() - t.numel()
    if room < 0:
        return t
    dense = torch.empty(t.shape, device="meta").stride()
    return x.as_strided(t.shape, dense, rng.randint(0, room)).nan_to_num_() if x.numel() else t


# --- what must come out ----------------------------------------------------------------------------


def bytes_of(t: Tensor) -> Tensor:
    """A copy of the whole memory of ``t``, what lies around it included."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


def has_memory(t: Tensor) -> bool:
    plain = t.layout == torch.strided and t.device.type == "cpu" and not t._is_zerotensor()
    return plain and t.untyped_storage().nbytes() > 0


def lies_within_its_storage(t: Tensor) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return (t.storage_offset() + last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def is_comparable(call: Call, faults: list[str]) -> bool:
    """Whether two implementations must agree.

    Not where a huge factor makes all of a rounding error; nor where the tables tell other things than the rest of the
    arguments, which one may read and the other compute: the means of a map, and that without a state all samples have
    the same bottleneck.
    """
    eps = call.arguments.get("eps", 1.0)
    of_norm = call.operator.startswith(("tail", "norm"))
    told_by_tables = {"tables", "z", "channel_dim"} if of_norm else {"tables"}
    if "tables" in call.arguments and told_by_tables & {*" ".join(faults).split()}:
        return False
    return isinstance(eps, float) and 1e-6 < eps < 1e6


#: Operators that move a norm's buffers; and what an operator writes over.
TRACKING = ("tail_tracking_", "norm_pool_tracking_")
WRITTEN = {"step_": ("x",)} | dict.fromkeys(TRACKING, ("running_mean", "running_var", "batches"))


def tensors_of(result: object) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


#: Which result of a gradient is the flat one of the parameters.
FLAT = {"step_backward": 4, "tail_backward": 6, "tail_reduce": 5}


#: Which results are the tables of a norm, which hold what each implementer's own gradient needs, and tokens, which hold
#: nothing.
PRIVATE = dict.fromkeys(("tail", "tail_tracking_", "tail_join"), (3,))
PRIVATE |= dict.fromkeys(("norm_pool", "norm_pool_tracking_"), (1, 2, 3))


def apart(call: Call, results: list[Tensor]) -> list[Tensor]:
    """``results`` with the gradients of the parameters each for itself."""
    place = FLAT.get(call.operator)
    if place is None or not results[place].numel() or call.arguments.get("as_factors"):
        return results
    split = split_parameters(results[place], *call.arguments["input_reduce_weight"].shape)
    return [*results[:place], *split, *results[place + 1 :]]


def assert_agree(call: Call, found: list[Tensor], expected: list[Tensor], on_gpu: bool) -> None:
    """Sizes, dtypes, where NaN lies, and values up to the rounding of short sums."""
    found, expected = apart(call, found), apart(call, expected)
    hidden_reduce = FLAT.get(call.operator, -1) + 4
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape, f"result {index}: {ours.shape}, the reference {theirs.shape}"
        assert ours.dtype == theirs.dtype, f"result {index}: {ours.dtype}, the reference {theirs.dtype}"
        if index in PRIVATE.get(call.operator, ()):
            continue
        if on_gpu and index == hidden_reduce > 3 and call.arguments["h"] is None:
            continue  # zeros there, also where others multiply NaN by the state's zeros
        a, b = ours.double(), theirs.double()
        assert torch.equal(a.isnan(), b.isnan()), f"result {index}: NaN elsewhere than in the reference"
        finite = a.isfinite() & b.isfinite()
        scale = b[finite].abs().max().clamp(min=1.0) if finite.any() else 1.0
        share = max(1e-3, 4 * torch.finfo(ours.dtype).eps) if ours.dtype.is_floating_point else 0
        assert ((a - b)[finite].abs() <= share * scale).all(), f"result {index}: not that of the reference"


def run(call: Call, faults: list[str], operators_: operators.Operators) -> str:
    """Runs a call with these faults and checks what became of it: ``"refused"`` or ``"computed"``."""
    operator, reference = entry(operators_, call.operator), entry(operators.plain, call.operator)
    before = {name: bytes_of(t) for name, t in call.tensors().items() if has_memory(t)}
    fresh = [copied(t) if isinstance(t, Tensor) else t for t in call.arguments.values()]
    refused = None
    try:
        result = tensors_of(operator(*call.arguments.values()))
    except Exception as error:  # of whatever kind: tensors without a kernel of ours are the reference's
        refused = error
    written = WRITTEN.get(call.operator, ()) if refused is None else ()
    shared = {t.untyped_storage().data_ptr() for name, t in call.tensors().items() if name in written and has_memory(t)}
    for name, memory in before.items():
        t = call.arguments[name]
        if t.untyped_storage().data_ptr() not in shared:
            assert torch.equal(bytes_of(t), memory), f"{name}: written into"
    if refused is not None:
        assert str(refused).strip(), "an error without a word"
        return "refused"
    if any(t.layout != torch.strided for t in call.tensors().values()):
        return "computed"  # by the reference itself
    devices = {t.device.type for t in call.tensors().values()}
    assert len(devices) == 1, f"tensors of several devices were taken: {devices}"
    if devices == {"meta"}:
        return "computed"
    if operators_ is operators.native and call.operator in RESULT_MAPS:
        assert_same_into(call, result)
    if is_comparable(call, faults):
        try:
            expected = tensors_of(reference(*fresh))
        except Exception as error:
            raise AssertionError("taken, though the reference refuses it") from error
        for name, theirs in zip(call.arguments, fresh, strict=True):
            if name in written and not overlaps_itself(call.arguments[name]):
                result, expected = [*result, call.arguments[name]], [*expected, theirs]
        assert_agree(call, result, expected, on_gpu=operators_ is not operators.native)
    return "computed"


def assert_same_into(call: Call, expected: list[Tensor]) -> None:
    """That into given maps the operator writes what it returned, and returns the rest."""
    maps = RESULT_MAPS[call.operator]
    given = [torch.full_like(t, NAN) if t.ndim > 1 else None for t in (expected[place] for place in maps)]
    rest = operators.native_into[call.operator](*call.arguments.values(), *given)
    found = [] if rest is None else tensors_of(rest)
    for place, t in zip(maps, given, strict=True):
        found.insert(place, expected[place] if t is None else t)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.shape == theirs.shape, f"result {index} into given maps: {ours.shape}, not {theirs.shape}"
        if index not in PRIVATE.get(call.operator, ()):
            same = torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
            assert same, f"result {index} into given maps: not that of the operator"


def overlaps_itself(t: Tensor) -> bool:
    """Whether elements may share memory; what is written there last is anyone's guess, in PyTorch too."""
    below = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= below:
            return True
        below += stride * (size - 1)
    return False


def copied(t: Tensor) -> Tensor:
    """Equal values in memory that nothing shares."""
    if t.layout != torch.strided or t._is_zerotensor() or t.device.type == "meta":
        return t
    if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return t
    if not has_memory(t) or not lies_within_its_storage(t):  # PyTorch would read what was freed
        return t
    return t.detach().clone()


def implemented(operators_: operators.Operators) -> list[str]:
    """The operators that have a kernel for the CPU; the others are the reference's."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in operators.SCHEMAS if has_kernel(getattr(operators_, name).name(), "CPU")]


def make(
    seed: int, number: int, names: list[str], dtypes: tuple[torch.dtype, ...], masked: Collection[torch.dtype]
) -> tuple[Call, list[str]]:
    """Case ``number``: a call of one of ``names`` with a map of one of ``dtypes``, and what was made wrong with it.

    ``masked``: dtypes of maps whose masks the kernels know.
    """
    rng = random.Random(f"{seed}/{number}")
    operator, dtype = rng.choice(names), rng.choice(dtypes)
    if operator in TRACKING and dtype == torch.float64:
        dtype = torch.float32
    arguments = Maker(rng, dtype, dtype in masked).arguments(operator)
    call = Call(operator, {name: arguments[name] for name in names_of(operator)})
    if rng.random() < 0.1:  # alone: whatever of PyTorch's own looked at it would crash
        name = rng.choice(list(call.tensors()))
        call.arguments[name] = freed(rng, call.arguments[name])
        return call, [f"{name} freed"]
    return call, [corrupt(rng, call) for _ in range(rng.choice((0, 1, 1, 1, 2)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--backend", choices=("cpu", "simulated"), default="cpu")
    parser.add_argument(
        "--log", type=Path, default=Path("/dev/stderr"), help="where each case is written before it runs"
    )
    options = parser.parse_args()
    if options.backend == "simulated":
        import simulated_backend  # it builds the simulated GPU, which nobody else needs

        simulated_backend.library()
    assert backends.missing(options.backend) is None, backends.missing(options.backend)
    tried = backends.operators_of(options.backend, torch.empty(0))
    names = implemented(tried)
    dtypes = FLOATING if options.backend == "cpu" else FLOATING[1:]
    masked = () if options.backend == "cpu" else operators.GPU_MASKED_DTYPES
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    with options.log.open("w") as log, torch.no_grad():
        for number in range(options.first, options.first + options.cases):
            call, faults = make(options.seed, number, names, dtypes, masked)
            text = f"seed {options.seed} case {number}: {'; '.join(faults) or 'nothing wrong'}: {call}"
            print(text, file=log, flush=True)
            outcome = run(call, faults, tried)
            assert faults or outcome == "computed", "a right call was refused"
            outcomes[outcome] += 1
    print(f"{options.cases} cases: {outcomes['refused']} refused, {outcomes['computed']} computed and right")


if __name__ == "__main__":
    main()
