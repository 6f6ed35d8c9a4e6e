"""The papers' experiments at a minimal scale: every one ends in its three files; cut off, it ends in the same ones."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import write_fashion

from dia_kernels import SharedAttention, __main__, info, models
from dia_kernels.reproduce import command, correlation, curves, experiments, scales, speed, tables, trials, variants
from dia_kernels.train import images, run
from dia_kernels.train.settings import Settings

MINIMAL = replace(
    scales.SCALES["tiny"], data="fashion", also=None, images=None, seeds=2, epochs=1, batch_size=30,
    networks=("resnet14",), depths=("resnet8", "resnet14"), timed_batch=2, timed_side=8, timed_rounds=2,
)  # fmt: skip

RESULTS = {
    "experiment": str, "title": str, "scale": str, "data": str, "command": str, "device": str, "versions": dict,
    "records": list,
}  # fmt: skip
RECORD = {
    "label": dict, "seed": int, "settings": dict, "parameters": int, "layers": list, "losses": list, "accuracies": list,
    "gradient_norms": list, "best": float, "last": float, "diverged": bool,
}  # fmt: skip


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_fashion(tmp_path_factory.mktemp("fashion"), 60, 20))


@pytest.fixture
def minimal(monkeypatch: pytest.MonkeyPatch) -> scales.Scale:
    monkeypatch.setitem(scales.SCALES, "tiny", MINIMAL)
    return MINIMAL


def reproduce(name: str, out: Path, fashion: str, *options: str) -> int:
    arguments = ["reproduce", name, "--folder", fashion, "--out", str(out), "--jobs", "1", "--no-progress", *options]
    return __main__.main(arguments)


def results(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}-tiny.json").read_text())


def test_the_command_knows_every_experiment_and_scale():
    assert tuple(experiments.EXPERIMENTS) == command.NAMES
    assert tuple(scales.SCALES) == command.SCALES
    assert all(scale.seeds >= 3 for scale in scales.SCALES.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("any-attention", "ablation", "no-norm") else [])
        for name in command.NAMES
        if name not in ("params", "speed")
    ],
)
def test_an_experiment_leaves_results_table_and_picture(minimal, fashion, tmp_path, capsys, name, monkeypatch):
    shown = {"accuracy": 8, "any-attention": 26, "ablation": 30, "correlation": 8}.get(name, 12)
    if shown > 12:
        monkeypatch.setitem(scales.SCALES, "tiny", replace(MINIMAL, seeds=1))
        shown //= 2
    assert reproduce(name, tmp_path, fashion) == 0
    found = results(tmp_path, name)
    assert {k: type(v) for k, v in found.items()} == RESULTS
    assert found["command"] == f"python -m dia_kernels reproduce {name} --scale tiny --folder {fashion}"
    assert set(found["versions"]) == {"dia_kernels", "torch", "python", "triton"}
    assert found["device"] == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else info.gather()["processor"]["model"]
    )
    assert len(found["records"]) == shown
    for record in found["records"]:
        assert {k: type(v) for k, v in record.items() if k != "measured"} == RECORD
        assert len(record["losses"]) == 2
        assert len(record["accuracies"]) == len(record["gradient_norms"]) == 1
        assert len(record["gradient_norms"][0]) == len(record["layers"])
    labels = [tuple(record["label"].values()) for record in found["records"]]
    assert len(set(labels)) == len(tables.by_label(found["records"]))
    text = (tmp_path / f"{name}-tiny.md").read_text()
    assert found["command"] in text
    for label in labels:
        assert f"| {' | '.join(label)} |" in text
    assert (tmp_path / f"{name}-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "last epoch, %" in capsys.readouterr().out


@pytest.mark.slow
def test_parameters_are_exact(minimal, fashion, tmp_path):
    assert reproduce("params", tmp_path, fashion) == 0
    found = results(tmp_path, "params")
    assert {k: type(v) for k, v in found.items()} == RESULTS
    tables_ = {name: [r for r in found["records"] if r["table"] == name] for name in ("unit", "networks", "imagenet")}
    units = {r["channels"]: r["parameters"] for r in tables_["unit"]}
    assert units == {
        16: 776, 32: 2_832, 64: 10_784, 128: 42_048, 256: 166_016, 512: 659_712, 1024: 2_630_144, 2048: 10_503_168,
    }  # fmt: skip
    assert all(r["another_layer"] == 8 * r["channels"] ** 2 + 8 * r["channels"] for r in tables_["unit"])
    imagenet = {(r["network"], r["reduction"]): r["dia"] for r in tables_["imagenet"]}
    assert imagenet == {
        ("resnet18", 4): 12_568_072, ("resnet34", 4): 22_676_232, ("resnet50", 4): 39_516_072,
        ("resnet101", 4): 58_508_200, ("resnet152", 4): 74_151_848, ("resnet50", 20): 28_358_052,
    }  # fmt: skip
    published = {r["network"]: (r["published_plain"], r["published_dia"]) for r in tables_["networks"]}
    assert {name: counts for name, counts in published.items() if counts[0]} == {
        "resnet164": (1_727_284, 1_946_132), "preresnet164": (1_726_388, 1_961_364),
        "wrn52_4": (12_072_500, 12_298_516), "resnext101_8x32": (32_138_244, 33_006_020),
    }  # fmt: skip
    counted = {r["network"]: (r["plain"], r["se"], r["dia"]) for r in tables_["networks"]}
    for name, (plain, dia) in published.items():
        assert plain is None or (counted[name][0], counted[name][2]) == (plain, dia)
    text = (tmp_path / "params-tiny.md").read_text()
    assert "| resnet407 | 4,231,156 | 4,736,416 | 4,450,004 | 218,848 (5.2 %) | - | - |" in text
    assert counted["resnet164"] == (1_727_284, 1_929_388, 1_946_132)
    for name, (plain, se, dia) in counted.items():
        if name.startswith("resnet") and name.removeprefix("resnet") in ("83", "164", "245", "407"):
            assert dia - plain == 10_784 + 42_048 + 166_016, "P(64, 4) + P(128, 4) + P(256, 4)"
            blocks = (int(name.removeprefix("resnet")) - 2) // 9
            assert se - plain == blocks * sum(2 * c * (c // 16) + c + c // 16 for c in (64, 128, 256))


@pytest.mark.slow
def test_speed_times_every_variant(minimal, fashion, tmp_path, capsys, monkeypatch):
    """Each compiled one is: of all networks there is one forward, of which only so many forms are compiled."""
    monkeypatch.setitem(scales.SCALES, "tiny", replace(MINIMAL, networks=("resnet14", "resnet8")))
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        assert reproduce("speed", tmp_path, fashion) == 0
    found = results(tmp_path, "speed")["records"]
    assert [r["variant"] for r in found] == 2 * [
        "plain", "plain, compiled", "SE", "DIA, eager", "DIA, compiled", "DIA, ours", "DIA, ours, compiled",
    ]  # fmt: skip
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 and r["peak_bytes"] > 0 for r in found)
    assert "x plain" in capsys.readouterr().out


def test_the_variants_are_what_their_labels_say():
    common = variants.base(MINIMAL, None, None)
    assert (common.data, common.images, common.epochs, common.batch_size) == ("fashion", None, 1, 30)
    assert common.channels_last
    kinds = {"plain": (None, None), "SE": ("se", False), "shared SE": ("se", True), "DIA-LSTM": ("dia", None)}
    compared = {t.label: (t.settings.attention, t.settings.shared) for t in variants.accuracy(MINIMAL, common)}
    assert compared == {
        (("images", "fashion"), ("network", "resnet14"), ("attention", kind)): how for kind, how in kinds.items()
    }  # fmt: skip
    settings = {t.label: t.settings for t in variants.any_attention(MINIMAL, common)}
    for cell in ("SE", "ECA", "CBAM", "SRM", "DSU", "LSTM"):
        for where, shared in (("each block", False), ("shared", True)):
            s = settings[("attention", cell), ("where", where)]
            assert (s.attention, s.shared) == (cell.lower(), shared)
    for make, name in ((variants.no_skip, "skip"), (variants.no_norm, "norm"), (variants.no_augmentation, "augment")):
        found = [t.settings for t in make(MINIMAL, common)]
        assert all(getattr(s, name) is False for s in found)
        assert [(s.network, s.attention) for s in found] == [
            (n, a) for n in MINIMAL.depths for a in (None, "se", "dia")
        ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2])
def test_cut_off_and_resumed_it_ends_in_the_same_results(minimal, fashion, tmp_path, monkeypatch, stop):
    """Killed in a run, after its first step, when ``stop`` runs had begun."""
    assert reproduce("no-skip", tmp_path / "whole", fashion) == 0
    begun = []
    with monkeypatch.context() as patch:
        original = curves.Curves.on_train_batch_end

        def until(self, trainer, pl_module, outputs, batch, batch_idx):
            original(self, trainer, pl_module, outputs, batch, batch_idx)
            begun.append(len(self.losses) == 1)
            if sum(begun) == stop:
                raise KeyboardInterrupt

        patch.setattr(curves.Curves, "on_train_batch_end", until)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            reproduce("no-skip", tmp_path / "cut", fashion)
    assert len(list((tmp_path / "cut" / "no-skip-tiny").glob("*.json"))) == stop - 1
    assert reproduce("no-skip", tmp_path / "cut", fashion) == 1, "without --resume what is there is left alone"
    assert reproduce("no-skip", tmp_path / "cut", fashion, "--resume") == 0
    for suffix in ("json", "md", "png"):
        one, other = ((tmp_path / part / f"no-skip-tiny.{suffix}").read_bytes() for part in ("whole", "cut"))
        assert one == other


def test_every_trial_has_files_of_its_own():
    for scale in scales.SCALES.values():
        common = variants.base(scale, None, None)
        for make in (
            variants.accuracy,
            variants.any_attention,
            variants.ablation,
            variants.no_skip,
            variants.correlation,
        ):
            names = [trial.name for trial in trials.with_seeds(make(scale, common), 3)]
            assert len(set(names)) == len(names)


def test_trials_of_other_settings_are_not_taken(fashion, tmp_path, minimal, capsys):
    asked = trials.with_seeds(variants.no_skip(MINIMAL, variants.base(MINIMAL, None, Path(fashion))), 2)[:1]
    trials.do_all(asked, tmp_path / "no-skip-tiny", 1, progress=False)
    done = next((tmp_path / "no-skip-tiny").glob("*.json"))
    record = json.loads(done.read_text())
    record["settings"]["epochs"] += 1
    done.write_text(json.dumps(record))
    assert reproduce("no-skip", tmp_path, fashion, "--resume") == 1
    assert "done with other settings" in capsys.readouterr().err


def test_resumed_when_done_the_results_are_read(minimal, fashion, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "measure", lambda network, scale: [timed(network, "plain"), timed(network, "DIA, ours")])
    assert reproduce("speed", tmp_path, fashion) == 0
    first = {suffix: (tmp_path / f"speed-tiny.{suffix}").read_bytes() for suffix in ("json", "md", "png")}
    (tmp_path / "speed-tiny.md").unlink()
    monkeypatch.setattr(speed, "measure", None)
    capsys.readouterr()
    assert reproduce("speed", tmp_path, fashion, "--resume") == 0
    assert {suffix: (tmp_path / f"speed-tiny.{suffix}").read_bytes() for suffix in first} == first
    assert "| resnet14 | DIA, ours |" in capsys.readouterr().out
    assert reproduce("speed", tmp_path, fashion, "--resume", "--data", "fashion") == 1
    assert "speed-tiny.json: made by `python -m dia_kernels reproduce speed" in capsys.readouterr().err
    (tmp_path / "speed-tiny.json").write_text("{}")
    assert reproduce("speed", tmp_path, fashion, "--resume") == 1
    assert "speed-tiny.json: damaged" in capsys.readouterr().err


def test_networks_that_were_timed_before_it_was_cut_off_keep_their_times(minimal, fashion, tmp_path, monkeypatch):
    monkeypatch.setitem(scales.SCALES, "tiny", replace(MINIMAL, networks=("resnet14", "resnet20")))
    called = []

    def measure(network, scale):
        called.append(network)
        if len(called) == 2:
            raise KeyboardInterrupt
        return [timed(network, "plain")]

    monkeypatch.setattr(speed, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        reproduce("speed", tmp_path, fashion)
    assert reproduce("speed", tmp_path, fashion, "--resume") == 0
    assert called == ["resnet14", "resnet20", "resnet20"]
    assert [r["network"] for r in results(tmp_path, "speed")["records"]] == ["resnet14", "resnet20"]


def timed(network: str, variant: str) -> dict:
    return {"network": network, "variant": variant, "seconds": [1.0, 2.0], "peak_bytes": 1_000_000}


def test_jobs_are_at_least_one(minimal, fashion, tmp_path, capsys):
    assert reproduce("params", tmp_path, fashion, "--jobs", "0") == 1
    assert capsys.readouterr().err == "reproduce: jobs: expected at least 1, got 0\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_trials_side_by_side_are_those_one_after_the_other(fashion, tmp_path):
    common = variants.base(MINIMAL, None, Path(fashion))
    asked = trials.with_seeds(variants.accuracy(MINIMAL, common)[:2], 2)
    one, several = (trials.do_all(asked, tmp_path / str(jobs), jobs, progress=False) for jobs in (1, 2))
    assert one == several
    assert [(r["label"]["attention"], r["seed"]) for r in one] == [("plain", 0), ("plain", 1), ("SE", 0), ("SE", 1)]
    assert one[0]["losses"] != one[1]["losses"]
    assert sorted(p.suffix for p in (tmp_path / "1").iterdir()) == [".json"] * 4, "the runs are cleared away"


def test_a_resumed_run_has_whole_curves(fashion, tmp_path):
    settings = Settings(network="resnet8", data="fashion", folder=fashion, epochs=2, batch_size=20, checkpoint_every=2)

    class Stop(curves.Curves):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if len(self.losses) == 4:
                raise RuntimeError("stopped")

    whole, cut = curves.Curves(), curves.Curves()
    run.train(settings, tmp_path / "whole", progress=False, callbacks=[whole])
    Stop.state_key = cut.state_key  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="stopped"):
        run.train(settings, tmp_path / "cut", progress=False, callbacks=[Stop()])
    run.train(settings, tmp_path / "cut", resume=True, progress=False, callbacks=[cut])
    assert len(whole.losses) == 6
    assert len(whole.accuracies) == len(whole.gradient_norms) == 2
    for name in curves.NOTED:
        assert getattr(cut, name) == getattr(whole, name), name


def test_gradient_norms_are_those_of_the_layers(fashion, tmp_path):
    settings = Settings(network="resnet8", data="fashion", folder=fashion, epochs=1, batch_size=60, precision="64-true")
    noted = curves.Curves()
    run.train(settings, tmp_path, progress=False, callbacks=[noted])
    classifier, data = run.build(settings)
    learn, _ = run.loaders(settings, data)
    (batch,) = learn
    torch.nn.functional.cross_entropy(classifier.network(batch[0].double()), batch[1]).backward()
    expected = [layer.weight.grad.norm().item() for layer in curves.layers(classifier.network).values()]
    assert len(expected) == 6
    assert noted.gradient_norms[0] == pytest.approx(expected, rel=1e-9)


def record(trial: trials.Trial, losses: list[float], accuracies: list[float]) -> dict:
    noted = curves.Curves()
    noted.losses, noted.accuracies = losses, accuracies
    return trials._record(trial, models.create("resnet8", 10), noted)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([2.0, 1.0, 0.5, 0.4], False),
        ([2.0, 1.0, 9.0, 0.4], True),
        ([2.0, 1.0, math.nan, math.nan], True),
        ([9.0, 9.0, 2.0, 2.0], False),
        ([1.0, 1.0, math.log(10), math.log(10)], True),
    ],
)
def test_what_counts_as_diverged(losses, diverged):
    found = record(trials.Trial((("a", "b"),), Settings()), losses, [0.1, 0.3])
    assert found["diverged"] == diverged
    assert (found["best"], found["last"]) == (0.3, 0.3)
    json.dumps(found, allow_nan=False)


def test_a_loss_that_is_not_finite_ends_the_run(fashion, tmp_path):
    settings = Settings(
        network="resnet8", data="fashion", folder=fashion, epochs=30, batch_size=30, norm=False, learning_rate=1e30
    )
    found = trials.do(trials.Trial((("a", "b"),), settings), tmp_path)
    assert found["diverged"]
    assert len(found["losses"]) < 10
    assert None in found["losses"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "se"])
def test_correlations_are_those_of_the_scales(fashion, cell, shared):
    data = images.load("fashion", Path(fashion))
    network = models.create("resnet14", 10, attention=cell, shared=shared, in_channels=1)
    found = correlation.of_stages(network, data)
    assert [len(matrix) for matrix in found] == [2, 2, 2]
    x = torch.stack([data.test[k][0] for k in range(20)])
    with torch.no_grad():
        z, scales_ = network.stem(x), []
        stage, state = network.stages[0], None
        for block in stage.blocks:
            unit = block.attention if stage.attention is None else stage.attention
            seen = []
            inner = unit if isinstance(unit, SharedAttention) else unit.cell
            handle = inner.register_forward_hook(lambda m, a, r, seen=seen: seen.append(r))
            z, state = block(z, stage.attention, state)
            handle.remove()
            scales_.append(seen[0][1][0] if isinstance(unit, SharedAttention) else seen[0][0])
    a, b = (s.double().flatten() - s.double().mean() for s in scales_)
    assert found[0][0][1] == pytest.approx(((a @ b) / (a.norm() * b.norm())).item(), abs=1e-4)


def test_correlations_of_neighbours_and_of_all_pairs():
    matrix = [[1.0, 0.9, 0.3], [0.9, 1.0, 0.5], [0.3, 0.5, 1.0]]
    record = {"measured": [matrix, [[1.0]]]}
    assert tables.neighbours(record) == [pytest.approx(0.7), pytest.approx(math.nan, nan_ok=True)]
    assert tables.all_pairs(record)[0] == pytest.approx(1.7 / 3)


def test_means_have_their_spread():
    assert tables.mean_and_spread([0.5, 0.7, 0.6]) == "60.0 ± 10.0"


def shown(name: str, records: list[dict]):
    return experiments.EXPERIMENTS[name].draw({"title": "a title", "records": records})


def noted(label: dict[str, str], seed: int, **more) -> dict:
    return {
        "label": label,
        "seed": seed,
        "parameters": 7,
        "best": 0.9,
        "last": 0.5 + seed / 10,
        "diverged": False,
    } | more


def test_the_picture_of_trials_has_every_run_and_the_means():
    records = [noted({"attention": kind}, seed) for kind in ("SE", "DIA") for seed in (0, 1, 2)]
    (axes,) = shown("accuracy", records).axes
    runs, mean, *_ = axes.lines
    assert list(runs.get_xdata()) == pytest.approx([50, 60, 70])
    assert list(mean.get_xdata()) == pytest.approx([60, 60])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SE", "DIA"]
    assert axes.get_title() == "a title"


def test_the_picture_of_depths_has_curves_and_gradients_by_layer_over_training():
    records = [
        noted(
            {"network": network, "attention": kind}, seed, accuracies=[0.2, 0.4 + seed / 10],
            gradient_norms=[[1.0 + seed, 4.0], [2.0 + seed, 0.5], *([[9.0, 9.0]] if seed else [])],
        )
        for network in ("shallow", "deep")
        for kind in ("plain", "SE", "DIA-LSTM")
        for seed in (0, 1)
    ]  # fmt: skip
    figure = shown("no-skip", records)
    grid = [axes for axes in figure.axes if axes.get_subplotspec() is not None and axes.get_label() != "<colorbar>"]
    assert len(grid) == 2 * 5
    for column, name in ((0, "shallow"), (1, "deep")):
        accuracy, gradients, *maps = grid[column::2]
        assert accuracy.get_title() == name
        assert [line.get_label() for line in accuracy.lines] == ["plain", "SE", "DIA-LSTM"]
        assert list(accuracy.lines[1].get_ydata()) == pytest.approx([20, 45])
        first, last = gradients.lines[:2]
        assert (list(first.get_ydata()), first.get_linestyle()) == ([1.5, 4.0], ":")
        assert (list(last.get_ydata()), last.get_linestyle()) == ([2.5, 0.5], "-"), "as far as all runs go"
        for kind, axes in zip(("plain", "SE", "DIA-LSTM"), maps, strict=True):
            assert axes.get_title() == kind
            assert axes.images[0].get_array().tolist() == [[1.5, 2.5], [4.0, 0.5]], "layers down, epochs across"
            assert axes.images[0].get_clim() == (0.5, 4.0)


def test_the_picture_of_depths_bears_runs_that_diverged_at_once():
    lost = {"accuracies": [0.1], "gradient_norms": [[None, None]]}
    records = [noted({"network": "n", "attention": kind}, 0, **lost) for kind in ("plain", "DIA-LSTM")]
    figure = shown("no-norm", records)
    figure.canvas.draw()
    assert experiments.EXPERIMENTS["no-norm"].table({"records": records}).count("| - |") == 2


def test_unevenness_is_the_geometric_mean_of_most_over_least():
    group = [{"gradient_norms": [[2.0, 4.0], [8.0, 1.0]]}, {"gradient_norms": [[None, 1.0], [0.0, 1.0]]}]
    assert tables.unevenness(group) == "4.0"


def test_the_picture_of_correlations_has_a_heat_map_a_stage():
    matrices = [[[1.0, 0.3 * k], [0.3 * k, 1.0]] for k in (1, 2, 3)]
    other = [[[1.0, 0.0], [0.0, 1.0]]] * 3
    records = [
        noted({"attention": kind}, seed, measured=(matrices, other)[seed]) for kind in ("LSTM", "SE") for seed in (0, 1)
    ]
    maps = [axes for axes in shown("correlation", records).axes if axes.images and axes.get_title()]
    for k, axes in enumerate(maps):
        mean = 0.15 * (k % 3 + 1)
        assert axes.images[0].get_array().tolist() == [pytest.approx([1, mean]), pytest.approx([mean, 1])]
    assert len(maps) == 6
    assert maps[4].get_title() == "SE, stage 2"


def test_the_picture_of_parameters_has_what_attention_adds():
    counted = [
        {"table": "networks", "network": name, "plain": 10_000, "se": 12_000 + more, "dia": 13_000}
        for name, more in (("wrn52_4", 0), ("resnet83", 0), ("resnet164", 2_000))
    ]
    networks, depths = shown("params", [{"table": "unit"}, *counted]).axes
    assert [bar.get_height() for bar in networks.patches] == [2, 2, 4, 3, 3, 3]
    assert [list(line.get_xdata()) for line in depths.lines] == 2 * [[83, 164]]
    assert [list(line.get_ydata()) for line in depths.lines] == [[2, 4], [3, 3]]


def test_the_picture_of_speed_has_ratios_within_rounds_and_memory():
    records = [
        {"network": "n", "variant": variant, "seconds": seconds, "peak_bytes": 3_000_000}
        for variant, seconds in (("plain", [1.0, 2.0, 4.0]), ("DIA, ours", [2.0, 3.0, 12.0]))
    ]
    time, memory = shown("speed", records).axes
    assert [bar.get_width() for bar in time.patches] == [1, 2]
    assert [bar.get_width() for bar in memory.patches] == [3, 3]


def test_other_images_are_taken_too_where_they_are_installed(monkeypatch, tmp_path):
    scale = replace(MINIMAL, data="digits", also="fashion")
    common = variants.base(scale, None, None)
    for there, expected in ((tmp_path, ["digits", "fashion"]), (tmp_path / "none", ["digits"])):
        monkeypatch.setattr(images, "FASHION_OF_DEBIAN", there)
        found = [t.settings.data for t in variants.accuracy(scale, common)]
        assert list(dict.fromkeys(found)) == expected
        assert len(found) == 4 * len(expected)


def test_images_that_are_named_are_the_only_ones(fashion, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(scales.SCALES, "tiny", replace(MINIMAL, also="fashion"))
    monkeypatch.setattr(command, "_do", lambda name, scale, arguments: seen.append((name, scale.also)))
    assert reproduce("accuracy", tmp_path, fashion) == 0
    assert reproduce("accuracy", tmp_path, fashion, "--data", "digits") == 0
    assert seen == [("accuracy", "fashion"), ("accuracy", None)]


def test_images_that_are_missing_are_said_at_once(minimal, fashion, tmp_path, capsys):
    assert reproduce("accuracy", tmp_path, fashion, "--data", "cifar10") == 1
    assert "cifar10 is not there" in capsys.readouterr().err
    assert not any(tmp_path.iterdir()), "nothing to resume"


def test_images_are_fetched_first(minimal, fashion, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(images, "load", lambda name, folder, *, download: done.append((name, str(folder), download)))
    monkeypatch.setattr(command, "_do", lambda name, *_: done.append(name))
    assert reproduce("accuracy", tmp_path, fashion, "--data", "cifar10", "--download") == 0
    assert reproduce("accuracy", tmp_path, fashion, "--data", "cifar10") == 0
    assert done == [("cifar10", fashion, True), "accuracy", "accuracy"]


@pytest.mark.slow
def test_the_command_does_it_again_with_a_folder_of_any_name(minimal, fashion, tmp_path):
    folder = tmp_path / "a folder"
    folder.symlink_to(fashion, target_is_directory=True)
    assert reproduce("params", tmp_path, str(folder)) == 0
    words = shlex.split(results(tmp_path, "params")["command"])
    assert words[words.index("--folder") + 1] == str(folder)


def test_all_are_done_in_turn_and_counted(monkeypatch, capsys, tmp_path, fashion):
    monkeypatch.setattr(command, "_do", lambda name, scale, arguments: print(name))
    assert reproduce("all", tmp_path, fashion) == 0
    assert capsys.readouterr().out.split("\n") == [f"[{k}/9] {name}" for k, name in enumerate(command.NAMES, 1)] + [""]
