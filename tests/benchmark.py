"""Speed of one training step of D and G: images/s of each script on one batch.

    python tests/benchmark.py --textbook FILE --threads 2

FILE, if given, has make() and step() of a plain DF-GAN: measured in alternation, with the ratio."""
import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dfgan
import gan_cls
import stackgan

def median_seconds(steps, rounds=5):
    """Return the median time of each function of a dict, called in turns."""
    times = {name: [] for name in steps}
    for _ in range(rounds + 1):    # the first warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}

def gan_step(module, nets, real, t, kl=False):
    """Train D and G of a script once."""
    G, D, opt_g, opt_d = nets
    fake = G(torch.randn(len(t), 100), *([torch.randn(len(t), 128)] if kl else []), t)
    fake, *moments = fake if kl else [fake]
    module.d_step(D, opt_d, real, fake, t, t.roll(1, 0))
    module.g_step(D, opt_g, fake, t, *([module.kl_loss(*moments)] if kl else []))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--textbook", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="the plain step stays in float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU, {args.threads} threads, bf16 {args.bf16}")
    for name, module, nets, size, dim, n in (
            ("gan_cls", gan_cls, gan_cls.build(), 64, 1024, 16),
            ("stackgan, Stage-I", stackgan, stackgan.build(1), 64, 1024, 16),
            ("dfgan", dfgan, dfgan.build(size=64), 64, 256, 16),
            ("dfgan", dfgan, dfgan.build(size=256), 256, 256, 4)):
        real, t = torch.rand(n, 3, size, size) * 2 - 1, torch.randn(n, dim)

        def this():
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                gan_step(module, nets, real, t, module is stackgan)

        steps = {"this": this}
        if args.textbook and module is dfgan:
            spec = importlib.util.spec_from_file_location("textbook", args.textbook)
            plain = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(plain)
            plain_nets = plain.make(nf=32, size=size)
            steps["plain"] = lambda: plain.step(*plain_nets, real, t)
        seconds = median_seconds(steps)
        ratio = ""
        if "plain" in seconds:
            ratio = f", {seconds['plain'] / seconds['this']:.2f} times the plain step"
        print(f"{name}, {size} px, batch {n}: {n / seconds['this']:.2f} images/s{ratio}", flush=True)

if __name__ == "__main__":
    main()
