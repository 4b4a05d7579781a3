"""What the tests share: where the project, the real data and the golden figures lie."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

if (SHARED / "weights").is_dir():
    os.environ.setdefault("TORCH_HOME", str(SHARED / "weights"))


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


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that runs/ and datasets/ never land in the project."""
    monkeypatch.chdir(tmp_path)
