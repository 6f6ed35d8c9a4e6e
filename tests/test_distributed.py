"""Distributed training: launches, gradients of a shared module, checkpoints between numbers of processes, restarts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributed_processes import BATCH, VARIANTS, batch, gradients, network, run_gradients, run_one
from test_train import write_fashion
from torch import distributed, multiprocessing, nn

from dia_kernels import __main__
from dia_kernels.train import files, run
from dia_kernels.train.launch import Launch, here, speaks
from dia_kernels.train.loader import Order
from dia_kernels.train.rendezvous import agreed_name
from dia_kernels.train.settings import read_run
from dia_kernels.train.sync_norm import HostSyncBatchNorm, sync_norms


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For the runs of this module's fixtures too: in float64 the bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WORKERS = Path(__file__).with_name("distributed_processes.py")

# --- launches --------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun_here(monkeypatch: pytest.MonkeyPatch):
    """The environment of the second process on the second of two machines with two processes each."""
    values = {"LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 2, "WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 1}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_torchrun_says_how_many_processes_there_are(torchrun_here):
    assert here() == Launch(processes=2, nodes=2)
    assert here().world_size == 4
    last = Launch(processes=8, strategy="fsdp2", accumulate=2)
    assert here({"accumulate": 3, "processes": 2}, last) == Launch(2, 2, "fsdp2", 3)
    assert not speaks()


def test_without_torchrun_it_is_as_given_then_as_last_time():
    assert here() == Launch()
    last = Launch(processes=2, nodes=4, strategy="fsdp2", workers=3)
    assert here({"workers": 1}, last) == Launch(processes=2, nodes=1, strategy="fsdp2", workers=1)
    assert speaks()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 3}, "processes: torchrun started 2, got 3; leave it out"),
        ({"nodes": 1}, "nodes: torchrun started 2, got 1; leave it out"),
        ({"strategy": "fsdp"}, "strategy: expected one of ddp, fsdp2, got 'fsdp'"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"recompute": "layer"}, "recompute: expected None or one of block, stage, got 'layer'"),
    ],
)
def test_wrong_launches(torchrun_here, given, message):
    with pytest.raises(ValueError, match=message):
        here(given)


def test_machines_with_unlike_numbers_of_processes(torchrun_here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="processes: expected the same number on every machine, got 3 on 2 machines"):
        here()


def test_more_machines_need_torchrun():
    with pytest.raises(ValueError, match="nodes: only torchrun starts more, without it there is 1, got 2"):
        here({"nodes": 2})


def test_one_error_for_all_processes(torchrun_here, monkeypatch, tmp_path, capsys):
    """Of a contradiction; the first process speaks."""
    for rank, lines in ((3, 0), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        assert __main__.main(["train", "--processes", "3", "--output", str(tmp_path / "run")]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == lines
    assert said == "train: processes: torchrun started 2, got 3; leave it out\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["64-true", "16-mixed"])
def test_precisions_that_cannot_be_sharded(tmp_path, precision):
    with pytest.raises(ValueError, match="precision: expected one of 32-true, bf16-mixed with fsdp2"):
        run.train(run.Settings(precision=precision), tmp_path, Launch(strategy="fsdp2"))


def test_channels_last_cannot_be_sharded(tmp_path):
    """FSDP2 takes no weights that are not contiguous."""
    with pytest.raises(ValueError, match="channels_last: expected False with fsdp2"):
        run.train(run.Settings(channels_last=True), tmp_path, Launch(strategy="fsdp2"))
    assert not (tmp_path / "run.json").exists()


# --- order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [64, 67, 103])
def test_parts_and_processes_share_each_batch_evenly(images):
    whole = list(Order(images, 8, seed=0))
    shares = [list(Order(images, 8, seed=0, rank=rank, processes=2, parts=2)) for rank in range(2)]
    assert all(len(share) == len(Order(images, 8, 0, 0, 2, 2)) for share in shares)
    steps = len(shares[0]) // 2
    for number, keys in enumerate(whole[:steps]):
        parts = [part for share in shares for part in share[2 * number : 2 * number + 2]]
        assert len({len(part) for part in parts}) == 1, "the mean of the parts is not the mean of the batch"
        dealt = [key for part in parts for key in part]
        assert sorted(dealt) == sorted(keys[: len(dealt)])
        assert len(dealt) == len(keys) // 4 * 4


def test_any_division_of_a_batch_has_the_same_images():
    divided = {(1, 4): [], (2, 2): [], (4, 1): []}
    for (processes, parts), batches in divided.items():
        shares = [list(Order(50, 8, 3, rank, processes, parts)) for rank in range(processes)]
        for step in range(len(shares[0]) // parts):
            batches.append(
                {key for share in shares for part in share[step * parts : (step + 1) * parts] for key in part}
            )
    one, *others = divided.values()
    assert all(other == one for other in others)


def test_batches_that_cannot_be_divided():
    with pytest.raises(ValueError, match=r"batch_size: .* multiple of 6 \(the processes x 3 accumulated parts\)"):
        Order(100, 20, 0, processes=2, parts=3)
    with pytest.raises(ValueError, match="images: expected at least 6"):
        Order(5, 6, 0, processes=2, parts=3)


# --- files -----------------------------------------------------------------------------------------------


def test_a_file_is_whole_at_every_moment(tmp_path):
    path = tmp_path / "a" / "last.ckpt"
    files.write(path, lambda file: file.write(b"old"))

    def torn(file) -> None:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(path, torn)
    assert path.read_bytes() == b"old"
    files.write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_link_names_a_whole_folder_at_every_moment(tmp_path):
    path = tmp_path / "last.ckpt"
    files.write(path, lambda file: file.write(b"a file of another launch"))
    for number in range(4):
        before = path.resolve()
        folder = files._free_folder(path)
        assert folder != before
        assert list(folder.iterdir()) == []
        (folder / "number").write_text(str(number))
        assert path.resolve() == before, "named before it is whole"
        files._link(path, folder)
        assert (path / "number").read_text() == str(number)
    files.Files().save_checkpoint({"number": 4}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert files.Files().load_checkpoint(path, weights_only=True) == {"number": 4}


# --- rendezvous ------------------------------------------------------------------------------------------


def agreed_by(store: distributed.Store, processes: int, late: int | None = None) -> set[str]:
    """The names on which so many threads agree; one may come late."""

    def name(rank: int) -> str:
        time.sleep(0.5 if rank == late else 0)
        return agreed_name(store, rank, processes)

    with ThreadPoolExecutor(processes) as threads:
        return set(threads.map(name, range(processes)))


def test_every_start_agrees_on_a_name_of_its_own():
    store = distributed.HashStore()
    names = [agreed_by(store, processes) for processes in (3, 3, 2, 3, 1)]
    assert all(len(agreed) == 1 for agreed in names)
    assert len(set.union(*names)) == 5


@pytest.mark.parametrize("late", [0, 1])
def test_what_dead_processes_wrote_is_not_believed(late):
    """The first finds the one that was there before, or the second the list from before, as the other is late."""
    store = distributed.HashStore()
    before = agreed_by(store, 2)
    after = agreed_by(store, 2, late)
    assert len(after) == 1
    assert after != before


# --- sync norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_a_process_ends_with_its_status_and_under_torchrun_waits_for_no_thread(by_torchrun):
    code = (
        "import threading, time; from dia_kernels.train.launch import leave; print('done', end='');"
        f"threading.Thread(target=time.sleep, args=(600,), daemon={not by_torchrun}).start(); leave(3)"
    )
    environment = os.environ | ({"TORCHELASTIC_RUN_ID": "1"} if by_torchrun else {})
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (3, "done"), ended.stderr


def test_sync_norms_keep_the_state_and_compute_the_same_alone():
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(batch()[0])
    synced = sync_norms(network())
    assert synced.state_dict().keys() == state.keys()
    assert not any(type(module) is nn.BatchNorm2d for module in synced.modules())
    assert any(isinstance(module, HostSyncBatchNorm | nn.SyncBatchNorm) for module in synced.modules())
    assert all(torch.equal(value, state[name]) for name, value in network().state_dict().items())
    # The norm is no longer folded: the same to rounding.
    torch.testing.assert_close(synced(batch()[0]), expected, rtol=1e-12, atol=1e-12)


# --- gradients -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Gradients and buffers of every variant, as each of two processes has them."""
    folder = tmp_path_factory.mktemp("gradients")
    multiprocessing.spawn(run_gradients, (str(folder),), nprocs=2)
    return [torch.load(folder / f"gradients{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.sync])
def test_trial_13_two_processes_have_the_gradient_of_one(name, found):
    """Row 13 of the trials: a module that is used by many blocks, under DDP and FSDP2, checkpointed or not.

    Batch norm sees half of the batch in each: the mean of both halves' gradients, bit for bit.
    """
    images, labels = batch()
    half = BATCH // 2
    first, second = (gradients(network(), images[part], labels[part]) for part in (slice(half), slice(half, None)))
    for rank in range(2):
        mine = found[rank][name][0]
        assert mine.keys() - first.keys() <= {"unused.weight", "unused.bias"}
        for key in first:
            assert torch.equal(mine[key], (first[key] + second[key]) / 2), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.sync])
def test_two_processes_with_one_batch_norm_have_the_gradient_of_one(name, found):
    images, labels = batch()
    model = network()
    expected = gradients(model, images, labels)
    buffers = dict(model.named_buffers())
    # Rounding of sums over all values of a map, of 20 layers one after the other.
    bound = 20 * (BATCH * 12 * 12) ** 0.5 * torch.finfo(torch.float64).eps
    for rank in range(2):
        mine, mine_buffers = found[rank][name]
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            assert (mine[key] - value).abs().max() <= bound * value.abs().max(), key
        if not VARIANTS[name].checkpointed:  # which runs the norms twice
            for key, value in buffers.items():
                torch.testing.assert_close(mine_buffers[key], value, rtol=bound, atol=bound)


# --- runs ------------------------------------------------------------------------------------------------

# Six steps, three an epoch; checkpoints after 2, 4 and 6. Stopped before step 5, in the midst of the second epoch, a
# run goes on from 4.
STEPS, STOP, LEFT = 6, 5, 4


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings in float32; the batch norm of each process sees its own share."""
    folder = write_fashion(tmp_path_factory.mktemp("fashion"), 60, 20)
    return {"data": "fashion", "folder": str(folder), "epochs": 2, "batch_size": 20, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def double(single: dict) -> dict:
    """Settings whose runs differ in rounding alone, however a batch is divided: nothing is normed."""
    return {**single, "precision": "64-true", "norm": False, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def double_whole(double: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_one(str(folder), double)
    return folder


def last(folder: Path) -> dict:
    return files.Files().load_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and momenta of a run's last checkpoint."""
    checkpoint = last(folder)
    optimizer = checkpoint["optimizer_states"][0]
    (parameters,) = (group["params"] for group in optimizer["param_groups"])  # by number or by name
    momenta = (optimizer["state"][parameter]["momentum_buffer"] for parameter in parameters)
    return checkpoint["state_dict"] | {f"momentum {k}": momentum for k, momentum in enumerate(momenta)}


def assert_equal(folder: Path, other: Path, steps: int = STEPS) -> None:
    """Both runs are at their end, with the same bits."""
    a, b = state_of(folder), state_of(other)
    assert last(folder)["global_step"] == last(other)["global_step"] == steps
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_alike(folder: Path, other: Path) -> None:
    """Both runs are at their end, with weights and momenta that differ in rounding alone.

    Of float64, 2e-16, which six steps magnify; another image, or one counted twice, is seen from 1e-3 on.
    """
    a, b = state_of(folder), state_of(other)
    assert last(folder)["global_step"] == last(other)["global_step"] == STEPS
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).double().norm() <= 1e-10 * b[key].double().norm(), key


def test_accumulated_parts_are_the_whole_batch(double, double_whole, tmp_path):
    run_one(str(tmp_path), double, {"accumulate": 4})
    assert_alike(tmp_path, double_whole)
    assert read_run(tmp_path) == (run.Settings(**double), Launch(accumulate=4))


def test_the_last_batch_of_an_epoch_is_not_weighed_less(double, tmp_path):
    """60 images are a batch of 40 and one of 20: its parts are smaller, not fewer."""
    settings = {**double, "batch_size": 40, "epochs": 3}
    run_one(str(tmp_path / "one"), settings)
    run_one(str(tmp_path / "parts"), settings, {"accumulate": 4})
    assert_alike(tmp_path / "parts", tmp_path / "one")


def test_a_run_stopped_between_parts_goes_on_from_the_last_whole_step(single, tmp_path):
    launch = {"accumulate": 2}
    run_one(str(tmp_path / "whole"), single, launch)
    run_one(str(tmp_path / "stopped"), single, launch, stop=[3, 1])
    assert last(tmp_path / "stopped")["global_step"] == 2
    run_one(str(tmp_path / "stopped"), single, launch, stop=[2, 1], resume=True)
    assert last(tmp_path / "stopped")["global_step"] == 2
    run_one(str(tmp_path / "stopped"), single, launch, resume=True)
    assert_equal(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 5)])
def test_the_number_of_parts_may_change(double, double_whole, tmp_path, before, after):
    run_one(str(tmp_path), double, {"accumulate": before}, stop=[STOP])
    assert last(tmp_path)["global_step"] == LEFT
    run_one(str(tmp_path), double, {"accumulate": after}, resume=True)
    assert_alike(tmp_path, double_whole)
    assert read_run(tmp_path)[1] == Launch(accumulate=after)


def test_begin_or_go_on(double, double_whole, tmp_path, capsys):
    folder = tmp_path / "run"
    run_one(str(folder), double, stop=[STOP], resume=None)
    with pytest.raises(run.RunError, match=r"the run there has other settings \(seed\)"):
        run_one(str(folder), {**double, "seed": 1}, resume=None)
    run_one(str(folder), double, resume=None)
    assert_equal(folder, double_whole)


# --- two processes under torchrun ------------------------------------------------------------------------


def torchrun(*arguments: str, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--max-restarts", str(restarts),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(WORKERS), *arguments], capture_output=True, text=True, env=environment)


def do_runs(base: Path, runs: list[dict], processes: int = 2) -> None:
    """Runs in folders of ``base``, by so many processes, one after the other."""
    (base / "runs.json").write_text(json.dumps([entry | {"folder": str(base / entry["folder"])} for entry in runs]))
    done = torchrun("runs", str(base / "runs.json"), processes=processes)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def session(single: dict, double: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that two processes did, one after the other."""
    base = tmp_path_factory.mktemp("session")
    for settings, names in ((single, ("from one by ddp", "from one by fsdp2")), (double, ("double from one",))):
        run_one(str(base / names[0]), settings, stop=[STOP])
        for name in names[1:]:
            shutil.copytree(base / names[0], base / name, symlinks=True)
    sharded, parts = {"processes": 2, "strategy": "fsdp2"}, {"processes": 2, "accumulate": 2}
    runs = [
        {"folder": "ddp", "settings": single},
        {"folder": "fsdp2", "settings": single, "launch": sharded},
        {"folder": "ddp to one", "settings": single, "stop": [STOP]},
        {"folder": "fsdp2 to one", "settings": single, "launch": sharded, "stop": [STOP]},
        {"folder": "fsdp2 to ddp", "settings": single, "launch": sharded, "stop": [STOP]},
        {"folder": "fsdp2 to ddp", "settings": single, "resume": True},
        {"folder": "torn", "settings": single, "launch": sharded, "torn": 2},
        {"folder": "torn", "settings": single, "launch": sharded, "resume": True},
        {"folder": "from one by ddp", "settings": single, "resume": True},
        {"folder": "from one by fsdp2", "settings": single, "launch": sharded, "resume": True},
        {"folder": "double from one", "settings": double, "resume": True},
        {"folder": "double to one", "settings": double, "stop": [STOP]},
        {"folder": "double in parts", "settings": double, "launch": parts},
        {"folder": "ddp again", "settings": single, "launch": {"processes": 2, "recompute": "block"}},
        {"folder": "fsdp2 again", "settings": single, "launch": {**sharded, "recompute": "stage"}},
        {"folder": "sync", "settings": {**single, "sync_norm": True, "precision": "64-true"}},
    ]  # fmt: skip
    do_runs(base, runs)
    return base


@pytest.mark.slow
def test_sharded_weights_learn_as_whole_ones(session):
    assert_equal(session / "fsdp2", session / "ddp")


@pytest.mark.slow
def test_what_is_computed_again_learns_the_same_bits(session):
    assert_equal(session / "ddp again", session / "ddp")
    assert_equal(session / "fsdp2 again", session / "ddp")


@pytest.mark.slow
def test_saved_on_two_loaded_on_one(session, single, double, double_whole):
    for name in ("ddp to one", "fsdp2 to one"):
        assert last(session / name)["global_step"] == LEFT
        run_one(str(session / name), single, {"processes": 1}, resume=True)
    assert_equal(session / "fsdp2 to one", session / "ddp to one")
    run_one(str(session / "double to one"), double, {"processes": 1}, resume=True)
    assert_alike(session / "double to one", double_whole)


@pytest.mark.slow
def test_saved_on_one_loaded_on_two(session, double_whole):
    assert_equal(session / "from one by fsdp2", session / "from one by ddp")
    assert_alike(session / "double from one", double_whole)


@pytest.mark.slow
def test_a_run_may_change_its_strategy(session):
    assert_equal(session / "fsdp2 to ddp", session / "ddp")


@pytest.mark.slow
def test_a_torn_folder_is_not_taken_for_a_checkpoint(session):
    assert_equal(session / "torn", session / "fsdp2")


@pytest.mark.slow
def test_two_processes_accumulate_to_the_whole_batch(session, double_whole):
    assert_alike(session / "double in parts", double_whole)


@pytest.mark.slow
def test_one_batch_norm_for_two_processes_learns_as_one(session, single, tmp_path):
    run_one(str(tmp_path), {**single, "precision": "64-true"})
    assert_alike(session / "sync", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_worker_is_restarted_and_goes_on_to_the_same_bits(session, single, strategy, tmp_path):
    """The second process is lost in mid-epoch, one step after a checkpoint; torchrun starts both anew."""
    data = ["--data", "fashion", "--folder", single["folder"], "--batch-size", "20"]
    where = ["--strategy", strategy, "--output", str(tmp_path / "run"), "--continue", "--no-progress"]
    options = [*data, "--epochs", "2", "--checkpoint-every", "2", *where]
    killed = tmp_path / "killed"
    done = torchrun("killed", str(STOP), str(killed), "train", *options, restarts=2)
    assert done.returncode == 0, done.stderr[-5000:]
    assert killed.exists()
    assert done.stdout.count(f"{STEPS} steps done") == 1, "one process speaks for all"
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["version_0", "version_1"]
    assert read_run(tmp_path / "run") == (run.Settings(**single), Launch(processes=2, strategy=strategy))
    assert_equal(tmp_path / "run", session / strategy)


@pytest.mark.slow
def test_three_processes_go_on_to_the_same_bits(single, tmp_path):
    """A sum of three depends on its order, which DDP would change when it arranges its buckets anew."""
    settings = {**single, "batch_size": 30}
    runs = []
    for strategy in ("ddp", "fsdp2"):
        how = {"settings": settings, "launch": {"processes": 3, "strategy": strategy}}
        stopped = {"folder": f"{strategy} stopped", **how}
        runs += [{"folder": strategy, **how}, {**stopped, "stop": [3]}, {**stopped, "resume": True}]
    do_runs(tmp_path, runs, processes=3)
    for strategy in ("ddp", "fsdp2"):
        assert_equal(tmp_path / f"{strategy} stopped", tmp_path / strategy, steps=4)
