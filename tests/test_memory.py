"""Checkpointed blocks and stages: gradients and buffers of the run without it, bit for bit, and fewer bytes kept."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from residual_networks import Residual, plain
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dia_kernels import SharedAttention, memory, operators, share_attention
from dia_kernels.models import Options, PreResNet, ResNet, WideResNet
from dia_kernels.models.resnet import BasicBlock

pytestmark = pytest.mark.usefixtures("one_thread")

DIA = Options("dia")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(14, options=DIA),
    "bottlenecks": lambda: ResNet(20, bottleneck=True, options=DIA),
    "norm called by itself": lambda: ResNet(14, options=Options("dia", fold_norm=False)),
    "squeeze-and-excitation": lambda: ResNet(14, options=Options("se")),
    "without attention": lambda: ResNet(14),
    "pre-activation": lambda: PreResNet(20, options=DIA),
    "dropout": lambda: WideResNet(16, widen=1, dropout=0.5, options=DIA),
    "converted": lambda: share_attention(plain(), reduction=2),
    "converted, a cell of the mean": lambda: share_attention(plain(), "dsu"),
    "converted, a cell with statistics": lambda: share_attention(plain(), "srm"),
}


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Result, gradients and buffers of two passes of training, by name."""
    torch.manual_seed(3)
    model.train()
    for k in range(2):
        y = (call or model)(images() + k)
        y.square().mean().backward()
    tensors = {"y": y.detach(), **{f"buffer {name}": b for name, b in model.named_buffers()}}
    return tensors | {f"gradient of {name}": p.grad for name, p in model.named_parameters()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


def saved(call: Callable[[], object], *own: Tensor) -> int:
    """Bytes that ``call`` keeps for a backward pass, each storage once, ``own`` not counted."""
    known = {t.untyped_storage().data_ptr() for t in own}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()  # which holds the graph: no storage is freed and its address used again
    del result
    return sum(sizes.values())


# --- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["nothing", "convolutions"])
@pytest.mark.parametrize("what", ["block", "stage"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_buffers_are_those_without_it(name, what, save):
    model = NETWORKS[name]()
    again = memory.checkpoint(copy.deepcopy(model), what, save=save)
    assert_same_bits(trained(again), trained(model))


def test_in_evaluation_too():
    model = ResNet(14, options=DIA).eval()
    again = memory.checkpoint(copy.deepcopy(model))
    for network in (model, again):
        network(images()).sum().backward()
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), model.buffers(), strict=True))


def test_under_autocast():
    model = ResNet(14, options=DIA)
    again = memory.checkpoint(copy.deepcopy(model), save="convolutions")

    def cast(network, x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x).float()

    assert_same_bits(trained(again, partial(cast, again)), trained(model, partial(cast, model)))


@pytest.mark.parametrize("save", ["nothing", "convolutions"])
def test_stages_of_blocks_that_are_both_computed_again(save):
    model = ResNet(14, options=DIA)
    again = memory.checkpoint(memory.checkpoint(copy.deepcopy(model), "block", save=save), "stage")
    assert_same_bits(trained(again), trained(model))


@pytest.mark.parametrize("selective", [False, True])
def test_pytorchs_own_checkpoint_around_a_block(selective):
    """Non-reentrant, the state handed through; PyTorch updates the inner norm's buffers twice, which is not ours to
    change."""

    class Around(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args):
            options = {"use_reentrant": False}
            if selective:
                options["context_fn"] = partial(create_selective_checkpoint_contexts, memory.keep_convolutions)
            return checkpoint(self.block, *args, **options)

    model = ResNet(14, options=DIA)
    again = copy.deepcopy(model)
    for stage in again.stages:
        stage.blocks = nn.ModuleList(map(Around, stage.blocks))
    found = {name.replace("block.", ""): t for name, t in trained(again).items()}
    expected = trained(model)
    assert_same_bits(*({k: v for k, v in side.items() if "buffer" not in k} for side in (found, expected)))


def test_a_graph_that_is_kept_is_computed_again_each_time():
    model = memory.checkpoint(ResNet(14, options=DIA))
    loss = model(images()).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), first, strict=True))
    assert all(map(torch.equal, model.buffers(), buffers))


def test_a_gradient_penalty_through_it():
    model = ResNet(14, options=DIA).double()
    again = memory.checkpoint(copy.deepcopy(model))
    found = []
    for network in (again, model):
        x = images().double().requires_grad_()
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().mean(), list(network.parameters())[:-1]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# --- the second pass sees what the first one saw ------------------------------------------------------------------


def test_parameters_of_a_functional_call():
    model = ResNet(14, options=DIA)
    given = {name: (p + 0.1).detach().requires_grad_() for name, p in model.named_parameters()}
    found = []
    for network in (memory.checkpoint(copy.deepcopy(model)), model):
        loss = functional_call(network, given, (images(),)).square().mean()
        found.append(torch.autograd.grad(loss, list(given.values())))
        assert all(isinstance(p, nn.Parameter) for p in network.parameters())
    assert all(map(torch.equal, *found))


def test_a_power_iteration_starts_where_it_did():
    model = ResNet(14, options=DIA)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            parametrizations.spectral_norm(module)
    again = memory.checkpoint(copy.deepcopy(model))
    assert_same_bits(trained(again), trained(model))


def test_a_change_of_mode_before_the_backward():
    model = ResNet(14, options=DIA)
    again = memory.checkpoint(copy.deepcopy(model))
    for network in (again, model):
        loss = network(images()).square().mean()
        network.eval()
        loss.backward()
        assert not any(module.training for module in network.modules())
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_second_pass_that_fails_leaves_everything_as_it_was():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm2d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.norm(x)
            if self.calls == 2:
                raise ArithmeticError("the second pass")
            return torch.tanh(y)

    model = memory.checkpoint(nn.Sequential(Fails()), Fails, save="convolutions")
    loss = model(images()).sum()
    buffers, kept = list(model.buffers()), [b.clone() for b in model.buffers()]
    with pytest.raises(ArithmeticError, match="the second pass"):
        loss.backward()
    assert all(now is before for now, before in zip(model.buffers(), buffers, strict=True))
    assert all(map(torch.equal, buffers, kept))
    assert torch.equal(images() + 1, images().add(1)), "no mode of the dispatcher is left over"


# --- bytes --------------------------------------------------------------------------------------------------------

N, C, SIDE, REDUCTION = 3, 8, 6, 2
TABLE = N * C


def tables() -> int:
    """Elements of what the cell keeps: p, both bottlenecks and four gates of each sample."""
    return 5 * TABLE + 2 * N * (C // REDUCTION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_bytes_that_a_tail_saves(folded, relu, dtype):
    """x (or z), with a ReLU y, the tables in the compute dtype, and the new cell state: nothing else."""
    attention = SharedAttention(C, REDUCTION)
    norm = nn.BatchNorm2d(C)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    attention.to(table), norm.to(table)
    x = torch.randn(N, C, SIDE, SIDE, dtype=dtype, requires_grad=True)
    shortcut = torch.randn_like(x).requires_grad_()
    h, c = (torch.rand(N, C, dtype=table).requires_grad_() for _ in range(2))
    found = saved(
        lambda: attention(
            x, (h, c), shortcut=shortcut, activation="relu" if relu else None, norm=norm if folded else None
        ),
        *(h, c, *attention.parameters(), *norm.parameters(), *norm.buffers()),
    )
    maps = (2 if relu else 1) * x.nbytes
    own = tables() + TABLE + (TABLE + 3 * C if folded else 0)
    assert found == maps + own * table.itemsize


def test_the_output_that_a_tail_saves_is_what_the_next_convolution_keeps_anyway():
    attention, conv, norm = SharedAttention(C, REDUCTION), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
    x, shortcut = (torch.randn(N, C, SIDE, SIDE, requires_grad=True) for _ in range(2))
    own = (x, *attention.parameters(), *norm.parameters(), *norm.buffers(), *conv.parameters())

    def tail() -> Tensor:
        return attention(x, norm=norm, shortcut=shortcut, activation="relu")[0]

    assert saved(lambda: conv(tail()), *own) == saved(tail, *own)


@pytest.mark.parametrize("save", ["everything", "convolutions", "nothing"])
def test_bytes_that_a_block_saves(save):
    if save == "convolutions" and not memory._RESPECTFUL:
        pytest.skip("this torch shows what a policy keeps to no hook")
    block, attention = BasicBlock(C, C, 1, DIA), SharedAttention(C, REDUCTION)
    x = torch.randn(N, C, SIDE, SIDE, requires_grad=True)
    model = nn.ModuleList([block, attention])
    memory.checkpoint(model, save=save)
    found = saved(lambda: block(x, attention), x, *model.parameters(), *model.buffers())
    statistics = 2 * C  # of a norm: mean and deviation of the batch
    tail = tables() + TABLE + TABLE + 3 * C  # with the new c and the norm's part
    elements = {
        "everything": 4 * x.numel() + statistics + tail,  # both convolutions' results, the inner ReLU's, y
        "convolutions": 3 * x.numel() + tail + TABLE,  # the ReLU's not, nor the norm's, but h
        "nothing": 0,  # beside x
    }
    assert found == elements[save] * x.itemsize


def test_a_stage_saves_its_input_alone():
    stage = memory.checkpoint(ResNet(14, options=DIA), "stage").stages[0]
    x = torch.randn(N, 16, SIDE, SIDE, requires_grad=True)
    assert saved(lambda: stage(x), *stage.parameters(), *stage.buffers()) == x.nbytes


# --- one's own forward -----------------------------------------------------------------------------------------------


def test_checkpointed_calls_of_ones_own():
    attention, norm, conv = SharedAttention(3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
    model = nn.ModuleList([attention, norm, conv])
    again = copy.deepcopy(model)

    def block(modules, x, state, *, scale):
        attention, norm, conv = modules
        return attention(scale * conv(x), state, norm=norm, shortcut=x, activation="relu")

    def network(modules, run):
        def call(x):
            y, state = run(partial(block, modules), x, None, scale=0.5)
            return run(partial(block, modules), y, state, scale=2.0)[0]

        return call

    run = partial(memory.checkpointed, modules=[again], save="convolutions")
    expected = trained(model, network(model, lambda function, *args, **kwargs: function(*args, **kwargs)))
    assert_same_bits(trained(again, network(again, run)), expected)


def test_modules_are_found_in_the_arguments():
    stage = ResNet(14, options=DIA).stages[0]
    again = copy.deepcopy(stage)
    call = partial(torch.randn, 2, 16, 6, 6)
    for blocks, run in ((stage, lambda f, *a: f(*a)), (again, memory.checkpointed)):
        torch.manual_seed(0)
        x, state = call(), None
        for block in blocks.blocks:
            x, state = run(block.forward, x, blocks.attention, state)
        x.sum().backward()
    for ours, theirs in zip(again.parameters(), stage.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(map(torch.equal, again.buffers(), stage.buffers()))


def keep_products(context, operator, *args, **kwargs):
    """A policy of one's own."""
    keep = operator in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def test_a_policy_of_ones_own():
    model = ResNet(14, options=DIA)
    again = memory.checkpoint(copy.deepcopy(model), save=keep_products)
    assert_same_bits(trained(again), trained(model))


# --- where it stands aside -------------------------------------------------------------------------------------------


@pytest.fixture
def recomputing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that PyTorch's checkpoint was asked for."""
    calls: list[str] = []
    original = memory.torch_checkpoint.checkpoint

    def counted(function, *args, **options):
        calls.append("checkpoint")
        return original(function, *args, **options)

    monkeypatch.setattr(memory.torch_checkpoint, "checkpoint", counted)
    return calls


def test_without_a_gradient_nothing_is_checkpointed(recomputing):
    model = memory.checkpoint(ResNet(14, options=DIA))
    with torch.no_grad():
        model(images())
    with torch.inference_mode():
        model(images())
    assert recomputing == []
    model(images())
    assert len(recomputing) == 6


def test_transforms_and_traces_see_the_blocks_themselves(recomputing):
    model = ResNet(14, options=DIA).double().eval()
    again = memory.checkpoint(copy.deepcopy(model))
    x = images().double()
    torch.testing.assert_close(torch.func.jacrev(again)(x[:1]), torch.func.jacrev(model)(x[:1]), rtol=1e-12, atol=1e-14)
    converted = memory.checkpoint(NETWORKS["converted"]()).eval()
    traced = fx.symbolic_trace(converted)
    assert recomputing == []
    torch.testing.assert_close(traced(images()), converted(images()))


def test_exported_without_it(recomputing):
    model = memory.checkpoint(ResNet(14, options=DIA)).eval()
    program = torch.export.export(model, (images(),))
    assert recomputing == []
    torch.testing.assert_close(program.module()(images()), model(images()))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("save", ["nothing", pytest.param("convolutions", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(save, fresh_compiler):
    stage = ResNet(14, options=DIA).stages[0].double()
    again = memory.checkpoint(copy.deepcopy(stage), save=save)
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for call in (stage, torch.compile(again, fullgraph=True, backend=backend)):
        call(x).square().mean().backward()
    assert targets.count(torch.ops.higher_order.tag_activation_checkpoint) == len(set_parts(again))
    assert {b.item() for name, b in again.named_buffers() if "num_batches" in name} == {1}
    for (name, ours), theirs in zip(again.named_parameters(), stage.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
    for ours, theirs in zip(again.buffers(), stage.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# --- the setting -----------------------------------------------------------------------------------------------------


def test_the_setting_goes_along_with_copies_and_pickles():
    for make in (NETWORKS["resnet"], NETWORKS["converted"]):
        model = memory.checkpoint(make(), save="convolutions")
        keys = list(model.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(other.state_dict()) == keys
            parts = [other.get_submodule(name) for name in set_parts(other)]
            assert len(parts) == 6
            assert all(part.forward.module is part and part.forward.save == "convolutions" for part in parts)
            assert_same_bits(trained(other), trained(copy.deepcopy(model)))


def test_the_setting_changes_and_ends(recomputing):
    model = memory.checkpoint(ResNet(14, options=DIA))
    memory.checkpoint(model, save="convolutions")
    assert {block.forward.save for stage in model.stages for block in stage.blocks} == {"convolutions"}
    memory.checkpoint(model, save="everything")
    model(images())
    assert recomputing == []
    assert set_parts(model) == []


def set_parts(model: nn.Module) -> list[str]:
    """Names of the modules that compute themselves again."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_what_may_be_named():
    blocks = [f"{stage}.{block}" for stage in (1, 3) for block in range(3)]
    assert set_parts(memory.checkpoint(plain(), Residual)) == blocks
    model = plain()
    assert set_parts(memory.checkpoint(model, [model[1]])) == ["1"]
    assert set_parts(memory.checkpoint(NETWORKS["converted"]())) == blocks
    assert set_parts(memory.checkpoint(NETWORKS["converted"](), "stage")) == ["1", "3"]
    alone = share_attention(plain(), per_block=True, reduction=2)
    assert set_parts(memory.checkpoint(alone, "stage")) == blocks


def replaced() -> nn.Module:
    model = ResNet(14)
    model.stages[0].blocks[0].forward = lambda *args: None
    return model


def in_one_container() -> nn.Module:
    blocks = [Residual(8), Residual(8), nn.Conv2d(8, 16, 1), Residual(16), Residual(16)]
    return share_attention(nn.Sequential(nn.Sequential(*blocks), nn.Flatten()), reduction=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: memory.checkpoint(3), TypeError, "model: expected an nn.Module, got int"),
        (lambda: memory.checkpoint(plain()), ValueError, "what: found no block of models.create or share_attention"),
        (lambda: memory.checkpoint(plain(), "stage"), ValueError, "what: found no stage of models.create"),
        (lambda: memory.checkpoint(plain(), "layer"), ValueError, 'what: expected "block", "stage", a class or modul'),
        (lambda: memory.checkpoint(plain(), BasicBlock), ValueError, "what: model holds no BasicBlock"),
        (lambda: memory.checkpoint(plain(), 3), TypeError, 'what: expected "block", .* got int'),
        (lambda: memory.checkpoint(plain(), [3]), TypeError, "what: expected modules, got a int"),
        (lambda: memory.checkpoint(plain(), [nn.ReLU()]), ValueError, "what: a ReLU is no module of model"),
        (lambda: memory.checkpoint(ResNet(14), save="all"), ValueError, "save: expected one of 'everything', .*'all'"),
        (lambda: memory.checkpoint(replaced()), ValueError, "what: a BasicBlock has a forward of its own on the inst"),
        (lambda: memory.checkpoint(in_one_container(), "stage"), ValueError, "stage of 0.0 to 0.1 is no module of its"),
        (lambda: memory.checkpointed(3), TypeError, "function: expected a module or a function, got int"),
        (lambda: memory.checkpointed(plain(), save="all"), ValueError, "save: expected one of"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_error_changes_nothing():
    model = replaced()
    with pytest.raises(ValueError, match="what"):
        memory.checkpoint(model)
    assert set_parts(model) == ["stages.0.blocks.0"]


def test_the_policy_knows_every_operator_of_the_library():
    for name in operators.SCHEMAS:
        kept = memory.keep_convolutions(None, getattr(operators.native, name))
        assert kept == CheckpointPolicy.MUST_SAVE
    assert memory.keep_convolutions(None, torch.ops.aten.relu.default) == CheckpointPolicy.PREFER_RECOMPUTE


# --- the benchmark ---------------------------------------------------------------------------------------------------

BENCH_MODULE = "memory"


@pytest.fixture
def bench(request: pytest.FixtureRequest):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return request.getfixturevalue("bench_module")


def test_the_benchmark_counts_the_bytes_of_a_tail(bench):
    shape = bench.tail.Shape(2, 8, 4, 4)
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        result = bench.tail_bytes(shape, dtype, compiled=False)
        elements = 2 * 8 * 4 * 4
        assert result["map"] == elements * itemsize
        assert {saved["output"] for saved in result["saved"].values()} == {result["map"]}
        # z, the tables with the norm's part, the states that came in and c that goes out
        tables = 5 * 16 + 2 * 2 * 2 + (16 + 3 * 8) + 3 * 16
        assert result["saved"]["ours"]["rest"] == result["map"] + 4 * tables
        assert result["saved"]["plain"]["rest"] == result["map"] + 4 * 2 * 8


def test_the_benchmark_counts_what_is_alive(bench):
    def call():
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        torch.empty(1 << 21, dtype=torch.uint8).zero_()
        return kept

    assert bench.alive_bytes(call) == {"kept": 1 << 20, "peak": (1 << 20) + (1 << 21)}


@pytest.mark.slow
def test_the_benchmark_reports(bench, tmp_path, monkeypatch):
    arguments = ["--shapes", "2x8x4x4", "--without", "compile", "--budget", "0"]
    monkeypatch.setattr(bench, "CASES", (bench.Case("resnet20", 2, 8),))
    monkeypatch.setattr(bench, "MIN_ROUNDS", 1)
    assert bench.main([*arguments, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "memory.md").read_text()
    assert "| 2x8x4² | 0.0 |" in text
    assert "| blocks, convolutions kept |" in text
    assert re.search(r"\| everything kept \| \d+\.\d \(1\.00x\) \| \d+\.\d \(1\.00x\) \| 1\.00 \|", text)
    assert text.rstrip().endswith("none.")
