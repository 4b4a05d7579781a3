"""Fixtures and helpers of the tests. `pytest -q` takes minutes and needs no GPU and no network.

Where a new test goes:

    test_data.py           datasets, archives, folders of photos, decoding, the cache, batches
    test_common.py         text encoders, evaluation, checkpoints, flags and their errors
    test_gan_cls.py        the networks, losses and steps of gan_cls.py, by themselves
    test_stackgan.py       the same of stackgan.py
    test_dfgan.py          the same of dfgan.py
    test_runs.py           whole commands: training, stopping, resuming, torchrun
    test_sampling.py       whole commands: sampling, interpolating, evaluating
    test_scripts_alone.py  each script copied alone into a folder
    test_fake_gpu.py       training on CUDA, with a fake GPU
    test_cuda_graph.py     CUDA graphs, with stand-ins for torch.cuda
    test_gpu_script.py     gpu.py, without a GPU

commands.py holds the command lines of test_runs.py and test_sampling.py, golden/ the figures of the
authors' networks. pytest does not collect gpu.py (checks on a GPU) and benchmark.py (speed).

A test asserts against an independent truth: a closed form, a loop in float64, a figure in golden/
or a case made by hand. Every test runs in an empty folder of its own. Tests that take minutes are
marked slow. Data and weights that the repository does not contain come through `shared`.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"  # figures of the authors' networks; see its README
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny networks: more threads only wait for each other

HOW_TO_GET = {  # for the reason of a skip
    "data/flowers": "Oxford-102, as `python gan_cls.py --data flowers` puts it into datasets/",
    "data/cub": "CUB-200-2011, as `python gan_cls.py --data cub` puts it into datasets/",
    "weights/hub": "the Inception network of the FID: save common.INCEPTION in hub/checkpoints",
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes on a CPU; run with -m slow")


def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless they are asked for by -m slow."""
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def shared(*parts):
    """Return a path below ../shared, beside the clone. Skip the test if it does not exist."""
    name = "/".join(parts)
    path = ROOT.parent / "shared" / name
    if not path.exists():
        hints = [hint for start, hint in HOW_TO_GET.items() if name.startswith(start)]
        pytest.skip(f"needs {path}" + "".join(f" ({hint})" for hint in hints))
    return path


def load_module(path):
    """Import a Python file that is not on the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command, cwd, timeout=300, **environment):
    """Run a Python command in a process of its own, as a user would, on one thread."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
        timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def equal(a, b):
    """Return whether nested dicts, lists and tensors are bit-identical."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_step(step, loss, net, other, lr=2e-4, rtol=1e-7):
    """Check that step() is one step of a new Adam on `net`, with the gradients of `loss`.

    Adam's first step moves each weight by lr g / (|g| + 1e-8). The weights of `other` stay. step()
    returns its loss, or a dict of losses with "loss_d". Return what step() returned."""
    weights = list(net.parameters())
    others = list(other.parameters())
    gradients = torch.autograd.grad(loss, weights)
    weights_before = [weight.detach().clone() for weight in weights]
    others_before = [weight.detach().clone() for weight in others]

    result = step()
    taken = [weight.grad for weight in weights]
    torch.testing.assert_close(taken, list(gradients), rtol=rtol, atol=1e-9)
    for weight, before, gradient in zip(weights, weights_before, taken):
        expected = before - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
    assert equal([weight.detach() for weight in others], others_before)
    assert all(weight.requires_grad for weight in others)
    returned = result["loss_d"] if isinstance(result, dict) else result
    torch.testing.assert_close(returned, loss.detach(), rtol=1e-6, atol=0)
    return result


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run every test in an empty folder: runs/ and datasets/ are created there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Return a folder: 24 captioned images in own/, barely trained text encoders in runs/.

    The hash of their names makes two of the images test images, red/9.png and green/19.png. The 22
    training images are 7 red, 7 green and 8 blue ones. Each has two captions."""
    home = tmp_path_factory.mktemp("home")
    colours = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220)}
    for i in range(24):
        name = list(colours)[i % 3]
        folder = home / "own" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), colours[name]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {name} picture\nit is {name}\n")
    for encoder in ("char-cnn-rnn", "damsm"):
        done = run(ROOT / "common.py", "--encoder", encoder, "--data", "own",
                   "--image-features", "small", "--iterations", 2, cwd=home)
        assert done.returncode == 0, done.stderr
    return home
