"""Generative Adversarial Text to Image Synthesis. Reed et al., ICML 2016 (arXiv 1605.05396).

G draws an image from noise z and the embedding t of a caption; D scores an image with t.
    GAN-CLS         real images with a wrong caption count as fake too    (Algorithm 1)
    GAN-INT         G also learns from interpolated embeddings            (eq. 5)
    style transfer  S recovers z from an image x: G(S(x), t)              (section 4.4)

    python gan_cls.py                                    # toy data, minutes on a CPU
    python gan_cls.py --data flowers                     # Oxford-102; run again to resume
    python gan_cls.py --data flowers --sample "pink flower" "a white flower"
    python gan_cls.py --data flowers --interpolate "a pink flower" "a yellow flower"
    python gan_cls.py --data flowers --evaluate
    python gan_cls.py --data flowers --style-image photo.jpg --sample "pink flower"
"""
import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

try:
    import common
    import data
except ModuleNotFoundError:    # networks, losses and steps need torch only
    common = data = None

SIZE, NZ, TEXT, NT = 64, 100, 1024, 128    # image; noise z; embedding t; projected t (section 5)

# ---- Networks

class NearestUpConv(nn.Conv2d):
    """Same as a 3x3 convolution of F.interpolate(x, scale_factor=2.0), with 2.25 times fewer FLOPs.

    Each 4x4 weight of one transposed convolution sums the 3x3 weights that meet the same pixel."""

    def forward(self, x):
        if x.shape[2] < 8:    # few pixels: larger weights cost more than they save
            return super().forward(F.interpolate(x, scale_factor=2.0))
        weight = F.avg_pool2d(self.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, 2, 1)

class Generator(nn.Module):
    """z (B, 100), t (B, 1024) -> images (B, 3, 64, 64) in [-1, 1]. Figure 2, left.

    Released code: residual blocks at 4x4 and 8x8 too; we follow the figure, which trains better.
    upsample: "transposed", the paper's deconvolution; "nearest" leaves no checkerboard."""

    def __init__(self, ngf=128, upsample="transposed"):
        super().__init__()

        def up(a, b):
            if upsample == "nearest":
                return NearestUpConv(a, b, 3, 1, 1, bias=False)
            return nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)

        def norm(channels):
            return nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

        self.text = nn.Sequential(nn.Linear(TEXT, NT), nn.LeakyReLU(0.2))
        self.net = nn.Sequential(
            nn.ConvTranspose2d(NZ + NT, 8 * ngf, 4, bias=False), *norm(8 * ngf),    # 4 x 4
            up(8 * ngf, 4 * ngf), *norm(4 * ngf),    # 8 x 8
            up(4 * ngf, 2 * ngf), *norm(2 * ngf),    # 16 x 16
            up(2 * ngf, ngf), *norm(ngf),    # 32 x 32
            up(ngf, 3), nn.Tanh())    # 64 x 64
        self.apply(init_weights)

    def forward(self, z, t):
        return self.net(torch.cat((z, self.text(t)), 1)[:, :, None, None])

def image_encoder(ndf):
    """Images (B, 3, 64, 64) -> features (B, 8 ndf, 4, 4).

    Released code: a residual block at the end and no leaky ReLU after the last two
    norms; we follow Figure 2."""
    def down(a, b):
        return (nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b),
                nn.LeakyReLU(0.2, inplace=True))

    return nn.Sequential(
        nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
        *down(ndf, 2 * ndf), *down(2 * ndf, 4 * ndf), *down(4 * ndf, 8 * ndf))

class Discriminator(nn.Module):
    """Images (B, 3, 64, 64), t (B, 1024) -> logits (B,). Figure 2, right."""

    def __init__(self, ndf=64):
        super().__init__()
        self.image = image_encoder(ndf)
        # Batch norm on the text: released code for birds and flowers; not in the figure
        self.text = nn.Sequential(nn.Linear(TEXT, NT), nn.BatchNorm1d(NT), nn.LeakyReLU(0.2))
        self.joint = nn.Sequential(
            nn.Conv2d(8 * ndf + NT, 8 * ndf, 1, bias=False), nn.BatchNorm2d(8 * ndf),
            nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8 * ndf, 1, 4, bias=False))
        self.apply(init_weights)

    def features(self, x):
        return self.image(x)    # (B, 8 ndf, 4, 4)

    def score(self, h, t):
        t = self.text(t)[:, :, None, None].expand(-1, -1, 4, 4)    # replicated spatially
        return self.joint(torch.cat((h, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)

def init_weights(module):
    """Released code: N(0, 0.02) for convolutions, N(1, 0.02) for batch norm."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)

# ---- Losses, of logits s: -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s)

def d_loss(real, wrong, fake):
    """-log D(x, t) - [log(1 - D(x, t_wrong)) + log(1 - D(G(z, t), t))] / 2  (Algorithm 1)."""
    return (F.softplus(-real) + (F.softplus(wrong) + F.softplus(fake)) / 2).mean()

def g_loss(fake):
    """-log D(G(z, t), t)  (Algorithm 1)."""
    return F.softplus(-fake).mean()

def interpolate_embeddings(t):
    """b t1 + (1 - b) t2, b = 1/2, of pairs of a batch (B, 1024) -> (B // 2, 1024)  (eq. 5)."""
    half = len(t) // 2
    return (t[:half] + t[half:2 * half]) / 2

# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. real, fake (B, 3, 64, 64); t, t_wrong (B, 1024), or None for the plain GAN.

    Wrong pair: the same image with a caption of another class, as in Algorithm 1, so its features
    are shared; released code: the same caption with an image of another class. Return loss,
    D(real), D(wrong), D(fake): a D that ignores its text has D(wrong) = D(real)."""
    h = D.features(real)
    s_real, s_fake = D.score(h, t), D(fake.detach(), t)
    s_wrong = s_fake if t_wrong is None else D.score(h, t_wrong)
    loss = d_loss(s_real, s_wrong, s_fake)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return torch.stack((loss, *(s.sigmoid().mean() for s in (s_real, s_wrong, s_fake)))).detach()

def g_step(D, opt_g, fake, t):
    """Update G. fake = G(z, t) with its graph; t (B, 1024). Return the loss.

    One fake serves both steps, as in Algorithm 1; released code: another one for G's step."""
    D.requires_grad_(False)    # no gradients of D are needed
    loss = g_loss(D(fake, t))
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()

@torch.no_grad()
def update_ema(ema, G, decay):
    """ema += (1 - decay) (G - ema), for weights and batch norm statistics."""
    pairs = zip(ema.state_dict().values(), G.state_dict().values())
    averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))
    torch._foreach_lerp_(averages, values, 1 - decay)

def build(ngf=128, ndf=64, upsample="transposed", lr=2e-4, device="cpu"):
    """Return G, D and their optimizers: Adam, 2e-4, betas (0.5, 0.999) (section 5)."""
    nets = [net.to(device, memory_format=torch.channels_last)
            for net in (Generator(ngf, upsample), Discriminator(ndf))]
    fused = "cuda" in str(device)
    return *nets, *(torch.optim.Adam(net.parameters(), lr, (0.5, 0.999), fused=fused)
                    for net in nets)

# ---- Training

def train(args, checkpoint):
    """Train, or resume; write last.pt, log.csv and grids of samples to args.out_dir."""
    with common.main_process_first():
        train_set, test_set = (data.load_dataset(args.data, split, SIZE, args.root)
                               for split in ("train", "test"))
        text_encoder = common.get_text_encoder(
            "char-cnn-rnn", train_set, args.root, args.device, checkpoint, args.text_encoder,
            args.encoder_iterations, args.image_features)
        embeddings = common.embed_captions(text_encoder, train_set)    # (M, 1024)
    # Released code: a random class, then an image of it; here every image once an epoch
    batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                           args.captions_per_image, common.rank(), common.world_size())
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(args.ngf, args.ndf, args.upsample, args.lr, args.device)
    ema = copy.deepcopy(G).eval()
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    start, history, sums = 0, [], torch.zeros(5)
    if checkpoint:
        start, history, sums = (checkpoint[key] for key in ("step", "history", "sums"))
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    sums = sums.to(args.device)    # of losses since the epoch began
    common.average_gradients(G, opt_g)
    common.average_gradients(D, opt_d)
    if args.compile and common.world_size() == 1:    # synchronised batch norm breaks the graph
        print("compiling: the first step takes minutes (--no-compile)", flush=True)
        G.compile(dynamic=False)
        D.features = torch.compile(D.features, dynamic=False)
        D.score = torch.compile(D.score, dynamic=False)

    captions = test_set.first_captions(8)    # a grid has a row a caption, a column a noise
    grid = (sample_noise(8, args.seed).repeat(len(captions), 1),
            text_encoder.encode(captions).repeat_interleave(8, 0))
    num_steps, saved = args.epochs * len(batches), 0
    print(f"{len(train_set)} images, {num_steps} steps, {args.device}; writing to {args.out_dir}")
    bar = data.Progress(num_steps * args.batch_size, "training", done=start * args.batch_size)
    stop = common.GracefulStop()
    for step in range(start, num_steps):
        epoch, batch = divmod(step, len(batches))
        for group in (*opt_g.param_groups, *opt_d.param_groups):
            group["lr"] = args.lr * 0.5 ** ((epoch + 1) // args.lr_decay_epochs)
        torch.manual_seed(args.seed * 2**32 + step)    # a resumed run draws the same noise
        images, captions, wrong = batches(step)
        # Paper: one caption; released code: the mean of 4 (--captions-per-image)
        t, t_wrong = embeddings[captions].mean(1), embeddings[wrong].mean(1)
        t_g = torch.cat((t, interpolate_embeddings(t))) if "int" in args.variant else t
        z = torch.randn(common.world_size(), len(t_g), NZ, device=args.device)[common.rank()]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            fake = G(z, t_g)
            d_stats = d_step(D, opt_d, images, fake[:len(t)], t,
                             t_wrong if "cls" in args.variant else None)
            loss_g = g_step(D, opt_g, fake, t_g)
        update_ema(ema, G, min(args.ema, (1 + step) / (10 + step)))

        sums += torch.cat((loss_g[None], d_stats))
        end_of_epoch, stopping = batch + 1 == len(batches), stop.requested()
        if end_of_epoch or batch % 20 == 19:
            names = ("loss_g", "loss_d", "d_real", "d_wrong", "d_fake")
            means = dict(zip(names, (sums / (batch + 1)).tolist()))
            bar.note = "  ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        bar.update(args.batch_size)
        if end_of_epoch:
            sums.zero_()
            history.append({"epoch": epoch + 1, **means})
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                history[-1] |= evaluate(ema, text_encoder, test_set, args)
        last = stopping or step + 1 == num_steps
        if last or (end_of_epoch and time.time() - saved > 60):
            saved = time.time()
            common.save_grid(args.out_dir / f"epoch_{epoch + 1:04}.png", generate(ema, *grid), 8)
            common.save_log(args.out_dir / "log.csv", history)
            common.save_checkpoint(args.out_dir / "last.pt", {
                "kind": "gan_cls", "step": step + 1, "history": history, "sums": sums,
                "args": {name: getattr(args, name) for name in FIXED},
                "text_encoder": text_encoder, **parts})
        if stopping:
            return 128 + stop.signal
    if args.data == "toy":
        evaluate(ema, text_encoder, test_set, args)

# ---- Sampling

def load_generator(path, device="cpu"):
    """Return the EMA of G and the text encoder of a checkpoint (a path, or its content)."""
    state = path if isinstance(path, dict) else common.load_checkpoint(path, "gan_cls")
    G = Generator(state["args"]["ngf"], state["args"]["upsample"]).eval()
    G.load_state_dict(state["ema"])
    text_encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    return G.to(device, memory_format=torch.channels_last), text_encoder.to(device)

def sample_noise(n, seed=0):
    """Return z (n, 100) from N(0, 1), the same on every device."""
    return torch.randn(n, NZ, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def generate(G, noise, embeddings):
    """Return images (N, 3, 64, 64) in [-1, 1] of noise (N, 100) and embeddings (N, 1024)."""
    noise = noise.to(embeddings.device)
    return torch.cat([G(z, t) for z, t in zip(noise.split(64), embeddings.split(64))]).float()

def sample(args, checkpoint):
    """Draw a grid: a row a caption. --interpolate: from caption A to B, a row a noise; with
    --interpolate-noise: from noise to noise, a row a caption. --num-images: files, no grid."""
    G, text_encoder = load_generator(checkpoint, args.device)
    captions, n = args.sample or args.interpolate, args.samples_per_caption
    embeddings = text_encoder.encode_prompts(captions)
    path = args.out_dir / f"sample-{common.slug(captions)}-{args.seed}.png"
    noise = sample_noise(n, args.seed).repeat(len(captions), 1)
    t, alphas = embeddings.repeat_interleave(n, 0), torch.linspace(0, 1, n)[:, None]
    if args.interpolate_noise:
        noise = torch.lerp(noise[:1], noise[1:2], alphas).repeat(2, 1)
    elif args.interpolate:
        noise = sample_noise(4, args.seed).repeat_interleave(n, 0)
        t = torch.lerp(*embeddings, alphas.to(t.device)).repeat(4, 1)
    if args.num_images:
        path = path.with_suffix("")
        for i in range(args.num_images * len(captions)):
            noise = sample_noise(1, args.seed * 2**20 + i)
            image = generate(G, noise, embeddings[i % len(captions), None])
            common.save_grid(path / f"{i:05}.png", image, 1)
    else:
        common.save_grid(path, generate(G, noise, t), n)
    print(*map(repr, captions), path, sep="\n")

def evaluate(G, text_encoder, test_set, args):
    """Return metrics of --fid-samples images as a dict."""
    t = common.embed_captions(text_encoder, test_set)
    captions = common.evaluation_captions(test_set, args.fid_samples)
    images = (generate(G, sample_noise(len(c), i), t[c]) for i, c in enumerate(captions))
    groups = (generate(G, sample_noise(8, i), t[[i] * 8]) for i in range(min(50, len(t))))
    return common.evaluate(images, captions, groups, test_set, args.device,
                           args.r_precision_encoder)

# ---- Style transfer (section 4.4; never released)

class StyleEncoder(nn.Sequential):
    """S: images (B, 3, 64, 64) -> z (B, 100). The paper gives no layers; those of D are used."""

    def __init__(self, ndf=64):
        super().__init__(image_encoder(ndf), nn.Flatten(), nn.Linear(8 * ndf * 16, NZ))
        self.apply(init_weights)

def style_loss(S, z, fake):
    """|| z - S(G(z, t)) ||^2  (eq. 6)."""
    return (z - S(fake)).square().sum(1).mean()

def train_style_encoder(G, S, embeddings, num_steps):
    """Train S to recover z from images of a fixed G."""
    optimizer = torch.optim.Adam(S.parameters(), 2e-4, (0.5, 0.999))
    bar = data.Progress(num_steps * 64, "training the style encoder")
    for _ in range(num_steps):
        z = torch.randn(64, NZ, device=embeddings.device)
        t = embeddings[torch.randint(len(embeddings), (64,), device=embeddings.device)]
        loss = style_loss(S, z, generate(G, z, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update(64)

def style_transfer(args, checkpoint):
    """Draw the captions with pose and background of a photo, which comes first in the row."""
    G, text_encoder = load_generator(checkpoint, args.device)
    t = text_encoder.encode_prompts(args.sample)
    photo = data.load_image(data.Record(Path(args.style_image), [], 0), SIZE)
    photo = torch.tensor(photo, device=args.device)[None] / 127.5 - 1
    S = StyleEncoder(checkpoint["args"]["ndf"]).to(args.device)
    path = args.out_dir / f"style-encoder-{checkpoint['step']}.pt"
    if path.exists():
        S.load_state_dict(common.load_checkpoint(path, "style encoder")["S"])
    else:
        train_set = data.load_dataset(args.data, "train", SIZE, args.root)
        train_style_encoder(G, S, common.embed_captions(text_encoder, train_set), args.style_steps)
        common.save_checkpoint(path, {"kind": "style encoder", "S": S})
    with torch.no_grad():
        images = generate(G, S.eval()(photo).expand(len(t), -1), t)
    path = args.out_dir / f"style-{Path(args.style_image).stem}-{common.slug(args.sample)}.png"
    common.save_grid(path, torch.cat((photo, images)), len(t) + 1)
    print(*map(repr, args.sample), path, sep="\n")

# ---- Command line

PRESETS = {
    "toy": dict(epochs=14, ngf=24, ndf=24, batch_size=16, captions_per_image=1, ema=0.99,
                upsample="nearest", fid_samples=512),
    "coco": dict(epochs=200, ngf=196, ndf=196, captions_per_image=3, variant="cls",
                 lr_decay_epochs=40)}    # released code
FIXED = ("data", "variant", "upsample", "ngf", "ndf", "batch_size", "lr", "lr_decay_epochs", "ema",
         "captions_per_image", "seed")

def main(argv=None):
    parser = argparse.ArgumentParser("gan_cls.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variant", choices=["gan", "cls", "int", "int-cls"], default="int-cls")
    add("--epochs", type=int, default=600, help="section 5")
    add("--batch-size", type=int, default=64, help="section 5")
    add("--lr", type=float, default=2e-4, help="section 5")
    add("--lr-decay-epochs", type=int, default=100, help="lr is halved (released code)")
    add("--ngf", type=int, default=128, help="width of G (released code)")
    add("--ndf", type=int, default=64, help="width of D (released code)")
    add("--captions-per-image", type=int, default=4, help="averaged (released code)")
    add("--upsample", choices=["transposed", "nearest"], default="transposed")
    add("--style-image", metavar="PHOTO", help="with --sample: pose and background of a photo")
    add("--style-steps", type=int, default=2000, help="of training the style encoder")
    args, checkpoint = common.parse_args(parser, PRESETS, FIXED, argv)
    if args.style_image:
        return style_transfer(args, checkpoint)
    if args.sample or args.interpolate:
        return sample(args, checkpoint)
    if not args.evaluate:
        return train(args, checkpoint)
    test_set = data.load_dataset(args.data, "test", SIZE, args.root)
    evaluate(*load_generator(checkpoint, args.device), test_set, args)

if __name__ == "__main__":
    sys.exit(common.run(main) if common else "training and sampling need common.py and data.py")
