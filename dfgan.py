"""DF-GAN: A Simple and Effective Baseline for Text-to-Image Synthesis. Tao et al., CVPR 2022.

arXiv 2008.05865. One generator G draws the full-size image from noise z and the embedding t of a
caption, which the paper calls the sentence vector e. The discriminator D is target-aware.
    DFBlock  shifts and scales features by (z, t), twice, each time before a ReLU (section 3.4)
    MA-GP    penalizes the gradient of D at real images with their captions (section 3.3)
    one-way  D gives one score to an image and a caption together (section 3.3)

    python dfgan.py  # toy data, minutes on a CPU
    python dfgan.py --data cub  # run again to resume
    python dfgan.py --data cub --sample "a yellow bird" "a red bird"
    python dfgan.py --data cub --evaluate
    python dfgan.py --data cub --init state_epoch_1220.pth --text-encoder text_encoder200.pth

Reached: FID 60.4 on flowers at 64 px (3,000 images of unseen classes; real images: 40.0), with
nf 16, after 0.4 million images in 150 minutes on one CPU core.
"""
import argparse
import copy
import sys
import time
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

try:
    import common
    import data
except ModuleNotFoundError:  # networks, losses and steps need torch only
    common = data = None

NAME = "dfgan"
NZ = 100  # dimension of the noise z
TEXT_DIM = 256  # dimension of the sentence embedding t (paper: e)
NF = 32  # width of G and D; paper: 64, released: 32
LR_G = 1e-4  # learning rate of G (section 4)
LR_D = 4e-4  # learning rate of D (section 4)
BETAS = (0.0, 0.9)  # of Adam (section 4)
MA_GP_K = 2  # weight of MA-GP (section 4)
MA_GP_P = 6  # power of MA-GP (section 4)
SIZES = (32, 64, 128, 256, 512)


# ---- Networks; the parameters have the released names

class Affine(nn.Module):
    """Compute gamma(c) x + beta(c) of x (B, a, s, s). Released: c is (z, t); eq. 3: c is t."""

    def __init__(self, a, text_dim):
        super().__init__()
        self.fc_gamma = self.mlp(a, text_dim, bias=1.0)
        self.fc_beta = self.mlp(a, text_dim, bias=0.0)

    def mlp(self, a, text_dim, bias):
        linear1 = nn.Linear(NZ + text_dim, a)
        linear2 = nn.Linear(a, a)
        nn.init.zeros_(linear2.weight)
        nn.init.constant_(linear2.bias, bias)
        layers = OrderedDict(linear1=linear1, relu=nn.ReLU(True), linear2=linear2)
        return nn.Sequential(layers)

    def forward(self, x, c):
        gamma = self.fc_gamma(c)[:, :, None, None]
        beta = self.fc_beta(c)[:, :, None, None]
        return torch.addcmul(beta, gamma, x)


class DFBlock(nn.Module):
    """Apply an affine layer and a leaky ReLU, twice. The paper has ReLU (section 3.4)."""

    def __init__(self, a, text_dim):
        super().__init__()
        self.affine0 = Affine(a, text_dim)
        self.affine1 = Affine(a, text_dim)

    def forward(self, x, c):
        x = F.leaky_relu(self.affine0(x, c), 0.2, True)
        return F.leaky_relu(self.affine1(x, c), 0.2, True)


class UpBlock(nn.Module):
    """Upsample x (B, a, s, s) to (B, b, 2s, 2s), and fuse it with c (B, 356). Figure 2."""

    def __init__(self, a, b, text_dim):
        super().__init__()
        self.c1 = NearestUpConv(a, b, 3, 1, 1)
        self.c2 = nn.Conv2d(b, b, 3, 1, 1)
        self.fuse1 = DFBlock(a, text_dim)
        self.fuse2 = DFBlock(b, text_dim)
        self.c_sc = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, c):
        # The released code upsamples first, with the same result but 4 times the work
        h = self.c1(self.fuse1(x, c))  # (B, b, 2s, 2s)
        return upsample(self.c_sc(x)) + self.c2(self.fuse2(h, c))


def channels(nf, size):
    """Return the widths from size x size to 4 x 4: nf, 2 nf, 4 nf, 8 nf, 8 nf, ..."""
    return [nf * min(2 ** i, 8) for i in range(SIZES.index(size) + 4)]


class Generator(nn.Module):
    """Draw images (B, 3, S, S) in [-1, 1] from z (B, 100) and t (B, 256). Figure 2, left."""

    def __init__(self, nf=NF, size=256, text_dim=TEXT_DIM):
        super().__init__()
        widths = channels(nf, size)[::-1]
        self.fc = nn.Linear(NZ, widths[0] * 4 * 4)
        self.GBlocks = nn.ModuleList(
            UpBlock(a, b, text_dim) for a, b in zip(widths, widths[1:]))
        self.to_rgb = nn.Sequential(nn.LeakyReLU(0.2, True), nn.Conv2d(nf, 3, 3, 1, 1), nn.Tanh())

    def forward(self, z, t):
        c = torch.cat((z, t), 1)  # (B, 356)
        x = self.fc(z).unflatten(1, (-1, 4, 4))  # (B, 8 nf, 4, 4)
        for block in self.GBlocks:
            x = block(x, c)
        return self.to_rgb(x)


class DownBlock(nn.Module):
    """Downsample x (B, a, 2s, 2s) to (B, b, s, s). gamma starts at 0, as released. Figure 2."""

    def __init__(self, a, b):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.conv_r = nn.Sequential(
            DoubleBackwardConv2d(a, b, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),
            DoubleBackwardConv2d(b, b, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, True))
        self.conv_s = DoubleBackwardConv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x):
        residual = self.conv_r(x)
        shortcut = self.conv_s(F.avg_pool2d(x, 2))  # released: pooled last, 4 times the work
        return torch.addcmul(shortcut, self.gamma.to(residual.dtype), residual)


class Discriminator(nn.Module):
    """Score images (B, 3, S, S) with t (B, 256): Target-Aware Discriminator. Figure 2, right."""

    def __init__(self, nf=NF, size=256, text_dim=TEXT_DIM):
        super().__init__()
        widths = channels(nf, size)
        self.conv_img = DoubleBackwardConv2d(3, nf, 3, 1, 1)
        blocks = [DownBlock(a, b) for a, b in zip(widths, widths[1:])]
        self.DBlocks = nn.Sequential(*blocks)
        self.joint_conv = nn.Sequential(
            DoubleBackwardConv2d(8 * nf + text_dim, 2 * nf, 3, 1, 1, bias=False),
            nn.LeakyReLU(0.2, True),
            DoubleBackwardConv2d(2 * nf, 1, 4, bias=False))

    def features(self, x):
        return self.DBlocks(self.conv_img(x))  # (B, 8 nf, 4, 4)

    def score(self, features, t):
        t = t[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint_conv(torch.cat((features, t), 1)).flatten()

    def forward(self, x, t):
        return self.score(self.features(x), t)


# ---- Losses, means over the batch; t' is t_wrong

def hinge_loss(real, wrong, fake):
    """Return max(0, 1 - D(x, t)) + [max(0, 1 + D(x, t')) + max(0, 1 + D(G, t))] / 2  (eq. 1)."""
    return (F.relu(1 - real) + (F.relu(1 + wrong) + F.relu(1 + fake)) / 2).mean()


def ma_gp(grad_x, grad_t, k=MA_GP_K, p=MA_GP_P):
    """Return MA-GP of the gradients (B, ...) of D(x, t): k (|grad_x|^2 + |grad_t|^2)^(p / 2).

    We follow the released code, not the paper's k (|grad_x| + |grad_t|)^p (section 3.3)."""
    squared_norm = grad_x.float().square().flatten(1).sum(1)  # (B,)
    squared_norm = squared_norm + grad_t.float().square().sum(1)
    return k * (squared_norm ** (p / 2)).mean()  # sqrt(s) ** p has a NaN gradient at 0


def g_loss(fake):
    """Return -D(G(z, t), t)  (section 3.2)."""
    return -fake.mean()


# ---- Steps

def d_losses(D, real, fake, t, t_wrong, k=MA_GP_K, p=MA_GP_P):
    """Return D's loss "loss_d", its mean scores of real, wrong and fake pairs, and "ma_gp"."""
    def score_sum(x, t):
        features = D.features(x)
        score = D.score(features, t)
        return score.sum(), (features, score)

    if k > 0:
        # torch.func.grad, unlike torch.autograd.grad, skips the gradients of D's weights here
        gradients = torch.func.grad(score_sum, (0, 1), has_aux=True)
        (grad_x, grad_t), (features, real_score) = gradients(real, t)
        penalty = ma_gp(grad_x, grad_t, k, p)
    else:
        _, (features, real_score) = score_sum(real, t)
        penalty = torch.zeros_like(real_score[0])
    wrong_score = D.score(features, t_wrong)
    fake_score = D(fake, t)
    return {"loss_d": hinge_loss(real_score, wrong_score, fake_score) + penalty,
            "d_real": real_score.mean(),
            "d_wrong": wrong_score.mean(),
            "d_fake": fake_score.mean(),
            "ma_gp": penalty}


def d_step(D, opt_d, real, fake, t, t_wrong, k=MA_GP_K, p=MA_GP_P):
    """Update D. Return its losses and mean scores (d_losses).

    real, fake: (B, 3, S, S). t, t_wrong: (B, 256). As released, t_wrong is t rolled by one. MA-GP
    bounds the gradient in t: D cannot tell short embeddings apart. With long ones, G ignores z.
    An RMS length of 3 to 5 works (docs/results.md, length of the embeddings)."""
    losses = d_losses(D, real, fake.detach(), t, t_wrong, k, p)
    opt_d.zero_grad()
    losses["loss_d"].backward()
    opt_d.step()
    return {name: loss.detach() for name, loss in losses.items()}


def g_step(D, opt_g, fake, t):
    """Update G. Return its loss. fake: G(z, t), (B, 3, S, S), not detached. t: (B, 256)."""
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
    """Add (1 - decay) (G - ema) to ema."""
    torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 1 - decay)


def build(nf=NF, size=256, lr_g=LR_G, lr_d=LR_D, device="cpu", text_dim=TEXT_DIM):
    """Return G, D and an Adam optimizer for each (section 4)."""
    G = Generator(nf, size, text_dim).to(device, memory_format=torch.channels_last)
    D = Discriminator(nf, size, text_dim).to(device, memory_format=torch.channels_last)
    opt_g = Adam(G.parameters(), lr_g, BETAS, fused=True)
    opt_d = Adam(D.parameters(), lr_d, BETAS, fused=True)
    return G, D, opt_g, opt_d


# ---- Faster layers, same numbers. A reader of the paper can skip this section: each layer computes
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


def upsample(x):
    """Compute F.interpolate(x, scale_factor=2.0), which autocast would run in float32."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return x.reshape(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)  # stays channels_last


class Conv2dFunction(torch.autograd.Function):
    """Compute F.conv2d(x, weight, bias, stride, padding), with a fast double backward for MA-GP."""

    @staticmethod
    def forward(x, weight, bias, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)  # autocast
        grad_x = F.conv_transpose2d(grad, weight, None, ctx.stride, ctx.padding)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = nn.grad.conv2d_weight(x, weight.shape, grad, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


class DoubleBackwardConv2d(nn.Conv2d):
    """Compute nn.Conv2d.forward(self, x)."""

    def forward(self, x):
        return Conv2dFunction.apply(x, self.weight, self.bias, self.stride, self.padding)


# ---- Training. Everything above needs torch only.

def train(args, checkpoint=None):
    """Train up to epoch args.epochs, from scratch or from a checkpoint.

    Write last.pt, log.csv and grids of samples to args.out_dir. A signal returns an exit status."""
    # Data: images, and one embedding per caption from a frozen text encoder
    with common.main_process_first():
        train_set = data.load_dataset(args.data, "train", args.size, args.root)
        batches = data.Batches(train_set, args.batch_size, args.seed, args.device, 1, common.rank(),
                               common.world_size(), rolled=True)
        common.check_writable(args.out_dir)
        test_set = data.load_dataset(args.data, "test", args.size, args.root)
        encoder = common.get_text_encoder("damsm", train_set, args, checkpoint)
        embeddings = common.embed_captions(encoder, train_set)  # (captions, 256)

    # Networks, optimizers, and the average of G that draws the samples
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = build(args.nf, args.size, args.lr_g, args.lr_d, args.device)
    ema = copy.deepcopy(G).eval()
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    step = 0
    history = checkpoint["history"] if checkpoint else []
    if checkpoint:
        step = common.first_step(checkpoint, train_set, batches)
        for name, part in parts.items():
            if name in checkpoint:  # --init has no optimizers
                part.load_state_dict(checkpoint[name])
    # A CUDA graph reads the learning rate from a tensor; torchrun averages the gradients
    common.prepare_adam(opt_g, args.lr_g, args.device)
    common.prepare_adam(opt_d, args.lr_d, args.device)
    common.average_gradients(G, opt_g)
    common.average_gradients(D, opt_d)

    # The same grid after every epoch: one row per caption, one column per noise
    grid_captions = test_set.captions[::len(test_set.captions) // 8 + 1]
    grid_t = encoder.encode(grid_captions).repeat_interleave(8, 0)
    grid_z = sample_noise(8, args.seed).repeat(len(grid_captions), 1)

    def update(images, z, t, t_wrong):
        """Train D, then G, on one batch. Return the losses."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.bf16):
            fake = G(z, t)
            losses = d_step(D, opt_d, images, fake, t, t_wrong, args.ma_gp_weight, args.ma_gp_power)
            losses["loss_g"] = g_step(D, opt_g, fake, t)
        return losses

    # The training loop; a resumed run starts in the middle of its epoch
    update = common.CUDAGraph(update, args.cuda_graph)
    num_steps = args.epochs * len(batches)
    common.announce(args, G, D, train_set, step, num_steps)
    bar = common.TrainingProgress(args, "training", step, num_steps, "--size 64 --nf 16")
    stop = common.GracefulStop()
    last_save = 0
    for epoch in range(step // len(batches), args.epochs):
        losses = common.Means()  # after a resume, of the rest of the epoch
        for _ in range(step % len(batches), len(batches)):
            images, captions, wrong = batches(step)
            t = embeddings[captions[:, 0]]  # (B, 256)
            t_wrong = embeddings[wrong[:, 0]]
            # A resumed run draws the same noise, and each rank its own
            torch.manual_seed(args.seed * data.EPOCH_SEEDS + step)
            noise = torch.randn(common.world_size(), len(t), NZ, device=args.device)
            z = noise[common.rank()]
            losses.add(update(images, z, t, t_wrong))
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
    G = Generator(args["nf"], args["size"])
    G.load_state_dict(checkpoint["ema"])
    G.eval().to(device, memory_format=torch.channels_last)
    encoder = common.text_encoder_from_state_dict(checkpoint["text_encoder"])
    return G, encoder.to(device)


def load_released(args):
    """Return a checkpoint of the authors' state_epoch_*.pth, without its optimizers."""
    try:
        model = torch.load(args.init, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # another file, or none
        raise data.UserError(f"{args.init} is not a state_epoch_*.pth of DF-GAN's authors "
                             f"({str(error)[:99]})")
    nets = {}
    for net in ("netG", "netD", "netC"):
        nets[net] = {name.removeprefix("module."): value for name, value in model[net].items()}
    shapes = {name: x.shape for name, x in Generator(args.nf, args.size).state_dict().items()}
    if {name: x.shape for name, x in nets["netG"].items()} != shapes:
        raise data.UserError(f"{args.init} has other layers than a G of --size {args.size} and "
                             f"--nf {args.nf}; set both flags as in its training")
    released_d = nets["netD"] | nets["netC"]  # has layers that the released code does not use
    D = {name: released_d[name] for name in Discriminator(args.nf, args.size).state_dict()}
    encoder = common.load_text_encoder(args.text_encoder)
    return {"step": 0, "epoch": 0, "history": [], "args": vars(args), "G": nets["netG"], "D": D,
            "ema": nets["netG"], "text_encoder": encoder.state_dict()}


def sample_noise(n, seed=0):
    """Return z (n, 100) from N(0, 1), the same on every device."""
    return torch.randn(n, NZ, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(G, noise, embeddings):
    """Draw images (N, 3, S, S) in [-1, 1] from noise (N, 100) and embeddings (N, 256)."""
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


# ---- Command line

PRESETS = {
    "toy": dict(epochs=15, size=32, nf=16, batch_size=8, lr_g=4e-4, lr_d=1e-3, ema=0.998,
                embedding_rms=5, eval_every=15, fid_samples=1024),
    "folder": dict(size=64, nf=16, batch_size=16, lr_g=2e-4, lr_d=8e-4),  # hundreds of images
    "coco": dict(epochs=120)}  # section 4
RESUME_ARGS = ("data", "size", "nf", "batch_size", "lr_g", "lr_d", "ma_gp_weight", "ma_gp_power",
               "ema", "embedding_rms", "seed")


def main(argv=None):
    parser = argparse.ArgumentParser("dfgan.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=common.positive_int, default=600, help="epochs (section 4)")
    add("--batch-size", type=common.positive_int, default=32, help="images per step (released)")
    add("--size", type=int, choices=SIZES, default=256, help="of the images (section 4)")
    add("--lr-g", type=float, default=LR_G, help="learning rate of G (section 4)")
    add("--lr-d", type=float, default=LR_D, help="learning rate of D (section 4)")
    add("--ma-gp-weight", type=float, default=MA_GP_K, help="k; 0: without MA-GP (section 4)")
    add("--ma-gp-power", type=float, default=MA_GP_P, help="p (section 4)")
    add("--nf", type=common.positive_int, default=NF, help="width of G and D (released)")
    add("--embedding-rms", type=float, default=3,
        help="RMS length of the embeddings of a text encoder trained here")
    add("--init", metavar="FILE",
        help="start from the authors' state_epoch_*.pth; needs --text-encoder")
    common.add_shared_flags(parser)
    common.describe_defaults(parser, PRESETS)

    args = parser.parse_args(argv)
    path = common.find_checkpoint(NAME, args)
    if args.init:
        if not args.text_encoder:
            parser.error("--init needs the text encoder of the same authors: --text-encoder FILE")
        if path and path.name == "last.pt":
            parser.error(f"--init starts a new run, but {path} exists; set another --out-dir")
        path = None  # not a pretrained model of weights/
    args, checkpoint = common.parse_args(NAME, parser, PRESETS, RESUME_ARGS, path, argv)
    if args.init:
        checkpoint = load_released(args)

    if not (args.captions or args.evaluate):
        return train(args, checkpoint)
    if not checkpoint:
        parser.error(f"{args.out_dir}/last.pt does not exist; train first")
    G, encoder = load_generator(checkpoint, args.device)
    if args.captions:
        return sample(G, encoder, args, checkpoint["step"])
    test_set = data.load_dataset(args.data, "test", args.size, args.root)
    evaluate(G, encoder, test_set, args)


if __name__ == "__main__":
    sys.exit(common.run(main) if common else "needs common.py, data.py and requirements.txt")
