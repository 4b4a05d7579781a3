"""Generative Adversarial Text to Image Synthesis. Reed et al., ICML 2016 (arXiv 1605.05396).

The generator G draws an image from noise z and the embedding t of a caption. The discriminator D
scores an image together with t, which the paper calls phi(t).
    GAN-CLS         D learns that a real image with a wrong caption is fake too (section 4.2)
    GAN-INT         G also draws images of interpolated embeddings (section 4.3)
    style transfer  S estimates z from an image x; G(S(x), t) has the style of x (section 4.4)

    python gan_cls.py  # toy data, minutes on a CPU
    python gan_cls.py --data flowers  # run again to resume
    python gan_cls.py --data flowers --sample "pink flower" "a white flower"
    python gan_cls.py --data flowers --evaluate
    python gan_cls.py --data flowers --sample "pink flower" --style-image photo.jpg

Reached: FID 59.5 on flowers (3,000 images of unseen classes; real images: 40.0), with ngf 64 and
nearest upsampling, after 1.6 million images in 11 minutes on an H200.
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

NAME = "gan_cls"
NZ = 100  # dimension of the noise z (section 5)
TEXT_DIM = 1024  # dimension of the embedding t (paper: phi(t))
NT = 128  # dimension of the projected embedding (section 5)
NGF = 128  # width of G (released)
NDF = 64  # width of D (released)
LR = 2e-4  # learning rate of Adam (section 5)
BETAS = (0.5, 0.999)  # of Adam (section 5)


# ---- Networks

class Generator(nn.Module):
    """Draw images (B, 3, 64, 64) in [-1, 1] from z (B, 100) and t (B, 1024). Figure 2, left.

    The released code has residual blocks too. We follow the paper, because it trains better.
    upsample: "transposed" as in the paper, or "nearest", which leaves no checkerboard."""

    def __init__(self, ngf=NGF, upsample="transposed", text_dim=TEXT_DIM):
        super().__init__()
        self.text = nn.Sequential(nn.Linear(text_dim, NT), nn.LeakyReLU(0.2))
        widths = (8 * ngf, 4 * ngf, 2 * ngf, ngf, 3)
        layers = [nn.ConvTranspose2d(NZ + NT, 8 * ngf, 4, bias=False)]  # 4 x 4
        for a, b in zip(widths, widths[1:]):  # 8 x 8 to 64 x 64
            layers += [nn.BatchNorm2d(a), nn.ReLU(True)]
            if upsample == "nearest":
                layers.append(NearestUpConv(a, b, 3, 1, 1, bias=False))
            else:
                layers.append(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False))
        layers.append(nn.Tanh())
        self.net = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, z, t):
        x = torch.cat((z, self.text(t)), 1)  # (B, 228)
        return self.net(x[:, :, None, None])


def image_encoder(ndf):
    """Return the layers from images (B, 3, 64, 64) to features (B, 8 ndf, 4, 4). Figure 2, right.

    The released code adds a residual block and omits two leaky ReLUs. We follow the paper."""
    layers = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for a in (ndf, 2 * ndf, 4 * ndf):  # 32 x 32 to 4 x 4
        layers += [nn.Conv2d(a, 2 * a, 4, 2, 1, bias=False),
                   nn.BatchNorm2d(2 * a),
                   nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    """Score images (B, 3, 64, 64) with t (B, 1024) by logits (B,). Figure 2, right."""

    def __init__(self, ndf=NDF, text_dim=TEXT_DIM):
        super().__init__()
        self.image = image_encoder(ndf)
        # Batch norm as released for birds and flowers; Figure 2 has none here
        self.text = nn.Sequential(
            nn.Linear(text_dim, NT),
            nn.BatchNorm1d(NT),
            nn.LeakyReLU(0.2))
        self.joint = nn.Sequential(
            nn.Conv2d(8 * ndf + NT, 8 * ndf, 1, bias=False),
            nn.BatchNorm2d(8 * ndf),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(8 * ndf, 1, 4, bias=False))
        self.apply(init_weights)

    def features(self, x):
        return self.image(x)  # (B, 8 ndf, 4, 4)

    def score(self, features, t):
        t = self.text(t)[:, :, None, None]
        t = t.expand(-1, -1, 4, 4)  # (B, 128, 4, 4)
        return self.joint(torch.cat((features, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)


def init_weights(module):
    """Draw convolutions from N(0, 0.02) and weights of batch norm from N(1, 0.02), as released."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)


# ---- Losses (Algorithm 1) of logits s: -log D = softplus(-s), -log(1 - D) = softplus(s)

def d_loss(real, wrong, fake):
    """Return -log D(x, t) - [log(1 - D(x, t_wrong)) + log(1 - D(G(z, t), t))] / 2  (line 10)."""
    return (F.softplus(-real) + (F.softplus(wrong) + F.softplus(fake)) / 2).mean()


def g_loss(fake):
    """Return -log D(G(z, t), t)  (line 12)."""
    return F.softplus(-fake).mean()


def interpolate_embeddings(t):
    """Return (t1 + t2) / 2 of pairs in a batch, (B, 1024) -> (B // 2, 1024)  (eq. 5, beta 1/2)."""
    half = len(t) // 2
    return (t[:half] + t[half:2 * half]) / 2


# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. Return its loss, and its mean probabilities of real, wrong and fake pairs.

    real, fake: (B, 3, 64, 64). t, t_wrong: (B, 1024), t_wrong or None. A wrong pair is a real image
    with a text of another class (Algorithm 1); in the released code, a text with another image."""
    features = D.features(real)
    real_score = D.score(features, t)
    fake_score = D(fake.detach(), t)
    wrong_score = fake_score  # a plain GAN has no wrong pairs
    if t_wrong is not None:
        wrong_score = D.score(features, t_wrong)
    loss = d_loss(real_score, wrong_score, fake_score)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return {"loss_d": loss.detach(),
            "d_real": real_score.detach().sigmoid().mean(),
            "d_wrong": wrong_score.detach().sigmoid().mean(),
            "d_fake": fake_score.detach().sigmoid().mean()}


def g_step(D, opt_g, fake, t):
    """Update G. Return its loss. fake: G(z, t), (N, 3, 64, 64), not detached. t: (N, 1024)."""
    # Freezing D skips its gradients, and the bf16 copies of its old weights in autocast
    D.requires_grad_(False)
    loss = g_loss(D(fake, t))
    D.requires_grad_(True)
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    return loss.detach()


@torch.no_grad()
def update_ema(ema, G, decay):
    """Add (1 - decay) (G - ema) to ema, also for the statistics of batch norm."""
    averages = [x for x in ema.state_dict().values() if x.is_floating_point()]
    values = [x for x in G.state_dict().values() if x.is_floating_point()]
    torch._foreach_lerp_(averages, values, 1 - decay)


def build(ngf=NGF, ndf=NDF, upsample="transposed", lr=LR, device="cpu", text_dim=TEXT_DIM):
    """Return G, D and an Adam optimizer for each (section 5)."""
    G = Generator(ngf, upsample, text_dim).to(device, memory_format=torch.channels_last)
    D = Discriminator(ndf, text_dim).to(device, memory_format=torch.channels_last)
    opt_g = Adam(G.parameters(), lr, BETAS, fused=True)
    opt_d = Adam(D.parameters(), lr, BETAS, fused=True)
    return G, D, opt_g, opt_d


# ---- Faster layers, same numbers. A reader of the paper can skip this section: the layer computes
# the same as the plain line in its docstring.

class NearestUpConv(nn.Conv2d):
    """Compute conv3x3(F.interpolate(x, scale_factor=2.0)) with 2.25 times fewer FLOPs."""

    def forward(self, x):
        if x.shape[2] < 8:  # faster for few pixels
            return super().forward(F.interpolate(x, scale_factor=2.0))
        # Sum the weights on copies of one pixel: one 4x4 transposed convolution. F.avg_pool2d
        # would sum too, but its CUDA gradient is wrong (PyTorch issue 188344)
        weight = F.pad(self.weight.flip(2, 3), (1, 1, 1, 1))
        weight = weight[:, :, 1:] + weight[:, :, :-1]
        weight = weight[..., 1:] + weight[..., :-1]  # (b, a, 4, 4)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, 2, 1)


# ---- Training. Everything above needs torch only.

def train(args, checkpoint=None):
    """Train up to epoch args.epochs, from scratch or from a checkpoint.

    Write last.pt, log.csv and grids of samples to args.out_dir. A signal returns an exit status."""
    # Data: images, and one embedding per caption from a frozen text encoder
    with common.main_process_first():
        train_set = data.load_dataset(args.data, "train", 64, args.root)
        batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                               args.captions_per_image, common.rank(), common.world_size())
        common.check_writable(args.out_dir)
        test_set = data.load_dataset(args.data, "test", 64, args.root)
        encoder = common.get_text_encoder("char-cnn-rnn", train_set, args, checkpoint)
        embeddings = common.embed_captions(encoder, train_set)  # (captions, 1024)

    # Networks, optimizers, and the average of G that draws the samples
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(args.ngf, args.ndf, args.upsample, args.lr, args.device)
    ema = copy.deepcopy(G).eval()
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    step = 0
    history = checkpoint["history"] if checkpoint else []
    if checkpoint:
        step = common.first_step(checkpoint, train_set, batches)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    # A CUDA graph reads the learning rate from a tensor; torchrun averages the gradients
    common.prepare_adam(opt_g, args.lr, args.device)
    common.prepare_adam(opt_d, args.lr, args.device)
    common.average_gradients(G, opt_g)
    common.average_gradients(D, opt_d)

    # The same grid after every epoch: one row per caption, one column per noise
    grid_captions = test_set.captions[::len(test_set.captions) // 8 + 1]
    grid_t = encoder.encode(grid_captions).repeat_interleave(8, 0)
    grid_z = sample_noise(8, args.seed).repeat(len(grid_captions), 1)

    def update(images, z, t, t_g, t_wrong):
        """Train D, then G, on one batch. Return the losses."""
        if "cls" not in args.variant:
            t_wrong = None
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            fake = G(z, t_g)
            losses = d_step(D, opt_d, images, fake[:len(t)], t, t_wrong)
            losses["loss_g"] = g_step(D, opt_g, fake, t_g)  # released: a new fake
        return losses

    # The training loop; a resumed run starts in the middle of its epoch
    update = common.CUDAGraph(update, args.cuda_graph)
    num_steps = args.epochs * len(batches)
    common.announce(args, G, D, train_set, step, num_steps)
    bar = common.TrainingProgress(args, "training", step, num_steps, "--ngf 32 --ndf 32")
    stop = common.GracefulStop()
    last_save = 0
    for epoch in range(step // len(batches), args.epochs):
        # Halved at the start of epochs 100, 200, ..., counted from 1, as released
        lr = args.lr * 0.5 ** ((epoch + 1) // args.lr_decay_epochs)
        common.set_learning_rate(opt_g, lr)
        common.set_learning_rate(opt_d, lr)
        losses = common.Means()  # after a resume, of the rest of the epoch
        for _ in range(step % len(batches), len(batches)):
            images, captions, wrong = batches(step)
            # Paper: one caption per image; released code: the mean of several
            t = embeddings[captions].mean(1)  # (B, 1024)
            t_wrong = embeddings[wrong].mean(1)
            t_g = t
            if "int" in args.variant:  # D never trains on the interpolated embeddings
                t_g = torch.cat((t, interpolate_embeddings(t)))
            # A resumed run draws the same noise, and each rank its own
            torch.manual_seed(args.seed * data.EPOCH_SEEDS + step)
            noise = torch.randn(common.world_size(), len(t_g), NZ, device=args.device)
            z = noise[common.rank()]
            losses.add(update(images, z, t, t_g, t_wrong))
            decay = min(args.ema, (1 + step) / (10 + step))  # a short average at first
            update_ema(ema, G, decay)
            step += 1
            if step % 20 == 0:  # reading the losses makes a GPU wait
                bar.note = losses.summary()
            bar.update(args.batch_size)
            stopping = stop.requested()
            if stopping:
                break

        # Log a finished epoch
        if step % len(batches) == 0:
            history.append({"epoch": epoch + 1, **losses.means()})
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                history[-1] |= evaluate(ema, encoder, test_set, args)

        # Save after a signal, at the end, and else at most once a minute
        if stopping or step == num_steps or time.time() - last_save > 60:
            last_save = time.time()
            common.save_grid(args.out_dir / f"epoch_{epoch + 1:04}.png",
                             generate(ema, grid_z, grid_t), 8, grid_captions)
            common.save_log(args.out_dir / "log.csv", history)
            common.save_checkpoint(args.out_dir / "last.pt", {
                "kind": NAME,
                "step": step,
                "epoch": step // len(batches),
                "history": history,
                "args": {name: getattr(args, name) for name in RESUME_ARGS},
                "caption_hashes": train_set.caption_hashes(),
                "text_encoder": encoder,
                **parts})
        if stopping:
            return 128 + stop.signal


# ---- Sampling

def load_generator(checkpoint, device="cpu"):
    """Return the average of G, and the text encoder, of a checkpoint or of its path."""
    if not isinstance(checkpoint, dict):
        checkpoint = common.load_checkpoint(checkpoint, NAME)
    args = checkpoint["args"]
    G = Generator(args["ngf"], args["upsample"])
    G.load_state_dict(checkpoint["ema"])
    G.eval().to(device, memory_format=torch.channels_last)
    encoder = common.text_encoder_from_state_dict(checkpoint["text_encoder"])
    return G, encoder.to(device)


def sample_noise(n, seed=0):
    """Return z (n, 100) from N(0, 1), the same on every device."""
    return torch.randn(n, NZ, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(G, noise, embeddings):
    """Draw images (N, 3, 64, 64) in [-1, 1] from noise (N, 100) and embeddings (N, 1024)."""
    noise = noise.to(embeddings.device)
    images = [G(z, t).float() for z, t in zip(noise.split(64), embeddings.split(64))]
    return torch.cat(images)


def sample(G, encoder, args, step):
    """Write a grid, one row per embedding and one column per noise, or --num-images files a row."""
    n = args.num_images or args.samples_per_caption
    noise = sample_noise(n, args.seed)
    t = encoder.encode_prompts(args.captions)
    alphas = torch.linspace(0, 1, n)[:, None]
    kind = "sample"
    if args.interpolate_noise:
        kind = "noise"
        noise = torch.lerp(noise[0], noise[-1], alphas)
    if args.interpolate:
        kind = "interpolation"
        t = torch.lerp(t[0], t[1], alphas.to(t.device))
    noise = noise.repeat(len(t), 1)
    t = t.repeat_interleave(n, 0)
    name = common.sample_name(args.captions, kind, step, n)
    path = args.out_dir / f"{kind}-{name}-{args.seed}"
    common.save_samples(path, lambda z, t: generate(G, z, t), noise, t, args)


def evaluate(G, encoder, test_set, args):
    """Print and return the metrics."""
    return common.evaluate(
        lambda z, t: generate(G, z, t), sample_noise, encoder, test_set, args)


# ---- Style transfer (section 4.4; never released)

class StyleEncoder(nn.Sequential):
    """Estimate z (B, 100) of images (B, 3, 64, 64). The paper gives no layers; we use D's."""

    def __init__(self, ndf=NDF):
        super().__init__(image_encoder(ndf), nn.Flatten(), nn.Linear(8 * ndf * 16, NZ))


def style_loss(S, z, fake):
    """Return || z - S(G(z, t)) ||^2  (eq. 6)."""
    return (z - S(fake)).square().sum(1).mean()


def train_style_encoder(S, G, encoder, args):
    """Train S on images that G draws of the training captions. G stays fixed."""
    train_set = data.load_dataset(args.data, "train", 64, args.root)
    embeddings = common.embed_captions(encoder, train_set)
    optimizer = Adam(S.parameters(), LR, BETAS)
    bar = data.Progress(args.style_steps * 64, "style encoder")
    for _ in range(args.style_steps):
        z = torch.randn(64, NZ, device=args.device)
        t = embeddings[torch.randint(len(embeddings), (64,), device=args.device)]
        loss = style_loss(S, z, generate(G, z, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update(64)


def style_transfer(G, encoder, args):
    """Write a grid of one row: a photo, then the captions in its style."""
    photo = data.load_image(data.Record(Path(args.style_image), [], 0), 64)
    photo = torch.tensor(photo, device=args.device)[None] / 127.5 - 1

    # Train S or load it. S belongs to one G: its file is named by the weights of G
    torch.manual_seed(args.seed)
    S = StyleEncoder(args.ndf).to(args.device)
    key = common.short_hash(*G.state_dict().values(), args.seed, args.style_steps)
    path = args.out_dir / f"style-{key}.pt"
    if not path.exists():
        common.check_writable(args.out_dir)
        print(f"training the style encoder {path}; it is not saved before it ends")
        train_style_encoder(S, G, encoder, args)
        common.save_checkpoint(path, {"kind": "style encoder", "S": S})
    S.load_state_dict(common.load_checkpoint(path, "style encoder")["S"])

    # Draw the captions with the noise of the photo
    t = encoder.encode_prompts(args.captions)
    z = S.eval()(photo)
    images = generate(G, z.expand(len(t), -1), t)
    titles = [Path(args.style_image).stem] + args.captions
    grid_path = args.out_dir / f"style-{common.sample_name(titles, path)}.png"
    common.save_grid(grid_path, torch.cat((photo, images)), len(titles), titles)
    print("\n".join([*args.captions, str(grid_path)]))


# ---- Command line

PRESETS = {
    "toy": dict(epochs=16, ngf=16, ndf=16, batch_size=8, lr=4e-4, captions_per_image=1, ema=0.998,
                upsample="nearest", eval_every=16, fid_samples=1024),
    "folder": dict(ngf=32, ndf=32, batch_size=16, captions_per_image=1, upsample="nearest"),
    "coco": dict(epochs=200, ngf=196, ndf=196, captions_per_image=3, variant="cls",
                 lr_decay_epochs=40)}  # released code
RESUME_ARGS = ("data", "variant", "upsample", "ngf", "ndf", "batch_size", "lr", "lr_decay_epochs",
               "ema", "captions_per_image", "embedding_rms", "seed")


def main(argv=None):
    parser = argparse.ArgumentParser("gan_cls.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--variant", choices=["gan", "cls", "int", "int-cls"], default="int-cls",
        help="plain GAN, GAN-CLS, GAN-INT or GAN-INT-CLS (section 4)")
    add("--epochs", type=common.positive_int, default=600, help="epochs (section 5)")
    add("--batch-size", type=common.positive_int, default=64, help="images per step (section 5)")
    add("--lr", type=float, default=LR, help="learning rate of G and D (section 5)")
    add("--lr-decay-epochs", type=common.positive_int, default=100, help="halve lr (released)")
    add("--ngf", type=common.positive_int, default=NGF, help="width of G (released)")
    add("--ndf", type=common.positive_int, default=NDF, help="width of D (released)")
    add("--captions-per-image", type=common.positive_int, default=4,
        help="captions of an image whose embeddings are averaged (released)")
    add("--upsample", choices=["transposed", "nearest"], default="transposed",
        help="layers of G: as in the paper, or without checkerboard")
    add("--embedding-rms", type=float, default=1,
        help="RMS length of the embeddings of a text encoder trained here")
    add("--style-image", metavar="PHOTO",
        help="with --sample: draw the captions in the style of a photo")
    add("--style-steps", type=common.positive_int, default=2000, help="steps of S")
    common.add_shared_flags(parser)
    common.describe_defaults(parser, PRESETS)

    args = parser.parse_args(argv)
    if args.style_image and not args.sample:
        parser.error("--style-image needs --sample")
    path = common.find_checkpoint(NAME, args)
    args, checkpoint = common.parse_args(NAME, parser, PRESETS, RESUME_ARGS, path, argv)

    if not (args.captions or args.evaluate):
        return train(args, checkpoint)
    if not checkpoint:
        parser.error(f"{args.out_dir}/last.pt does not exist; train first")
    G, encoder = load_generator(checkpoint, args.device)
    if args.style_image:
        return style_transfer(G, encoder, args)
    if args.captions:
        return sample(G, encoder, args, checkpoint["step"])
    test_set = data.load_dataset(args.data, "test", 64, args.root)
    evaluate(G, encoder, test_set, args)


if __name__ == "__main__":
    sys.exit(common.run(main) if common else "needs common.py, data.py and requirements.txt")
