"""Text encoders and their training, evaluation, and what every run needs.

    python common.py --encoder damsm --data flowers             # train a text encoder
    python common.py --encoder damsm --data flowers --evaluate  # its accuracy on unseen classes

char-cnn-rnn: Reed et al., CVPR 2016, arXiv 1605.05395, 1024-d, for gan_cls.py and stackgan.py
damsm: AttnGAN, Xu et al., CVPR 2018, arXiv 1711.10485, 256-d, for dfgan.py
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from data import Progress, UserError


# ---- Processes of torchrun

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device):
    """Join the processes of torchrun, if any. Return the device of this process.

    device: auto, cpu, cuda, cuda:N or mps. Raise UserError if it is not available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|(cuda|mps)(:\d+)?", device):
        raise UserError(f"--device {device} is not one of auto, cpu, cuda, cuda:N, mps")
    if "cuda" in device and not torch.cuda.is_available():
        raise UserError(f"--device {device}: CUDA is not available")
    if "mps" in device and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: MPS is not available")
    if "LOCAL_RANK" in os.environ:
        backend = "gloo"
        if device == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # downloads
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
            Progress.enabled = False
    return device


def reduce_mean(x):
    """Return the mean of a tensor over the processes. Wait for all of them."""
    x = x / world_size()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


@contextlib.contextmanager
def main_process_first():
    """Run the block on rank 0 first; the other ranks then reuse its files."""
    if rank() > 0:
        reduce_mean(torch.zeros(1))  # waits for rank 0
    yield
    if rank() == 0:
        reduce_mean(torch.zeros(1))


def average_gradients(net, optimizer):
    """Let each step of the optimizer first average the gradients over the processes. On GPUs, also
    let the batch norms of the network see the joint batch.

    Not DDP: D runs several times a step, and torch.func.grad bypasses its forward."""
    def all_reduce(*_):
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        flat = reduce_mean(torch.cat([grad.flatten() for grad in grads]))
        means = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads)])

    if world_size() > 1:
        optimizer.register_step_pre_hook(all_reduce)
        if next(net.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)  # in place


# ---- One CUDA graph per training step

class CUDAGraph:
    """Run a function of tensors as one CUDA graph, so that the GPU does not wait for Python.

    The first calls run as usual, on a side stream: cuDNN chooses its algorithms, and Adam creates
    its state. The next call captures the function. From then on, a call copies its inputs and
    replays the graph, which overwrites the outputs of the call before. Without `enabled`, with
    several processes, and after a failed capture, the function runs as usual."""
    WARM_UP = 11

    def __init__(self, function, enabled):
        self.function = function
        self.enabled = enabled and world_size() == 1
        self.calls = 0
        self.graph = None
        if self.enabled:
            self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        self.calls += 1
        if self.enabled and self.calls <= self.WARM_UP:
            return self.warm_up(inputs)
        if self.enabled and self.graph is None:
            self.capture(inputs)
        if not self.enabled:
            return self.function(*inputs)
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.outputs

    def warm_up(self, inputs):
        # Warm-up and capture share one side stream: nodes that accumulate gradients remember the
        # stream of their first use, and must not wait for the default stream in a capture
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, inputs):
        self.inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            print(f"warning: no CUDA graph, training continues without ({str(error)[:99]})")
            self.enabled = False


def prepare_adam(optimizer, lr, device):
    """Prepare Adam for a CUDA graph, which sees a new learning rate only in a tensor on the device.

    Call this after load_state_dict, which replaces both settings."""
    # On a CPU, float64 gives the bits of a number; MPS has no float64
    dtype = torch.float64 if device == "cpu" else torch.float32
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr, dtype=dtype, device=device)
        group["capturable"] = True


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


# ---- Runs

def run(main):
    """Run main(). Return its exit status, 2 after an error of the user, 130 after Ctrl-C."""
    try:
        return main()
    except (UserError, OSError) as error:  # OSError: no network, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; a text or style encoder in training is not saved", file=sys.stderr)
        return 130


class GracefulStop:
    """Catch Ctrl-C and SIGTERM, so that training ends after a step and saves."""

    def __init__(self):
        self.signal = 0
        self.handlers = {number: signal.signal(number, self.handle)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, frame):
        if self.signal and world_size() == 1:  # torchrun repeats signals
            sys.exit(128 + number)
        self.signal = number
        print("\nsaving; run the same command to resume", file=sys.stderr)

    def requested(self):
        """Return whether any process has got a signal, the same in all processes."""
        return reduce_mean(torch.tensor(self.signal)).item() > 0

    def finish(self):
        """Restore the handlers: a signal ends the program at once."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Means:
    """Average each named loss over batches and processes."""

    def __init__(self):
        self.sums = {}
        self.count = 0

    def add(self, losses):
        """Add the losses of a batch, a dict of scalars. A CUDA graph may overwrite them later."""
        if self.count == 0:  # in float32: a long sum in bfloat16 would stop growing
            self.sums = {name: torch.zeros_like(value, dtype=torch.float32)
                         for name, value in losses.items()}
        torch._foreach_add_(list(self.sums.values()), list(losses.values()))
        self.count += 1

    def means(self):
        """Return a dict of floats."""
        values = reduce_mean(torch.stack(list(self.sums.values())) / self.count)
        assert values.isfinite().all(), f"a loss is not finite: {self.sums}"
        return dict(zip(self.sums, values.tolist()))

    def summary(self):
        return "  ".join(f"{name} {value:.2f}" for name, value in self.means().items())


def save_checkpoint(path, state):
    """Write a dict on rank 0, with the state dicts of networks and optimizers. An error leaves an
    older file as it was."""
    if rank() == 0:
        plain = dict(state)
        for name, part in state.items():
            if hasattr(part, "state_dict"):
                plain[name] = part.state_dict()
        try:
            with data.atomic_write(path) as temporary:
                torch.save(plain, temporary)
        except (OSError, RuntimeError) as error:  # a full disk
            raise UserError(f"cannot write {path}, an older file is kept (is the disk full? "
                            f"{str(error)[:99]})")


def load_checkpoint(path, kind):
    """Return the dict of a checkpoint. Raise UserError if it is damaged or of another kind."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        assert state["kind"] == kind, state["kind"]
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of {kind} ({str(error)[:99]})")
    return state


def check_writable(folder):
    """Raise UserError if nothing can be written to a folder. It is created if necessary."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error}); set another --out-dir, or run the "
                        "command in another folder")


def save_grid(path, images, columns, captions):
    """Write images (N, 3, S, S) in [-1, 1] as a PNG, and captions beside it, one per line."""
    from torchvision.utils import save_image  # takes a second
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(images / 2 + 0.5, path, nrow=columns)
        path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def save_log(path, history):
    """Write a list of dicts as CSV on rank 0."""
    if rank() == 0:
        columns = dict.fromkeys(key for row in history for key in row)  # in this order
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(history)


def short_hash(*values):
    """Return 12 hexadecimal digits that depend on all values, and on every byte of tensors."""
    key = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            key.update(value.detach().cpu().numpy().tobytes())
        else:
            key.update(repr(value).encode())
    return key.hexdigest()[:12]


def sample_name(captions, *details):
    """Return a file name for captions. It differs where the captions or the details differ."""
    words = re.sub("[^a-z0-9]+", "-", " ".join(captions).lower())[:80].strip("-")
    return f"{words}-{short_hash(captions, details)[:6]}"


def save_samples(path, draw, noise, embeddings, args):
    """Write an image per row of noise and embeddings, (N, ...) each: a grid, path.png, or with
    --num-images numbered files in the folder `path`. Print the captions and the path."""
    if args.num_images:
        for old in path.glob("[0-9]*.*"):  # of an earlier call
            old.unlink()
        for i in range(len(noise)):
            # --interpolate has more rows than captions
            caption = args.captions[min(i // args.num_images, len(args.captions) - 1)]
            image = draw(noise[i:i + 1], embeddings[i:i + 1])
            save_grid(path / f"{i:05}.png", image, 1, [caption])
    else:
        path = path.with_suffix(".png")
        save_grid(path, draw(noise, embeddings), args.samples_per_caption, args.captions)
    print("\n".join(args.captions))
    print(path)


def first_step(checkpoint, dataset, batches):
    """Return the step at which a run continues: that of its checkpoint or, if its dataset has
    changed, the first of the next epoch. Raise UserError if most captions are others."""
    old = checkpoint.get("caption_hashes")
    new = dataset.caption_hashes()
    if old is None or torch.equal(old, new):
        return checkpoint["step"]
    if max(share_known(new, old), share_known(old, new)) < 0.5:
        raise UserError(f"{dataset.name} has other captions than the folder of that name that the "
                        "run was trained on; give that folder as --data, or set another --out-dir")
    print(f"the dataset has changed: {len(dataset)} training images now; "
          f"training goes on after epoch {checkpoint['epoch']}")
    return checkpoint["epoch"] * len(batches)


def share_known(hashes, known):
    """Return the share of caption hashes (M,) that are among the known ones."""
    return torch.isin(hashes, known).float().mean().item()


def announce(args, G, D, dataset, step, num_steps):
    """Print the sizes of the networks and of the run, and whether anything is left to do.

    Raise UserError if --eval-every needs the FID network, and it is not available."""
    size_g = sum(p.numel() for p in G.parameters())
    size_d = sum(p.numel() for p in D.parameters())
    print(f"parameters: G {size_g:,}, D {size_d:,}")
    print(f"{len(dataset)} images, {num_steps} steps on {args.device}, to {args.out_dir}")
    if step >= num_steps:
        done = step * args.epochs // num_steps
        print(f"already trained for {done} epochs; a larger --epochs trains on")
    elif args.eval_every and dataset.name != "toy":
        FIDInception()  # if it is not available, fail now and not after an epoch


class TrainingProgress(Progress):
    """Print after five steps also how long training will take.

    faster_flags: flags of a smaller network, for a warning if a CPU would need over a day."""

    def __init__(self, args, label, step, num_steps, faster_flags):
        super().__init__(num_steps * args.batch_size, label, done=step * args.batch_size)
        self.device = args.device
        self.faster_flags = faster_flags

    def update(self, n):
        super().update(n)
        if self.enabled and self.done == self.initial + 5 * n:
            seconds = (time.time() - self.start) / (5 * n)  # per image
            hours = seconds * (self.total - self.done) / 3600
            minutes = math.ceil(hours * 60)
            print(f"about {hours:.0f} hours" if hours > 2 else f"about {minutes} minutes")
            if hours > 24 and self.device == "cpu":
                print(f"warning: on a CPU, a new run with {self.faster_flags} is much faster")


# ---- Flags

def positive_int(text):
    """Convert the value of a flag to an integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def add_shared_flags(parser):
    """Add the flags that all scripts have."""
    add = parser.add_argument
    add("--data", default="toy", help="toy, flowers, cub, coco or the path of a folder")
    add("--root", default="datasets", help="where the folders flowers, cub and coco are")
    add("--out-dir", help="folder of the run (default: runs/<script>-<data>)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--seed", type=int, default=0, help="seed of a new run, or of samples")
    add("--ema", type=float, default=0.999,
        help="decay of the average of G, which draws the samples (in no paper)")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="train in bfloat16 (default: on if CUDA supports it)")
    add("--cuda-graph", action=argparse.BooleanOptionalAction,
        help="run a training step as one CUDA graph (default: off; not yet run on a GPU)")
    add("--text-encoder", metavar="FILE",
        help="text encoder of a new run (default: a released one, or one trained here)")
    add("--eval-every", type=positive_int, metavar="EPOCHS",
        help="log the metrics of --evaluate every so many epochs (default: never; toy: at the end)")
    add("--samples-per-caption", type=positive_int, default=8, help="images in a row of a grid")
    add("--num-images", type=positive_int, metavar="N",
        help="write N image files per caption instead of a grid")
    add("--fid-samples", type=positive_int, default=30000, help="generated images for the FID")
    add("--r-precision-encoder", metavar="FILE",
        help="DAMSM for the R-precision (default: runs/damsm-<data>/encoder.pt)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--sample", nargs="+", metavar="CAPTION", help="draw images of captions")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="draw from caption A to caption B")
    add("--interpolate-noise", nargs="+", metavar="CAPTION", help="draw from one noise to another")
    add("--evaluate", action="store_true", help="print the FID and other metrics")


def describe_defaults(parser, presets):
    """Add the defaults, also those of the presets, to the help texts of all flags."""
    parser.usage = "python %(prog)s [--help] [flags]"
    for action in parser._actions:
        # 0 is a default, and equal to False
        if action.default is not False and action.default not in (None, argparse.SUPPRESS):
            defaults = f"default: {action.default}"
            for name, preset in presets.items():
                if action.dest in preset:
                    defaults += f"; {name}: {preset[action.dest]}"
            action.help += f" ({defaults})"


def run_folder(name, args):
    return Path(args.out_dir or f"runs/{name}-{Path(args.data).resolve().name}")


def is_training(args):
    return not (args.sample or args.interpolate or args.interpolate_noise or args.evaluate)


def is_same_folder(a, b):
    """Return whether two values of --data are folders of the same name. A folder may move."""
    if a in data.DATASETS or b in data.DATASETS:
        return False
    return Path(a).resolve().name == Path(b).resolve().name


def find_checkpoint(name, args):
    """Return the path of the run's checkpoint or, to draw or evaluate where there is no run, of a
    pretrained model in weights/. Return None if neither exists."""
    path = run_folder(name, args) / "last.pt"
    if path.exists():
        return path
    if args.out_dir or is_training(args) or args.data not in data.DATASETS:
        return None
    dataset = "flowers" if args.data == "toy" else args.data
    path = Path(__file__).parent / "weights" / f"{name}-{dataset}.pt"
    return path if path.exists() else None


def parse_args(name, parser, presets, resume_names, path, argv):
    """Return all flags, and the checkpoint at `path` or None. Join the processes of torchrun.

    The defaults of the flags `resume_names` are those of the checkpoint. Other defaults are those
    of the preset of the data, else of the parser. Exit with status 2 after a wrong flag."""
    args = parser.parse_args(argv)
    device = init_distributed(args.device)
    training = is_training(args)

    # The checkpoint, and the flags that a run keeps
    checkpoint = None
    resume_args = {}
    if path:
        checkpoint = load_checkpoint(path, name)
        saved = checkpoint["args"]
        resume_args = {flag: saved[flag] for flag in resume_names if flag in saved}
        if not training:
            resume_args.pop("seed", None)  # samples have a seed of their own
        note = checkpoint.get("note", "")
        print(f"{path}: {checkpoint['step']} steps on {resume_args['data']}{note}")

    # Parse again with the right defaults
    dataset = resume_args.get("data", args.data)
    preset = presets.get(dataset if dataset in data.DATASETS else "folder", {})
    parser.set_defaults(bf16="cuda" in device and torch.cuda.is_bf16_supported(False))
    parser.set_defaults(**(preset | resume_args))
    args = parser.parse_args(argv)

    # Refuse flags that contradict the run or each other
    for flag, value in resume_args.items():
        given = getattr(args, flag)
        if given != value and not (flag == "data" and is_same_folder(given, value)):
            parser.error(f"--{flag.replace('_', '-')} {given} contradicts {path}, which has "
                         f"{value}; omit the flag, or set --out-dir for a new run")
    if checkpoint and args.text_encoder:
        parser.error(f"--text-encoder is for a new run, but {path} exists; set --out-dir")
    if training and args.batch_size % world_size():
        parser.error(f"--batch-size must be a multiple of the {world_size()} processes")
    if training and args.batch_size < 2 * world_size():
        parser.error("--batch-size must be at least 2 per process: wrong captions and batch norm "
                     "need two images")
    args.captions = args.sample or args.interpolate or args.interpolate_noise
    if args.captions and not all(caption.strip() for caption in args.captions):
        parser.error("a caption is blank")

    # The values that are not as typed
    if path and path.parent.name == "weights" and not args.out_dir:
        args.out_dir = f"runs/{path.stem}-weights"  # leaves the folder of a later run free
    args.out_dir = run_folder(name, args)
    args.data = data.dataset_id(args.data)
    args.device = device
    args.cuda_graph = args.cuda_graph and "cuda" in device
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes are constant
    return args, checkpoint


# ---- Text encoders

class TextEncoder(nn.Module):
    """Embed captions. A subclass has

    split(caption) -> its characters or words, which `unit` names; numbers: their numbers from 1;
    tokenize(captions) -> numbers (B, T), 0 where nothing is read; embed(tokens) -> (B, dim);
    config, part of the state dict: "vocabulary", "min_prompt_length", "rms", "scale"."""

    def get_extra_state(self):
        return self.config

    def set_extra_state(self, config):
        self.config = config

    @torch.no_grad()
    def encode(self, captions):
        """Return the embeddings of captions, (N, dim)."""
        self.eval()
        device = next(self.parameters()).device
        rows = []
        bar = Progress(len(captions), "embedding", "captions")
        for i in range(0, len(captions), 256):
            rows.append(self.embed(self.tokenize(captions[i:i + 256]).to(device)))
            bar.update(len(rows[-1]))
        return torch.cat(rows) * self.config.get("scale", 1)

    def check_captions(self, captions):
        """Print the share of the captions that is read. Raise UserError if all read alike."""
        total = sum(len(self.split(caption)) for caption in captions)
        read = 0
        for i in range(0, len(captions), 256):
            read += self.tokenize(captions[i:i + 256]).count_nonzero().item()
        share = read / max(1, total)
        warning = "warning: " if share < 0.95 else ""
        print(f"{warning}the text encoder reads {share:.1%} of the {self.unit} of the captions")
        distinct = list(dict.fromkeys(captions))[:1000]
        tokens = self.tokenize(distinct)
        if len(distinct) > 1 and (tokens == tokens[0]).all():
            raise UserError(f"the text encoder reads all captions alike; it knows the {self.unit} "
                            f"{' '.join(list(self.numbers)[:40])} ...; translate the "
                            "captions, or train dfgan.py, whose text encoder learns their words")

    def encode_prompts(self, captions):
        """Return the embeddings of prompts, a caption or a list, (N, dim).

        Short prompts are repeated up to min_prompt_length: CharCNNRNN saw few blanks in training.
        Raise UserError if nothing of a prompt is known."""
        captions = [captions] if isinstance(captions, str) else captions
        min_length = self.config.get("min_prompt_length", 0)
        prompts = []
        for caption in captions:
            parts = self.split(caption)
            unknown = [part for part in parts if part not in self.numbers]
            if unknown == parts:
                raise UserError(f"the text encoder knows nothing of {caption!r}")
            if unknown:
                print("warning: unknown to the text encoder:", " ".join(unknown))
            num_read = self.tokenize([caption]).count_nonzero().item()
            if num_read < len(parts) - len(unknown):
                print(f"warning: the text encoder reads {num_read} {self.unit} of {caption!r}")
            times = (min_length + 1) // (len(caption) + 1)  # with a blank between two
            prompts.append(" ".join([caption] * max(1, times)))
        return self.encode(prompts)


class CharCNNRNN(TextEncoder):
    """Embed characters, (B, 1024): three convolutions, a GRU, its mean state (ICML 2016 code)."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
    numbers = {c: i for i, c in enumerate(alphabet, 1)}  # of the two "-" the second counts
    unit = "characters"
    dim = 1024

    def __init__(self, widths=(384, 512, 512)):
        super().__init__()
        a, b, c = widths
        self.conv1 = nn.Conv1d(70, a, 4)
        self.conv2 = nn.Conv1d(a, b, 4)
        self.conv3 = nn.Conv1d(b, c, 4)
        names = ("i2h", "i2h_update", "i2h_reset", "h2h", "h2h_update", "h2h_reset")
        self.rnn = nn.ModuleDict({name: nn.Linear(c, c) for name in names})
        self.emb_proj = nn.Linear(c, 1024)
        self.config = {}

    def split(self, caption):
        return list(caption.lower())

    def tokenize(self, captions, rng=None):
        """Return places in the alphabet (B, 201). Other characters are blanks, 0."""
        rows = [caption.lower()[:201].ljust(201, "\0") for caption in captions]
        return torch.tensor([[self.numbers.get(c, 0) for c in row] for row in rows])

    def embed(self, tokens):
        x = F.one_hot(tokens, 71)[:, :, 1:].float().mT  # (B, 70, 201)
        x = F.max_pool1d(F.threshold(self.conv1(x), 1e-6, 0), 3)  # (B, 384, 66)
        x = F.max_pool1d(F.threshold(self.conv2(x), 1e-6, 0), 3)  # (B, 512, 21)
        x = F.threshold(self.conv3(x), 1e-6, 0).mT  # (B, 18, 512)
        rnn = self.rnn
        new = rnn.i2h(x)
        update = rnn.i2h_update(x)
        reset = rnn.i2h_reset(x)
        h = total = new[:, 0].tanh()
        for t in range(1, x.shape[1]):
            z = (update[:, t] + rnn.h2h_update(h)).sigmoid()
            r = (reset[:, t] + rnn.h2h_reset(h)).sigmoid()
            # z weighs the candidate: the opposite of torch.nn.GRU
            h = z * (new[:, t] + rnn.h2h(r * h)).tanh() + (1 - z) * h
            total = total + h
        return self.emb_proj(total / x.shape[1])  # (B, 1024)


class DAMSMTextEncoder(TextEncoder):
    """Embed words by a bi-LSTM: its states (B, 256, T) and, for the sentence, the last (B, 256).

    vocabulary[0] is padding."""
    unit = "words"
    dim = 256

    def __init__(self, vocabulary):
        super().__init__()
        self.config = {"vocabulary": vocabulary}
        self.numbers = {word: i for i, word in enumerate(vocabulary)}
        self.encoder = nn.Embedding(len(vocabulary), 300)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(300, 128, batch_first=True, bidirectional=True)

    @staticmethod
    def split(caption):
        # Chinese and Japanese have no blanks: each of their characters is a word
        caption = re.sub("([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", caption.lower())
        return re.findall(r"\w+", caption)

    def tokenize(self, captions, rng=None):
        """Return word numbers (B, T). Of more than 18 words a random 18 are kept, in order."""
        rng = rng or torch.Generator().manual_seed(0)
        rows = []
        for caption in captions:
            words = [word for word in self.split(caption) if word in self.numbers]
            row = torch.tensor([self.numbers[word] for word in words] or [0])
            kept = torch.randperm(len(row), generator=rng)[:18].sort().values
            rows.append(row[kept])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, tokens):
        lengths = tokens.count_nonzero(1).clamp(min=1).cpu()
        x = self.drop(self.encoder(tokens))
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        words, (h, _) = self.rnn(x)
        words, _ = nn.utils.rnn.pad_packed_sequence(words, batch_first=True)
        return words.mT, h.transpose(0, 1).flatten(1)

    def embed(self, tokens):
        return self(tokens)[1]


TEXT_ENCODERS = {"char-cnn-rnn": CharCNNRNN, "damsm": DAMSMTextEncoder}


def text_encoder_from_state_dict(state):
    """Return a frozen text encoder of either kind."""
    if "conv1.weight" in state:
        encoder = CharCNNRNN([len(state[f"conv{i}.weight"]) for i in (1, 2, 3)])
    else:
        encoder = DAMSMTextEncoder(state["_extra_state"]["vocabulary"])
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)


# ---- Losses of the text encoders

GAMMA1 = 4  # of DAMSM: of the attention to regions (eq. 9)
GAMMA2 = 5  # of the match of image and caption (eq. 10)
GAMMA3 = 10  # of the matches in a batch (eq. 11)


def symmetric_loss(loss, score, classes):
    """Return loss(score, target) over the rows plus over the columns of score (B, B).

    Right pairs are on the diagonal. Other pairs of the same class are left out (AttnGAN's code)."""
    same_class = (classes[:, None] == classes).fill_diagonal_(False)
    score = score.masked_fill(same_class, -torch.inf)
    target = torch.arange(len(score), device=score.device)
    return loss(score, target) + loss(score.T, target)


def joint_embedding_loss(image, text, classes):
    """Return the mean of max(0, 1 + wrong - right) of inner products of images and texts (B, 1024)
    (Reed et al., CVPR 2016)."""
    return symmetric_loss(F.multi_margin_loss, image @ text.T, classes)


def sentence_loss(image, sentence, classes):
    """Return the DAMSM loss of images and sentences, (B, 256) each (AttnGAN, section 3.2)."""
    score = F.normalize(image) @ F.normalize(sentence).T
    return symmetric_loss(F.cross_entropy, GAMMA3 * score, classes)


def word_loss(regions, words, lengths, classes):
    """Return the DAMSM loss of regions (B, 256, N) and words (B, 256, T) of captions of lengths
    (B,). Each word attends to the regions of every image (AttnGAN, eq. 7 to 12)."""
    padding = torch.arange(words.shape[2], device=words.device) >= lengths[:, None]  # (B, T)
    score = torch.einsum("idn,jdt->ijnt", regions, words)  # of image i and caption j
    attention = score.masked_fill(padding[:, None], -torch.inf).softmax(3)  # eq. 8
    attention = (GAMMA1 * attention).softmax(2)  # eq. 9
    context = torch.einsum("ijnt,idn->ijtd", attention, regions)
    norms = context.norm(dim=3) * words.norm(dim=1)  # padding: 0
    dot = (score * attention).sum(2)  # of context and word, (B, B, T)
    cosine = dot / norms.clamp(min=1e-6)
    # eq. 10; as released, without the exponent 1 / GAMMA2
    match = (GAMMA2 * cosine).masked_fill(padding, -torch.inf).logsumexp(2)
    return symmetric_loss(F.cross_entropy, GAMMA3 * match, classes)


# ---- Image features

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


def load_inception_weights():
    """Return the state dict of the FID network, downloaded once. Raise UserError without it."""
    try:
        return torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True, weights_only=True)
    except Exception as error:
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise UserError(f"cannot download the Inception network ({error}); save {INCEPTION} in "
                        f"{folder}. To train a text encoder without it, run python common.py with "
                        "your --data and --image-features small")


class FIDInception(nn.Module):
    """pytorch-fid's Inception-v3. Turn images (B, 3, H, W) in [-1, 1] into pooled features
    (B, 2048) and regions (B, 768, 36), 6 x 6 means of AttnGAN's 17 x 17 in 8 times less memory.

    head: the weights (1008, 2048) of the class scores, or None if the file has none."""

    def __init__(self):
        super().__init__()
        from torchvision.models import inception_v3  # takes a second
        weights = load_inception_weights()
        net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(weights, strict=False)
        net.fc = nn.Identity()
        self.net = net.eval().to(memory_format=torch.channels_last)
        self.register_buffer("head", weights.get("fc.weight"))
        # Unlike torchvision's, the FID's average pools ignore padding, and its last pool is a
        # maximum: the layer after each pool gets self.x, the input of the block, pooled anew
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
                if name == "Mixed_7c":
                    pool = nn.MaxPool2d(3, 1, 1)
                block.branch_pool.register_forward_pre_hook(lambda _, x, pool=pool: pool(self.x))

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, x):
        self.x = F.interpolate(x, 299, mode="bilinear")  # the input of the next layer
        for name, layer in self.net.named_children():
            self.x = layer(self.x)
            if name == "Mixed_6e":
                regions = F.adaptive_avg_pool2d(self.x, 6).flatten(2)
        return self.x.flatten(1), regions


def inception_features(dataset, device):
    """Return pooled features and regions of images of 299 px, (N, 2048 + 768 * 36) in float16."""
    net = FIDInception().to(device)
    rows = []
    for block in data.load_images(dataset.records, 299, "Inception features"):
        images = torch.from_numpy(block).to(device).float() / 127.5 - 1
        pooled, regions = net(images)
        rows.append(torch.cat((pooled, regions.flatten(1)), 1).half().cpu())
    return torch.cat(rows)


class ImageEncoder(nn.Module):
    """Turn rows of inception_features into global (B, dim) and local features (B, 256, N).

    With `small`, turn images (B, 3, 64, 64) into the same, by a CNN that is trained too."""

    def __init__(self, dim, small):
        super().__init__()
        cnn = nn.Sequential()
        for a, b in ((3, 24), (24, 48), (48, 96), (96, 128)):
            cnn.extend([nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()])
        self.cnn = cnn if small else None
        width = 128 if small else 2048
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.global_proj = nn.Linear(width, dim)
        self.local_proj = nn.Conv1d(128 if small else 768, 256, 1, bias=False)

    def embed(self, pooled):
        return self.global_proj(self.norm(pooled))

    def forward(self, x):
        if self.cnn:
            x = self.cnn(x)  # (B, 128, 4, 4)
            pooled = x.mean((2, 3))
            regions = x.flatten(2)
        else:
            pooled = x[:, :2048]
            regions = x[:, 2048:].unflatten(1, (768, 36))
        return self.embed(pooled), self.local_proj(regions)


# ---- Training of the text encoders

def train_text_encoder(kind, name, root, device, path, iterations=None, features=None):
    """Train a text encoder on a dataset and save it with its image encoder.

    kind: char-cnn-rnn or damsm. features: those of images, inception or small. Defaults: one
    iteration per image, at least 300 and at most 3,000, and inception; toy: 1,000 and small."""
    check_writable(path.parent)
    # Data, and the settings of the two kinds; toy is simple enough for less
    toy = name == "toy"
    char = kind == "char-cnn-rnn"
    features = features or ("small" if toy else "inception")
    train_set = data.load_dataset(name, "train", 64, root)
    default = 1000 if toy else min(max(len(train_set), 300), 3000)
    iterations = iterations or default
    print(f"training the text encoder {path}: {iterations} iterations, {features} image features; "
          "it is not saved before it ends")
    torch.manual_seed(0)
    if char:
        batch_size = 40
        lr = 1e-3 if toy else 3e-4
        decay = 0.02  # of lr, over all iterations
        beta1 = 0.9
        encoder = CharCNNRNN((96, 128, 128) if toy else (384, 512, 512))
        lengths = sorted(map(len, train_set.captions))
        encoder.config["min_prompt_length"] = lengths[len(lengths) // 1000]
    else:
        batch_size = 48
        lr = 2e-3
        decay = 0.1
        beta1 = 0.5
        words = DAMSMTextEncoder.split(" ".join(train_set.captions))
        encoder = DAMSMTextEncoder(["<end>"] + list(dict.fromkeys(words)))
    encoder.check_captions(train_set.captions)

    # Networks and optimizer
    image_encoder = ImageEncoder(encoder.dim, features == "small")
    norm = nn.BatchNorm1d(encoder.dim).requires_grad_(False)
    if char:
        nn.init.zeros_(image_encoder.global_proj.weight)  # at first, all images are alike
    nets = nn.ModuleList([encoder, image_encoder, norm]).to(device)
    optimizer = torch.optim.Adam(nets.parameters(), lr, (beta1, 0.999))
    inputs = None if features == "small" else inception_features(train_set, device)

    rng = torch.Generator().manual_seed(0)
    bar = Progress(iterations, f"training {kind}", "iterations")
    for step in range(iterations):
        # A batch of random images with one caption each
        index = torch.randperm(len(train_set), generator=rng)[:batch_size]
        numbers = train_set.sample_captions(index, 1, rng)[:, 0]
        captions = [train_set.captions[i] for i in numbers]
        tokens = encoder.tokenize(captions, rng).to(device)
        x = train_set.center_crop(index) if inputs is None else inputs[index].float()
        classes = train_set.classes[index].to(device)

        # The loss of the pairs
        image, regions = image_encoder(x.to(device))
        if char:
            loss = joint_embedding_loss(image, norm(encoder.embed(tokens)), classes)
        else:
            words, sentence = encoder(tokens)
            lengths = tokens.count_nonzero(1).clamp(min=1)
            loss = sentence_loss(image, sentence, classes)
            loss = loss + word_loss(regions, words, lengths, classes)

        # The step
        optimizer.param_groups[0]["lr"] = lr * decay ** (step / iterations)
        optimizer.zero_grad()
        loss.backward()
        if not char:
            nn.utils.clip_grad_norm_(encoder.parameters(), 0.25)
        optimizer.step()
        bar.note = f"loss {loss.item():.3f}"
        bar.update()

    # Fold the norm into the last layer, measure the length of the embeddings, and save
    nets.eval()
    if char:
        encoder.emb_proj = nn.utils.fuse_linear_bn_eval(encoder.emb_proj, norm)
    x = encoder.encode(train_set.captions[::len(train_set.captions) // 1000 + 1])
    encoder.config["rms"] = rms_length(x).item()
    save_checkpoint(path, {
        "kind": "text encoder", "data": name, "iterations": iterations, "features": features,
        "caption_hashes": train_set.caption_hashes(),
        "text_encoder": encoder,
        "image_encoder": image_encoder})


def rms_length(x):
    """Return the root mean square of the lengths of embeddings (N, dim)."""
    return x.square().sum(1).mean().sqrt()


# ---- Choice of the text encoder

PRETRAINED = {  # released DAMSM: url, and files with the start of their sha256; the encoder is last
    "cub": ("https://raw.githubusercontent.com/taoxugit/AttnGAN/master/eval/data/",
            {"captions.pickle": "84e9f81218102873", "text_encoder200.pth": "d7278a9b4801633e"}),
    "coco": ("https://huggingface.co/mediasynthesismuseum/attngan-coco/resolve/main/",
             {"captions.pickle": None, "text_encoder100.pth": "24cf394756359d5c"})}


class RestrictedUnpickler(pickle.Unpickler):
    """Load plain containers only. Other pickles can run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{name} is not allowed")


def load_text_encoder(path):
    """Return the frozen text encoder of a file, one trained here or released. Raise UserError if it
    cannot be read. A released DAMSM needs captions.pickle beside it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("text_encoder", state)
        config = state.setdefault("_extra_state", {})
        if "encoder.weight" in state and not config:
            with open(Path(path).with_name("captions.pickle"), "rb") as file:
                words = RestrictedUnpickler(file, encoding="latin1").load()[2]
            config["vocabulary"] = [words[i] for i in range(len(words))]
        return text_encoder_from_state_dict(state)
    except Exception as error:
        raise UserError(f"cannot load the text encoder {path} ({str(error)[:99]})")


def download_damsm(name, root):
    """Return the path of the released DAMSM text encoder of a dataset, downloaded once."""
    url, files = PRETRAINED[name]
    folder = Path(root, name, "damsm")
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in files.items():
        if not (folder / file).exists():
            torch.hub.download_url_to_file(url + file, folder / file, sha256)
    return folder / file  # the last


def encoder_path(kind, name):
    return Path(f"runs/{kind}-{Path(name).name}/encoder.pt")


def trained_encoder(kind, dataset, root, device):
    """Return the path of the text encoder of a dataset. Train it if there is none, or if it was
    trained with less than nine tenths of the captions."""
    path = encoder_path(kind, dataset.name)
    known = 0
    features = None
    if path.exists():
        old = load_checkpoint(path, "text encoder")
        features = old.get("features")  # as chosen for the older encoder
        known = share_known(dataset.caption_hashes(), old.get("caption_hashes", torch.empty(0)))
        if known < 1:
            print(f"{path} was trained with {known:.0%} of these captions; it is",
                  "kept" if known >= 0.9 else "trained anew")
    if known < 0.9:
        train_text_encoder(kind, dataset.name, root, device, path, features=features)
    return path


def get_text_encoder(kind, dataset, args, checkpoint=None):
    """Return the frozen text encoder of the checkpoint, else of the file --text-encoder, else a
    released DAMSM (cub, coco), else one trained here.

    Embeddings of encoders trained here are rescaled to the RMS length --embedding-rms. Long ones
    swamp z in GAN-CLS. D cannot tell short ones apart in StackGAN and, by MA-GP, in DF-GAN."""
    if checkpoint:
        return text_encoder_from_state_dict(checkpoint["text_encoder"]).to(args.device)
    path = args.text_encoder
    if not path and kind == "damsm" and dataset.name in PRETRAINED:
        path = download_damsm(dataset.name, args.root)
    if not path:
        path = trained_encoder(kind, dataset, args.root, args.device)
    encoder = load_text_encoder(path)
    if not isinstance(encoder, TEXT_ENCODERS[kind]):
        raise UserError(f"{path} is not an encoder of the kind {kind}")
    if "rms" in encoder.config:
        encoder.config["scale"] = args.embedding_rms / encoder.config["rms"]
    return encoder.to(args.device)


def embed_captions(encoder, dataset):
    """Return the embeddings of all captions of a dataset, (M, dim), cached beside its images."""
    weights = nn.utils.parameters_to_vector(encoder.parameters())
    key = short_hash(weights, encoder.config, dataset.captions)
    path = Path(f"{dataset.cache}-{key}.pt")
    if path.exists():
        x = load_checkpoint(path, "embeddings")["x"].to(weights.device)
    else:
        encoder.check_captions(dataset.captions)
        x = encoder.encode(dataset.captions)
        save_checkpoint(path, {"kind": "embeddings", "x": x})
    print(f"RMS length of the embeddings: {rms_length(x):.2f}; if long, G may ignore the noise")
    return x


# ---- Evaluation

def frechet_distance(x, y):
    """Return the FID of features (N, D) and (M, D), in float64 (Heusel et al. 2017, eq. 6):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of means and covariances."""
    x = x.double()
    y = y.double()
    cov1 = torch.cov(x.T)
    cov2 = torch.cov(y.T)
    assert cov1.isfinite().all() and cov2.isfinite().all(), "features are not finite"
    # (C1 C2)^(1/2) has the trace of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric. The
    # eigenvalues of C1 C2 itself may not converge if few images differ
    values, vectors = torch.linalg.eigh(cov1)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    squares = torch.linalg.eigvalsh(root1 @ cov2 @ root1)
    trace = (cov1 + cov2).trace() - 2 * squares.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + trace).item()


def inception_score(logits, splits=10):
    """Return the mean over splits of exp E KL(p(y|x) || p(y)), of logits (N, classes) in random
    order (Salimans et al. 2016)."""
    scores = []
    for part in logits.double().tensor_split(min(splits, len(logits))):
        p = part.softmax(1)
        divergence = (p * (part.log_softmax(1) - p.mean(0).log())).sum(1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


def r_precision(image, captions, text, classes):
    """Return the share of images (N, D) that have a larger cosine with their own caption than with
    99 captions of other classes (AttnGAN, section 4.1).

    captions: (N,), the caption number of each image. text (M, D), classes (M,): of all captions."""
    rng = torch.Generator().manual_seed(0)
    own_classes = classes[captions]
    wrong = data.sample_other_class(classes.argsort(), classes.bincount(), own_classes, 99, rng)
    candidates = torch.cat((captions[:, None], wrong), 1)  # (N, 100)
    hits = 0
    for x, c in zip(image.split(64), candidates.split(64)):
        score = F.cosine_similarity(x[:, None], text[c], 2)
        hits += (score[:, 0] >= score.amax(1) - 1e-6).sum().item()  # equal captions are right
    return hits / len(image)


def class_means(x, classes):
    """Return the mean of the rows (N, D) of each class, (C, D)."""
    members = F.one_hot(classes).to(x).T  # (C, N)
    return members @ x / members.sum(1, keepdim=True)


def joint_embedding_accuracy(image, text, image_classes, text_classes):
    """Return the accuracies of the classifiers f_v and f_t (Reed et al., CVPR 2016, eq. 2 and 3).

    f_v is the class whose captions (M, D) have the largest mean inner product with an image (N, D).
    f_t is the class whose images have it with a caption. The mean of inner products is the inner
    product with the mean."""
    f_v = (image @ class_means(text, text_classes).T).argmax(1)
    f_t = (text @ class_means(image, image_classes).T).argmax(1)
    right_v = f_v == image_classes
    right_t = f_t == text_classes
    return right_v.float().mean().item(), right_t.float().mean().item()


def evaluate_text_encoder(kind, name, root, device):
    """Print the accuracies of a trained text encoder on the test classes."""
    path = encoder_path(kind, name)
    if not path.exists():
        raise UserError(f"{path} does not exist; python common.py --encoder {kind} --data {name} "
                        "trains it")
    state = load_checkpoint(path, "text encoder")
    encoder = text_encoder_from_state_dict(state["text_encoder"]).to(device)
    image_encoder = ImageEncoder(encoder.dim, state["features"] == "small").to(device).eval()
    image_encoder.load_state_dict(state["image_encoder"])
    test_set = data.load_dataset(name, "test", 64, root)
    with torch.no_grad():
        if state["features"] == "small":
            images = test_set.center_crop(torch.arange(len(test_set)))
            image, _ = image_encoder(images.to(device))
        else:
            pooled = inception_features(test_set, device)[:, :2048]
            image = image_encoder.embed(pooled.float().to(device))
        text = embed_captions(encoder, test_set)
        if kind == "damsm":  # its score is the cosine
            image = F.normalize(image)
            text = F.normalize(text)
    classes = test_set.classes.to(device)
    f_v, f_t = joint_embedding_accuracy(image, text, classes, classes[test_set.caption_owners])
    print(f"{len(test_set)} test images of {classes.max() + 1} classes; "
          f"image to class (f_v) {f_v:.1%}, caption to class (f_t) {f_t:.1%}, "
          f"chance {1 / (classes.max() + 1):.1%}")


def evaluation_captions(dataset, num_samples):
    """Return num_samples caption numbers in batches of 64. They have a random order, which is
    repeated if there are fewer captions."""
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset.captions), generator=rng)
    repeated = order.repeat(num_samples // len(order) + 1)
    return repeated[:num_samples].split(64)


@torch.no_grad()
def evaluate(draw, sample_noise, encoder, test_set, args):
    """Print and return a dict of the metrics of images that are drawn for the test captions.

    draw(noise, embeddings) returns images (B, 3, S, S) in [-1, 1]; sample_noise(n, seed), noise."""
    t = embed_captions(encoder, test_set)
    batches = evaluation_captions(test_set, args.fid_samples)
    captions = torch.cat(batches)

    def generated():
        bar = Progress(len(captions), "generated images")
        for seed, numbers in enumerate(batches):
            yield draw(sample_noise(len(numbers), seed), t[numbers])
            bar.update(len(numbers))

    if test_set.name == "toy":  # no download
        metrics = data.attribute_accuracy(torch.cat(list(generated())), captions, test_set)
        print("  ".join(f"{name} {value:.1%}" for name, value in metrics.items()))
        return metrics

    # FID: features of generated images, rounded to 8 bits, and of the real test images
    if len(captions) < 2 or len(test_set) < 2:
        raise UserError("the FID needs at least 2 generated and 2 real images")
    net = FIDInception().to(args.device)
    fake = []
    for images in generated():
        images = ((images + 1) * 127.5).round() / 127.5 - 1
        fake.append(net(images)[0])
    fake = torch.cat(fake)
    real = []
    bar = Progress(len(test_set), "real images")
    for index in torch.arange(len(test_set)).split(64):
        real.append(net(test_set.center_crop(index).to(args.device))[0])
        bar.update(len(index))
    real = torch.cat(real)
    metrics = {"fid": frechet_distance(real, fake)}
    few = min(len(fake), len(real)) < 2048
    note = " (below 2,048: not comparable with other numbers)" if few else ""
    print(f"FID {metrics['fid']:.2f} of {len(fake)} images against {len(real)} real test images of "
          f"{test_set.size} px{note}")

    # Inception Score
    if net.head is None:
        print("no Inception Score: the file of the FID network has no class scores")
    else:
        metrics["inception_score"] = inception_score(fake @ net.head.T)
        print(f"Inception Score {metrics['inception_score']:.2f} (ten splits)")

    # Diversity: distances between 8 images of one caption
    distances = []
    numbers = batches[0][:50].tolist()
    bar = Progress(len(numbers), "diversity", "captions")
    for i in numbers:
        features, _ = net(draw(sample_noise(8, i), t[[i] * 8]))
        distances.append(F.pdist(features).mean())
        bar.update()
    metrics["diversity"] = torch.stack(distances).mean().item()
    print(f"diversity {metrics['diversity']:.2f}")

    # R-precision
    path = Path(args.r_precision_encoder or encoder_path("damsm", test_set.name))
    state = load_checkpoint(path, "text encoder") if path.exists() else {}
    if state.get("features") != "inception":
        print(f"no R-precision: it needs {path} with Inception features; "
              f"python common.py --encoder damsm --data {test_set.name} trains it")
    else:
        image_encoder = ImageEncoder(256, small=False).to(args.device).eval()
        image_encoder.load_state_dict(state["image_encoder"])
        text = embed_captions(load_text_encoder(path).to(args.device), test_set)
        classes = test_set.classes[test_set.caption_owners]
        metrics["r_precision"] = r_precision(image_encoder.embed(fake), captions, text, classes)
        print(f"R-precision {metrics['r_precision']:.2%}")
    return metrics


# ---- Command line

def main():
    parser = argparse.ArgumentParser(description="Train or evaluate a text encoder.")
    add = parser.add_argument
    add("--encoder", choices=list(TEXT_ENCODERS), default="char-cnn-rnn")
    add("--data", default="toy", help="toy, flowers, cub, coco or the path of a folder")
    add("--root", default="datasets", help="where the folders flowers, cub and coco are")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--iterations", type=positive_int,
        help="(default: one per image, at least 300 and at most 3000; toy: 1000)")
    add("--image-features", choices=["inception", "small"],
        help="small needs no download (default: inception; toy: small)")
    add("--evaluate", action="store_true",
        help="print the accuracy of the trained encoder on the test classes")
    args = parser.parse_args()
    name = data.dataset_id(args.data)
    device = init_distributed(args.device)
    if args.evaluate:
        return evaluate_text_encoder(args.encoder, name, args.root, device)
    path = encoder_path(args.encoder, name)
    train_text_encoder(args.encoder, name, args.root, device, path, args.iterations,
                       args.image_features)


if __name__ == "__main__":
    sys.exit(run(main))
