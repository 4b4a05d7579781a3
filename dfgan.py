"""DF-GAN: A Simple and Effective Baseline for Text-to-Image Synthesis. Tao, Tang, Wu, Jing, Bao, Xu; CVPR 2022 (arXiv 2008.05865).

One generator draws at full size; noise z and sentence embedding e reach every block of it.
    DFBlock  affine, leaky ReLU, affine, leaky ReLU; the affines' scale and shift come from (z, e)        (section 3.4)
    MA-GP    the gradient of D at real pictures with matching text, with respect to both, is penalised    (section 3.3)
    one-way  D gives one score for picture and text together, none for the picture alone                  (section 3.3)

    python dfgan.py                                              toy data, no download, minutes on a CPU
    python dfgan.py --data cub --epochs 600                      CUB; the same command again continues
    python dfgan.py --data cub --sample "a small yellow bird" "a red bird"      (--truncation 0.88 as in the released evaluation)
    python dfgan.py --data cub --interpolate "a yellow bird" "a blue bird"                 (--noise moves the noise)
    python dfgan.py --data cub --evaluate                        FID, R-precision, diversity, and how they were measured
    python dfgan.py --data cub --init state_epoch_1220.pth --text-encoder text_encoder200.pth       goes on with a released model

Toy: petal colour right in 88 to 90% of samples for held-out captions (three seeds, chance 12%), 8.5 minutes, 2 CPU cores, torch 2.15.
Oxford-102 with --size 64 --nf 16 --batch-size 16 --bf16: 26 epochs in 70 minutes of 1 core, FID 157 at 64 px; it is weights/dfgan.pt.
"""
import math
import os
import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NZ, NE = 100, 256   # noise z; sentence embedding e (DAMSM)


# ---------------------------------------------------------------------------------------------------- networks
# Parameters bear the released names, so that released checkpoints load. B pictures of S x S pixels.

def widths(nf, size):
    """Channels from S x S down to 4 x 4: nf, 2 nf, 4 nf, then 8 nf throughout."""
    return [nf * min(2 ** i, 8) for i in range(int(math.log2(size)) - 1)]


class Affine(nn.Module):
    """gamma(c) * x + beta(c) a channel, gamma and beta two-layer perceptrons of c = (z, e); begins as the identity."""

    def __init__(self, channels):
        super().__init__()
        for name, start in (("fc_gamma", nn.init.ones_), ("fc_beta", nn.init.zeros_)):
            net = nn.Sequential(OrderedDict(linear1=nn.Linear(NZ + NE, channels), relu=nn.ReLU(inplace=True),
                                            linear2=nn.Linear(channels, channels)))
            nn.init.zeros_(net.linear2.weight), start(net.linear2.bias)
            self.add_module(name, net)

    def forward(self, x, c):
        return torch.addcmul(self.fc_beta(c)[:, :, None, None], self.fc_gamma(c)[:, :, None, None], x)


class DFBlock(nn.Module):
    """Affine, leaky ReLU, twice (section 3.4); once for the ablation. Paper's figure: ReLU; released code: leaky, 0.2; we
    follow the code."""

    def __init__(self, channels, fusion="dfblock"):
        super().__init__()
        self.affine0 = Affine(channels)
        self.affine1 = Affine(channels) if fusion == "dfblock" else None

    def forward(self, x, c):
        x = F.leaky_relu(self.affine0(x, c), 0.2, inplace=True)
        return x if self.affine1 is None else F.leaky_relu(self.affine1(x, c), 0.2, inplace=True)


def up_conv(x, conv):
    """conv(nearest upsampling of x by 2) for a 3x3 conv: exactly one transposed convolution, with a quarter of the places and
    4x4 for 3x3 weights, 2.25 times less work. Each of its weights is the sum of those that meet the same pixel of x."""
    if len(x) * x.shape[2] * x.shape[3] < 512:      # so few places that the larger weights cost more (CPU: up to 5 times)
        return conv(F.interpolate(x, scale_factor=2.0))
    weight = F.avg_pool2d(conv.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)         # (out, in, 4, 4)
    return F.conv_transpose2d(x, weight.transpose(0, 1), conv.bias, 2, 1)


class GBlock(nn.Module):
    """(B, cin, s, s) -> (B, cout, 2s, 2s): upsample, then two of (DFBlock, 3x3), with a shortcut.

    The first DFBlock and the shortcut's 1x1 act on each pixel alone: before the upsampling, with a quarter of the pixels,
    they do the same."""

    def __init__(self, cin, cout, fusion):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(cin, cout, 3, 1, 1), nn.Conv2d(cout, cout, 3, 1, 1)
        self.fuse1, self.fuse2 = DFBlock(cin, fusion), DFBlock(cout, fusion)
        self.c_sc = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, c):
        h = up_conv(self.fuse1(x, c), self.c1)                                                  # (B, cout, 2s, 2s)
        return F.interpolate(self.c_sc(x), scale_factor=2.0) + self.c2(self.fuse2(h, c))


class Generator(nn.Module):
    """z (B, 100), e (B, 256) -> pictures (B, 3, S, S) in [-1, 1], S a power of two from 32. Figure 2, left."""

    def __init__(self, nf=32, size=256, fusion="dfblock"):
        super().__init__()
        w = widths(nf, size)[::-1]
        self.fc = nn.Linear(NZ, w[0] * 16)
        self.GBlocks = nn.ModuleList(GBlock(a, b, fusion) for a, b in zip(w, w[1:]))
        self.to_rgb = nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(nf, 3, 3, 1, 1), nn.Tanh())

    def forward(self, z, e):
        c = torch.cat((z, e), 1)                                                                # (B, 356)
        x = self.fc(z).view(len(z), -1, 4, 4)                                                   # (B, 8*nf, 4, 4)
        for block in self.GBlocks:
            x = block(x, c)
        return self.to_rgb(x)                                                                   # (B, nf, S, S) -> (B, 3, S, S)


class DBlock(nn.Module):
    """(B, cin, 2s, 2s) -> (B, cout, s, s): shortcut + gamma * residual, gamma from 0, as released."""

    def __init__(self, cin, cout):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.conv_r = nn.Sequential(nn.Conv2d(cin, cout, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
                                    nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, inplace=True))
        self.conv_s = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        # released code: projects, then pools; a 1x1 of the pooled pixels is the same with a quarter of the work
        h = self.conv_r(x)
        return torch.addcmul(self.conv_s(F.avg_pool2d(x, 2)), self.gamma.to(h.dtype), h)       # a float32 gamma would lift bf16


class Discriminator(nn.Module):
    """features: pictures (B, 3, S, S) -> h (B, 8*nf, 4, 4); score: h, e (B, 256) -> (B,), do they belong together?
    alone: h -> (B,), for the two-way ablation. Figure 2, right."""

    def __init__(self, nf=32, size=256, output="one-way"):
        super().__init__()
        w = widths(nf, size)
        self.conv_img = nn.Conv2d(3, nf, 3, 1, 1)
        self.DBlocks = nn.Sequential(*(DBlock(a, b) for a, b in zip(w, w[1:])))
        head = lambda channels: nn.Sequential(nn.Conv2d(channels, 2 * nf, 3, 1, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
                                              nn.Conv2d(2 * nf, 1, 4, bias=False))
        self.joint_conv = head(8 * nf + NE)
        self.alone_conv = head(8 * nf) if output == "two-way" else None

    def features(self, x):
        if x.shape[-1] < 128:
            return self.DBlocks(self.conv_img(x))
        return self.DBlocks[1:](self.first(x))                                                  # (B, 8*nf, 4, 4)

    def first(self, x):
        """DBlocks[0](conv_img(x)), (B, C, S/2, S/2), without the (B, nf, S, S) between them: with no activation there, two
        convolutions are one, 3x3 and 4x4 a 6x6. A tenth less time for a step at 256 px on a CPU; nothing gained below 128."""
        img, block = self.conv_img, self.DBlocks[0]
        down = block.conv_r[0]
        inner = F.conv2d(x, F.conv_transpose2d(down.weight, img.weight), down.weight.sum((2, 3)) @ img.bias, 2)    # (B, C, S/2-2, S/2-2)
        # at the border the 4x4 sees zeros where the 6x6 would see more of img: the outermost rows and columns one after the other
        rows = down(img(torch.cat((x[:, :, :4], x[:, :, -4:]))))                                # (2B, C, 2, S/2)
        columns = down(img(torch.cat((x[..., :4], x[..., -4:]))))[:, :, 1:-1]                    # (2B, C, S/2-2, 2)
        (top, bottom), (left, right) = rows.chunk(2), columns.chunk(2)
        h = torch.cat((top[:, :, :1], torch.cat((left[..., :1], inner, right[..., 1:]), 3), bottom[:, :, 1:]), 2)
        h = block.conv_r[1:](h)
        pooled = F.conv2d(x, F.avg_pool2d(img.weight, 2, 1, padding=1), img.bias, 2, 1)         # (B, nf, S/2, S/2)
        return torch.addcmul(block.conv_s(pooled), block.gamma.to(h.dtype), h)

    def score(self, h, e):
        return self.joint_conv(torch.cat((h, e[:, :, None, None].expand(-1, -1, 4, 4)), 1)).flatten()

    def alone(self, h):
        return self.alone_conv(h).flatten()


# ---------------------------------------------------------------------------------------------------- losses

def d_hinge(real, wrong, fake):
    """E max(0, 1 - D(x, e)) + [E max(0, 1 + D(x, e')) + E max(0, 1 + D(G(z, e), e))] / 2  (section 3.2)."""
    return F.relu(1 - real).mean() + (F.relu(1 + wrong).mean() + F.relu(1 + fake).mean()) / 2


def g_hinge(fake):
    """-E D(G(z, e), e)  (section 3.2)."""
    return -fake.mean()


def ma_gp(*grads, k=2, p=6):
    """MA-GP (section 3.3), from the gradients of D(x, e) with respect to x and e, a row a pair.

    Paper: k E (|grad_x| + |grad_e|)^p; released code: k E (|grad_x|^2 + |grad_e|^2)^(p/2), the norm of both together; we
    follow the code, which gave every published number. float32: a sixth power. s ** 3: sqrt(s) ** 6 has no gradient at 0."""
    s = sum(grad.float().square().flatten(1).sum(1) for grad in grads)                         # (B,)
    return k * (s ** (p / 2)).mean()


def d_loss(D, real, wrong, fake, e, penalty="ma"):
    """All that D minimises, and D(real), D(wrong), D(fake), MA-GP beside it: (5,). One graph for torch.compile, which cannot
    take the gradient of a gradient through torch.autograd.grad, but can through torch.func.grad.

    real, fake (B, 3, S, S), e (B, 256); wrong (B, 256), sentences that do not fit real: those of the batch moved by one, as
    released (one may fit by chance), which costs D's head alone. penalty: "ma"; "real", of pictures alone; "none"."""
    def score(x, e):
        h = D.features(x)
        s = D.score(h, e)
        return s.sum(), (h, s)

    if penalty == "none":
        h, s_real = score(real, e)[1]
        gp = s_real.new_zeros(())
    else:
        grads, (h, s_real) = torch.func.grad(score, (0, 1) if penalty == "ma" else (0,), has_aux=True)(real, e)
        gp = ma_gp(*grads)
    s_wrong, h_fake = D.score(h, wrong), D.features(fake)
    s_fake = D.score(h_fake, e)
    loss = d_hinge(s_real, s_wrong, s_fake) + gp
    if D.alone_conv is not None:      # two-way: D also judges pictures alone; the penalty stays with the joint score
        loss = loss + F.relu(1 - D.alone(h)).mean() + F.relu(1 + D.alone(h_fake)).mean()
    return loss, torch.stack([v.detach().float() for v in (loss, s_real.mean(), s_wrong.mean(), s_fake.mean(), gp)])


def g_loss(D, fake, e):
    """All that G minimises. fake (B, 3, S, S) = G(z, e)."""
    h = D.features(fake)
    loss = g_hinge(D.score(h, e))
    return loss if D.alone_conv is None else loss + g_hinge(D.alone(h))


# ---------------------------------------------------------------------------------------------------- steps

def d_step(D, opt_d, real, wrong, fake, e, penalty="ma", loss_of=d_loss):
    """Minimise d_loss over D. real, fake (B, 3, S, S), e (B, 256), wrong (B, 256), e.g. e.roll(1, 0). loss_of: d_loss, or d_loss compiled."""
    loss, seen = loss_of(D, real, wrong, fake.detach(), e, penalty)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    return seen      # loss, D(real), D(wrong), D(fake), MA-GP: a D that ignores its text shows in D(wrong)


def g_step(D, opt_g, fake, e, loss_of=g_loss):
    """Minimise g_loss over G. fake = G(z, e) with its graph, the one that D has just learned from."""
    D.requires_grad_(False)      # it needs none; and autocast then leaves alone the bf16 weights that it kept from before D's step
    loss = loss_of(D, fake, e)
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()


def make(nf=32, size=256, lr_g=1e-4, lr_d=4e-4, device="cpu", output="one-way", fusion="dfblock"):
    """G, D and their optimisers: Adam, betas (0.0, 0.9), 1e-4 and 4e-4 (section 4)."""
    G, D = (net.to(device, memory_format=torch.channels_last)
            for net in (Generator(nf, size, fusion), Discriminator(nf, size, output)))
    return G, D, *(torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.9)) for net, lr in ((G, lr_g), (D, lr_d)))


# ---------------------------------------------------------------------------------------------------- train

def train(args, state):
    import common
    import data
    dataset, unseen, encoder, note, sentences = common.prepare(args, state, "damsm", args.size)     # sentences (captions, 256)
    number, among = common.processes()
    torch.set_float32_matmul_precision("high")
    batches = data.Batches(dataset, args.batch_size, args.seed, args.device, wrong="previous", part=(number, among))
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = make(args.nf, args.size, args.lr_g, args.lr_d, args.device, args.output, args.fusion)
    common.share((G, D), (opt_g, opt_d), args.batch_size)
    ema = AveragedModel(G, use_buffers=True)
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    step, rows, total = 0, [], torch.zeros(6, device=args.device)
    if state:
        step, rows, total = common.resume(args, state, parts, dataset)

    # the fixed grid: unseen captions down, noises across, so that an ignored caption or noise is seen at once
    side = 8 if args.size <= 128 else 4
    watch = common.watch(args, unseen, encoder)
    shown = [unseen.captions[unseen.first[i]] for i in torch.linspace(0, len(unseen) - 1, side).long()]
    grid = noise(side, args.seed).repeat(side, 1).to(args.device), encoder.encode(shown).repeat_interleave(side, 0)

    def paint(e, seed):
        return draw(ema, noise(len(e), seed).to(args.device), e)

    def keep(name="last.pt"):
        common.save(args.run / name, {
            "kind": "dfgan", "args": common.plain(args), "step": step, "rows": rows, "total": total, "random": common.random_state(),
            "pictures": dataset.key, "text_note": note, "text_encoder": encoder.state_dict(),
            **{name: part.state_dict() for name, part in parts.items()}})

    def one_step(G, d_loss, g_loss):     # the functions themselves, or torch.compile of them
        real, wrong, captions, _ = batches(step)
        e, wrong = sentences[captions[:, 0]], sentences[wrong[:, 0]]
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            # one G(z, e) serves both steps, as released
            fake = G(torch.randn(among, len(e), NZ, device=args.device)[number], e)
            of_d = d_step(D, opt_d, real, wrong, fake, e, args.penalty, d_loss)
            return torch.cat((g_step(D, opt_g, fake, e, g_loss)[None], of_d))

    print(f"dfgan on {args.data}: {len(dataset)} pictures at {args.size} px, nf {args.nf}, batch {args.batch_size}, "
          f"{args.epochs} epochs of {len(batches)} steps, {args.device}, in {args.run}")
    count, last = args.batch_size, max(args.epochs * len(batches), step)
    functions = G, d_loss, g_loss
    if args.compile and step < last:
        functions = common.compiled(functions, one_step, parts)
    with common.Stop() as stop, data.Progress(last * count, "", done=step * count) as bar:
        while not stop.asked() and step < last:
            epoch = step // len(batches)
            total += common.mean(one_step(*functions))
            # a decay of (1 + t) / (10 + t), up to ema: else G's first weights blur its average for epochs
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            ema.update_parameters(G)
            step += 1
            ended = step % len(batches) == 0
            if ended or stop.code or step % 10 == 0:
                now = (total / (step % len(batches) or len(batches))).tolist()
                common.finite(now[:2], step, args.run)
                bar.note = "G {:.2f} D {:.2f}  D(real) {:.2f} D(wrong) {:.2f} D(fake) {:.2f} MA-GP {:.3f}".format(*now)
            bar.label = f"epoch {epoch + 1}/{args.epochs}"
            bar.step(count)
            if ended:
                rows.append(dict(epoch=epoch + 1, step=step, **{k: round(v, 4) for k, v in zip(
                    ("loss_g", "loss_d", "d_real", "d_wrong", "d_fake", "ma_gp"), now)}, **watch(epoch + 1, paint)))
                total.zero_()
                common.epoch_done(args.run, rows, keep, f"epoch_{epoch + 1:04}.png", draw(ema, *grid), side, shown)
                if step < last:
                    bar.show()
        if stop.code:
            keep()
            print(f"saved {args.run / 'last.pt'} at step {step}; the same command continues", file=sys.stderr)
            return stop.code
    print(f"{step // len(batches)} epochs done: {args.run / 'last.pt'}, grids beside it; more with --epochs")
    if unseen.traits:
        common.traits_follow(unseen, encoder, paint)
    return 0


def noise(n, seed, truncation=None):
    """z (n, 100) from N(0, 1); truncation: from N(0, 1) cut at +-2, times truncation (0.88 in the released evaluation)."""
    rng = torch.Generator().manual_seed(seed)
    if truncation is None:
        return torch.randn(n, NZ, generator=rng)
    return truncation * nn.init.trunc_normal_(torch.empty(n, NZ), a=-2, b=2, generator=rng)


@torch.no_grad()
def draw(G, z, e, batch=16):
    """G in eval mode, in bounded memory: z (N, 100), e (N, 256) -> (N, 3, S, S) in [-1, 1] on the CPU."""
    G.eval()
    return torch.cat([G(*pair).float().cpu() for pair in zip(z.split(batch), e.split(batch))])


# ---------------------------------------------------------------------------------------------------- sample

def released(flags):
    """A checkpoint of ours, at step 0, from --init: {"model": {netG, netD, netC}, "optimizers": {optimizer_G, optimizer_D}},
    the layout of the released state_epoch_*.pth. flags: as given; width and size are the file's."""
    import common
    import data
    if not flags.text_encoder:
        raise common.UserError("--init needs the DAMSM encoder that the model was trained with: add --text-encoder text_encoder200.pth")
    torch.manual_seed(flags.seed)
    try:
        file = common.tensors(flags.init)
        g, d, c = ({name.removeprefix("module."): value for name, value in file["model"][net].items()} for net in ("netG", "netD", "netC"))
        own = {"nf": len(g["fc.weight"]) // 128, "size": 4 * 2 ** len({name.split(".")[1] for name in g if name.startswith("GBlocks.")}),
               "output": "one-way", "fusion": "dfblock"}
        G, D, opt_g, opt_d = make(own["nf"], own["size"], flags.lr_g, flags.lr_d)
        for net, weights, opt, saved in ((G, g, opt_g, "optimizer_G"), (D, d | c, opt_d, "optimizer_D")):
            # conv_s of equal widths lies in the file too, used nowhere; Adam numbers its moments in the file's order
            net.load_state_dict({name: weights[name] for name in net.state_dict()})
            moments, number = file["optimizers"][saved]["state"], {name: i for i, name in enumerate(weights)}
            state = {i: moments[number[name]] for i, (name, _) in enumerate(net.named_parameters())}
            if any(state[i]["exp_avg"].shape != p.shape for i, p in enumerate(net.parameters())):
                raise ValueError("moments of other parameters")
            opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
        about = f"{flags.init}, epoch {file['epoch']}"
    except FileNotFoundError:
        raise common.UserError(f"{flags.init} does not exist; --init takes a released state_epoch_*.pth") from None
    except Exception:     # whatever a damaged or other file makes of torch and the layers
        raise common.UserError(f"{flags.init} is no released DF-GAN checkpoint, or is damaged; --init takes a state_epoch_*.pth") from None
    encoder, note = common.text_encoder("damsm", flags.data, flags.root, "cpu", flags.text_encoder)
    print(f"G and D: {about}, nf {own['nf']}, {own['size']} px")
    return {"kind": "dfgan", "args": {**common.plain(flags), **own, "data": data.source(flags.data)}, "step": 0, "rows": [], "total": torch.zeros(6),
            "random": common.random_state(), "pictures": None, "text_note": note, "text_encoder": encoder.state_dict(),
            "G": G.state_dict(), "D": D.state_dict(), "ema": AveragedModel(G, use_buffers=True).state_dict(),
            "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict()}


def finished(state, device="cpu"):
    """The EMA generator and the text encoder of a checkpoint; prints where they come from."""
    import common
    begun = f"begun with {state['args']['init']}, " if state["args"]["init"] else ""
    print(f"{begun}trained on {state['args']['data']}, {state['step']} steps; text encoder: {state['text_note']}")
    G = AveragedModel(Generator(state["args"]["nf"], state["args"]["size"], state["args"]["fusion"]), use_buffers=True)
    G.load_state_dict(state["ema"])
    return G.to(device, memory_format=torch.channels_last).eval(), common.rebuild(state["text_encoder"]).to(device)


def sample(args, state):
    """A grid with one row a caption; the columns share their noise. --images: as many files for each caption instead."""
    import common
    G, encoder = finished(state, args.device)
    e = encoder.ask(args.sample)
    if args.images:
        # noise of 64 always: a shorter draw has other numbers
        common.save_images(args.run, args.sample, args.images, args.seed, lambda i, seed, n: draw(
            G, noise(64, seed, args.truncation)[:n].to(args.device), e[i].expand(n, -1)))
        return
    z = noise(args.columns, args.seed, args.truncation).repeat(len(e), 1).to(args.device)
    print(common.save_grid(args.run / f"sample-{common.slug(args.sample)}-{args.seed}.png",
                           draw(G, z, e.repeat_interleave(args.columns, 0)), args.columns, args.sample))


def interpolate(args, state):
    """Sentence A to B over the columns, each row one noise; --noise: noise to noise, a row for each of the sentences."""
    import common
    G, encoder = finished(state, args.device)
    a, b = encoder.ask(args.interpolate)
    way = torch.linspace(0, 1, args.columns, device=a.device)[:, None]
    if args.noise:
        z0, z1 = noise(2, args.seed, args.truncation).to(a.device)
        z, e = torch.lerp(z0, z1, way).repeat(2, 1), torch.stack((a, b)).repeat_interleave(args.columns, 0)
    else:
        z = noise(4, args.seed, args.truncation).to(a.device).repeat_interleave(args.columns, 0)
        e = torch.lerp(a, b, way).repeat(4, 1)
    kind = "noise" if args.noise else "sentence"
    print(common.save_grid(args.run / f"{kind}-{common.slug(args.interpolate)}-{args.seed}.png", draw(G, z, e), args.columns,
                           args.interpolate))


def evaluate(args, state):
    """FID, R-precision and diversity; common.evaluate prints how they are measured."""
    import common
    G, encoder = finished(state, args.device)
    D = Discriminator(state["args"]["nf"], state["args"]["size"], state["args"]["output"])
    count = lambda net: sum(p.numel() for p in net.parameters())
    common.evaluate(args, state, encoder, state["args"]["size"],
                    lambda e, seed: draw(G, noise(len(e), seed, args.truncation).to(args.device), e),
                    truncation=args.truncation, parameters_G=count(G), parameters_D=count(D))


# ---------------------------------------------------------------------------------------------------- command line

TOY = dict(epochs=18, size=64, nf=8, batch_size=16, lr_g=2e-4, ema=0.99)      # so that a CPU is enough
FIXED = ("data", "size", "nf", "batch_size", "lr_g", "lr_d", "ema", "output", "penalty", "fusion", "seed", "text_encoder", "init")


def main(argv=None):
    import common
    from common import number
    p, g, s = common.parser("dfgan", __doc__, TOY)
    g.add_argument("--epochs", type=number(int, 1), metavar="N", default=600, help="default: 600 (section 4, CUB; COCO 120)")
    g.add_argument("--batch-size", type=number(int, 2), metavar="N", default=32, help="default: 32 (released code)")
    g.add_argument("--size", type=int, choices=[32, 64, 128, 256, 512], default=256, help="pixels (default: 256, section 4)")
    g.add_argument("--nf", type=number(int, 1), metavar="N", default=32, help="width of G and D (default: 32, released code; paper: 64)")
    g.add_argument("--lr-g", type=number(float, 0, 1), metavar="X", default=1e-4, help="default: 0.0001 (section 4)")
    g.add_argument("--lr-d", type=number(float, 0, 1), metavar="X", default=4e-4, help="default: 0.0004 (section 4)")
    g.add_argument("--output", choices=["one-way", "two-way"], default="one-way", help="ablation of D's output (default: one-way)")
    g.add_argument("--penalty", choices=["ma", "real", "none"], default="ma",
                   help="ablation of MA-GP: on pictures and text, on pictures alone, none (default: ma)")
    g.add_argument("--fusion", choices=["dfblock", "affine"], default="dfblock", help="ablation: one affine a DFBlock (default: dfblock, two)")
    g.add_argument("--init", metavar="FILE", type=os.path.realpath, help="begin with a released state_epoch_*.pth; needs --text-encoder")
    s.add_argument("--truncation", type=number(float, 0, 10), metavar="T",
                   help="T times noise cut at +-2 (released evaluation: 0.88; default: N(0, 1), as in training)")
    args, state = common.parse(p, TOY, FIXED, argv, begin=released)
    if args.truncation is not None and not (args.sample or args.interpolate or args.evaluate):
        raise common.UserError("--truncation says how to draw; add --sample, --interpolate or --evaluate")
    does = sample if args.sample else interpolate if args.interpolate else evaluate if args.evaluate else train
    return does(args, state)


if __name__ == "__main__":
    from common import guard
    sys.exit(guard(main))
