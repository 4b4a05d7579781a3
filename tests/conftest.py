"""What the tests share: paths, commands in a process of their own, a tiny folder of images."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)    # tiny networks: more threads only wait for each other

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes on a CPU; run with -m slow")

def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless they are asked for by -m slow."""
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))

def shared(*parts):
    """Return a path below ../shared; skip the test if it is missing."""
    path = ROOT.parent.joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is missing")
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

@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run every test in an empty folder: runs/ and datasets/ are created there."""
    monkeypatch.chdir(tmp_path)

@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Return a folder: 24 captioned images in own/, barely trained text encoders in runs/."""
    home = tmp_path_factory.mktemp("home")
    colours = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220)}
    for i in range(24):
        name = list(colours)[i % 3]
        (home / "own" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), colours[name]).save(home / "own" / name / f"{i}.png")
        (home / "own" / name / f"{i}.txt").write_text(f"a {name} picture\nit is {name}\n")
    for encoder in ("char-cnn-rnn", "damsm"):
        done = run(ROOT / "common.py", "--encoder", encoder, "--data", "own",
                   "--image-features", "small", "--iterations", 2, cwd=home)
        assert done.returncode == 0, done.stderr
    return home
