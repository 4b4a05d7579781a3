"""Text encoders and their training, evaluation, and what every training run needs.

    python common.py --encoder damsm --data flowers    # train a text encoder
    python common.py --export runs/dfgan-cub/last.pt --out small.pt    # for sampling, in float16

char-cnn-rnn  Reed et al., Learning Deep Representations of Fine-grained Visual Descriptions,
              CVPR 2016: embeddings of 1024 dimensions for gan_cls.py and stackgan.py
damsm         Xu et al., AttnGAN, CVPR 2018, section 3.2: 256 dimensions for dfgan.py
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

from data import (Batches, Progress, UserError, atomic_write, classify_toy, dataset_id,
                  load_dataset, load_images, memmap_tensor, sample_other_class)


# ---- Processes of torchrun

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device):
    """Join the processes of torchrun, if it started this one; return the device of this process."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
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
    """Run the block on rank 0, then on the others, which find the files that rank 0 has written."""
    if rank() > 0:
        dist.all_reduce(torch.zeros(1))
    yield
    if rank() == 0 and world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def average_gradients(nets, optimizers):
    """Average gradients over the processes before each optimizer step, in one all-reduce.

    Not DistributedDataParallel: D runs several times a step, and torch.func.grad bypasses its
    forward. On GPUs batch norm sees the joint batch, on CPUs the share of its process."""
    def all_reduce(optimizer, args, kwargs):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        means = (flat / world_size()).split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [m.view_as(g) for m, g in zip(means, grads)])

    if world_size() > 1:
        for net, optimizer in zip(nets, optimizers):
            if next(net.parameters()).is_cuda:
                nn.SyncBatchNorm.convert_sync_batchnorm(net)
            optimizer.register_step_pre_hook(all_reduce)


def gather(x):
    """Concatenate a tensor over the processes."""
    if world_size() == 1:
        return x
    parts = [None] * world_size()
    dist.all_gather_object(parts, x.cpu())
    return torch.cat(parts)


# ---- Runs

def run(main):
    """Run a command line and return its exit status: 2 after a user error, with one line."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.__stderr__)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class GracefulStop:
    """After Ctrl-C or SIGTERM, `requested` is true in all processes; a second signal exits."""
    signal = 0

    def __init__(self):
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number, frame):
        if self.signal and world_size() == 1:    # torchrun repeats the signal
            os._exit(128 + number)
        self.signal = number
        print("\nstopping after this step; again to stop at once", file=sys.stderr)

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
        with atomic_write(path) as part, open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())


def load_checkpoint(path, *kinds):
    """Load a file of `save_checkpoint` whose "kind" is one of kinds. It cannot execute code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["kind"] not in kinds:
            raise ValueError(f"its kind is {state['kind']}")
    except Exception as error:
        raise UserError(f"{path} is no {kinds[0]} checkpoint ({str(error)[:99]})") from None
    return state


def export(source, path):
    """Write what sampling needs of a checkpoint: the EMA of G and the text encoder, in float16."""
    state = load_checkpoint(source, "gan_cls", "stackgan", "dfgan")
    for name in ("G", "D", "opt_g", "opt_d", "history"):
        state.pop(name, None)
    for name in {"ema", "G1", "text_encoder"} & state.keys():
        for key, value in state[name].items():    # vectors stay float32, for small variances
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                state[name][key] = value.half()
    state["args"] = {k: Path(v).name if isinstance(v, str) else v for k, v in state["args"].items()}
    save_checkpoint(path, state)


def save_grid(path, images, columns, captions=()):
    """Write images (N, 3, S, S) in [-1, 1] as one PNG, `columns` images a row."""
    from torchvision.utils import save_image
    if rank() == 0:
        with atomic_write(path) as part:
            save_image(images.float(), part, format="png", nrow=columns, normalize=True,
                       value_range=(-1, 1), padding=2 if columns > 1 else 0)
        if captions:
            print(f"captions: {', '.join(map(repr, captions))}\n{path}")


def save_images(folder, images):
    """Write each image of an iterable of (1, 3, S, S) as folder/00000.png ..."""
    for i, image in enumerate(images):
        save_grid(folder / f"{i:05}.png", image, 1)
    print(f"{i + 1} images in {folder}")


def save_log(path, history):
    """Write a list of dicts as CSV."""
    if rank() == 0:
        with atomic_write(path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, {key: None for row in history for key in row})
            writer.writeheader()
            writer.writerows(history)


def check_finite(losses, out_dir):
    """Return a dict of losses; a UserError if one is infinite or NaN."""
    if not all(map(math.isfinite, losses.values())):
        raise UserError(f"a loss is not finite: {losses}; {out_dir}/last.pt is from before. Try a "
                        f"smaller learning rate in another --out-dir")
    return losses


def slug(captions):
    """Return a file name for captions."""
    digest = hashlib.sha256("\n".join(captions).encode(errors="replace")).hexdigest()
    return re.sub(r"[^a-z0-9]+", "-", captions[0].lower())[:40].strip("-") + "-" + digest[:8]


def add_common_args(parser):
    """Add the flags that all scripts share."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--data", default="toy", help="toy, flowers, cub, coco or a folder")
    add("--root", default="datasets", help="where flowers, cub and coco are")
    add("--out-dir", help="directory of the run; default: runs/<script>-<data>")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=0, help="of a new run; of the noise of samples")
    add("--ema", type=float, default=0.999, help="decay of the moving average of G")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    add("--text-encoder", metavar="FILE", help="default: released, or trained here")
    add("--encoder-iterations", type=int, help="of training the text encoder")
    add("--image-features", choices=["inception", "small"], help="that it is trained with")
    add("--eval-every", type=int, default=0, metavar="EPOCHS", help="log metrics; 0: never")
    add("--sample", nargs="+", metavar="CAPTION", help="draw images, a row a caption")
    add("--samples-per-caption", type=int, default=8, metavar="N", help="images a row")
    add("--num-images", type=int, metavar="N", help="with --sample: N files a caption, no grid")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="draw images from caption A to B")
    add("--interpolate-noise", action="store_true", help="with --interpolate: noise to noise")
    add("--evaluate", action="store_true", help="print FID and other metrics")
    add("--fid-samples", type=int, default=30000, metavar="N", help="images to evaluate")
    add("--r-precision-encoder", metavar="FILE", help="default: runs/damsm-<data>/encoder.pt")


def parse_args(parser, presets, fixed, argv=None):
    """Return the flags and the checkpoint of their run, or None.

    A flag has the value given, else that of the checkpoint if it is in `fixed`, else that of
    presets[data], else the paper's. A flag that contradicts the checkpoint is an error."""
    script = parser.prog.removesuffix(".py")
    add_common_args(parser)
    args = parser.parse_args(argv)
    training = not (args.sample or args.interpolate or args.evaluate)
    for flag, other in (("num_images", "sample"), ("interpolate_noise", "interpolate")):
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag.replace('_', '-')} needs --{other}")
    out_dir = Path(args.out_dir or f"runs/{script}-{Path(args.data).resolve().name}")
    path, checkpoint = out_dir / "last.pt", None
    pretrained = Path(__file__).parent / "weights" / f"{script}.pt"
    if not training and not (args.out_dir or path.exists()) and pretrained.exists():
        path, out_dir = pretrained, Path("runs") / f"{script}-weights"
    if path.exists():
        checkpoint = load_checkpoint(path, script)
        if training and "G" not in checkpoint:
            parser.error(f"{path} is an exported model, which cannot be trained")
    elif not training and not getattr(args, "init", None):
        parser.error(f"{path} does not exist; train first, without --sample or --evaluate")

    saved = checkpoint["args"] if checkpoint else {}
    fixed = [n for n in fixed if n in saved and (training or n != "seed")]
    parser.set_defaults(**presets.get(saved.get("data", args.data), {}))
    parser.set_defaults(**{n: saved[n] for n in fixed})
    args = parser.parse_args(argv)
    args.data, args.out_dir = dataset_id(args.data), out_dir
    for n in fixed:
        if getattr(args, n) != saved[n]:
            parser.error(f"--{n.replace('_', '-')} {getattr(args, n)} contradicts {path}, which has "
                         f"{saved[n]}; leave it out or give another --out-dir")
    if "cuda" in args.device and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: CUDA is not available")
    args.device = init_distributed(args.device)
    if args.batch_size % world_size():
        parser.error(f"--batch-size {args.batch_size} is no multiple of {world_size()} processes")
    cuda = "cuda" in args.device
    args.bf16 = cuda and torch.cuda.is_bf16_supported(False) if args.bf16 is None else args.bf16
    args.compile = cuda if args.compile is None else args.compile
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True    # shapes are constant
    if checkpoint:
        print(f"{path}: trained on {saved['data']}, {checkpoint['step']} steps")
    return args, checkpoint


# ---- Text encoders

class TextEncoder(nn.Module):
    """tokenize(captions) -> (B, T) integers; embed(tokens) -> sentence embeddings (B, dim)."""

    @torch.no_grad()
    def encode(self, captions):
        """Return the embeddings of any number of captions, (N, dim)."""
        device, embeddings = next(self.parameters()).device, []
        bar = Progress(len(captions), "embedding captions", "captions")
        for i in range(0, len(captions), 256):
            embeddings.append(self.eval().embed(self.tokenize(captions[i:i + 256]).to(device)))
            if len(captions) > 1000:
                bar.update(len(embeddings[-1]))
        return torch.cat(embeddings)

    def encode_prompts(self, captions):
        """Return the embeddings of captions that a user typed; warn of what is unknown."""
        captions = [captions] if isinstance(captions, str) else captions
        for caption in captions:
            parts = self.split(caption)
            unknown = [part for part in parts if part not in self.numbers]
            if len(unknown) == len(parts):
                raise UserError(f"the text encoder knows no part of the caption {caption[:99]!r}")
            if unknown:
                print(f"warning: unknown to the text encoder: {' '.join(unknown)}", file=sys.stderr)
        return self.encode([self.repeat_prompt(caption) for caption in captions])

    def repeat_prompt(self, caption):
        return caption


class CharCNNRNN(TextEncoder):
    """Characters -> (B, 1024): three convolutions, a gated recurrence, the mean of its states.

    widths: channels of the convolutions. Parameters have the names of the converted encoders."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
    numbers = {c: i + 1 for i, c in enumerate(alphabet)}    # "-" occurs twice: the second counts
    length = 201

    def __init__(self, widths=(384, 512, 512), dim=1024):
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv2 = nn.Conv1d(70, a, 4), nn.Conv1d(a, b, 4)
        self.conv3 = nn.Conv1d(b, c, 4)
        self.rnn = nn.ModuleDict({name: nn.Linear(c, c) for name in (
            "i2h", "i2h_update", "i2h_reset", "h2h", "h2h_update", "h2h_reset")})
        self.emb_proj = nn.Linear(c, dim)
        self.dim, self.min_prompt_length = dim, 0

    def get_extra_state(self):
        return self.min_prompt_length

    def set_extra_state(self, state):
        self.min_prompt_length = min(int(state), self.length)

    def repeat_prompt(self, caption):
        """Repeat a short prompt up to the length of the shortest captions of training: else most
        recurrent steps see blanks that they never saw in training."""
        return " ".join([caption] * max(1, (self.min_prompt_length + 1) // (len(caption) + 1)))

    def split(self, caption):
        return list(caption.lower())

    def tokenize(self, captions, rng=None):
        """Return positions in the alphabet (B, 201); 0, a blank, for other characters."""
        rows = [[self.numbers.get(c, 0) for c in self.split(caption)] for caption in captions]
        return torch.tensor([(row + [0] * self.length)[:self.length] for row in rows])

    def embed(self, tokens):
        x = F.one_hot(tokens, 71)[:, :, 1:].float().transpose(1, 2)             # (B, 70, 201)
        x = F.max_pool1d(F.threshold(self.conv1(x), 1e-6, 0), 3)                # (B, 384, 66)
        x = F.max_pool1d(F.threshold(self.conv2(x), 1e-6, 0), 3)                # (B, 512, 21)
        x = F.threshold(self.conv3(x), 1e-6, 0).transpose(1, 2)                 # (B, 18, 512)
        new, update, reset = (self.rnn[name](x) for name in ("i2h", "i2h_update", "i2h_reset"))
        h = total = torch.tanh(new[:, 0])
        for t in range(1, x.shape[1]):
            z = torch.sigmoid(update[:, t] + self.rnn["h2h_update"](h))
            r = torch.sigmoid(reset[:, t] + self.rnn["h2h_reset"](h))
            # z weighs the candidate: the opposite of torch.nn.GRU
            h = z * torch.tanh(new[:, t] + self.rnn["h2h"](r * h)) + (1 - z) * h
            total = total + h
        return self.emb_proj(total / x.shape[1])                                # (B, 1024)


class DAMSMTextEncoder(TextEncoder):
    """Words -> features (B, 256, T) and sentence (B, 256), the last states of a bi-LSTM.

    vocabulary: list of words; number 0 is padding. Released code: words of training and test
    captions; here: of training captions only, as a zero-shot test asks."""
    dim, max_words = 256, 18

    def __init__(self, vocabulary):
        super().__init__()
        self.set_extra_state(vocabulary)
        self.encoder = nn.Embedding(len(vocabulary), 300)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(300, 128, batch_first=True, bidirectional=True)

    def get_extra_state(self):
        return list(self.numbers)

    def set_extra_state(self, vocabulary):
        self.numbers = {word: i for i, word in enumerate(vocabulary)}

    @staticmethod
    def split(caption):
        return re.findall(r"\w+", caption.lower())

    def tokenize(self, captions, rng=torch.Generator().manual_seed(0)):
        """Return word numbers (B, T). Of more than 18 words a random 18 in order.

        Released code: draws them anew at each use; here a caption is embedded once."""
        rows = []
        for caption in captions:
            row = [self.numbers[word] for word in self.split(caption) if word in self.numbers] or [0]
            kept = torch.randperm(len(row), generator=rng)[:self.max_words].sort().values
            rows.append(torch.tensor(row)[kept])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, tokens):
        lengths = (tokens != 0).sum(1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.drop(self.encoder(tokens)), lengths, batch_first=True, enforce_sorted=False)
        words, (h, _) = self.rnn(packed)
        words, _ = nn.utils.rnn.pad_packed_sequence(words, True, total_length=tokens.shape[1])
        return words.transpose(1, 2), h.transpose(0, 1).flatten(1)              # (B, 256)

    def embed(self, tokens):
        return self(tokens)[1]


def text_encoder_from_state_dict(state, description):
    """Return a frozen text encoder. The state dict holds its widths and vocabulary."""
    if "conv1.weight" in state:
        if "rnn.i2h_update.weight" not in state:
            raise UserError("Reed's flowers encoder is another network (ReLU recurrence over 8 steps)"
                            " and cannot be loaded; those of birds and COCO can")
        widths = [state[f"conv{i}.weight"].shape[0] for i in (1, 2, 3)]
        encoder = CharCNNRNN(widths, len(state["emb_proj.bias"]))
        state = {"_extra_state": 0, **state}    # released encoders have none
    else:
        encoder = DAMSMTextEncoder(state["_extra_state"])
    encoder.load_state_dict(state)
    encoder.description = description
    return encoder.eval().requires_grad_(False)


# ---- Losses of the text encoders

def joint_embedding_loss(image, text):
    """Symmetric structured joint embedding of one image and text (B, 1024) of each class (Reed et
    al. CVPR 2016, eq. 3-5): max(0, 1 + F(wrong) - F(right)), both ways, F an inner product."""
    score = image @ text.T                                                      # (B, B)
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
    """The Inception-v3 of the FID, as in pytorch-fid: images (B, 3, H, W) in [-1, 1] -> pooled
    features (B, 2048) and regions (B, 768, 36).

    AttnGAN uses the 17 x 17 regions; averaged to 6 x 6 their cache is 8 times smaller."""

    def __init__(self):
        super().__init__()
        from torchvision.models import inception_v3
        try:
            weights = torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu",
                                                         weights_only=True)
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
    """Return pooled features and regions, (N, 2048 + 768 * 36) in float16, of the images at 299 px;
    cached on disk."""
    path = Path(f"{dataset.cache}-inception.f16")
    if not path.exists():
        net = FIDInception().to(device)
        with atomic_write(path) as part, open(part, "wb") as file:
            for images in load_images(dataset.records, 299, "Inception features"):
                pooled, regions = net(torch.from_numpy(images).to(device).float() / 127.5 - 1)
                rows = torch.cat((pooled, regions.flatten(1)), 1).half()
                file.write(rows.cpu().numpy().tobytes())
    return memmap_tensor(path, (len(dataset), 2048 + 768 * 36), torch.float16)


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

def retrieval_accuracy(image, text, image_class, text_class):
    """Return how often an image (N, D) is closest to the mean text (M, D) of its own class, the
    measure of Reed et al."""
    means = text.new_zeros(int(text_class.max()) + 1, text.shape[1])
    means.index_add_(0, text_class, text).div_(text_class.bincount()[:, None])
    return ((image @ means.T).argmax(1) == image_class).float().mean().item()


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


def train_text_encoder(kind, name, root, device, path, iterations=None, features=None, seed=0):
    """Train a text encoder on a dataset and save it with its image encoder."""
    toy, sje = name == "toy", kind == "char-cnn-rnn"
    small = features == "small" or (toy and features is None)
    train_set, test_set = (load_dataset(name, split, 64, root) for split in ("train", "test"))
    iterations = iterations or (400 if toy else min(max(len(train_set), 300), 3000))
    if train_set.classes.max() + 1 < 40:    # too few for batches of one image of each class
        train_set.classes = torch.arange(len(train_set))
    minutes = (iterations * (0.1 if toy else 0.4) + len(train_set) * 0.1 * (not small)) / 60
    print(f"training {kind} on {len(train_set)} images, {iterations} iterations, about {minutes:.0f} "
          f"min on a CPU; change with --encoder-iterations and --image-features")

    torch.manual_seed(seed)
    if sje:
        encoder = CharCNNRNN((96, 128, 128) if toy else (384, 512, 512))
        encoder.min_prompt_length = int(np.quantile([len(c) for c in train_set.captions], 0.001))
    else:
        words = (word for caption in train_set.captions for word in DAMSMTextEncoder.split(caption))
        encoder = DAMSMTextEncoder(["<end>", *dict.fromkeys(words)])
    image_encoder = ImageEncoder(encoder.dim, small)
    norm = nn.BatchNorm1d(encoder.dim, affine=False)
    if sje:
        nn.init.zeros_(image_encoder.global_proj.weight)    # F = 0 at any scale of the text
    nets = nn.ModuleDict({"encoder": encoder, "image_encoder": image_encoder, "norm": norm})
    nets.to(device)
    # SJE: released code RMSprop 7e-4 without norms; Adam with norms learns faster
    lr, decay, betas = (3e-4, 0.02, (0.9, 0.999)) if sje else (2e-3, 0.1, (0.5, 0.999))
    optimizer = torch.optim.Adam(nets.parameters(), lr, betas)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay ** (1 / iterations))

    def features_of(dataset, index):
        x = dataset.center_crop(index) if small else inception_features(dataset, device)[index]
        return x.to(device).float()

    batches, rng = Batches(train_set, 48, seed), torch.Generator().manual_seed(seed)
    bar = Progress(iterations, f"training {kind}", "iterations")
    for i in range(iterations):
        if sje:    # one image of each of 40 classes
            index = torch.randperm(len(train_set), generator=rng)
            index = index[np.unique(train_set.classes[index], return_index=True)[1]]
            index = index[torch.randperm(len(index), generator=rng)[:40]]
        else:
            index = torch.randperm(len(train_set), generator=rng)[:48]
        captions = [train_set.captions[j] for j in batches.sample_captions(index, rng)[:, 0]]
        tokens = encoder.tokenize(captions, rng).to(device)
        classes = train_set.classes[index].to(device)
        nets.train()
        whole, regions = image_encoder(features_of(train_set, index))
        if sje:
            loss = joint_embedding_loss(whole, norm(encoder.embed(tokens)))
        else:
            words, sentence = encoder(tokens)
            lengths = (tokens != 0).sum(1).clamp(min=1)
            loss = word_loss(regions, words, lengths, classes) + sentence_loss(
                whole, sentence, classes)
        optimizer.zero_grad()
        loss.backward()
        if not sje:
            nn.utils.clip_grad_norm_(encoder.parameters(), 0.25)
        optimizer.step()
        scheduler.step()
        bar.note = f"loss {loss.item():.3f}"
        bar.update()

    nets.eval()
    if sje:
        fold_batch_norm(encoder, norm, train_set.captions)
    n = min(len(test_set), 2000)
    with torch.no_grad():
        image = torch.cat([image_encoder(features_of(test_set, index))[0].cpu()
                           for index in torch.arange(n).split(64)])
        text = encoder.encode(test_set.captions[:test_set.caption_offsets[n]]).cpu()
    classes = test_set.classes[:n]
    owner = classes.repeat_interleave(test_set.caption_offsets[:n + 1].diff())
    if not sje:
        image, text = F.normalize(image), F.normalize(text)
    accuracy = retrieval_accuracy(image, text, classes, owner)
    save_checkpoint(path, {
        "kind": "text encoder", "data": name, "small": small, "iterations": iterations,
        "encoder": encoder, "image_encoder": image_encoder, "description":
        f"{kind} trained here on {Path(name).name}, {iterations} iterations; top-1 retrieval of test "
        f"classes {accuracy:.1%}, chance {1 / len(classes.unique()):.1%}"})


# ---- Choice of the text encoder

ATTNGAN = "https://raw.githubusercontent.com/taoxugit/AttnGAN/master/eval/data/"
ATTNGAN_COCO = "https://huggingface.co/mediasynthesismuseum/attngan-coco/resolve/main/"
PRETRAINED = {    # released DAMSM encoders: url, sha256
    "cub": [(ATTNGAN + "text_encoder200.pth",
             "d7278a9b4801633eb42d43de67cba51746daf5143be532660bf1c15608690c01"),
            (ATTNGAN + "captions.pickle",
             "84e9f81218102873b65ab79c265f0a0a370bf38237b0ef5cb175d0f51c00ab68")],
    "coco": [(ATTNGAN_COCO + "text_encoder100.pth",
              "24cf394756359d5cf019845396006639813404a9f9c8dd03b0874c694a0842d6"),
             (ATTNGAN_COCO + "captions.pickle", None)]}


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
        state, description = torch.load(path, map_location="cpu", weights_only=True), str(path)
        if "text_encoder" in state:
            state, description = state["text_encoder"], state["text_encoder_description"]
        elif "image_encoder" in state:
            state, description = state["encoder"], state["description"]
        elif "encoder.weight" in state:
            with open(Path(path).with_name("captions.pickle"), "rb") as file:
                words = RestrictedUnpickler(file, encoding="latin1").load()[2]
            state["_extra_state"] = [words[i] for i in range(len(words))]
        return text_encoder_from_state_dict(state, description)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load the text encoder {path} ({str(error)[:99]})") from None


def encoder_path(kind, name):
    return Path("runs") / f"{kind}-{Path(name).name}" / "encoder.pt"


def get_text_encoder(kind, dataset, root, device, checkpoint=None, path=None, iterations=None,
                     features=None):
    """Return the frozen text encoder of a run: the checkpoint's, else that of the file `path`, else
    the released one (DAMSM of cub and coco), else the one trained here, now if need be."""
    if checkpoint:
        return text_encoder_from_state_dict(
            checkpoint["text_encoder"], checkpoint["text_encoder_description"]).to(device)
    trained = encoder_path(kind, dataset.name)
    if not path and kind == "damsm" and dataset.name in PRETRAINED:
        for url, sha256 in reversed(PRETRAINED[dataset.name]):
            path = Path(root, dataset.name, "damsm", url.split("/")[-1])
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), sha256)
    elif not path:
        found = load_checkpoint(trained, "text encoder") if trained.exists() else {}
        if (found.get("data") != dataset.name or iterations not in (None, found["iterations"])
                or features not in (None, "small" if found["small"] else "inception")):
            train_text_encoder(kind, dataset.name, root, device, trained, iterations, features)
    encoder = load_text_encoder(path or trained)
    if encoder.dim != (1024 if kind == "char-cnn-rnn" else 256):
        raise UserError(f"{path} is a {type(encoder).__name__}; this script needs {kind}")
    return encoder.to(device)


def embed_captions(encoder, dataset):
    """Return the embeddings of all captions of a dataset, (M, dim), cached on disk."""
    digest = hashlib.sha256("\n".join(dataset.captions).encode(errors="replace"))
    for p in encoder.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    path = Path(f"{dataset.cache}-embeddings-{digest.hexdigest()[:16]}.pt")
    if not path.exists():
        save_checkpoint(path, {"kind": "embeddings", "x": encoder.encode(dataset.captions).cpu()})
    embeddings = load_checkpoint(path, "embeddings")["x"]
    rms = embeddings.square().sum(1).mean().sqrt()
    print(f"text encoder: {encoder.description}; RMS length of embeddings {rms:.2f}")
    if isinstance(encoder, CharCNNRNN) and rms > 2:
        print("encoders trained here have 1: at a larger length G sees less of z beside the text")
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
    rng = torch.Generator().manual_seed(0)
    wrong = sample_other_class(classes.argsort(), classes.bincount(), classes[captions], 99, rng)
    image, text, hits = F.normalize(image), F.normalize(text), 0
    for x, right, others in zip(image.split(64), captions.split(64), wrong.split(64)):
        score = torch.einsum("nd,ncd->nc", x, text[torch.cat((right[:, None], others), 1)])
        hits += (score[:, 0] >= score.amax(1) - 1e-6).sum().item()    # equal captions are right
    return hits / len(image)


def attribute_accuracy(images, batches, test_set):
    """Toy: return how often images show the petal colour, centre colour and petal count that their
    caption names."""
    owner = torch.arange(len(test_set)).repeat_interleave(test_set.caption_offsets.diff())
    right = {"petal": [], "centre": [], "count": []}
    for x, (_, captions) in zip(images, batches):
        for shown, caption in zip(classify_toy(x), captions):
            attributes = test_set.records[owner[caption]].attributes
            for name in right:
                if attributes[name] in test_set.captions[caption]:
                    right[name].append(float(shown[name] == attributes[name]))
    return {name: sum(values) / len(values) for name, values in right.items()}


def evaluation_batches(dataset, num_samples):
    """Return [(seed of the noise, numbers of captions (B,))], this process's share: all captions in
    random order, again from the first up to num_samples."""
    order = torch.randperm(len(dataset.captions), generator=torch.Generator().manual_seed(0))
    order = order.repeat(math.ceil(num_samples / len(order)))[:num_samples]
    return list(enumerate(order.split(64)))[rank()::world_size()]


@torch.no_grad()
def evaluate(images, batches, groups, test_set, device, r_precision_encoder=None):
    """Return a dict of metrics of images, an iterable of (B, 3, S, S), one for each of `batches`.

    groups: iterable of (8, 3, S, S), 8 samples of one caption each."""
    if test_set.name == "toy":    # no download
        return attribute_accuracy(images, batches, test_set)
    net, metrics = FIDInception().to(device), {}
    path = Path(r_precision_encoder or encoder_path("damsm", test_set.name))
    state = load_checkpoint(path, "text encoder") if path.exists() else None
    scorer = None
    if state:
        scorer = ImageEncoder(256, state["small"]).to(device).eval()
        scorer.load_state_dict(state["image_encoder"])

    def features(blocks):
        pooled, embedded = [], []
        for x in blocks:
            x = ((x.to(device).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1    # as in a PNG
            pooled.append(net(x)[0])
            if scorer and scorer.small:
                small = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
                embedded.append(scorer(small)[0])
            elif scorer:
                embedded.append(scorer.embed(pooled[-1]))
        return gather(torch.cat(pooled)).cpu(), gather(torch.cat(embedded)).cpu() if scorer else None

    fake, image = features(images)
    real, _ = features(test_set.center_crop(i) for i in torch.arange(len(test_set)).split(64))
    metrics["fid"] = frechet_distance(*mean_and_cov(real), *mean_and_cov(fake))
    if net.head:
        metrics["inception_score"] = inception_score(net.head.cpu()(fake))
    groups = [net(x.to(device))[0] for x in groups]
    metrics["diversity"] = torch.stack([F.pdist(x).mean() for x in groups]).mean().item()
    if scorer:
        encoder = load_text_encoder(path).to(device)
        classes = test_set.classes.repeat_interleave(test_set.caption_offsets.diff())
        captions = gather(torch.cat([c for _, c in batches]))
        text = embed_captions(encoder, test_set).cpu()
        metrics["r_precision"] = r_precision(image, captions, text, classes)
    else:
        print(f"no R-precision without {path}: python common.py --encoder damsm --data "
              f"{test_set.name}")
    return metrics


def describe(metrics):
    """Print metrics, and how they were measured."""
    notes = {
        "fid": "pytorch-fid's network, images of 8 bits, against all real test images of this size",
        "inception_score": "ten splits, 1008 classes; published CUB values use a fine-tuned network",
        "diversity": "mean feature distance of 8 samples a caption",
        "r_precision": "own caption against 99 of other classes, by DAMSM"}
    for name, value in metrics.items():
        print(f"{name:16} {value:8.3f}  {notes.get(name, '')}")


def main():
    parser = argparse.ArgumentParser(description="Train a text encoder, or export a model.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--encoder", choices=["char-cnn-rnn", "damsm"], default="char-cnn-rnn")
    parser.add_argument("--data", default="toy", help="toy, flowers, cub, coco or a folder")
    parser.add_argument("--root", default="datasets", help="where flowers, cub and coco are")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--iterations", type=int, help="default: as many as images, 300 to 3000")
    parser.add_argument("--image-features", choices=["inception", "small"])
    parser.add_argument("--export", metavar="FILE", help="checkpoint to make a small file of")
    parser.add_argument("--out", type=Path, help="default: runs/<encoder>-<data>/encoder.pt")
    args = parser.parse_args()
    if args.export and not args.out:
        parser.error("--export needs --out")
    if args.export:
        export(args.export, args.out)
    else:
        name, device = dataset_id(args.data), init_distributed(args.device)
        args.out = args.out or encoder_path(args.encoder, name)
        train_text_encoder(args.encoder, name, args.root, device, args.out, args.iterations,
                           args.image_features)
        print(load_text_encoder(args.out).description)
    print(f"saved {args.out}")


if __name__ == "__main__":
    sys.exit(run(main))
