"""Several processes under torchrun, on the CPU with gloo: the same run as one process with the joint batch, stops, losses."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
from conftest import ROOT, call, run, same

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--")      # --: it has flags of its own, --run-path among them
FLAGS = {"dfgan": ("--nf", 2, "--size", 32), "gan_cls": ("--ngf", 4, "--ndf", 4), "stackgan": ("--ngf", 4, "--ndf", 2, "--size", 128)}


def flags(script, name, batch, epochs):
    return (ROOT / f"{script}.py", "--data", "own", "--device", "cpu", "--image-features", "small", *FLAGS[script],
            "--run", name, "--batch-size", batch, "--epochs", epochs)


def two(home, *command):
    return run(*TORCHRUN, *command, cwd=home, OMP_NUM_THREADS="1")


def close(a, b):
    """Tensors of two state dicts within float tolerance: Adam's steps are 1e-4, so that a missing or doubled one shows."""
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_equal_one_with_the_joint_batch(home):
    """DF-GAN has no batch norm: the same networks, also where two processes continue what one began."""
    done = two(home, *flags("dfgan", "two", 8, 2))
    assert done.returncode == 0 and "batch 8" in done.stdout and done.stdout.count("2 epochs done") == 1, done.stderr
    assert call(*flags("dfgan", "one", 8, 2), cwd=home).returncode == 0
    a, b = (common.load(home / name / "last.pt", "dfgan") for name in ("two", "one"))
    assert a["step"] == b["step"] == 4 and same(a["random"]["cpu"], b["random"]["cpu"])
    close(a["G"], b["G"]), close(a["D"], b["D"])
    torch.testing.assert_close(*(torch.tensor([[v for v in r.values() if v != ""] for r in state["rows"]]) for state in (a, b)),
                               rtol=1e-3, atol=2e-4)                # the losses in the log are those of the joint batch
    assert call(*flags("dfgan", "parts", 8, 1), cwd=home).returncode == 0
    assert two(home, *flags("dfgan", "parts", 8, 2)).returncode == 0
    c = common.load(home / "parts" / "last.pt", "dfgan")
    close(c["G"], b["G"]), close(c["D"], b["D"])
    assert c["step"] == 4 and [r["step"] for r in c["rows"]] == [2, 4]
    done = two(home, *flags("dfgan", "odd", 7, 1))
    assert done.returncode != 0 and "error: --batch-size 7 cannot be split among 2 processes" in done.stderr


def test_two_processes_share_an_evaluation(home, inception_file):
    """Each image has the noise and the wrong captions that it has with one process: the same numbers, written once."""
    assert call(*flags("dfgan", "judged", 8, 1), cwd=home).returncode == 0
    evaluate = (*flags("dfgan", "judged", 8, 1)[:-4], "--evaluate", "--eval-images", 30)
    done = two(home, *evaluate)
    assert done.returncode == 0 and done.stdout.count("R-precision") == 1, done.stderr
    assert call(*evaluate, cwd=home).returncode == 0
    two_, one = json.loads((home / "judged" / "evaluation.json").read_text())
    assert two_.keys() == one.keys()
    for name, value in one.items():
        assert two_[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, (float, list)) else value), name


STEPS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import common, {script} as script
common.join("cpu")
number, count = common.processes()

def parts():
    torch.manual_seed(0)
    return {make}

def step(G, D, opt_g, opt_d, i):
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(2, 4, *shape)[i]
    {step}

mine = parts()
common.share(mine[:2], mine[2:], 8)
step(*mine, number)
gathered = [None, None]
dist.all_gather_object(gathered, [p.detach() for net in mine[:2] for p in net.parameters()])
if number == 0:
    assert all(map(torch.equal, *gathered))                        # both processes hold the same networks
    # one process: the mean of both shares' gradients, each normalised by its own batch
    shares = []
    for i in (0, 1):
        nets = parts()[:2]
        step(*nets, *(torch.optim.SGD(net.parameters(), 0.0) for net in nets), i)
        shares.append([p.grad for p in nets[1].parameters()])
    # D's are compared: those of G see a D that has moved already
    for now, before, a, b in zip(mine[1].parameters(), parts()[1].parameters(), *shares):
        g = (a + b) / 2
        sure = g.abs() > 1e-5
        assert torch.allclose((before - now)[sure], 2e-4 * g.sign()[sure], atol=1e-6)      # Adam's first step
    print("equal")
dist.barrier()
dist.destroy_process_group()
"""
CASES = {
    "gan_cls": ("script.make(4, 4)", """t = draw(1024)
    fake = G(draw(100), t)
    script.d_step(D, opt_d, draw(3, 64, 64), draw(3, 64, 64), fake, t)
    script.g_step(D, opt_g, fake, t)"""),
    "stackgan": ("script.make(1, 4, 2, 128)", """t = draw(1024)
    fake, mu, log_sigma = G(draw(100), draw(128), t)
    script.d_step(D, opt_d, draw(3, 64, 64), draw(3, 64, 64), fake, t)
    script.g_step(D, opt_g, fake, t, script.kl_loss(mu, log_sigma))"""),
}


@pytest.mark.parametrize("script", ["gan_cls", "stackgan"])
def test_gradients_are_the_mean_of_the_shares(tmp_path, script):
    """Where batch norm sees its share alone (on a CPU) two processes are not one; their gradients are the mean of the shares'."""
    make, step = CASES[script]
    (tmp_path / "steps.py").write_text(STEPS.format(script=script, make=make, step=step))
    done = run(*TORCHRUN, "steps.py", ROOT, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


@pytest.mark.parametrize("script", ["gan_cls", "stackgan"])
def test_the_other_scripts_run_and_continue(home, script):
    for epochs in (1, 2):
        done = two(home, *flags(script, f"two-{script}", 8, epochs))
        assert done.returncode == 0 and f"{epochs} epochs done" in done.stdout, done.stderr
    lines = (home / f"two-{script}" / "log.csv").read_text().splitlines()
    assert len(lines) == 1 + {"gan_cls": 2, "stackgan": 2 + 1}[script]      # one process writes; stackgan: Stage I, II, then II again


def begin(home, name):
    process = subprocess.Popen([sys.executable, *map(str, TORCHRUN), *map(str, flags("dfgan", name, 8, 3000))], cwd=home,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (home / name / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    return process


def test_ctrl_c_stops_all_after_the_same_step(home):
    process = begin(home, "two-stop")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "the same command continues" in errors
    more = common.load(home / "two-stop" / "last.pt", "dfgan")["step"] // 2 + 1
    assert two(home, *flags("dfgan", "two-stop", 8, more)).returncode == 0
    assert call(*flags("dfgan", "one-straight", 8, more), cwd=home).returncode == 0
    a, b = (common.load(home / name / "last.pt", "dfgan") for name in ("two-stop", "one-straight"))
    assert a["step"] == b["step"] == 2 * more and same(a["random"]["cpu"], b["random"]["cpu"])


def test_a_dead_worker_ends_the_run_with_a_message(home):
    process = begin(home, "two-dead")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    subprocess.run(["kill", "-9", workers[1]])
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in errors
    assert call(*flags("dfgan", "two-dead", 8, 1), cwd=home).returncode == 0      # the last save is whole
