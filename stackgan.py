"""StackGAN: Text to Photo-realistic Image Synthesis with Stacked Generative Adversarial Networks.
Zhang et al., ICCV 2017 (arXiv 1612.03242).

Two stages draw an image from noise z and the embedding t of a caption, the paper's phi_t.
    Conditioning Augmentation  samples c from N(mu(t), sigma(t)^2) (section 3.2)
    Stage-I                    draws s0 = G0(z, c0) at 64 px (section 3.3)
    Stage-II                   draws G(s0, c) at 256 px, without z; G0 is fixed (section 3.4)
TF and PT stand for the authors' code in TensorFlow and PyTorch.

    python stackgan.py  # toy data, Stage-I; with --stage 2 both stages
    python stackgan.py --data flowers  # both stages; run again to resume
    python stackgan.py --data flowers --sample "pink flower" "a white flower"
    python stackgan.py --data flowers --evaluate

Reached: FID 69.0 on flowers at 128 px (3,000 images of unseen classes; real images: 40.0), with
ngf 32, after 0.6 million images of Stage-II in 11 minutes on an H200.
"""
import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

try:
    import common
    import data
except ModuleNotFoundError:  # networks, losses and steps need torch only
    common = data = None

NAME = "stackgan"
NZ = 100  # dimension of the noise z (section 3.5)
NC = 128  # dimension of the conditioning variable c (section 3.5)
TEXT_DIM = 1024  # dimension of the embedding t (paper: phi_t)
NGF = 128  # width of G (released)
NDF = 64  # width of D (released)
NUM_RESIDUAL = 4  # residual blocks of Stage-II (section 3.5)
LR = 2e-4  # learning rate of Adam (section 3.5)
BETAS = (0.5, 0.999)  # of Adam (released)
KL_WEIGHT = 2  # of a mean over dimensions (TF, PT); paper: 1, of a sum


# ---- Networks as in PT, with the text layers of TF. TF has residual blocks that PT has not.

class ConditioningAugmentation(nn.Module):
    """Return c = mu + sigma eps, mu and log sigma of t (B, 1024), each (B, 128) (section 3.2).

    eps is from N(0, 1). Leaky ReLU as in TF: the ReLU of PT forces mu >= 0 and sigma >= 1."""

    def __init__(self, text_dim=TEXT_DIM):
        super().__init__()
        self.fc = nn.Linear(text_dim, 2 * NC)

    def forward(self, t, eps):
        x = F.leaky_relu(self.fc(t), 0.2)
        mu, log_sigma = x.to(eps.dtype).chunk(2, 1)  # float32, also in autocast
        return mu + log_sigma.exp() * eps, mu, log_sigma


def conv(a, b, kernel=3, stride=1):
    """Return a convolution and its batch norm as a list."""
    return [nn.Conv2d(a, b, kernel, stride, 1, bias=False), nn.BatchNorm2d(b)]


class UpBlock(nn.Sequential):
    """Upsample (B, a, s, s) to (B, b, 2s, 2s): nearest, 3x3 convolution, batch norm, ReLU."""

    def __init__(self, a, b):
        super().__init__()
        self.conv = NearestUpConv(a, b, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(b)
        self.relu = nn.ReLU(True)


class Residual(nn.Module):
    """Apply two 3x3 convolutions to x (B, a, s, s), add x, and apply a ReLU."""

    def __init__(self, a):
        super().__init__()
        self.body = nn.Sequential(*conv(a, a), nn.ReLU(True), *conv(a, a))

    def forward(self, x):
        return F.relu(x + self.body(x), True)


class Stage1(nn.Module):
    """Return Stage-I's images (B, 3, 64, 64) and KL loss from z (B, 100), eps, t. Figure 2, top."""

    def __init__(self, ngf=NGF, text_dim=TEXT_DIM):
        super().__init__()
        self.ca = ConditioningAugmentation(text_dim)
        self.fc = nn.Sequential(
            nn.Linear(NZ + NC, 8 * ngf * 4 * 4, bias=False),
            nn.BatchNorm1d(8 * ngf * 4 * 4), nn.ReLU(True))
        self.up = nn.Sequential(
            UpBlock(8 * ngf, 4 * ngf), UpBlock(4 * ngf, 2 * ngf),
            UpBlock(2 * ngf, ngf), UpBlock(ngf, ngf // 2))  # (B, ngf / 2, 64, 64)
        self.img = nn.Sequential(nn.Conv2d(ngf // 2, 3, 3, 1, 1, bias=False), nn.Tanh())
        init_weights(self)

    def forward(self, z, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        x = self.fc(torch.cat((z, c), 1))
        x = x.unflatten(1, (-1, 4, 4))  # (B, 8 ngf, 4, 4)
        return self.img(self.up(x)), kl_loss(mu, log_sigma)


class Stage2(nn.Module):
    """Return Stage-II's images (B, 3, S, S) and KL loss from s0, eps, t. Figure 2, bottom."""

    def __init__(self, ngf=NGF, size=256, num_residual=NUM_RESIDUAL, text_dim=TEXT_DIM):
        super().__init__()
        self.ca = ConditioningAugmentation(text_dim)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, ngf, 3, 1, 1, bias=False), nn.ReLU(True),  # paper: all leaky
            *conv(ngf, 2 * ngf, 4, 2), nn.ReLU(True),
            *conv(2 * ngf, 4 * ngf, 4, 2), nn.ReLU(True))  # (B, 4 ngf, 16, 16)
        self.joint = nn.Sequential(*conv(4 * ngf + NC, 4 * ngf), nn.ReLU(True))
        self.residual = nn.Sequential()
        for _ in range(num_residual):
            self.residual.append(Residual(4 * ngf))
        self.up = nn.Sequential()
        width = 4 * ngf
        for _ in range({128: 3, 256: 4}[size]):  # from 16 x 16
            self.up.append(UpBlock(width, width // 2))
            width //= 2
        self.img = nn.Sequential(nn.Conv2d(width, 3, 3, 1, 1, bias=False), nn.Tanh())
        init_weights(self)

    def forward(self, s0, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        c = c[:, :, None, None].expand(-1, -1, 16, 16)
        x = self.joint(torch.cat((self.encoder(s0), c), 1))
        return self.img(self.up(self.residual(x))), kl_loss(mu, log_sigma)


class Discriminator(nn.Module):
    """Score images (B, 3, S, S) with t (B, 1024) by logits (B,). Figure 2."""

    def __init__(self, ndf=NDF, size=64, text_dim=TEXT_DIM):
        super().__init__()
        layers = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        width = ndf
        for _ in range({64: 3, 128: 4, 256: 5}[size]):  # down to 4 x 4
            layers += conv(width, 2 * width, 4, 2) + [nn.LeakyReLU(0.2, True)]
            width *= 2
        while width > 8 * ndf:  # Stage-II: back to 8 ndf; 3x3 as in PT (TF: 1x1)
            layers += conv(width, width // 2) + [nn.LeakyReLU(0.2, True)]
            width //= 2
        self.image = nn.Sequential(*layers)
        self.joint = nn.Sequential(
            *conv(8 * ndf + NC, 8 * ndf), nn.LeakyReLU(0.2, True),  # 3x3 as in PT; paper: 1x1
            nn.Conv2d(8 * ndf, 1, 4))
        self.unconditional = nn.Conv2d(8 * ndf, 1, 4) if size > 64 else None  # Stage-II
        self.text = nn.Sequential(nn.Linear(text_dim, NC), nn.LeakyReLU(0.2))  # PT: mu of G
        init_weights(self)

    def features(self, x):
        return self.image(x)  # (B, 8 ndf, 4, 4)

    def score(self, features, t):
        t = self.text(t)[:, :, None, None]
        t = t.expand(-1, -1, 4, 4)  # (B, 128, 4, 4)
        return self.joint(torch.cat((features, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)


def init_weights(net):
    """Draw weights from N(0, 0.02), of batch norm from N(1, 0.02), as released. Biases are 0."""
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.02)


# ---- Losses of logits s: -log D = softplus(-s), -log(1 - D) = softplus(s)

def d_loss(real, wrong, fake):
    """Return -log D(I, t) - [log(1 - D(I, t_wrong)) + log(1 - D(G, t))] / 2  (eq. 3, GAN-CLS)."""
    return (F.softplus(-real) + (F.softplus(wrong) + F.softplus(fake)) / 2).mean()


def d_loss_stage2(real, wrong, fake, real_image, fake_image):
    """Return the loss of Stage-II as in PT, which scores images alone too (eq. 5: pairs only)."""
    real_loss = F.softplus(-torch.cat((real, real_image))).mean()
    return real_loss + F.softplus(torch.cat((wrong, fake, fake_image))).mean()


def g_loss(fake):
    """Return -log D(G, t)  (eq. 4 and 6, in the form that does not saturate)."""
    return F.softplus(-fake).mean()


def kl_loss(mu, log_sigma):
    """Return the mean over dimensions (eq. 2: sum) of KL(N(mu, sigma^2) || N(0, 1))."""
    return ((mu.square() + (2 * log_sigma).exp() - 1) / 2 - log_sigma).mean()


# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. Return its loss, and its mean probabilities of real, wrong and fake pairs.

    real, fake: (B, 3, S, S). t, t_wrong: (B, 1024). A wrong pair is a real image with a text of
    another class; in TF a text with another image, in PT an image with the next text."""
    features = D.features(real)
    fake_features = D.features(fake.detach())
    real_score = D.score(features, t)
    wrong_score = D.score(features, t_wrong)
    fake_score = D.score(fake_features, t)
    if D.unconditional:  # Stage-II
        real_image = D.unconditional(features).flatten()
        fake_image = D.unconditional(fake_features).flatten()
        loss = d_loss_stage2(real_score, wrong_score, fake_score, real_image, fake_image)
    else:
        loss = d_loss(real_score, wrong_score, fake_score)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return {"loss_d": loss.detach(),
            "d_real": real_score.detach().sigmoid().mean(),
            "d_wrong": wrong_score.detach().sigmoid().mean(),
            "d_fake": fake_score.detach().sigmoid().mean()}


def g_step(D, opt_g, fake, t, kl):
    """Update G. Return its loss without kl. fake, kl: what G returned, not detached."""
    # Freezing D skips its gradients, and the bf16 copies of its old weights in autocast
    D.requires_grad_(False)
    features = D.features(fake)
    loss = g_loss(D.score(features, t))
    if D.unconditional:  # Stage-II
        loss = loss + g_loss(D.unconditional(features))
    D.requires_grad_(True)
    opt_g.zero_grad()
    (loss + KL_WEIGHT * kl).backward()
    opt_g.step()
    return loss.detach()


@torch.no_grad()
def update_ema(ema, G, decay):
    """Add (1 - decay) (G - ema) to ema, also for the statistics of batch norm."""
    averages = [x for x in ema.state_dict().values() if x.is_floating_point()]
    values = [x for x in G.state_dict().values() if x.is_floating_point()]
    torch._foreach_lerp_(averages, values, 1 - decay)


def build(size=64, ngf=NGF, ndf=NDF, num_residual=NUM_RESIDUAL, lr=LR, device="cpu",
          text_dim=TEXT_DIM):
    """Return G, D and an Adam optimizer for each (section 3.5). Size 64: Stage-I; else Stage-II."""
    if size == 64:
        G = Stage1(ngf, text_dim)
    else:
        G = Stage2(ngf, size, num_residual, text_dim)
    D = Discriminator(ndf, size, text_dim)
    G.to(device, memory_format=torch.channels_last)
    D.to(device, memory_format=torch.channels_last)
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

def train(args, stage, checkpoint=None):
    """Train a stage up to its epoch args.epochs, from scratch or from a checkpoint.

    Write last.pt, log.csv and grids of samples to args.out_dir. A signal returns an exit status."""
    # Data: images, and one embedding per caption from a frozen text encoder
    size = 64 if stage == 1 else args.size
    with common.main_process_first():
        train_set = data.load_dataset(args.data, "train", size, args.root)
        batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                               args.captions_per_image, common.rank(), common.world_size())
        common.check_writable(args.out_dir)
        test_set = data.load_dataset(args.data, "test", size, args.root)
        encoder = common.get_text_encoder("char-cnn-rnn", train_set, args, checkpoint)
        embeddings = common.embed_captions(encoder, train_set)  # (captions, 1024)

    # Networks, optimizers, and the average of G that draws the samples
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(size, args.ngf, args.ndf, args.num_residual, args.lr, args.device)
    ema = copy.deepcopy(G).eval()
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    stages = [ema]
    if stage == 2:
        # G0, fixed, is the average of Stage-I in eval mode; released: last weights, train mode
        G0 = load_generator(checkpoint, args.device)[0][0]
        parts["G0"] = G0
        stages = [G0, ema]
    step = 0
    history = checkpoint["history"] if checkpoint else []
    if checkpoint and checkpoint["stage"] == stage:
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

    def update(images, z, eps1, eps2, t, t_wrong):
        """Train D, then G, on one batch. Return the losses."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            if stage == 1:
                fake, kl = G(z, eps1, t)
            else:
                with torch.no_grad():
                    s0, _ = G0(z, eps1, t)
                fake, kl = G(s0.float(), eps2, t)
            losses = d_step(D, opt_d, images, fake, t, t_wrong)
            losses["loss_g"] = g_step(D, opt_g, fake, t, kl)  # TF: fake is drawn anew
            losses["kl"] = kl.detach()
        return losses

    # The training loop; a resumed run starts in the middle of its epoch
    update = common.CUDAGraph(update, args.cuda_graph)
    num_steps = args.epochs * len(batches)
    print(f"Stage {stage}")
    common.announce(args, G, D, train_set, step, num_steps)
    bar = common.TrainingProgress(args, f"Stage {stage}", step, num_steps,
                                  "--ngf 32 --ndf 32 --size 128")
    stop = common.GracefulStop()
    last_save = 0
    for epoch in range(step // len(batches), args.epochs):
        lr = args.lr * 0.5 ** (epoch // args.lr_decay_epochs)
        common.set_learning_rate(opt_g, lr)
        common.set_learning_rate(opt_d, lr)
        losses = common.Means()  # after a resume, of the rest of the epoch
        for _ in range(step % len(batches), len(batches)):
            images, captions, wrong = batches(step)
            t = embeddings[captions].mean(1)  # (B, 1024), of several captions as in TF
            t_wrong = embeddings[wrong].mean(1)
            # A resumed run draws the same noise, and each rank its own
            torch.manual_seed(args.seed * data.EPOCH_SEEDS + step)
            noise = torch.randn(common.world_size(), len(t), NZ + 2 * NC, device=args.device)
            z, eps1, eps2 = noise[common.rank()].split((NZ, NC, NC), 1)
            losses.add(update(images, z, eps1, eps2, t, t_wrong))
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
            history.append({"stage": stage, "epoch": epoch + 1, **losses.means()})
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                history[-1] |= evaluate(stages, encoder, test_set, args)

        # Save after a signal, at the end, and else at most once a minute
        if stopping or step == num_steps or time.time() - last_save > 60:
            last_save = time.time()
            common.save_grid(args.out_dir / f"stage{stage}_epoch_{epoch + 1:04}.png",
                             generate(stages, grid_z, grid_t), 8, grid_captions)
            common.save_log(args.out_dir / "log.csv", history)
            common.save_checkpoint(args.out_dir / "last.pt", {
                "kind": NAME,
                "stage": stage,
                "step": step,
                "epoch": step // len(batches),
                "history": history,
                "args": {name: getattr(args, name) for name in RESUME_ARGS},
                "caption_hashes": train_set.caption_hashes(),
                "text_encoder": encoder,
                **parts})
        if stopping:
            return 128 + stop.signal
    stop.finish()  # between the stages, a signal ends the program


# ---- Sampling

def load_generator(checkpoint, device="cpu"):
    """Return a list of the trained stages, and the text encoder, of a checkpoint or of its path."""
    if not isinstance(checkpoint, dict):
        checkpoint = common.load_checkpoint(checkpoint, NAME)
    args = checkpoint["args"]
    stages = [Stage1(args["ngf"])]
    if checkpoint["stage"] == 2:
        stages[0].load_state_dict(checkpoint["G0"])
        stages.append(Stage2(args["ngf"], args["size"], args["num_residual"]))
    stages[-1].load_state_dict(checkpoint["ema"])
    for net in stages:
        net.eval().to(device, memory_format=torch.channels_last)
    encoder = common.text_encoder_from_state_dict(checkpoint["text_encoder"])
    return stages, encoder.to(device)


def sample_noise(n, seed=0):
    """Return z, eps1 and eps2 side by side, (n, 100 + 128 + 128) from N(0, 1)."""
    return torch.randn(n, NZ + 2 * NC, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(stages, noise, embeddings):
    """Draw images (N, 3, S, S) in [-1, 1] from noise (N, 356) and embeddings (N, 1024)."""
    noise = noise.to(embeddings.device)
    images = []
    for part, t in zip(noise.split(64), embeddings.split(64)):
        z, eps1, eps2 = part.split((NZ, NC, NC), 1)
        x, _ = stages[0](z, eps1, t)
        if len(stages) == 2:
            x, _ = stages[1](x, eps2, t)
        images.append(x.float())
    return torch.cat(images)


def sample(stages, encoder, args, step):
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
    name = common.sample_name(args.captions, kind, len(stages), step, n)
    path = args.out_dir / f"{kind}-{name}-{args.seed}"
    common.save_samples(path, lambda z, t: generate(stages, z, t), noise, t, args)


def evaluate(stages, encoder, test_set, args):
    """Print and return the metrics."""
    return common.evaluate(
        lambda z, t: generate(stages, z, t), sample_noise, encoder, test_set, args)


# ---- Command line

PRESETS = {
    "toy": dict(stage=1, epochs=24, size=128, ngf=16, ndf=16, batch_size=8, lr=4e-4, ema=0.998,
                captions_per_image=1, num_residual=2, embedding_rms=8, eval_every=24,
                fid_samples=1024),
    "folder": dict(size=128, ngf=32, ndf=32, batch_size=16, captions_per_image=1, num_residual=2),
    "coco": dict(epochs=120, ngf=192, ndf=96, num_residual=2, captions_per_image=1,
                 lr_decay_epochs=20)}  # PT
RESUME_ARGS = ("data", "size", "ngf", "ndf", "num_residual", "batch_size", "lr", "lr_decay_epochs",
               "ema", "captions_per_image", "embedding_rms", "seed")


def main(argv=None):
    parser = argparse.ArgumentParser("stackgan.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2], default=2, help="the last stage to train or to draw")
    add("--epochs", type=common.positive_int, default=600, help="of each stage (section 3.5)")
    add("--batch-size", type=common.positive_int, default=64, help="images per step (section 3.5)")
    add("--size", type=int, choices=[128, 256], default=256, help="of Stage-II (section 3.5)")
    add("--lr", type=float, default=LR, help="learning rate of G and D (section 3.5)")
    add("--lr-decay-epochs", type=common.positive_int, default=100, help="halve lr (section 3.5)")
    add("--ngf", type=common.positive_int, default=NGF, help="width of G (released)")
    add("--ndf", type=common.positive_int, default=NDF, help="width of D (released)")
    add("--num-residual", type=common.positive_int, default=NUM_RESIDUAL,
        help="residual blocks of Stage-II (section 3.5: 4, at 128 px 2)")
    add("--captions-per-image", type=common.positive_int, default=4,
        help="captions of an image whose embeddings are averaged (TF)")
    add("--embedding-rms", type=float, default=1,
        help="RMS length of the embeddings of a text encoder trained here")
    common.add_shared_flags(parser)
    common.describe_defaults(parser, PRESETS)

    path = common.find_checkpoint(NAME, parser.parse_args(argv))
    args, checkpoint = common.parse_args(NAME, parser, PRESETS, RESUME_ARGS, path, argv)

    if not (args.captions or args.evaluate):
        first_stage = checkpoint["stage"] if checkpoint else 1
        if first_stage > args.stage:
            print(f"{path} is in Stage-II already: Stage-I is complete. "
                  "Omit --stage 1 to train Stage-II.")
        for stage in range(first_stage, args.stage + 1):
            status = train(args, stage, checkpoint)
            if status:
                return status
            with common.main_process_first():
                checkpoint = common.load_checkpoint(args.out_dir / "last.pt", NAME)
        return
    if not checkpoint:
        parser.error(f"{args.out_dir}/last.pt does not exist; train first")
    stages, encoder = load_generator(checkpoint, args.device)
    stages = stages[:args.stage]
    if args.captions:
        return sample(stages, encoder, args, checkpoint["step"])
    size = args.size if len(stages) == 2 else 64
    test_set = data.load_dataset(args.data, "test", size, args.root)
    evaluate(stages, encoder, test_set, args)


if __name__ == "__main__":
    sys.exit(common.run(main) if common else "needs common.py, data.py and requirements.txt")
