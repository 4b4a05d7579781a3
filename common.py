"""Text encoders, their training, evaluation, and what every run needs.

    python common.py --encoder damsm --data flowers  # trains a text encoder

char-cnn-rnn: Reed et al., CVPR 2016, arXiv 1605.05395, 1024-d, for gan_cls.py and stackgan.py
damsm: AttnGAN, Xu et al., CVPR 2018, arXiv 1711.10485, 256-d, for dfgan.py
"""
import argparse
import contextlib
import csv
import datetime
import hashlib
import os
import pickle
import re
import signal
import sys
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
    """Join the processes of torchrun, if any. Return the device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if "cuda" in device and not torch.cuda.is_available():
        raise UserError("CUDA is not available")
    if "LOCAL_RANK" in os.environ:
        backend = "gloo"
        if device == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # downloads
        if rank() > 0:
            sys.stdout, Progress.enabled = open(os.devnull, "w"), False
    return device

def reduce_mean(x):
    """Return the mean of a tensor over the processes."""
    x = x / world_size()
    if world_size() > 1:
        dist.all_reduce(x)
    return x

@contextlib.contextmanager
def main_process_first():
    """Run the block on rank 0, then on the others, which find its files."""
    if rank() > 0:
        reduce_mean(torch.zeros(1))  # waits for rank 0
    yield
    if rank() == 0:
        reduce_mean(torch.zeros(1))

def average_gradients(net, optimizer):
    """Average gradients over the processes before each step.

    Not DDP: D runs several times a step, and torch.func.grad bypasses its forward. Batch norm sees
    the joint batch on GPUs only."""
    def all_reduce(*_):
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        means = reduce_mean(torch.cat([g.flatten() for g in grads]))
        means = means.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads)])

    if world_size() > 1:
        optimizer.register_step_pre_hook(all_reduce)
        if next(net.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)

# ---- Runs

def run(main):
    """Run main() and return its exit status, 2 after a user error."""
    try:
        return main()
    except (UserError, OSError) as error:  # OSError: no network, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

class GracefulStop:
    """Catch Ctrl-C and SIGTERM: requested() is then true in all processes."""
    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.signal and world_size() == 1:  # torchrun repeats signals
            sys.exit(128 + number)
        self.signal = number
        print("\nsaving; run the same command to resume", file=sys.stderr)

    def requested(self):
        return reduce_mean(torch.tensor(self.signal)).item() > 0

def save_checkpoint(path, state):
    """Write a dict atomically on rank 0; networks and optimizers as state dicts."""
    if rank() == 0:
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        with data.atomic_write(path) as part:
            torch.save(state, part)

def load_checkpoint(path, kind):
    """Return a checkpoint of this kind."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        assert state["kind"] == kind, state["kind"]
    except Exception as error:
        raise UserError(f"{path} is no {kind} checkpoint ({str(error)[:99]})")
    return state

def save_grid(path, images, columns):
    """Write images (N, 3, S, S) in [-1, 1] as a PNG, `columns` in a row."""
    from torchvision.utils import save_image
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(images / 2 + 0.5, path, nrow=columns)

def save_log(path, history):
    """Write a list of dicts as CSV."""
    if rank() == 0:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, {key: None for row in history for key in row})
            writer.writeheader()
            writer.writerows(history)

def slug(captions):
    """Return a file name for captions."""
    return re.sub("[^a-z0-9]+", "-", " ".join(captions).lower())[:80].strip("-")

def parse_args(parser, presets, fixed, argv=None):
    """Add the shared flags. Return all flags, and the checkpoint of their run or None.

    Defaults: the checkpoint's (names in `fixed`), else presets[data], else the parser's."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.usage = "python %(prog)s.py [--help] [flags]"
    add = parser.add_argument
    add("--data", default="toy", help="toy (small networks), flowers, cub, coco or a folder")
    add("--root", default="datasets", help="of flowers, cub and coco; caches: datasets/cache")
    add("--out-dir", help="None: runs/<script>-<data>")
    add("--device", default="auto")
    add("--seed", type=int, default=0, help="of a new run or of samples")
    add("--ema", type=float, default=0.999, help="decay of the average of G (no paper)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="None: on CUDA")
    add("--text-encoder", metavar="FILE", help="of a new run; None: released or trained here")
    add("--eval-every", type=int, metavar="EPOCHS", help="log metrics")
    add("--samples-per-caption", type=int, default=8, help="images a row")
    add("--num-images", type=int, help="files a caption, no grid")
    add("--fid-samples", type=int, default=30000)
    add("--r-precision-encoder", metavar="FILE", help="None: runs/damsm-<data>/encoder.pt")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--sample", nargs="+", metavar="CAPTION", help="draw images of captions")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="draw from caption A to B")
    add("--interpolate-noise", nargs="+", metavar="CAPTION", help="draw from noise to noise")
    add("--evaluate", action="store_true", help="print FID and other metrics")

    args, script = parser.parse_args(argv), parser.prog
    device = init_distributed(args.device)
    captions = args.sample or args.interpolate or args.interpolate_noise
    training = not (captions or args.evaluate)
    if getattr(args, "style_image", None) and not args.sample:
        parser.error("--style-image needs --sample")
    out_dir = Path(args.out_dir or f"runs/{script}-{Path(args.data).resolve().name}")
    path, checkpoint, saved = out_dir / "last.pt", None, {}
    new = training or getattr(args, "init", None)
    if not (new or args.out_dir or path.exists()) and args.data in ("toy", "flowers"):
        out_dir = Path(f"runs/{script}-weights")
        path = Path(__file__).parent / "weights" / f"{script}.pt"
    if path.exists():
        checkpoint = load_checkpoint(path, script)
        saved = {n: checkpoint["args"][n] for n in fixed if training or n != "seed"}
        print(f"{path}: {checkpoint['step']} steps on {saved['data']}")
    elif not new:
        parser.error(f"{path} does not exist; train first")
    parser.set_defaults(bf16="cuda" in device and torch.cuda.is_bf16_supported(False),
                        **presets.get(saved.get("data", args.data), {}) | saved)
    args = parser.parse_args(argv)
    args.data, args.device = data.dataset_id(args.data), device
    args.out_dir, args.captions = out_dir, captions
    for n, value in saved.items():
        if (given := getattr(args, n)) != value:
            parser.error(f"{n} {given} contradicts {path} ({value}); omit it or set --out-dir")
    if args.batch_size % world_size():
        parser.error(f"--batch-size must be a multiple of the {world_size()} processes")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes are constant
    return args, checkpoint

# ---- Text encoders

class TextEncoder(nn.Module):
    """tokenize(captions) -> integers (B, T); embed(tokens) -> sentence embeddings (B, dim).

    config, part of the state dict: "vocabulary", "min_prompt_length", "rms", "scale"."""
    def get_extra_state(self):
        return self.config

    def set_extra_state(self, config):
        self.config = config

    @torch.no_grad()
    def encode(self, captions):
        """Return the embeddings of captions, (N, dim)."""
        device, rows = next(self.eval().parameters()).device, []
        bar = Progress(len(captions), "embedding", "captions")
        for i in range(0, len(captions), 256):
            rows.append(self.embed(self.tokenize(captions[i:i + 256]).to(device)))
            bar.update(len(rows[-1]))
        return torch.cat(rows) * self.config.get("scale", 1)

    def encode_prompts(self, captions):
        """Return the embeddings of typed captions, (N, dim).

        Short ones are repeated up to min_prompt_length: CharCNNRNN saw few blanks."""
        captions = [captions] if isinstance(captions, str) else captions
        for caption in captions:
            unknown = [part for part in self.split(caption) if part not in self.numbers]
            if unknown:
                print("warning: unknown to the encoder:", *unknown)
        n = self.config.get("min_prompt_length", 0) + 1
        return self.encode([" ".join([c] * max(1, n // (len(c) + 1))) for c in captions])

class CharCNNRNN(TextEncoder):
    """Characters -> (B, 1024): three convolutions, a GRU, its mean state (ICML 2016 code)."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
    numbers = {c: i for i, c in enumerate(alphabet, 1)}  # of the two "-" the second counts
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
        """Return positions in the alphabet (B, 201); 0, a blank, for other characters."""
        rows = [caption.lower()[:201].ljust(201, "\0") for caption in captions]
        return torch.tensor([[self.numbers.get(c, 0) for c in row] for row in rows])

    def embed(self, tokens):
        x = F.one_hot(tokens, 71)[:, :, 1:].float().mT  # (B, 70, 201)
        x = F.max_pool1d(F.threshold(self.conv1(x), 1e-6, 0), 3)  # (B, 384, 66)
        x = F.max_pool1d(F.threshold(self.conv2(x), 1e-6, 0), 3)  # (B, 512, 21)
        x = F.threshold(self.conv3(x), 1e-6, 0).mT  # (B, 18, 512)
        rnn = self.rnn
        new, update, reset = rnn.i2h(x), rnn.i2h_update(x), rnn.i2h_reset(x)
        h = total = new[:, 0].tanh()
        for t in range(1, x.shape[1]):
            z = (update[:, t] + rnn.h2h_update(h)).sigmoid()
            r = (reset[:, t] + rnn.h2h_reset(h)).sigmoid()
            # z weighs the candidate: the opposite of torch.nn.GRU
            h = z * (new[:, t] + rnn.h2h(r * h)).tanh() + (1 - z) * h
            total = total + h
        return self.emb_proj(total / x.shape[1])  # (B, 1024)

class DAMSMTextEncoder(TextEncoder):
    """Words -> features (B, 256, T) and sentence (B, 256), the last states of a bi-LSTM.
    vocabulary[0] is padding."""
    dim = 256

    def __init__(self, vocabulary):
        super().__init__()
        self.config = {"vocabulary": vocabulary}
        self.numbers = {word: i for i, word in enumerate(vocabulary)}
        self.encoder = nn.Embedding(len(vocabulary), 300)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(300, 128, batch_first=True, bidirectional=True)

    def split(self, caption):
        return re.findall(r"\w+", caption.lower())

    def tokenize(self, captions, rng=None):
        """Return word numbers (B, T). Of more than 18 words a random 18, in order."""
        rng, rows = rng or torch.Generator().manual_seed(0), []
        for caption in captions:
            row = [self.numbers[w] for w in self.split(caption) if w in self.numbers] or [0]
            kept = torch.randperm(len(row), generator=rng)[:18].sort().values
            rows.append(torch.tensor(row)[kept])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, tokens):
        lengths = tokens.count_nonzero(1).clamp(min=1).cpu()
        x = nn.utils.rnn.pack_padded_sequence(self.drop(self.encoder(tokens)), lengths, True, False)
        words, (h, _) = self.rnn(x)
        words, _ = nn.utils.rnn.pad_packed_sequence(words, True)
        return words.mT, h.transpose(0, 1).flatten(1)

    def embed(self, tokens):
        return self(tokens)[1]

def text_encoder_from_state_dict(state):
    """Return a frozen text encoder."""
    if "conv1.weight" in state:
        encoder = CharCNNRNN([len(state[f"conv{i}.weight"]) for i in (1, 2, 3)])
    else:
        encoder = DAMSMTextEncoder(state["_extra_state"]["vocabulary"])
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)

# ---- Losses of the text encoders

GAMMA1, GAMMA2, GAMMA3 = 4, 5, 10  # of DAMSM

def symmetric_loss(loss, score, classes):
    """Return a loss over the rows plus over the columns of score (B, B), right pairs on the
    diagonal. Other pairs of the same class are left out (AttnGAN's code)."""
    score = score.masked_fill((classes[:, None] == classes).fill_diagonal_(False), -torch.inf)
    target = torch.arange(len(score), device=score.device)
    return loss(score, target) + loss(score.T, target)

def joint_embedding_loss(image, text, classes):
    """Return the mean of max(0, 1 + wrong - right) of inner products of images and texts (B, 1024)
    (Reed et al., CVPR 2016)."""
    return symmetric_loss(F.multi_margin_loss, image @ text.T, classes)

def sentence_loss(image, sentence, classes):
    """DAMSM loss between images and sentences, (B, 256) each (AttnGAN, section 3.2)."""
    score = F.normalize(image) @ F.normalize(sentence).T
    return symmetric_loss(F.cross_entropy, GAMMA3 * score, classes)

def word_loss(regions, words, lengths, classes):
    """DAMSM loss between regions (B, 256, N) and words (B, 256, T) of lengths (B,) (AttnGAN, eq.
    7-12): each word attends to the regions of every image."""
    padding = torch.arange(words.shape[2], device=words.device) >= lengths[:, None]  # (B, T)
    score = torch.einsum("idn,jdt->ijnt", regions, words)  # of image i and caption j
    attention = score.masked_fill(padding[:, None], -torch.inf).softmax(3)  # eq. 8
    attention = (GAMMA1 * attention).softmax(2)  # eq. 9
    context = torch.einsum("ijnt,idn->ijtd", attention, regions)
    norms = context.norm(dim=3) * words.norm(dim=1)  # padding: 0
    cosine = (score * attention).sum(2) / norms.clamp(min=1e-6)  # context.word / norms, (B, B, T)
    # eq. 10; as released, without the exponent 1 / GAMMA2
    match = (GAMMA2 * cosine).masked_fill(padding, -torch.inf).logsumexp(2)
    return symmetric_loss(F.cross_entropy, GAMMA3 * match, classes)

# ---- Image features

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")

class FIDInception(nn.Module):
    """pytorch-fid's Inception-v3: images (B, 3, H, W) in [-1, 1] -> pooled features (B, 2048),
    regions (B, 768, 36): 6 x 6 means of AttnGAN's 17 x 17, 8 times less memory."""
    def __init__(self):
        super().__init__()
        from torchvision.models import inception_v3
        net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
        weights = torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True, weights_only=True)
        net.load_state_dict(weights, strict=False)
        net.fc = nn.Identity()
        self.net = net.eval().to(memory_format=torch.channels_last)
        # The FID's average pools ignore padding, torchvision's do not; its last is a maximum
        for name, block in net.named_children():
            if hasattr(block, "branch_pool"):
                pool = (nn.MaxPool2d(3, 1, 1) if name == "Mixed_7c" else
                        nn.AvgPool2d(3, 1, 1, count_include_pad=False))
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
    """Return pooled features and regions at 299 px, (N, 2048 + 768 * 36) in float16."""
    net, rows = FIDInception().to(device), []
    for images in data.load_images(dataset.records, 299, "Inception features"):
        pooled, regions = net(torch.from_numpy(images).to(device).float() / 127.5 - 1)
        rows.append(torch.cat((pooled, regions.flatten(1)), 1).half().cpu())
    return torch.cat(rows)

class ImageEncoder(nn.Module):
    """Rows of inception_features -> global (B, dim), local (B, 256, N) features.
    small: images (B, 3, 64, 64), through a CNN that is trained too."""
    def __init__(self, dim, small):
        super().__init__()
        layers, width = [], 128 if small else 2048
        for a, b in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.cnn = nn.Sequential(*layers) if small else None
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.global_proj = nn.Linear(width, dim)
        self.local_proj = nn.Conv1d(128 if small else 768, 256, 1, bias=False)

    def embed(self, pooled):
        return self.global_proj(self.norm(pooled))

    def forward(self, x):
        if self.cnn:
            x = self.cnn(x)  # (B, 128, 4, 4)
            return self.embed(x.mean((2, 3))), self.local_proj(x.flatten(2))
        return self.embed(x[:, :2048]), self.local_proj(x[:, 2048:].unflatten(1, (768, 36)))

# ---- Training of the text encoders

def train_text_encoder(kind, name, root, device, path, iterations=None, features=None):
    """Train a text encoder on a dataset and save it with its image encoder."""
    toy, char = name == "toy", kind == "char-cnn-rnn"
    features = features or ("small" if toy else "inception")
    small = features == "small"
    train_set = data.load_dataset(name, "train", 64, root)
    iterations = iterations or (1000 if toy else min(max(len(train_set), 300), 3000))
    print(f"common.py trains {path}: {iterations} iterations, {features} image features")
    torch.manual_seed(0)
    if char:
        lr, decay, betas, batch_size = 1e-3 if toy else 3e-4, 0.02, (0.9, 0.999), 40
        encoder = CharCNNRNN((96, 128, 128) if toy else (384, 512, 512))
        sizes = sorted(map(len, train_set.captions))
        encoder.config["min_prompt_length"] = sizes[len(sizes) // 1000]
    else:
        lr, decay, betas, batch_size = 2e-3, 0.1, (0.5, 0.999), 48
        vocabulary = dict.fromkeys(re.findall(r"\w+", " ".join(train_set.captions).lower()))
        encoder = DAMSMTextEncoder(["<end>", *vocabulary])
    image_encoder = ImageEncoder(encoder.dim, small)
    norm = nn.BatchNorm1d(encoder.dim).requires_grad_(False)
    if char:
        nn.init.zeros_(image_encoder.global_proj.weight)  # images start equal
    nets = nn.ModuleList([encoder, image_encoder, norm]).to(device)
    optimizer = torch.optim.Adam(nets.parameters(), lr, betas)
    inputs = None if small else inception_features(train_set, device)
    rng = torch.Generator().manual_seed(0)
    bar = Progress(iterations, f"training {kind}", "iterations")
    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * decay ** (step / iterations)
        index = torch.randperm(len(train_set), generator=rng)[:batch_size]
        captions = [train_set.captions[i] for i in train_set.sample_captions(index, 1, rng)[:, 0]]
        tokens = encoder.tokenize(captions, rng).to(device)
        x = train_set.center_crop(index) if small else inputs[index].float()
        image, regions = image_encoder(x.to(device))
        classes = train_set.classes[index].to(device)
        if char:
            loss = joint_embedding_loss(image, norm(encoder.embed(tokens)), classes)
        else:
            words, sentence = encoder(tokens)
            lengths = tokens.count_nonzero(1).clamp(min=1)
            loss = sentence_loss(image, sentence, classes)
            loss = loss + word_loss(regions, words, lengths, classes)
        optimizer.zero_grad()
        loss.backward()
        if not char:
            nn.utils.clip_grad_norm_(encoder.parameters(), 0.25)
        optimizer.step()
        bar.note = f"loss {loss.item():.3f}"
        bar.update()
    nets.eval()
    if char:
        encoder.emb_proj = nn.utils.fuse_linear_bn_eval(encoder.emb_proj, norm)
    x = encoder.encode(train_set.captions[::len(train_set.captions) // 1000 + 1])
    encoder.config["rms"] = x.square().sum(1).mean().sqrt().item()
    save_checkpoint(path, {
        "kind": "text encoder", "data": name, "iterations": iterations, "features": features,
        "text_encoder": encoder, "image_encoder": image_encoder})

# ---- Choice of the text encoder

PRETRAINED = {  # released DAMSM encoders; the start of a file's sha256, if known
    "cub": ("https://raw.githubusercontent.com/taoxugit/AttnGAN/master/eval/data/",
            {"captions.pickle": "84e9f81218102873", "text_encoder200.pth": "d7278a9b4801633e"}),
    "coco": ("https://huggingface.co/mediasynthesismuseum/attngan-coco/resolve/main/",
             {"captions.pickle": None, "text_encoder100.pth": "24cf394756359d5c"})}

class RestrictedUnpickler(pickle.Unpickler):
    """Loads plain containers only: other pickles can run code."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{name} is not allowed")

def load_text_encoder(path):
    """Return the text encoder of a file; a released DAMSM needs captions.pickle beside it."""
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

def encoder_path(kind, name):
    return Path(f"runs/{kind}-{Path(name).name}/encoder.pt")

def get_text_encoder(kind, dataset, root, device, checkpoint=None, path=None, rms=1):
    """Return the frozen text encoder of the checkpoint, else of the file `path`, else a released
    DAMSM (cub, coco), else one trained here. Embeddings of the last have the RMS length `rms`: long
    ones swamp z in GAN-CLS, short ones are lost on D in StackGAN and, by MA-GP, in DF-GAN."""
    if checkpoint:
        return text_encoder_from_state_dict(checkpoint["text_encoder"]).to(device)
    name = dataset.name
    if not path and kind == "damsm" and name in PRETRAINED:
        url, files = PRETRAINED[name]
        for file, sha256 in files.items():
            path = Path(root, name, kind, file)  # the last is the encoder
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(url + file, path, sha256)
    if not path:
        path = encoder_path(kind, name)
        if not (path.exists() and load_checkpoint(path, "text encoder")["data"] == name):
            train_text_encoder(kind, name, root, device, path)
    encoder = load_text_encoder(path)
    if encoder.dim != (256 if kind == "damsm" else 1024):
        raise UserError(f"{path} is no {kind} encoder")
    encoder.config["scale"] = rms / encoder.config.get("rms", rms)
    return encoder.to(device)

def embed_captions(encoder, dataset):
    """Return the embeddings of all captions, (M, dim), cached on disk."""
    weights = nn.utils.parameters_to_vector(encoder.parameters())
    key = repr((encoder.config, dataset.captions)).encode() + weights.cpu().numpy().tobytes()
    path = Path(f"{dataset.cache}-{hashlib.sha256(key).hexdigest()[:16]}.pt")
    if path.exists():
        x = load_checkpoint(path, "embeddings")["x"].to(weights.device)
    else:
        x = encoder.encode(dataset.captions)
        save_checkpoint(path, {"kind": "embeddings", "x": x})
    rms = x.square().sum(1).mean().sqrt()
    print(f"RMS length of the embeddings: {rms:.2f}; if long, G may ignore the noise")
    return x

# ---- Evaluation

def frechet_distance(x, y):
    """Return the FID of features (N, D) and (M, D), in float64 (Heusel et al. 2017, eq. 6):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of means and covariances."""
    x, y = x.double(), y.double()
    cov1, cov2 = torch.cov(x.T), torch.cov(y.T)
    trace = (cov1 + cov2).trace() - 2 * torch.linalg.eigvals(cov1 @ cov2).sqrt().real.sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + trace).item()

def r_precision(image, captions, text, classes):
    """Return how often an image (N, D) has a larger cosine with its caption (N,) than with 99 of
    other classes (AttnGAN, section 4.1). text (M, D), classes (M,): of all captions."""
    rng, counts = torch.Generator().manual_seed(0), classes.bincount()
    wrong = data.sample_other_class(classes.argsort(), counts, classes[captions], 99, rng)
    candidates = torch.cat((captions[:, None], wrong), 1)  # (N, 100)
    hits = 0
    for x, c in zip(image.split(64), candidates.split(64)):
        score = F.cosine_similarity(x[:, None], text[c], 2)
        hits += (score[:, 0] >= score.amax(1) - 1e-6).sum().item()  # equal captions are right
    return hits / len(image)

def evaluation_captions(dataset, num_samples):
    """Return caption numbers in random order, repeated up to num_samples, in batches."""
    order = torch.randperm(len(dataset.captions), generator=torch.Generator().manual_seed(0))
    return order.repeat(num_samples // len(order) + 1)[:num_samples].split(64)

@torch.no_grad()
def evaluate(images, captions, groups, test_set, device, r_precision_encoder=None):
    """Return a dict of metrics of images, batches (B, 3, S, S) drawn from `captions`.

    groups: batches of 8 images of one caption, for the diversity."""
    if test_set.name == "toy":  # no download
        metrics = data.attribute_accuracy(torch.cat([*images]), torch.cat(captions), test_set)
        print(metrics)
        return metrics
    path = Path(r_precision_encoder or encoder_path("damsm", test_set.name))
    state = load_checkpoint(path, "text encoder") if path.exists() else {}
    net = FIDInception().to(device)
    fake = torch.cat([net(((x + 1) * 127.5).round() / 127.5 - 1)[0] for x in images])
    real = torch.cat([net(test_set.center_crop(index).to(device))[0]
                      for index in torch.arange(len(test_set)).split(64)])
    print(f"FID: {len(fake)} images, {len(real)} real test images of {test_set.size} px")
    metrics = {"fid": frechet_distance(real, fake),
               "diversity": torch.stack([F.pdist(net(x)[0]) for x in groups]).mean().item()}
    if state.get("features") != "inception":
        print(f"R-precision needs {path} with Inception features: "
              f"python common.py --encoder damsm --data {test_set.name}")
    else:
        encoder = ImageEncoder(256, small=False).to(device).eval()
        encoder.load_state_dict(state["image_encoder"])
        text = embed_captions(load_text_encoder(path).to(device), test_set)
        classes = test_set.classes[test_set.caption_owners]
        metrics["r_precision"] = r_precision(
            encoder.embed(fake), torch.cat(captions), text, classes)
    print(metrics)
    return metrics

def main():
    parser = argparse.ArgumentParser(description="Train a text encoder.")
    add = parser.add_argument
    add("--encoder", choices=["char-cnn-rnn", "damsm"], default="char-cnn-rnn")
    add("--data", default="toy", help="toy, flowers, cub, coco or a folder")
    add("--root", default="datasets")
    add("--device", default="auto")
    add("--iterations", type=int, help="default: one per image, 300 to 3000; toy: 1000")
    add("--image-features", choices=["inception", "small"])
    args = parser.parse_args()
    name = data.dataset_id(args.data)
    train_text_encoder(args.encoder, name, args.root, init_distributed(args.device),
                       encoder_path(args.encoder, name), args.iterations, args.image_features)

if __name__ == "__main__":
    sys.exit(run(main))
