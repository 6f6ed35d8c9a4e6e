"""The benchmark of the tail: shapes, ratios, targets, and that what it compares is the same tail."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


BENCH_MODULE = "tail"


@pytest.fixture(scope="module")
def tail(bench_module):
    return bench_module


def result(shape: str, ours: float, group: str, wrong: str | None = None) -> dict:
    seconds = {"plain": [0.1, 0.2], "eager": [0.3, 0.6], "ours": [0.1 * ours, 0.2 * ours]}
    if wrong:
        del seconds["ours"]
    return {"shape": shape, "layout": "contiguous", "group": group, "wrong": wrong, "seconds": seconds}


def test_shapes(tail):
    assert tail.Shape.parse("32x256x56x56") == tail.Shape(32, 256, 56, 56, 4)
    assert tail.Shape.parse("32x2048x7x7r20").name == "32x2048x7², r = 20"
    for text in ("32x256", "32x0x5x5", "axbxcxd", "1x2x3x4rx"):
        with pytest.raises(ValueError, match=r"^shape: expected four positive numbers"):
            tail.Shape.parse(text)


def test_targets_and_tables(tail, tmp_path):
    results = [result("a", 0.8, "mean"), result("b", 0.9, "mean"), result("c", 1.3, "limit")]
    text = tail.target_text(results)
    assert "geometric mean of 2 of 5 shapes: 0.85, at most 0.85 wanted: reached" in text
    assert "c: 1.30, at most 1.2 wanted: missed" in text
    document = {
        "environment": tail.environment.describe(),
        "cell": "lstm",
        "results": [*results, result("d", 1, "", wrong="y: off")],
    }
    text = tail.markdown(document, "picture.png")
    assert "| a | 150 ms | 3.00 | 0.80 |" in text
    assert "| d | 150 ms | 3.00 | wrong |" in text
    assert "* d, contiguous: y: off" in text
    tail.draw(document, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cell", ["lstm", "dsu", "se", "eca", "srm", "cbam"])
def test_a_small_tail_is_right_and_timed(tail, cell, layout):
    # SRM's norm is over the samples: of few it makes much of rounding.
    found = tail.measure(tail.Shape(64, 16, 6, 6), layout, compiled=False, budget=0.01, cell=cell)
    assert found["wrong"] is None
    assert set(found["seconds"]) == {"plain", "eager", "step", "ours"}


def test_a_wrong_tail_is_found(tail, monkeypatch):
    forward = tail.OurTail.forward

    def wrong(self, *inputs):
        y, *state = forward(self, *inputs)
        return y + 1e-3, *state

    monkeypatch.setattr(tail.OurTail, "forward", wrong)
    found = tail.measure(tail.Shape(4, 16, 6, 6), "contiguous", compiled=False, budget=0.01)
    assert found["wrong"].startswith("y: error")
    assert set(found["seconds"]) == {"plain", "eager"}
