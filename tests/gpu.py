"""Measure and check the three scripts on a GPU: python tests/gpu.py (it stops after 9.5 minutes).

Prints parity with the CPU, the log of a resumed run, and the speed of steps; of
`python tests/gpu.py speed` only the last."""
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dfgan, gan_cls, stackgan

STEPS = {"dfgan": (dict(nf=32, size=256), 32, 128), "gan_cls": (dict(ngf=128), 64, 256),
         "stackgan 1": (dict(size=64), 64, 256), "stackgan 2": (dict(size=256), 64, 128)}

def make_step(name, config, batch, device, bf16=False):
    """Return a function without arguments, the step of D and G in train(), and both networks."""
    module = {"dfgan": dfgan, "gan_cls": gan_cls}.get(name, stackgan)
    torch.manual_seed(0)
    G, D, opt_g, opt_d = module.build(**config, device=device)
    size, width = config.get("size", 64), 256 if name == "dfgan" else 1024
    shapes = (3, size, size), (3, 64, 64), (width,), (100,), (128,)
    real, s0, t, z, eps = (torch.randn(batch, *shape).tanh().to(device) for shape in shapes)
    inputs = {"stackgan 1": (z, eps, t), "stackgan 2": (s0, eps, t)}.get(name, (z, t))

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            fake, *kl = G(*inputs) if module is stackgan else [G(*inputs)]
            module.d_step(D, opt_d, real, fake, t, t.roll(1, 0))
            return module.g_step(D, opt_g, fake, t, *kl)
    return step, (G, D)

def seconds(function, n):
    """Return the mean time of n calls; reading a number of the last result waits for the device."""
    start = time.perf_counter()
    for _ in range(n):
        result = function()
    result.flatten()[0].item()
    return (time.perf_counter() - start) / n

def busy_share(step, device):
    """Return the share of the time of 3 steps in which kernels and copies run on the device."""
    kind = "CUDA" if "cuda" in device else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as p:
        duration = 3 * seconds(step, 3)
    busy = sum(event.time_range.elapsed_us() for event in p.events()
               if event.device_type.name == kind and not event.is_user_annotation)
    return busy / 1e6 / duration

def measure(name, config, batch, device, bf16, n=20):
    """Return a row of the table."""
    try:
        step, _ = make_step(name, config, batch, device, bf16)
        first, _, mean = (seconds(step, k) for k in (1, 3, n))
        row = (f"{batch / mean:8.1f} {mean * 1e3:8.1f} {busy_share(step, device):5.0%} "
               f"{torch.cuda.max_memory_allocated() / 2**30:8.1f} {first:8.1f} {step():9.4f}")
    except torch.OutOfMemoryError:
        row = "out of memory"
    return f"{name:10} {batch:5} {row}"

def parity(name, config, device, batch=4):
    """Return the relative differences of the gradients of G and D to those on the CPU, in float32.

    D's learning rate is 0: Adam's first step is the sign of a gradient, noise where that is 0."""
    grads = []
    config = config | ({"lr_d": 0.0} if name == "dfgan" else {"lr": 0.0})
    for where in ("cpu", device):
        step, nets = make_step(name, config, batch, where)
        step()
        grads.append([torch.cat([p.grad.cpu().flatten() for p in n.parameters()]) for n in nets])
    return [((a - b).norm() / a.norm()).item() for a, b in zip(*grads)]

def resumed_run(*flags):
    """Return the exit statuses of dfgan.py on toy data, 1 epoch, then resumed to 2, and its log."""
    with tempfile.TemporaryDirectory() as folder:
        commands = ([sys.executable, ROOT / "dfgan.py", "--epochs", n, *flags] for n in "12")
        status = [subprocess.run(c, cwd=folder, capture_output=True).returncode for c in commands]
        log = Path(folder, "runs/dfgan-toy/log.csv")
        return f"exit statuses {status}\n{log.read_text() if log.exists() else 'no log'}"

def main():
    signal.alarm(570)
    sys.stdout.reconfigure(line_buffering=True)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
    if "speed" not in sys.argv:
        torch.backends.cudnn.allow_tf32 = False
        for name, (config, *_) in STEPS.items():
            differences = ", ".join(f"{x:.1e}" for x in parity(name, config, "cuda"))
            print(f"{name}: gradients of G, D differ from the CPU's by {differences}")
        print(resumed_run("--device", "cuda"))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True    # as in training
    print("step       batch images/s       ms  busy peak GiB first, s loss of G")
    bf16 = torch.cuda.is_bf16_supported(False)
    for i in range(2):
        for name, (config, *batches) in STEPS.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            print(measure(name, config, batches[i], "cuda", bf16))

if __name__ == "__main__":
    main() if torch.cuda.is_available() else print("no CUDA: nothing to measure")
