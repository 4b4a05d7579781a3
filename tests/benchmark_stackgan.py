"""One training step (D and G) of stackgan.py, both stages, against a plain one with the same layers, in one process, on one batch.

    python tests/benchmark_stackgan.py                          # CPU: the paper's widths, batch 4
    python tests/benchmark_stackgan.py --batch 64               # on a GPU also bf16 and compiled, and peak memory

Plain: nearest upsampling materialised before its 3x3 convolution, D's gradients computed in G's step too, NCHW, float32, eager.
The rounds alternate, so that a disturbance meets every form; the ratio is that of the medians.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stackgan  # noqa: E402


class PlainUp(stackgan.Up):
    def forward(self, x):
        return F.relu(self.norm(self.conv(F.interpolate(x, scale_factor=2))))


def plain_g_step(D, opt_g, fake, t, kl):
    loss = stackgan.g_loss(D(fake, t)) + 2.0 * kl
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()


def plain_make(*args):
    fast, stackgan.Up = stackgan.Up, PlainUp
    try:
        G, D, opt_g, opt_d = stackgan.make(*args)
    finally:
        stackgan.Up = fast
    return G.to(memory_format=torch.contiguous_format), D.to(memory_format=torch.contiguous_format), opt_g, opt_d


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--ngf", type=int, default=128)
    p.add_argument("--ndf", type=int, default=64)
    p.add_argument("--batch", type=int, nargs="+", default=[4])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--forms", nargs="+", help="of: plain eager eager-bf16 compiled compiled-bf16 (default: CPU the first three)")
    a = p.parse_args()
    gpu = a.device.startswith("cuda")
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    forms = a.forms or ["plain", "eager", "eager-bf16", *(["compiled", "compiled-bf16"] if gpu else [])]

    def step(form, G, D, opt_g, opt_d, x, eps, t, real, wrong):
        with torch.autocast(a.device.split(":")[0], torch.bfloat16, enabled="bf16" in form):
            fake, mu, log_sigma = G(x, eps, t)
            kl = stackgan.kl_loss(mu.float(), log_sigma.float())
            stackgan.d_step(D, opt_d, real, wrong, fake, t)
            (plain_g_step if form == "plain" else stackgan.g_step)(D, opt_g, fake, t, kl)

    for stage in (1, 2):
        for batch in a.batch:
            size = 64 if stage == 1 else a.size
            draw = lambda *shape: torch.randn(batch, *shape, device=a.device)
            inputs = draw(100) if stage == 1 else draw(3, 64, 64).tanh(), draw(128), draw(1024), draw(3, size, size), draw(3, size, size)
            parts, times, memory = {}, {}, {}
            for form in forms:
                torch.manual_seed(0)
                parts[form] = (plain_make if form == "plain" else stackgan.make)(stage, a.ngf, a.ndf, a.size, 2e-4, a.device)
                if "compiled" in form:
                    parts[form] = (*map(torch.compile, parts[form][:2]), *parts[form][2:])
            for r in range(-2, a.rounds):          # two to warm up
                for form in forms:
                    if gpu:
                        torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
                    start = time.perf_counter()
                    step(form, *parts[form], *inputs)
                    if gpu:
                        torch.cuda.synchronize()
                        memory[form] = torch.cuda.max_memory_allocated() / 2**30
                    if r >= 0:
                        times.setdefault(form, []).append(time.perf_counter() - start)
            print(f"Stage {'I' * stage}, {size} px, ngf {a.ngf}, ndf {a.ndf}, batch {batch}, {a.device}, torch {torch.__version__}, "
                  f"medians of {a.rounds} rounds")
            base = statistics.median(times[forms[0]])
            for form in forms:
                middle = statistics.median(times[form])
                print(f"  {form:14} {batch / middle:8.2f} images/s  ratio {base / middle:5.2f}  "
                      f"(rounds {min(times[form]):.3f} to {max(times[form]):.3f} s)"
                      + (f"  {memory[form]:.1f} GiB peak, all forms' weights included" if gpu else ""))


if __name__ == "__main__":
    main()
