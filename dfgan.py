"""DF-GAN: A Simple and Effective Baseline for Text-to-Image Synthesis. Tao et al., CVPR 2022.

arXiv 2008.05865. One G draws the full-size image from noise z and sentence embedding t.
    DFBlock  two affine transformations by (z, t), each with an activation (section 3.4)
    MA-GP    penalty on the gradient of D at real images with their captions (section 3.3)
    one-way  D gives one score of image and caption together (section 3.3)

    python dfgan.py  # toy data, minutes on a CPU
    python dfgan.py --data cub  # run again to resume
    python dfgan.py --data cub --sample "a yellow bird" "a red bird"
    python dfgan.py --data cub --evaluate
    python dfgan.py --data cub --init state_epoch_1220.pth --text-encoder text_encoder200.pth
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

NAME, NZ, TEXT = "dfgan", 100, 256  # noise z; sentence embedding t (paper: e)
SIZES = 32, 64, 128, 256, 512

# ---- Networks, parameters named as released

class Affine(nn.Module):
    """gamma(c) x + beta(c) of x (B, a, s, s). c = (z, t), as released; eq. 3 has t alone."""
    def __init__(self, a):
        super().__init__()
        for name, bias in (("fc_gamma", 1.0), ("fc_beta", 0.0)):
            mlp = nn.Sequential()
            mlp.linear1, mlp.relu = nn.Linear(NZ + TEXT, a), nn.ReLU(True)
            mlp.linear2 = nn.Linear(a, a)
            nn.init.zeros_(mlp.linear2.weight)
            nn.init.constant_(mlp.linear2.bias, bias)
            self.add_module(name, mlp)

    def forward(self, x, c):
        gamma, beta = self.fc_gamma(c)[:, :, None, None], self.fc_beta(c)[:, :, None, None]
        return torch.addcmul(beta, gamma, x)

class DFBlock(nn.Module):
    """Twice an affine transformation and leaky ReLU, as released (paper: ReLU)."""
    def __init__(self, a):
        super().__init__()
        self.affine0, self.affine1 = Affine(a), Affine(a)

    def forward(self, x, c):
        x = F.leaky_relu(self.affine0(x, c), 0.2, True)
        return F.leaky_relu(self.affine1(x, c), 0.2, True)

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

def upsample(x):
    """Same as F.interpolate(x, scale_factor=2.0), which autocast would run in float32."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return x.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)  # stays channels_last

class UpBlock(nn.Module):
    """x (B, a, s, s), c (B, 356) -> (B, b, 2s, 2s)."""
    def __init__(self, a, b):
        super().__init__()
        self.c1, self.c2 = NearestUpConv(a, b, 3, 1, 1), nn.Conv2d(b, b, 3, 1, 1)
        self.fuse1, self.fuse2 = DFBlock(a), DFBlock(b)
        self.c_sc = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, c):  # released: upsampling before fuse1 and c_sc, 4 times the work
        h = self.c1(self.fuse1(x, c))  # (B, b, 2s, 2s)
        return upsample(self.c_sc(x)) + self.c2(self.fuse2(h, c))

def channels(nf, size):
    """Return the widths from size x size to 4 x 4: nf, 2 nf, 4 nf, 8 nf, 8 nf, ..."""
    return [nf * min(2 ** i, 8) for i in range(SIZES.index(size) + 4)]

class Generator(nn.Module):
    """z (B, 100), t (B, 256) -> images (B, 3, S, S) in [-1, 1]. Figure 2, left."""
    def __init__(self, nf=32, size=256):
        super().__init__()
        widths = channels(nf, size)[::-1]
        self.fc = nn.Linear(NZ, widths[0] * 16)
        self.GBlocks = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.to_rgb = nn.Sequential(nn.LeakyReLU(0.2, True), nn.Conv2d(nf, 3, 3, 1, 1), nn.Tanh())

    def forward(self, z, t):
        c = torch.cat((z, t), 1)  # (B, 356)
        x = self.fc(z).view(len(z), -1, 4, 4)  # (B, 8 nf, 4, 4)
        for block in self.GBlocks:
            x = block(x, c)
        return self.to_rgb(x)

class Convolution(torch.autograd.Function):
    """F.conv2d with a fast double backward, for MA-GP. PyTorch's convolves with whole feature
    maps."""
    @staticmethod
    def forward(x, weight, bias, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)  # autocast
        grad_x, grad_weight = F.conv_transpose2d(grad, weight, None, *ctx.geometry), None
        if ctx.needs_input_grad[1]:
            grad_weight = nn.grad.conv2d_weight(x, weight.shape, grad, *ctx.geometry)
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None

class DConv2d(nn.Conv2d):
    """nn.Conv2d, computed by Convolution."""
    def forward(self, x):
        return Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)

class DownBlock(nn.Module):
    """(B, a, 2s, 2s) -> (B, b, s, s): shortcut + gamma * residual; gamma starts at 0 (released)."""
    def __init__(self, a, b):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.conv_r = nn.Sequential(
            DConv2d(a, b, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),
            DConv2d(b, b, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, True))
        self.conv_s = DConv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):
        h = self.conv_r(x)
        shortcut = self.conv_s(F.avg_pool2d(x, 2))  # released: pooled last, 4 times the work
        return torch.addcmul(shortcut, self.gamma.to(h.dtype), h)

class Discriminator(nn.Module):
    """Target-Aware Discriminator: images (B, 3, S, S), t (B, 256) -> scores (B,). Figure 2."""
    def __init__(self, nf=32, size=256):
        super().__init__()
        widths = channels(nf, size)
        self.conv_img = DConv2d(3, nf, 3, 1, 1)
        self.DBlocks = nn.Sequential(*(DownBlock(a, b) for a, b in zip(widths, widths[1:])))
        self.joint_conv = nn.Sequential(
            DConv2d(8 * nf + TEXT, 2 * nf, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, True),
            DConv2d(2 * nf, 1, 4, bias=False))

    def features(self, x):
        return self.DBlocks(self.conv_img(x))  # (B, 8 nf, 4, 4)

    def score(self, h, t):
        t = t[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint_conv(torch.cat((h, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)

# ---- Losses

def hinge_loss(real, wrong, fake):
    """E max(0, 1 - D(x, t)) + [E max(0, 1 + D(x, t')) + E max(0, 1 + D(G(z, t), t))] / 2, eq. 1."""
    return (F.relu(1 - real) + (F.relu(1 + wrong) + F.relu(1 + fake)) / 2).mean()

def ma_gp(grad_x, grad_t, k=2, p=6):
    """MA-GP (section 3.3) of gradients (B, ...) of D(x, t). Paper: k E (|grad_x| + |grad_t|)^p; we
    follow the code that gave the published numbers: k E (|grad_x|^2 + |grad_t|^2)^(p/2)."""
    s = sum(grad.float().square().flatten(1).sum(1) for grad in (grad_x, grad_t))  # (B,)
    return k * (s ** (p / 2)).mean()  # sqrt(s) ** p has a NaN gradient at 0

def d_loss(D, real, fake, t, t_wrong):
    """Return the loss of D and what d_step returns. torch.func.grad, unlike torch.autograd.grad,
    lets Convolution skip the gradients of weights."""
    def score(x, t):
        h = D.features(x)
        s = D.score(h, t)
        return s.sum(), (h, s)

    grads, (h, s_real) = torch.func.grad(score, (0, 1), has_aux=True)(real, t)
    s_wrong, s_fake, penalty = D.score(h, t_wrong), D(fake, t), ma_gp(*grads)
    loss = hinge_loss(s_real, s_wrong, s_fake) + penalty
    return loss, torch.stack((loss, s_real.mean(), s_wrong.mean(), s_fake.mean(), penalty)).detach()

def g_loss(fake):
    """-E D(G(z, t), t)  (section 3.2)."""
    return -fake.mean()

# ---- Steps

def d_step(D, opt_d, real, fake, t, t_wrong):
    """Update D. Return loss, D(real), D(wrong), D(fake), MA-GP. real, fake (B, 3, S, S); t, t_wrong
    (B, 256). t_wrong: t rolled by one, as released, possibly of the same class."""
    loss, stats = d_loss(D, real, fake.detach(), t, t_wrong)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return stats

def g_step(D, opt_g, fake, t):
    """Update G. fake: d_step's G(z, t), not detached; t (B, TEXT). Return the loss."""
    D.requires_grad_(False)  # skips D's gradients and autocast's stale bf16 copies
    loss = g_loss(D(fake, t))
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()

@torch.no_grad()
def update_ema(ema, G, decay):
    """ema += (1 - decay) (G - ema)."""
    torch._foreach_lerp_([*ema.parameters()], [*G.parameters()], 1 - decay)

def build(nf=32, size=256, lr_g=1e-4, lr_d=4e-4, device="cpu"):
    """Return G, D and their optimizers: Adam (section 4)."""
    nets = Generator(nf, size), Discriminator(nf, size)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in nets)
    adam = dict(betas=(0.0, 0.9), fused=True)
    return G, D, Adam(G.parameters(), lr_g, **adam), Adam(D.parameters(), lr_d, **adam)

# ---- Training

def train(args, checkpoint):
    """Train or resume; write last.pt, log.csv and grids of samples."""
    with common.main_process_first():
        train_set = data.load_dataset(args.data, "train", args.size, args.root)
        test_set = data.load_dataset(args.data, "test", args.size, args.root)
        encoder = common.get_text_encoder(
            "damsm", train_set, args.root, args.device, checkpoint, args.text_encoder,
            rms=5 if args.data == "toy" else 3)  # real flowers lose their outlines with 5
        embeddings = common.embed_captions(encoder, train_set)  # (captions, TEXT)
    batches = data.Batches(train_set, args.batch_size, args.seed, args.device,
                           1, common.rank(), common.world_size(), rolled=True)
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(args.nf, args.size, args.lr_g, args.lr_d, args.device)
    ema = copy.deepcopy(G).eval()
    parts = dict(G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    names = "loss_g", "loss_d", "d_real", "d_wrong", "d_fake", "ma_gp"
    start, history, sums = 0, [], torch.zeros(len(names))
    if checkpoint:
        start, history, sums = (checkpoint[key] for key in ("step", "history", "sums"))
        for name in parts.keys() & checkpoint.keys():  # --init has no optimizers
            parts[name].load_state_dict(checkpoint[name])
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
        torch.manual_seed(args.seed * 2**20 + step)  # resumed runs draw the same noise
        images, captions, wrong = batches(step)
        t, t_wrong = embeddings[captions[:, 0]], embeddings[wrong[:, 0]]
        z = torch.randn(common.world_size(), len(t), NZ, device=args.device)[common.rank()]
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            fake = G(z, t)
            d_stats = d_step(D, opt_d, images, fake, t, t_wrong)
            loss_g = g_step(D, opt_g, fake, t)
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
    G = Generator(state["args"]["nf"], state["args"]["size"]).eval()
    G.load_state_dict(state["ema"])
    encoder = common.text_encoder_from_state_dict(state["text_encoder"])
    return G.to(device, memory_format=torch.channels_last), encoder.to(device)

def load_released(args):
    """Return a checkpoint of the authors' state_epoch_*.pth, without its optimizers."""
    model = torch.load(args.init, map_location="cpu", weights_only=True)["model"]
    G, D, C = ({name.removeprefix("module."): value for name, value in model[net].items()}
               for net in ("netG", "netD", "netC"))
    D = {name: (D | C)[name] for name in Discriminator(args.nf, args.size).state_dict()}
    return dict(step=0, history=[], sums=torch.zeros(6), args=vars(args), G=G, D=D, ema=G,
                text_encoder=common.load_text_encoder(args.text_encoder).state_dict())

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

# ---- Command line

PRESETS = {
    "toy": dict(epochs=15, size=32, nf=16, batch_size=8, lr_g=4e-4, lr_d=1e-3, ema=0.998,
                eval_every=15, fid_samples=1024),
    "coco": dict(epochs=120)}  # section 4
RESUME_ARGS = ("data", "size", "nf", "batch_size", "lr_g", "lr_d", "ema", "seed")

def main(argv=None):
    parser = argparse.ArgumentParser(NAME, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=int, default=600, help="section 4")
    add("--batch-size", type=int, default=32, help="released")
    add("--size", type=int, choices=SIZES, default=256, help="section 4")
    add("--lr-g", type=float, default=1e-4, help="section 4")
    add("--lr-d", type=float, default=4e-4, help="section 4")
    add("--nf", type=int, default=32, help="width of G and D (released)")
    add("--init", metavar="FILE", help="new run: a state_epoch_*.pth; needs --text-encoder")
    args, checkpoint = common.parse_args(parser, PRESETS, RESUME_ARGS, argv)
    if args.init and not checkpoint:
        checkpoint = load_released(args)
    if not (args.captions or args.evaluate):
        return train(args, checkpoint)
    G, encoder = load_generator(checkpoint, args.device)
    if args.captions:
        return sample(G, encoder, args)
    test_set = data.load_dataset(args.data, "test", args.size, args.root)
    evaluate(G, encoder, test_set, args)

if __name__ == "__main__":
    sys.exit(common.run(main) if common else "needs common.py, data.py and requirements.txt")
