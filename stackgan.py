"""StackGAN: Text to Photo-realistic Image Synthesis with Stacked Generative Adversarial Networks.
Zhang et al., ICCV 2017 (arXiv 1612.03242).

Two stages draw an image from noise z and caption embedding t.
    Conditioning Augmentation  c is a sample of N(mu(t), sigma(t)^2) (section 3.2)
    Stage-I                    s0 = G0(z, c0), 64 px (section 3.3)
    Stage-II                   G(s0, c), 256 px, without z; G0 is fixed (section 3.4)
TF, PT: the authors' code in TensorFlow, PyTorch.

    python stackgan.py  # toy data, Stage-I; --stage 2: both
    python stackgan.py --data flowers  # both stages; run again to resume
    python stackgan.py --data flowers --sample "pink flower" "a white flower"
    python stackgan.py --data flowers --evaluate
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

NAME, NZ, NC, TEXT = "stackgan", 100, 128, 1024  # z; conditioning c (section 3.5); embedding t

# ---- Networks: PT's, text layers TF's. TF also: residual blocks

class ConditioningAugmentation(nn.Module):
    """t (B, 1024), eps (B, 128) from N(0, 1) -> c = mu + sigma eps, mu, log sigma (section 3.2).

    Leaky ReLU as in TF: PT's ReLU forces mu >= 0 and sigma >= 1."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(TEXT, 2 * NC)

    def forward(self, t, eps):
        mu, log_sigma = F.leaky_relu(self.fc(t), 0.2).to(eps.dtype).chunk(2, 1)
        return mu + log_sigma.exp() * eps, mu, log_sigma

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

def conv(a, b, kernel=3, stride=1):
    """A convolution and batch norm."""
    return nn.Conv2d(a, b, kernel, stride, 1, bias=False), nn.BatchNorm2d(b)

class UpBlock(nn.Sequential):
    """(B, a, s, s) -> (B, b, 2s, 2s): nearest upsampling, 3x3 convolution, batch norm, ReLU."""
    def __init__(self, a, b):
        super().__init__()
        self.conv, self.norm = NearestUpConv(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.relu = nn.ReLU(True)

class Residual(nn.Module):
    """x (B, a, s, s) -> ReLU(x + two 3x3 convolutions of x)."""
    def __init__(self, a):
        super().__init__()
        self.body = nn.Sequential(*conv(a, a), nn.ReLU(True), *conv(a, a))

    def forward(self, x):
        return F.relu(x + self.body(x), True)

class Stage1(nn.Module):
    """Stage-I, Figure 2, top: z (B, 100), eps (B, 128), t (B, 1024) -> images (B, 3, 64, 64) in
    [-1, 1], KL loss."""
    def __init__(self, ngf=128):
        super().__init__()
        self.ca = ConditioningAugmentation()
        self.fc = nn.Sequential(nn.Linear(NZ + NC, 128 * ngf, bias=False),
                                nn.BatchNorm1d(128 * ngf), nn.ReLU(True))
        self.up = nn.Sequential(*(UpBlock(8 * ngf // k, 4 * ngf // k) for k in (1, 2, 4, 8)))
        self.img = nn.Sequential(nn.Conv2d(ngf // 2, 3, 3, 1, 1, bias=False), nn.Tanh())
        init_weights(self)

    def forward(self, z, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        x = self.fc(torch.cat((z, c), 1)).view(len(z), -1, 4, 4)  # (B, 8 ngf, 4, 4)
        return self.img(self.up(x)), kl_loss(mu, log_sigma)

class Stage2(nn.Module):
    """Stage-II, Figure 2, bottom: s0 (B, 3, 64, 64), eps, t -> images (B, 3, S, S), KL loss."""
    def __init__(self, ngf=128, size=256, num_residual=4):
        super().__init__()
        self.ca = ConditioningAugmentation()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, ngf, 3, 1, 1, bias=False), nn.ReLU(True),  # paper: all leaky
            *conv(ngf, 2 * ngf, 4, 2), nn.ReLU(True),
            *conv(2 * ngf, 4 * ngf, 4, 2), nn.ReLU(True))  # (B, 4 ngf, 16, 16)
        self.joint = nn.Sequential(*conv(4 * ngf + NC, 4 * ngf), nn.ReLU(True))
        self.residual = nn.Sequential(*(Residual(4 * ngf) for _ in range(num_residual)))
        widths = [4 * ngf // 2 ** i for i in range({128: 4, 256: 5}[size])]
        self.up = nn.Sequential(*(UpBlock(a, b) for a, b in zip(widths, widths[1:])))
        self.img = nn.Sequential(nn.Conv2d(widths[-1], 3, 3, 1, 1, bias=False), nn.Tanh())
        init_weights(self)

    def forward(self, s0, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        c = c[:, :, None, None].expand(-1, -1, 16, 16)
        x = self.joint(torch.cat((self.encoder(s0), c), 1))
        return self.img(self.up(self.residual(x))), kl_loss(mu, log_sigma)

class Discriminator(nn.Module):
    """Images (B, 3, S, S), t (B, 1024) -> logits (B,). Figure 2."""
    def __init__(self, ndf=64, size=64):
        super().__init__()
        down = [ndf * 2 ** i for i in range({64: 4, 128: 5, 256: 6}[size])]  # to 4 x 4
        widths = down + down[3:-1][::-1]  # then 3x3 (TF: 1x1), to 8 ndf
        layers = [nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for a, b in zip(widths, widths[1:]):
            layers += *(conv(a, b, 4, 2) if a < b else conv(a, b)), nn.LeakyReLU(0.2, True)
        self.image = nn.Sequential(*layers)
        self.joint = nn.Sequential(  # 3x3, as in PT; paper: 1x1
            *conv(8 * ndf + NC, 8 * ndf), nn.LeakyReLU(0.2, True), nn.Conv2d(8 * ndf, 1, 4))
        self.unconditional = nn.Conv2d(8 * ndf, 1, 4) if size > 64 else None  # Stage-II
        self.text = nn.Sequential(nn.Linear(TEXT, NC), nn.LeakyReLU(0.2))  # PT: mu of G
        init_weights(self)

    def features(self, x):
        return self.image(x)  # (B, 8 ndf, 4, 4)

    def score(self, h, t):
        t = self.text(t)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint(torch.cat((h, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)

def init_weights(net):
    """As released: weights N(0, 0.02), of batch norm N(1, 0.02). Biases 0."""
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.02)

# ---- Losses, of logits s: -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s)

def d_loss(real, wrong, fake):
    """-log D(I, t) - [log(1 - D(I, t_wrong)) + log(1 - D(G(.), t))] / 2  (eq. 3 with GAN-CLS)."""
    return (F.softplus(-real) + (F.softplus(wrong) + F.softplus(fake)) / 2).mean()

def g_loss(fake):
    """-log D(G(.), t)  (eq. 4 and 6, non-saturating form)."""
    return F.softplus(-fake).mean()

def kl_loss(mu, log_sigma):
    """KL(N(mu, sigma^2) || N(0, 1)), (B, 128), mean over dimensions  (eq. 2: sum)."""
    return ((mu.square() + (2 * log_sigma).exp() - 1) / 2 - log_sigma).mean()

# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. Return loss, D(real), D(wrong), D(fake). real, fake (B, 3, S, S); t, t_wrong
    (B, TEXT).

    Wrong text: of another class. TF: wrong image, of another class. PT: wrong text, the next of
    the batch."""
    h, h_fake = D.features(real), D.features(fake.detach())
    s_real, s_wrong, s_fake = D.score(h, t), D.score(h, t_wrong), D.score(h_fake, t)
    loss = d_loss(s_real, s_wrong, s_fake)
    if D.unconditional:  # Stage-II: not eq. 5, images alone too (PT)
        right = torch.cat((s_real, D.unconditional(h).flatten()))
        wrong = torch.cat((s_wrong, s_fake, D.unconditional(h_fake).flatten()))
        loss = F.softplus(-right).mean() + F.softplus(wrong).mean()
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return torch.stack((loss, *(s.sigmoid().mean() for s in (s_real, s_wrong, s_fake)))).detach()

def g_step(D, opt_g, fake, t, kl):
    """Update G. fake, kl: d_step's G(...), not detached. Return the loss without kl."""
    D.requires_grad_(False)  # skips D's gradients and autocast's stale bf16 copies
    h = D.features(fake)
    loss = g_loss(D.score(h, t))
    if D.unconditional:
        loss += g_loss(D.unconditional(h))
    opt_g.zero_grad()
    (loss + 2 * kl).backward()  # PT, TF; paper: loss + 128 kl
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()

@torch.no_grad()
def update_ema(ema, G, decay):
    """ema += (1 - decay) (G - ema), batch norm statistics included."""
    a, b = ([x for x in net.state_dict().values() if x.is_floating_point()] for net in (ema, G))
    torch._foreach_lerp_(a, b, 1 - decay)

def build(size, ngf=128, ndf=64, num_residual=4, lr=2e-4, device="cpu"):
    """Return G, D and their optimizers, Adam (section 3.5). Size 64: Stage-I; else Stage-II."""
    G = Stage1(ngf) if size == 64 else Stage2(ngf, size, num_residual)
    nets = G, Discriminator(ndf, size)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in nets)
    adam = dict(betas=(0.5, 0.999), fused=True)
    return G, D, Adam(G.parameters(), lr, **adam), Adam(D.parameters(), lr, **adam)

# ---- Training

def train(args, checkpoint, stage):
    """Train or resume a stage; write last.pt, log.csv and grids of samples."""
    size = 64 if stage == 1 else args.size
    with common.main_process_first():
        train_set = data.load_dataset(args.data, "train", size, args.root)
        test_set = data.load_dataset(args.data, "test", size, args.root)
        encoder = common.get_text_encoder(
            "char-cnn-rnn", train_set, args.root, args.device, checkpoint, args.text_encoder,
            rms=8 if args.data == "toy" else 1)
        embeddings = common.embed_captions(encoder, train_set)  # (captions, TEXT)
    batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                           args.captions_per_image, common.rank(), common.world_size())
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(size, args.ngf, args.ndf, args.num_residual, args.lr, args.device)
    ema = copy.deepcopy(G).eval()
    parts = dict(G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    names = "loss_g", "kl", "loss_d", "d_real", "d_wrong", "d_fake"
    start, history, sums, stages = 0, [], torch.zeros(len(names)), [ema]
    if stage == 2:  # G0: EMA, in eval mode; released code: last weights, in train mode
        parts["G0"] = load_generator(checkpoint, args.device)[0][0]
        stages, history = [parts["G0"], ema], checkpoint["history"]
    if checkpoint and checkpoint["stage"] == stage:
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
    bar = data.Progress(num_steps * args.batch_size, f"Stage {stage}", done=start * args.batch_size)
    stop = common.GracefulStop()
    for step in range(start, num_steps):
        epoch, batch = divmod(step, len(batches))
        for opt in (opt_g, opt_d):
            opt.param_groups[0]["lr"] = args.lr * 0.5 ** (epoch // args.lr_decay_epochs)
        torch.manual_seed(args.seed * 2**20 + step)  # resumed runs draw the same noise
        images, captions, wrong = batches(step)
        t, t_wrong = embeddings[captions].mean(1), embeddings[wrong].mean(1)  # as in TF
        z = torch.randn(common.world_size(), len(t), NZ + 2 * NC, device=args.device)[common.rank()]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            x = generate(stages[:-1], z, t)  # z, or images of Stage-I
            fake, kl = G(x, z.split((NZ, NC, NC), 1)[stage], t)
            d_stats = d_step(D, opt_d, images, fake, t, t_wrong)
            loss_g = g_step(D, opt_g, fake, t, kl)  # TF: a new fake
        update_ema(ema, G, min(args.ema, (1 + step) / (10 + step)))

        sums += torch.stack((loss_g, kl.detach(), *d_stats))
        end_of_epoch, stopping = batch + 1 == len(batches), stop.requested()
        if end_of_epoch or stopping or batch % 20 == 19:
            means = dict(zip(names, (common.reduce_mean(sums) / (batch + 1)).tolist()))
            bar.note = "  ".join(f"{k} {v:.2f}" for k, v in means.items())
            assert sums.isfinite().all(), "the loss is not finite"
        bar.update(args.batch_size)
        if end_of_epoch:
            sums.zero_()
            history.append(dict(stage=stage, epoch=epoch + 1, **means))
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                history[-1] |= evaluate(stages, encoder, test_set, args)
        if stopping or step + 1 == num_steps or (end_of_epoch and time.time() - saved > 60):
            saved = time.time()
            common.save_grid(args.out_dir / f"stage{stage}_epoch_{epoch + 1:04}.png",
                             generate(stages, *grid), 8)
            common.save_log(args.out_dir / "log.csv", history)
            common.save_checkpoint(args.out_dir / "last.pt", dict(
                kind=NAME, stage=stage, step=step + 1, history=history, sums=sums,
                args={n: vars(args)[n] for n in RESUME_ARGS}, text_encoder=encoder, **parts))
        if stopping:
            return 128 + stop.signal
    stop.signal = True  # until the next stage, signals exit

# ---- Sampling

def load_generator(path, device="cpu"):
    """Return [Stage-I, Stage-II if trained] and the text encoder of a checkpoint or its path."""
    state = path if isinstance(path, dict) else common.load_checkpoint(path, NAME)
    args, G = state["args"], [Stage1(state["args"]["ngf"])]
    if state["stage"] == 2:
        G.append(Stage2(args["ngf"], args["size"], args["num_residual"]))
    for net, name in zip(G[::-1], ("ema", "G0")):  # ema: of the last stage
        net.load_state_dict(state[name])
        net.eval().to(device, memory_format=torch.channels_last)
    encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    return G, encoder.to(device)

def sample_noise(n, seed=0):
    """Return z and eps of both stages (n, 100 + 128 + 128) from N(0, 1)."""
    return torch.randn(n, NZ + 2 * NC, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def generate(G, noise, embeddings):
    """noise (N, 356), embeddings (N, TEXT) -> images (N, 3, S, S) in [-1, 1]."""
    x, *eps = noise.to(embeddings.device).split((NZ, NC, NC), 1)
    for stage, e in zip(G, eps):
        x, _ = stage(x, e, embeddings)
    return x.float()

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

# ---- Command line

PRESETS = {
    "toy": dict(stage=1, epochs=24, size=128, ngf=16, ndf=16, batch_size=8, lr=4e-4, ema=0.998,
                captions_per_image=1, num_residual=2, eval_every=24, fid_samples=1024),
    "coco": dict(epochs=120, ngf=192, ndf=96, num_residual=2, captions_per_image=1,
                 lr_decay_epochs=20)}  # PT
RESUME_ARGS = ("data", "size", "ngf", "ndf", "num_residual", "batch_size", "lr", "lr_decay_epochs",
               "ema", "captions_per_image", "seed")

def main(argv=None):
    parser = argparse.ArgumentParser(NAME, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2], default=2, help="the last stage")
    add("--epochs", type=int, default=600, help="of each stage (section 3.5)")
    add("--batch-size", type=int, default=64, help="section 3.5")
    add("--size", type=int, choices=[128, 256], default=256, help="of Stage-II (section 3.5)")
    add("--lr", type=float, default=2e-4, help="section 3.5")
    add("--lr-decay-epochs", type=int, default=100, help="halve lr (section 3.5)")
    add("--ngf", type=int, default=128, help="width of G (released)")
    add("--ndf", type=int, default=64, help="width of D (released)")
    add("--num-residual", type=int, default=4, help="section 3.5: 4, at 128 px 2")
    add("--captions-per-image", type=int, default=4, help="averaged (TF)")
    args, checkpoint = common.parse_args(parser, PRESETS, RESUME_ARGS, argv)
    if not (args.captions or args.evaluate):
        for stage in range(checkpoint["stage"] if checkpoint else 1, args.stage + 1):
            if status := train(args, checkpoint, stage):
                return status
            with common.main_process_first():
                checkpoint = common.load_checkpoint(args.out_dir / "last.pt", NAME)
        return
    G, encoder = load_generator(checkpoint, args.device)
    G = G[:args.stage]
    if args.captions:
        return sample(G, encoder, args)
    test_set = data.load_dataset(args.data, "test", args.size if len(G) == 2 else 64, args.root)
    evaluate(G, encoder, test_set, args)

if __name__ == "__main__":
    sys.exit(common.run(main) if common else "needs common.py, data.py and requirements.txt")
