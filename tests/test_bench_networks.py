"""The benchmark of whole networks: what is compared is what it is called, and a wrong network has no time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


BENCH_MODULE = "networks"


@pytest.fixture(scope="module")
def networks(bench_module):
    return bench_module


def result(name: str, **changes) -> dict:
    seconds = {
        "plain": [(0.1, 0.1), (0.2, 0.2)], "eager": [(0.15, 0.1), (0.3, 0.2)], "ours": [(0.11, 0.1), (0.22, 0.2)],
    }  # fmt: skip
    return {
        "case": {"network": "resnet164", "batch": 32, "reduction": 4, "network_blocks": 54},
        "name": name,
        "wrong": None,
        "seconds": {"training": seconds, "inference": seconds},
        "saved_bytes": {"plain": 10_000_000, "eager": 64_000_000, "ours": 37_000_000},
        "peak_bytes": {"plain": 100_000_000, "eager": 200_000_000, "ours": 150_000_000},
    } | changes


def document(*results: dict) -> dict:
    environment = {
        "date": "2030-01-02", "device": "cpu", "processor": "a processor", "vector_instructions": "AVX2", "cores": 2,
        "threads": 2, "system": "Linux x86_64", "python": "3.11", "torch": "2.14", "dia_kernels": "0.1.0",
        "backend": "cpu",
    }  # fmt: skip
    return {"environment": environment, "results": list(results)}


def test_tables(networks):
    text = networks.markdown(document(result("resnet164-32")), "picture.png")
    assert "| no attention | 150 ms (1.00x) |" in text
    assert "| DIA, eager | 225 ms (1.50x) |" in text
    assert "| DIA, ours | 165 ms (1.10x) |" in text
    assert "| DIA, ours | +0.50 / 150 |" in text
    assert "| SE | - |" in text
    assert "picture.png" in text
    assert text.rstrip().endswith("nothing.")


def test_a_wrong_network_is_said_and_has_no_time(networks, tmp_path):
    seconds = {"plain": [(0.1, 0.1), (0.2, 0.2)], "eager": [(0.15, 0.1), (0.3, 0.2)]}
    wrong = result(
        "resnet164-32",
        wrong="logits: error 1, at most 0 allowed",
        seconds={"training": seconds, "inference": seconds},
        saved_bytes={"plain": 10, "eager": 20},
        peak_bytes={"plain": 10, "eager": 20},
    )
    both = document(result("resnet164-128"), wrong)
    text = networks.markdown(both, "picture.png")
    assert "| DIA, ours | 165 ms (1.10x) | wrong |" in text
    assert "* resnet164-32: logits: error 1, at most 0 allowed" in text
    networks.draw(both, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_compiled_rows_are_set_against_the_compiled_network(networks):
    seconds = {
        "plain": [(0.1, 0.1)], "ours": [(0.2, 0.1)],
        "plain, compiled": [(0.05, 0.05)], "ours, compiled": [(0.06, 0.05)],
    }  # fmt: skip
    text = networks.mode_table([result("a", seconds={"training": seconds})], "training")
    assert "| DIA, ours, compiled | 60.0 ms (1.20x) |" in text


@pytest.mark.parametrize("reduction", [4, 20])
def test_units_in_resnet50_agree(networks, reduction):
    case = networks.Case("resnet50", 2, reduction)
    built = {variant: networks.network(case, variant).double().eval() for variant in case.variants()}
    assert ("pytorchcv" in built) == (reduction == 4)
    for variant in ("ours", "step"):
        built[variant].load_state_dict(built["eager"].state_dict())
    built["our se"].load_state_dict(
        dict(zip(built["our se"].state_dict(), built["se"].state_dict().values(), strict=True))
    )
    if "pytorchcv" in built:
        theirs = built["pytorchcv"].state_dict()
        ours = built["eager"].state_dict()
        assert len(theirs) == len(ours)
        built["pytorchcv"].load_state_dict(
            {key: value.reshape(theirs[key].shape) for key, value in zip(theirs, ours.values(), strict=True)}
        )
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        logits = {variant: model(x) for variant, model in built.items()}
    for variant in {"ours", "step", "pytorchcv"} & built.keys():
        torch.testing.assert_close(logits[variant], logits["eager"], rtol=0, atol=1e-9 * logits["eager"].abs().max())
    torch.testing.assert_close(logits["our se"], logits["se"], rtol=0, atol=1e-9 * logits["se"].abs().max())
    assert not torch.allclose(logits["plain"], logits["eager"])
    assert not torch.allclose(logits["plain"], logits["se"])


@pytest.mark.slow
def test_a_case_is_measured(networks, monkeypatch):
    case = networks.CASES[0]
    monkeypatch.setattr(networks, "MIN_ROUNDS", 1)

    def timings(mode, variants):
        return networks.timed(case, mode, variants, compiled=False, budget=0.0, threads=1)

    found = networks.measure(case, ("plain", "ours"), timings)
    assert found["wrong"] is None
    for mode in networks.MODES:
        assert {name: len(pairs) for name, pairs in found["seconds"][mode].items()} == {"plain": 1, "ours": 1}
        assert all(own > 0 and base > 0 for pairs in found["seconds"][mode].values() for own, base in pairs)
    assert found["saved_bytes"]["ours"] > found["saved_bytes"]["plain"] > 0
    assert found["peak_bytes"]["plain"] > 0
    monkeypatch.setattr(networks, "breach", lambda _: "wrong on purpose")
    assert "ours" not in networks.measure(case, ("plain", "ours"), timings)["seconds"]["training"]


def test_a_process_that_dies_is_said(networks, capfd):
    case = networks.Case("resnet164", 3, 4)  # which no process of its own knows
    with pytest.raises(RuntimeError, match=r"the process of resnet164-3, plain in inference ended with 1"):
        networks.timed(case, "inference", ("plain",), compiled=False, budget=0.0, threads=None)
    assert "KeyError: 'resnet164-3'" in capfd.readouterr().err
