"""Speed of one training step of D and G on a CPU: images/s of each script on one batch.

    python tests/benchmark.py --textbook FILE --threads 2

FILE, if given, has make() and step() of a plain DF-GAN: measured in alternation, with the ratio."""
import argparse
import statistics
import time
from pathlib import Path

import torch

from conftest import load_module
import dfgan
import gan_cls
import stackgan

def step(module, nets, real, t, eps):
    """Train D and G of a script once; eps, the noise of StackGAN, is empty for the others."""
    G, D, opt_g, opt_d = nets
    z = torch.randn(len(t), 100)
    fake, *kl = G(z, *eps, t) if eps else [G(z, t)]
    module.d_step(D, opt_d, real, fake, t, t.roll(1, 0))
    module.g_step(D, opt_g, fake, t, *kl)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--textbook", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU, {args.threads} threads")
    plain = args.textbook and load_module(args.textbook)
    for module, nets, size, n in (
            (gan_cls, gan_cls.build(), 64, 16), (stackgan, stackgan.build(64), 64, 16),
            (dfgan, dfgan.build(size=64), 64, 16), (dfgan, dfgan.build(size=256), 256, 4)):
        real, t = torch.rand(n, 3, size, size) * 2 - 1, torch.randn(n, module.TEXT)
        eps = [torch.randn(n, 128)] if module is stackgan else []
        steps = [lambda: step(module, nets, real, t, eps)]
        if plain and module is dfgan:
            plain_nets = plain.make(nf=32, size=size)
            steps.append(lambda: plain.step(*plain_nets, real, t))
        times = [[] for _ in steps]
        for _ in range(6):    # the first round warms up
            for function, durations in zip(steps, times):
                start = time.perf_counter()
                function()
                durations.append(time.perf_counter() - start)
        this, *other = (statistics.median(durations[1:]) for durations in times)
        ratio = "".join(f", {seconds / this:.2f} times the plain step" for seconds in other)
        print(f"{module.NAME}, {size} px, batch {n}: {n / this:.2f} images/s{ratio}", flush=True)

if __name__ == "__main__":
    main()
