"""Text encoders and their training, metrics (FID, R-precision, diversity), and what every run needs: checkpoints, grids, flags,
signals, several processes.

    python common.py --encoder char-cnn-rnn --data flowers      # train an encoder, print its retrieval on unseen classes
    python common.py --encoder damsm --data path/to/folder
    python common.py --export runs/dfgan-flowers/last.pt --out small.pt       # a trained model to give away

char-cnn-rnn  Reed et al., "Learning Deep Representations of Fine-grained Visual Descriptions", CVPR 2016: 1024-d
damsm         Xu et al., "AttnGAN", CVPR 2018, section 3.2: bi-LSTM, 256-d words and sentence
A model script trains the one it needs by itself where none is found. Encoders lie in runs/<encoder>-<data>/encoder.pt.
"""
import argparse
import contextlib
import copy
import csv
import datetime
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import data
from data import Progress, UserError

# ---------------------------------------------------------------------------------------------------- every run

def guard(main):
    """Run a command line; what the user can put right is one sentence and status 2, never a traceback. 130 after Ctrl-C, 1 where
    another process was lost."""
    try:
        code = main()
        if joined():
            dist.destroy_process_group()
        return code
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command begins again, a training at its last save", file=sys.stderr)
        return 130
    except (UserError, OSError, RuntimeError) as error:      # OSError: a full disk, a forbidden folder
        message, code = str(error), 2
        gone = joined() and (isinstance(error, dist.DistError) or "gloo" in message)        # another process has died
        if gone:
            message, code = f"lost another process ({message.splitlines()[0][:120]}); the same command continues from the last save", 1
        elif out_of_memory(error):
            message = (f"out of memory; give a smaller --batch-size or a narrower network to train, another --device to draw "
                       f"({message.splitlines()[0][:120]})")
        elif "loading state_dict" in str(error):
            message = f"a file does not fit the network that it should hold ({' '.join(str(error).split())[:160]}); give another file or remove it"
        elif isinstance(error, RuntimeError):
            raise
        if processes()[0]:
            time.sleep(3)          # the first says the same and ends all; if not, it is this one's own error
            message = f"process {processes()[0]}: {message}"
        sys.stdout.flush()
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.__stderr__ if processes()[0] else sys.stderr)
        if gone:
            os._exit(code)         # an orderly end would wait for the lost one
        return code


def out_of_memory(error):
    """CUDA's has a class of its own, the CPU's is known by its words."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Stop:
    """Inside `with Stop() as stop`, Ctrl-C and SIGTERM set stop.code and let the step finish; a second one ends at once."""
    code = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        # of several processes each is asked, within a moment, and may know from the others already: that is no second time
        if self.code and not (joined() and time.time() - self.since < 2):
            os._exit(self.code)
        self.code, self.since = 128 + number, time.time()
        with contextlib.suppress(OSError, RuntimeError):           # Ctrl-C also ends the `tee` that stderr is piped into
            print("\nfinishing this step and saving; once more stops at once", file=sys.stderr)

    def asked(self):
        """The code, once any process was asked: all of them stop after the same step."""
        if joined():
            code = torch.tensor(self.code)
            dist.all_reduce(code, dist.ReduceOp.MAX)
            if code and not self.code:
                self.code, self.since = int(code), time.time()
        return self.code

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)


FORMAT = 1      # of all files that `save` writes; to be raised when older programs could no longer read them


def save(path, state):
    """torch.save to a temporary name, flushed, then renamed: an interrupted write never costs the last good file."""
    if processes()[0]:
        return
    state = {"format": FORMAT, **{key: dict(value) if isinstance(value, Kept) else value for key, value in state.items()}}
    if not all(v.isfinite().all() for net in ("G", "D", "ema") for v in (state.get(net) or {}).values()):
        raise UserError(f"the weights are not finite at step {state['step']}; {path}, if there, is from before; try smaller learning rates "
                        f"in another --run")
    try:
        with data.writing(path) as part, open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {path} ({error}); what was there before is intact") from None


def tensors(path):
    """torch.load of tensors and plain containers, the checksums verified, which torch.load leaves alone."""
    if zipfile.is_zipfile(path):                                   # all but torch's format of before 2020
        with zipfile.ZipFile(path) as z:
            if z.testzip() or any(member.compress_type for member in z.infolist()):       # torch compresses nothing: a bomb
                raise ValueError("a wrong checksum, or another program's file")
    return torch.load(path, map_location="cpu", weights_only=True)


class Kept(dict):
    """What a file holds; asked for what it does not hold, it says so in one sentence."""

    def __init__(self, path, content):
        super().__init__(content)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} holds no {key!r}: it is damaged, of another version or exported for drawing alone; give another file or "
                        f"remove it")


def load(path, *kinds):
    """A file written by `save` whose state["kind"] is one of kinds, e.g. "gan_cls". Loads tensors and plain containers only."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    with data.refused(f"{path} is no checkpoint, or is damaged; give another file or remove it"):
        state = tensors(path)
    if not isinstance(state, dict) or state.get("kind") not in kinds:
        raise UserError(f"{path} holds no {' or '.join(kinds)} checkpoint; give another file or remove it")
    if not isinstance(state.get("format", 0), int) or state.get("format", 0) > FORMAT:
        raise UserError(f"{path} is of format {state['format']}, this program reads {FORMAT}; take a newer version of it")
    if isinstance(state.get("args"), dict):
        state["args"] = Kept(path, state["args"])
    return Kept(path, state)


def export(source, path):
    """Of a script's checkpoint what drawing and measuring need, small enough to give away: G's average and the text encoder, matrices
    in float16. Every script's --sample takes it, as runs/<script>-<data>/last.pt or, for those that come with the project, in weights/."""
    state = load(source, "gan_cls", "stackgan", "dfgan")
    small = {key: state[key] for key in ("kind", "step", "stage", "rows", "pictures") if key in state}
    for net in ("ema", "G1", "text_encoder"):
        if state.get(net):       # vectors (biases, batch norm) stay float32: variances may be too small for float16
            small[net] = {k: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 1 else v for k, v in state[net].items()}
    # of folders and files of this machine no more than the name; the text encoder itself lies in the file
    args = {k: Path(v).name if isinstance(v, str) else v for k, v in state["args"].items()} | {"text_encoder": None}
    note = re.sub(r"(?<![\w:/.])/(?:[^/,()]+/)+", "", state["text_note"])
    if args.get("init"):
        note, args["init"] = f"{note}; the run began with {args['init']}", None
    save(path, {**small, "text_note": note, "args": args})


def shipped(args, kind):
    """The model in weights/, where neither --run nor --data asks for another. What it draws goes to runs/<script>-weights."""
    path = Path(__file__).parent / "weights" / f"{kind}.pt"
    state = load(path, kind) if path.exists() else None
    if state is None or args.run not in (Path(f"runs/{kind}-toy"), Path(f"runs/{kind}-{state['args']['data']}")):
        hint = f", or leave out --run and --data for the one in weights/, trained on {state['args']['data']}" if state else ""
        raise UserError(f"there is no model in {args.run} yet; train one first, by the same command without --sample, --interpolate or "
                        f"--evaluate{hint}")
    print(f"there is no model in {args.run} yet: this is {path.parent.name}/{path.name}")
    args.run = Path(f"runs/{kind}-weights")
    return state


def random_state(state=None):
    """The random states of torch on the CPU and on this process's GPU, of numpy and of python; given them, restores them. Nothing
    here draws from the last two: they are there for what is added to a copied script."""
    if state is not None:
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and isinstance(state["cuda"], torch.Tensor):
            torch.cuda.set_rng_state(state["cuda"])
        if "python" in state:
            random.setstate(state["python"])
            np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], np.uint32), *state["numpy"][2:]))
    name, keys, *rest = np.random.get_state()
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            "python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}


def parser(script, doc, toy):
    """What the command lines of all scripts share: the parser, its group of training flags, its group of sampling flags."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in toy.items())
    p = argparse.ArgumentParser(prog=f"{script}.py", usage="%(prog)s [--data DATA] [--sample CAPTION ...] [flags]",
                                description=doc.split("\n\n")[0], epilog=f"Toy data has small defaults of its own: {flags}.")
    p.add_argument("--data", default="toy", help="toy, flowers, cub, coco or a folder of pictures and captions (default: toy)")
    p.add_argument("--root", default="datasets", help="folder that holds the named data sets (default: datasets)")
    p.add_argument("--run", help=f"folder of the run (default: runs/{script}-<data>)")
    p.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="seed of a new run; when drawing, of the noise (default: 0)")
    training = p.add_argument_group("training; the same command again continues")
    g = p.add_argument_group("training, not in the paper")
    g.add_argument("--ema", type=number(float, 0, 1), metavar="X", default=0.999,
                   help="decay of G's average, which draws the samples (default: 0.999)")
    g.add_argument("--text-encoder", metavar="FILE", type=os.path.realpath,
                   help="encoder.pt or released state dict (default: published, else trained here)")
    g.add_argument("--image-features", choices=["inception", "small"], help="picture features that train it (default: inception; toy small)")
    g.add_argument("--eval-every", type=number(int, 0), metavar="EPOCHS",
                   help="FID into log.csv, the best model into best.pt (default: 20 on CUDA, else 0: never)")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bf16 autocast (default: on CUDA, where the GPU has it)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    g = p.add_argument_group("sampling from the run, or from the model in weights/")
    either = g.add_mutually_exclusive_group()
    either.add_argument("--sample", nargs="+", metavar="CAPTION", help="a grid, one row a caption")
    either.add_argument("--interpolate", nargs=2, metavar=("A", "B"), help="from caption A to B at fixed noises")
    either.add_argument("--evaluate", action="store_true", help="FID, R-precision, diversity, and how they were measured")
    g.add_argument("--images", type=number(int, 1), metavar="N", help="with --sample: N separate files for each caption instead of a grid")
    g.add_argument("--noise", action="store_true", help="with --interpolate: the noise moves, the captions stay")
    g.add_argument("--columns", type=number(int, 1), metavar="N", default=8, help="pictures a row (default: 8)")
    g.add_argument("--best", action="store_true", help="draw with best.pt, the lowest FID of --eval-every, instead of last.pt")
    g.add_argument("--eval-images", type=number(int, 10), metavar="N", help="pictures of an evaluation (default: 30000; in training 2000)")
    g.add_argument("--score-encoder", metavar="FILE", help="encoder.pt that scores R-precision (default: the DAMSM trained here)")
    return p, training, g


def plain(args):
    """Those of the flags that a checkpoint keeps: numbers, words, truths and None."""
    return {name: value for name, value in vars(args).items() if value is None or isinstance(value, (int, float, str))}


def parse(p, toy, fixed, argv=None, begin=None):
    """The flags, and the checkpoint of their run (None for a new one; for drawing, the model in weights/). Each flag is what the
    command line gives, else what the checkpoint has, else toy's default, else the paper's. fixed: names that belong to a run; a flag
    that contradicts the checkpoint is an error. begin: makes a checkpoint of the flags where a new run is given --init."""
    script = p.prog.removesuffix(".py")

    flags = p.parse_known_args(argv)[0]
    run = Path(flags.run or f"runs/{script}-{Path(flags.data).resolve().name}")
    place = join(flags.device)
    if run.exists() and not run.is_dir():
        raise UserError(f"--run {run} is a file; give a folder")
    begun = (run / "last.pt").exists()
    if flags.best and not (run / "best.pt").exists():
        raise UserError(f"there is no best.pt in {run}; training with --eval-every writes it")
    state = None
    if begun:
        state = load(run / ("best.pt" if flags.best else "last.pt"), script)
    elif begin and flags.init:
        state = begin(flags)
    if (state["args"]["data"] if state else flags.data) == "toy":
        p.set_defaults(**toy, eval_every=0)
    if state:
        p.set_defaults(**{name: state["args"][name] for name in (*fixed, "epochs")})
    args = p.parse_args(argv)
    for flag, needs in (("images", "sample"), ("style", "sample"), ("noise", "interpolate")):
        if getattr(args, flag, None) and not getattr(args, needs):
            raise UserError(f"--{flag} says how to draw; add --{needs} and captions")
    drawing = args.sample or args.interpolate
    training = not (drawing or args.evaluate)
    if args.best and training:
        raise UserError("--best says which model draws; add --sample, --interpolate or --evaluate")
    if begun and training:
        state["G"]                                                 # what was exported holds none: said before anything is prepared
    if processes()[0] and drawing:                                 # the first process draws
        raise SystemExit(0)
    args.run, args.data = run, data.source(args.data)
    random.seed(args.seed), np.random.seed(args.seed)
    for name in fixed if state else ():
        if name == "seed" and not training:                        # it is the noise's
            continue
        if name == "data" and (drawing or (args.evaluate and args.data.startswith(os.sep))):      # they may have lain elsewhere
            continue
        if getattr(args, name) != state["args"][name]:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts "
                            f"{f'the run in {run}' if begun else args.init}, which has {state['args'][name]}; "
                            f"leave the flag out{', or give another --run' if begun else ''}")
    args.device = place
    on_gpu = place.startswith("cuda")
    args.compile = on_gpu if args.compile is None else args.compile
    if args.bf16 is None:                                          # GPUs before Ampere emulate it, and have no such convolutions
        args.bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    args.eval_every = 20 * on_gpu if args.eval_every is None else args.eval_every       # minutes each on a CPU
    if not training and state is None:
        state = shipped(args, script)
    return args, state


# torchrun starts one process a GPU. Each takes its share of every batch; the first alone prepares, prints and writes. The noise
# of all of them is that of one process with the whole batch.

def joined():
    return dist.is_available() and dist.is_initialized()


def processes():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if joined() else (0, 1)


def join(name):
    """The device of this process, by name; under torchrun the GPU of its number, once it has joined the others."""
    if "LOCAL_RANK" not in os.environ or joined():
        name = device(name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
        return name
    local = int(os.environ["LOCAL_RANK"])
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local}"
        if local >= torch.cuda.device_count():
            raise UserError(f"there are {torch.cuda.device_count()} GPUs here; give torchrun --nproc-per-node {torch.cuda.device_count()}")
        torch.cuda.set_device(local)                               # first of all: else each takes memory of GPU 0
    name = device(name)
    dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo")
    if dist.get_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    return name


@contextlib.contextmanager
def first():
    """The block runs in the first process, then in the others, which find prepared what it has written. (Machines share a
    folder.) They wait for up to a day: preparing may mean downloads and training a text encoder."""
    number, count = processes()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1)) if count > 1 else None
    if number:
        dist.all_reduce(torch.zeros(1), group=group)
    yield
    if number == 0 and count > 1:
        dist.all_reduce(torch.zeros(1), group=group)


def share(nets, optimizers, batch_size):
    """With several processes: one all-reduce of all gradients before each step of an optimiser, and batch norm over the whole
    batch on GPUs (torch has none for CPUs: there each process normalises by its share). batch_size: to be split."""
    count = processes()[1]
    if batch_size % count or batch_size < 2 * count:
        raise UserError(f"--batch-size {batch_size} cannot be split among {count} processes; give a multiple of {count}, {2 * count} at least")

    def mean_of_gradients(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        joint = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(joint)
        joint /= count
        for g, mean in zip(grads, joint.split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

    if count == 1:
        return
    for net in nets:
        if next(net.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(mean_of_gradients)


def mean(x):
    """x, now its mean over the processes, in place. All of them must ask."""
    if joined():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def compiled(functions, step, parts):
    """torch.compile of functions, tried in one training step(*functions), forward and backward, whose traces in parts
    (networks, optimisers) and random numbers are undone. Where that fails, or processes share a batch norm: the functions as they
    are, and one printed line."""
    if any(isinstance(m, nn.SyncBatchNorm) for part in parts.values() if isinstance(part, nn.Module) for m in part.modules()):
        print("no torch.compile: it breaks the graph at each batch norm that processes share")
        return functions
    before, drawn = copy.deepcopy({name: part.state_dict() for name, part in parts.items()}), random_state()
    try:
        # dynamic=False: real and fake pictures differ in strides, which would make shapes symbolic and convolutions slower
        fast = [torch.compile(f, dynamic=False) for f in functions]
        step(*fast)
        functions = fast
    except Exception as error:     # no C++ compiler, no Triton, a graph it cannot take: errors of every kind
        if out_of_memory(error):
            raise
        if processes()[1] > 1:                                     # the others may have gone further: nothing fits any more
            raise UserError(f"torch.compile does not work here ({type(error).__name__}); give --no-compile") from None
        print(f"torch.compile does not work here ({type(error).__name__}: {' '.join(str(error).split())[:100]}); going on without it")
    for name, part in parts.items():
        part.load_state_dict(before[name])
        if isinstance(part, nn.Module):                            # g_step may have ended in between
            part.requires_grad_(True)
    random_state(drawn)
    return functions


def device(name):
    """A device by name; "auto" is cuda where there is one."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(1, device=name).tolist()                       # tolist: "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not to be had here ({str(error).splitlines()[0]}); try --device cpu") from None
    return name


def number(kind, low, high=2**31):
    """An argparse type: an int or a float from low to high."""
    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    read.__name__ = kind.__name__
    return read


def save_grid(path, images, columns, captions=()):
    """images (N, 3, S, S) in [-1, 1] -> a PNG with `columns` pictures a row; captions, one a line, beside it as .txt."""
    from torchvision.utils import save_image
    path = Path(path)
    with data.writing(path) as part:
        save_image(images.float(), part, format="png", nrow=columns, normalize=True, value_range=(-1, 1))
    if captions:
        path.with_suffix(".txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8", errors="replace")
    return path


def save_images(run, captions, count, seed, paint):
    """count pictures of each caption as run/sample-<caption>-<seed>/00000.png ..., 64 at a time: paint(number of the caption,
    seed of the noise, n <= 64) -> (n, 3, S, S) in [-1, 1]. Prints the folders."""
    from torchvision.utils import save_image
    for i, caption in enumerate(captions):
        folder = Path(run) / f"sample-{slug([caption])}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "caption.txt").write_text(f"{caption}\n", encoding="utf-8", errors="replace")
        with Progress(count, caption[:40]) as bar:
            for start in range(0, count, 64):
                for n, image in enumerate(paint(i, seed * 2**20 + start, min(64, count - start)), start):
                    with data.writing(folder / f"{n:05}.png") as part:
                        save_image(image, part, format="png", normalize=True, value_range=(-1, 1))
                    bar.step()
        print(folder)


def slug(captions):
    """A file name of captions: letters and digits of the first, 40 at most, and a mark of them all."""
    return re.sub(r"[^a-z0-9]+", "-", captions[0].lower())[:40].strip("-") + f"-{zlib.crc32(chr(10).join(captions).encode(errors='replace')):08x}"


def resume(args, state, parts, dataset):
    """Puts the networks, optimisers and random states of a checkpoint in place -> its step, rows of the log, sums of the epoch begun."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    random_state(state["random"])
    if state["pictures"] not in (None, dataset.key):
        print(f"the pictures of {args.data} are not those the run began with: it goes on with them, from step {state['step']}")
    return state["step"], state["rows"], state["total"].to(args.device)


def epoch_done(run, rows, keep, grid, pictures, columns, captions):
    """After the last of rows, dicts of one set of keys: best.pt where its FID is the lowest of its stage, the grid, and log.csv from all
    rows, so that a resumed one has no gap and no double. last.pt last: whatever ends the run before, the epoch's end comes again."""
    if processes()[0]:
        return
    stage, fid = rows[-1].get("stage"), rows[-1]["fid"]            # "": not measured in that epoch
    fids = [row["fid"] for row in rows if row.get("stage") == stage and row["fid"] != "" and not math.isnan(row["fid"])]
    if fid != "" and fid == min(fids, default=None):
        keep("best.pt")
    save_grid(run / grid, pictures, columns, captions)
    with data.writing(run / "log.csv") as part, open(part, "w", newline="") as file:
        table = csv.DictWriter(file, rows[-1], lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    keep()


def finite(losses, step, run):
    """An error where a loss is infinite or NaN: nothing that the run would save from then on is of use."""
    if not all(map(math.isfinite, losses)):
        raise UserError(f"the loss is not finite at step {step} ({', '.join(map(str, losses))}); {run}/last.pt, if there, is from before; "
                        f"try smaller learning rates in another --run")


# ---------------------------------------------------------------------------------------------------- text encoders

class TextEncoder(nn.Module):
    """What both encoders share. tokens(captions) -> integers; sentences(tokens) -> (B, dim)."""

    @torch.no_grad()
    def encode(self, captions, label=None):
        """Any number of captions -> (N, dim), on the encoder's device. label: shows a bar."""
        self.eval()
        out = []
        with Progress(len(captions), label, "captions") as bar:
            for i in range(0, len(captions), 256):
                out.append(self.sentences(self.tokens(captions[i:i + 256]).to(next(self.parameters()).device)))
                bar.step(len(out[-1]))
        return torch.cat(out)

    def ask(self, captions):
        """encode for captions that a user typed: names what the encoder does not know, fails where nothing is left."""
        for caption in captions:
            known, unknown = self.split(caption)
            if not known:
                raise UserError(f"the text encoder knows nothing of {caption[:80]!r}; say it in other words")
            if unknown:
                print(f"warning: not known to the text encoder and left out: {' '.join(dict.fromkeys(unknown))}", file=sys.stderr)
        return self.encode([self.said(caption) for caption in captions])

    def said(self, caption):
        """What of a caption that a user typed is encoded."""
        return caption


class CharCnnRnn(TextEncoder):
    """Characters -> (B, 1024). Three convolutions, then a gated recurrence over 18 steps and the mean of its states.

    widths: channels of the convolutions; as released 384, 512, 512 (icml2016 birds and coco). Parameters bear the names
    of the converted encoders."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
    position = {c: i + 1 for i, c in enumerate(alphabet)}         # "-" stands there twice: the second counts
    length = 201                                                  # longer captions are cut
    shortest = 0                                                  # characters of the captions of training, all but one in 1,000; 0: not known

    def __init__(self, widths=(384, 512, 512), dim=1024):
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(70, a, 4), nn.Conv1d(a, b, 4), nn.Conv1d(b, c, 4)
        self.rnn = nn.ModuleDict({name: nn.Linear(c, c) for name in
                                  ("i2h", "i2h_update", "i2h_reset", "h2h", "h2h_update", "h2h_reset")})
        self.emb_proj = nn.Linear(c, dim)
        self.dim = dim

    def get_extra_state(self):
        return self.shortest

    def set_extra_state(self, shortest):
        self.shortest = min(int(shortest), self.length)

    def said(self, caption):
        """The caption, as often as it fits into the shortest of training: "pink flower" once leaves most of the 18 steps blank, and its
        sentence is pale. "<colour> flower" in six colours, 24 samples each, by the models in weights/: the middle has the
        colour in 51% (StackGAN) and 75% (GAN-CLS) of them with the caption once, in 99% and 97% so."""
        return " ".join([caption] * max(1, (self.shortest + 1) // (len(caption) + 1)))

    def split(self, caption):
        text = caption.lower()
        return [c for c in text if c in self.position and c != " "], [c for c in text if c not in self.position and not c.isspace()]

    def tokens(self, captions, rng=None):
        """(B, 201) places in the alphabet; 0 for any other character: a blank column, as in Reed's code. rng: nothing is drawn here."""
        rows = [[self.position.get(c, 0) for c in caption.lower()[:self.length]] for caption in captions]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])

    def sentences(self, text):
        cut = lambda x: F.threshold(x, 1e-6, 0)
        x = F.one_hot(text, 71)[:, :, 1:].float().transpose(1, 2)                                  # (B, 70, 201)
        x = F.max_pool1d(cut(self.conv1(x)), 3)                                                    # (B, 384, 66)
        x = F.max_pool1d(cut(self.conv2(x)), 3)                                                    # (B, 512, 21)
        x = cut(self.conv3(x)).transpose(1, 2)                                                     # (B, 18, 512)
        new, update, reset = (self.rnn[name](x) for name in ("i2h", "i2h_update", "i2h_reset"))
        h = torch.tanh(new[:, 0])
        total = h
        for t in range(1, x.shape[1]):
            z = torch.sigmoid(update[:, t] + self.rnn["h2h_update"](h))
            r = torch.sigmoid(reset[:, t] + self.rnn["h2h_reset"](h))
            # z weighs the candidate, the opposite of torch.nn.GRU, whose reset gate also stands elsewhere
            h = z * torch.tanh(new[:, t] + self.rnn["h2h"](r * h)) + (1 - z) * h
            total = total + h
        return self.emb_proj(total / x.shape[1])                                                   # (B, 1024)


class Damsm(TextEncoder):
    """Words -> features (B, 256, T) and sentence (B, 256), the last states of a bi-LSTM both ways.

    vocabulary: words by number, number 0 being "<end>", the padding. It is part of the state dict."""
    dim, length = 256, 18          # captions of more than 18 words: 18 of them at random, in order (DF-GAN's code)

    def __init__(self, vocabulary):
        super().__init__()
        self.set_extra_state(vocabulary)
        self.encoder = nn.Embedding(len(vocabulary), 300)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(300, 128, batch_first=True, bidirectional=True)

    def get_extra_state(self):
        return list(self.number)

    def set_extra_state(self, vocabulary):
        self.number = {word: i for i, word in enumerate(vocabulary)}

    @staticmethod
    def words(caption):
        return re.findall(r"\w+", caption.lower().replace("\ufffd\ufffd", " "))

    def split(self, caption):
        words = self.words(caption)
        return [w for w in words if self.number.get(w)], [w for w in words if not self.number.get(w)]

    def tokens(self, captions, rng=None):
        """(B, T), T the longest. Which 18 words stay of a longer caption: by rng in training, else by the caption itself."""
        rows = []
        for caption in captions:
            row = torch.tensor([self.number[w] for w in self.split(caption)[0]] or [0])
            if len(row) > self.length:
                seed = torch.Generator().manual_seed(zlib.crc32(caption.encode(errors="replace")))
                row = row[torch.randperm(len(row), generator=rng or seed)[:self.length].sort().values]
            rows.append(row)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, text):
        lengths = (text != 0).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(self.drop(self.encoder(text)), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, (h, _) = self.rnn(packed)
        words = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=text.shape[1])[0]
        return words.transpose(1, 2), h.transpose(0, 1).reshape(len(text), -1)                     # (B, 256, T), (B, 256)

    def sentences(self, text):
        return self(text)[1]


def rebuild(state):
    """A text encoder from its state dict, in which widths and vocabulary stand."""
    with data.refused("the text encoder in this file is damaged or of another kind; give another file or remove it"):
        if "conv1.weight" in state:
            encoder = CharCnnRnn([state[f"conv{i}.weight"].shape[0] for i in (1, 2, 3)], state["emb_proj.weight"].shape[0])
            state = {"_extra_state": 0, **state}                   # released encoders have none
        else:
            encoder = Damsm(state["_extra_state"])
        encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- losses

def joint_embedding_loss(image, text):
    """Symmetric structured joint embedding (Reed et al. CVPR 2016, eq. 3-5): image, text (B, 1024), one pair a class.

    The mean over B x B of max(0, 1 + F(wrong) - F(right)), F an inner product, over wrong texts plus over wrong images.
    The right pairs themselves add no margin."""
    score = image @ text.T                                        # (B, B), right pairs on the diagonal
    right = score.diag()
    over_text = F.relu(1 + score - right[:, None])
    over_image = F.relu(1 + score - right[None, :])
    wrong = 1 - torch.eye(len(score), device=score.device)
    return ((over_text + over_image) * wrong).mean()


def both_ways(score, classes):
    """Cross entropy of the right partner, over rows plus over columns. score (B, B). Other pairs of one class count
    neither as right nor as wrong (AttnGAN's code)."""
    same = (classes[:, None] == classes[None]).fill_diagonal_(False)
    target = torch.arange(len(score), device=score.device)
    return sum(F.cross_entropy(s.masked_fill(same, -math.inf), target) for s in (score, score.T))


def sentence_loss(image, sentence, classes, gamma3=10.0):
    """DAMSM between whole pictures and sentences, (B, 256) each (AttnGAN, section 3.2; gamma3 of its code)."""
    return both_ways(gamma3 * F.normalize(image) @ F.normalize(sentence).T, classes)


def word_loss(regions, words, lengths, classes, gamma1=4.0, gamma2=5.0, gamma3=10.0):
    """DAMSM between regions (B, 256, N) and words (B, 256, T), of which the first `lengths` (B,) count (AttnGAN, eq. 7-12).

    Each word attends to the regions: a softmax over words, then one over regions with gamma1; a picture and a caption
    match by log sum exp of gamma2 times the cosines of words and what they attended to."""
    there = torch.arange(words.shape[2], device=words.device) < lengths[:, None]                   # (B, T)
    s = torch.einsum("idn,jdt->ijnt", regions, words)             # picture i, caption j           # (B, B, N, T)
    attention = (gamma1 * s.masked_fill(~there[None, :, None], -math.inf).softmax(3)).softmax(2)
    # cosine of each word and its context c = regions @ attention, without c itself, (B, B, 256, T): c.word = s.attention
    # and |c|^2 = attention.(regions^T regions).attention
    gram = torch.einsum("idn,idm->inm", regions, regions)
    square = (torch.einsum("inm,ijmt->ijnt", gram, attention) * attention).sum(2)                  # (B, B, T)
    cosine = (s * attention).sum(2) * (square.clamp(min=1e-12).rsqrt() * words.square().sum(1).clamp(min=1e-12).rsqrt())
    match = (gamma2 * cosine).masked_fill(~there[None], -math.inf).logsumexp(2)                    # (B, B)
    return both_ways(gamma3 * match, classes)


# ---------------------------------------------------------------------------------------------------- image side

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


def inception(device="cpu"):
    """The Inception-v3 of the FID (weights of 2015-12-05, by pytorch-fid): images (B, 3, H, W) in [-1, 1]
    -> pooled (B, 2048), regions (B, 768, 36).

    torchvision's graph, except that its average pools here count no padding and the last block takes a maximum.
    The regions are the 17 x 17 of Mixed_6e averaged to 6 x 6: AttnGAN uses all 289; 36 make the cache 8 times smaller."""
    from torchvision.models import inception_v3
    file = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION).name)
    net = inception_v3(weights=None, aux_logits=False, init_weights=False)
    net.fc = nn.Identity()
    published = lambda: torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True, weights_only=True)
    try:
        weights = tensors(file) if file.exists() else published()
        missing, more = net.load_state_dict(weights, strict=False)
        if not (all(k.endswith("num_batches_tracked") for k in missing) and all(k.startswith("fc.") for k in more)):
            raise ValueError("other layers")
    except Exception as error:
        if file.exists():
            raise UserError(f"{file} is damaged; remove it, and it is downloaded again") from None
        raise UserError(f"the Inception network is needed and could not be had ({error}); put {INCEPTION} into "
                        f"{torch.hub.get_dir()}/checkpoints; to train a text encoder without it: --image-features small") from None
    for layer in net.eval().modules():
        if hasattr(layer, "bn"):               # its scale and shift are part of a fixed convolution: 1.4 times faster on a CPU
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()

    def pool_with(block, pool):    # torchvision averages inside the block: hand its pooling branch another input
        block.register_forward_pre_hook(lambda module, inputs: setattr(module, "seen", inputs[0]))
        block.branch_pool.register_forward_pre_hook(lambda module, inputs: pool(block.seen))

    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            pool_with(block, (lambda x: F.max_pool2d(x, 3, 1, 1)) if name == "Mixed_7c" else
                             (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
    seen = {}
    net.Mixed_6e.register_forward_hook(lambda module, inputs, out: seen.update(regions=F.adaptive_avg_pool2d(out, 6).flatten(2)))
    net = net.requires_grad_(False).to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def features(images):
        x = images.to(device, memory_format=torch.channels_last)
        if x.shape[-2:] != (299, 299):
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):        # numbers to compare: float32 on a GPU too
            return net(x), seen["regions"]
    return features


def inception_features(dataset, device):
    """Pooled (N, 2048) and regions (N, 768, 36) of every picture's central square, computed once from the originals at
    299 px, cached beside the pictures and mapped into memory."""
    n, shapes = len(dataset), {"pooled": ((2048,), torch.float32), "regions": ((768, 36), torch.float16)}
    paths = [dataset.stem.with_name(f"{dataset.stem.name}-inception-{dataset.key[:12]}.{k}") for k in shapes]
    sizes = [n * math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values()]
    if not all(p.exists() and p.stat().st_size == size for p, size in zip(paths, sizes)):
        net = inception(device)
        pairs = zip(dataset.pictures, data.decoded(dataset.pictures, 299, f"Inception features of {dataset.name} {dataset.split}"))
        with data.writing(paths[0]) as a, data.writing(paths[1]) as b, open(a, "wb") as pooled, open(b, "wb") as regions:
            while block := list(itertools.islice(pairs, 32)):
                for picture, array in block:
                    if array is None:
                        raise UserError(f"{picture.path} can no longer be read; run the same command again")
                images = torch.stack([torch.from_numpy(array.copy()) for _, array in block]).to(device).float() / 127.5 - 1
                for file, value, (_, dtype) in zip((pooled, regions), net(images), shapes.values()):
                    file.write(value.to("cpu", dtype).contiguous().numpy().tobytes())
    return tuple(data.mapped(path, (n, *shape), dtype) for path, (shape, dtype) in zip(paths, shapes.values()))


class SmallCnn(nn.Module):
    """Four strided convolutions, trained along from scratch where Inception would be a download for a toy.

    images (B, 3, S, S) -> pooled (B, 128), regions (B, 128, 16)."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in
                                    (nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))))

    def forward(self, images):
        x = self.body(images)
        return x.mean((2, 3)), F.adaptive_avg_pool2d(x, 4).flatten(2)


class ImageSide(nn.Module):
    """What text is matched with: a linear layer on pooled features, (B, dim), and one on regions, (B, 256, N).

    The features are Inception's, frozen and computed beforehand, or those of a SmallCnn trained along."""

    def __init__(self, dim, small):
        super().__init__()
        self.small = SmallCnn() if small else None
        self.norm = nn.BatchNorm1d(128 if small else 2048, affine=False)        # features of one scale: learns 3 times faster
        self.whole = nn.Linear(128 if small else 2048, dim)
        self.local = nn.Conv1d(128 if small else 768, 256, 1, bias=False)

    def embed(self, pooled):
        return self.whole(self.norm(pooled))

    def forward(self, source):
        pooled, regions = self.small(source) if self.small else source
        return self.embed(pooled), self.local(regions)


# ---------------------------------------------------------------------------------------------------- training

def class_means(x, classes):
    """x (N, D), classes (N,) -> (C, D), the mean of each class."""
    total = torch.zeros(int(classes.max()) + 1, x.shape[1], device=x.device).index_add_(0, classes, x)
    return total / classes.bincount()[:, None]


def retrieval(image, text, image_class, text_class):
    """Top-1 of caption -> class (by its mean picture) and picture -> class (by its mean text, as Reed et al. measure).
    image (N, D), text (M, D), image_class (N,), text_class (M,)."""
    top = lambda x, means, classes: ((x @ means.T).argmax(1) == classes).float().mean().item()
    return (top(text, class_means(image, image_class), text_class), top(image, class_means(text, text_class), image_class))


@torch.no_grad()
def fold(encoder, norm, captions):
    """Put the norm behind the last layer into it, and one scale more: sentences of mean square length 1. Retrieval by
    inner product does not see the scale; a generator does: 32 times louder (RMS 1), GAN-CLS drowned its noise and drew one
    picture a caption (toy, standard deviation over noises 0.01; 0.15 with length 1)."""
    scale = (norm.running_var + norm.eps).rsqrt()
    encoder.emb_proj.bias.sub_(norm.running_mean).mul_(scale)
    encoder.emb_proj.weight.mul_(scale[:, None])
    loudness = encoder.encode(captions[::len(captions) // 2000 + 1], "scale of the text").square().sum(1).mean().sqrt()
    encoder.emb_proj.bias.div_(loudness), encoder.emb_proj.weight.div_(loudness)


def train_text_encoder(kind, name, root, device, path, iterations=None, image_features=None, seed=0):
    """Train an encoder for a data set, save it to path, return its retrieval on held-out classes. Continues an unfinished one."""
    toy, sje = name == "toy", kind == "char-cnn-rnn"
    small = (image_features or ("small" if toy else "inception")) == "small"
    iterations = iterations or (400 if toy else 3000)
    train, test = (data.load(name, split, 64, root) for split in ("train", "test"))
    if train.classes.max() + 1 < 40:        # too few classes to fill a batch: every picture is one of its own
        train.classes = torch.arange(len(train))
    source = {d: None if small else inception_features(d, device) for d in (train, test)}
    torch.manual_seed(seed)
    if sje:
        encoder = CharCnnRnn((96, 128, 128) if toy else (384, 512, 512))
        encoder.shortest = int(np.quantile([len(caption) for caption in train.captions], 0.001))
    else:
        encoder = Damsm(["<end>", *dict.fromkeys(w for c in train.captions for w in Damsm.words(c))])
    side = ImageSide(encoder.dim, small)
    if sje:
        nn.init.zeros_(side.whole.weight)                          # F starts at 0, whatever the scale of the text
    norm = nn.BatchNorm1d(encoder.dim, affine=False)               # of the text in F; `fold` puts it into the encoder
    encoder.to(device), side.to(device), norm.to(device)
    weights = [*encoder.parameters(), *side.parameters()]
    # Decay as released, 0.98 an epoch, spread over the run. Released for the first: RMSprop 7e-4, no norms; ours learns
    # faster (400 batches on flowers, caption to class: 12% with RMSprop, 19% with Adam, 25% with Adam and the norm)
    lr, decay, betas = (3e-4, 0.02, (0.9, 0.999)) if sje else (2e-3, 0.1, (0.5, 0.999))
    optimizer = torch.optim.Adam(weights, lr, betas)
    batches, done = data.Batches(train, 48, seed, device), 0
    parts = {"encoder": encoder, "image": side, "norm": norm, "optimizer": optimizer}
    about = {"encoder": kind, "data": data.source(name), "pictures": train.key, "small": small, "seed": seed, "iterations": iterations}
    if Path(path).exists():
        state = load(path, "text encoder")
        if state["note"] or state["about"] != about:
            raise UserError(f"{path} is {'finished' if state['note'] else 'of other pictures or settings'}; remove it to train anew, "
                            f"or give another file by --out")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        done = state["iteration"]

    def look(dataset, index, rng):
        if small:
            return batches.look(index, rng) if dataset is train else dataset.centre(index).to(device)
        return tuple(feature[index].float().to(device) for feature in source[dataset])

    def keep(note=None):
        save(path, {"kind": "text encoder", "about": about, "iteration": done, "note": note,
                    **{key: part.state_dict() for key, part in parts.items()}})

    print(f"training {kind} on {name}: {len(train)} pictures, {len(train.captions)} captions, image side "
          f"{'a small network trained along' if small else 'Inception-v3, frozen'}, {iterations} iterations on {device}")
    with Stop() as stop, Progress(iterations, kind, "batches", done) as bar:
        while done < iterations and not stop.code:
            for group in optimizer.param_groups:
                group["lr"] = lr * decay ** (done / iterations)
            torch.manual_seed(seed * 2**20 + done)                 # dropout too: a resumed training is the same one
            rng = torch.Generator().manual_seed(seed * 2**20 + done)
            if sje:                                                # one picture each of 40 classes
                c = torch.randperm(len(batches.count), generator=rng)[:40]
                index = batches.by_class[batches.start[c] + (torch.rand(len(c), generator=rng) * batches.count[c]).long()]
            else:
                index = torch.randperm(len(train), generator=rng)[:48]
            captions = [train.captions[i] for i in batches.say(index, rng)[:, 0]]
            encoder.train(), side.train(), norm.train()
            whole, local = side(look(train, index, rng))
            tokens, classes = encoder.tokens(captions, rng).to(device), train.classes[index].to(device)
            if sje:
                loss = joint_embedding_loss(whole, norm(encoder.sentences(tokens)))
            else:
                words, sentence = encoder(tokens)
                loss = word_loss(local, words, (tokens != 0).sum(1).clamp(min=1), classes) + sentence_loss(whole, sentence, classes)
            optimizer.zero_grad()
            loss.backward()
            if not sje:
                nn.utils.clip_grad_norm_(encoder.parameters(), 0.25)
            optimizer.step()
            done += 1
            last = done % 500 == 0 or done == iterations
            if (last or done % 20 == 0) and not math.isfinite(loss.item()):
                raise UserError(f"the loss of {kind} is not finite at batch {done}; {path} holds the last good state, if any")
            if last:
                keep()
            bar.step(1, f"loss {loss.item():.3f}" if done % 20 == 0 else None)
        if stop.code:
            keep()
            print(f"saved to {path}; the same command continues", file=sys.stderr)
            raise SystemExit(stop.code)

    side.eval()
    if sje:
        fold(encoder, norm.eval(), train.captions)
    with torch.no_grad():
        few = torch.arange(min(len(test), 1000 if test.classes.max() + 1 == len(test) else len(test)))      # COCO, of no classes: 1,000
        image = torch.cat([side(look(test, i, None))[0] for i in few.split(64)])
        owner = torch.repeat_interleave(torch.arange(len(test)), test.first.diff())[:test.first[len(few)]]
        text = encoder.encode(test.captions[:len(owner)], "held-out captions")
        if not sje:
            image, text = F.normalize(image), F.normalize(text)
        classes = test.classes.to(device)
        scores = retrieval(image, text, classes[few], classes[owner])
    chance = 1 / (int(test.classes[few].max()) + 1)
    note = (f"{kind} trained here on {name}, {iterations} iterations, image side {'small network' if small else 'Inception-v3'}; "
            f"held out: caption to class {scores[0]:.1%}, picture to class {scores[1]:.1%}, chance {chance:.1%}")
    keep(note)
    return note


# ---------------------------------------------------------------------------------------------------- choice

ATTNGAN = "https://raw.githubusercontent.com/taoxugit/AttnGAN/master/eval/data/"
COCO = "https://huggingface.co/mediasynthesismuseum/attngan-coco/resolve/main/"
PUBLISHED = {  # DAMSM encoders by AttnGAN's authors: address, file, sha256 (none is published for COCO's captions)
    "cub": [(ATTNGAN + "text_encoder200.pth", "text_encoder200.pth", "d7278a9b4801633eb42d43de67cba51746daf5143be532660bf1c15608690c01"),
            (ATTNGAN + "captions.pickle", "captions.pickle", "84e9f81218102873b65ab79c265f0a0a370bf38237b0ef5cb175d0f51c00ab68")],
    "coco": [(COCO + "text_encoder100.pth", "text_encoder100.pth", "24cf394756359d5cf019845396006639813404a9f9c8dd03b0874c694a0842d6"),
             (COCO + "captions.pickle", "captions.pickle", None)],
}


class PlainUnpickler(pickle.Unpickler):
    """Builds plain containers and nothing else: a pickle that names any code is refused."""

    def find_class(self, module, name):        # numpy's arrays too could be made to point anywhere
        if (module, name) != ("_codecs", "encode"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path):
    """A pickle of plain data that somebody else wrote, Python 2's included."""
    with data.refused(f"{path} is no pickle of plain data ({{error}})"), open(path, "rb") as file:
        return PlainUnpickler(file, encoding="latin1").load()


def read_encoder(path):
    """(encoder, note) from an encoder.pt of ours, a checkpoint of a run, or a released state dict; a DAMSM one needs its
    captions.pickle, also called captions_DAMSM.pickle, in the same folder."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; --text-encoder takes an encoder.pt or a released .pth")
    with data.refused(f"{path} is no text encoder, or is damaged"):
        state = tensors(path)
        if "text_encoder" in state:
            return rebuild(state["text_encoder"]), state["text_note"]
        if "encoder" in state:
            if not state["note"]:
                raise UserError(f"{path} is not trained to the end; the command that began it continues")
            return rebuild(state["encoder"]), f"{state['note']} ({path})"
        if "encoder.weight" in state:
            book = next((p for n in ("captions.pickle", "captions_DAMSM.pickle") if (p := path.with_name(n)).exists()), None)
            if book is None:
                raise UserError(f"{path} needs its vocabulary: put captions.pickle beside it")
            content = read_pickle(book)
            words = [content[2][i] for i in range(len(content[2]))]
            if len(words) != len(state["encoder.weight"]):
                raise UserError(f"{book} has {len(words)} words but {path} {len(state['encoder.weight'])}; they do not belong together")
            state["_extra_state"] = words
        return rebuild(state), f"released encoder {path}"


def encoder_path(kind, name):
    return Path("runs") / f"{kind}-{Path(name).resolve().name}" / "encoder.pt"


def text_encoder(kind, name, root, device, path=None, image_features=None):
    """The frozen text encoder for a data set and a note: the file given, else the published one (DAMSM of cub and coco),
    else the one trained here, now if need be. Prints which one it is and where it came from."""
    encoder, own = None, encoder_path(kind, name)
    if path:
        encoder, note = read_encoder(path)
    elif kind == "damsm" and name in PUBLISHED:
        try:
            if processes()[0] and not all((Path(root) / name / "damsm" / file).exists() for _, file, _ in PUBLISHED[name]):
                raise UserError("the first process could not have it")
            files = [data.download(url, Path(root) / name / "damsm" / file, sha256=sha) for url, file, sha in PUBLISHED[name]]
            encoder, note = read_encoder(files[0])
            note = f"published DAMSM encoder of {name}, {PUBLISHED[name][0][0]}"
        except UserError as error:
            print(f"no published encoder ({error}); training one here")
    if encoder is None:
        state = load(own, "text encoder") if own.exists() else None
        if state and state["about"]["data"] != data.source(name):
            raise UserError(f"{own} was trained on {state['about']['data']}; give it by --text-encoder, or remove it")
        if not state or not state["note"]:
            train_text_encoder(kind, name, root, device, own, image_features=image_features)
        encoder, note = read_encoder(own)
    if not isinstance(encoder, CharCnnRnn if kind == "char-cnn-rnn" else Damsm):
        raise UserError(f"{path} is a {type(encoder).__name__}, this script needs {kind}")
    print(f"text encoder: {note}")
    return encoder.to(device), note


def embeddings(encoder, dataset):
    """Every caption's sentence embedding (M, dim), on the encoder's device; computed once and cached beside the pictures."""
    h = hashlib.sha256("\n".join(dataset.captions).encode(errors="replace"))
    for p in encoder.parameters():
        h.update(p.detach().cpu().numpy().tobytes())
    path = dataset.stem.with_name(f"{dataset.stem.name}-sentences-{h.hexdigest()[:16]}.pt")
    try:
        out = load(path, "sentences")["sentences"]
        if out.shape != (len(dataset.captions), encoder.dim) or not out.isfinite().all():
            raise ValueError("damaged")
        return out.to(next(encoder.parameters()).device)
    except Exception:     # not there, or damaged: made again
        out = encoder.encode(dataset.captions, f"sentences of {dataset.name} {dataset.split}")
        save(path, {"kind": "sentences", "sentences": out.cpu()})
        return out


def prepare(args, state, kind, size):
    """For a training: (training pictures, unseen ones, text encoder, note on it, sentences of the training captions (M, dim)). The
    encoder is the checkpoint's, else chosen or trained. Of several processes the first prepares, the others find it done."""
    with first():
        dataset, unseen = (data.load(args.data, split, size, args.root) for split in ("train", "test"))
        if state:
            encoder, note = rebuild(state["text_encoder"]).to(args.device), state["text_note"]
            if (args.run / "last.pt").exists():                    # else from --init, and said already
                print(f"text encoder: {note} (kept in {args.run / 'last.pt'})")
        else:
            encoder, note = text_encoder(kind, args.data, args.root, args.device, args.text_encoder, args.image_features)
        return dataset, unseen, encoder, note, embeddings(encoder, dataset)


# ---------------------------------------------------------------------------------------------------- metrics

def moments(features):
    """features (N, D) -> N, their sum and the sum of their outer products, in float64, in one vector (1 + D + D*D,). Those of
    batches and of processes can simply be summed, so that memory does not grow with the number of pictures."""
    x = features.cpu().double()
    return torch.cat((torch.tensor([float(len(x))]), x.sum(0), (x.T @ x).flatten()))


def gaussian(summed):
    """Mean (D,) and covariance (D, D), float64, from `moments`."""
    dim = math.isqrt(len(summed))                                 # D from 1 + D + D*D
    n, mean, square = summed[0], summed[1:dim + 1] / summed[0], summed[dim + 1:].view(dim, dim)
    return mean, (square - n * torch.outer(mean, mean)) / (n - 1)


def root_of(cov):
    """The symmetric square root of a covariance (D, D)."""
    value, vector = torch.linalg.eigh(cov)
    return vector * value.clamp(min=0).sqrt() @ vector.T


def frechet(mean1, cov1, mean2, cov2, root=None):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 (Heusel et al. 2017, eq. 6). Only the trace of that root is
    needed: the sum of the roots of the eigenvalues of C1 C2, which are those of the symmetric C1^(1/2) C2 C1^(1/2), and
    symmetric matrices have a stable solver. root: root_of(cov1), to save time. NaN where the numbers are not finite."""
    if not (cov1.isfinite().all() and cov2.isfinite().all()):
        return math.nan
    root = root_of(cov1) if root is None else root
    overlap = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap).item()


def spread(features):
    """Mean distance between two of one group, features (groups, k, D): samples of one caption, or pictures of one class."""
    return torch.stack([F.pdist(group.float()).mean() for group in features]).mean().item()


def eight_bits(images):
    """(B, 3, S, S) in [-1, 1], rounded to 256 levels, as a PNG would give it back."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def real_features(dataset, net):
    """Pooled features (N, 2048) of the real pictures at their training size, the central crops: what a generator of that size
    is compared with. Computed once, cached beside the pictures, mapped into memory."""
    n, path = len(dataset), dataset.stem.with_name(f"{dataset.stem.name}-{dataset.size}-fid-{dataset.key[:12]}.f32")
    if not path.exists() or path.stat().st_size != n * 2048 * 4:
        with data.writing(path) as part, open(part, "wb") as file, Progress(n, f"features of real {dataset.name} {dataset.split}") as bar:
            for index in torch.arange(n).split(64):
                file.write(net(dataset.centre(index))[0].cpu().numpy().tobytes())
                bar.step(len(index))
    features = data.mapped(path, (n, 2048), torch.float32)
    if not features.isfinite().all():
        raise UserError(f"{path} is damaged; remove it, and it is computed again")
    return features


@torch.no_grad()
def diversity(net, paint, sentences, each, seed=0):
    """Mean distance of the features of two samples of one sentence, `each` samples a sentence, over all of sentences (k, dim)."""
    return spread(torch.stack([net(eight_bits(paint(sentence.expand(each, -1), seed * 2**20 + i)))[0] for i, sentence in enumerate(sentences)]))


def score_encoder(name, root, device, path=None, image_features=None, train=True):
    """(text encoder, its image side, note) by which R-precision is scored: the encoder.pt given, else the DAMSM of this data
    set in runs/, trained now if it is not there. train=False: then None."""
    own = Path(path or encoder_path("damsm", name))
    if not path and not (own.exists() and load(own, "text encoder")["note"]):
        if not train:
            return None
        print("R-precision needs a DAMSM encoder with its image side")
        train_text_encoder("damsm", name, root, device, own, image_features=image_features)
    state = load(own, "text encoder")
    if state["about"]["data"] != data.source(name) or not state["note"]:
        raise UserError(f"{own} was trained on {state['about']['data']}{'' if state['note'] else ', and not to the end'}; "
                        f"R-precision on {name} needs one trained on it: python common.py --encoder damsm --data {name}")
    encoder = rebuild(state["encoder"])
    side = ImageSide(encoder.dim, state["about"]["small"])
    side.load_state_dict(state["image"])
    return encoder.to(device), side.to(device).eval().requires_grad_(False), f"{state['note']} ({own})"


class Judge:
    """Measures generated pictures against the unseen ones of a data set. paint(sentences (N, dim), seed) draws them: (N, 3, S, S).

    sentences: the generator's sentence embedding of every unseen caption (M, dim). scorer: as score_encoder returns it.
    net: the FID's Inception, or None where it cannot be had: then there is no FID and no diversity."""
    wrong = 99

    def __init__(self, unseen, sentences, net, scorer=None):
        self.unseen, self.sentences, self.net, self.scorer = unseen, sentences, net, scorer
        self.owner = torch.repeat_interleave(torch.arange(len(unseen)), unseen.first.diff())         # picture of each caption
        self.classes = unseen.classes[self.owner]
        self.by_class = self.classes.argsort(stable=True)
        if scorer:
            self.text = F.normalize(embeddings(scorer[0], unseen))                                   # (M, dim)
        if net:
            self.real = real_features(unseen, net)
            self.reference = gaussian(sum(moments(some) for some in self.real.split(4096)))
            self.root = root_of(self.reference[1])

    @torch.no_grad()
    def of_real(self, each=8):
        """The real pictures' own R-precision, each with its first caption, and their diversity within a class."""
        out, index = {}, torch.arange(len(self.unseen))
        if self.scorer:
            hits = [self.precise(self.real[i] if self.net else None, self.unseen.centre(i), self.unseen.first[i], b)
                    for b, i in enumerate(index.split(64))]
            out["r_precision"] = torch.cat(hits).mean().item()
        groups = [index[self.unseen.classes == c] for c in (self.unseen.classes.bincount() >= each).nonzero()[:, 0]]
        if self.net and groups:
            out["diversity"] = spread([self.real[g[torch.linspace(0, len(g) - 1, each).long()]] for g in groups])
        return out

    def precise(self, pooled, images, captions, seed):
        """R-precision (AttnGAN, section 4.1), top-1: is each picture closer to its own caption than to 99 of other classes?
        Cosine in the joint space. captions (N,): their numbers. -> (N,) of 0 and 1. The 99 are drawn anew for each picture."""
        _, side, _ = self.scorer
        rng = torch.Generator().manual_seed(seed)
        others = data.of_other_classes(self.by_class, self.classes.bincount(), self.classes[captions], self.wrong, rng)
        candidates = self.text[torch.cat((captions[:, None], others), 1).to(self.text.device)]       # (N, 100, dim)
        if side.small:
            pooled = side.small(F.interpolate(images, (64, 64), mode="bilinear", antialias=True).to(self.text.device))[0]
        image = F.normalize(side.embed(pooled.to(self.text.device)))                                # (N, dim)
        score = torch.einsum("nd,ncd->nc", image, candidates)
        return (score[:, 0] >= score[:, 1:].amax(1) - 1e-6).cpu().double()       # a tie: another class has the same words; counted as right

    @torch.no_grad()
    def measure(self, paint, n, seed=0, parts=1):
        """Numbers of n pictures, one for each of the unseen captions in random order, again from the first when they are through.
        The processes share blocks of up to 64; noise is drawn block by block, so that their number changes nothing. parts: the
        pictures are also split into so many, each with a FID of its own; their spread gives the standard error of the whole."""
        number, among = processes()
        order = torch.randperm(len(self.owner), generator=torch.Generator().manual_seed(seed))
        total = torch.zeros(parts, 1 + 2048 + 2048**2, dtype=torch.double) if self.net else None
        hit, named = torch.zeros(n, dtype=torch.double), torch.zeros(3, 2, dtype=torch.double)
        # of at most 64 pictures, block b in part b % parts: so their number is a multiple of parts
        blocks = torch.arange(n).tensor_split(parts * math.ceil(n / (64 * parts)))
        with Progress(n, "evaluating") as bar:
            for b in range(number, len(blocks), among):
                captions = order[blocks[b] % len(order)]
                images = eight_bits(paint(self.sentences[captions.to(self.sentences.device)], seed * 2**20 + b))
                pooled = None
                if self.net:
                    pooled = self.net(images)[0]
                    total[b % parts] += moments(pooled)
                if self.scorer:
                    hit[blocks[b]] = self.precise(pooled, images, captions, seed * 2**20 + b)
                if self.unseen.traits:
                    named += self.follow(images, captions)
                bar.step(min(len(captions) * among, n - bar.done))
        for x in (total, hit, named):
            if joined() and x is not None:
                dist.all_reduce(x)
        out = {}
        if self.net:
            out["fid"] = frechet(*self.reference, *gaussian(total.sum(0)), self.root)
            if parts > 1:
                each = [frechet(*self.reference, *gaussian(part), self.root) for part in total]
                out["fid_error"], out["fid_of_parts"] = torch.tensor(each).std().item() / parts ** 0.5, each
        if self.scorer:
            folds = torch.stack([tenth.mean() for tenth in hit.tensor_split(10)])
            out["r_precision"], out["r_precision_folds"] = hit.mean().item(), folds.std().item()
        if self.unseen.traits:
            out |= {trait: right / max(of, 1) for trait, (right, of) in zip(("petal", "centre", "count"), named.tolist())}
        return out

    def follow(self, images, captions):
        """Toy: (3, 2), how many pictures have the petal colour, centre colour and petal count of their captions, of how many
        whose captions name it."""
        counts = torch.zeros(3, 2, dtype=torch.double)
        for caption, shown in zip(captions, data.judge(images)):
            text, drawn = self.unseen.captions[caption], self.unseen.traits[self.owner[caption]]
            for i, trait in enumerate(("petal", "centre", "count")):
                if drawn[trait] in text:
                    counts[i] += torch.tensor((shown[trait] == drawn[trait], True))
        return counts


def watch(args, unseen, encoder):
    """A function (epoch, paint) -> what it adds to the epoch's row in log.csv: the diversity of 24 samples, where Inception lies
    on this machine, and every --eval-every epochs FID on --eval-images pictures; R-precision too if runs/damsm-<data> is there."""
    full, net, judge = 0 < args.eval_every <= args.epochs and len(unseen) > 1, None, None
    with first(), torch.random.fork_rng(devices=[]):               # layers are drawn before they are loaded: not from the run's noise
        try:
            if full or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION).name).exists():
                net = inception(args.device)
        except UserError as error:
            print(f"no FID during training: {error}")
        few = encoder.encode([unseen.captions[i] for i in torch.linspace(0, len(unseen.captions) - 1, 8).long()])
        if net and full:
            scorer = None
            try:
                scorer = score_encoder(args.data, args.root, args.device, args.score_encoder, train=False)
                if scorer is None:
                    print(f"no R-precision during training: python common.py --encoder damsm --data {args.data} trains the encoder that it takes")
            except UserError as error:
                print(f"no R-precision during training: {error}")
            judge = Judge(unseen, embeddings(encoder, unseen), net, scorer)
    net, judge = everywhere(net), everywhere(judge)
    if judge:
        judge.scorer = everywhere(judge.scorer)

    def add(epoch, paint):
        out = dict(diversity="", fid="", r_precision="")
        if net:
            out["diversity"] = round(diversity(net, paint, few, 3), 4)
            if judge and epoch % args.eval_every == 0:
                seen = judge.measure(paint, args.eval_images or 2000, args.seed)
                out |= {name: round(seen[name], 4) for name in ("fid", "r_precision") if name in seen}
        return out
    return add


def everywhere(thing):
    """thing, if every process has it, else None: what only some have must not be used, or they would wait for one another."""
    return thing if mean(torch.tensor(float(thing is not None))).item() == 1 else None


def evaluate(args, state, encoder, size, paint, **about):
    """--evaluate: prints FID, R-precision, diversity and how they were measured, and adds all of it to evaluation.json in the
    run's folder. size: of the pictures; about: what the script adds to the protocol; functions in it are
    called when all else is measured."""
    kept = args.run / ("best.pt" if args.best else "last.pt")
    name = args.data if kept.exists() else state["args"]["data"]
    n, path = args.eval_images or 30000, args.run / "evaluation.json"

    def earlier():
        with data.refused(f"{path} is damaged; move it away, the next evaluation begins a new one"):
            return [dict(entry) for entry in json.loads(path.read_text())] if path.exists() else []

    earlier()                                                      # damaged: said now, not after an hour of drawing
    with first():
        unseen, net = data.load(name, "test", size, args.root), None
        try:
            net = inception(args.device)
        except UserError as error:
            print(f"no FID and no diversity: {error}")
        if len(unseen) < 2:
            raise UserError(f"{name} has one test picture; an evaluation needs two at least, and means little below some hundreds")
        scorer = score_encoder(name, args.root, args.device, args.score_encoder, args.image_features)
        if not (net or scorer[1].small):
            print("no R-precision: its encoder needs Inception")
            scorer = None
        judge = Judge(unseen, embeddings(encoder, unseen), net, scorer)
    if (everywhere(net), everywhere(scorer)) != (net, scorer):
        raise UserError(f"not every process could have {INCEPTION}; put it into {torch.hub.get_dir()}/checkpoints on each machine")
    seen = judge.measure(paint, n, args.seed, parts=5)
    if processes()[0]:
        return
    if net:
        some = torch.linspace(0, len(judge.owner) - 1, min(50, n // 20 + 1, len(judge.owner))).long().to(judge.sentences.device)
        seen["diversity"] = diversity(net, paint, judge.sentences[some], 8, args.seed)
    about = {key: value() if callable(value) else value for key, value in about.items()}
    real, own = judge.of_real(), False
    if scorer:                                                     # equal sentences: it is the generator's own encoder
        own = type(encoder) is type(scorer[0]) and torch.equal(*(e.encode(unseen.captions[:8]) for e in (encoder, scorer[0])))
    there, begun = len(judge.owner), getattr(args, "init", None)   # captions; the released file that the run began with
    part_of = f"{n} of the" if n < there else f"{n / there:.2f} times the"
    report = {
        **seen, **{f"{key}_real": value for key, value in real.items()}, "images": n, **about,
        "captions": f"{part_of} {there} captions of the {len(unseen)} test pictures of {name}, in random order",
        "checkpoint": str(kept if kept.exists() else begun or f"weights/{state['kind']}.pt"),
        "reference": f"{len(unseen)} real pictures, {name} test, central {size} px of {unseen.images.shape[-1]}", "reference_key": unseen.key,
        "fid_network": "pytorch-fid's Inception of 2015-12-05, pool 2048, pictures of 8 bits resized to 299 bilinearly without antialias",
        "weights": "as released" if begun and not state["step"] else f"average of G, decay {state['args']['ema']}",
        "seed": args.seed, "step": state["step"], "device": args.device, "torch": torch.__version__,
        "r_precision_encoder": scorer and scorer[2], "r_precision_by_the_generators_encoder": scorer and own,
        "r_precision_protocol": "top-1 of the own caption and 99 of other classes, drawn with repeats, cosine",
        "diversity_captions": net and len(some),
        "diversity_protocol": "mean distance of pool features of 2 of 8 samples a caption; real: of 2 of 8 pictures a class"}
    if net:
        fewer = sum(seen["fid_of_parts"]) / 5
        print(f"FID           {seen['fid']:.2f} +- {seen['fid_error']:.2f} of {n} pictures; with fewer it is higher: {fewer:.2f} of {n // 5}")
    if scorer:
        print(f"R-precision   {seen['r_precision']:.1%} +- {seen['r_precision_folds']:.1%} over 10 folds; the own caption against 99 of other classes; "
              f"real pictures of this size {real['r_precision']:.1%}\n              by {scorer[2]}, "
              f"{'which trained the generator too: that flatters it' if own else 'which the generator never saw'}")
    if net:
        of_real = f", {real['diversity']:.2f} between two real pictures of a class" if "diversity" in real else ""
        print(f"diversity     {seen['diversity']:.2f} between two samples of a caption{of_real} (distance of features)")
    if unseen.traits:
        print("as said       petal colour {petal:.0%}, centre colour {centre:.0%}, petal count {count:.0%} "
              "(of the pictures whose captions name it)".format(**seen))
    for key in (*(key for key in about if about[key] is not None), "checkpoint", "captions", "reference", "fid_network", "weights", "seed", "step"):
        print(f"{key:13} {report[key]}")
    with data.writing(path) as part:
        part.write_text(json.dumps([*earlier(), report], indent=1))
    print(path)


def traits_follow(unseen, encoder, paint):
    """Toy only: prints how often samples for held-out captions show what the caption says. paint as Judge's."""
    judge = Judge(unseen, encoder.encode(unseen.captions), None)
    seen = judge.measure(paint, 512)
    print("petal colour right in {petal:.0%} of 512 samples for held-out captions (chance 12%); where the caption names it, centre colour in "
          "{centre:.0%} (chance 25%), petal count in {count:.0%} (25%)".format(**seen))


def main():
    p = argparse.ArgumentParser(prog="common.py", description="Train a text encoder and print its retrieval on held-out classes (of a folder: "
                                                              "pictures); or make a small file of a checkpoint.")
    p.add_argument("--encoder", choices=["char-cnn-rnn", "damsm"], default="char-cnn-rnn")
    p.add_argument("--data", default="toy", help="toy, flowers, cub, coco or a folder of pictures and captions (default: toy)")
    p.add_argument("--root", default="datasets", help="folder that holds the named data sets (default: datasets)")
    p.add_argument("--iterations", type=number(int, 1), help="batches (default: 3000; toy 400)")
    p.add_argument("--image-features", choices=["inception", "small"], help="picture features (default: inception; toy small)")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument("--export", type=Path, metavar="FILE", help="no training: what drawing needs of a script's checkpoint, in float16, to --out")
    p.add_argument("--out", type=Path, help="file to write (default: runs/<encoder>-<data>/encoder.pt)")
    a = p.parse_args()
    if a.export:
        if not a.out:
            raise UserError("--export needs --out, the file to write")
        export(a.export, a.out)
        print(f"saved to {a.out}, {a.out.stat().st_size / 1e6:.1f} MB")
        return
    out = a.out or encoder_path(a.encoder, a.data)
    print(train_text_encoder(a.encoder, a.data, a.root, device(a.device), out, a.iterations, a.image_features, a.seed))
    print(f"saved to {out}")


if __name__ == "__main__":
    sys.exit(guard(main))
