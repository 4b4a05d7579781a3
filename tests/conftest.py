"""What the tests share: where the project, the real data and the golden figures lie."""
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

# No Inception for runs of the tests, unless they ask for it: each would load it, and measure with it after every epoch
os.environ["TORCH_HOME"] = str(ROOT / "no-such-folder")


def shared(*parts):
    """A path below ../shared; the test is skipped where it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is not here")
    return path


def run(*command, cwd, timeout=300, **environment):
    """A command of the project as a user types it, in a folder of its own."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **environment})


def call(script, *flags, cwd):
    """A script's command line, as `run` but within this process: the same main, seconds sooner."""
    from common import guard
    out, err, before, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    os.chdir(cwd)
    sys.argv = [str(script)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = guard(lambda: importlib.import_module(Path(script).stem).main(list(map(str, flags))))
            except SystemExit as end:                              # argparse
                code = end.code
    finally:
        os.chdir(before)
        sys.argv = argv
    return subprocess.CompletedProcess(flags, code or 0, out.getvalue(), err.getvalue())


def tarred(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def inception_file(monkeypatch):
    """The FID's network lies where torch.hub looks for it."""
    monkeypatch.setenv("TORCH_HOME", str(shared("weights")))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that runs/ and datasets/ never land in the project."""
    monkeypatch.chdir(tmp_path)


def module(path):
    """A Python file outside the project, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a tiny own data set and text encoders barely trained: runs start in it within seconds."""
    home = tmp_path_factory.mktemp("home")
    colours = dict(red=(230, 20, 20), green=(20, 200, 40), blue=(30, 40, 220), white=(245,) * 3)
    for i in range(24):
        name, colour = list(colours.items())[i % 4]
        (home / "own" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), colour).save(home / "own" / name / f"{i}.png")
        (home / "own" / name / f"{i}.txt").write_text(f"a {name} picture\nit is {name}\n")
    for encoder in ("char-cnn-rnn", "damsm"):
        done = run(ROOT / "common.py", "--encoder", encoder, "--data", "own", "--image-features", "small", "--iterations", 2, cwd=home)
        assert done.returncode == 0, done.stderr
    return home
