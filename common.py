"""Text encoders and their training, evaluation, and what every run needs.

    python common.py --encoder damsm --data flowers                    # train a text encoder
    python common.py --export runs/dfgan-cub/last.pt --out small.pt    # for sampling only

char-cnn-rnn: Reed et al., CVPR 2016 (arXiv 1605.05395), 1024-d, for gan_cls.py and stackgan.py
damsm: AttnGAN, Xu et al., CVPR 2018 (arXiv 1711.10485), 256-d, for dfgan.py
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import data
from data import Progress, UserError


# ---- Processes of torchrun

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device):
    """Join the processes of torchrun, if any. Return the device of this process."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo",
                                timeout=datetime.timedelta(days=1))    # rank 0 prepares for hours
        if rank() > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
    return device


@contextlib.contextmanager
def main_process_first():
    """Run the block on rank 0, then on the others, which find its files."""
    if rank() > 0:
        dist.all_reduce(torch.zeros(1))
    yield
    if rank() == 0 and world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def average_gradients(net, optimizer):
    """Average gradients over the processes before each step, in one all-reduce.

    Not DistributedDataParallel: D runs several times a step, and torch.func.grad bypasses its
    forward. Batch norm sees the joint batch on GPUs, its own share on CPUs."""
    def all_reduce(*_):
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [m.view_as(g) for m, g in zip(means, grads)])

    if world_size() > 1:
        optimizer.register_step_pre_hook(all_reduce)
        if next(net.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)


# ---- Runs

def run(main):
    """Run a command line; return its exit status, 2 after a UserError."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.__stderr__)
        return 2


class GracefulStop:
    """After Ctrl-C or SIGTERM, `requested` is true in all processes."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.signal = number
        print("\nsaving; run the same command to resume", file=sys.stderr)
        if world_size() == 1:    # torchrun repeats a signal
            signal.signal(number, signal.SIG_DFL)    # a second one ends the process

    def requested(self):
        if world_size() > 1:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = int(number)
        return self.signal > 0


def save_checkpoint(path, state):
    """Write a dict atomically, on rank 0; of networks and optimizers the state_dict."""
    if rank() == 0:
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        with data.atomic_write(path) as part, open(part, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())


def load_checkpoint(path, *kinds):
    """Load a file of `save_checkpoint` whose "kind" is one of kinds. It cannot execute code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["kind"] in kinds, state["kind"]
    except Exception as error:
        raise UserError(f"{path} is no {kinds[0]} checkpoint ({str(error)[:99]})") from None
    return state


def export(source, path):
    """Write what sampling needs of a checkpoint: the EMA of G and the text encoder, in float16."""
    state = load_checkpoint(source, "gan_cls", "stackgan", "dfgan")
    for name in ("ema", "G1", "text_encoder"):
        for key, value in state.get(name, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:    # not variances: too small
                state[name][key] = value.half()
    state["args"]["data"] = Path(state["args"]["data"]).name
    dropped = ("G", "D", "opt_g", "opt_d", "history", "sums")
    save_checkpoint(path, {k: v for k, v in state.items() if k not in dropped})


def save_grid(path, images, columns):
    """Write images (N, 3, S, S) in [-1, 1] as a PNG with rows of `columns` images."""
    from torchvision.utils import save_image
    if rank() == 0:
        with data.atomic_write(path) as part:
            save_image(images, part, "png", nrow=columns, normalize=True, value_range=(-1, 1),
                       padding=2 if columns > 1 else 0)


def save_log(path, history):
    """Write a list of dicts as CSV."""
    if rank() == 0:
        with data.atomic_write(path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, {key: None for row in history for key in row})
            writer.writeheader()
            writer.writerows(history)


def slug(captions):
    """Return a file name for captions."""
    digest = hashlib.sha256(repr(captions).encode()).hexdigest()[:8]
    return re.sub("[^a-z0-9]+", "-", captions[0].lower())[:40] + "-" + digest


def add_common_args(parser):
    """Add the flags that all scripts share."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--data", default="toy", help="toy, flowers, cub, coco or a folder")
    add("--root", default="datasets", help="where flowers, cub and coco are")
    add("--out-dir", help="of the run; default: runs/<script>-<data>")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=0, help="of a new run; of the noise of samples")
    add("--ema", type=float, default=0.999, help="decay of the moving average of G")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    add("--text-encoder", metavar="FILE", help="default: released, or trained here")
    add("--encoder-iterations", type=int, help="of training the text encoder")
    add("--image-features", choices=["inception", "small"], help="that it is trained with")
    add("--eval-every", type=int, default=0, metavar="EPOCHS", help="log metrics; 0: never")
    add("--sample", nargs="+", metavar="CAPTION", help="draw a row of images a caption")
    add("--samples-per-caption", type=int, default=8, metavar="N", help="images a row")
    add("--num-images", type=int, default=0, help="with --sample: files a caption, no grid")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="draw from caption A to B")
    add("--interpolate-noise", action="store_true", help="with --interpolate: noise to noise")
    add("--evaluate", action="store_true", help="print FID and other metrics")
    add("--fid-samples", type=int, default=30000, metavar="N", help="images to evaluate")
    add("--r-precision-encoder", metavar="FILE", help="default: runs/damsm-<data>/encoder.pt")


def parse_args(parser, presets, fixed, argv=None):
    """Return the flags and the checkpoint of their run, or None.

    Defaults: of the checkpoint for the names in `fixed`, else of presets[data], else the paper's.
    A flag that contradicts the checkpoint is an error."""
    script = parser.prog.removesuffix(".py")
    add_common_args(parser)
    args = parser.parse_args(argv)
    training = not (args.sample or args.interpolate or args.evaluate)
    if (args.num_images and not args.sample) or (args.interpolate_noise and not args.interpolate):
        parser.error("--num-images needs --sample, and --interpolate-noise --interpolate")
    out_dir = Path(args.out_dir or f"runs/{script}-{Path(args.data).resolve().name}")
    path, checkpoint, saved = out_dir / "last.pt", None, {}
    if not (training or args.out_dir or path.exists()):
        out_dir = Path(f"runs/{script}-weights")
        path = Path(__file__).parent / "weights" / f"{script}.pt"
    if path.exists():
        checkpoint = load_checkpoint(path, script)
        saved = {n: checkpoint["args"][n] for n in fixed if training or n != "seed"}
        print(f"{path}: trained on {saved['data']}, {checkpoint['step']} steps")
    elif not training and not getattr(args, "init", None):
        parser.error(f"{path} does not exist; train first, without --sample or --evaluate")
    if training and checkpoint and "G" not in checkpoint:
        parser.error("an exported model cannot be trained")
    parser.set_defaults(**presets.get(saved.get("data", args.data), {}) | saved)
    args = parser.parse_args(argv)
    args.data, args.out_dir = data.dataset_id(args.data), out_dir
    for n in saved:
        if getattr(args, n) != saved[n]:
            flag = f"--{n.replace('_', '-')} {getattr(args, n)}"
            parser.error(f"{flag} contradicts {path}, which has {saved[n]}")
    if "cuda" in args.device and not torch.cuda.is_available():
        parser.error("CUDA is not available")
    args.device = init_distributed(args.device)
    if args.batch_size % world_size():
        parser.error(f"--batch-size {args.batch_size} is no multiple of {world_size()} processes")
    cuda = "cuda" in args.device
    args.bf16 = cuda and torch.cuda.is_bf16_supported(False) if args.bf16 is None else args.bf16
    args.compile = cuda if args.compile is None else args.compile
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True    # shapes are constant
    return args, checkpoint


# ---- Text encoders

class TextEncoder(nn.Module):
    """tokenize(captions) -> integers (B, T); embed(tokens) -> sentence embeddings (B, dim).

    config: part of the state dict; "description", "vocabulary", "min_prompt_length"."""

    def get_extra_state(self):
        return self.config

    def set_extra_state(self, config):
        self.config = config

    @torch.no_grad()
    def encode(self, captions):
        """Return the embeddings of any number of captions, (N, dim)."""
        device, embeddings = next(self.parameters()).device, []
        bar = Progress(len(captions), "embedding captions", "captions")
        for i in range(0, len(captions), 256):
            embeddings.append(self.eval().embed(self.tokenize(captions[i:i + 256]).to(device)))
            bar.update(len(embeddings[-1]))
        return torch.cat(embeddings)

    def encode_prompts(self, captions):
        """Return the embeddings of captions that a user typed; warn of what is unknown.

        A prompt is repeated up to the shortest length of training captions: else most steps of
        CharCNNRNN see blanks, which they never saw in training."""
        captions = [captions] if isinstance(captions, str) else captions
        for caption in captions:
            parts = self.split(caption)
            unknown = [part for part in parts if part not in self.numbers]
            if len(unknown) == len(parts):
                raise UserError(f"the text encoder knows no part of {caption[:99]!r}")
            if unknown:
                print(f"warning: unknown to the text encoder: {' '.join(unknown)}")
        n = self.config.get("min_prompt_length", 0) + 1
        return self.encode([" ".join([c] * max(1, n // (len(c) + 1))) for c in captions])


class CharCNNRNN(TextEncoder):
    """Characters -> (B, 1024): three convolutions, a gated recurrence, the mean of its states.

    widths: of the convolutions. Parameters have the names of the converted encoders."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
    numbers = {c: i + 1 for i, c in enumerate(alphabet)}    # "-" occurs twice: the second counts
    length = 201

    def __init__(self, widths=(384, 512, 512), dim=1024):
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv2 = nn.Conv1d(70, a, 4), nn.Conv1d(a, b, 4)
        self.conv3 = nn.Conv1d(b, c, 4)
        names = ("i2h", "i2h_update", "i2h_reset", "h2h", "h2h_update", "h2h_reset")
        self.rnn = nn.ModuleDict({name: nn.Linear(c, c) for name in names})
        self.emb_proj = nn.Linear(c, dim)
        self.dim, self.config = dim, {}

    def split(self, caption):
        return list(caption.lower())

    def tokenize(self, captions, rng=None):
        """Return positions in the alphabet (B, 201); 0, a blank, for other characters."""
        rows = [[self.numbers.get(c, 0) for c in self.split(caption)] for caption in captions]
        return torch.tensor([(row + [0] * self.length)[:self.length] for row in rows])

    def embed(self, tokens):
        x = F.one_hot(tokens, 71)[:, :, 1:].float().transpose(1, 2)    # (B, 70, 201)
        x = F.max_pool1d(F.threshold(self.conv1(x), 1e-6, 0), 3)       # (B, 384, 66)
        x = F.max_pool1d(F.threshold(self.conv2(x), 1e-6, 0), 3)       # (B, 512, 21)
        x = F.threshold(self.conv3(x), 1e-6, 0).transpose(1, 2)        # (B, 18, 512)
        new, update, reset = (self.rnn[name](x) for name in ("i2h", "i2h_update", "i2h_reset"))
        h = total = torch.tanh(new[:, 0])
        for t in range(1, x.shape[1]):
            z = torch.sigmoid(update[:, t] + self.rnn["h2h_update"](h))
            r = torch.sigmoid(reset[:, t] + self.rnn["h2h_reset"](h))
            # z weighs the candidate: the opposite of torch.nn.GRU
            h = z * torch.tanh(new[:, t] + self.rnn["h2h"](r * h)) + (1 - z) * h
            total = total + h
        return self.emb_proj(total / x.shape[1])                       # (B, 1024)


class DAMSMTextEncoder(TextEncoder):
    """Words -> features (B, 256, T) and sentence (B, 256), the last states of a bi-LSTM.

    vocabulary: list of words; number 0 is padding. Released encoders: words of training and test
    captions; trained here: of training captions."""
    dim, max_words = 256, 18

    def __init__(self, vocabulary):
        super().__init__()
        self.set_extra_state({"vocabulary": vocabulary})
        self.encoder = nn.Embedding(len(vocabulary), 300)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(300, 128, batch_first=True, bidirectional=True)

    def set_extra_state(self, config):
        self.config = config
        self.numbers = {word: i for i, word in enumerate(config["vocabulary"])}

    @staticmethod
    def split(caption):
        return re.findall(r"\w+", caption.lower())

    def tokenize(self, captions, rng=None):
        """Return word numbers (B, T). Of more than 18 words a random 18, in order.

        Released code: draws them anew at each use; here a caption is embedded once."""
        rng, rows = rng or torch.Generator().manual_seed(0), []
        for caption in captions:
            row = [self.numbers[w] for w in self.split(caption) if w in self.numbers] or [0]
            kept = torch.randperm(len(row), generator=rng)[:self.max_words].sort().values
            rows.append(torch.tensor(row)[kept])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, tokens):
        lengths = (tokens != 0).sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.drop(self.encoder(tokens)), lengths, batch_first=True, enforce_sorted=False)
        words, (h, _) = self.rnn(packed)
        words, _ = nn.utils.rnn.pad_packed_sequence(words, True, total_length=tokens.shape[1])
        return words.transpose(1, 2), h.transpose(0, 1).flatten(1)

    def embed(self, tokens):
        return self(tokens)[1]


def text_encoder_from_state_dict(state):
    """Return a frozen text encoder. The state dict holds its widths or its vocabulary."""
    if "conv1.weight" not in state:
        encoder = DAMSMTextEncoder(state["_extra_state"]["vocabulary"])
    elif "rnn.i2h_update.weight" in state:
        widths = [state[f"conv{i}.weight"].shape[0] for i in (1, 2, 3)]
        encoder = CharCNNRNN(widths, len(state["emb_proj.bias"]))
    else:
        raise UserError("Reed's encoder of flowers is another network (ReLU recurrence, 8 steps)")
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)


# ---- Losses of the text encoders

def joint_embedding_loss(image, text):
    """Symmetric structured joint embedding of one image and text (B, 1024) of each class (Reed et
    al. CVPR 2016, eq. 3-5): max(0, 1 + F(wrong) - F(right)), both ways, F an inner product."""
    score = image @ text.T    # (B, B)
    right = score.diag()
    loss = F.relu(1 + score - right[:, None]) + F.relu(1 + score - right[None, :])
    return loss.fill_diagonal_(0).mean()


def symmetric_cross_entropy(score, classes):
    """Cross-entropy of the right pairs over the rows plus over the columns of score (B, B).

    Other pairs of the same class are left out (AttnGAN's code)."""
    score = score.masked_fill((classes[:, None] == classes).fill_diagonal_(False), -math.inf)
    target = torch.arange(len(score), device=score.device)
    return F.cross_entropy(score, target) + F.cross_entropy(score.T, target)


def sentence_loss(image, sentence, classes, gamma3=10.0):
    """DAMSM loss between images and sentences, (B, 256) each (AttnGAN, section 3.2)."""
    return symmetric_cross_entropy(gamma3 * F.normalize(image) @ F.normalize(sentence).T, classes)


def word_loss(regions, words, lengths, classes, gamma1=4.0, gamma2=5.0, gamma3=10.0):
    """DAMSM loss between regions (B, 256, N) and words (B, 256, T), of which the first lengths (B,)
    count (AttnGAN, eq. 7-12): each word attends to the regions of every image."""
    valid = torch.arange(words.shape[2], device=words.device) < lengths[:, None]    # (B, T)
    s = torch.einsum("idn,jdt->ijnt", regions, words)    # of image i and caption j
    attention = s.masked_fill(~valid[None, :, None], -math.inf).softmax(3)          # eq. 8
    attention = (gamma1 * attention).softmax(2)                                     # eq. 9
    # The cosine of a word and its context c = regions @ attention (eq. 10) without storing c:
    # c.word = s.attention and |c|^2 = attention.(regions^T regions).attention
    gram = torch.einsum("idn,idm->inm", regions, regions)
    square = (torch.einsum("inm,ijmt->ijnt", gram, attention) * attention).sum(2)   # (B, B, T)
    square = square.clamp(min=1e-12) * words.square().sum(1).clamp(min=1e-12)
    cosine = (s * attention).sum(2) * square.rsqrt()
    match = (gamma2 * cosine).masked_fill(~valid[None], -math.inf).logsumexp(2)     # (B, B)
    return symmetric_cross_entropy(gamma3 * match, classes)


# ---- Image features

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


class FIDInception(nn.Module):
    """pytorch-fid's Inception-v3: images (B, 3, H, W) in [-1, 1] -> pooled features (B, 2048),
    regions (B, 768, 36). AttnGAN has 17 x 17 regions; averaged to 6 x 6 they need 8 times less."""

    def __init__(self):
        super().__init__()
        from torchvision.models import inception_v3
        try:
            weights = torch.hub.load_state_dict_from_url(INCEPTION, None, "cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot download {INCEPTION} ({error}); put the file into "
                            f"{torch.hub.get_dir()}/checkpoints") from None
        net = inception_v3(None, num_classes=1008, aux_logits=False, init_weights=False)
        net.load_state_dict(weights, strict=False)
        self.head, net.fc = (net.fc if "fc.weight" in weights else None), nn.Identity()
        for layer in net.eval().modules():
            if hasattr(layer, "bn"):    # part of the convolution: 1.4 times faster on a CPU
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        # torchvision's average pools count the padding; those of the FID's network do not, and its
        # last one is a maximum.
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(
                    self.max_pool if name == "Mixed_7c" else self.correct_average)
        net.Mixed_7b.register_forward_hook(lambda block, x, y: setattr(self, "last", y))
        net.Mixed_6e.register_forward_hook(lambda block, x, y: setattr(self, "regions", y))
        self.net = net.to(memory_format=torch.channels_last)
        self.requires_grad_(False)

    def correct_average(self, branch, x):
        return x[0] / F.avg_pool2d(torch.ones_like(x[0][:1, :1]), 3, 1, 1)

    def max_pool(self, branch, x):
        return F.max_pool2d(self.last, 3, 1, 1)

    @torch.no_grad()
    def forward(self, x):
        if x.shape[-1] != 299:
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        with torch.backends.cudnn.flags(allow_tf32=False):
            pooled = self.net(x.to(memory_format=torch.channels_last))
        return pooled, F.adaptive_avg_pool2d(self.regions, 6).flatten(2)


def inception_features(dataset, device):
    """Return pooled features and regions, (N, 2048 + 768 * 36) in float16, of images at 299 px."""
    net, rows = FIDInception().to(device), []
    for images in data.load_images(dataset.records, 299, "Inception features"):
        pooled, regions = net(torch.from_numpy(images).to(device).float() / 127.5 - 1)
        rows.append(torch.cat((pooled, regions.flatten(1)), 1).half().cpu())
    return torch.cat(rows)


class ImageEncoder(nn.Module):
    """What text is matched with: features x -> global (B, dim), local (B, 256, N).

    x: rows of inception_features. small: x are images, and a small CNN is trained along."""

    def __init__(self, dim, small):
        super().__init__()
        self.small, widths, layers = small, (3, 24, 48, 96, 128), []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.cnn = nn.Sequential(*layers) if small else None
        self.norm = nn.BatchNorm1d(128 if small else 2048, affine=False)
        self.global_proj = nn.Linear(128 if small else 2048, dim)
        self.local_proj = nn.Conv1d(128 if small else 768, 256, 1, bias=False)

    def embed(self, pooled):
        return self.global_proj(self.norm(pooled))

    def forward(self, x):
        if self.small:
            x = self.cnn(x)
            pooled, regions = x.mean((2, 3)), F.adaptive_avg_pool2d(x, 4).flatten(2)
        else:
            pooled, regions = x[:, :2048], x[:, 2048:].unflatten(1, (768, 36))
        return self.embed(pooled), self.local_proj(regions)


# ---- Training of the text encoders

@torch.no_grad()
def fold_batch_norm(encoder, norm, captions):
    """Make the norm behind the last layer part of it, and scale embeddings to a mean square length
    of 1: at 32 times that, the text swamps z, and G draws one image a caption."""
    scale = (norm.running_var + norm.eps).rsqrt()
    encoder.emb_proj.bias.sub_(norm.running_mean).mul_(scale)
    encoder.emb_proj.weight.mul_(scale[:, None])
    rms = encoder.encode(captions[::len(captions) // 1000 + 1]).square().sum(1).mean().sqrt()
    encoder.emb_proj.bias.div_(rms)
    encoder.emb_proj.weight.div_(rms)


def retrieval_accuracy(image, text, image_class, text_class):
    """Return how often an image (N, D) is closest to the mean text (M, D) of its own class, the
    measure of Reed et al."""
    means = text.new_zeros(int(text_class.max()) + 1, text.shape[1])
    means.index_add_(0, text_class, text).div_(text_class.bincount()[:, None])
    return ((image @ means.T).argmax(1) == image_class).float().mean().item()


def train_text_encoder(kind, name, root, device, path, iterations=None, features=None, seed=0):
    """Train a text encoder on a dataset and save it with its image encoder."""
    toy, sje = name == "toy", kind == "char-cnn-rnn"
    small = features == "small" or (toy and features is None)
    train_set, test_set = (data.load_dataset(name, s, 64, root) for s in ("train", "test"))
    iterations = iterations or (400 if toy else min(max(len(train_set), 300), 3000))
    minutes = (iterations * (0.1 if toy else 0.4) + len(train_set) * 0.1 * (not small)) / 60
    print(f"training {kind} on {len(train_set)} images, {iterations} iterations, {minutes:.0f} min "
          f"or so on a CPU (--encoder-iterations, --image-features)", flush=True)
    torch.manual_seed(seed)
    if sje:
        encoder = CharCNNRNN((96, 128, 128) if toy else (384, 512, 512))
        lengths = [len(caption) for caption in train_set.captions]
        encoder.config["min_prompt_length"] = int(np.quantile(lengths, 0.001))
    else:
        words = (word for c in train_set.captions for word in DAMSMTextEncoder.split(c))
        encoder = DAMSMTextEncoder(["<end>", *dict.fromkeys(words)])
    image_encoder = ImageEncoder(encoder.dim, small)
    norm = nn.BatchNorm1d(encoder.dim, affine=False) if sje else nn.Identity()
    nets = nn.ModuleList([encoder, image_encoder, norm]).to(device)
    # SJE, released code: RMSprop 7e-4 without norms; Adam with norms learns faster
    lr, decay, betas = (3e-4, 0.02, (0.9, 0.999)) if sje else (2e-3, 0.1, (0.5, 0.999))
    if sje:
        nn.init.zeros_(image_encoder.global_proj.weight)    # F = 0 at any scale of the text
    optimizer = torch.optim.Adam(nets.parameters(), lr, betas)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay ** (1 / iterations))
    rows = {d: None if small else inception_features(d, device) for d in (train_set, test_set)}

    def image_features(dataset, index):
        return (dataset.center_crop(index) if small else rows[dataset][index]).to(device).float()

    batches, rng = data.Batches(train_set, 48, seed), torch.Generator().manual_seed(seed)
    bar = Progress(iterations, f"training {kind}", "iterations")
    for _ in range(iterations):
        index = torch.randperm(len(train_set), generator=rng)
        if sje and len(batches.class_counts) >= 40:    # one image each of 40 classes
            first = np.unique(train_set.classes[index], return_index=True)[1]
            index = index[first][torch.randperm(len(first), generator=rng)]
        index = index[:40 if sje else 48]
        captions = [train_set.captions[j] for j in batches.sample_captions(index, rng)[:, 0]]
        tokens = encoder.tokenize(captions, rng).to(device)
        nets.train()
        whole, regions = image_encoder(image_features(train_set, index))
        if sje:
            loss = joint_embedding_loss(whole, norm(encoder.embed(tokens)))
        else:
            (words, sentence), classes = encoder(tokens), train_set.classes[index].to(device)
            lengths = (tokens != 0).sum(1).clamp(min=1)
            loss = word_loss(regions, words, lengths, classes)
            loss = loss + sentence_loss(whole, sentence, classes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), math.inf if sje else 0.25)
        optimizer.step()
        scheduler.step()
        bar.note = f"loss {loss.item():.3f}"
        bar.update()

    nets.eval()
    if sje:
        fold_batch_norm(encoder, norm, train_set.captions)
    with torch.no_grad():
        image = torch.cat([image_encoder(image_features(test_set, index))[0]
                           for index in torch.arange(len(test_set)).split(64)])
    text, classes = encoder.encode(test_set.captions), test_set.classes.to(device)
    if not sje:
        image, text = F.normalize(image), F.normalize(text)
    accuracy = retrieval_accuracy(image, text, classes, classes[test_set.caption_owners])
    chance = 1 / len(classes.unique())
    encoder.config["description"] = (
        f"{kind} trained here on {Path(name).name}, {iterations} iterations; retrieval of test "
        f"classes {accuracy:.1%}, chance {chance:.1%}")
    save_checkpoint(path, {"kind": "text encoder", "data": name, "small": small, "encoder": encoder,
                           "iterations": iterations, "image_encoder": image_encoder})


# ---- Choice of the text encoder

ATTNGAN = "https://raw.githubusercontent.com/taoxugit/AttnGAN/master/eval/data/"
ATTNGAN_COCO = "https://huggingface.co/mediasynthesismuseum/attngan-coco/resolve/main/"
PRETRAINED = {    # released vocabularies and DAMSM encoders: url, sha256
    "cub": {ATTNGAN + "captions.pickle":
            "84e9f81218102873b65ab79c265f0a0a370bf38237b0ef5cb175d0f51c00ab68",
            ATTNGAN + "text_encoder200.pth":
            "d7278a9b4801633eb42d43de67cba51746daf5143be532660bf1c15608690c01"},
    "coco": {ATTNGAN_COCO + "captions.pickle": None,
             ATTNGAN_COCO + "text_encoder100.pth":
             "24cf394756359d5cf019845396006639813404a9f9c8dd03b0874c694a0842d6"}}


class RestrictedUnpickler(pickle.Unpickler):
    """Loads plain containers: released vocabularies are pickles, which could execute code."""

    def find_class(self, module, name):
        if (module, name) != ("_codecs", "encode"):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def load_text_encoder(path):
    """Load an encoder.pt, the text encoder of a checkpoint, or a released state dict; a released
    DAMSM needs its captions.pickle beside it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "text_encoder" in state:
            state = state["text_encoder"]
        elif "image_encoder" in state:
            state = state["encoder"]
        else:
            state["_extra_state"] = {"description": f"released encoder {path}"}
        if "encoder.weight" in state and "vocabulary" not in state["_extra_state"]:
            with open(Path(path).with_name("captions.pickle"), "rb") as file:
                words = RestrictedUnpickler(file, encoding="latin1").load()[2]
            state["_extra_state"]["vocabulary"] = [words[i] for i in range(len(words))]
        return text_encoder_from_state_dict(state)
    except (OSError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load the text encoder {path} ({str(error)[:99]})") from None


def encoder_path(kind, name):
    return Path("runs") / f"{kind}-{Path(name).name}" / "encoder.pt"


def get_text_encoder(kind, dataset, root, device, checkpoint=None, path=None, iterations=None,
                     features=None):
    """Return the frozen text encoder of a run: the checkpoint's, else that of the file `path`, else
    the released one (DAMSM of cub and coco), else the one trained here, now if need be."""
    if checkpoint:
        return text_encoder_from_state_dict(checkpoint["text_encoder"]).to(device)
    if not path and kind == "damsm" and dataset.name in PRETRAINED:
        for url, sha256 in PRETRAINED[dataset.name].items():
            path = Path(root, dataset.name, "damsm", Path(url).name)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), sha256)
    if not path:
        path = encoder_path(kind, dataset.name)
        found = load_checkpoint(path, "text encoder") if path.exists() else {}
        if (found.get("data") != dataset.name or iterations not in (None, found["iterations"])
                or features == ("inception" if found["small"] else "small")):
            train_text_encoder(kind, dataset.name, root, device, path, iterations, features)
    encoder = load_text_encoder(path)
    if encoder.dim != (1024 if kind == "char-cnn-rnn" else 256):
        raise UserError(f"{path} is a {type(encoder).__name__}; this script needs {kind}")
    return encoder.to(device)


def embed_captions(encoder, dataset):
    """Return the embeddings of all captions of a dataset, (M, dim), cached on disk."""
    digest = hashlib.sha256(repr(dataset.captions).encode(errors="replace"))
    for p in encoder.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    path = Path(f"{dataset.cache}-embeddings-{digest.hexdigest()[:16]}.pt")
    if not path.exists():
        save_checkpoint(path, {"kind": "embeddings", "x": encoder.encode(dataset.captions).cpu()})
    embeddings = load_checkpoint(path, "embeddings")["x"]
    rms = embeddings.square().sum(1).mean().sqrt()
    print(f"text encoder: {encoder.config['description']}; RMS length of embeddings {rms:.2f}")
    if encoder.dim == 1024 and rms > 2:
        print("character encoders trained here have 1: at a larger length G sees less of z")
    return embeddings.to(next(encoder.parameters()).device)


# ---- Evaluation

def mean_and_cov(features):
    """Return the mean (D,) and covariance (D, D) of features (N, D), in float64."""
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, eq. 6).

    The eigenvalues of C1 C2 are those of the symmetric C1^(1/2) C2 C1^(1/2)."""
    value, vector = torch.linalg.eigh(cov1)
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    overlap = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap).item()


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)), mean of ten splits of logits (N, C) (Salimans et al. 2016)."""
    scores = []
    for log_p in logits.double().log_softmax(1).tensor_split(splits):
        kl = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean()
        scores.append(kl.exp())
    return torch.stack(scores).mean().item()


def r_precision(image, captions, text, classes):
    """Return how often an image (N, D) is closer, by cosine, to its own caption (N,) than to 99
    captions of other classes (AttnGAN, section 4.1). text (M, D), classes (M,): of all captions."""
    rng, counts = torch.Generator().manual_seed(0), classes.bincount()
    wrong = data.sample_other_class(classes.argsort(), counts, classes[captions], 99, rng)
    candidates = torch.cat((captions[:, None], wrong), 1)    # (N, 100)
    image, text, hits = F.normalize(image), F.normalize(text), 0
    for x, numbers in zip(image.split(64), candidates.split(64)):
        score = torch.einsum("nd,ncd->nc", x, text[numbers])
        hits += (score[:, 0] >= score.amax(1) - 1e-6).sum().item()    # equal captions are right
    return hits / len(image)


def attribute_accuracy(images, captions, dataset):
    """Toy: return how often images show the petal colour, centre colour and petal count that their
    captions name. images: batches (B, 3, S, S); captions: batches of their numbers."""
    right = {"petal": [], "centre": [], "count": []}
    for x, numbers in zip(images, captions):
        for shown, i in zip(data.classify_toy(x), numbers):
            attributes = dataset.records[dataset.caption_owners[i]].attributes
            for name in right:
                if attributes[name] in dataset.captions[i]:
                    right[name].append(shown[name] == attributes[name])
    return {name: sum(values) / len(values) for name, values in right.items()}


def evaluation_captions(dataset, num_samples):
    """Return numbers of captions in batches: all in random order, repeated up to num_samples."""
    order = torch.randperm(len(dataset.captions), generator=torch.Generator().manual_seed(0))
    return order.repeat(math.ceil(num_samples / len(order)))[:num_samples].split(64)


@torch.no_grad()
def evaluate(images, captions, groups, test_set, device, r_precision_encoder=None):
    """Return metrics of images, batches (B, 3, S, S) of `captions`, as a dict.

    groups: batches of 8 samples of one caption."""
    if test_set.name == "toy":    # no download
        metrics = attribute_accuracy(images, captions, test_set)
        print(metrics)
        return metrics
    net, encoder = FIDInception().to(device), None
    path = Path(r_precision_encoder or encoder_path("damsm", test_set.name))
    if path.exists() and len(test_set.captions) >= 200:
        state = load_checkpoint(path, "text encoder")
        encoder = ImageEncoder(256, state["small"]).to(device).eval()
        encoder.load_state_dict(state["image_encoder"])
    else:
        print(f"no R-precision: it needs 200 test captions and {path} (python common.py --encoder "
              f"damsm --data {test_set.name})")

    def features(batches):
        pooled, embedded = [], [torch.empty(0)]
        for x in batches:
            x = ((x.to(device).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1    # as in a PNG
            pooled.append(net(x)[0])
            if encoder and encoder.small:
                x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
                embedded.append(encoder(x)[0].cpu())
            elif encoder:
                embedded.append(encoder.embed(pooled[-1]).cpu())
        return torch.cat(pooled), torch.cat(embedded)

    fake, image = features(images)
    real, _ = features(test_set.center_crop(i) for i in torch.arange(len(test_set)).split(64))
    print(f"FID of {len(fake)} images against {len(real)} real test images of {test_set.size} px"
          + ("; too few to mean much" if min(len(fake), len(real)) < 500 else ""))
    metrics = {"fid": frechet_distance(*mean_and_cov(real), *mean_and_cov(fake))}
    if net.head:
        print("Inception Score by the FID's network; published values of CUB are by another one")
        metrics["inception_score"] = inception_score(net.head(fake))
    distances = [F.pdist(net(x.to(device))[0]).mean() for x in groups]
    metrics["diversity"] = torch.stack(distances).mean().item()
    if encoder:
        text = embed_captions(load_text_encoder(path).to(device), test_set).cpu()
        classes = test_set.classes[test_set.caption_owners]
        metrics["r_precision"] = r_precision(image, torch.cat(captions), text, classes)
    print(metrics)
    return metrics


def main():
    parser = argparse.ArgumentParser(description="Train a text encoder, or export a model.")
    parser.add_argument("--encoder", choices=["char-cnn-rnn", "damsm"], default="char-cnn-rnn")
    parser.add_argument("--data", default="toy", help="toy, flowers, cub, coco or a folder")
    parser.add_argument("--root", default="datasets", help="where flowers, cub and coco are")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--iterations", type=int, help="default: as many as images, 300 to 3000")
    parser.add_argument("--image-features", choices=["inception", "small"])
    parser.add_argument("--export", metavar="FILE", help="checkpoint, to make a small file of")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    name = data.dataset_id(args.data)
    out = args.out or encoder_path(args.encoder, name)
    if args.export:
        export(args.export, out)
    else:
        train_text_encoder(args.encoder, name, args.root, init_distributed(args.device), out,
                           args.iterations, args.image_features)
        print(load_text_encoder(out).config["description"])
    print(f"saved {out}")


if __name__ == "__main__":
    sys.exit(run(main))
