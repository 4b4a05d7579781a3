"""Runs through the command line: resuming, signals, torchrun, sampling, user errors, weights/."""
import ast
import functools
import importlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from conftest import ROOT, equal, run, shared

FLAGS = {"dfgan": "--size 32 --nf 2",
         "gan_cls": "--ngf 4 --ndf 2 --captions-per-image 2 --lr-decay-epochs 1",
         "stackgan": "--ngf 4 --ndf 2 --size 128 --num-residual 1 --lr-decay-epochs 1"}
SCRIPTS = pytest.mark.parametrize("script", FLAGS)
A, B = "a red picture", "it is blue"

# Runs a script after lines of a test, which replace something
DRIVER = """
import io, os, runpy, sys
import torch, torch.distributed as dist
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import common, data
{}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SIGNAL = """
def batches(self, step, call=data.Batches.__call__):
    if step == 2 and os.environ.get("RANK", "1") == "1":    # the first of two steps of epoch 2
        os.kill(os.getpid(), {})
    return call(self, step)
data.Batches.__call__ = batches
"""
KILL = """
def save(state, file, call=torch.save):
    buffer = io.BytesIO()
    call(state, buffer)
    file.write(buffer.getvalue()[:5000])
    file.flush()
    os.kill(os.getpid(), 9)
torch.save = save
"""
COMPARE_RANKS = """
def save(path, state, call=common.save_checkpoint):
    if "opt_g" in state:
        x = torch.cat([p.flatten() for net in "GD" for p in state[net].parameters()])
        both = [torch.empty_like(x), torch.empty_like(x)]
        dist.all_gather(both, x)
        assert torch.equal(*both)
    call(path, state)
common.save_checkpoint = save
"""


@pytest.fixture(autouse=True)
def in_home(home, empty_folder, monkeypatch):
    """Run the tests in `home`, on one thread: sums depend on the number of threads."""
    monkeypatch.chdir(home)
    threads, handlers = torch.get_num_threads(), [signal.getsignal(n) for n in (2, 15)]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip((2, 15), handlers):
        signal.signal(number, handler)


def flags(script, name, more=""):
    line = f"--data own --device cpu --batch-size 8 --epochs 2 --out-dir runs/{name}"
    return f"{line} {FLAGS[script]} {more}".split()


def call(script, arguments):
    """Run a script in this process; return its exit status."""
    try:
        return common.run(lambda: importlib.import_module(script).main(arguments)) or 0
    except SystemExit as end:    # argparse
        return end.code


def load(script, name):
    return common.load_checkpoint(f"runs/{name}/last.pt", script)


@functools.cache
def straight(script):
    """Return the checkpoint of a run of 2 epochs of 2 steps without interruption."""
    assert call(script, flags(script, f"straight-{script}")) == 0
    return load(script, f"straight-{script}")


def resume(script, name):
    """Run the command again; its run must end like the one without interruption."""
    expected = straight(script)
    assert call(script, flags(script, name)) == 0
    assert equal(load(script, name), expected)
    assert len({open(f"runs/{run}/log.csv").read() for run in (name, f"straight-{script}")}) == 1


# ---- Resuming

@pytest.mark.parametrize("script, legs", [
    ("dfgan", ["--epochs 1"]), ("gan_cls", ["--epochs 1"]),
    ("stackgan", ["--stage 1 --epochs 1", "--stage 1", "--stage 2 --epochs 1"])])
def test_resumed_run_is_bit_identical(script, legs):
    for leg in legs:
        assert call(script, flags(script, f"legs-{script}", leg)) == 0
    assert load(script, f"legs-{script}")["step"] == 2
    assert not equal(load(script, f"legs-{script}")["G"], straight(script)["G"])
    resume(script, f"legs-{script}")


@pytest.mark.parametrize("script, number", [("gan_cls", 2), ("stackgan", 15)])
def test_signal_saves_in_the_middle_of_an_epoch(script, number):
    name = f"signal-{script}"
    done = run("-c", DRIVER.format(SIGNAL.format(number)), ROOT / f"{script}.py",
               *flags(script, name), cwd=".")
    assert done.returncode == 128 + number and "same command" in done.stderr, done.stderr
    state = load(script, name)
    assert state["step"] == 3 and len(state["history"]) == 1 and state["sums"].any()
    resume(script, name)


def test_kill_while_writing_keeps_the_last_checkpoint():
    command = ("-c", DRIVER.format(KILL), ROOT / "dfgan.py", *flags("dfgan", "killed"))
    assert run(*command, cwd=".").returncode == -9
    with pytest.raises(FileNotFoundError):
        open("runs/killed/last.pt")
    assert call("dfgan", flags("dfgan", "killed", "--epochs 1")) == 0
    assert run(*command, cwd=".").returncode == -9
    assert load("dfgan", "killed")["step"] == 2
    resume("dfgan", "killed")


@pytest.mark.slow
@SCRIPTS
def test_kill_at_any_moment(script, home):
    rng, path = random.Random(0), home / f"runs/random-{script}" / "last.pt"
    command = [sys.executable, ROOT / f"{script}.py", *flags(script, f"random-{script}")]
    start = time.time()
    assert run(*command[1:-1], command[-1], cwd=".").returncode == 0
    duration = time.time() - start
    for _ in range(15):
        shutil.rmtree(path.parent)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            time.sleep(rng.uniform(0.3, 1) * duration)
            job.kill()
        assert not path.exists() or load(script, f"random-{script}")["step"] > 0
        resume(script, f"random-{script}")


# ---- Several processes

def torchrun(patch, script, name, more=""):
    with open(f"driver-{name}.py", "w") as file:
        file.write(DRIVER.format(patch))
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               f"driver-{name}.py", ROOT / f"{script}.py", *flags(script, name, more), cwd=".")


def test_two_processes_equal_one_with_the_joint_batch():
    """A signal that one of them gets stops both after the same step."""
    done = torchrun(SIGNAL.format(15), "dfgan", "two-dfgan")
    assert done.returncode and done.stdout.count("22 images") == 1, done.stderr
    assert load("dfgan", "two-dfgan")["step"] == 3
    done = torchrun(COMPARE_RANKS, "dfgan", "two-dfgan")
    assert done.returncode == 0, done.stderr
    two, one = load("dfgan", "two-dfgan"), straight("dfgan")
    for net in ("G", "D", "ema"):
        torch.testing.assert_close(two[net], one[net], rtol=1e-4, atol=1e-5)
    for a, b in zip(two["history"], one["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("script, epochs", [
    ("gan_cls", [(1, 1), (1, 2)]), ("stackgan", [(1, 1), (2, 1), (2, 2)])])
def test_other_scripts_on_two_processes(script, epochs):
    for more in ("--epochs 1", ""):
        done = torchrun(COMPARE_RANKS, script, f"two-{script}", more)
        assert done.returncode == 0, done.stderr
    history = load(script, f"two-{script}")["history"]
    assert [(row.get("stage", 1), row["epoch"]) for row in history] == epochs
