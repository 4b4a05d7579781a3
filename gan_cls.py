"""Generative Adversarial Text to Image Synthesis. Reed et al., ICML 2016 (arXiv 1605.05396).

G draws an image from noise z and caption embedding t; D scores an image with t.
    GAN-CLS         real images with a wrong caption count as fake (Algorithm 1)
    GAN-INT         G also learns from interpolated embeddings (eq. 5)
    style transfer  S recovers z from an image x: G(S(x), t) (section 4.4)

    python gan_cls.py  # toy data, minutes on a CPU
    python gan_cls.py --data flowers  # run again to resume
    python gan_cls.py --data flowers --sample "pink flower" "a white flower"
    python gan_cls.py --data flowers --evaluate
    python gan_cls.py --data flowers --sample "pink flower" --style-image photo.jpg
"""
import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

try:
    import common
    import data
except ModuleNotFoundError:  # networks, losses and steps need torch only
    common = data = None

NAME, NZ, TEXT, NT = "gan_cls", 100, 1024, 128  # noise z; embedding t; projected t (section 5)

# ---- Networks

class NearestUpConv(nn.Conv2d):
    """Compute conv3x3(F.interpolate(x, scale_factor=2.0)) as a 4x4 transposed convolution, 2.25
    times fewer FLOPs: the 3x3 weights on copies of one pixel are summed."""
    def forward(self, x):
        if x.shape[2] < 8:  # faster for few pixels
            return super().forward(F.interpolate(x, scale_factor=2.0))
        # Not F.avg_pool2d: its CUDA gradient is wrong (PyTorch issue 188344)
        weight = F.pad(self.weight.flip(2, 3), (1, 1, 1, 1))
        weight = weight[:, :, 1:] + weight[:, :, :-1]
        weight = weight[..., 1:] + weight[..., :-1]  # (b, a, 4, 4)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, 2, 1)

class Generator(nn.Module):
    """z (B, 100), t (B, 1024) -> images (B, 3, 64, 64) in [-1, 1]. Figure 2, left.

    Released code adds residual blocks; without them it trains better. upsample: "transposed"
    (paper) or "nearest" (no checkerboard)."""
    def __init__(self, ngf=128, upsample="transposed"):
        super().__init__()
        self.text = nn.Sequential(nn.Linear(TEXT, NT), nn.LeakyReLU(0.2))
        widths = 8 * ngf, 4 * ngf, 2 * ngf, ngf, 3
        layers = [nn.ConvTranspose2d(NZ + NT, 8 * ngf, 4, bias=False)]  # 4 x 4
        for a, b in zip(widths, widths[1:]):  # to 8 x 8, 16 x 16, 32 x 32, 64 x 64
            up = (NearestUpConv(a, b, 3, 1, 1, bias=False) if upsample == "nearest" else
                  nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False))
            layers += [nn.BatchNorm2d(a), nn.ReLU(True), up]
        self.net = nn.Sequential(*layers, nn.Tanh())
        self.apply(init_weights)

    def forward(self, z, t):
        return self.net(torch.cat((z, self.text(t)), 1)[:, :, None, None])

def image_encoder(ndf):
    """Images (B, 3, 64, 64) -> features (B, 8 ndf, 4, 4).

    Released code: a residual block at the end, two norms without leaky ReLU; we follow Figure 2."""
    layers = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for a in (ndf, 2 * ndf, 4 * ndf):
        layers += [nn.Conv2d(a, 2 * a, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * a),
                   nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers)

class Discriminator(nn.Module):
    """Images (B, 3, 64, 64), t (B, 1024) -> logits (B,). Figure 2, right."""
    def __init__(self, ndf=64):
        super().__init__()
        self.image = image_encoder(ndf)
        # Batch norm: as released (birds, flowers); not in Figure 2
        self.text = nn.Sequential(nn.Linear(TEXT, NT), nn.BatchNorm1d(NT), nn.LeakyReLU(0.2))
        self.joint = nn.Sequential(
            nn.Conv2d(8 * ndf + NT, 8 * ndf, 1, bias=False), nn.BatchNorm2d(8 * ndf),
            nn.LeakyReLU(0.2, True), nn.Conv2d(8 * ndf, 1, 4, bias=False))
        self.apply(init_weights)

    def features(self, x):
        return self.image(x)  # (B, 8 ndf, 4, 4)

    def score(self, h, t):
        t = self.text(t)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint(torch.cat((h, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)

def init_weights(module):
    """Convolutions N(0, 0.02), batch norm N(1, 0.02), as released."""
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
    """(t1 + t2) / 2 of pairs of a batch (B, 1024) -> (B // 2, 1024)  (eq. 5, beta = 1/2)."""
    half = len(t) // 2
    return (t[:half] + t[half:2 * half]) / 2

# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. Return loss, D(real), D(wrong), D(fake). real, fake (B, 3, 64, 64); t, t_wrong
    (B, 1024). Without t_wrong: a plain GAN.

    Wrong pair: real image, another text (Algorithm 1), here of another class. Released code: text,
    another image."""
    features = D.features(real)
    s_real, s_fake = D.score(features, t), D(fake.detach(), t)
    s_wrong = s_fake if t_wrong is None else D.score(features, t_wrong)
    loss = d_loss(s_real, s_wrong, s_fake)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return torch.stack((loss, *(s.sigmoid().mean() for s in (s_real, s_wrong, s_fake)))).detach()

def g_step(D, opt_g, fake, t):
    """Update G, return loss. fake: G(z, t), not detached; t (B, 1024); GAN-INT: B + B // 2 rows."""
    D.requires_grad_(False)  # skips D's gradients and autocast's stale bf16 copies
    loss = g_loss(D(fake, t))
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()

@torch.no_grad()
def update_ema(ema, G, decay):
    """ema += (1 - decay) (G - ema), batch norm statistics included."""
    a, b = ([x for x in net.state_dict().values() if x.is_floating_point()] for net in (ema, G))
    torch._foreach_lerp_(a, b, 1 - decay)

def build(ngf=128, ndf=64, upsample="transposed", lr=2e-4, device="cpu"):
    """Return G, D and their optimizers: Adam (section 5)."""
    nets = Generator(ngf, upsample), Discriminator(ndf)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in nets)
    adam = dict(betas=(0.5, 0.999), fused=True)
    return G, D, Adam(G.parameters(), lr, **adam), Adam(D.parameters(), lr, **adam)

# ---- Training

def train(args, checkpoint):
    """Train or resume; write last.pt, log.csv and grids of samples."""
    with common.main_process_first():
        train_set = data.load_dataset(args.data, "train", 64, args.root)
        test_set = data.load_dataset(args.data, "test", 64, args.root)
        encoder = common.get_text_encoder(
            "char-cnn-rnn", train_set, args.root, args.device, checkpoint, args.text_encoder, rms=1)
        embeddings = common.embed_captions(encoder, train_set)  # (captions, TEXT)
    batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                           args.captions_per_image, common.rank(), common.world_size())
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(args.ngf, args.ndf, args.upsample, args.lr, args.device)
    ema = copy.deepcopy(G).eval()
    parts = dict(G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    names = "loss_g", "loss_d", "d_real", "d_wrong", "d_fake"
    start, history, sums = 0, [], torch.zeros(len(names))
    if checkpoint:
        start, history, sums = (checkpoint[key] for key in ("step", "history", "sums"))
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    sums = sums.to(args.device)  # of losses since the epoch began
    common.average_gradients(G, opt_g)
    common.average_gradients(D, opt_d)

    # Grid: rows are captions, columns noises
    t = encoder.encode(test_set.captions[::len(test_set.captions) // 8 + 1])
    grid = sample_noise(8, args.seed).repeat(len(t), 1), t.repeat_interleave(8, 0)
    num_steps, saved = args.epochs * len(batches), 0
    print(f"{len(train_set)} images, {num_steps} steps on {args.device}, to {args.out_dir}")
    bar = data.Progress(num_steps * args.batch_size, "training", done=start * args.batch_size)
    stop = common.GracefulStop()
    for step in range(start, num_steps):
        epoch, batch = divmod(step, len(batches))
        for opt in (opt_g, opt_d):
            opt.param_groups[0]["lr"] = args.lr * 0.5 ** ((epoch + 1) // args.lr_decay_epochs)
        torch.manual_seed(args.seed * 2**20 + step)  # resumed runs draw the same noise
        images, captions, wrong = batches(step)
        # Paper: one caption an image; released: the mean of several
        t = embeddings[captions].mean(1)
        t_wrong = embeddings[wrong].mean(1) if "cls" in args.variant else None
        t_g = torch.cat((t, interpolate_embeddings(t))) if "int" in args.variant else t
        z = torch.randn(common.world_size(), len(t_g), NZ, device=args.device)[common.rank()]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            fake = G(z, t_g)
            d_stats = d_step(D, opt_d, images, fake[:len(t)], t, t_wrong)
            loss_g = g_step(D, opt_g, fake, t_g)  # released code: a new fake
        update_ema(ema, G, min(args.ema, (1 + step) / (10 + step)))

        sums += torch.stack((loss_g, *d_stats))
        end_of_epoch, stopping = batch + 1 == len(batches), stop.requested()
        if end_of_epoch or stopping or batch % 20 == 19:
            means = dict(zip(names, (common.reduce_mean(sums) / (batch + 1)).tolist()))
            bar.note = "  ".join(f"{k} {v:.2f}" for k, v in means.items())
            assert sums.isfinite().all(), "the loss is not finite"
        bar.update(args.batch_size)
        if end_of_epoch:
            sums.zero_()
            history.append(dict(epoch=epoch + 1, **means))
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                history[-1] |= evaluate(ema, encoder, test_set, args)
        if stopping or step + 1 == num_steps or (end_of_epoch and time.time() - saved > 60):
            saved = time.time()
            common.save_grid(args.out_dir / f"epoch_{epoch + 1:04}.png", generate(ema, *grid), 8)
            common.save_log(args.out_dir / "log.csv", history)
            common.save_checkpoint(args.out_dir / "last.pt", dict(
                kind=NAME, step=step + 1, history=history, sums=sums,
                args={n: vars(args)[n] for n in RESUME_ARGS}, text_encoder=encoder, **parts))
        if stopping:
            return 128 + stop.signal

# ---- Sampling

def load_generator(path, device="cpu"):
    """Return the EMA of G and the text encoder of a checkpoint or its path."""
    state = path if isinstance(path, dict) else common.load_checkpoint(path, NAME)
    G = Generator(state["args"]["ngf"], state["args"]["upsample"]).eval()
    G.load_state_dict(state["ema"])
    encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    return G.to(device, memory_format=torch.channels_last), encoder.to(device)

def sample_noise(n, seed=0):
    """Return z (n, 100) from N(0, 1), the same on every device."""
    return torch.randn(n, NZ, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def generate(G, noise, embeddings):
    """noise (N, 100), embeddings (N, TEXT) -> images (N, 3, S, S) in [-1, 1]."""
    return G(noise.to(embeddings.device), embeddings).float()

def sample(G, encoder, args):
    """Draw a grid (row: t, column: noise), or --num-images files a row."""
    captions, n = args.captions, args.num_images or args.samples_per_caption
    noise, t = sample_noise(n, args.seed), encoder.encode_prompts(captions)
    kind, alphas = "sample", torch.linspace(0, 1, n)[:, None]
    if args.interpolate_noise:
        kind, noise = "noise", torch.lerp(noise[0], noise[-1], alphas)
    if args.interpolate:
        kind, t = "interpolation", torch.lerp(*t, alphas.to(t.device))
    noise, t = noise.repeat(len(t), 1), t.repeat_interleave(n, 0)
    path = args.out_dir / f"{kind}-{common.slug(captions)}-{args.seed}.png"
    if args.num_images:
        path = path.with_suffix("")
        for i in range(len(t)):
            common.save_grid(path / f"{i:05}.png", generate(G, noise[[i]], t[[i]]), 1)
    else:
        common.save_grid(path, generate(G, noise, t), n)
    print(*captions, path, sep="\n")

def evaluate(G, encoder, test_set, args):
    """Return the metrics."""
    t = common.embed_captions(encoder, test_set)
    captions = common.evaluation_captions(test_set, args.fid_samples)
    fake = (generate(G, sample_noise(len(c), i), t[c]) for i, c in enumerate(captions))
    groups = (generate(G, sample_noise(8, k), t[[k] * 8]) for k in captions[0][:50].tolist())
    return common.evaluate(fake, captions, groups, test_set, args.device, args.r_precision_encoder)

# ---- Style transfer (section 4.4; never released)

class StyleEncoder(nn.Sequential):
    """S: images (B, 3, 64, 64) -> z (B, 100). The paper gives no layers; those of D are used."""
    def __init__(self, ndf=64):
        super().__init__(image_encoder(ndf), nn.Flatten(), nn.Linear(8 * ndf * 16, NZ))

def style_loss(S, z, fake):
    """|| z - S(G(z, t)) ||^2  (eq. 6)."""
    return (z - S(fake)).square().sum(1).mean()

def style_transfer(G, encoder, step, args):
    """Draw a photo, then the captions in its style."""
    photo = data.load_image(data.Record(Path(args.style_image), [], 0), 64)
    photo = torch.tensor(photo, device=args.device)[None] / 127.5 - 1
    torch.manual_seed(args.seed)
    S = StyleEncoder(args.ndf).to(args.device)
    path = args.out_dir / f"style-encoder-{step}-{args.style_steps}.pt"
    if not path.exists():
        train_set = data.load_dataset(args.data, "train", 64, args.root)
        embeddings = common.embed_captions(encoder, train_set)
        optimizer = Adam(S.parameters(), 2e-4, (0.5, 0.999))
        bar = data.Progress(args.style_steps * 64, "style encoder")
        for _ in range(args.style_steps):
            z = torch.randn(64, NZ, device=args.device)
            t = embeddings[torch.randint(len(embeddings), (64,), device=args.device)]
            loss = style_loss(S, z, generate(G, z, t))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(64)
        common.save_checkpoint(path, dict(kind="style encoder", S=S))
    S.load_state_dict(common.load_checkpoint(path, "style encoder")["S"])
    t = encoder.encode_prompts(args.captions)
    images = generate(G, S.eval()(photo).expand(len(t), -1), t)
    path = args.out_dir / f"style-{Path(args.style_image).stem}-{common.slug(args.captions)}.png"
    common.save_grid(path, torch.cat((photo, images)), len(t) + 1)
    print(*args.captions, path, sep="\n")

# ---- Command line

PRESETS = {
    "toy": dict(epochs=16, ngf=16, ndf=16, batch_size=8, lr=4e-4, captions_per_image=1, ema=0.998,
                upsample="nearest", eval_every=16, fid_samples=1024),
    "coco": dict(epochs=200, ngf=196, ndf=196, captions_per_image=3, variant="cls",
                 lr_decay_epochs=40)}  # released code
RESUME_ARGS = ("data", "variant", "upsample", "ngf", "ndf", "batch_size", "lr", "lr_decay_epochs",
               "ema", "captions_per_image", "seed")

def main(argv=None):
    parser = argparse.ArgumentParser(NAME, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variant", choices=["gan", "cls", "int", "int-cls"], default="int-cls")
    add("--epochs", type=int, default=600, help="section 5")
    add("--batch-size", type=int, default=64, help="section 5")
    add("--lr", type=float, default=2e-4, help="section 5")
    add("--lr-decay-epochs", type=int, default=100, help="halve lr (released)")
    add("--ngf", type=int, default=128, help="width of G (released)")
    add("--ndf", type=int, default=64, help="width of D (released)")
    add("--captions-per-image", type=int, default=4, help="averaged (released)")
    add("--upsample", choices=["transposed", "nearest"], default="transposed")
    add("--style-image", metavar="PHOTO", help="with --sample: its pose and background")
    add("--style-steps", type=int, default=2000, help="to train S")
    args, checkpoint = common.parse_args(parser, PRESETS, RESUME_ARGS, argv)
    if not (args.captions or args.evaluate):
        return train(args, checkpoint)
    G, encoder = load_generator(checkpoint, args.device)
    if args.style_image:
        return style_transfer(G, encoder, checkpoint["step"], args)
    if args.captions:
        return sample(G, encoder, args)
    test_set = data.load_dataset(args.data, "test", 64, args.root)
    evaluate(G, encoder, test_set, args)

if __name__ == "__main__":
    sys.exit(common.run(main) if common else "needs common.py, data.py and requirements.txt")
