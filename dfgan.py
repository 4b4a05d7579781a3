"""DF-GAN: A Simple and Effective Baseline for Text-to-Image Synthesis. Tao et al., CVPR 2022
(arXiv 2008.05865).

One generator draws the image at full size from noise z and the sentence embedding e.
    DFBlock  two affine transformations by (z, e), each with an activation           (section 3.4)
    MA-GP    penalty on the gradient of D at real images with their captions         (section 3.3)
    one-way  D gives one score of image and caption together                         (section 3.3)

    python dfgan.py                                      # toy data, minutes on a CPU
    python dfgan.py --data cub --epochs 600              # CUB; run again to resume
    python dfgan.py --data cub --sample "a small yellow bird" "a red bird"
    python dfgan.py --data cub --interpolate "a yellow bird" "a blue bird"
    python dfgan.py --data cub --evaluate
    python dfgan.py --data cub --init state_epoch_1220.pth --text-encoder text_encoder200.pth
"""
import argparse
import copy
import math
import sys
import time
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

try:
    import common
    import data
except ModuleNotFoundError:    # networks, losses and steps need torch only
    common = data = None

NZ, NE = 100, 256    # noise z; sentence embedding e (DAMSM)

# ---- Networks: parameters have the released names, so that released checkpoints load

class Affine(nn.Module):
    """gamma(c) x + beta(c), x (B, a, s, s); gamma and beta are MLPs of c = (z, e)."""

    def __init__(self, channels):
        super().__init__()
        for name, bias in (("fc_gamma", 1.0), ("fc_beta", 0.0)):
            mlp = nn.Sequential(OrderedDict(
                linear1=nn.Linear(NZ + NE, channels), relu=nn.ReLU(inplace=True),
                linear2=nn.Linear(channels, channels)))
            nn.init.zeros_(mlp.linear2.weight)
            nn.init.constant_(mlp.linear2.bias, bias)
            self.add_module(name, mlp)

    def forward(self, x, c):
        gamma, beta = self.fc_gamma(c)[:, :, None, None], self.fc_beta(c)[:, :, None, None]
        return torch.addcmul(beta, gamma, x)

class DFBlock(nn.Module):
    """Affine, activation, affine, activation. Figure: ReLU; released code, as here: leaky ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.affine0, self.affine1 = Affine(channels), Affine(channels)

    def forward(self, x, c):
        x = F.leaky_relu(self.affine0(x, c), 0.2, inplace=True)
        return F.leaky_relu(self.affine1(x, c), 0.2, inplace=True)

class NearestUpConv(nn.Conv2d):
    """Same as a 3x3 convolution of F.interpolate(x, scale_factor=2.0), with 2.25 times fewer FLOPs.

    Each 4x4 weight of one transposed convolution sums the 3x3 weights that meet the same pixel."""

    def forward(self, x):
        if x.shape[2] < 8:    # few pixels: larger weights cost more than they save
            return super().forward(F.interpolate(x, scale_factor=2.0))
        weight = F.avg_pool2d(self.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, 2, 1)

def upsample(x):
    """Same as F.interpolate(x, scale_factor=2.0), which autocast would run in float32."""
    b, c, h, w = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return x.reshape(b, c, 2 * h, 2 * w).contiguous(memory_format=torch.channels_last)

class UpBlock(nn.Module):
    """x (B, a, s, s), c (B, 356) -> (B, b, 2s, 2s): upsample, then twice DFBlock and convolution,
    with a shortcut. The first DFBlock and the 1x1 convolution of the shortcut act on single pixels:
    before the upsampling they give the same result with a quarter of the work."""

    def __init__(self, a, b):
        super().__init__()
        self.c1, self.c2 = NearestUpConv(a, b, 3, 1, 1), nn.Conv2d(b, b, 3, 1, 1)
        self.fuse1, self.fuse2 = DFBlock(a), DFBlock(b)
        self.c_sc = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, c):
        h = self.c1(self.fuse1(x, c))    # (B, b, 2s, 2s)
        return upsample(self.c_sc(x)) + self.c2(self.fuse2(h, c))

def channels(nf, size):
    """Channels from size x size down to 4 x 4: nf, 2 nf, 4 nf, 8 nf, 8 nf, ..."""
    if size not in (32, 64, 128, 256, 512):
        raise ValueError(f"size {size} is not 32, 64, 128, 256 or 512")
    return [nf * min(2 ** i, 8) for i in range(int(math.log2(size)) - 1)]

class Generator(nn.Module):
    """z (B, 100), e (B, 256) -> images (B, 3, S, S) in [-1, 1]. Figure 2, left."""

    def __init__(self, nf=32, size=256):
        super().__init__()
        widths = channels(nf, size)[::-1]
        self.fc = nn.Linear(NZ, widths[0] * 16)
        self.GBlocks = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.to_rgb = nn.Sequential(
            nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(nf, 3, 3, 1, 1), nn.Tanh())

    def forward(self, z, e):
        c = torch.cat((z, e), 1)    # (B, 356)
        x = self.fc(z).view(len(z), -1, 4, 4)    # (B, 8 nf, 4, 4)
        for block in self.GBlocks:
            x = block(x, c)
        return self.to_rgb(x)

class DownBlock(nn.Module):
    """(B, a, 2s, 2s) -> (B, b, s, s): shortcut + gamma residual; gamma, from 0, as released."""

    def __init__(self, a, b):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.conv_r = nn.Sequential(
            nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, inplace=True))
        self.conv_s = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):
        # Released code: the 1x1 convolution, then the pooling; the same with 4 times the work
        h = self.conv_r(x)
        return torch.addcmul(self.conv_s(F.avg_pool2d(x, 2)), self.gamma.to(h.dtype), h)

class Discriminator(nn.Module):
    """Target-Aware Discriminator: images (B, 3, S, S), e (B, 256) -> scores (B,). Figure 2."""

    def __init__(self, nf=32, size=256):
        super().__init__()
        widths = channels(nf, size)
        self.conv_img = nn.Conv2d(3, nf, 3, 1, 1)
        self.DBlocks = nn.Sequential(*(DownBlock(a, b) for a, b in zip(widths, widths[1:])))
        self.joint_conv = nn.Sequential(
            nn.Conv2d(8 * nf + NE, 2 * nf, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * nf, 1, 4, bias=False))

    def features(self, x):
        return self.DBlocks(self.conv_img(x))    # (B, 8 nf, 4, 4)

    def score(self, h, e):
        e = e[:, :, None, None].expand(-1, -1, 4, 4)    # replicated spatially
        return self.joint_conv(torch.cat((h, e), 1)).flatten()

    def forward(self, x, e):
        return self.score(self.features(x), e)

# ---- Losses

def hinge_loss(real, wrong, fake):
    """E max(0, 1 - D(x, e)) + [E max(0, 1 + D(x, e')) + E max(0, 1 + D(G(z, e), e))] / 2  (3.2)."""
    return (F.relu(1 - real) + (F.relu(1 + wrong) + F.relu(1 + fake)) / 2).mean()

def ma_gp(grad_x, grad_e, k=2, p=6):
    """MA-GP (section 3.3) of the gradients of D(x, e), (B, ...) each.

    Paper: k E (|grad_x| + |grad_e|)^p; released code: k E (|grad_x|^2 + |grad_e|^2)^(p/2); we
    follow the code, which gave the published numbers. sqrt(s)^6 has a NaN gradient at 0."""
    s = sum(grad.float().square().flatten(1).sum(1) for grad in (grad_x, grad_e))    # (B,)
    return k * (s ** (p / 2)).mean()

def d_loss(D, real, fake, e, e_wrong):
    """Return hinge loss + MA-GP, and for the log [loss, D(real), D(wrong), D(fake), MA-GP].

    torch.compile differentiates twice through torch.func.grad, not through torch.autograd.grad."""
    def score(x, e):
        h = D.features(x)
        s = D.score(h, e)
        return s.sum(), (h, s)

    grads, (h, s_real) = torch.func.grad(score, (0, 1), has_aux=True)(real, e)
    s_wrong, s_fake, penalty = D.score(h, e_wrong), D(fake, e), ma_gp(*grads)
    loss = hinge_loss(s_real, s_wrong, s_fake) + penalty
    return loss, torch.stack((loss, s_real.mean(), s_wrong.mean(), s_fake.mean(), penalty)).detach()

def g_loss(fake):
    """-E D(G(z, e), e)  (section 3.2)."""
    return -fake.mean()

# ---- Steps

def d_step(D, opt_d, real, fake, e, e_wrong, loss_function=d_loss):
    """Update D. real, fake (B, 3, S, S); e, e_wrong (B, 256). Released code: e_wrong is the batch
    rolled by one, which may fit by chance.

    loss_function: d_loss or its compiled form: double backward compiles inside one function only.
    Return loss, D(real), D(wrong), D(fake), MA-GP: a D that ignores its text has D(wrong) =
    D(real)."""
    loss, stats = loss_function(D, real, fake.detach(), e, e_wrong)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return stats

def g_step(D, opt_g, fake, e):
    """Update G. fake = G(z, e) with its graph, the one of D's step; e (B, 256). Return the loss."""
    D.requires_grad_(False)    # no gradients of D are needed
    loss = g_loss(D(fake, e))
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()

@torch.no_grad()
def update_ema(ema, G, decay):
    """ema += (1 - decay) (G - ema)."""
    pairs = zip(ema.state_dict().values(), G.state_dict().values())
    averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))
    torch._foreach_lerp_(averages, values, 1 - decay)

def build(nf=32, size=256, lr_g=1e-4, lr_d=4e-4, device="cpu"):
    """Return G, D and their optimizers: Adam, 1e-4 and 4e-4, betas (0, 0.9) (section 4)."""
    nets = [net.to(device, memory_format=torch.channels_last)
            for net in (Generator(nf, size), Discriminator(nf, size))]
    fused = "cuda" in str(device)
    return *nets, *(torch.optim.Adam(net.parameters(), lr, (0.0, 0.9), fused=fused)
                    for net, lr in zip(nets, (lr_g, lr_d)))

# ---- Training

def train(args, checkpoint):
    """Train, or resume; write last.pt, log.csv and grids of samples to args.out_dir."""
    with common.main_process_first():
        train_set, test_set = (data.load_dataset(args.data, split, args.size, args.root)
                               for split in ("train", "test"))
        text_encoder = common.get_text_encoder(
            "damsm", train_set, args.root, args.device, checkpoint, args.text_encoder,
            args.encoder_iterations, args.image_features)
        embeddings = common.embed_captions(text_encoder, train_set)    # (M, 256)
    batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                           1, common.rank(), common.world_size())
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(args.nf, args.size, args.lr_g, args.lr_d, args.device)
    ema = copy.deepcopy(G).eval()
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    start, history, sums = 0, [], torch.zeros(6)
    if checkpoint:
        start, history, sums = (checkpoint[key] for key in ("step", "history", "sums"))
        for name in parts.keys() & checkpoint.keys():    # --init has no optimizers
            parts[name].load_state_dict(checkpoint[name])
    sums = sums.to(args.device)    # of losses since the epoch began
    common.average_gradients(G, opt_g)
    common.average_gradients(D, opt_d)
    loss_function = d_loss
    if args.compile:
        print("compiling: the first step takes minutes (--no-compile)", flush=True)
        G.compile(dynamic=False)
        D.compile(dynamic=False)
        loss_function = torch.compile(d_loss, dynamic=False)

    captions = test_set.first_captions(8)    # a grid has a row a caption, a column a noise
    grid = (sample_noise(8, args.seed).repeat(len(captions), 1),
            text_encoder.encode(captions).repeat_interleave(8, 0))
    num_steps, saved = args.epochs * len(batches), 0
    print(f"{len(train_set)} images, {num_steps} steps, {args.device}; writing to {args.out_dir}")
    bar = data.Progress(num_steps * args.batch_size, "training", done=start * args.batch_size)
    stop = common.GracefulStop()
    for step in range(start, num_steps):
        epoch, batch = divmod(step, len(batches))
        torch.manual_seed(args.seed * 2**32 + step)    # a resumed run draws the same noise
        images, captions, _ = batches(step)
        e = embeddings[captions[:, 0]]
        z = torch.randn(common.world_size(), len(e), NZ, device=args.device)[common.rank()]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            fake = G(z, e)
            d_stats = d_step(D, opt_d, images, fake, e, e.roll(1, 0), loss_function)
            loss_g = g_step(D, opt_g, fake, e)
        update_ema(ema, G, min(args.ema, (1 + step) / (10 + step)))

        sums += torch.cat((loss_g[None], d_stats))
        end_of_epoch, stopping = batch + 1 == len(batches), stop.requested()
        if end_of_epoch or batch % 20 == 19:
            names = ("loss_g", "loss_d", "d_real", "d_wrong", "d_fake", "ma_gp")
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
                "kind": "dfgan", "step": step + 1, "history": history, "sums": sums,
                "args": {name: getattr(args, name) for name in FIXED},
                "text_encoder": text_encoder, **parts})
        if stopping:
            return 128 + stop.signal
    if args.data == "toy":
        evaluate(ema, text_encoder, test_set, args)

# ---- Sampling

def load_generator(path, device="cpu"):
    """Return the EMA of G and the text encoder of a checkpoint (a path, or its content)."""
    state = path if isinstance(path, dict) else common.load_checkpoint(path, "dfgan")
    G = Generator(state["args"]["nf"], state["args"]["size"]).eval()
    G.load_state_dict(state["ema"])
    text_encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    return G.to(device, memory_format=torch.channels_last), text_encoder.to(device)

def load_released(path, text_encoder, args):
    """Return a checkpoint of the authors' state_epoch_*.pth, without its optimizers."""
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)["model"]
        G, D, C = ({name.removeprefix("module."): value for name, value in model[net].items()}
                   for net in ("netG", "netD", "netC"))
        args.nf = len(G["fc.weight"]) // 128
        args.size = 4 * 2 ** len({name.split(".")[1] for name in G if name.startswith("GBlocks")})
        names = Discriminator(args.nf, args.size).state_dict()    # unused layers are left out
        nets = {"G": G, "ema": G, "D": {name: (D | C)[name] for name in names}}
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise common.UserError(f"--init: {path} is no released DF-GAN ({error})") from None
    return {"kind": "dfgan", "step": 0, "history": [], "sums": torch.zeros(6), **nets,
            "args": vars(args), "text_encoder": text_encoder.state_dict()}

def sample_noise(n, seed=0, truncation=None):
    """Return z (n, 100) from N(0, 1). truncation T: T times N(0, 1) cut at +-2; released: 0.88."""
    rng = torch.Generator().manual_seed(seed)
    if truncation is None:
        return torch.randn(n, NZ, generator=rng)
    return truncation * nn.init.trunc_normal_(torch.empty(n, NZ), a=-2, b=2, generator=rng)

@torch.no_grad()
def generate(G, noise, embeddings):
    """Return images (N, 3, S, S) in [-1, 1] of noise (N, 100) and embeddings (N, 256)."""
    noise = noise.to(embeddings.device)
    return torch.cat([G(z, e) for z, e in zip(noise.split(16), embeddings.split(16))]).float()

def sample(args, checkpoint):
    """Draw a grid: a row a caption. --interpolate: from caption A to B, a row a noise; with
    --interpolate-noise: from noise to noise, a row a caption. --num-images: files, no grid."""
    G, text_encoder = load_generator(checkpoint, args.device)
    captions, n = args.sample or args.interpolate, args.samples_per_caption
    embeddings = text_encoder.encode_prompts(captions)
    path = args.out_dir / f"sample-{common.slug(captions)}-{args.seed}.png"
    noise = sample_noise(n, args.seed, args.truncation).repeat(len(captions), 1)
    t, alphas = embeddings.repeat_interleave(n, 0), torch.linspace(0, 1, n)[:, None]
    if args.interpolate_noise:
        noise = torch.lerp(noise[:1], noise[1:2], alphas).repeat(2, 1)
    elif args.interpolate:
        noise = sample_noise(4, args.seed, args.truncation).repeat_interleave(n, 0)
        t = torch.lerp(*embeddings, alphas.to(t.device)).repeat(4, 1)
    if args.num_images:
        path = path.with_suffix("")
        for i in range(args.num_images * len(captions)):
            noise = sample_noise(1, args.seed * 2**20 + i, args.truncation)
            image = generate(G, noise, embeddings[i % len(captions), None])
            common.save_grid(path / f"{i:05}.png", image, 1)
    else:
        common.save_grid(path, generate(G, noise, t), n)
    print(*map(repr, captions), path, sep="\n")

def evaluate(G, text_encoder, test_set, args):
    """Return metrics of --fid-samples images as a dict."""
    t = common.embed_captions(text_encoder, test_set)
    captions = common.evaluation_captions(test_set, args.fid_samples)
    images = (generate(G, sample_noise(len(c), i, args.truncation), t[c])
              for i, c in enumerate(captions))
    groups = (generate(G, sample_noise(8, i, args.truncation), t[[i] * 8])
              for i in range(min(50, len(t))))
    return common.evaluate(images, captions, groups, test_set, args.device,
                           args.r_precision_encoder)

# ---- Command line

PRESETS = {"toy": dict(epochs=18, size=64, nf=8, batch_size=16, lr_g=2e-4, ema=0.99,
                       fid_samples=512),
           "coco": dict(epochs=120)}    # section 4
FIXED = ("data", "size", "nf", "batch_size", "lr_g", "lr_d", "ema", "seed")

def main(argv=None):
    parser = argparse.ArgumentParser("dfgan.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=int, default=600, help="section 4")
    add("--batch-size", type=int, default=32, help="released code")
    add("--size", type=int, choices=[32, 64, 128, 256, 512], default=256, help="section 4")
    add("--lr-g", type=float, default=1e-4, help="section 4")
    add("--lr-d", type=float, default=4e-4, help="section 4")
    add("--nf", type=int, default=32, help="width of G and D (released code; paper: 64)")
    add("--truncation", type=float, metavar="T", help="of the noise of samples; released: 0.88")
    add("--init", metavar="FILE", help="begin with a released state_epoch_*.pth")
    args, checkpoint = common.parse_args(parser, PRESETS, FIXED, argv)
    if args.init and not checkpoint:
        if not args.text_encoder:
            parser.error("--init needs --text-encoder, the DAMSM that the model was trained with")
        text_encoder = common.load_text_encoder(args.text_encoder)
        checkpoint = load_released(args.init, text_encoder, args)
    if args.sample or args.interpolate:
        return sample(args, checkpoint)
    if not args.evaluate:
        return train(args, checkpoint)
    test_set = data.load_dataset(args.data, "test", args.size, args.root)
    evaluate(*load_generator(checkpoint, args.device), test_set, args)

if __name__ == "__main__":
    sys.exit(common.run(main) if common else "training and sampling need common.py and data.py")
