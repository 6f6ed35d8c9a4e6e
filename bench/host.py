"""What a call costs the host: microseconds on maps so small that nothing else is left.

    python bench/host.py                     a minute on one thread; writes host.json and host.md to bench/results

Beside ours: one addition, PyTorch's own LSTM cell, the plain tail of a block, and the step in eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import environment
import timing
import torch
from torch import Tensor, nn

from dia_kernels import SharedAttention, operators

BENCH = Path(__file__).resolve().parent
#: Eight channels at four positions, one sample.
SHAPE = (1, 8, 2, 2)
MODES = ("inference", "training, forward", "training, forward + backward")
SECONDS_A_MODE = 20.0

LABELS = {
    "add": "`torch.add`",
    "lstm": "`nn.LSTMCell`",
    "plain": "plain tail: norm, addition, ReLU",
    "eager": "step, eager PyTorch",
    "operator": "step, our operator alone",
    "ours": "**step, ours**",
    "eager_tail": "norm and step, eager PyTorch",
    "ours_tail": "**norm and step, ours**",
}
#: These two are what a user would not differentiate.
FORWARD_ONLY = ("add", "operator")


def calls(mode: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name. The norm is in training mode where gradients are recorded, else it is not."""
    training = mode != "inference"
    torch.manual_seed(0)
    ours, eager = SharedAttention(SHAPE[1], 2), SharedAttention(SHAPE[1], 2, backend="reference")
    eager.load_state_dict(ours.state_dict())
    norm, cell = nn.BatchNorm2d(SHAPE[1]).train(training), nn.LSTMCell(SHAPE[1], SHAPE[1])
    x, shortcut = (torch.randn(SHAPE, requires_grad=training) for _ in range(2))
    p, state = torch.randn(SHAPE[:2]), (torch.rand(SHAPE[:2]), torch.randn(SHAPE[:2]))
    flags = (1, True, False, False, False)

    def tail(attention: SharedAttention) -> Tensor:
        return attention(x, state, norm=norm, shortcut=shortcut, activation="relu")[0]

    forward: dict[str, Callable[[], Tensor]] = {
        "add": lambda: torch.add(x, shortcut),
        "lstm": lambda: cell(p, state)[0],
        "plain": lambda: torch.relu(norm(x) + shortcut),
        "eager": lambda: eager(x, state, shortcut=shortcut, activation="relu")[0],
        "operator": lambda: operators.native.step(x, shortcut, *state, *ours.lstm_parameters(), *flags)[0],
        "ours": lambda: ours(x, state, shortcut=shortcut, activation="relu")[0],
        "eager_tail": lambda: tail(eager),
        "ours_tail": lambda: tail(ours),
    }
    torch.testing.assert_close(forward["ours"](), forward["eager"]())
    torch.testing.assert_close(forward["ours_tail"](), forward["eager_tail"]())
    if mode == "inference":
        return {name: torch.no_grad()(call) for name, call in forward.items()}
    forward = {name: call for name, call in forward.items() if name not in FORWARD_ONLY}
    if mode == MODES[1]:
        return dict(forward)
    leaves = (x, shortcut, *ours.parameters(), *eager.parameters(), *norm.parameters(), *cell.parameters())
    return {name: _with_backward(call, leaves) for name, call in forward.items()}


def _with_backward(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], None]:
    dy = torch.ones_like(call())

    def forward_and_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(dy)

    return forward_and_backward


def measured(seconds: float) -> dict[str, timing.Samples]:
    """Samples of every mode."""
    with timing.undisturbed():
        return {mode: timing.rounded(timing.interleaved(calls(mode), seconds)) for mode in MODES}


def markdown(document: dict) -> str:
    """The medians as a table."""
    where = document["environment"]
    lines = [
        "# What a call costs the host",
        "",
        f"Microseconds, medians of interleaved runs, on a map of {'x'.join(map(str, SHAPE))}, float32, one thread of",
        f"{where['processor']}, torch {where['torch']}, Python {where['python']}, {where['date']}.",
        "The norm is in training mode in the two columns with gradients. Made by `python bench/host.py`.",
        "",
        "| | " + " | ".join(MODES) + " |",
        "| --- |" + " ---: |" * len(MODES),
    ]
    for name, label in LABELS.items():
        samples = [document["seconds"][mode].get(name) for mode in MODES]
        cells = ["-" if s is None else f"{statistics.median(s) * 1e6:.1f}" for s in samples]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a call costs the host.")
    parser.add_argument("--seconds", type=float, default=SECONDS_A_MODE, help="for each of the three modes")
    parser.add_argument("--output", type=Path, default=BENCH / "results", help="folder of the two files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    document = {"environment": environment.describe(), "seconds": measured(options.seconds)}
    (options.output / "host.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = markdown(document)
    (options.output / "host.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
