"""Calls of the step as hypothesis draws them: their tensors, their truth in float64, how far off a result may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accuracy import formula
from hypothesis import assume
from hypothesis import strategies as st
from problems import compute_dtype
from torch import Tensor, nn

from dia_kernels import LSTMParameters, SharedAttention
from dia_kernels.cells import StackedLayer
from dia_kernels.norms import Norm

NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FOLDED = ("batch", "running", "bare", "untracked", "affine")
CALLED = ("group", "function", "hooked")

Tensors = dict[str, Tensor]


# --- where a tensor lies in memory --------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The place of a tensor in memory that is NaN elsewhere.

    ``order``: its dimensions from the slowest to the fastest. ``pads``: elements before and behind in each of them,
    in the same order. ``step``: from one element of the fastest to the next. ``phase``: elements before all others.
    ``expanded``: dimensions (as the tensor counts them) whose elements are all the first one.
    """

    order: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    step: int = 1
    phase: int = 0
    expanded: tuple[int, ...] = ()

    def place(self, t: Tensor) -> Tensor:
        """A view with the values of ``t``, but for expanded dimensions."""
        narrow = t
        for d in self.expanded:
            narrow = narrow.narrow(d, 0, min(1, narrow.shape[d]))
        sizes = [narrow.shape[d] + sum(pad) for d, pad in zip(self.order, self.pads, strict=True)]
        sizes[-1] *= self.step
        memory = torch.full((self.phase + math.prod(sizes) + 1,), NAN, dtype=t.dtype)
        wide = memory[self.phase : -1].view(sizes)[..., :: self.step]
        for d, (axis, (before, _)) in enumerate(zip(self.order, self.pads, strict=True)):
            wide = wide.narrow(d, before, narrow.shape[axis])
        view = wide.permute([self.order.index(d) for d in range(t.ndim)]).copy_(narrow)
        return view.expand(t.shape)


def memory_of(t: Tensor) -> Tensor:
    """A copy of the bytes of the whole storage of ``t``."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


@st.composite
def layouts(draw: st.DrawFn, ndim: int, expanded: bool = False) -> Layout:
    """Contiguous, channels_last, any other order of dimensions; slices, steps and phases; expanded if allowed."""
    plain = tuple(range(ndim))
    orders = [plain, (0, *plain[2:], 1)[:ndim] if ndim > 2 else plain, (*plain[1:], 0)]
    order = draw(st.sampled_from(orders) | st.permutations(plain).map(tuple))
    pads = [(0, 0)] * ndim
    if draw(st.booleans()):
        pads[draw(st.integers(0, ndim - 1))] = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    dims: tuple[int, ...] = ()
    if expanded and draw(st.sampled_from((False, False, True))):
        dims = tuple(sorted(draw(st.sets(st.integers(0, ndim - 1), min_size=1, max_size=2))))
    return Layout(order, tuple(pads), draw(st.sampled_from((1, 1, 1, 2, 3))), draw(st.integers(0, 15)), dims)


# --- a call ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call, and which of its gradients are wanted."""

    shape: tuple[int, ...]
    channel_dim: int
    reduction: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    state_dtype: torch.dtype | None
    shortcut_dtype: torch.dtype | None
    relu: bool
    output: str
    layers: int
    norm: str | None
    eps: float
    sample_scale: bool
    x_layout: Layout
    shortcut_layout: Layout
    dy_layout: Layout | None  # None: the gradient of a sum, one value at all places
    table_layout: Layout
    weight_layout: Layout
    used: str
    required: frozenset[str]
    threads: int
    seed: int

    @property
    def channels(self) -> int:
        return self.shape[self.channel_dim]

    @property
    def spatial(self) -> list[int]:
        """Dimensions that are pooled."""
        return [d for d in range(1, len(self.shape)) if d != self.channel_dim % len(self.shape)]

    @property
    def terms(self) -> int:
        """Terms of the longest sum: values of a channel, samples, or the four gates of all channels."""
        positions = math.prod(self.shape[d] for d in self.spatial)
        return max(positions * (self.shape[0] if self.norm else 1), self.shape[0], 4 * self.channels)

    @property
    def fused(self) -> bool:
        """Whether one operator does all of it."""
        same = self.shortcut_dtype in (None, self.dtype)
        return self.layers == 1 and not self.sample_scale and same and self.norm not in CALLED

    def per_channel(self, t: Tensor) -> Tensor:
        """(C,) or (N, C) as a view that broadcasts over the map."""
        sizes = [1] * len(self.shape)
        sizes[self.channel_dim] = self.channels
        if t.ndim == 2:
            sizes[0] = self.shape[0]
        return t.reshape(sizes)


def dtypes_below(dtype: torch.dtype) -> st.SearchStrategy[torch.dtype]:
    """Dtypes that the compute dtype of a map of ``dtype`` holds."""
    return st.sampled_from(DTYPES if dtype == torch.float64 else DTYPES[1:])


LEAVES = ("x", "shortcut", "h", "c", "sample_scale", "norm_weight", "norm_bias")
PARAMETERS = LSTMParameters._fields


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    norms: Sequence[str | None] = (None,),
    parts: Sequence[str] = (),
    max_channels: int = 102,
    max_spatial: int = 9,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Case:
    """Cases with one of ``norms``; with ``parts``, reasons, those that need pool, cell and rescale one by one."""
    dims = draw(st.integers(1, 3))
    tokens = draw(st.sampled_from((False, False, True)))
    samples = draw(st.sampled_from((2, 1, 3, 4, 5, 0)))
    channels = draw(st.sampled_from([c for c in (1, 2, 3, 8, 12, 16, 25, 33, 64, 102) if c <= max_channels]))
    sizes = [size for size in (2, 1, 3, 4, 5, 6, 7, 8, 9, 1, 0) if size <= max_spatial]
    spatial = draw(st.lists(st.sampled_from(sizes), min_size=dims, max_size=dims))
    shape = (samples, *spatial, channels) if tokens else (samples, channels, *spatial)
    dtype = draw(st.sampled_from(dtypes))
    norm = draw(st.sampled_from([n for n in norms if not tokens or n in (None, "affine", "function")] or [None]))
    if norm in ("batch", "bare", "untracked", "hooked", "group"):
        assume(samples * math.prod(spatial) > 1)  # PyTorch's own norms refuse one value, or none
    reasons = draw(st.sets(st.sampled_from(parts), min_size=1)) if parts else ()
    others = [other for other in dtypes if other != dtype] if "shortcut" in reasons else [None, dtype, dtype]
    shortcut_dtype = draw(st.sampled_from(others))
    layers = draw(st.sampled_from((2, 3))) if "layers" in reasons else 1
    relu, output = draw(st.booleans()), draw(st.sampled_from(("sigmoid", "tanh")))
    # Where the sum before the ReLU may come near zero, ``build`` has to change the shortcut or the gradient there.
    free = not relu or (shortcut_dtype is None and norm is None and output == "sigmoid")
    used = draw(st.sets(st.sampled_from("yhc"), min_size=1))
    if 0 in spatial:
        used = set("yhc")  # the mean is NaN: an unused result is no term in eager, and zero times NaN in an operator
    n = len(shape)
    moved = relu and shortcut_dtype is not None
    names = [*LEAVES, *PARAMETERS, *(f"{name}_l{k}" for k in range(1, layers) for name in StackedLayer._fields)]
    return Case(
        shape=shape,
        channel_dim=-1 if tokens else 1,
        reduction=draw(st.integers(1, channels)),
        dtype=dtype,
        parameter_dtype=draw(dtypes_below(dtype)),
        state_dtype=draw(st.none() | dtypes_below(dtype)),
        shortcut_dtype=shortcut_dtype,
        relu=relu,
        output=output,
        layers=layers,
        norm=norm,
        eps=draw(st.sampled_from((1e-5, 0.1))),
        sample_scale="scale" in reasons,
        x_layout=draw(layouts(n, expanded=True)),
        shortcut_layout=draw(layouts(n, expanded=not moved)),
        dy_layout=draw(layouts(n, expanded=True) | st.none() if free or moved else layouts(n)),
        table_layout=draw(layouts(2)),
        weight_layout=draw(layouts(2)),
        used="".join(sorted(used)),
        required=draw(st.just(frozenset(names)) | st.frozensets(st.sampled_from(names))),
        threads=draw(st.sampled_from((1, 1, 2))),
        seed=draw(st.integers(0, 1 << 16)),
    )


@dataclass
class Call:
    """The tensors of a case. ``leaves`` are those that a gradient may be asked of."""

    case: Case
    leaves: Tensors
    buffers: Tensors
    incoming: Tensors

    def fresh(self) -> Tensors:
        """New leaves on the same memory, which require a gradient where the case says so."""
        return {name: t.detach().requires_grad_(name in self.case.required) for name, t in self.leaves.items()}


def build(case: Case) -> Call:
    """Draws the tensors, with no value near where a ReLU's gradient jumps.

    There rounding alone decides on which side a value falls: two correct implementations need not agree.
    """
    generator = torch.Generator().manual_seed(case.seed)
    table, width, bottleneck = compute_dtype(case.dtype), case.channels, case.channels // case.reduction
    n = case.shape[0]

    def drawn(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    def weight(*sizes: int) -> Tensor:
        t = drawn(*sizes, dtype=torch.float64) / (sizes[1] ** 0.5 if len(sizes) == 2 else 2)
        t = t.to(case.parameter_dtype)
        return case.weight_layout.place(t) if t.ndim == 2 else placed_vector(t, case.weight_layout)

    leaves = {"x": case.x_layout.place(drawn(*case.shape, dtype=case.dtype) + 0.25)}
    for path in ("input", "hidden"):
        leaves[f"{path}_reduce_weight"] = weight(bottleneck, width)
        leaves[f"{path}_reduce_bias"] = weight(bottleneck)
        leaves[f"{path}_expand_weight"] = weight(4 * width, bottleneck)
        leaves[f"{path}_expand_bias"] = weight(4 * width)
        for layer in range(1, case.layers):
            leaves[f"{path}_weight_l{layer}"] = weight(4 * width, width)
            leaves[f"{path}_bias_l{layer}"] = weight(4 * width)
    if case.state_dtype is not None:
        for name in ("h", "c"):
            drawn_state = [drawn(n, width, dtype=case.state_dtype) for _ in range(case.layers)]
            placed = [case.table_layout.place(t.sigmoid() if name == "h" else t) for t in drawn_state]
            leaves[name] = placed[0] if case.layers == 1 else torch.stack(placed)
    if case.sample_scale:
        leaves["sample_scale"] = placed_vector(drawn(n, dtype=table).abs() + 0.5, case.table_layout)
    if case.norm in ("batch", "running", "untracked", "affine", "hooked", "group"):
        leaves["norm_weight"] = placed_vector(drawn(width, dtype=table) + 1, case.table_layout)
        leaves["norm_bias"] = placed_vector(drawn(width, dtype=table), case.table_layout)
    buffers = {}
    if case.norm in ("batch", "running", "bare", "hooked"):
        buffers = {"running_mean": drawn(width, dtype=table), "running_var": drawn(width, dtype=table).square() + 0.5}
    call = Call(case, leaves, buffers, {})

    shortcut = None if case.shortcut_dtype is None else drawn(*case.shape, dtype=case.shortcut_dtype)
    before = before_relu(call)
    if case.relu and shortcut is not None:
        total = before + shortcut.double()
        moved = shortcut + torch.where(total < 0, -1 / 16, 1 / 16).to(shortcut.dtype)
        shortcut = torch.where(total.abs() < 1 / 32, moved, shortcut)
    if shortcut is not None:
        leaves["shortcut"] = case.shortcut_layout.place(shortcut)
    y_dtype = case.dtype if shortcut is None else torch.result_type(leaves["x"], shortcut)
    dy = drawn(*case.shape, dtype=y_dtype)
    if case.relu and shortcut is None:
        dy[before.abs() < 1e-3] = 0
    placed = torch.ones((), dtype=y_dtype).expand(case.shape) if case.dy_layout is None else case.dy_layout.place(dy)
    call.incoming["y"] = placed
    for name in "hc":
        incoming = [case.table_layout.place(drawn(n, width, dtype=table)) for _ in range(case.layers)]
        call.incoming[name] = incoming[0] if case.layers == 1 else torch.stack(incoming)
    return call


def placed_vector(t: Tensor, layout: Layout) -> Tensor:
    return Layout((0,), layout.pads[:1], layout.step, layout.phase).place(t)


# --- the library's results -----------------------------------------------------------------------------


def norm_of(call: Call, leaves: Tensors) -> Norm | None:
    """The norm with the weights out of ``leaves`` and buffers of its own."""
    case = call.case
    if case.norm in (None, "function"):
        return None if case.norm is None else torch.tanh
    if case.norm == "affine":
        return leaves["norm_weight"], leaves["norm_bias"]
    dtype = compute_dtype(case.dtype)
    if case.norm == "group":
        norm: nn.Module = nn.GroupNorm(1, case.channels, eps=case.eps, dtype=dtype)
    else:
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(case.shape) - 3]
        tracked = case.norm != "untracked"
        norm = kind(
            case.channels, eps=case.eps, affine=case.norm != "bare", track_running_stats=tracked, dtype=dtype
        ).train(case.norm not in ("running", "untracked"))
        for name, value in call.buffers.items():
            getattr(norm, name).copy_(value)
    if "norm_weight" in leaves:
        del norm.weight, norm.bias
        norm.weight, norm.bias = leaves["norm_weight"], leaves["norm_bias"]
    if case.norm == "hooked":
        norm.register_forward_hook(lambda *_: None)
    return norm


def attention_of(case: Case, leaves: Tensors, backend: str | None) -> SharedAttention:
    """The module with the parameters out of ``leaves``."""
    attention = SharedAttention(
        case.channels, case.reduction, output=case.output, num_layers=case.layers, channel_dim=case.channel_dim,
        backend=backend, device="meta",
    )  # fmt: skip
    for name in list(attention._parameters):
        attention._parameters[name] = leaves[name]
    return attention


def call_of(call: Call, leaves: Tensors, norm: Norm | None, backend: str | None, x: Tensor | None = None) -> Tensors:
    """y, h and c by the library; ``x`` instead of the call's own."""
    case = call.case
    y, (h, c) = attention_of(case, leaves, backend)(
        leaves["x"] if x is None else x,
        (leaves["h"], leaves["c"]) if "h" in leaves else None,
        shortcut=leaves.get("shortcut"),
        activation="relu" if case.relu else None,
        norm=norm,
        sample_scale=leaves.get("sample_scale"),
    )
    return {"y": y, "h": h, "c": c}


def with_gradients(call: Call, results: Tensors, leaves: Tensors) -> Tensors:
    """The results, and ``d<name>`` of every leaf that requires a gradient and has one."""
    used = [name for name in call.case.used if results[name].requires_grad]
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = torch.autograd.grad(
            [results[k] for k in used], [leaves[k] for k in wanted], [call.incoming[k] for k in used], allow_unused=True
        )
    gradients = {f"d{name}": g for name, g in zip(wanted, found, strict=True) if g is not None}
    return {name: t.detach() for name, t in results.items()} | gradients


def solve(call: Call, backend: str | None) -> tuple[Tensors, Tensors]:
    """Results and gradients of the library, and the norm's buffers afterwards."""
    leaves = call.fresh()
    norm = norm_of(call, leaves)
    found = with_gradients(call, call_of(call, leaves, norm, backend), leaves)
    return found, {name: getattr(norm, name) for name in call.buffers}


# --- the truth ---------------------------------------------------------------------------------------


def normalised(call: Call, leaves: Tensors) -> tuple[Tensor, Tensors, Tensor]:
    """The map after its folded norm in float64; the norm's buffers afterwards; 1 / deviation of each channel."""
    case, z = call.case, leaves["x"].double()
    if case.norm is None:
        return z, {}, torch.ones(())
    after, dims = {name: t.double() for name, t in call.buffers.items()}, (0, *case.spatial)
    rstd = torch.ones(case.channels, dtype=torch.float64)
    if case.norm == "running":
        mean, rstd = after["running_mean"], (after["running_var"] + case.eps).rsqrt()
        z = (z - case.per_channel(mean)) * case.per_channel(rstd)
    elif case.norm != "affine":
        mean, var = z.mean(dims), z.var(dims, unbiased=False)
        rstd = (var + case.eps).rsqrt()
        if after:
            unbiased = z.detach().var(dims, unbiased=True)
            after["running_mean"] = 0.9 * after["running_mean"] + 0.1 * mean.detach()
            after["running_var"] = 0.9 * after["running_var"] + 0.1 * unbiased
        z = (z - case.per_channel(mean)) * case.per_channel(rstd)
    if "norm_weight" in leaves:
        z = z * case.per_channel(leaves["norm_weight"].double()) + case.per_channel(leaves["norm_bias"].double())
    return z, after, rstd.detach()


def cell(call: Call, leaves: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """The new state in float64 by the published formulas, of all layers."""
    case = call.case
    zeros = torch.zeros(case.layers, case.shape[0], case.channels, dtype=torch.float64)
    h, c = (leaves[name].double().reshape(zeros.shape) if name in leaves else zeros for name in "hc")
    weights = tuple(leaves[name] for name in PARAMETERS)
    _, *first = formula(x, None, h[0], c[0], weights, channel_dim=case.channel_dim, output=case.output)
    states = [first]
    for k in range(1, case.layers):
        w = StackedLayer(*(leaves[f"{name}_l{k}"].double() for name in StackedLayer._fields))
        gates = states[-1][0] @ w.input_weight.T + w.input_bias + h[k] @ w.hidden_weight.T + w.hidden_bias
        i, f, g, o = gates.chunk(4, dim=1)
        new_c = f.sigmoid() * c[k] + i.sigmoid() * g.tanh()
        states.append([o.sigmoid() * (new_c.sigmoid() if case.output == "sigmoid" else new_c.tanh()), new_c])
    hs, cs = (torch.stack(part) for part in zip(*states, strict=True))
    return (hs[0], cs[0]) if case.layers == 1 else (hs, cs)


def scaled(call: Call, leaves: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensors, Tensor]:
    """``x * h`` in float64, the new state, the norm's buffers, and 1 / deviation."""
    x, buffers, rstd = normalised(call, leaves)
    h, c = cell(call, leaves, x)
    scale = h if call.case.layers == 1 else h[-1]
    if "sample_scale" in leaves:
        scale = scale * leaves["sample_scale"].double()[:, None]
    return x * call.case.per_channel(scale), h, c, buffers, rstd


def before_relu(call: Call) -> Tensor:
    """``x * h`` in float64. Rejects a case with a bottleneck value near zero, where the gradient jumps too."""
    with torch.no_grad():
        if call.case.norm in CALLED:
            return torch.zeros(call.case.shape, dtype=torch.float64)  # such cases are held to the library itself
        x, *_ = normalised(call, call.leaves)
        p = x.mean(call.case.spatial)
        h = call.leaves.get("h", torch.zeros_like(p))
        hidden = (h if h.ndim == 2 else h[0]).double()
        margin = 1e4 * torch.finfo(compute_dtype(call.case.dtype)).eps
        for value, path in ((p, "input"), (hidden, "hidden")):
            weight, bias = (call.leaves[f"{path}_reduce_{name}"].double() for name in ("weight", "bias"))
            assume(not ((value @ weight.T + bias).abs() < margin).any())
        return scaled(call, call.leaves)[0]


def truth(call: Call) -> tuple[Tensors, Tensors, float]:
    """Results and gradients from float64, the norm's buffers, and the factor by which the norm makes errors grow.

    Each is rounded once, by PyTorch's own casts, to the dtype that it must have: so it has that dtype. A shortcut of
    another dtype is added by PyTorch to the rounded product, as the contract says.
    """
    case, leaves = call.case, call.fresh()
    y, h, c, buffers, rstd = scaled(call, leaves)
    shortcut = leaves.get("shortcut")
    if shortcut is not None and shortcut.dtype != case.dtype:
        y = y.to(case.dtype) + shortcut
    elif shortcut is not None:
        y = y + shortcut.double()
    y = (y.relu() if case.relu else y).to(call.incoming["y"].dtype)
    table = compute_dtype(case.dtype)
    growth = 1.0
    if case.norm is not None and call.leaves["x"].numel():
        size = call.leaves["x"].double().abs().max() * rstd.max()
        gamma = call.leaves["norm_weight"].abs().max() if "norm_weight" in leaves else 1.0
        growth = float((1 + size) * (1 + gamma * rstd.max()))
    return with_gradients(call, {"y": y, "h": h.to(table), "c": c.to(table)}, leaves), buffers, growth


def assert_near(name: str, found: Tensor, expected: Tensor, call: Call, growth: float) -> None:
    """A value may be off by its rounding, and by what sums of ``terms`` products of values near 1 may lose at worst.

    Four such sums follow one another, from the map to the gates and back. ``growth``: see ``truth``.
    """
    assert found.shape == expected.shape, f"{name}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{name}: {found.dtype}, expected {expected.dtype}"
    assert torch.equal(found.isnan(), expected.isnan()), f"{name}: NaN elsewhere than in the truth"
    if not found.numel() or expected.isnan().all():
        return
    ours, true = found.double().nan_to_num(), expected.double().nan_to_num()
    case = call.case
    rounding = max(torch.finfo(t).eps for t in (found.dtype, *((case.dtype,) if "y" in name or name == "dx" else ())))
    allowed = 2 * rounding + sum_error(case, growth)
    off = ((ours - true).abs().max() / true.abs().max().clamp(min=1.0)).item()
    assert off <= allowed, f"{name}: off by {off:.2e}, allowed {allowed:.2e}"


def sum_error(case: Case, growth: float) -> float:
    return 4 * case.terms * growth * torch.finfo(compute_dtype(case.dtype)).eps


def assert_as_output(name: str, t: Tensor, x: Tensor, channel_dim: int, exact: bool = True) -> None:
    """The contract's layout: channels_last if x is so and is not contiguous, else contiguous. An empty map has none.

    Not ``exact`` (plain ATen, which no fake stands for): dimensions of one element may have any stride.
    """
    if not x.numel():
        return
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    is_last = channel_dim == 1 and last and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    expected = torch.empty(x.shape, memory_format=last if is_last else torch.contiguous_format)
    for size, found, right in zip(x.shape, t.stride(), expected.stride(), strict=True):
        assert found == right or (size == 1 and not exact), f"{name}: strides {t.stride()}, not {expected.stride()}"
