"""The operators: what each does, their definition, and the native library.

Schemas (``schemas.py``), fakes (``operator_fakes.py``) and the kernels behind every device (``operator_references.py``)
stand in Python, so that a pure-Python install has the same operators;
the native library only adds kernels for its devices. Another implementer for the same devices has a
set of its own (``define``), under the same schemas, fakes and gradients. In all of them ``x`` is the map,
``channel_dim`` is 1 or -1, ``relu`` says whether the step ends in a ReLU, and ``tanh_output``
whether the cell's output function is tanh (False: the paper's sigmoid).

======================  ======================================================================
``step``                ``(y, h', c', tables, mask)``: the whole step. ``tables`` is what its gradient
                        needs beside x, y and the states (``tables.py``); it is empty
                        unless ``keep_tables``. ``mask`` is the ReLU's (``masks.py``), empty
                        unless ``keep_mask`` and ``relu``. Rows that begin no bytes have none,
                        and not every implementer keeps one (``Operators.masked_dtypes``).
``step_``               ``(h', c')``: the same, y written over ``x``. Inference only.
``step_backward``       gradients of x, shortcut, h, c and, in one flat tensor
                        (``cells.join_parameters``), of the eight parameters; those that the four
                        ``need_*`` flags do not ask for come back empty. With ``as_factors``, for a step
                        with a state, in place of the parameters' gradients what they are made of:
                        du, dzx and dzh (``tables.factor_sizes``), for ``parameter_gradients``.
``tail``                ``(y, h', c', tables, mean, var, mask)``: the step on the batch norm of z.
                        ``mean`` and ``var`` (C,) are the statistics to use, in the compute
                        dtype or float64; None for those of this batch, which come back (else
                        empty tensors do).
``tail_tracking_``      ``(y, h', c', tables, mask)``: the same with the statistics of the batch, towards which the
                        norm's buffers are moved by ``factor``, as PyTorch does it: ``running_mean`` and
                        ``running_var``, float32 (C,), and ``batches``, its count in int64. For maps of at most
                        32 bits. Neither autograd nor tensor versions know of what is written: for ``norms``.
``tail_backward``       gradients of z, shortcut, h, c, the norm's weight and bias and the eight
                        parameters (in one, or ``as_factors``), by the five ``need_*`` flags
``parameter_gradients`` the gradients of the eight parameters, in one, of several steps that share them: from the
                        ``factors``, ``tables`` and old ``h`` of each, all of one number of samples
``statistics``          ``(mean, var, means)``: of each channel of z over samples and positions, (C,), the
                        variance biased; and the means of each sample, (N, C). All in float64.
``tail_join``           ``(y, h', c', tables, mask)``: ``tail`` on the statistics of several processes and the
                        ``means`` of these samples, so that z is read once
``tail_reduce``         the first half of ``tail_backward`` on batch statistics: ``(sums,
                        dshortcut, dp)`` and the gradients of h, c and the parameters (in one). ``sums``
                        (2, C): the gradients of the norm's bias and weight.
``tail_spread``         the second half: dz, from dy, y and z (or from the shortcut's gradient and
                        z), ``dp`` and ``shares``: sums over all processes, divided by the
                        number of values of a channel
``norm_pool``           ``(p, tables, token_of_g, token_of_handed, variance, extreme, where, mean, var)``: the mean of
                        each channel of the batch norm of z, (N, C). ``mean`` and ``var`` as in ``tail``. The tokens
                        are for ``norm_rescale``; empty unless ``keep_tokens``. Of the norm's result before gamma and
                        beta, each (N, C), if wanted, else empty: the unbiased ``variance`` in float64 (of one
                        position 0); the ``extreme``, which is the value that gamma makes the largest; and its
                        position in int64, ``where`` (the first of equal ones in z; NaN is beyond all).
``norm_pool_tracking_`` all but ``mean`` and ``var``: the same, moving buffers as ``tail_tracking_`` does
``norm_pool_backward``  ``(dz, dgamma, dbeta)``, through both: from ``dp`` and what comes to the tokens. The gradients
                        of variance and extreme, each with its values, go to z alone.
``norm_rescale``        ``(y, mask)``: ``act(norm(z) * scale + shortcut)``, by the ``tables`` of ``norm_pool``.
                        Nobody reads a value of a token, and there is none: as their gradients, g and
                        ``handed``, it hands on what the other's needs.
``norm_rescale_backward`` ``(dscale, handed, g)``: g is the gradient behind the ReLU, that of the shortcut;
                        ``handed`` (3, N, C) are sums over the positions, of g, and of g times z less the mean;
                        and the scale. Without positions all are zero.
``pool``                mean over positions, (N, C), in the compute dtype
``rescale``             ``act(x * scale + shortcut)``
``rescale_backward``    gradients of x, scale and shortcut
======================  ======================================================================

``<name>_into``, of those in ``schemas.RESULT_MAPS``, does the same, but writes its maps into the caller's, which come
after the other arguments, and returns the rest. They have to have the sizes and strides of the operator's own, apart in
memory from all arguments (but y may be the map or the shortcut, of ``schemas.OVER``); None for a map that the flags do
not ask for. Neither autograd nor tensor versions know of what is written: for ``inductor`` and ``overwriting``.

Where a gradient takes y, it takes the mask in its place, of implementers that keep one (but for ``rescale_backward``).

An operator may not return its input: with no ReLU the gradient of the shortcut is the incoming
one, which ``autograd`` hands on by itself.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import inductor, operator_fakes, operator_references
from .layout import shares_memory
from .schemas import INTO_SCHEMAS, NAMESPACE, RESULT_MAPS, SCHEMAS

Operator: TypeAlias = Any  # torch._ops.OpOverload, which knows no types

library = torch.library.Library(NAMESPACE, "DEF")


def _on_one_device(operator: Operator, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, which refuses tensors on several devices.

    One tensor on "meta" brings a call here. With x elsewhere the results would be real tensors that nobody has filled.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def checked(*args):
        inductor.prepare()
        lists = ((name, arg if isinstance(arg, list) else [arg]) for name, arg in zip(names, args, strict=False))
        tensors = [(name, t) for name, of in lists for t in of if isinstance(t, Tensor)]
        first, device = tensors[0][0], tensors[0][1].device
        for name, t in tensors:
            if t.device != device:
                raise RuntimeError(f"dia_kernels: {name}: on {t.device}, but {first} on {device}")
        return fake(*args)

    return checked


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Defines an operator, with what runs on every device without a kernel of its own and on fake tensors."""
    # Any strides are right: without flexible_layout the inductor copies channels_last maps to and fro around each call.
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.dia_kernels, name).default
    torch.library.register_fake(f"{NAMESPACE}::{name}", _on_one_device(operator, fake), lib=library)
    return operator


def _into(operator: Operator, maps: dict[int, str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the form of ``operator`` does that writes into given maps, without a kernel for it; and its fake."""

    def rest(results):
        results = results if isinstance(results, tuple) else (results,)
        others = tuple(result for place, result in enumerate(results) if place not in maps)
        return others[0] if len(others) == 1 else others or None

    @torch.no_grad()
    def kernel(*args):
        args, given = args[: -len(maps)], args[-len(maps) :]
        results = operator(*args)
        for place, t in zip(maps, given, strict=True):
            if t is not None:
                t.copy_(results[place] if isinstance(results, tuple) else results)
        return rest(results)

    def fake(*args):
        return rest(operator(*args[: -len(maps)]))

    return kernel, fake


class Operators:
    """The operators of one implementer: an attribute for each name in ``SCHEMAS``, ``dia_kernels::<name><suffix>``.

    Each has a fake, and behind every device without a kernel of its own the reference.
    """

    step: Operator
    step_: Operator
    step_backward: Operator
    tail: Operator
    tail_tracking_: Operator
    tail_backward: Operator
    parameter_gradients: Operator
    statistics: Operator
    tail_join: Operator
    tail_reduce: Operator
    tail_spread: Operator
    norm_pool: Operator
    norm_pool_tracking_: Operator
    norm_pool_backward: Operator
    norm_rescale: Operator
    norm_rescale_backward: Operator
    pool: Operator
    rescale: Operator
    rescale_backward: Operator

    def __init__(self, suffix: str) -> None:
        """Defines the operators; once for each suffix."""
        self.suffix = suffix
        #: By the type of a device, dtypes of the maps whose ReLU leaves a mask for its gradient.
        self.masked_dtypes: dict[str, frozenset[torch.dtype]] = {}
        #: Types of devices that have kernels of ``norm_pool``, ``norm_rescale`` and their gradients.
        self.folding_devices: set[str] = set()
        for name, schema in SCHEMAS.items():
            kernel, fake = getattr(operator_references, name), getattr(operator_fakes, name)
            setattr(self, name, _define(name + suffix, schema, kernel, fake))
        library.impl("step_" + suffix, partial(_step_in_place_version, self.step_), "ADInplaceOrView", with_keyset=True)

    def __repr__(self) -> str:
        return f"Operators({self.suffix!r})"


def _step_in_place_version(step_: Operator, keyset, x, *args):
    """Refuses what may not be written over; tells autograd that the rest was written into.

    Raises:
        RuntimeError: a gradient is to flow, or several elements of ``x`` share memory.
    """
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *args)):
        raise RuntimeError("dia_kernels: step_ writes over x and records no gradient; call it under torch.no_grad()")
    if shares_memory(x):
        raise RuntimeError("dia_kernels: x: an expanded tensor, several of its elements share memory")
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = step_.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x, *args)
    torch.autograd.graph.increment_version(x)
    return result


#: Those that the native library implements.
native = Operators("")
#: Forms of those that write into maps of the caller's, for ``inductor`` and ``overwriting``, by the operator's name.
native_into: dict[str, Operator] = {
    name: _define(f"{name}_into", schema, *_into(getattr(native, name), RESULT_MAPS[name]))
    for name, schema in INTO_SCHEMAS.items()
}
#: Those that nobody implements: the reference, on every device and in every dtype.
plain = Operators("_plain")


# --- the native library ----------------------------------------------------------------------------

LIBRARY_PATH = Path(__file__).parent / "lib" / "libdia_kernels.so"


def _load_library() -> str | None:
    """Loads the native library. Returns None, or the sentence that says why it is not there."""
    if not LIBRARY_PATH.exists():
        return "the native library was not built (DIA_KERNELS_BUILD=none, or no compiler at install)"
    try:
        torch.ops.load_library(LIBRARY_PATH)
    except OSError as error:
        reason = f"the native library does not load: {error}"
        warnings.warn(f"dia_kernels runs its slow reference path: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


#: None when the native library is loaded, else why it is not.
library_error: str | None = _load_library()
#: Whether the native library is loaded and holds the kernels for CUDA.
library_has_cuda: bool = library_error is None and hasattr(ctypes.CDLL(str(LIBRARY_PATH)), "dia_kernels_gpu_layouts")

#: A mask has a byte for eight values: a GPU's access of sixteen bytes, if they are of 16 bits.
GPU_MASKED_DTYPES = frozenset((torch.float16, torch.bfloat16))
if library_error is None:
    native.folding_devices.add("cpu")
if library_has_cuda:
    native.folding_devices.add("cuda")
    native.masked_dtypes["cuda"] = GPU_MASKED_DTYPES
