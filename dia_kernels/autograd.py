"""The autograd Functions over the operators, and the rule that says which of them a call takes.

The rule (``route``), first match wins:

1. exported to ONNX: the reference, which is plain ATen
2. forward-mode differentiation is active: the reference (the raw operator would drop tangents)
3. compiled or traced inside a functorch transform: the reference
4. compiled or traced: the raw operator, which carries its own gradient formula (a Function would be inlined)
5. something requires grad, or a functorch transform is active: the autograd Function
6. otherwise: the raw operator

Each Function's first argument is the set of operators that it calls (``operators.Operators``), of the native library or
of another implementer; the rule and the formulas are the same for all.

The eight parameters of a cell have one flat gradient (``cells.join_parameters``). Where all eight are leaves, blocks
that share them leave it to ``Gathered``. That makes it for all of them at once, in one product for each weight, from
the factors at which a block's own backward stops; or, where that is no gain, the engine adds up one tensor a block.

Double backward, vmap and forward mode are right through the reference: the backward is itself a
Function, differentiated by ``torch.func.vjp`` of the reference, and each Function has a vmap rule
that maps the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from . import masks, operators, reference
from .cells import LSTMParameters, join_parameters, parameter_count, split_parameters
from .operators import Operators
from .tables import factor_sizes

_STALE_STATE = (
    "the graph that made this step's state, or the step itself, has been freed by an earlier backward(). "
    "A state was probably carried over from an earlier forward pass: begin each forward pass (and each stage) "
    "with state=None, detach the state, or call backward(retain_graph=True)."
)

#: Before, Dynamo took ``torch.compiler.is_exporting()`` for True whatever it compiled for.
_TELLS_EXPORT = torch.__version__ >= "2.12"  # a TorchVersion, which compares numbers


def transforms_active() -> bool:
    """Whether the call runs inside a functorch transform (torch.func.grad, vmap, jvp, ...)."""
    return torch._C._are_functorch_transforms_active()


def is_captured() -> bool:
    """Whether a call is compiled, or traced to TorchScript."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, right under the compiler of torch 2.10 and 2.11 too."""
    return torch.compiler.is_exporting() if _TELLS_EXPORT else torch.compiler._is_exporting_flag


def exporting_to_onnx() -> bool:
    """Whether a graph is made for ONNX. Each way there captures the call, which is asked first: it costs less."""
    return is_captured() and torch.onnx.is_in_onnx_export()


def is_plain() -> bool:
    """Whether a call is eager, and nothing traces or transforms it: the rule begins at 5. Most are, so it is quick."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_compiled() -> bool:
    """Whether a call is compiled, to run in this process, and nothing transforms it: the rule ends at 4."""
    if not torch.compiler.is_compiling() or is_exporting():
        return False
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on ``tensors``."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def route(
    function: type[Function],
    operator: Callable,
    reference_of: Callable,
    args: tuple,
    recorded: bool,
    *first: Operators,
) -> Any:
    """Calls ``function``, ``operator`` or ``reference_of`` on ``args`` by the rule; the first takes ``first`` too.

    ``recorded`` is whether ``wants_gradient`` of the tensors among ``args``.
    """
    if is_plain():
        return run(function, operator, args, recorded, *first)
    if exporting_to_onnx() or forward_ad._current_level >= 0:
        return reference_of(*args)
    transformed = transforms_active()
    if is_captured():
        return reference_of(*args) if transformed else operator(*args)
    if transformed:
        return function.apply(*first, *args)
    return run(function, operator, args, recorded, *first)


def run(function: type[Function], operator: Callable, args: tuple, recorded: bool, *first: Operators) -> Any:
    """Where no transform is active: the rule's last two lines."""
    if recorded:
        at = getattr(function, "parameters_at", None)
        return apply(function, *first, *args) if at is None else _apply_gathered(function, first, args, at)
    with below_autograd():
        return operator(*args)


# The operators carry a gradient formula for torch.compile. Where we have decided that no gradient is recorded, going
# below that layer of torch's dispatcher saves its detour through Python.
below_autograd = torch._C._AutoDispatchBelowAutograd


@cache
def _lean(function: type[Function]) -> type[Function]:
    """``function`` in the form without ``setup_context``: transforms need it, and it costs a look at the signature."""

    def forward(ctx, *args):
        with below_autograd():
            output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (Function,), methods)


def apply(function: type[Function], *args) -> Any:
    """``function.apply`` outside of transforms, by the shortest way: this is a third of a small step's time."""
    return super(Function, _lean(function)).apply(*args)  # type: ignore[misc]


# --- one gradient for eight parameters --------------------------------------------------------------
# A Function of a cell has ``parameters_at``, the place of the first of the eight parameters among its arguments, where
# h is the third, and ``gradients(ctx, grads, need, saved, as_factors)``: of the arguments before them and, in one, of
# the eight. Of what it saves, h is the third and the tables are the sixth.


class Gathered(Function):
    """A token, without memory, that stands for eight parameters in the graph: its gradient is their flat one.

    It saves no tensor, so that several backward passes may run through it. What blocks leave for it in ``left``, by the
    pass, it makes the gradient of: the engine runs it after all of them.
    """

    @staticmethod
    def forward(ctx, *parameters):
        ctx.sizes = parameters[0].shape
        ctx.left = {}
        ctx.materialize_grads = False  # what set_materialize_grads does, without the call
        return parameters[0].new_empty_strided((parameter_count(*ctx.sizes),), (0,))

    @staticmethod
    def backward(ctx, flat):
        steps = ctx.left.pop(current_pass(), ())
        for ops in dict.fromkeys(step.ops for step in steps):
            lists = zip(*(step.tensors for step in steps if step.ops is ops), strict=True)
            more = ops.parameter_gradients(*lists, ctx.sizes[0])
            flat = more if flat is None else flat + more
        for step in steps:
            step.used_here()
        return (None,) * 8 if flat is None else tuple(split_parameters(flat, *ctx.sizes))


class _Step:
    """What a block leaves for ``Gathered``: its operators and (factors, tables, old h)."""

    __slots__ = ("ops", "stream", "tensors")

    def __init__(self, ops: Operators, factors: Tensor, tables: Tensor, h: Tensor) -> None:
        # Without its graph: a pass that fails leaves this behind, and a node that held a later one would never go.
        self.ops, self.tensors = ops, (factors, tables, h.detach())
        self.stream = _stream_of(h)

    def used_here(self) -> None:
        """Tells the allocator if this is another stream than that of the block.

        Nobody has to wait: the gradient of the state has come the same way, by the engine, which made them wait.
        """
        if self.stream != _stream_of(self.tensors[0]):
            for t in self.tensors:
                t.record_stream(torch.cuda.current_stream(t.device))


def _stream_of(t: Tensor) -> int | None:
    """The current stream of the device of ``t``, None where there are none."""
    return torch._C._cuda_getCurrentRawStream(t.device.index) if t.is_cuda else None


def current_pass() -> int | None:
    """A number for the backward pass that runs. None: no engine calls its functions, but a graph compiled of them."""
    if torch.compiler.is_compiling():
        return None
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and getattr(compiled, "in_compiled_autograd_region", False):
        return None
    return torch._C._current_graph_task_id()


def _token(parameters: tuple, h: Tensor | None) -> Tensor | None:
    """The token of ``parameters``. None: the first block of a pass, or not all are leaves that require grad.

    The blocks of a forward pass share one, from the second on: a token costs more than a few additions, and a cell may
    have one block alone. It is found at the step that made ``h``. One from an earlier pass would do for the sums too,
    but the engine runs what was recorded first last, so that these gradients would come at the very end of the backward
    pass, too late for whoever reduces them over processes.
    """
    node = None if h is None else h.grad_fn
    if getattr(node, "ops", None) is None:  # of no step
        return None
    for p in parameters:
        if not p.requires_grad or p.grad_fn is not None:
            return None
    token, of = getattr(node, "dia_kernels_token", (None, ()))
    if token is not None and all(map(is_, of, parameters)):
        return token
    return super(Function, Gathered).apply(*parameters)


def _better_at_once(ops: Operators, h: Tensor, m: int) -> bool:
    """Whether blocks with the state ``h`` and ``m`` values in a bottleneck leave their factors, or add up gradients.

    On a GPU that is a launch and an addition less for each. For the native kernels on the CPU it pays where a gradient
    is much larger than what it is made of; else what is kept meanwhile lies in the way of the maps, for which glibc
    then takes fresh memory (docs/kernels.md).
    """
    if ops is not operators.native or not h.is_cpu:
        return True
    n, c = h.shape
    return parameter_count(m, c) > 4 * sum(factor_sizes(n, c, m))


@cache
def _with_token(function: type[Function]) -> type[Function]:
    """``function`` in the form that takes a token, and the parameters as something to which no gradient flows."""
    at: int = function.parameters_at  # type: ignore[attr-defined]

    def forward(ctx, token, parameters, ops, *others):
        args = (ops, *others[:at], *parameters, *others[at:])
        with below_autograd():
            output = function.forward(*args)
        function.setup_context(ctx, args, output)
        ctx.dia_kernels_token = token, parameters
        return output

    def backward(ctx, *grads):
        gathered = ctx.dia_kernels_token[0].grad_fn
        need, saved = ctx.needs_input_grad[3:], saved_tensors(ctx)
        # A gradient that is to be differentiated goes through the graph, and so does one of a compiled graph. Where
        # this pass comes by no parameter, as in torch.autograd.grad of something else, theirs are not made.
        number = None if torch.is_grad_enabled() else current_pass()
        need_parameters = number is None or torch._C._will_engine_execute_node(gathered)
        as_factors = number is not None and _better_at_once(ctx.ops, saved[2], gathered.sizes[0])
        *others, last = function.gradients(  # type: ignore[attr-defined]
            ctx, grads, (*need[:at], need_parameters), saved, as_factors
        )
        if as_factors and need_parameters:
            gathered.left.setdefault(number, []).append(_Step(ctx.ops, last, saved[5], saved[2]))
            last = None
        return last, None, None, *others, *(None,) * (len(need) - at)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(function.__name__, (Function,), methods)


def _apply_gathered(function: type[Function], first: tuple, args: tuple, at: int) -> Any:
    """``apply`` to ``first`` and ``args``, with a token for the parameters if they have one."""
    parameters = args[at : at + 8]
    token = _token(parameters, args[2])
    if token is None:
        return apply(function, *first, *args)
    others = args[:at] + args[at + 8 :]
    return super(Function, _with_token(function)).apply(token, parameters, *first, *others)  # type: ignore[misc]


def for_each_parameter(gradients: Callable, need: tuple, at: int, like: Tensor) -> tuple:
    """A gradient for each input, of which ``need`` tells whether it is needed.

    ``gradients(need)`` are those of a Function with ``parameters_at`` = ``at``; ``like``: the first parameter.
    """
    wanted = need[at : at + 8]
    *others, flat = gradients((*need[:at], any(wanted)))
    parts = (None,) * 8 if flat is None else split_parameters(flat, *like.shape)
    chosen = (part if w else None for part, w in zip(parts, wanted, strict=True))
    return *others, *chosen, *(None,) * (len(need) - at - 8)


def join_if_any(gradients: list[Tensor]) -> Tensor | None:
    """The flat gradient, or None where ``derivative`` found none."""
    return None if gradients[0] is None else join_parameters(LSTMParameters(*gradients))


def differentiable(function: type[Function], operator: Callable) -> Callable:
    """Inside a backward: ``function``, or just its ``operator`` where nobody will differentiate the gradient."""
    if transforms_active():
        return function.apply
    return partial(apply, function) if torch.is_grad_enabled() else operator


def saved_tensors(ctx) -> tuple:
    """The saved tensors of ``ctx``, with an error that names the usual mistake when they are gone."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(f"dia_kernels: {_STALE_STATE}") from error
        raise


def derivative(function: Callable, inputs: tuple, cotangents: tuple) -> tuple:
    """Vector-Jacobian product of ``function`` at ``inputs``, where both may hold None.

    ``function`` takes all of ``inputs`` and returns a tuple as long as ``cotangents``. Returns one
    gradient an input, None where the input is None.
    """
    if all(ct is None for ct in cotangents):
        return (None,) * len(inputs)
    present = [k for k, value in enumerate(inputs) if value is not None]

    def of_present(*values):
        full = list(inputs)
        for k, value in zip(present, values, strict=True):
            full[k] = value
        return tuple(out for out, ct in zip(function(*full), cotangents, strict=True) if ct is not None)

    pull = torch.func.vjp(of_present, *(inputs[k] for k in present))[1]
    gradients = pull(tuple(ct for ct in cotangents if ct is not None))
    full: list[Tensor | None] = [None] * len(inputs)
    for k, gradient in zip(present, gradients, strict=True):
        full[k] = gradient
    return tuple(full)


def keeps_mask(ops: Operators, x: Tensor, channel_dim: int) -> bool:
    """Whether a call on ``x`` that ends in a ReLU leaves its mask for the gradient, in place of its result.

    Not inside transforms, whose rules are the reference's. Nor where a graph is exported: nearly always for inference,
    and whether a map's rows begin bytes would narrow down the shapes that it takes.
    """
    if x.dtype not in ops.masked_dtypes.get(x.device.type, ()) or torch._C._are_functorch_transforms_active():
        return False
    return not is_exporting() and masks.fits(x, channel_dim)


# --- step ------------------------------------------------------------------------------------------
# Arguments: x, shortcut, h, c, the eight parameters, channel_dim, relu, tanh_output, keep_tables, keep_mask. Where the
# mask of the ReLU is kept, it is saved in place of y.


def _reference_step(x, shortcut, h, c, *rest):
    """``operators.step`` through plain, differentiable ATen; its tables are left empty."""
    *parameters, channel_dim, relu, tanh_output, _, _ = rest
    y, h, c = reference.step(
        x, shortcut, h, c, LSTMParameters(*parameters), channel_dim, relu, "tanh" if tanh_output else "sigmoid"
    )
    return y, h, c, h.new_empty(0), h.new_empty(0)


def _reference_step_backward(dy, dh, dc, x, y, h, c, parameters, channel_dim, tanh_output):
    """Gradients of x, shortcut, h, c and, in one, of the parameters, differentiable in every argument.

    The ReLU's mask is a constant of the second derivative, so y stands for the shortcut here. With
    no ReLU (y is None) the shortcut's gradient is None: it is dy, and an output may not be an input.
    """

    def before_relu(x, h, c, *parameters):
        return _reference_step(x, None, h, c, *parameters, channel_dim, False, tanh_output, False, False)[:3]

    g = dy if dy is None or y is None else reference.unrelu(dy, masks.as_result(y, x, channel_dim))
    dx, dh, dc, *dparameters = derivative(before_relu, (x, h, c, *parameters), (g, dh, dc))
    return dx, None if y is None else g, dh, dc, join_if_any(dparameters)


def _step_context(ctx, inputs, output) -> None:
    ctx.ops, x, _, h, c, *rest = inputs
    *parameters, channel_dim, relu, tanh_output, _, keep_mask = rest
    y, _, new_c, tables, mask = output
    ctx.save_for_backward(x, mask if keep_mask else y if relu else None, h, c, new_c, tables, *parameters)
    ctx.flags = (channel_dim, relu, tanh_output)


def _step_gradients(ctx, grads, need: tuple, backward: Callable, saved: tuple) -> tuple:
    """Gradients of x, shortcut, h, c and the parameters; ``backward`` is what computes those asked for."""
    dy, dh, dc, *_ = grads
    x, y, h, c, new_c, tables, *parameters = saved
    _, relu, _ = ctx.flags
    _, need_shortcut, need_h, need_c, need_parameters = need
    need_state = need_h or need_c
    asked = (need[0], need_shortcut and relu and dy is not None, need_state, need_parameters)
    if any(asked):
        dx, dshortcut, dh, dc, flat = backward(
            ctx.ops, dy, dh, dc, x, y, h, c, new_c, tables, *parameters, *ctx.flags, *asked
        )
    else:
        dx = dshortcut = flat = None
    return (
        dx if need[0] else None,
        (dshortcut if relu else dy) if need_shortcut and dy is not None else None,
        dh if need_h else None,
        dc if need_c else None,
        flat if need_parameters else None,
    )


def _step_formula(ctx, grads, backward: Callable, saved: tuple) -> tuple:
    """Gradients of the inputs of ``step``."""

    def gradients(need):
        return _step_gradients(ctx, grads, need, backward, saved)

    return for_each_parameter(gradients, ctx.needs_input_grad[-17:], 4, saved[-8])


def _raw_step_backward(ops, dy, dh, dc, x, y, h, c, new_c, tables, *rest, as_factors=False):
    """The operator: it reads only the weights of the eight parameters."""
    parameters, flags = rest[:8], rest[8:]
    return ops.step_backward(dy, dh, dc, x, y, h, c, new_c, tables, *parameters[::2], *flags, as_factors)


_step_factors = partial(_raw_step_backward, as_factors=True)


class StepBackward(Function):
    """``operators.step_backward`` (with all eight parameters), differentiable through the reference."""

    @staticmethod
    def forward(*args):
        return _raw_step_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        tensors, ctx.flags, ctx.asked = inputs[1:18], inputs[18:21], inputs[21:]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        dy, dh, dc, x, y, h, c, _new_c, _tables, *parameters = saved_tensors(ctx)
        channel_dim, _relu, tanh_output = ctx.flags

        def function(dy, dh, dc, x, h, c, *parameters):
            return _reference_step_backward(dy, dh, dc, x, y, h, c, parameters, channel_dim, tanh_output)

        grads = StepBackward.asked_only(grads, ctx.asked)
        ddy, ddh, ddc, dx, dhp, dcp, *dparameters = derivative(function, (dy, dh, dc, x, h, c, *parameters), grads)
        return None, ddy, ddh, ddc, dx, None, dhp, dcp, None, None, *dparameters, *(None,) * 7

    @staticmethod
    def asked_only(grads: tuple, asked: tuple) -> tuple:
        """Drops the gradients of outputs that were not asked for: those outputs are empty."""
        x, shortcut, state, parameters = asked
        kept = (x, shortcut, state, state, parameters)
        return tuple(grad if keep else None for grad, keep in zip(grads, kept, strict=True))

    @staticmethod
    def vmap(info, in_dims, _ops, *args):
        flags = args[17:20]

        def function(dy, dh, dc, x, y, h, c, new_c, tables, *parameters):
            outputs = _reference_step_backward(dy, dh, dc, x, y, h, c, parameters, flags[0], flags[2])
            return tuple(new_c.new_zeros(()) if out is None else out for out in outputs)

        return torch.func.vmap(function, in_dims[1:18])(*args[:17]), (0,) * 5


class Step(Function):
    """``operators.step``, differentiable any number of times."""

    parameters_at = 4

    @staticmethod
    def forward(ops, *args):
        return ops.step(*args)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _step_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        backward = differentiable(StepBackward, _raw_step_backward)
        return None, *_step_formula(ctx, grads, backward, saved_tensors(ctx))

    @staticmethod
    def gradients(ctx, grads, need, saved, as_factors):
        backward = _step_factors if as_factors else differentiable(StepBackward, _raw_step_backward)
        return _step_gradients(ctx, grads, need, backward, saved)

    @staticmethod
    def vmap(info, in_dims, _ops, *args):
        y, h, c = torch.func.vmap(lambda *a: _reference_step(*a)[:3], in_dims[1:])(*args)
        return (y, h, c, h.new_empty(0), h.new_empty(0)), (0, 0, 0, None, None)


def step(ops, x, shortcut, h, c, parameters: LSTMParameters, channel_dim: int, relu: bool, tanh_output: bool):
    """``(y, h', c')`` of one step, by the rule at the top of this file."""
    recorded = wants_gradient(x, shortcut, h, c, *parameters)
    keep_tables = recorded or transforms_active()
    keep_mask = recorded and relu and keeps_mask(ops, x, channel_dim)
    args = (x, shortcut, h, c, *parameters, channel_dim, relu, tanh_output, keep_tables, keep_mask)
    return route(Step, ops.step, _reference_step, args, recorded, ops)[:3]


# --- pool ------------------------------------------------------------------------------------------
# Arguments: x, channel_dim.


def _pool_context(ctx, inputs, output) -> None:
    _, x, ctx.channel_dim = inputs
    ctx.like = x.new_empty(()).expand(x.shape)


def _pool_gradients(ctx, dp):
    return reference.spread(dp, ctx.like, ctx.channel_dim), None


class Pool(Function):
    """``operators.pool``; its gradient is linear and plain ATen, so every derivative is right."""

    setup_context = staticmethod(_pool_context)

    @staticmethod
    def forward(ops, x, channel_dim):
        return ops.pool(x, channel_dim)

    @staticmethod
    def backward(ctx, dp):
        return None, *_pool_gradients(ctx, dp)

    @staticmethod
    def vmap(info, in_dims, _ops, x, channel_dim):
        return torch.func.vmap(reference.pool, in_dims[1:])(x, channel_dim), 0


def pool(ops: Operators, x: Tensor, channel_dim: int) -> Tensor:
    """Mean of each channel over its positions, (N, C), by the rule at the top of this file."""
    return route(Pool, ops.pool, reference.pool, (x, channel_dim), wants_gradient(x), ops)


# --- rescale ---------------------------------------------------------------------------------------
# Arguments: x, scale, shortcut, channel_dim, relu.


def _rescale_context(ctx, inputs, output) -> None:
    ctx.ops, x, scale, _, ctx.channel_dim, ctx.relu = inputs
    ctx.save_for_backward(x, scale, output if ctx.relu else None)


def _rescale_gradients(ctx, dy, backward: Callable, saved: tuple) -> tuple:
    x, scale, y = saved
    need_x, need_scale, need_shortcut, *_ = ctx.needs_input_grad[-5:]
    asked = (need_x, need_scale, need_shortcut and ctx.relu)
    dx = dscale = dshortcut = None
    if any(asked):
        dx, dscale, dshortcut = backward(ctx.ops, dy, x, scale, y, ctx.channel_dim, *asked)
    return (
        dx if need_x else None,
        dscale if need_scale else None,
        (dshortcut if ctx.relu else dy) if need_shortcut else None,
        None,
        None,
    )


def _reference_rescale_backward(dy, x, scale, y, channel_dim):
    """Gradients of x, scale and (with a ReLU) shortcut, differentiable in dy, x and scale."""
    dx, dscale, g = reference.rescale_backward(dy, x, scale, y, channel_dim)
    return dx.to(x.dtype), dscale, scale.new_zeros(()) if y is None else g


def _raw_rescale_backward(ops, *args):
    return ops.rescale_backward(*args)


class RescaleBackward(Function):
    """``operators.rescale_backward``, differentiable through the reference."""

    forward = staticmethod(_raw_rescale_backward)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, dy, x, scale, y, ctx.channel_dim, *ctx.asked = inputs
        ctx.save_for_backward(dy, x, scale, y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        dy, x, scale, y = saved_tensors(ctx)
        grads = tuple(grad if keep else None for grad, keep in zip(grads, ctx.asked, strict=True))
        ddy, dx, dscale = derivative(
            lambda dy, x, scale: _reference_rescale_backward(dy, x, scale, y, ctx.channel_dim), (dy, x, scale), grads
        )
        return None, ddy, dx, dscale, *(None,) * 5

    @staticmethod
    def vmap(info, in_dims, _ops, *args):
        return torch.func.vmap(_reference_rescale_backward, in_dims[1:6])(*args[:5]), (0, 0, 0)


class Rescale(Function):
    """``operators.rescale``, differentiable any number of times."""

    setup_context = staticmethod(_rescale_context)

    @staticmethod
    def forward(ops, *args):
        return ops.rescale(*args)

    @staticmethod
    def backward(ctx, dy):
        backward = differentiable(RescaleBackward, _raw_rescale_backward)
        return None, *_rescale_gradients(ctx, dy, backward, saved_tensors(ctx))

    @staticmethod
    def vmap(info, in_dims, _ops, *args):
        return torch.func.vmap(reference.rescale, in_dims[1:])(*args), 0


def rescale(ops: Operators, x: Tensor, scale: Tensor, shortcut: Tensor | None, channel_dim: int, relu: bool) -> Tensor:
    """``act(x * scale + shortcut)``, by the rule at the top of this file."""
    recorded = wants_gradient(x, scale, shortcut)
    return route(Rescale, ops.rescale, reference.rescale, (x, scale, shortcut, channel_dim, relu), recorded, ops)


# --- compiled --------------------------------------------------------------------------------------


def give_gradient(ops: Operators, name: str, context: Callable, gradients: Callable) -> None:
    """Gives a raw operator its gradient, for ``torch.compile``; ``context`` takes its inputs behind ``ops``."""
    torch.library.register_autograd(
        f"{operators.NAMESPACE}::{name}{ops.suffix}",
        gradients,
        setup_context=lambda ctx, inputs, output: context(ctx, (ops, *inputs), output),
        lib=operators.library,
    )


def register(ops: Operators) -> None:
    """Gives the raw operators of this file their gradients."""
    give_gradient(
        ops,
        "step",
        _step_context,
        lambda ctx, *g: _step_formula(ctx, g, _raw_step_backward, ctx.saved_tensors),
    )
    give_gradient(ops, "pool", _pool_context, _pool_gradients)
    give_gradient(
        ops,
        "rescale",
        _rescale_context,
        lambda ctx, dy: _rescale_gradients(ctx, dy, _raw_rescale_backward, ctx.saved_tensors),
    )


register(operators.native)
register(operators.plain)


# --- state -----------------------------------------------------------------------------------------


class HandOn(Function):
    """The identity on a state: the first node that a later pass meets if it still holds that state."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, c):
        return h.view_as(h), c.view_as(c)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dh, dc):
        saved_tensors(ctx)  # raises where they are gone
        return dh, dc


def hand_on(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A state made by PyTorch's own operations, whose misuse after backward() is explained as a step's is."""
    return route(HandOn, lambda *state: state, lambda *state: state, (h, c), wants_gradient(h, c))
