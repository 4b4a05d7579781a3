"""Text encoders and their training, Inception features, and what every run needs: checkpoints, grids, flags, signals.

    python common.py --encoder char-cnn-rnn --data flowers      # train an encoder, print its retrieval on unseen classes
    python common.py --encoder damsm --data path/to/folder

char-cnn-rnn  Reed et al., "Learning Deep Representations of Fine-grained Visual Descriptions", CVPR 2016: 1024-d
damsm         Xu et al., "AttnGAN", CVPR 2018, section 3.2: bi-LSTM, 256-d words and sentence
A model script trains the one it needs by itself where none is found. Encoders lie in runs/<encoder>-<data>/encoder.pt.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from data import Progress, UserError

# ---------------------------------------------------------------------------------------------------- every run

def guard(main):
    """Run a command line; what the user can put right is one sentence and status 2, never a traceback."""
    try:
        return main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command starts again where the last save was", file=sys.stderr)
        return 130


class Stop:
    """Inside `with Stop() as stop`, Ctrl-C and SIGTERM set stop.code and let the step finish; a second one ends at once."""
    code = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.code:
            os._exit(self.code)
        self.code = 128 + number
        print("\nfinishing this step and saving; once more stops at once", file=sys.stderr)

    def __exit__(self, *error):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def save(path, state):
    """torch.save to a temporary name, flushed, then renamed: an interrupted write never costs the last good file."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {path} ({error}); what was there before is intact") from None
    finally:
        part.unlink(missing_ok=True)


def load(path, kind):
    """A file written by `save` whose state["kind"] is kind, e.g. "gan_cls". Loads tensors and plain containers only."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:   # a damaged file fails in zipfile, in pickle or in torch, each with errors of its own
        raise UserError(f"{path} is no checkpoint, or is damaged; give another file or remove it") from None
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise UserError(f"{path} holds no {kind} checkpoint; give one that this script wrote")
    return state


def random_state(state=None):
    """The random states of torch on CPU and GPUs; given one, restores it."""
    if state is not None:
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def settle(parser, args, given, toy, fixed):
    """Fill args: what the command line gives, else what the run's checkpoint has, else toy's defaults, else the paper's.

    given: the flags of the command line alone. fixed: names that belong to a run; a flag that contradicts its
    checkpoint is an error. Returns the checkpoint (None for a new run)."""
    args.run = Path(given.get("run") or f"runs/{parser.prog.removesuffix('.py')}-{Path(args.data).resolve().name}")
    last = args.run / "last.pt"
    state = load(last, parser.prog.removesuffix(".py")) if last.exists() else None
    if args.data == "toy":
        vars(args).update({k: v for k, v in toy.items() if k not in given})
    for name, value in (state["args"] if state else {}).items():
        if name in fixed and name in given and given[name] != value:
            raise UserError(f"--{name.replace('_', '-')} {given[name]} contradicts the run in {args.run}, which has {value}; "
                            f"leave the flag out, or give another --run")
        if name in vars(args) and name not in given and name not in ("run", "device", "root"):
            setattr(args, name, value)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return state


def parse(parser, argv=None):
    """The parsed flags, and a dict of those that were really given."""
    args = parser.parse_args(argv)
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))   # None stays where no flag sets it
    return args, {k: v for k, v in vars(given).items() if v is not None}


def save_grid(path, images, columns, captions=()):
    """images (N, 3, S, S) in [-1, 1] -> a PNG with `columns` pictures a row; captions, one a row, beside it as .txt."""
    from torchvision.utils import save_image
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    save_image(images.float(), part, nrow=columns, normalize=True, value_range=(-1, 1))
    os.replace(part, path)
    if captions:
        path.with_suffix(".txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8", errors="replace")
    return path


def save_log(path, rows):
    """Rows, dicts of one set of keys, as csv. The checkpoint keeps the rows, so a resumed log has no gap and no double."""
    part = Path(path).with_suffix(".part")
    part.write_text("\n".join(",".join(map(str, line)) for line in [rows[0], *(r.values() for r in rows)]) + "\n")
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------------- text encoders

class TextEncoder(nn.Module):
    """What both encoders share. tokens(captions) -> integers; sentences(tokens) -> (B, dim)."""

    @torch.inference_mode()
    def encode(self, captions, label="encoding captions"):
        """Any number of captions -> (N, dim), on the encoder's device."""
        self.eval()
        out = []
        with Progress(len(captions), label, "captions") as bar:
            for i in range(0, len(captions), 256):
                tokens = self.tokens(captions[i:i + 256])
                out.append(self.sentences(tokens.to(next(self.parameters()).device)))
                bar.step(len(out[-1]))
        return torch.cat(out).clone()

    def ask(self, captions):
        """encode for captions that a user typed: names what the encoder does not know, fails where nothing is left."""
        for caption in captions:
            known, unknown = self.split(caption)
            if not known:
                raise UserError(f"the text encoder knows nothing of {caption[:80]!r}; say it in other words")
            if unknown:
                print(f"warning: not known to the text encoder and left out: {' '.join(dict.fromkeys(unknown))}", file=sys.stderr)
        tokens = self.tokens(captions).to(next(self.parameters()).device)
        with torch.inference_mode():
            return self.eval().sentences(tokens).clone()


class CharCnnRnn(TextEncoder):
    """Characters -> (B, 1024). Three convolutions, then a gated recurrence over 18 steps and the mean of its states.

    widths: channels of the convolutions; as released 384, 512, 512 (icml2016 birds and coco). Parameters bear the names
    of the converted encoders."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
    position = {c: i + 1 for i, c in enumerate(alphabet)}         # "-" stands there twice: the second counts
    length = 201                                                  # longer captions are cut

    def __init__(self, widths=(384, 512, 512), dim=1024):
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(70, a, 4), nn.Conv1d(a, b, 4), nn.Conv1d(b, c, 4)
        self.rnn = nn.ModuleDict({name: nn.Linear(c, c) for name in
                                  ("i2h", "i2h_update", "i2h_reset", "h2h", "h2h_update", "h2h_reset")})
        self.emb_proj = nn.Linear(c, dim)
        self.dim = dim

    def split(self, caption):
        text = caption.lower()
        return [c for c in text if c in self.position and c != " "], [c for c in text if c not in self.position and not c.isspace()]

    def tokens(self, captions):                                   # unknown characters are blank columns, as in Reed's code
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
            row = [self.number[w] for w in self.split(caption)[0]]
            if len(row) > self.length:
                seed = torch.Generator().manual_seed(zlib.crc32(caption.encode(errors="replace")))
                keep = torch.randperm(len(row), generator=rng or seed)[:self.length].sort().values
                row = [row[i] for i in keep]
            rows.append(row)
        longest = max(1, *map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

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
    if "conv1.weight" in state:
        encoder = CharCnnRnn([state[f"conv{i}.weight"].shape[0] for i in (1, 2, 3)], state["emb_proj.weight"].shape[0])
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


def same_class(classes):
    """(B, B), true for pairs of different samples of one class: DAMSM takes them neither for right nor for wrong."""
    return (classes[:, None] == classes[None]) & ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)


def both_ways(score, classes):
    """Cross entropy of the right partner, over rows plus over columns. score (B, B)."""
    score = score.masked_fill(same_class(classes), -math.inf)
    target = torch.arange(len(score), device=score.device)
    return F.cross_entropy(score, target) + F.cross_entropy(score.T, target)


def sentence_loss(image, sentence, classes, gamma3=10.0):
    """DAMSM between whole pictures and sentences, (B, 256) each (AttnGAN, section 3.2; gamma3 of its code)."""
    return both_ways(gamma3 * F.normalize(image) @ F.normalize(sentence).T, classes)


def word_loss(regions, words, lengths, classes, gamma1=4.0, gamma2=5.0, gamma3=10.0):
    """DAMSM between regions (B, 256, N) and words (B, 256, T) of which the first `lengths` count (AttnGAN, eq. 7-12).

    Each word attends to the regions: a softmax over words, then one over regions with gamma1; a picture and a caption
    match by log sum exp of gamma2 times the cosines of words and what they attended to."""
    there = torch.arange(words.shape[2], device=words.device) < lengths[:, None]                   # (B, T)
    s = torch.einsum("idn,jdt->ijnt", regions, words)             # picture i, caption j           # (B, B, N, T)
    s = s.masked_fill(~there[None, :, None], -math.inf).softmax(3)
    attention = (gamma1 * s).softmax(2)
    context = torch.einsum("idn,ijnt->ijdt", regions, attention)                                   # (B, B, 256, T)
    cosine = F.cosine_similarity(context, words[None], dim=2)                                      # (B, B, T)
    match = (gamma2 * cosine).masked_fill(~there[None], -math.inf).logsumexp(2)                    # (B, B)
    return both_ways(gamma3 * match, classes)


# ---------------------------------------------------------------------------------------------------- image side

def inception(device="cpu"):
    """The Inception-v3 of the FID (weights of 2015-12-05, by pytorch-fid): images (B, 3, H, W) in [-1, 1]
    -> pooled (B, 2048), regions (B, 768, 36).

    torchvision's graph, except that its average pools here count no padding and the last block takes a maximum.
    The regions are the 17 x 17 of Mixed_6e averaged to 6 x 6: AttnGAN uses all 289; 36 make the cache 8 times smaller."""
    from torchvision.models import inception_v3
    url = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
           "pt_inception-2015-12-05-6726825d.pth")
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:
        raise UserError(f"the Inception network is needed and could not be had ({error}); put {url} into "
                        f"{torch.hub.get_dir()}/checkpoints, or give --image-features small") from None
    net = inception_v3(weights=None, aux_logits=False, init_weights=False, num_classes=1008)
    net.load_state_dict({**net.state_dict(), **{k: v for k, v in weights.items() if not k.startswith("fc.")}})
    net.fc, net.dropout = nn.Identity(), nn.Identity()

    def pool_with(block, pool):    # torchvision averages inside the block: hand its pooling branch another input
        block.register_forward_pre_hook(lambda module, inputs: setattr(module, "seen", inputs[0]))
        block.branch_pool.register_forward_pre_hook(lambda module, inputs: pool(block.seen))

    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            pool_with(block, (lambda x: F.max_pool2d(x, 3, 1, 1)) if name == "Mixed_7c" else
                             (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
    seen = {}
    net.Mixed_6e.register_forward_hook(lambda module, inputs, out: seen.update(regions=F.adaptive_avg_pool2d(out, 6).flatten(2)))
    net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(images):
        x = images.to(device, memory_format=torch.channels_last)
        if x.shape[-2:] != (299, 299):
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        return net(x), seen["regions"]
    return features


def inception_features(dataset, device):
    """Pooled (N, 2048) and regions (N, 768, 36) of every picture's central square, computed once from the originals at
    299 px, cached beside the pictures and mapped into memory."""
    shapes = {"pooled": ((2048,), torch.float32), "regions": ((768, 36), torch.float16)}
    paths = {k: dataset.stem.with_name(f"{dataset.stem.name}-inception-{dataset.key[:12]}.{k}") for k in shapes}
    if not all(p.exists() for p in paths.values()):
        net = inception(device)
        parts = {k: p.with_name(f"{p.name}.part{os.getpid()}") for k, p in paths.items()}
        files = {k: open(p, "wb") for k, p in parts.items()}

        def write(block):
            images = torch.stack([torch.from_numpy(a.copy()) for a in block]).to(device).float() / 127.5 - 1
            for (k, (_, dtype)), value in zip(shapes.items(), net(images)):
                files[k].write(value.to("cpu", dtype).contiguous().numpy().tobytes())
        try:
            block = []
            for array in data.decoded(dataset.pictures, 299, f"Inception features of {dataset.name} {dataset.split}"):
                block.append(array)
                if len(block) == 32:
                    write(block)
                    block = []
            if block:
                write(block)
            for k, file in files.items():
                file.close()
                os.replace(parts[k], paths[k])
        except OSError as error:
            raise UserError(f"could not write {paths['regions']} ({error.strerror})") from None
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    n = len(dataset)
    return tuple(torch.from_file(str(paths[k]), shared=False, size=n * math.prod(shape), dtype=dtype).view(n, *shape)
                 for k, (shape, dtype) in shapes.items())


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
