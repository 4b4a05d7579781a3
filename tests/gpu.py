"""Check and measure the three scripts on a GPU, in less than 4 minutes.

    python tests/gpu.py              # everything
    python tests/gpu.py graph speed  # some parts
    python tests/gpu.py --dry-run    # everything on a CPU: tiny networks, without CUDA graphs

    parity   gradients of one step on the GPU against those on the CPU
    graph    30 steps with common.CUDAGraph against 30 steps without, from the same weights
    speed    images/s of a step, with and without a graph, at the batch sizes of the papers
    batches  milliseconds of one batch of images
    run      dfgan.py on a folder of images with a graph, interrupted and resumed

The output is also written to $OUT/gpu.txt, or to gpu.txt in the current folder.
"""
import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import dfgan
import data
import gan_cls
import stackgan

SECONDS = 235  # the program ends itself then
STEPS = 30  # of training with and without a graph
CAPTURE = common.CUDAGraph.WARM_UP  # steps before the first replay
COMPARED = 5  # losses of the first steps, and of the first steps that are replayed
DROP = 20  # the learning rate is halved in this step, which a graph must see
LIMITS = {  # of relative differences: first losses, losses after the capture, weights
    False: (1e-4, 1e-3, 1e-3),  # float32
    True: (1e-2, 1e-2, 1e-2)}  # bfloat16


class Case(NamedTuple):
    """A network of a paper, and how its script trains it."""

    name: str
    module: ModuleType
    config: dict  # arguments of build()
    size: int  # of the images
    text_dim: int
    text_rms: int  # RMS length of the embeddings
    batch_size: int  # of the paper
    checked_batch_size: int  # of the comparison of steps, which need not be fast


CASES = [
    Case("GAN-INT-CLS", gan_cls, {}, 64, 1024, 1, 64, 16),
    Case("Stage-I", stackgan, {"size": 64}, 64, 1024, 1, 64, 16),
    Case("Stage-II", stackgan, {"size": 256}, 256, 1024, 1, 64, 8),
    Case("DF-GAN", dfgan, {"size": 256}, 256, 256, 3, 32, 8)]
TINY = {"ngf": 2, "ndf": 2}
TINY_CASES = [
    Case("GAN-INT-CLS", gan_cls, TINY, 64, 1024, 1, 4, 4),
    Case("Stage-I", stackgan, {"size": 64, **TINY}, 64, 1024, 1, 4, 4),
    Case("Stage-II", stackgan, {"size": 128, "num_residual": 1, **TINY}, 128, 1024, 1, 4, 4),
    Case("DF-GAN", dfgan, {"size": 32, "nf": 2}, 32, 256, 3, 4, 4)]


# ---- Training steps


class Training:
    """The networks of a case with their optimizers, and one step of D and G as in train()."""

    def __init__(self, case, device, bf16=False):
        torch.manual_seed(0)
        self.case = case
        self.device = device
        self.bf16 = bf16
        self.G, self.D, self.opt_g, self.opt_d = case.module.build(**case.config, device=device)
        for optimizer in (self.opt_g, self.opt_d):
            common.prepare_adam(optimizer, optimizer.defaults["lr"], device)
        if case.name == "Stage-II":
            self.stage1 = stackgan.Stage1(case.config.get("ngf", stackgan.NGF)).eval()
            self.stage1.to(device, memory_format=torch.channels_last)

    def update(self, images, noise, t, t_wrong):
        """Train D, then G, on one batch. Return the losses."""
        module = self.case.module
        device = torch.device(self.device).type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            t_g = t
            more = []
            if module is gan_cls:
                t_g = torch.cat((t, gan_cls.interpolate_embeddings(t)))
                fake = self.G(noise, t_g)
            elif module is stackgan:
                z, eps1, eps2 = noise.split((stackgan.NZ, stackgan.NC, stackgan.NC), 1)
                if self.case.name == "Stage-I":
                    fake, kl = self.G(z, eps1, t)
                else:
                    with torch.no_grad():
                        s0, _ = self.stage1(z, eps1, t)
                    fake, kl = self.G(s0.float(), eps2, t)
                more = [kl]
            else:
                fake = self.G(noise, t)
            losses = module.d_step(self.D, self.opt_d, images, fake[:len(t)], t, t_wrong)
            losses["loss_g"] = module.g_step(self.D, self.opt_g, fake, t_g, *more)
        return losses

    def set_learning_rates(self, factor):
        for optimizer in (self.opt_g, self.opt_d):
            common.set_learning_rate(optimizer, factor * optimizer.defaults["lr"])


def draw_inputs(case, batch_size, seed, device):
    """Return the inputs of update(), with the same values on every device."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(batch_size, 3, case.size, case.size, generator=rng) * 2 - 1
    num_noises = batch_size
    if case.module is gan_cls:
        num_noises += batch_size // 2  # of GAN-INT
    width = case.module.sample_noise(1).shape[1]
    noise = torch.randn(num_noises, width, generator=rng)
    t = F.normalize(torch.randn(batch_size, case.text_dim, generator=rng)) * case.text_rms
    return [x.to(device) for x in (images, noise, t, t.roll(1, 0))]


def flat(tensors):
    return torch.cat([x.detach().cpu().flatten() for x in tensors])


def relative_difference(x, y):
    return ((x - y).norm() / x.norm()).item()


# ---- Parity with the CPU


def parity(case, device, batch_size=4):
    """Return the relative differences of the gradients of G and D to those on the CPU.

    D's learning rate is 0: the first step of Adam is the sign of a gradient, which is noise where
    the gradient is 0."""
    gradients = []
    for where in ("cpu", device):
        training = Training(case, where)
        common.set_learning_rate(training.opt_d, 0.0)
        training.update(*draw_inputs(case, batch_size, 0, where))
        gradients.append([flat(p.grad for p in net.parameters())
                          for net in (training.G, training.D)])
    on_cpu, on_device = gradients
    return [relative_difference(x, y) for x, y in zip(on_cpu, on_device)]


def check_parity(cases, device, report):
    report("parity: relative difference of gradients to those on the CPU, float32")
    for case in cases:
        difference_g, difference_d = parity(case, device)
        verdict = "OK" if max(difference_g, difference_d) < 1e-3 else "WRONG"
        report(f"{case.name:12} G {difference_g:.1e}  D {difference_d:.1e}  {verdict}")


# ---- CUDA graph against no graph


class Trajectory(NamedTuple):
    """What 30 steps of training did."""

    losses: torch.Tensor  # (steps, 2), of D and G
    weights: list  # of G and D, one vector each
    captured: bool


def train_steps(case, device, bf16, graph):
    """Train new networks for 30 steps. graph: a function that wraps update().

    The networks must be new, and no step may run before: a graph fails if a backward pass ran
    outside its stream."""
    training = Training(case, device, bf16)
    update = graph(training.update)
    losses = []
    for step in range(STEPS):
        training.set_learning_rates(0.5 if step >= DROP else 1)
        values = update(*draw_inputs(case, case.checked_batch_size, step, device))
        losses.append([values["loss_d"].item(), values["loss_g"].item()])
    weights = [flat(training.G.parameters()), flat(training.D.parameters())]
    captured = getattr(update, "graph", None) is not None
    return Trajectory(torch.tensor(losses), weights, captured)


def differences(a, b):
    """Return the differences of two trajectories: of the losses of the first steps, of those after
    the capture, and of the weights. Differences of losses are absolute below 1, else relative."""
    of_losses = (a.losses - b.losses).abs() / a.losses.abs().clamp(min=1)
    first = of_losses[:COMPARED].max().item()
    replayed = of_losses[CAPTURE:CAPTURE + COMPARED].max().item()
    weights = [relative_difference(x, y) for x, y in zip(a.weights, b.weights)]
    return [first, replayed, max(weights)]


def judge(eager, again, graphed, bf16):
    """Return the differences of a training with a graph, those of two without, and a verdict.

    Two trainings without a graph can differ too, by the order of sums. A graph may differ by 3
    times as much where this is more than the limits."""
    found = differences(eager, graphed)
    noise = differences(eager, again)
    limits = [max(limit, 3 * x) for limit, x in zip(LIMITS[bf16], noise)]
    if not all(x <= limit for x, limit in zip(found, limits)):  # also where a loss is NaN
        verdict = "WRONG"
    elif graphed.captured:
        verdict = "OK"
    else:
        verdict = "NO GRAPH"
    return found, noise, verdict


def check_graphs(cases, device, report):
    report("graph: differences to a training without, and of two trainings without")
    report("                      losses  replayed   weights    losses  replayed   weights")

    def no_graph(update):
        return update

    def graph(update):
        return common.CUDAGraph(update, "cuda" in device)

    torch.backends.cudnn.deterministic = True
    for bf16 in (False, True) if "cuda" in device else (False,):
        for case in cases:
            eager = train_steps(case, device, bf16, no_graph)
            again = train_steps(case, device, bf16, no_graph)
            graphed = train_steps(case, device, bf16, graph)
            found, noise, verdict = judge(eager, again, graphed, bf16)
            columns = "".join(f"{x:10.1e}" for x in found + noise)
            report(f"{case.name:12} {'bf16' if bf16 else 'float32':7}{columns}  {verdict}")
            free_memory(device)
    torch.backends.cudnn.deterministic = False


# ---- Speed


def free_memory(device):
    gc.collect()
    if "cuda" in device:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(function, n):
    """Return the mean time of n calls of a function of losses.

    Reading a number of the last result waits for the device."""
    start = time.perf_counter()
    for _ in range(n):
        losses = function()
    losses["loss_g"].item()
    return (time.perf_counter() - start) / n


def busy_share(function, device):
    """Return the share of the time of 3 calls in which kernels and copies run on the device."""
    kind = "CUDA" if "cuda" in device else "CPU"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profile:
        duration = 3 * seconds(function, 3)
    busy = 0
    for event in profile.events():
        if event.device_type.name == kind and not event.is_user_annotation:
            busy += event.time_range.elapsed_us()
    return busy / 1e6 / duration


def measure_step(case, device, graph, num_steps):
    """Return a row of the table of speeds."""
    title = f"{case.name:12} {case.batch_size:5} {'yes' if graph else 'no':>5}"
    free_memory(device)
    try:
        training = Training(case, device, bf16="cuda" in device)
        update = common.CUDAGraph(training.update, graph and "cuda" in device)
        inputs = draw_inputs(case, case.batch_size, 0, device)

        def step():
            return update(*inputs)

        first = seconds(step, 1)
        seconds(step, CAPTURE + 2)  # captures the graph
        duration = seconds(step, num_steps)
        busy = busy_share(step, device)
        memory = torch.cuda.max_memory_reserved() / 2**30 if "cuda" in device else 0
    except torch.OutOfMemoryError:
        return f"{title} out of memory"
    if graph and update.graph is None:
        title = title.replace("yes", " no")  # the capture failed, or there is no GPU
    return (f"{title} {case.batch_size / duration:9.0f} {duration * 1e3:8.2f} {busy:5.0%} "
            f"{memory:6.1f} {first:7.1f}")


def measure_speed(cases, device, report, num_steps):
    report("speed: one step of D and G as trained, memory in GiB, seconds of the first step")
    report("             batch graph  images/s       ms  busy memory   first")
    torch.set_float32_matmul_precision("high")  # as in training
    torch.backends.cudnn.allow_tf32 = True
    for case in cases:
        for graph in (False, True):
            report(measure_step(case, device, graph, num_steps))


# ---- Batches and a run


def measure_batches(name, batch_size, device, report, num_batches):
    """Report the time of a batch with 4 captions per image."""
    dataset = data.load_dataset(name, "train", 64)
    batches = data.Batches(dataset, batch_size, device=device, captions_per_image=4)
    batches(0)
    times = []
    for function in (batches.draw, batches):
        start = time.perf_counter()
        for step in range(num_batches):
            result = function(step)
        result[0].sum().item()  # waits for the device
        times.append((time.perf_counter() - start) / num_batches * 1e3)
    report(f"batches: {batch_size} images of 64 px, {times[0]:.2f} ms to draw the numbers, "
           f"{times[1]:.2f} ms in all")


def write_folder(folder, num_images=40):
    """Write toy flowers and their captions as a user would."""
    folder.mkdir()
    records = data.toy("", "train")
    for i, record in enumerate(records[::len(records) // num_images]):
        pixels = data.render_flower(record.attributes, 64)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("\n".join(record.captions))


def check_run(device, report):
    """Train dfgan.py for more steps than a graph needs, then resume, as a user would."""
    network = f"--size 32 --nf 4 --batch-size 8 --device {device} --cuda-graph"
    commands = [
        f"common.py --encoder damsm --image-features small --iterations 5 --device {device}",
        f"dfgan.py {network} --epochs 8",
        f"dfgan.py {network} --epochs 12"]
    status = []
    with tempfile.TemporaryDirectory() as home:
        write_folder(Path(home, "flowers-of-mine"))
        for command in commands:
            script, *flags = command.split()
            arguments = [sys.executable, ROOT / script, "--data", "flowers-of-mine", *flags]
            done = subprocess.run(arguments, cwd=home, capture_output=True, text=True)
            status.append(done.returncode)
            for line in (done.stdout + done.stderr).splitlines():
                if "warning" in line or "rror" in line:
                    report(line)
        log = Path(home, "runs/dfgan-flowers-of-mine/log.csv")
        rows = log.read_text().splitlines() if log.exists() else ["no log"]
    verdict = "OK" if status == [0, 0, 0] and len(rows) == 13 else "WRONG"
    report(f"run: dfgan.py with a graph, resumed: exit statuses {status}  {verdict}")
    report(f"{rows[0]}\n{rows[-1]}")


# ---- Command line

PARTS = ["parity", "graph", "speed", "batches", "run"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"(default: {' '.join(PARTS)})")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny networks")
    args = parser.parse_args(argv)
    parts = args.parts or PARTS
    if not set(parts) <= set(PARTS):
        parser.error(f"a part is one of {', '.join(PARTS)}")
    if not (args.dry_run or torch.cuda.is_available()):
        print("no CUDA GPU: nothing to check or to measure; --dry-run tries the program on a CPU")
        return

    path = Path(os.environ.get("OUT", "."), "gpu.txt")
    device = "cpu" if args.dry_run else "cuda"
    cases = TINY_CASES if args.dry_run else CASES
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # as in training
    start = time.time()
    if not args.dry_run:
        signal.alarm(SECONDS)
    with open(path, "w") as file:
        def report(line):
            print(line, flush=True)
            print(line, file=file, flush=True)

        card = "a CPU (dry run)" if args.dry_run else torch.cuda.get_device_name()
        report(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {card}")
        if "parity" in parts:
            check_parity(cases, device, report)
        if "graph" in parts:
            check_graphs(cases, device, report)
        if "speed" in parts:
            measure_speed(cases, device, report, num_steps=2 if args.dry_run else 50)
        if "batches" in parts:
            measure_batches("toy", 64, device, report, num_batches=2 if args.dry_run else 50)
        if "run" in parts:
            check_run(device, report)
        report(f"{time.time() - start:.0f} seconds")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
