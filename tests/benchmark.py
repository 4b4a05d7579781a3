"""Measure the speed of one training step of D and G on a CPU: images/s of each script.

    python tests/benchmark.py
    python tests/benchmark.py --old FOLDER     # and that of the scripts of another checkout
    python tests/benchmark.py --textbook FILE  # and that of a plain DF-GAN: make() and step()

The compared steps take turns on one batch, so that a busy machine slows down both alike. A ratio is
the median of the other time divided by the own time: above 1, this checkout is faster.
"""
import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from conftest import ROOT, load_module


class Case(NamedTuple):
    """A script, the arguments of its build(), and a batch."""

    script: str
    config: dict
    size: int
    batch_size: int
    text_dim: int


CASES = [
    Case("gan_cls", {}, 64, 16, 1024),
    Case("stackgan", {"size": 64}, 64, 16, 1024),
    Case("stackgan", {"size": 256}, 256, 2, 1024),
    Case("dfgan", {"size": 64}, 64, 16, 256),
    Case("dfgan", {"size": 256}, 256, 4, 256)]


class ScriptStep:
    """The step of D and G of a script. A call returns the seconds of both."""

    def __init__(self, folder, case, real, t, clock):
        torch.manual_seed(0)
        self.module = load_module(folder / f"{case.script}.py")
        self.G, self.D, self.opt_g, self.opt_d = self.module.build(**case.config)
        self.real, self.t, self.clock = real, t, clock
        self.inputs = [torch.randn(len(t), 100), t]
        if case.script == "stackgan":
            stage1_output = torch.rand(len(t), 3, 64, 64) * 2 - 1
            first_input = self.inputs[0] if case.size == 64 else stage1_output
            self.inputs = [first_input, torch.randn(len(t), 128), t]

    def __call__(self):
        start = self.clock()
        more = []
        fake = self.G(*self.inputs)
        if isinstance(fake, tuple):  # StackGAN's KL loss
            fake, kl = fake
            more = [kl]
        self.module.d_step(self.D, self.opt_d, self.real, fake, self.t, self.t.roll(1, 0))
        middle = self.clock()
        self.module.g_step(self.D, self.opt_g, fake, self.t, *more)
        return middle - start, self.clock() - middle


class TextbookStep:
    """The step of a plain DF-GAN, which trains D and G in one function."""

    def __init__(self, path, case, real, t, clock):
        self.module = load_module(path)
        self.networks = self.module.make(nf=32, size=case.size)
        self.real, self.t, self.clock = real, t, clock

    def __call__(self):
        start = self.clock()
        self.module.step(*self.networks, self.real, self.t)
        return self.clock() - start, 0.0


def take_turns(steps, rounds):
    """Return the seconds of each step in each round, (steps, rounds, 2), of D and of G."""
    times = []
    for number in range(rounds + 1):
        order = range(len(steps)) if number % 2 else reversed(range(len(steps)))
        seconds = {i: steps[i]() for i in order}
        times.append([seconds[i] for i in range(len(steps))])
    return torch.tensor(times[1:], dtype=torch.double).transpose(0, 1)  # the first round warms up


def ratio(other, own):
    """Return the median over rounds of other / own."""
    return statistics.median((other / own).tolist())


def measure(case, args):
    """Print the row of a case."""
    real = torch.rand(case.batch_size, 3, case.size, case.size) * 2 - 1
    t = torch.randn(case.batch_size, case.text_dim) / case.text_dim ** 0.5
    clock = time.process_time if args.cpu_time else time.perf_counter
    steps = [ScriptStep(ROOT, case, real, t, clock)]
    if args.old:
        steps.append(ScriptStep(args.old, case, real, t, clock))
    with_textbook = args.textbook and case.script == "dfgan"
    if with_textbook:
        steps.append(TextbookStep(args.textbook, case, real, t, clock))
    times = take_turns(steps, args.rounds)
    own = times[0]
    total = own.sum(1)
    row = (f"{case.script}, {case.size} px, batch {case.batch_size}: "
           f"{case.batch_size / statistics.median(total.tolist()):.2f} images/s")
    if args.old:
        old = times[1]
        row += (f"; old / new: D {ratio(old[:, 0], own[:, 0]):.3f}, "
                f"G {ratio(old[:, 1], own[:, 1]):.3f}, both {ratio(old.sum(1), total):.3f}")
    if with_textbook:
        row += f"; {ratio(times[-1].sum(1), total):.2f} times the plain step"
    print(row, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--textbook", type=Path, metavar="FILE", help="a plain DF-GAN")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--cpu-time", action="store_true",
                        help="of the process, with --threads 1 on a busy machine")
    parser.add_argument("--script", help="measure this one only, for example dfgan")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU, threads: {args.threads}")
    for case in CASES:
        if args.script in (None, case.script):
            measure(case, args)


if __name__ == "__main__":
    main()
