"""SIGKILL at random moments of preparing, training a text encoder, training and saving; the same command then goes on.

    python tests/kill.py                                        # 200 kills, in a temporary folder
    python tests/kill.py --kills 12 --seed 1 --only dfgan

After each kill every file that is there must load, and no step that was saved may be lost. In the end the command runs
through, and its checkpoint must be, to the bit, that of a run that nobody killed. Prints what was hit how often.
"""
import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import data  # noqa: E402
import dfgan  # noqa: E402
import gan_cls  # noqa: E402
import stackgan  # noqa: E402
from conftest import same  # noqa: E402

FLAGS = {dfgan: "--size 32 --nf 2 --epochs 40", gan_cls: "--ngf 4 --ndf 4 --epochs 40",
         stackgan: "--ngf 4 --ndf 2 --size 128 --epochs 12 --captions-per-image 1"}


def begin(folder):
    """A new home: pictures and captions, nothing prepared."""
    shutil.rmtree(folder, ignore_errors=True)
    for i in range(24):
        (folder / "own").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), (10 * i, 250 - 10 * i, 90)).save(folder / "own" / f"{i}.png")
        (folder / "own" / f"{i}.txt").write_text(f"picture {i}\nnumber {i}\n")


def start(script, folder):
    """The command in a child that has everything imported already."""
    if child := os.fork():
        return child
    os.chdir(folder)
    log = open("log.txt", "a")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    flags = f"--data own --run run --batch-size 8 --image-features small --eval-every 0 --device cpu {FLAGS[script]}"
    # a text encoder of 20 batches: time for the other moments
    train = common.train_text_encoder
    common.train_text_encoder = lambda *a, **k: train(*a, **{**k, "iterations": 20})
    code = 1
    try:
        code = common.guard(lambda: script.main(flags.split()))
    finally:
        os._exit(code)


def caches(rounds, rng, place):
    """Kills while pictures, sentences and the features of pictures are being stored. Returns Counter of what was being written."""
    hit, folder = collections.Counter(), place / "caches"
    for i in range(150):
        (folder / "own").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 300), (i, 250 - i, 90)).save(folder / "own" / f"{i}.png")
        (folder / "own" / f"{i}.txt").write_text(f"picture {i}\n" * 2)
    torch.manual_seed(0)
    encoder = common.CharCnnRnn((16, 16, 16)).requires_grad_(False)
    net = lambda images: (F.adaptive_avg_pool2d(images, (26, 26)).flatten(1).repeat(1, 2)[:, :2048],)

    def build():
        dataset = data.load("own", "train", 64)
        return dataset.images, common.embeddings(encoder, dataset), common.real_features(dataset, net)

    def child():
        if number := os.fork():
            return number
        os.chdir(folder)
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT), 2)
        torch.set_num_threads(1)
        build()
        os._exit(0)

    while sum(hit.values()) < rounds:
        shutil.rmtree(folder / "datasets", ignore_errors=True)
        clock = time.time()
        os.waitpid(child(), 0)                                     # how long it takes, in one go
        took, done = time.time() - clock, set()
        shutil.rmtree(folder / "datasets")
        while len(done) < 8 and sum(hit.values()) < rounds:
            number = child()
            time.sleep(rng.uniform(0, took))
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            parts = sorted(p.name.split(".part")[0].rpartition(".")[2] for p in (folder / "datasets").rglob("*.part*"))
            hit[f"caches: {'while writing .' + parts[0] if parts else 'between two files'}"] += 1
            done.add(len(done))
        before = os.getcwd()
        os.chdir(folder)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
            found = build()
            shutil.rmtree("datasets")
            assert all(map(torch.equal, found, build())), "a cache differs from one that nobody killed"
        os.chdir(before)
    return hit


def look(folder, script, before):
    """What lies there after a kill: (moment, step). Anything that does not load is an error."""
    moment, step = "before any file", (0, 0)
    parts = [p.name for p in folder.rglob("*.part*")]
    if list(folder.rglob("*.u8")):
        moment = "pictures prepared"
    for path in folder.rglob("encoder.pt"):
        moment = "text encoder finished" if common.load(path, "text encoder")["note"] else "text encoder unfinished"
    if (path := folder / "run" / "last.pt").exists():
        state = common.load(path, script.__name__)
        stage = state.get("stage", 1)
        step, moment = (stage, state["step"]), f"training{f' Stage {stage}' if script is stackgan else ''}"
        if step < before:
            raise SystemExit(f"step {before} was saved, {step} is there")
        if (log := folder / "run" / "log.csv").exists():
            lines = log.read_text().splitlines()
            assert len({line.count(",") for line in lines}) == 1, lines
    return (f"{moment}, while writing" if parts else moment), step


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="+", choices=[script.__name__ for script in FLAGS], default=[script.__name__ for script in FLAGS])
    a = p.parse_args()
    rng, hit, kills, finished = random.Random(a.seed), collections.Counter(), 0, 0
    scripts = [script for script in FLAGS if script.__name__ in a.only]
    with tempfile.TemporaryDirectory() as place:
        folder, truth = Path(place, "killed"), {}
        hit += caches(a.kills // 4, rng, Path(place))
        for script in scripts:                                     # what nobody killed
            begin(Path(place, script.__name__))
            clock = time.time()
            _, status = os.waitpid(start(script, Path(place, script.__name__)), 0)
            assert status == 0, Path(place, script.__name__, "log.txt").read_text()
            truth[script] = common.load(Path(place, script.__name__, "run", "last.pt"), script.__name__), time.time() - clock
        while kills < a.kills:
            script = scripts[finished % len(scripts)]
            begin(folder)
            step, done, reach = (0, 0), False, truth[script][1] / 3
            while not done:
                # the moments: uniform over a part of the whole run that grows until something new is saved
                child, wait = start(script, folder), rng.uniform(0.02, reach) if kills < a.kills else 1e9
                end = time.time() + wait
                while not done and time.time() < end:
                    gone, status = os.waitpid(child, os.WNOHANG)
                    if gone:
                        assert status == 0, (folder / "log.txt").read_text()[-3000:]
                        done = True
                    time.sleep(0.002)
                if not done:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    moment, now = look(folder, script, step)
                    reach, step = truth[script][1] / 3 if now > step else reach * 1.3, now
                    hit[f"{script.__name__}: {moment}"] += 1
                    kills += 1
            state, expect = common.load(folder / "run" / "last.pt", script.__name__), truth[script][0]
            for key in expect:
                if key not in ("args", "pictures", "text_note"):       # these name the folder
                    assert same(state[key], expect[key]), f"{script.__name__}: {key} differs from the run that nobody killed"
            whole = Path(place, script.__name__, "run")
            assert (folder / "run" / "log.csv").read_text() == (whole / "log.csv").read_text(), "log.csv differs"
            assert {p.name for p in (folder / "run").iterdir()} == {p.name for p in whole.iterdir()}, "a grid is missing"
            left = [p.name for p in folder.rglob("*.part*")]
            assert not left, left
            finished += 1
    for moment, n in sorted(hit.items()):
        print(f"{n:4}  {moment}")
    print(f"{kills} kills and {a.kills // 4} of the caches, {finished} runs ended as the ones that nobody killed, to the bit")


if __name__ == "__main__":
    main()
