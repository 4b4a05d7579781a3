"""StackGAN: Text to Photo-realistic Image Synthesis with Stacked Generative Adversarial Networks.
Zhang et al., ICCV 2017 (arXiv 1612.03242).

Stage-I draws a 64 px sketch from noise z and the embedding t of a caption; Stage-II draws an image
of 256 px from sketch and t.
    Conditioning Augmentation  c is a sample of N(mu(t), sigma(t)^2)      (section 3.2)
    Stage-I                    s0 = G0(z, c0)                             (section 3.3)
    Stage-II                   G(s0, c): no noise but s0; G0 is fixed     (section 3.4)

    python stackgan.py                                   # toy data, minutes on a CPU
    python stackgan.py --data flowers                    # both stages; run again to resume
    python stackgan.py --data flowers --sample "pink flower" "a white flower"
    python stackgan.py --data flowers --interpolate "a pink flower" "a yellow flower"
    python stackgan.py --data flowers --evaluate
"""
import argparse
import copy
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

try:
    import common
    import data
except ModuleNotFoundError:    # networks, losses and steps need torch only
    common = data = None

NZ, NC, TEXT = 100, 128, 1024    # noise z; conditioning c (section 3.5); embedding t

# ---- Networks: the layers of the PyTorch release
# The TensorFlow release also has residual blocks at 4x4 in D and at 4x4 and 8x8 in Stage-I.

class ConditioningAugmentation(nn.Module):
    """t (B, 1024), eps (B, 128) from N(0, 1) -> c = mu + sigma eps, mu, log sigma (section 3.2).

    Leaky ReLU as in the TensorFlow release. The PyTorch release has a ReLU before mu and log
    sigma^2, which forces mu >= 0 and sigma >= 1: an accident that we do not follow."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(TEXT, 2 * NC)

    def forward(self, t, eps):
        mu, log_sigma = F.leaky_relu(self.fc(t), 0.2).chunk(2, 1)
        return mu + log_sigma.exp() * eps, mu, log_sigma

class UpBlock(nn.Module):
    """(B, a, s, s) -> (B, b, 2s, 2s): nearest upsampling, 3x3 convolution, batch norm, ReLU."""

    def __init__(self, a, b):
        super().__init__()
        self.conv, self.norm = NearestUpConv(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)), inplace=True)

class NearestUpConv(nn.Conv2d):
    """Same as a 3x3 convolution of F.interpolate(x, scale_factor=2.0), with 2.25 times fewer FLOPs.

    Each 4x4 weight of one transposed convolution sums the 3x3 weights that meet the same pixel."""

    def forward(self, x):
        if x.shape[2] < 8:    # few pixels: larger weights cost more than they save
            return super().forward(F.interpolate(x, scale_factor=2.0))
        weight = F.avg_pool2d(self.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, 2, 1)

class Residual(nn.Module):
    """x (B, a, s, s) -> ReLU(x + a residual of two 3x3 convolutions)."""

    def __init__(self, a):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(a, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(inplace=True),
            nn.Conv2d(a, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a))

    def forward(self, x):
        return F.relu(x + self.body(x), inplace=True)

class Stage1(nn.Module):
    """Stage-I G0: z (B, 100), eps (B, 128), t (B, 1024) -> images (B, 3, 64, 64) in [-1, 1], mu,
    log sigma. Figure 2, top."""

    def __init__(self, ngf=128):
        super().__init__()
        self.ca = ConditioningAugmentation()
        self.fc = nn.Sequential(nn.Linear(NZ + NC, 8 * ngf * 16, bias=False),
                                nn.BatchNorm1d(8 * ngf * 16), nn.ReLU(inplace=True))
        self.up = nn.Sequential(UpBlock(8 * ngf, 4 * ngf), UpBlock(4 * ngf, 2 * ngf),
                                UpBlock(2 * ngf, ngf), UpBlock(ngf, ngf // 2))
        self.img = nn.Sequential(nn.Conv2d(ngf // 2, 3, 3, 1, 1, bias=False), nn.Tanh())
        self.apply(init_weights)

    def forward(self, z, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        x = self.fc(torch.cat((z, c), 1)).view(len(z), -1, 4, 4)    # (B, 8 ngf, 4, 4)
        return self.img(self.up(x)), mu, log_sigma    # before img: (B, ngf / 2, 64, 64)

class Stage2(nn.Module):
    """Stage-II G: images s0 (B, 3, 64, 64), eps, t -> images (B, 3, S, S), mu, log sigma. Figure 2,
    bottom. Residual blocks (section 3.5): 4, at 128 px 2."""

    def __init__(self, ngf=128, size=256, num_residual=4):
        super().__init__()

        def block(a, b, kernel, stride):    # ReLU as released; paper: leaky ReLU in downsampling
            return (nn.Conv2d(a, b, kernel, stride, 1, bias=False), nn.BatchNorm2d(b),
                    nn.ReLU(inplace=True))

        self.ca = ConditioningAugmentation()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, ngf, 3, 1, 1, bias=False), nn.ReLU(inplace=True),
            *block(ngf, 2 * ngf, 4, 2), *block(2 * ngf, 4 * ngf, 4, 2))    # (B, 4 ngf, 16, 16)
        self.joint = nn.Sequential(*block(4 * ngf + NC, 4 * ngf, 3, 1))
        self.residual = nn.Sequential(*(Residual(4 * ngf) for _ in range(num_residual)))
        widths = [4 * ngf // 2 ** i for i in range(int(math.log2(size // 16)) + 1)]
        self.up = nn.Sequential(*(UpBlock(a, b) for a, b in zip(widths, widths[1:])))
        self.img = nn.Sequential(nn.Conv2d(widths[-1], 3, 3, 1, 1, bias=False), nn.Tanh())
        self.apply(init_weights)

    def forward(self, s0, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        c = c[:, :, None, None].expand(-1, -1, 16, 16)
        x = self.joint(torch.cat((self.encoder(s0), c), 1))
        return self.img(self.up(self.residual(x))), mu, log_sigma

class Discriminator(nn.Module):
    """Images (B, 3, S, S), t (B, 1024) -> logits (B,). Figure 2.

    Joint layer: 3x3 as in the PyTorch release; paper and TensorFlow release: 1x1. Text: a layer of
    D's own, as in the paper and the TensorFlow release; PyTorch release: the detached mu of G."""

    def __init__(self, ndf=64, size=64):
        super().__init__()

        def block(a, b, kernel, stride):
            return (nn.Conv2d(a, b, kernel, stride, 1, bias=False), nn.BatchNorm2d(b),
                    nn.LeakyReLU(0.2, inplace=True))

        down = [ndf * 2 ** i for i in range(int(math.log2(size)) - 2)]    # down to 4 x 4
        back = down[3:][::-1]                                             # to 8 ndf again
        self.image = nn.Sequential(
            nn.Conv2d(3, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            *(layer for a, b in zip(down, down[1:]) for layer in block(a, b, 4, 2)),
            *(layer for a, b in zip(back, back[1:]) for layer in block(a, b, 3, 1)))
        self.joint = nn.Sequential(*block(8 * ndf + NC, 8 * ndf, 3, 1), nn.Conv2d(8 * ndf, 1, 4))
        self.unconditional = nn.Conv2d(8 * ndf, 1, 4) if size > 64 else None    # Stage-II
        self.text = nn.Sequential(nn.Linear(TEXT, NC), nn.LeakyReLU(0.2))
        self.apply(init_weights)

    def features(self, x):
        return self.image(x)    # (B, 8 ndf, 4, 4)

    def score(self, h, t):
        t = self.text(t)[:, :, None, None].expand(-1, -1, 4, 4)    # replicated spatially
        return self.joint(torch.cat((h, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)

def init_weights(module):
    """Released code: N(0, 0.02) for weights, N(1, 0.02) for batch norm. Biases from 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)

# ---- Losses, of logits s: -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s)

def d_loss(real, wrong, fake):
    """-log D(I, t) - [log(1 - D(I, t_wrong)) + log(1 - D(G(.), t))] / 2  (eq. 3 and 5, GAN-CLS)."""
    return (F.softplus(-real) + (F.softplus(wrong) + F.softplus(fake)) / 2).mean()

def g_loss(fake):
    """-log D(G(.), t)  (eq. 4 and 6, in the form that does not saturate)."""
    return F.softplus(-fake).mean()

def kl_loss(mu, log_sigma):
    """KL(N(mu, sigma^2) || N(0, 1)), the mean over dimensions (B, 128)  (eq. 2)."""
    return ((mu.square() + (2 * log_sigma).exp() - 1) / 2 - log_sigma).mean()

# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. real, fake (B, 3, S, S); t, t_wrong (B, 1024).

    Wrong pair: the same image with a caption of another class, so its features are shared.
    TensorFlow release: an image of another class; PyTorch release: the next caption of the batch,
    features shared. Stage-II of the PyTorch release also scores images alone; we follow. Return
    loss, D(real), D(wrong), D(fake): a D that ignores its text has D(wrong) = D(real)."""
    h, h_fake = D.features(real), D.features(fake.detach())
    s_real, s_wrong, s_fake = D.score(h, t), D.score(h, t_wrong), D.score(h_fake, t)
    loss = d_loss(s_real, s_wrong, s_fake)
    if D.unconditional:
        real_loss = F.softplus(-s_real).mean() + F.softplus(-D.unconditional(h)).mean()
        fake_loss = (F.softplus(s_wrong) + F.softplus(s_fake)).mean()
        loss = real_loss / 2 + (fake_loss + F.softplus(D.unconditional(h_fake)).mean()) / 3
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return torch.stack((loss, *(s.sigmoid().mean() for s in (s_real, s_wrong, s_fake)))).detach()

def g_step(D, opt_g, fake, t, kl):
    """Update G. fake = G(...) with its graph; t (B, 1024); kl = kl_loss of G. Return the loss.

    Paper: weight of kl 1; released codes: 2; we follow the code. One fake serves both steps, as in
    the PyTorch release; TensorFlow release: draws another for G's step."""
    D.requires_grad_(False)    # no gradients of D are needed
    h = D.features(fake)
    loss = g_loss(D.score(h, t))
    if D.unconditional:
        loss = loss + g_loss(D.unconditional(h))
    opt_g.zero_grad()
    (loss + 2 * kl).backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()

@torch.no_grad()
def update_ema(ema, G, decay):
    """ema += (1 - decay) (G - ema), for weights and batch norm statistics."""
    pairs = zip(ema.state_dict().values(), G.state_dict().values())
    averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))
    torch._foreach_lerp_(averages, values, 1 - decay)

def build(stage, ngf=128, ndf=64, size=256, num_residual=4, lr=2e-4, device="cpu"):
    """Return G, D of a stage and their optimizers: Adam 2e-4 (section 3.5), betas (0.5, 0.999)."""
    nets = ((Stage1(ngf), Discriminator(ndf, 64)) if stage == 1 else
            (Stage2(ngf, size, num_residual), Discriminator(ndf, size)))
    nets = [net.to(device, memory_format=torch.channels_last) for net in nets]
    fused = "cuda" in str(device)
    return *nets, *(torch.optim.Adam(net.parameters(), lr, (0.5, 0.999), fused=fused)
                    for net in nets)

# ---- Training

def train(args, checkpoint):
    """Train Stage-I, then Stage-II on top of it, or resume; args.stage: one of them."""
    for stage in (args.stage,) if args.stage else (1, 2):
        reached = checkpoint["stage"] if checkpoint else 0
        if args.stage and not reached <= stage <= reached + 1:
            raise common.UserError(f"--stage {stage}: {args.out_dir} has reached Stage {reached}")
        if stage >= reached:
            if status := train_stage(args, checkpoint, stage):
                return status
            with common.main_process_first():
                checkpoint = common.load_checkpoint(args.out_dir / "last.pt", "stackgan")

def train_stage(args, checkpoint, stage):
    """Train a stage, or resume; write last.pt, log.csv and grids of samples to args.out_dir."""
    size = 64 if stage == 1 else args.size
    with common.main_process_first():
        train_set, test_set = (data.load_dataset(args.data, split, size, args.root)
                               for split in ("train", "test"))
        text_encoder = common.get_text_encoder(
            "char-cnn-rnn", train_set, args.root, args.device, checkpoint, args.text_encoder,
            args.encoder_iterations, args.image_features)
        embeddings = common.embed_captions(text_encoder, train_set)    # (M, 1024)
    batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                           args.captions_per_image, common.rank(), common.world_size())
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(stage, args.ngf, args.ndf, args.size, args.num_residual, args.lr,
                               args.device)
    ema = copy.deepcopy(G).eval()
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    start, history, sums = 0, checkpoint["history"] if checkpoint else [], torch.zeros(6)
    if stage == 2:    # on the EMA of Stage-I; released code: on its last weights
        G1 = load_stage1(checkpoint, args.device)
        parts["G1"] = G1
    if checkpoint and checkpoint["stage"] == stage:
        start, sums = checkpoint["step"], checkpoint["sums"]
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

    stages = [ema] if stage == 1 else [G1, ema]
    captions = test_set.first_captions(8)    # a grid has a row a caption, a column a noise
    grid = (sample_noise(8, args.seed).repeat(len(captions), 1),
            text_encoder.encode(captions).repeat_interleave(8, 0))
    num_steps, saved = args.epochs * len(batches), 0
    print(f"Stage {stage}: {len(train_set)} images, {num_steps} steps, {args.device}; writing to "
          f"{args.out_dir}")
    bar = data.Progress(num_steps * args.batch_size, "training", done=start * args.batch_size)
    stop = common.GracefulStop()
    for step in range(start, num_steps):
        epoch, batch = divmod(step, len(batches))
        for group in (*opt_g.param_groups, *opt_d.param_groups):
            group["lr"] = args.lr * 0.5 ** (epoch // args.lr_decay_epochs)
        torch.manual_seed(args.seed * 2**32 + step)    # a resumed run draws the same noise
        images, captions, wrong = batches(step)
        # TensorFlow release: the mean of 4 captions (--captions-per-image)
        t, t_wrong = embeddings[captions].mean(1), embeddings[wrong].mean(1)
        noise = torch.randn(common.world_size(), len(t), NZ + 2 * NC, device=args.device)
        z, eps1, eps2 = noise[common.rank()].split((NZ, NC, NC), 1)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            if stage == 1:
                fake, mu, log_sigma = G(z, eps1, t)
            else:
                with torch.no_grad():
                    s0, _, _ = G1(z, eps1, t)
                fake, mu, log_sigma = G(s0, eps2, t)
            kl = kl_loss(mu.float(), log_sigma.float())
            d_stats = d_step(D, opt_d, images, fake, t, t_wrong)
            loss_g = g_step(D, opt_g, fake, t, kl)
        update_ema(ema, G, min(args.ema, (1 + step) / (10 + step)))

        sums += torch.cat((torch.stack((loss_g, kl.detach())), d_stats))
        end_of_epoch, stopping = batch + 1 == len(batches), stop.requested()
        if end_of_epoch or batch % 20 == 19:
            names = ("loss_g", "kl", "loss_d", "d_real", "d_wrong", "d_fake")
            means = dict(zip(names, (sums / (batch + 1)).tolist()))
            bar.note = "  ".join(f"{name} {mean:.2f}" for name, mean in means.items())
        bar.update(args.batch_size)
        if end_of_epoch:
            sums.zero_()
            history.append({"stage": stage, "epoch": epoch + 1, **means})
            if args.eval_every and (epoch + 1) % args.eval_every == 0:
                history[-1] |= evaluate(stages, text_encoder, test_set, args)
        last = stopping or step + 1 == num_steps
        if last or (end_of_epoch and time.time() - saved > 60):
            saved = time.time()
            common.save_grid(args.out_dir / f"stage{stage}_epoch_{epoch + 1:04}.png",
                             generate(stages, *grid), 8)
            common.save_log(args.out_dir / "log.csv", history)
            common.save_checkpoint(args.out_dir / "last.pt", {
                "kind": "stackgan", "stage": stage, "step": step + 1, "history": history,
                "sums": sums, "args": {name: getattr(args, name) for name in FIXED},
                "text_encoder": text_encoder, **parts})
        if stopping:
            return 128 + stop.signal
    if args.data == "toy":
        evaluate(stages, text_encoder, test_set, args)

# ---- Sampling

def load_stage1(state, device):
    """Return the EMA of Stage-I of a checkpoint, frozen, with batch norm in eval mode.

    The releases leave batch norm of Stage-I in train mode during Stage-II."""
    G1 = Stage1(state["args"]["ngf"])
    G1.load_state_dict(state["ema"] if state["stage"] == 1 else state["G1"])
    return G1.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

def load_generator(path, device="cpu"):
    """Return [Stage-I, Stage-II if trained] and the text encoder of a checkpoint (or its path)."""
    state = path if isinstance(path, dict) else common.load_checkpoint(path, "stackgan")
    G = [load_stage1(state, device)]
    if state["stage"] == 2:
        args = state["args"]
        G.append(Stage2(args["ngf"], args["size"], args["num_residual"]).eval())
        G[1].load_state_dict(state["ema"])
        G[1].to(device, memory_format=torch.channels_last)
    text_encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    return G, text_encoder.to(device)

def sample_noise(n, seed=0):
    """Return z and eps of both stages (n, 100 + 128 + 128) from N(0, 1)."""
    return torch.randn(n, NZ + 2 * NC, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def generate(G, noise, embeddings):
    """Return images of the last stage of G, (N, 3, S, S) in [-1, 1]. embeddings: (N, 1024)."""
    images = []
    for n, t in zip(noise.to(embeddings.device).split(32), embeddings.split(32)):
        x, *eps = n.split((NZ, NC, NC), 1)
        for stage, e in zip(G, eps):
            x, _, _ = stage(x, e, t)
        images.append(x.float())
    return torch.cat(images)

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
        images = generate(G, noise, t)
        if len(G) == 2:    # a row of sketches above each row of images
            s0 = F.interpolate(generate(G[:1], noise, t), size=images.shape[2:])
            rows = (s0.unflatten(0, (-1, n)), images.unflatten(0, (-1, n)))
            images = torch.stack(rows, 1).flatten(0, 2)
        common.save_grid(path, images, n)
    print(*map(repr, captions), path, sep="\n")

def evaluate(G, text_encoder, test_set, args):
    """Return metrics of --fid-samples images as a dict."""
    t = common.embed_captions(text_encoder, test_set)
    captions = common.evaluation_captions(test_set, args.fid_samples)
    images = (generate(G, sample_noise(len(c), i), t[c]) for i, c in enumerate(captions))
    groups = (generate(G, sample_noise(8, i), t[[i] * 8]) for i in range(min(50, len(t))))
    return common.evaluate(images, captions, groups, test_set, args.device,
                           args.r_precision_encoder)

# ---- Command line

PRESETS = {
    "toy": dict(epochs=12, size=128, ngf=16, ndf=16, batch_size=16, captions_per_image=1, ema=0.99,
                num_residual=2, fid_samples=512),
    # PyTorch release
    "coco": dict(epochs=120, ngf=192, ndf=96, num_residual=2, captions_per_image=1,
                 lr_decay_epochs=20)}
FIXED = ("data", "size", "ngf", "ndf", "num_residual", "batch_size", "lr", "lr_decay_epochs", "ema",
         "captions_per_image", "seed")

def main(argv=None):
    parser = argparse.ArgumentParser("stackgan.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2], help="one stage only")
    add("--epochs", type=int, default=600, help="of each stage (section 3.5)")
    add("--batch-size", type=int, default=64, help="section 3.5")
    add("--size", type=int, choices=[128, 256], default=256, help="of Stage-II (section 3.5)")
    add("--lr", type=float, default=2e-4, help="section 3.5")
    add("--lr-decay-epochs", type=int, default=100, help="lr is halved (section 3.5)")
    add("--ngf", type=int, default=128, help="width of both G (released code)")
    add("--ndf", type=int, default=64, help="width of both D (released code)")
    add("--num-residual", type=int, default=4, help="residual blocks (section 3.5: 4, at 128 px 2)")
    add("--captions-per-image", type=int, default=4, help="averaged (TensorFlow release)")
    args, checkpoint = common.parse_args(parser, PRESETS, FIXED, argv)
    if args.sample or args.interpolate:
        return sample(args, checkpoint)
    if not args.evaluate:
        return train(args, checkpoint)
    G, text_encoder = load_generator(checkpoint, args.device)
    G = G[:args.stage]
    test_set = data.load_dataset(args.data, "test", args.size if len(G) == 2 else 64, args.root)
    evaluate(G, text_encoder, test_set, args)

if __name__ == "__main__":
    sys.exit(common.run(main) if common else "training and sampling need common.py and data.py")
