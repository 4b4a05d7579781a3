"""Command lines of the three scripts on the images of the fixture `home`, for test_runs.py and
test_sampling.py. A test that calls these functions runs in the folder `home`."""
import functools
import importlib
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor

import common

TINY = {
    "dfgan": "--size 32 --nf 2",
    "gan_cls": "--ngf 4 --ndf 2 --captions-per-image 2 --lr-decay-epochs 1",
    "stackgan": "--ngf 4 --ndf 2 --size 128 --num-residual 1 --lr-decay-epochs 1"}


def flags(script, name, more=""):
    """Return the flags of a tiny run in runs/<name>: 2 epochs of 2 steps, 8 images per step."""
    shared = f"--data own --device cpu --batch-size 8 --epochs 2 --out-dir runs/{name}"
    return f"{shared} {TINY[script]} {more}".split()


def call(script, arguments):
    """Run a script in this process. Return its exit status."""
    main = importlib.import_module(script).main
    try:
        return common.run(lambda: main([str(argument) for argument in arguments])) or 0
    except SystemExit as end:  # of argparse
        return end.code


def load(script, name):
    """Return the checkpoint of runs/<name>."""
    return common.load_checkpoint(Path("runs", name, "last.pt"), script)


@functools.cache
def train_without_interruption(script):
    """Train runs/whole-<script>. Return its checkpoint, and the losses of each of its steps."""
    steps = []
    add = common.Means.add

    def record(means, losses):
        steps.append({name: loss.item() for name, loss in losses.items()})
        add(means, losses)

    with mock.patch.object(common.Means, "add", record):
        assert call(script, flags(script, f"whole-{script}")) == 0
    return load(script, f"whole-{script}"), steps


def whole_run(script):
    return train_without_interruption(script)[0]


def step_losses(script):
    return train_without_interruption(script)[1]


@functools.cache
def random_model(script):
    """Return the path of a run with large random weights: captions and noise change its images."""
    state = dict(whole_run(script))
    torch.manual_seed(0)
    for part in ("text_encoder", "G0", "ema"):
        if part in state:
            state[part] = {name: randomize(name, value) for name, value in state[part].items()}
    encoder = state["text_encoder"]
    encoder["_extra_state"] = {**encoder["_extra_state"], "scale": 1}
    folder = Path("runs", f"random-{script}")
    common.save_checkpoint(folder / "last.pt", state)
    return folder


def randomize(name, value):
    """Add noise to a weight or bias; leave other values of a state dict alone."""
    if "weight" in name or "bias" in name:
        value = value + 0.15 * torch.randn_like(value)
    return value


def read_grid(path, columns):
    """Return the images of a grid, (rows, columns, 3, S, S) in [-1, 1]."""
    margin = 2  # of torchvision.utils.save_image, left of and above each image
    grid = to_tensor(Image.open(path))[:, margin:, margin:] * 2 - 1
    size = grid.shape[2] // columns - margin
    step = size + margin
    return grid.unfold(1, size, step).unfold(2, size, step).permute(1, 2, 0, 3, 4)


class SmallInception(torch.nn.Module):
    """A stand-in for common.FIDInception that needs no download: its features are pixels.

    The time of a FID grows with the cube of the width. R-precision needs 2048."""

    def __init__(self, width=64):
        super().__init__()
        self.width = width
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("head", torch.randn(1008, width, generator=generator))

    def forward(self, images):
        pixels = F.adaptive_avg_pool2d(images, 26).flatten(1)  # (B, 2028)
        pooled = F.pad(pixels, (0, self.width - pixels.shape[1]))
        regions = F.adaptive_avg_pool2d(images, 96).reshape(-1, 768, 36)
        return pooled, regions
