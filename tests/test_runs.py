"""Training through the command line: resuming, signals, torchrun, moved and changed datasets."""
import csv
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import data
from commands import (SmallInception, TINY, call, flags, load, read_grid, step_losses,
                      whole_run)
from conftest import ROOT, equal, run

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


@pytest.fixture(autouse=True)
def in_home(home, empty_folder, monkeypatch):
    """Run in `home`, on one thread, because sums depend on it. Ctrl-C still ends the tests."""
    monkeypatch.chdir(home)
    torch.set_num_threads(1)
    monkeypatch.setattr("signal.signal", lambda *_: None)


# ---- Commands in a process of their own, with something that happens to them

DRIVER = """
import os, runpy, signal, sys, torch
import torch.distributed as dist
sys.path.insert(0, os.path.dirname(sys.argv[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
import common, data
{happening}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIGNAL_IN_STEP_2 = """
draw_batch = data.Batches.__call__

def draw_batch_and_send_signal(batches, step):
    if step == 2 and os.environ.get("RANK", "1") == "1":  # under torchrun, to one of the two ranks
        os.kill(os.getpid(), {signal})
    return draw_batch(batches, step)

data.Batches.__call__ = draw_batch_and_send_signal
"""
SIGNAL_BETWEEN_STAGES = """
load_dataset = data.load_dataset

def load_dataset_and_send_signal(name, split, size, root):
    if split == "train" and size == 128:  # Stage-II begins
        os.kill(os.getpid(), signal.SIGINT)
    return load_dataset(name, split, size, root)

data.load_dataset = load_dataset_and_send_signal
"""
KILL_WHILE_WRITING = """
def write_half_and_die(state, path):
    path.write_bytes(b"half a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = write_half_and_die
"""
COMPARE_RANKS = """
save_checkpoint = common.save_checkpoint

def compare_ranks_and_save(path, state):
    if "opt_g" in state:
        parameters = [p.detach() for net in "GD" for p in state[net].parameters()]
        ranks = [None, None]
        dist.all_gather_object(ranks, parameters)
        assert all(map(torch.equal, *ranks)), "the ranks have different weights"
    save_checkpoint(path, state)

common.save_checkpoint = compare_ranks_and_save
"""


def drive(happening, script, name, launcher=()):
    """Run a script in a process of its own, after the Python lines of what happens to it."""
    Path("driver.py").write_text(DRIVER.format(happening=happening))
    return run(*launcher, "driver.py", ROOT / f"{script}.py", *flags(script, name), cwd=".")


# ---- Resuming


class StopAfter(common.GracefulStop):
    """Ask training to stop after some steps, as after a signal."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def requested(self):
        self.steps -= 1
        if self.steps == 0:
            self.signal = signal.SIGTERM
        return super().requested()


def resume_to_the_end(script, name):
    """Run the command again. The run must end with the bits of the one without interruption."""
    assert call(script, flags(script, name)) == 0
    state = load(script, name)
    history = state.pop("history")
    whole = dict(whole_run(script))
    whole_history = whole.pop("history")
    assert equal(state, whole)
    return history, whole_history


@pytest.mark.parametrize("script, parts", [
    ("dfgan", ["--epochs 1"]),
    ("gan_cls", ["--epochs 1"]),
    ("stackgan", ["--stage 1 --epochs 1", "--stage 1", "--epochs 1"])])
def test_resumed_run_is_bit_identical(script, parts):
    name = f"parts-{script}"
    for part in parts:
        assert call(script, flags(script, name, part)) == 0
        assert load(script, name)["step"] == (4 if part == "--stage 1" else 2)
    history, whole_history = resume_to_the_end(script, name)
    assert history == whole_history


@pytest.mark.parametrize("script", TINY)
def test_run_resumed_in_the_middle_of_an_epoch_is_bit_identical(script, monkeypatch):
    """The logged losses of an interrupted epoch are those of its second part."""
    name = f"middle-{script}"
    stages = 2 if script == "stackgan" else 1
    with monkeypatch.context() as patch:
        patch.setattr(common, "GracefulStop", lambda: StopAfter(3))
        for stage in range(1, stages + 1):
            assert call(script, flags(script, name)) == 128 + signal.SIGTERM
            assert load(script, name)["step"] == 3
            assert load(script, name).get("stage", 1) == stage
    history, whole_history = resume_to_the_end(script, name)
    for stage in range(stages):
        first, second = history[2 * stage:2 * stage + 2]
        assert first == whole_history[2 * stage]
        last_step = step_losses(script)[4 * stage + 3]
        assert second == {**whole_history[2 * stage + 1], **last_step}


def test_log_and_grid_of_each_epoch():
    """Each row of a grid has its caption in the text file beside the grid."""
    steps = step_losses("gan_cls")
    with open("runs/whole-gan_cls/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for epoch, row in enumerate(rows):
        for loss in ("loss_d", "d_real", "d_wrong", "d_fake", "loss_g"):
            mean = (steps[2 * epoch][loss] + steps[2 * epoch + 1][loss]) / 2
            assert float(row[loss]) == pytest.approx(mean, rel=1e-6)

    grid = Path("runs/whole-gan_cls/epoch_0001.png")
    captions = grid.with_suffix(".txt").read_text().splitlines()
    assert len(read_grid(grid, 8)) == len(captions) > 1
    assert set(captions) <= set(data.load_dataset("own", "test").captions)


@pytest.mark.parametrize("script, length", [("dfgan", 3), ("gan_cls", 1), ("stackgan", 1)])
def test_embeddings_have_the_rms_length_of_the_script(script, length):
    encoder = common.text_encoder_from_state_dict(whole_run(script)["text_encoder"])
    embeddings = encoder.encode(data.load_dataset("own", "train").captions)
    squared_lengths = embeddings.double().square().sum(1)
    assert squared_lengths.mean().sqrt().item() == pytest.approx(length)


@pytest.mark.parametrize("script", TINY)
def test_batch_larger_than_the_dataset_is_noticed_before_the_text_encoder(
        script, monkeypatch, capsys):
    monkeypatch.setattr(common, "get_text_encoder", None)  # is not called
    assert call(script, flags(script, f"none-{script}", "--batch-size 23")) == 2
    assert "--batch-size 23 is larger than the dataset of 22" in capsys.readouterr().err


def test_a_missing_inception_network_is_noticed_before_training(monkeypatch, capsys):
    def no_network():
        raise data.UserError("cannot download the Inception network")

    monkeypatch.setattr(common, "load_inception_weights", no_network)
    monkeypatch.setattr(common, "TrainingProgress", None)  # is not called
    assert call("dfgan", flags("dfgan", "none", "--eval-every 1")) == 2
    assert "cannot download the Inception network" in capsys.readouterr().err


def test_finished_run_says_so(capsys):
    whole_run("dfgan")
    assert call("dfgan", flags("dfgan", "whole-dfgan")) == 0
    output = capsys.readouterr().out
    assert "already trained for 2 epochs; a larger --epochs trains on" in output
    state = whole_run("dfgan")
    sizes = [sum(x.numel() for x in state[net].values()) for net in ("G", "D")]
    assert f"parameters: G {sizes[0]:,}, D {sizes[1]:,}" in output  # no batch norm, no buffers


def test_stage_1_of_a_run_in_stage_2_says_that_nothing_is_left(capsys):
    before = whole_run("stackgan")
    assert call("stackgan", flags("stackgan", "whole-stackgan", "--stage 1")) == 0
    assert "is in Stage-II already: Stage-I is complete" in capsys.readouterr().out
    assert equal(load("stackgan", "whole-stackgan"), before)


# ---- Signals and crashes


def test_ctrl_c_saves_in_the_middle_of_an_epoch():
    whole_run("gan_cls")
    done = drive(SIGNAL_IN_STEP_2.format(signal=int(signal.SIGINT)), "gan_cls", "ctrl-c")
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "saving; run the same command to resume" in done.stderr
    state = load("gan_cls", "ctrl-c")
    assert state["step"] == 3
    assert [row["epoch"] for row in state["history"]] == [1]
    resume_to_the_end("gan_cls", "ctrl-c")


def test_signal_between_the_stages_ends_the_program_at_once():
    done = drive(SIGNAL_BETWEEN_STAGES, "stackgan", "between")
    assert done.returncode == 130
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert load("stackgan", "between")["stage"] == 1
    history, whole_history = resume_to_the_end("stackgan", "between")
    assert history == whole_history


def test_kill_while_writing_keeps_the_last_checkpoint():
    whole_run("dfgan")
    assert call("dfgan", flags("dfgan", "kill", "--epochs 1")) == 0
    assert drive(KILL_WHILE_WRITING, "dfgan", "kill").returncode == -signal.SIGKILL
    assert load("dfgan", "kill")["step"] == 2
    resume_to_the_end("dfgan", "kill")


def test_full_disk_keeps_the_last_checkpoint(monkeypatch, capsys):
    whole_run("dfgan")
    folder = Path("runs/full-disk")

    def write_half(state, path):
        path.write_bytes(b"half a checkpoint")
        raise RuntimeError("unexpected pos 10950528 vs 10950416")  # of PyTorch on a full disk

    def train_on_a_full_disk():
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", write_half)
            assert call("dfgan", flags("dfgan", folder.name)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: cannot write {folder}/last.pt, an older file is kept")

    train_on_a_full_disk()
    assert not list(folder.glob("last.pt*"))
    assert call("dfgan", flags("dfgan", folder.name, "--epochs 1")) == 0
    train_on_a_full_disk()
    assert load("dfgan", folder.name)["step"] == 2
    assert len(list(folder.glob("last.pt*"))) == 1


# ---- torchrun


def test_two_processes_equal_one_with_the_joint_batch():
    """The losses of an epoch are means over the ranks, also after a resume in its middle."""
    whole = whole_run("dfgan")
    interrupt = SIGNAL_IN_STEP_2.format(signal=int(signal.SIGTERM))
    done = drive(interrupt, "dfgan", "two-dfgan", TORCHRUN)
    assert done.returncode != 0
    assert "saving; run the same command to resume" in done.stderr
    assert load("dfgan", "two-dfgan")["step"] == 3, done.stderr

    done = drive(COMPARE_RANKS, "dfgan", "two-dfgan", TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("22 images") == 1
    state = load("dfgan", "two-dfgan")
    for net in ("G", "D", "ema"):
        torch.testing.assert_close(state[net], whole[net], rtol=1e-4, atol=1e-5)
    second_epoch = {"epoch": 2, **step_losses("dfgan")[3]}
    for row, expected in zip(state["history"], [whole["history"][0], second_epoch], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("script, first_part, epochs", [
    ("gan_cls", "--epochs 1", [1, 2]),
    ("stackgan", "--stage 1", [1, 2, 1, 2])])
def test_two_processes_go_on_with_a_run_of_one(script, first_part, epochs):
    name = f"two-{script}"
    assert call(script, flags(script, name, first_part)) == 0
    done = drive(COMPARE_RANKS, script, name, TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in load(script, name)["history"]] == epochs


# ---- Moved and changed datasets


def train_one_epoch_elsewhere(folder):
    """Copy the images to a folder. Return the flags of a run there, which has one epoch."""
    shutil.copytree("own", folder / "own")
    arguments = flags("dfgan", "", f"--data {folder}/own --out-dir {folder}/run")
    assert call("dfgan", [*arguments, "--epochs", 1]) == 0
    return arguments


def test_moved_run_draws_resumes_and_evaluates(tmp_path, monkeypatch, capsys):
    whole = whole_run("dfgan")
    train_one_epoch_elsewhere(tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "second")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(common, "FIDInception", SmallInception)
    run_flags = ["--out-dir", tmp_path / "second" / "run"]
    data_flags = ["--data", tmp_path / "second" / "own"]

    assert call("dfgan", [*run_flags, "--sample", "a red picture"]) == 0
    assert read_grid(capsys.readouterr().out.split()[-1], 8).shape[:2] == (1, 8)
    assert call("dfgan", [*run_flags, *data_flags, "--evaluate", "--fid-samples", 9]) == 0
    assert "FID" in capsys.readouterr().out
    assert call("dfgan", [*run_flags, *data_flags, "--epochs", 2]) == 0
    state = common.load_checkpoint(tmp_path / "second" / "run" / "last.pt", "dfgan")
    for part in ("G", "D", "ema", "opt_g", "opt_d", "history", "text_encoder"):
        assert equal(state[part], whole[part])


def test_run_whose_folder_is_gone_asks_for_it(tmp_path, capsys):
    train_one_epoch_elsewhere(tmp_path)
    (tmp_path / "own").rename(tmp_path / "other")
    assert call("dfgan", ["--out-dir", tmp_path / "run", "--epochs", 2]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"there is no folder {tmp_path}/own" in error and "--data" in error


def add_images(folder):
    """Add 48 images with the captions of the others."""
    for path in folder.rglob("*.png"):
        for copy in ("second", "third"):
            shutil.copy(path, path.with_stem(f"{path.stem}-{copy}"))
            shutil.copy(path.with_suffix(".txt"), path.with_name(f"{path.stem}-{copy}.txt"))


def remove_images(folder):
    """Remove a third of the images."""
    shutil.rmtree(folder / "red")


@pytest.mark.parametrize("change", [add_images, remove_images])
def test_run_on_a_changed_folder_counts_epochs_on(change, tmp_path, capsys):
    arguments = train_one_epoch_elsewhere(tmp_path)
    change(tmp_path / "own")
    capsys.readouterr()
    assert call("dfgan", arguments) == 0
    num_images = len(data.load_dataset(str(tmp_path / "own"), "train"))
    assert num_images != 22
    output = capsys.readouterr().out
    assert output.count(f"the dataset has changed: {num_images} training images now") == 1
    state = common.load_checkpoint(tmp_path / "run" / "last.pt", "dfgan")
    assert [row["epoch"] for row in state["history"]] == [1, 2]
    assert state["step"] == 2 * (num_images // 8)


def test_another_folder_of_the_same_name_is_refused(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    for number in range(8):
        Image.new("RGB", (64, 64)).save(tmp_path / "own" / f"{number}.png")
        caption = "it is a picture" + " red" * number
        (tmp_path / "own" / f"{number}.txt").write_text(caption)
    whole_run("dfgan")
    arguments = flags("dfgan", "whole-dfgan", f"--epochs 3 --data {tmp_path}/own")
    assert call("dfgan", arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "own has other captions than the folder of that name" in error
