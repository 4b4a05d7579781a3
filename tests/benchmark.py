"""Training steps of this version against another one, and of dfgan.py against a plain step.

    python tests/benchmark.py --against FOLDER --textbook FILE --threads 2

FOLDER holds the gan_cls.py, stackgan.py and dfgan.py of the version before the rewrite. Prints
images/s of one step of D and G on one batch, medians of alternating rounds, and their ratios."""
import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Name: script, stage of StackGAN, image size, batch size
CASES = {"gan_cls": ("gan_cls", None, 64, 16), "stackgan 1": ("stackgan", 1, 64, 16),
         "stackgan 2": ("stackgan", 2, 256, 4), "dfgan 64": ("dfgan", None, 64, 16),
         "dfgan 256": ("dfgan", None, 256, 4)}

def load_module(path):
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def draw_batch(script, size, n, device):
    """Return real and wrong images, embeddings of both, noise, eps, images of Stage-I."""
    shapes = (3, size, size), (3, size, size), *[(256 if script == "dfgan" else 1024,)] * 2
    x = [torch.randn(n, *shape, device=device) for shape in (*shapes, (100,), (128,), (3, 64, 64))]
    return [v.tanh() if v.ndim == 4 else v for v in x]

def generate(module, stage, G, t, z, eps, s0):
    """Return images with their graph and, of StackGAN, [the KL divergence]."""
    if stage is None:
        return G(z, t), []
    fake, mu, log_sigma = G(z if stage == 1 else s0, eps, t)
    return fake, [module.kl_loss(mu.float(), log_sigma.float())]

def new_step(module, stage, nets, batch):
    """Run a step of this version."""
    G, D, opt_g, opt_d = nets
    real, _, t, t_wrong, *noise = batch
    fake, kl = generate(module, stage, G, t, *noise)
    module.d_step(D, opt_d, real, fake, t, t_wrong)
    return module.g_step(D, opt_g, fake, t, *kl)

def old_step(module, stage, nets, batch):
    """Run a step of the version before: of DF-GAN `wrong` is embeddings, of the others images."""
    G, D, opt_g, opt_d = nets
    real, wrong, t, t_wrong, *noise = batch
    fake, kl = generate(module, stage, G, t, *noise)
    wrong = t_wrong if hasattr(module, "ma_gp") else wrong
    module.d_step(D, opt_d, real, wrong, fake, t)
    return module.g_step(D, opt_g, fake, t, *kl)

def textbook_step(module, stage, nets, batch):
    """Run a step of the plain file."""
    return module.step(*nets, batch[0], batch[2])[1]

def contenders(args, script, stage, size):
    """Return steps and their networks by name."""
    config = {"dfgan": dict(nf=args.nf, size=size), "stackgan": dict(stage=stage)}.get(script, {})
    new = load_module(ROOT / f"{script}.py")
    found = {"this version": (new_step, new, new.build(**config, device=args.device))}
    if args.against:
        old = load_module(args.against / f"{script}.py")
        found["--against"] = old_step, old, old.make(**config, device=args.device)
    if args.textbook and script == "dfgan":
        plain = load_module(args.textbook)
        found["--textbook"] = textbook_step, plain, plain.make(**config, device=args.device)
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--against", type=Path, metavar="FOLDER", help="of the version before")
    add("--textbook", type=Path, metavar="FILE", help="with make() and step() of a plain DF-GAN")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--bf16", action="store_true", help="autocast; the plain step stays in float32")
    add("--device", default="cpu")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    add("--batch-size", type=int, help="default: 16, at 256 px 4")
    add("--nf", type=int, default=32, help="width of DF-GAN")
    add("--rounds", type=int, default=5, help="after one that warms up")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, bf16 {args.bf16}")
    for name in args.cases:
        script, stage, size, n = CASES[name]
        n = args.batch_size or n
        found = contenders(args, script, stage, size)
        batch, times = draw_batch(script, size, n, args.device), {key: [] for key in found}
        for _ in range(args.rounds + 1):
            for key, (step, module, nets) in found.items():
                start = time.perf_counter()
                bf16 = args.bf16 and key != "--textbook"
                with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=bf16):
                    step(module, stage, nets, batch).item()    # waits for the device
                times[key].append(time.perf_counter() - start)
        speed = {key: n / statistics.median(values[1:]) for key, values in times.items()}
        for key, value in speed.items():
            print(f"{name:10} batch {n:3} {key:12} {value:9.2f} images/s, ratio of this version "
                  f"{speed['this version'] / value:5.2f}", flush=True)

if __name__ == "__main__":
    main()
