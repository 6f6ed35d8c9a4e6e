"""The plans of the GPU step, from Python and from the command line."""

from __future__ import annotations

import itertools
import json

import pytest

from dia_kernels import __main__, operators, plan

pytestmark = pytest.mark.skipif(operators.library_error is not None, reason=f"{operators.library_error}")


def test_a_plan_for_every_gpu():
    names = plan.gpus()
    assert {"t4", "a100", "h100", "b200", "rtx5090"} <= set(names)
    for name in names:
        for backward, norm in itertools.product((False, True), plan.NORMS):
            p = plan.plan((32, 256, 56, 56), name, backward=backward, norm=norm)
            assert p.cell in ("tiles", "products", "clusters")
            assert p.seconds >= p.ideal_seconds > 0
            assert p.bytes == p.passes * 32 * 256 * 56 * 56 * 2
            if norm == "batch":
                assert p.passes == (6 + 1 / 16 if backward else 4)


def test_plans_of_one_kind():
    shape = (256, 2048, 7, 7)
    sweeps, products, chosen = (plan.plan(shape, layouts=layouts) for layouts in ("sweeps", "products", "any"))
    assert (sweeps.cell, products.cell) == ("tiles", "products")
    assert sweeps.launches < products.launches
    assert chosen == min(sweeps, products, key=lambda p: p.seconds)


def test_plans_by_clusters():
    """Where the cache holds the maps, on GPUs that have clusters."""
    for shape in ((128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8)):
        for norm, launches in (("none", (1, 3)), ("given", (2, 4)), ("batch", (3, 4))):
            for backward, expected in zip((False, True), launches, strict=True):
                p = plan.plan(shape, channels_last=True, norm=norm, backward=backward)
                assert (p.cell, p.together, p.chunk, p.launches) == ("clusters", 8, 128, expected)
                options = {"channels_last": True, "norm": norm, "backward": backward}
                sweeps = plan.plan(shape, layouts="sweeps", **options)
                assert p.seconds < sweeps.seconds
                assert p.bytes == sweeps.bytes
                text = plan.as_text("step", p)
                assert "clusters of blocks, 8 samples each" in text
                assert f" {expected} {'launch' if expected == 1 else 'launches'}, " in text
        assert plan.plan(shape, "a100", layouts="clusters").cell == "tiles"
    large = (256, 256, 56, 56)
    assert plan.plan(large).cell == "tiles"
    assert plan.plan(large, layouts="clusters").cell == "clusters"


PLANS = {"step forward", "step backward", "tail forward", "tail backward"}


@pytest.mark.parametrize(
    ("shape", "options", "name"),
    [
        ((32, 256), {}, "shape"),
        ((32, -1, 4), {}, "shape"),
        ((2, 8, 4), {"dtype": "int8"}, "dtype"),
        ((2, 8, 4), {"reduction": 9}, "reduction"),
        ((2, 8, 4), {"device": "abacus"}, "device"),
        ((2, 8, 4), {"norm": "layer"}, "norm"),
        ((2, 8, 4), {"layouts": "on chip"}, "layouts"),
    ],
)
def test_a_wrong_argument_is_named(shape, options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        plan.plan(shape, **options)


def test_the_command_prints_step_and_tail_in_both_directions(capsys):
    assert __main__.main(["info", "--plan", "128", "64", "32", "32", "--dtype", "bf16", "--device", "h100"]) == 0
    text = capsys.readouterr().out
    for name in PLANS:
        assert name in text
    assert "modelled" in text
    assert __main__.main(["info", "--plan", "128", "64", "32", "32", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == PLANS
    with pytest.raises(SystemExit, match="device: expected one of"):
        __main__.main(["info", "--plan", "128", "64", "32", "32", "--device", "abacus"])
