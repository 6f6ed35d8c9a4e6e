"""The schemas of the operators (what each does stands in ``operators.py``), as text.

Python and C++ processes define the operators from this text. The build runs the file as a script, for
``libdia_kernels_schemas.so``; so it imports nothing.
"""

NAMESPACE = "dia_kernels"

#: As in ``cells.LSTMParameters``.
PARAMETERS = tuple(
    f"{path}_{part}_{kind}"
    for path in ("input", "hidden")
    for part in ("reduce", "expand")
    for kind in ("weight", "bias")
)

_PARAMETERS = ", ".join(f"Tensor {name}" for name in PARAMETERS)
_WEIGHTS = ", ".join(f"Tensor {name}" for name in PARAMETERS if name.endswith("weight"))
_FLAGS = "int channel_dim, bool relu, bool tanh_output"
#: Of the map, the shortcut, h, c, and all parameters in one.
_GRADIENTS = ", ".join(["Tensor"] * 5)

#: By the operator's name.
SCHEMAS = {
    "step": f"(Tensor x, Tensor? shortcut, Tensor? h, Tensor? c, {_PARAMETERS}, {_FLAGS}, bool keep_tables,"
    " bool keep_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "step_": f"(Tensor(a!) x, Tensor? shortcut, Tensor? h, Tensor? c, {_PARAMETERS}, {_FLAGS}) -> (Tensor, Tensor)",
    "step_backward": "(Tensor? dy, Tensor? dh, Tensor? dc, Tensor x, Tensor? y, Tensor? h, Tensor? c, Tensor new_c,"
    f" Tensor tables, {_WEIGHTS}, {_FLAGS}, bool need_x, bool need_shortcut, bool need_state,"
    f" bool need_parameters, bool as_factors) -> ({_GRADIENTS})",
    "tail": "(Tensor z, Tensor? shortcut, Tensor? h, Tensor? c, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var,"
    f" float eps, {_PARAMETERS}, {_FLAGS}, bool keep_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "tail_tracking_": "(Tensor z, Tensor? shortcut, Tensor? h, Tensor? c, Tensor? gamma, Tensor? beta,"
    " Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) batches, float factor, float eps,"
    f" {_PARAMETERS}, {_FLAGS}, bool keep_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "tail_backward": "(Tensor? dy, Tensor? dh, Tensor? dc, Tensor z, Tensor? y, Tensor? h, Tensor? c, Tensor new_c,"
    f" Tensor tables, Tensor? gamma, Tensor? beta, {_WEIGHTS}, {_FLAGS}, bool batch, bool need_z, bool need_shortcut,"
    f" bool need_state, bool need_parameters, bool need_affine, bool as_factors) -> ({_GRADIENTS}, Tensor, Tensor)",
    "parameter_gradients": "(Tensor[] factors, Tensor[] tables, Tensor[] h, int bottleneck) -> Tensor",
    "statistics": "(Tensor z, int channel_dim) -> (Tensor, Tensor, Tensor)",
    "tail_join": "(Tensor z, Tensor? shortcut, Tensor? h, Tensor? c, Tensor? gamma, Tensor? beta, Tensor mean,"
    f" Tensor var, Tensor means, float eps, {_PARAMETERS}, {_FLAGS}, bool keep_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "tail_reduce": "(Tensor? dy, Tensor? dh, Tensor? dc, Tensor z, Tensor? y, Tensor? h, Tensor? c, Tensor new_c,"
    f" Tensor tables, Tensor? gamma, Tensor? beta, {_WEIGHTS}, {_FLAGS}, bool need_shortcut, bool need_state,"
    f" bool need_parameters) -> ({_GRADIENTS}, Tensor)",
    "tail_spread": "(Tensor? dy, Tensor? y, Tensor z, Tensor new_h, Tensor dp, Tensor tables, Tensor? gamma,"
    " Tensor shares, int channel_dim) -> Tensor",
    "norm_pool": "(Tensor z, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, int channel_dim,"
    " bool with_variance, bool with_extreme, bool keep_tokens)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_pool_tracking_": "(Tensor z, Tensor? gamma, Tensor? beta, Tensor(a!) running_mean, Tensor(b!) running_var,"
    " Tensor(c!) batches, float factor, float eps, int channel_dim, bool with_variance, bool with_extreme,"
    " bool keep_tokens) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_pool_backward": "(Tensor g, Tensor handed, Tensor dp, Tensor? dvariance, Tensor? variance, Tensor? dextreme,"
    " Tensor? extreme, Tensor? where, Tensor z, Tensor tables, Tensor? gamma, int channel_dim, bool batch, bool need_z)"
    " -> (Tensor, Tensor, Tensor)",
    "norm_rescale": "(Tensor z, Tensor scale, Tensor? shortcut, Tensor tables, Tensor? token_of_g,"
    " Tensor? token_of_handed, Tensor? gamma, Tensor? beta, int channel_dim, bool relu, bool keep_mask)"
    " -> (Tensor, Tensor)",
    "norm_rescale_backward": "(Tensor dy, Tensor? y, Tensor z, Tensor scale, Tensor tables, Tensor? gamma,"
    " Tensor? beta, int channel_dim, bool need_g) -> (Tensor, Tensor, Tensor)",
    "pool": "(Tensor x, int channel_dim) -> Tensor",
    "rescale": "(Tensor x, Tensor scale, Tensor? shortcut, int channel_dim, bool relu) -> Tensor",
    "rescale_backward": "(Tensor dy, Tensor x, Tensor scale, Tensor? y, int channel_dim, bool need_x,"
    " bool need_scale, bool need_shortcut) -> (Tensor, Tensor, Tensor)",
}

#: The maps among the results of an operator, by their places there: ``<name>_into`` writes them into the caller's.
RESULT_MAPS = {
    "step": {0: "y"},
    "step_backward": {0: "dx", 1: "dshortcut"},
    "tail": {0: "y"},
    "tail_backward": {0: "dz", 1: "dshortcut"},
    "norm_pool_backward": {0: "dz"},
    "norm_rescale": {0: "y"},
    "norm_rescale_backward": {2: "g"},
    "rescale": {0: "y"},
    "rescale_backward": {0: "dx", 2: "dshortcut"},
}

#: Of these, those that may be given an argument as y, and then write over it: the places of the map and the shortcut.
OVER = {"step": (0, 1), "tail": (0, 1), "norm_rescale": (0, 2), "rescale": (0, 2)}


def _into(schema: str, maps: dict[int, str]) -> str:
    arguments, results = schema.rsplit(") -> ", 1)
    given = "".join(f", Tensor({alias}!)? {name}" for alias, name in zip("ab", maps.values(), strict=False))
    rest = results.count("Tensor") - len(maps)
    return f"{arguments}{given}) -> " + ("Tensor" if rest == 1 else f"({', '.join(['Tensor'] * rest)})")


#: Of ``<name>_into``, by the operator's name.
INTO_SCHEMAS = {name: _into(SCHEMAS[name], maps) for name, maps in RESULT_MAPS.items()}


if __name__ == "__main__":
    for name, schema in [*SCHEMAS.items(), *((f"{name}_into", schema) for name, schema in INTO_SCHEMAS.items())]:
        print(f'"{name}{schema}",')
