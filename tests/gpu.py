"""Measure and check the three scripts on a GPU: python tests/gpu.py (at most 10 minutes).

Prints rows of the training steps, eager and compiled, at two batch sizes; parity of a step with
the CPU; the convolutions of DF-GAN's double backward; a resumed run."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dfgan
import gan_cls
import stackgan

# Batch sizes; widths of the paper; small ones, for parity with the CPU
STEPS = {"dfgan": ((32, 128), dict(nf=32, size=256), dict(nf=8, size=64)),
         "gan_cls": ((64, 256), dict(ngf=128), dict(ngf=16, ndf=16)),
         "stackgan 1": ((64, 256), dict(stage=1), dict(stage=1, ngf=16, ndf=16)),
         "stackgan 2": ((64, 128), dict(stage=2), dict(stage=2, ngf=16, ndf=16, size=128))}

def make_step(name, config, batch, device, compiled=False, bf16=False):
    """Return a function of no arguments, the step of D and G in train(), and G and D."""
    module = {"dfgan": dfgan, "gan_cls": gan_cls}.get(name, stackgan)
    torch.manual_seed(0)
    G, D, opt_g, opt_d = module.build(**config, device=device)
    size = 64 if name in ("gan_cls", "stackgan 1") else config.get("size", 256)
    shapes = (3, size, size), (3, 64, 64), (256 if name == "dfgan" else 1024,), (100,), (128,)
    real, s0, t, z, eps = (torch.randn(batch, *shape).tanh().to(device) for shape in shapes)
    inputs = {"stackgan 1": (z, eps, t), "stackgan 2": (s0, eps, t)}.get(name, (z, t))
    d_loss = [dfgan.d_loss] if name == "dfgan" else []
    if compiled:
        G.compile(dynamic=False)
        for method in ("forward",) if name == "dfgan" else ("features", "score"):
            setattr(D, method, torch.compile(getattr(D, method), dynamic=False))
        d_loss = [torch.compile(f, dynamic=False) for f in d_loss]

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            fake, kl = G(*inputs), []
            if module is stackgan:
                fake, mu, log_sigma = fake
                kl = [stackgan.kl_loss(mu.float(), log_sigma.float())]
            stats = module.d_step(D, opt_d, real, fake, t, t.roll(1, 0), *d_loss)
            return torch.cat((module.g_step(D, opt_g, fake, t, *kl)[None], stats))
    return step, (G, D)

def seconds(function, device, n):
    """Return the mean time of n calls, and the last result."""
    synchronize = torch.cuda.synchronize if "cuda" in device else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(n):
        result = function()
    synchronize()
    return (time.perf_counter() - start) / n, result

def busy_share(step, device):
    """Return the share of the time of 3 steps in which the device works."""
    kind = "CUDA" if "cuda" in device else "CPU"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profile:
        duration, _ = seconds(step, device, 3)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events()
                   if e.device_type.name == kind and not getattr(e, "is_user_annotation", False))
    busy = last = 0    # microseconds; spans of several streams overlap
    for start, end in spans:
        busy, last = busy + max(0, end - max(start, last)), max(end, last)
    return busy / 1e6 / (3 * duration)

def measure(name, config, batch, device, compiled, bf16, n=20):
    """Return a row of the table."""
    torch.compiler.reset()
    peak = 0
    try:
        if "cuda" in device:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step, _ = make_step(name, config, batch, device, compiled, bf16)
        first, stats = seconds(step, device, 1)
        seconds(step, device, 3)
        duration, _ = seconds(step, device, n)
        if "cuda" in device:
            peak = torch.cuda.max_memory_allocated() / 2**30
        row = (f"{batch / duration:9.1f} {duration * 1e3:8.1f} {busy_share(step, device):5.0%} "
               f"{peak:6.1f} {first:7.1f}   {stats[0]:.3f} {stats[1]:.3f}")
    except Exception as error:    # out of memory, a failed compilation
        row = f"{type(error).__name__}: {str(error).strip()[:80]}"
    return f"{name:10} {batch:5} {'compiled' if compiled else 'eager':8} {row}"

def parity(name, config, device, batch=4):
    """Return the relative difference of gradients to those on the CPU, in float32."""
    grads = []
    for where in ("cpu", device):
        step, nets = make_step(name, config, batch, where)
        step()
        grads.append([torch.cat([p.grad.flatten().cpu() for p in net.parameters()]) for net in nets])
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(*grads))

def double_backward(config, batch, device, dtype):
    """Return ms of the weight gradients in D's double backward: as PyTorch writes them, with a
    feature map as kernel; as convolution_backward; and the relative difference of the results."""
    D, layers, totals = dfgan.Discriminator(**config).to(device, dtype), [], [0, 0, 0]
    for layer in (m for m in D.modules() if isinstance(m, torch.nn.Conv2d)):
        layer.register_forward_hook(lambda m, x, y: layers.append((m, x[0], torch.randn_like(y))))
    shapes, channels_last = ((3, config["size"], config["size"]), (256,)), torch.channels_last
    with torch.no_grad():
        D(*(torch.randn(batch, *shape).to(device, dtype) for shape in shapes))
        for m, x, g in layers:
            x, g = (v.to(memory_format=channels_last) for v in (x, g))
            xt, gt = (v.transpose(0, 1).contiguous(memory_format=channels_last) for v in (x, g))
            results = []
            for i, function in enumerate((
                    lambda: F.conv2d(xt, gt, None, 1, m.padding, m.stride).transpose(0, 1),
                    lambda: torch.ops.aten.convolution_backward(
                        g, x, m.weight, None, m.stride, m.padding, [1, 1], False, [0, 0], 1,
                        [False, True, False])[1])):
                seconds(function, device, 1)
                mean, result = seconds(function, device, 3)
                totals[i] += mean * 1e3
                results.append(result[:, :, :m.kernel_size[0], :m.kernel_size[1]].float())
            error = (results[0] - results[1]).norm() / results[1].norm()
            totals[2] = max(totals[2], error.item())
    return totals

def resumed_run(device, *flags):
    """Return the log of dfgan.py, 1 epoch and resumed to 2, and the seconds of both commands."""
    command = ("--data . --size 64 --nf 8 --batch-size 8 --image-features small --out-dir run "
               f"--encoder-iterations 2 --device {device} --epochs").split()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(24):
            Image.new("RGB", (80, 80), (10 * i, 90, 90)).save(f"{folder}/{i}.png")
            Path(folder, f"{i}.txt").write_text(f"picture {i}\n")
        times = [seconds(lambda: subprocess.run(
            [sys.executable, ROOT / "dfgan.py", *command, epochs, *flags], cwd=folder, check=True,
            capture_output=True), "cpu", 1)[0] for epochs in "12"]
        return Path(folder, "run/log.csv").read_text(), times

def main():
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return

    def stop(*_):
        print("stopped: 9.5 minutes are over")
        os._exit(0)

    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(570)
    bf16 = torch.cuda.is_bf16_supported(False)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
