"""``dia_kernels.compat`` against the units it replaces: pytorchcv's own, and a transcription of the authors'.

The unit replaced plays both parts of the contract in accuracy.py: eager PyTorch, and in float64 the truth.
"""

import copy
import io
import math

import pytest
import torch
from accuracy import assert_accurate, error
from peers import authors
from pytorchcv.model_provider import get_model
from pytorchcv.models import diapreresnet_cifar, diaresnet, diaresnet_cifar

from dia_kernels import compat

SAMPLES, WIDTH, HEIGHT_WIDTH, BLOCKS, DRAWS = 5, 16, (6, 7), 3, 8
# The longest sum of a step: over the positions of a map, or over the 4 C gates.
UNIT_TERMS = max(4 * WIDTH, math.prod(HEIGHT_WIDTH))


def assert_all_accurate(ours, truth, eager, terms):
    assert ours.keys() == truth.keys() == eager.keys()
    for name in truth:
        assert_accurate(ours[name], truth[name], eager[name], name, terms)


def assert_equal_in_float64(ours, theirs, terms):
    assert_all_accurate(ours, theirs, theirs, terms)


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(outputs, inputs):
    """``outputs``, and the gradients of ``inputs``, by name, of a random weighting of all outputs."""
    weighted = [
        (value * random(*value.shape, seed=seed, dtype=value.dtype)).sum()
        for seed, value in enumerate(outputs.values(), start=100)
    ]
    gradients = torch.autograd.grad(sum(weighted), list(inputs.values()))
    return {name: value.detach() for name, value in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)
    }


def run_network(network, images, training):
    """Logits and gradients of one pass, and the buffers it left."""
    network.train(training)
    images = images.clone().requires_grad_()
    outputs = {"logits": network(images)}
    found = with_gradients(outputs, {"images": images, **dict(network.named_parameters())})
    return found | {name: buffer.double().clone() for name, buffer in network.named_buffers()}


def pool(x):
    return x.mean((2, 3))


class OverBlocks:
    """Runs a unit through the blocks of a stage, each with its shortcut added in place."""

    def __init__(self, unit, dtype=torch.float64, draw=0):
        self.unit = unit.to(dtype)
        seeds = range(draw * BLOCKS, (draw + 1) * BLOCKS)
        self.maps = [random(SAMPLES, WIDTH, *HEIGHT_WIDTH, seed=seed, dtype=dtype).requires_grad_() for seed in seeds]

    def __call__(self, block):
        state, shortcut = None, 0.0
        for number, x in enumerate(self.maps):
            # The originals draw one mask more in each block, see compat; so every block begins anew.
            torch.manual_seed(number)
            y, state = block(self.unit, x, state)
            y += shortcut
            shortcut = y
        h, c = (torch.stack(tuple(layers)) for layers in state)
        inputs = {f"x{number}": x for number, x in enumerate(self.maps)} | dict(self.unit.named_parameters())
        return with_gradients({"y": y, "h": h, "c": c}, inputs)


def attention_block(unit, x, state):
    return unit(x, state)


def cell_block(cell, x, state):
    """The call sequence of the authors' networks."""
    if state is None:
        state = (x.new_zeros(len(cell.w_ih), x.shape[0], x.shape[1]),) * 2
    state = cell(pool(x), state)
    return x * state[0][-1][:, :, None, None], state


def fused_block(cell, x, state):
    return cell.step(x, state)


def attention_pair(num_layers):
    """pytorchcv's unit and ours with its weights."""
    theirs = diaresnet.DIAAttention(WIDTH, WIDTH, num_layers)
    ours = compat.DIAAttention(WIDTH, WIDTH, num_layers)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def cell_pair(nlayers, input_size=WIDTH, hidden_size=WIDTH):
    """The authors' cell and ours with its weights."""
    theirs = authors.LSTMCell(input_size, hidden_size, nlayers)
    ours = compat.LSTMCell(input_size, hidden_size, nlayers)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# --- a network with its import changed --------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("module", "name"),
    [(diaresnet_cifar, "diaresnet20_cifar10"), (diapreresnet_cifar, "diapreresnet20_cifar10")],
)
def test_network_of_pytorchcv(monkeypatch, module, name, training):
    theirs = get_model(name).double()
    monkeypatch.setattr(module, "DIAAttention", compat.DIAAttention)
    ours = get_model(name).double()
    assert any(isinstance(m, compat.DIAAttention) for m in ours.modules())
    assert not any(isinstance(m, diaresnet.DIAAttention) for m in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())

    images = random(4, 3, 32, 32, seed=1)
    # The longest sum is over the samples and positions of the first stage, in a gradient or a batch norm.
    assert_equal_in_float64(
        run_network(ours, images, training), run_network(theirs, images, training), terms=4 * 32 * 32
    )


@pytest.mark.parametrize(("nlayers", "training"), [(1, True), (1, False), (2, False)])
def test_network_of_the_authors(monkeypatch, nlayers, training):
    """Two layers are compared in evaluation only: there is no dropout, whose random numbers differ (see compat)."""
    theirs = authors.ResNet(nlayers=nlayers).double()
    monkeypatch.setattr(authors, "LSTMCell", compat.LSTMCell)
    ours = authors.ResNet(nlayers=nlayers).double()
    assert any(isinstance(m, compat.LSTMCell) for m in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())

    images = random(4, 3, 16, 16, seed=1)
    assert_equal_in_float64(
        run_network(ours, images, training), run_network(theirs, images, training), terms=4 * 16 * 16
    )


# --- a unit shared by the blocks of a stage ---------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_attention_over_blocks(num_layers, training):
    theirs, ours = (OverBlocks(unit.train(training))(attention_block) for unit in attention_pair(num_layers))
    assert_equal_in_float64(ours, theirs, UNIT_TERMS)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_attention_over_blocks_in_float32(num_layers):
    their_unit, our_unit = (unit.eval() for unit in attention_pair(num_layers))

    def over_draws(unit, dtype):
        draws = [OverBlocks(copy.deepcopy(unit), dtype, draw)(attention_block) for draw in range(DRAWS)]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    truth, theirs = over_draws(their_unit, torch.float64), over_draws(their_unit, torch.float32)
    assert_all_accurate(over_draws(our_unit, torch.float32), truth, theirs, UNIT_TERMS)


@pytest.mark.parametrize("block", [cell_block, fused_block])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_cell_over_blocks(nlayers, training, block):
    theirs, ours = (unit.train(training) for unit in cell_pair(nlayers))
    theirs, ours = OverBlocks(theirs)(cell_block), OverBlocks(ours)(block)
    assert_equal_in_float64(ours, theirs, UNIT_TERMS)


def test_cell_with_another_width_of_the_state():
    theirs, ours = (cell.double().eval() for cell in cell_pair(3, input_size=10, hidden_size=20))
    pooled, h, c = random(7, 10, seed=1), random(3, 7, 20, seed=2), random(3, 7, 20, seed=3)
    (our_h, our_c), (their_h, their_c) = ours(pooled, (h, c)), theirs(pooled, (h, c))
    assert_equal_in_float64({"h": our_h, "c": our_c}, {"h": their_h, "c": their_c}, terms=20)


def test_fused_step_is_the_whole_tail_of_a_block():
    cell = compat.LSTMCell(WIDTH, WIDTH, 1).double()
    x, shortcut = (random(SAMPLES, WIDTH, *HEIGHT_WIDTH, seed=seed) for seed in (1, 2))
    y, (h, c) = cell.step(x, shortcut=shortcut, activation="relu")
    scaled, (expected_h, expected_c) = cell_block(cell, x, None)
    expected = torch.relu(scaled + shortcut)
    assert_equal_in_float64(
        {"y": y, "h": h, "c": c}, {"y": expected, "h": expected_h, "c": expected_c}, terms=UNIT_TERMS
    )


def test_dropout_acts_between_layers_only():
    """With every h zeroed on its way up, the layer above sees no input; the scale itself is never zeroed."""
    cell = compat.LSTMCell(WIDTH, WIDTH, 2, dropout=1.0).double()
    pooled, zeros = random(SAMPLES, WIDTH, seed=1), torch.zeros(2, SAMPLES, WIDTH, dtype=torch.float64)
    h, _ = cell(pooled, (zeros, zeros))
    other, _ = cell(pooled + 1, (zeros, zeros))
    assert torch.equal(h[1], other[1])
    assert not torch.equal(h[0], other[0])
    assert (h[1] > 0).all()
    cell.dropout.eval()
    assert not torch.equal(cell(pooled, (zeros, zeros))[0][1], h[1])


def test_state_stays_float32_under_autocast():
    """pytorchcv's state is then bfloat16; ours is no less accurate for the difference."""
    theirs, ours = attention_pair(1)
    maps = [random(SAMPLES, WIDTH, *HEIGHT_WIDTH, seed=seed, dtype=torch.bfloat16) for seed in range(BLOCKS)]

    def run(unit, maps):
        state = None
        for x in maps:
            y, state = unit(x, state)
        return {"y": y, "h": state[0][0], "c": state[1][0]}

    with torch.autocast("cpu", torch.bfloat16):
        their_results, our_results = run(theirs, maps), run(ours, maps)
    truth = run(theirs.double(), [x.double() for x in maps])
    assert our_results["y"].dtype == their_results["y"].dtype == torch.bfloat16
    assert our_results["h"].dtype == our_results["c"].dtype == torch.float32
    for name, right in truth.items():
        allowed = 2 * error(their_results[name], right) + torch.finfo(torch.bfloat16).eps
        assert error(our_results[name], right) <= allowed, name


# --- parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("theirs", "ours"), [(diaresnet.DIAAttention, compat.DIAAttention), (authors.LSTMCell, compat.LSTMCell)]
)
def test_a_seed_gives_the_weights_of_the_original(theirs, ours, layers):
    torch.manual_seed(7)
    expected = theirs(WIDTH, WIDTH, layers).state_dict()
    torch.manual_seed(7)
    found = ours(WIDTH, WIDTH, layers).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("unit", "first"),
    [(compat.LSTMCell(32, 32, 1), "w_ih.0.seq.0.weight"), (compat.DIAAttention(32, 32), "lstm.x_amps.amp1.fc1.weight")],
)
def test_names_and_number_of_parameters(unit, first):
    assert next(iter(unit.state_dict())) == first
    assert sum(parameter.numel() for parameter in unit.parameters()) == 2_832


UNITS = [
    pytest.param(compat.DIAAttention, attention_block, id="DIAAttention"),
    pytest.param(compat.LSTMCell, cell_block, id="LSTMCell"),
    pytest.param(compat.LSTMCell, fused_block, id="LSTMCell.step"),
]


@pytest.mark.parametrize(("unit", "block"), UNITS)
def test_saved_and_loaded(unit, block):
    original = unit(WIDTH, WIDTH, 2).eval()
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = random(SAMPLES, WIDTH, *HEIGHT_WIDTH, seed=1, dtype=torch.float32)
    assert torch.equal(block(loaded, x, None)[0], block(original, x, None)[0])


@pytest.mark.parametrize(("unit", "block"), UNITS)
def test_a_deep_copy_has_its_own_parameters(unit, block):
    original = unit(WIDTH, WIDTH, 2).eval()
    x = random(SAMPLES, WIDTH, *HEIGHT_WIDTH, seed=1, dtype=torch.float32)
    before = block(original, x, None)[0].detach()
    clone = copy.deepcopy(original)
    assert torch.equal(block(clone, x, None)[0], before)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    assert torch.equal(block(original, x, None)[0], before)
    assert not torch.equal(block(clone, x, None)[0], before)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("unit", "block"), UNITS)
def test_compiled_without_graph_breaks(unit, block, layers):
    original = unit(WIDTH, WIDTH, layers).eval()
    expected = OverBlocks(original)(block)
    # The graph is what is tried here, for which no code need be generated.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_equal_in_float64(OverBlocks(original)(compiled), expected, UNIT_TERMS)


# --- wrong arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("construct", "error", "message"),
    [
        (lambda: compat.LSTMCell(3, 16, 1), ValueError, "input_size: expected at least 4, got 3"),
        (lambda: compat.LSTMCell(16, 3, 1), ValueError, "hidden_size: expected at least 4, got 3"),
        (lambda: compat.LSTMCell(16, 16.0, 1), TypeError, "hidden_size: expected an int, got float"),
        (lambda: compat.LSTMCell(16, 16, 0), ValueError, "nlayers: expected at least 1, got 0"),
        (lambda: compat.LSTMCell(16, 16, True), TypeError, "nlayers: expected an int, got bool"),
        (lambda: compat.LSTMCell(16, 16, 1, dropout=1.5), ValueError, "dropout"),
        (lambda: compat.DIAAttention(0, 0), ValueError, "in_x_features: expected at least 4, got 0"),
        (lambda: compat.DIAAttention("16", 16), TypeError, "in_x_features: expected an int, got str"),
        (lambda: compat.DIAAttention(16, 16, 0), ValueError, "num_layers: expected at least 1, got 0"),
        (lambda: compat.DIAAttention(16, 32), ValueError, "in_h_features: expected in_x_features = 16"),
    ],
)
def test_wrong_constructor_arguments(construct, error, message):
    with pytest.raises(error, match=message):
        construct()


X = torch.zeros(2, 16, 4, 4)
STATE = torch.zeros(1, 2, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compat.LSTMCell(16, 16, 1)(X, (STATE, STATE)), r"input: expected shape \(N, 16\)"),
        (lambda: compat.LSTMCell(16, 16, 1)(pool(X), (STATE[:, :1], STATE)), r"hidden h: expected shape \(1, 2, 16\)"),
        (lambda: compat.LSTMCell(16, 16, 2)(pool(X), (STATE, STATE)), r"hidden h: expected shape \(2, 2, 16\)"),
        (lambda: compat.LSTMCell(16, 16, 1)(pool(X), (STATE, STATE[0])), r"hidden c: expected shape \(1, 2, 16\)"),
        (lambda: compat.LSTMCell(16, 32, 1).step(X), "hidden_size: expected input_size = 16"),
        (lambda: compat.LSTMCell(16, 16, 1)(3, (STATE, STATE)), "input: expected a torch.Tensor, got int"),
        (lambda: compat.LSTMCell(16, 16, 1)(pool(X), None), r"hidden: expected a pair \(h, c\), got NoneType"),
        (lambda: compat.LSTMCell(16, 16, 1).step(X, 3), r"hidden: expected a pair \(h, c\), got int"),
        (lambda: compat.DIAAttention(16, 16)(X, 3), r"hc: expected a pair \(h, c\), got int"),
        (lambda: compat.LSTMCell(16, 16, 1).step(X, (STATE[:, :1], STATE)), r"state h: expected shape \(2, 16\)"),
        (lambda: compat.DIAAttention(16, 16)(X, ([], [])), "hc: expected h with one tensor a layer, 1, got 0"),
        (
            lambda: compat.DIAAttention(16, 16, 2)(X, ([STATE[0], STATE[0]], [STATE[0]])),
            "hc: expected c with one tensor a layer, 2, got 1",
        ),
        (
            lambda: compat.DIAAttention(16, 16, 2)(X, ([STATE[0], STATE[0, :1]], [STATE[0], STATE[0]])),
            "hc: expected h of one shape",
        ),
        (lambda: compat.DIAAttention(16, 16)(X, ([STATE[0, :1]], [STATE[0]])), r"state h: expected shape \(2, 16\)"),
        (lambda: compat.DIAAttention(32, 32)(X), "x: expected 32 channels"),
    ],
)
def test_wrong_call_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
