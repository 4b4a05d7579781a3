"""One training step (D and G) of dfgan.py against the plain step written straight from the paper, in one process, on one batch.

    python tests/benchmark_dfgan.py                             # CPU: 256 px, nf 32, batch 4
    python tests/benchmark_dfgan.py --batch 32 64 128           # on a GPU also bf16 and compiled, peak memory, share of the peak

The rounds alternate, so that a disturbance meets every form; the ratio is that of the medians.
"""
import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dfgan  # noqa: E402

PEAK = 989e12      # bf16, dense, of an H100 or H200


def count(step):
    """Floating point operations of the convolutions and matrix products of step()."""
    counter = FlopCounterMode(display=False)
    # its bookkeeping by module cannot follow a gradient of a gradient; the sum needs none
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda *error: None)
    with counter:
        step()
    return counter.get_total_flops()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--textbook", type=Path, default=ROOT.parent / "shared" / "bench" / "textbook_dfgan.py")
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--nf", type=int, default=32)
    p.add_argument("--batch", type=int, nargs="+", default=[4])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--forms", nargs="+", help="of: textbook eager eager-bf16 compiled compiled-bf16 (default: CPU the first three)")
    a = p.parse_args()
    spec = importlib.util.spec_from_file_location("textbook", a.textbook)
    textbook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(textbook)
    gpu = a.device.startswith("cuda")
    torch.set_float32_matmul_precision("high" if gpu else "highest")

    def ours(form, G, D, opt_g, opt_d, images, sentences):
        with torch.autocast(a.device.split(":")[0], torch.bfloat16, enabled="bf16" in form):
            fake = form_of[form][0](torch.randn(len(images), dfgan.NZ, device=a.device), sentences)
            dfgan.d_step(D, opt_d, images, sentences.roll(1, 0), fake, sentences, loss_of=form_of[form][1])
            dfgan.g_step(D, opt_g, fake, sentences, loss_of=form_of[form][2])

    for batch in a.batch:
        images = torch.rand(batch, 3, a.size, a.size, device=a.device) * 2 - 1
        sentences = torch.randn(batch, 256, device=a.device)
        forms = a.forms or ["textbook", "eager", "eager-bf16", *(["compiled", "compiled-bf16"] if gpu else [])]
        form_of, parts, times, memory = {}, {}, {}, {}
        for form in dict.fromkeys([*forms, "eager"]):
            torch.manual_seed(0)
            parts[form] = textbook.make(a.nf, a.size, a.device) if form == "textbook" else dfgan.make(a.nf, a.size, device=a.device)
            functions = parts[form][0], dfgan.d_loss, dfgan.g_loss
            form_of[form] = [torch.compile(f) for f in functions] if "compiled" in form else functions
        step = lambda form: textbook.step(*parts[form], images, sentences) if form == "textbook" else ours(form, *parts[form], images, sentences)
        for r in range(-2, a.rounds):          # two to warm up
            for form in forms:
                if gpu:
                    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                step(form)
                if gpu:
                    torch.cuda.synchronize()
                    memory[form] = torch.cuda.max_memory_allocated() / 2**30
                if r >= 0:
                    times.setdefault(form, []).append(time.perf_counter() - start)
        print(f"{a.size} px, nf {a.nf}, batch {batch}, {a.device}, torch {torch.__version__}, medians of {a.rounds} rounds")
        base = statistics.median(times[forms[0]])
        for form in forms:
            middle = statistics.median(times[form])
            line = f"  {form:14} {batch / middle:8.2f} images/s  ratio {base / middle:5.2f}  (rounds {min(times[form]):.3f} to {max(times[form]):.3f} s)"
            flops = count(lambda: step("textbook" if form == "textbook" else "eager"))      # compiled: as many as eager
            line += f"  {flops / batch / 1e9:.0f} GFLOP an image"
            if gpu:
                line += f"  {memory[form]:.1f} GiB peak, all forms' weights included"
                line += f"  {flops / middle / PEAK:.1%} of {PEAK / 1e12:.0f} TFLOP/s"
            print(line)


if __name__ == "__main__":
    main()
