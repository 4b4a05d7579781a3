"""Generative Adversarial Text to Image Synthesis. Reed, Akata, Yan, Logeswaran, Schiele, Lee; ICML 2016 (arXiv 1605.05396).

G draws a picture from noise z and a sentence embedding t; D sees a picture and t and says whether they belong together.
    GAN-CLS  D also sees real pictures with a sentence that does not fit: "real, but wrong" counts as fake   (Algorithm 1)
    GAN-INT  G also learns at points halfway between two sentences, which no caption describes               (eq. 5)
    style    S recovers z from G(z, t); G(S(photo), t) then draws t with the pose and background of a photo   (4.4)

    python gan_cls.py                                            toy data, no download, minutes on a CPU
    python gan_cls.py --data flowers                             Oxford-102; the same command again continues
    python gan_cls.py --data flowers --sample "pink flower" "a white flower with a yellow centre"
    python gan_cls.py --data flowers --interpolate "a pink flower" "a yellow flower"       (--noise moves the noise)
    python gan_cls.py --data flowers --evaluate                  FID, R-precision, diversity, and how they were measured
    python gan_cls.py --data flowers --style photo.jpg --sample "pink flower"

Toy: petal colour right in 93 to 96% of samples for held-out captions (three seeds, chance 12%), 4 minutes, 2 CPU cores, torch 2.15.
Oxford-102: weights/gan_cls.pt, about 65 minutes of one core, FID 183.8 of 3,000 pictures at 64 px; see weights/README.md.
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

SIZE, NZ, NT, TEXT = 64, 100, 128, 1024   # picture; noise z; projected text (section 5); sentence embedding (char-CNN-RNN)


# ---------------------------------------------------------------------------------------------------- networks

class Residual(nn.Module):
    """x + a bottleneck of x. Not in Figure 2; released code: after 4x4 and 8x8 in G and after 4x4 in D; we follow the code.
    (Its first commits name a missing variable there in D, so that D ran without; later ones have the block.)"""

    def __init__(self, channels, hidden, act):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act,
            nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden), act,
            nn.Conv2d(hidden, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.act = act

    def forward(self, x):
        return self.act(x + self.body(x))


def init(module):
    """As released: convolutions N(0, 0.02), batch norm N(1, 0.02). Convolutions have no bias: the code zeroes it every step."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Generator(nn.Module):
    """z (B, 100), t (B, 1024) -> pictures (B, 3, 64, 64) in [-1, 1]. Figure 2, left."""

    def __init__(self, ngf=128):
        super().__init__()
        up = lambda a, b: nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)
        act = nn.ReLU(inplace=True)
        self.text = nn.Sequential(nn.Linear(TEXT, NT), nn.LeakyReLU(0.2))                       # no batch norm, unlike D's
        self.net = nn.Sequential(
            nn.ConvTranspose2d(NZ + NT, 8 * ngf, 4, bias=False), nn.BatchNorm2d(8 * ngf),
            Residual(8 * ngf, 2 * ngf, act),                                                    # (B, 8*ngf, 4, 4)
            up(8 * ngf, 4 * ngf), nn.BatchNorm2d(4 * ngf), Residual(4 * ngf, ngf, act),         # (B, 4*ngf, 8, 8)
            up(4 * ngf, 2 * ngf), nn.BatchNorm2d(2 * ngf), act,                                 # (B, 2*ngf, 16, 16)
            up(2 * ngf, ngf), nn.BatchNorm2d(ngf), act,                                         # (B, ngf, 32, 32)
            up(ngf, 3), nn.Tanh())                                                              # (B, 3, 64, 64)
        self.apply(init)

    def forward(self, z, t):
        return self.net(torch.cat((z, self.text(t)), 1)[:, :, None, None])


def trunk(ndf):
    """Pictures (B, 3, 64, 64) -> (B, 8*ndf, 4, 4). Two of the batch norms have no activation, as in the released code."""
    down = lambda a, b: nn.Conv2d(a, b, 4, 2, 1, bias=False)
    act = nn.LeakyReLU(0.2, inplace=True)
    return nn.Sequential(
        down(3, ndf), act,                                                                      # (B, ndf, 32, 32)
        down(ndf, 2 * ndf), nn.BatchNorm2d(2 * ndf), act,                                       # (B, 2*ndf, 16, 16)
        down(2 * ndf, 4 * ndf), nn.BatchNorm2d(4 * ndf),                                        # (B, 4*ndf, 8, 8)
        down(4 * ndf, 8 * ndf), nn.BatchNorm2d(8 * ndf), Residual(8 * ndf, 2 * ndf, act))       # (B, 8*ndf, 4, 4)


class Discriminator(nn.Module):
    """Pictures (B, 3, 64, 64), t (B, 1024) -> logits (B,): do they belong together? Figure 2, right."""

    def __init__(self, ndf=64):
        super().__init__()
        act = nn.LeakyReLU(0.2, inplace=True)
        self.image = trunk(ndf)
        self.text = nn.Sequential(nn.Linear(TEXT, NT), nn.BatchNorm1d(NT), act)
        self.joint = nn.Sequential(nn.Conv2d(8 * ndf + NT, 8 * ndf, 1, bias=False), nn.BatchNorm2d(8 * ndf), act,
                                   nn.Conv2d(8 * ndf, 1, 4, bias=False))
        self.apply(init)

    def forward(self, x, t):
        t = self.text(t)[:, :, None, None].expand(-1, -1, 4, 4)      # the text at each of the 4x4 places
        return self.joint(torch.cat((self.image(x), t), 1)).flatten()


class StyleEncoder(nn.Sequential):
    """S, section 4.4: pictures (B, 3, 64, 64) -> z (B, 100). The paper gives no layers; D's trunk is used."""

    def __init__(self, ndf=64):
        super().__init__(trunk(ndf), nn.Flatten(), nn.Linear(8 * ndf * 16, NZ))
        self.apply(init)


# ---------------------------------------------------------------------------------------------------- losses
# Logits and softplus: -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s), finite for any s.

def d_loss(real, wrong, fake):
    """-log D(x, t) - [log(1 - D(x', t)) + log(1 - D(G(z, t), t))] / 2  (Algorithm 1, line 10); wrong None: the plain GAN."""
    fake = F.softplus(fake).mean()
    return F.softplus(-real).mean() + (fake if wrong is None else (F.softplus(wrong).mean() + fake) / 2)


def g_loss(fake):
    """-log D(G(z, t), t)  (Algorithm 1, line 12)."""
    return F.softplus(-fake).mean()


def style_loss(S, z, fake):
    """|| z - S(G(z, t)) ||^2  (eq. 6)."""
    return (z - S(fake)).square().sum(1).mean()


def halfway(t):
    """b t1 + (1 - b) t2 with b = 1/2, of the first half of a batch with the second (eq. 5): (B, D) -> (B // 2, D)."""
    half = len(t) // 2
    return (t[:half] + t[half:2 * half]) / 2


# ---------------------------------------------------------------------------------------------------- steps

def d_step(D, opt_d, real, wrong, fake, t):
    """Minimise d_loss over D. real, wrong, fake (B, 3, 64, 64), t (B, 1024); wrong None: GAN without CLS.

    The wrong pair: Algorithm 1 keeps the picture and takes another text; released code: keeps the text and takes a real
    picture of another class. We follow the code; either is a real picture with a text that does not fit."""
    s_real, s_fake = D(real, t), D(fake.detach(), t)
    s_wrong = None if wrong is None else D(wrong, t)
    loss = d_loss(s_real, s_wrong, s_fake)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    seen = [torch.full_like(loss, math.nan) if s is None else s.float().sigmoid().mean() for s in (s_real, s_wrong, s_fake)]
    return torch.stack([loss, *seen]).detach()      # and D(real), D(wrong), D(fake): a D that ignores its text shows in D(wrong)


def g_step(D, opt_g, fake, t):
    """Minimise g_loss over G. fake = G(z, t) with its graph, drawn before D's step, scored by the D of after it, as in the released
    code (Algorithm 1 takes the score of before). For GAN-INT t also holds `halfway` points: D scores those here and never trains
    on them; each weighs as a text does (released code), half as many as texts."""
    D.requires_grad_(False)      # it needs none; and autocast then leaves alone the bf16 weights that it kept from before D's step
    loss = g_loss(D(fake, t))
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()


def make(ngf=128, ndf=64, lr=2e-4, device="cpu"):
    """G, D and their optimisers: Adam 2e-4, betas (0.5, 0.999), section 5."""
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (Generator(ngf), Discriminator(ndf)))
    return G, D, *(torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.999)) for net in (G, D))


# ---------------------------------------------------------------------------------------------------- train

def train(args, state):
    import common
    import data
    cls, mix = "cls" in args.variant, "int" in args.variant
    dataset, unseen, encoder, note, sentences = common.prepare(args, state, "char-cnn-rnn", SIZE)   # sentences (captions, 1024)
    number, among = common.processes()
    torch.set_float32_matmul_precision("high")
    # an epoch is each picture once, in random order; released code: draws a class, then a picture of it
    batches = data.Batches(dataset, args.batch_size, args.seed, args.device, args.captions_per_image, "image" if cls else None,
                           (number, among))
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = make(args.ngf, args.ndf, args.lr, args.device)
    common.share((G, D), (opt_g, opt_d), args.batch_size)
    ema = AveragedModel(G, use_buffers=True)
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    step, rows, total = 0, [], torch.zeros(5, device=args.device)
    if state:
        step, rows, total = common.resume(args, state, parts, dataset)

    # the fixed grid: unseen captions down, noises across, so that an ignored caption or noise is seen at once
    watch = common.watch(args, unseen, encoder)
    shown = [unseen.captions[unseen.first[i]] for i in torch.linspace(0, len(unseen) - 1, 8).long()]
    grid = noise(8, args.seed).repeat(8, 1).to(args.device), encoder.encode(shown).repeat_interleave(8, 0)

    def paint(t, seed):
        return draw(ema, noise(len(t), seed).to(args.device), t)

    def keep(name="last.pt"):
        common.save(args.run / name, {
            "kind": "gan_cls", "args": common.plain(args), "step": step, "rows": rows, "total": total, "random": common.random_state(),
            "pictures": dataset.key, "text_note": note, "text_encoder": encoder.state_dict(),
            **{name: part.state_dict() for name, part in parts.items()}})

    def one_step(G, D):      # the networks, or torch.compile of them
        real, wrong, captions, _ = batches(step)
        # released code: the mean of 4 captions' embeddings (the flowers net offered for download: of 1); paper: 1; default: 4
        t = sentences[captions].mean(1)
        t_g = torch.cat((t, halfway(t))) if mix else t
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            # one G(z, t) serves both steps, as in Algorithm 1; released code: draws anew for G's step
            fake = G(torch.randn(among, len(t_g), NZ, device=args.device)[number], t_g)
            of_d = d_step(D, opt_d, real, wrong, fake[:len(t)], t)
            return torch.cat((g_step(D, opt_g, fake, t_g)[None], of_d))

    print(f"gan_cls on {args.data}: {len(dataset)} pictures, {args.variant}, ngf {args.ngf}, ndf {args.ndf}, batch {args.batch_size}, "
          f"{args.epochs} epochs of {len(batches)} steps, {args.device}, in {args.run}")
    count, last = args.batch_size, max(args.epochs * len(batches), step)
    functions = common.compiled((G, D), one_step, parts) if args.compile and step < last else (G, D)
    with common.Stop() as stop, data.Progress(last * count, "", done=step * count) as bar:
        while not stop.asked() and step < last:
            epoch = step // len(batches)
            for group in (*opt_g.param_groups, *opt_d.param_groups):
                group["lr"] = args.lr * 0.5 ** (epoch // 100)                                   # halved every 100 epochs
            total += common.mean(one_step(*functions))
            # a decay of (1 + t) / (10 + t), up to ema: else G's first weights blur its average for epochs
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            ema.update_parameters(G)
            step += 1
            ended = step % len(batches) == 0
            if ended or stop.code or step % 10 == 0:
                now = (total / (step % len(batches) or len(batches))).tolist()
                common.finite(now[:2], step, args.run)
                bar.note = "G {:.2f} D {:.2f}  D(real) {:.2f} D(wrong) {:.2f} D(fake) {:.2f}".format(*now)
            bar.label = f"epoch {epoch + 1}/{args.epochs}"
            bar.step(count)
            if ended:
                rows.append(dict(epoch=epoch + 1, step=step, **{k: round(v, 4) for k, v in zip(
                    ("loss_g", "loss_d", "d_real", "d_wrong", "d_fake"), now)}, **watch(epoch + 1, paint)))
                total.zero_()
                common.epoch_done(args.run, rows, keep, f"epoch_{epoch + 1:04}.png", draw(ema, *grid), 8, shown)
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


def noise(n, seed):
    """z (n, 100) from N(0, 1), drawn on the CPU: the same on every device."""
    return torch.randn(n, NZ, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(G, z, t, batch=64):
    """G in eval mode, in bounded memory: z (N, 100), t (N, 1024) -> (N, 3, 64, 64) in [-1, 1] on the CPU."""
    G.eval()
    return torch.cat([G(*pair).float().cpu() for pair in zip(z.split(batch), t.split(batch))])


# ---------------------------------------------------------------------------------------------------- sample

def finished(state, device="cpu"):
    """The EMA generator and the text encoder of a checkpoint; prints where they come from."""
    import common
    print(f"trained on {state['args']['data']}, {state['step']} steps; text encoder: {state['text_note']}")
    G = AveragedModel(Generator(state["args"]["ngf"]), use_buffers=True)
    G.load_state_dict(state["ema"])
    return G.to(device, memory_format=torch.channels_last).eval(), common.rebuild(state["text_encoder"]).to(device)


def sample(args, state):
    """A grid with one row a caption; the columns share their noise. --images: as many files for each caption instead."""
    import common
    G, encoder = finished(state, args.device)
    t = encoder.ask(args.sample)
    if args.images:
        # noise of 64 always: a shorter draw has other numbers
        common.save_images(args.run, args.sample, args.images, args.seed, lambda i, seed, n: draw(
            G, noise(64, seed)[:n].to(args.device), t[i].expand(n, -1)))
        return
    z = noise(args.columns, args.seed).repeat(len(t), 1).to(args.device)
    print(common.save_grid(args.run / f"sample-{common.slug(args.sample)}-{args.seed}.png",
                           draw(G, z, t.repeat_interleave(args.columns, 0)), args.columns, args.sample))


def interpolate(args, state):
    """Sentence A to B over the columns, each row one noise; --noise: noise to noise, a row for each of the sentences."""
    import common
    G, encoder = finished(state, args.device)
    a, b = encoder.ask(args.interpolate)
    way = torch.linspace(0, 1, args.columns, device=a.device)[:, None]
    if args.noise:
        z0, z1 = noise(2, args.seed).to(a.device)
        z, t = torch.lerp(z0, z1, way).repeat(2, 1), torch.stack((a, b)).repeat_interleave(args.columns, 0)
    else:
        z, t = noise(4, args.seed).to(a.device).repeat_interleave(args.columns, 0), torch.lerp(a, b, way).repeat(4, 1)
    kind = "noise" if args.noise else "sentence"
    print(common.save_grid(args.run / f"{kind}-{common.slug(args.interpolate)}-{args.seed}.png", draw(G, z, t), args.columns,
                           args.interpolate))


def evaluate(args, state):
    """FID, R-precision and diversity, as common.evaluate prints how, and the style encoder's ROC AUC."""
    import common
    G, encoder = finished(state, args.device)
    count = lambda net: sum(p.numel() for p in net.parameters())
    common.evaluate(args, state, encoder, SIZE, lambda t, seed: draw(G, noise(len(t), seed).to(args.device), t),
                    style=lambda: style_encoder(args, G, encoder, state)[1], parameters_G=count(G),
                    parameters_D=count(Discriminator(state["args"]["ndf"])))


# ---------------------------------------------------------------------------------------------------- style transfer

def style_encoder(args, G, encoder, state):
    """S of a finished G, trained now if need be, and reported by the paper's measure of disentangling."""
    import hashlib
    import common
    import data
    path = args.run / "style.pt"
    torch.manual_seed(0)             # S depends on G and the steps alone: --seed is the noise's here
    S = StyleEncoder(state["args"]["ndf"]).to(args.device, memory_format=torch.channels_last)
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in G.parameters())
    mark = [args.style_steps, hashlib.sha256(weights).hexdigest()]                               # another G needs another S
    if path.exists() and (done := common.load(path, "gan_cls style"))["mark"] == mark:
        S.load_state_dict(done["S"])
        print(done["note"])
        return S.eval(), done["note"]
    dataset, unseen = (data.load(state["args"]["data"], split, SIZE, args.root) for split in ("train", "test"))
    sentences, opt = common.embeddings(encoder, dataset), torch.optim.Adam(S.parameters(), 2e-4, betas=(0.5, 0.999))
    with data.Progress(args.style_steps * 64, "style encoder") as bar:
        for step in range(args.style_steps):
            z, t = torch.randn(64, NZ, device=args.device), sentences[torch.randint(len(sentences), (64,), device=args.device)]
            with torch.no_grad():
                fake = G(z, t)
            loss = style_loss(S, z, fake)
            opt.zero_grad()
            loss.backward()
            opt.step()
            bar.step(64, f"loss {loss.item() / NZ:.3f} a dimension" if step % 10 == 0 else None)
    note = style_report(S.eval(), G, sentences, unseen, args.device)
    common.save(path, {"kind": "gan_cls style", "S": S.state_dict(), "mark": mark, "note": note})
    print(note)
    return S, note


@torch.no_grad()
def style_report(S, G, sentences, unseen, device):
    """ROC AUC of the cosine of S over same-style against different-style pairs (section 5.2), on drawn pictures, where
    the style is known to be z, and on unseen real ones, whose style is the k-means cluster of their background colour."""
    rng = torch.Generator().manual_seed(0)
    z, pick = noise(1000, 0).to(device), torch.randint(len(sentences), (2, 1000), generator=rng)
    a, b = (S(draw(G, z, sentences[i.to(device)]).to(device)) for i in pick)
    drawn = auc(F.cosine_similarity(a, b), F.cosine_similarity(a, b.roll(1, 0)))
    images = unseen.centre(torch.arange(min(len(unseen), 2000)))
    s = F.normalize(torch.cat([S(x.to(device)) for x in images.split(64)]).cpu())
    inside = F.pad(torch.zeros(SIZE - 12, SIZE - 12, dtype=torch.bool), (6, 6, 6, 6), value=True)
    border = images[..., inside].mean(2)                                                        # (N, 3), outer 6 pixels
    centres = border[torch.randperm(len(border), generator=rng)[:min(100, len(border) // 10 + 1)]]  # paper: 100 clusters
    for _ in range(20):
        cluster = torch.cdist(border, centres).argmin(1)
        member = F.one_hot(cluster, len(centres)).float()
        centres = torch.where(member.sum(0)[:, None] > 0, member.T @ border / member.sum(0)[:, None].clamp(min=1), centres)
    pair = torch.triu_indices(len(s), len(s), 1)
    same, cosine = cluster[pair[0]] == cluster[pair[1]], (s @ s.T)[pair[0], pair[1]]
    real = f"{auc(cosine[same], cosine[~same]):.3f}" if 0 < same.sum() < len(same) else "not measurable,"
    return f"style encoder, ROC AUC of same against different style: {drawn:.3f} drawn (same z), {real} real (background colour)"


def auc(positive, negative):
    """P(positive > negative), ties counting half: the area under the ROC curve, by ranks."""
    negative = negative.sort().values
    below, upto = (torch.searchsorted(negative, positive.contiguous(), right=r) for r in (False, True))
    return ((below + upto).double() / 2 / len(negative)).mean().item()


def style_transfer(args, state):
    """G(S(photo), t): the photo's pose and background with each caption's content. The photo first in its row."""
    import common
    import data
    from pathlib import Path
    array = data.decode(data.Picture(Path(args.style), [], 0), SIZE)
    if array is None:
        raise common.UserError(f"{args.style} is no picture that can be read; --style takes a photo")
    G, encoder = finished(state, args.device)
    t = encoder.ask(args.sample)
    photo = torch.from_numpy(array.copy())[None].float() / 127.5 - 1
    S, _ = style_encoder(args, G, encoder, state)
    with torch.no_grad():
        z = S(photo.to(args.device)).expand(len(t), -1)
    print(common.save_grid(args.run / f"style-{Path(args.style).stem}-{common.slug(args.sample)}.png",
                           torch.cat((photo, draw(G, z, t))), len(t) + 1, args.sample))


# ---------------------------------------------------------------------------------------------------- command line

TOY = dict(epochs=14, ngf=20, ndf=20, batch_size=16, captions_per_image=1, ema=0.99)    # so that a CPU is enough
FIXED = ("data", "variant", "ngf", "ndf", "batch_size", "lr", "ema", "captions_per_image", "seed", "text_encoder")   # what a run is


def main(argv=None):
    import common
    from common import number
    p, g, s = common.parser("gan_cls", __doc__, TOY)
    g.add_argument("--variant", choices=["gan", "cls", "int", "int-cls"], default="int-cls", help="default: int-cls, the paper's best")
    g.add_argument("--epochs", type=number(int, 1), metavar="N", default=600, help="default: 600 (section 5)")
    g.add_argument("--batch-size", type=number(int, 2), metavar="N", default=64, help="default: 64 (section 5)")
    g.add_argument("--lr", type=number(float, 0, 1), metavar="X", default=2e-4,
                   help="default: 0.0002 (section 5), halved every 100 epochs (released code)")
    g.add_argument("--ngf", type=number(int, 1), metavar="N", default=128, help="width of G (default: 128, released code)")
    g.add_argument("--ndf", type=number(int, 1), metavar="N", default=64, help="width of D (default: 64, released code)")
    g.add_argument("--captions-per-image", type=number(int, 1), metavar="N", default=4, help="captions averaged (default: 4, released code)")
    s.add_argument("--style", metavar="PHOTO", help="with --sample: draw the captions in the style of a photo (section 4.4)")
    s.add_argument("--style-steps", type=number(int, 1), metavar="N", default=2000, help="steps that train the style encoder (default: 2000)")
    args, state = common.parse(p, TOY, FIXED, argv)
    if args.style and args.images:
        raise common.UserError("--style draws one row; leave --images out")
    does = style_transfer if args.style else sample if args.sample else interpolate if args.interpolate else evaluate if args.evaluate else train
    return does(args, state)


if __name__ == "__main__":
    from common import guard
    sys.exit(guard(main))
