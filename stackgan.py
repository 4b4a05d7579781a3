"""StackGAN: Text to Photo-realistic Image Synthesis with Stacked GANs. Zhang, Xu, Li, Zhang, Wang, Huang, Metaxas; ICCV 2017
(arXiv 1612.03242).

Stage I sketches 64 px from noise z and a sentence embedding t; Stage II reads sketch and sentence and draws 256 px.
    conditioning augmentation   t becomes a Gaussian N(mu(t), sigma(t)^2) and c a draw from it                     (3.2)
    Stage I                     G0(z, c0): shapes and colours                                                      (3.3)
    Stage II                    G(s0, c): no noise but the sketch s0; mends and adds detail; G0 stays as it is     (3.4)

    python stackgan.py                                           toy data, no download, minutes on a CPU
    python stackgan.py --data flowers                            Stage I, then Stage II; the same command again continues
    python stackgan.py --data flowers --sample "pink flower" "a white flower"               Stage I above Stage II
    python stackgan.py --data flowers --interpolate "a pink flower" "a yellow flower"       (--noise moves the noise)
    python stackgan.py --data flowers --evaluate                 FID, R-precision, diversity, and how they were measured

Toy: petal colour right in 87 to 91% of samples for held-out captions (three seeds, chance 12%), Stage I in 3.6 minutes, Stage II at
128 px in 10 more, 2 CPU cores, torch 2.15.
Oxford-102: weights/stackgan.pt, Stage I, 42 minutes of one core, FID 91.4 of 3,000 pictures at 64 px; see weights/README.md.
"""
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

NZ, NC, TEXT = 100, 128, 1024   # noise z; conditioning c (section 3.5); sentence embedding t (char-CNN-RNN)


# ---------------------------------------------------------------------------------------------------- networks
# The layers of the PyTorch release; where they are not those of figure 2 the line says so. The TensorFlow code also has residual
# blocks, at 4x4 in D and at 4x4 and 8x8 in Stage I's G, and cuts eps at +-2.

class ConditioningAugmentation(nn.Module):
    """t (B, 1024), eps (B, 128) from N(0, 1) -> c = mu + sigma eps, mu, log sigma, (B, 128) each. Section 3.2, figure 2.

    eps None: c = mu, the paper's ablation. A leaky ReLU before mu and log sigma as in the TensorFlow code that gave the
    paper's numbers; the PyTorch release has a ReLU there, which forces mu >= 0 and sigma >= 1: an accident."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(TEXT, 2 * NC)

    def forward(self, t, eps):
        mu, log_sigma = F.leaky_relu(self.fc(t), 0.2).chunk(2, 1)
        return mu if eps is None else mu + log_sigma.exp() * eps, mu, log_sigma


def up_conv(x, conv):
    """conv(nearest upsampling of x by 2) for a 3x3 conv: exactly one transposed convolution, with a quarter of the places and
    4x4 for 3x3 weights, 2.25 times less work. Each of its weights is the sum of those that meet the same pixel of x."""
    if len(x) * x.shape[2] * x.shape[3] < 512:      # so few places that the larger weights cost more (CPU: up to 5 times)
        return conv(F.interpolate(x, scale_factor=2.0))
    weight = F.avg_pool2d(conv.weight.flip(2, 3), 2, 1, padding=1, divisor_override=1)         # (out, in, 4, 4)
    return F.conv_transpose2d(x, weight.transpose(0, 1), conv.bias, 2, 1)


class Up(nn.Module):
    """(B, cin, s, s) -> (B, cout, 2s, 2s): nearest upsampling, 3x3, batch norm, ReLU."""

    def __init__(self, cin, cout):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(cin, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)

    def forward(self, x):
        return F.relu(self.norm(up_conv(x, self.conv)), inplace=True)


class Residual(nn.Module):
    """ReLU(x + 3x3, batch norm, ReLU, 3x3, batch norm of x)."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True),
                                  nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        return F.relu(x + self.body(x))


def init(module):
    """As released: convolutions and linear layers N(0, 0.02), batch norm N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


class Stage1(nn.Module):
    """G0: z (B, 100), eps (B, 128) or None, t (B, 1024) -> pictures (B, 3, 64, 64) in [-1, 1], mu, log sigma. Figure 2, above."""

    def __init__(self, ngf=128):
        super().__init__()
        self.ca = ConditioningAugmentation()
        self.fc = nn.Sequential(nn.Linear(NZ + NC, 8 * ngf * 16, bias=False), nn.BatchNorm1d(8 * ngf * 16), nn.ReLU(inplace=True))
        self.up = nn.Sequential(Up(8 * ngf, 4 * ngf), Up(4 * ngf, 2 * ngf), Up(2 * ngf, ngf), Up(ngf, ngf // 2))
        self.img = nn.Sequential(nn.Conv2d(ngf // 2, 3, 3, 1, 1, bias=False), nn.Tanh())
        self.apply(init)

    def forward(self, z, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        x = self.fc(torch.cat((z, c), 1)).view(len(z), -1, 4, 4)                                # (B, 8*ngf, 4, 4)
        return self.img(self.up(x)), mu, log_sigma                                              # (B, ngf/2, 64, 64) before img


class Stage2(nn.Module):
    """G: sketches s0 (B, 3, 64, 64), eps (B, 128) or None, t (B, 1024) -> pictures (B, 3, S, S) in [-1, 1], mu, log sigma;
    S 128 or 256. Its conditioning augmentation is its own. Figure 2, below."""

    def __init__(self, ngf=128, size=256):
        super().__init__()
        down = lambda a, b: (nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        self.ca = ConditioningAugmentation()
        # ReLU as in the releases; paper: leaky in what goes down
        self.encoder = nn.Sequential(nn.Conv2d(3, ngf, 3, 1, 1, bias=False), nn.ReLU(inplace=True),
                                     *down(ngf, 2 * ngf), *down(2 * ngf, 4 * ngf))              # (B, 4*ngf, 16, 16)
        self.joint = nn.Sequential(nn.Conv2d(4 * ngf + NC, 4 * ngf, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * ngf), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(*(Residual(4 * ngf) for _ in range(4 if size == 256 else 2)))     # section 3.5
        widths = [4 * ngf, 2 * ngf, ngf, ngf // 2, ngf // 4][:int(math.log2(size // 16)) + 1]
        self.up = nn.Sequential(*(Up(a, b) for a, b in zip(widths, widths[1:])))                # (B, ngf/4, 256, 256)
        self.img = nn.Sequential(nn.Conv2d(widths[-1], 3, 3, 1, 1, bias=False), nn.Tanh())
        self.apply(init)

    def forward(self, sketch, eps, t):
        c, mu, log_sigma = self.ca(t, eps)
        x = self.encoder(sketch)
        x = self.joint(torch.cat((x, c[:, :, None, None].expand(-1, -1, 16, 16)), 1))
        return self.img(self.up(self.residual(x))), mu, log_sigma


class Discriminator(nn.Module):
    """Pictures (B, 3, S, S), t (B, 1024) -> logits (B,): do they belong together? and, of Stage II, (B,): is it real?

    Joint layer: 3x3 as in the PyTorch release, whose numbers it must give; paper and TensorFlow code: 1x1. Text: compressed by a layer
    of D's own and spread over the 4x4 places, as in the paper and the TensorFlow code; PyTorch release: mu of G, detached. The second
    answer: PyTorch release alone; we follow it. Stage I has none (None)."""

    def __init__(self, ndf=64, size=64):
        super().__init__()
        act = nn.LeakyReLU(0.2, inplace=True)
        block = lambda a, b, k, s: (nn.Conv2d(a, b, k, s, 1, bias=False), nn.BatchNorm2d(b), act)
        w = [ndf * 2 ** i for i in range(int(math.log2(size)) - 2)]                             # S/2 ... 4 pixels
        back = w[3:][::-1]                                                                      # to 8*ndf again, at 4x4
        self.image = nn.Sequential(nn.Conv2d(3, ndf, 4, 2, 1, bias=False), act,
                                   *(layer for a, b in zip(w, w[1:]) for layer in block(a, b, 4, 2)),
                                   *(layer for a, b in zip(back, back[1:]) for layer in block(a, b, 3, 1)))
        self.joint = nn.Sequential(*block(8 * ndf + NC, 8 * ndf, 3, 1), nn.Conv2d(8 * ndf, 1, 4))
        self.alone = nn.Conv2d(8 * ndf, 1, 4) if size > 64 else None
        self.text = nn.Sequential(nn.Linear(TEXT, NC), nn.LeakyReLU(0.2))
        self.apply(init)

    def forward(self, x, t):
        h = self.image(x)                                                                       # (B, 8*ndf, 4, 4)
        c = self.text(t)[:, :, None, None].expand(-1, -1, 4, 4)
        return self.joint(torch.cat((h, c), 1)).flatten(), None if self.alone is None else self.alone(h).flatten()


# ---------------------------------------------------------------------------------------------------- losses
# Logits and softplus: -log sigmoid(s) = softplus(-s), -log(1 - sigmoid(s)) = softplus(s), finite for any s.

def d_loss(real, wrong, fake):
    """-log D(I, t) - [log(1 - D(I', t)) + log(1 - D(G(.), t))] / 2  (eq. 3 and 5, with the wrong pairs of GAN-CLS).

    Each of the three is what D returns. With answers to "is it real?" (Stage II, PyTorch release): the mean of the two
    real terms plus the mean of the three others."""
    (real, real_alone), (wrong, _), (fake, fake_alone) = real, wrong, fake
    yes, no = [F.softplus(-real).mean()], [F.softplus(wrong).mean(), F.softplus(fake).mean()]
    if real_alone is not None:
        yes, no = yes + [F.softplus(-real_alone).mean()], no + [F.softplus(fake_alone).mean()]
    return sum(yes) / len(yes) + sum(no) / len(no)


def g_loss(fake):
    """-log D(G(.), t)  (eq. 4 and 6, in the form that does not saturate), plus that of "is it real?" where D answers it."""
    return sum(F.softplus(-s).mean() for s in fake if s is not None)


def kl_loss(mu, log_sigma):
    """KL(N(mu, sigma^2) || N(0, 1)) (eq. 2), the mean over dimensions: (B, 128) -> ().

    Paper: weight 1; released codes: 2.0 times the mean over dimensions; we follow the codes (in g_step)."""
    return ((mu.square() + (2 * log_sigma).exp() - 1) / 2 - log_sigma).mean()


# ---------------------------------------------------------------------------------------------------- steps

def d_step(D, opt_d, real, wrong, fake, t):
    """Minimise d_loss over D. real, wrong, fake (B, 3, S, S), t (B, 1024). wrong: real pictures of another class with t, as in
    the TensorFlow code; PyTorch release: the batch rolled by one, which may hit the same class."""
    s_real, s_wrong, s_fake = D(real, t), D(wrong, t), D(fake.detach(), t)
    loss = d_loss(s_real, s_wrong, s_fake)
    opt_d.zero_grad()
    loss.backward()
    opt_d.step()
    seen = [s.float().sigmoid().mean() for s, _ in (s_real, s_wrong, s_fake)]
    return torch.stack([loss, *seen]).detach()      # and D(real), D(wrong), D(fake): a D that ignores its text shows in D(wrong)


def g_step(D, opt_g, fake, t, kl):
    """Minimise g_loss + 2 KL over G. fake = G(...) with its graph, kl = kl_loss of its mu and log sigma, or 0."""
    D.requires_grad_(False)      # it needs none; and autocast then leaves alone the bf16 weights that it kept from before D's step
    loss = g_loss(D(fake, t))
    opt_g.zero_grad()
    (loss + 2.0 * kl).backward()
    opt_g.step()
    D.requires_grad_(True)
    return loss.detach()


def make(stage, ngf=128, ndf=64, size=256, lr=2e-4, device="cpu"):
    """G and D of a stage and their optimisers: Adam 2e-4 (section 3.5), betas (0.5, 0.999) (released codes)."""
    nets = (Stage1(ngf), Discriminator(ndf, 64)) if stage == 1 else (Stage2(ngf, size), Discriminator(ndf, size))
    G, D = (net.to(device, memory_format=torch.channels_last) for net in nets)
    return G, D, *(torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.999)) for net in (G, D))


# ---------------------------------------------------------------------------------------------------- train

def train(args, state):
    """Stage I, then Stage II on top of it, args.epochs each; or args.stage alone."""
    import common
    done = state["stage"] if state else 0
    if args.stage == 1 and done == 2:
        raise common.UserError(f"the run in {args.run} is in Stage II, on a Stage I that stays as it is; give another --run")
    if args.stage == 2 and done == 0:
        raise common.UserError(f"there is no Stage I in {args.run} to build on; train it first: leave --stage out")
    if args.stage == 2 and done == 1:
        print(f"Stage II builds on Stage I as it is, after {len(state['rows'])} of {args.epochs} epochs")
    for stage in (args.stage,) if args.stage else (1, 2):
        if stage >= done:
            if stage == 2 and done < 2:
                with common.first():
                    state = common.load(args.run / "last.pt", "stackgan")
            if code := train_stage(args, state, stage):
                return code
    return 0


def train_stage(args, state, stage):
    import common
    import data
    size = 64 if stage == 1 else args.size
    dataset, unseen, encoder, note, sentences = common.prepare(args, state, "char-cnn-rnn", size)   # sentences (captions, 1024)
    number, among = common.processes()
    torch.set_float32_matmul_precision("high")
    batches = data.Batches(dataset, args.batch_size, args.seed, args.device, args.captions_per_image, part=(number, among))
    torch.manual_seed(args.seed)
    G, D, opt_g, opt_d = make(stage, args.ngf, args.ndf, args.size, args.lr, args.device)
    common.share((G, D), (opt_g, opt_d), args.batch_size)
    ema = AveragedModel(G, use_buffers=True)
    parts = {"G": G, "D": D, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    step, rows, total = 0, state["rows"] if state else [], torch.zeros(6, device=args.device)
    # Stage II builds on the average of Stage I's weights, which also draws the samples (paper and codes: on the weights).
    # The releases leave Stage I's batch norms in train mode while Stage II learns; ours rest, as the weights do
    G1 = first_stage(state, args.device) if stage == 2 else None
    if state and state["stage"] == stage:
        step, rows, total = common.resume(args, state, parts, dataset)

    # the fixed grid: unseen captions down, noises across, so that an ignored caption or noise is seen at once
    side = 8 if size <= 128 else 4
    watch = common.watch(args, unseen, encoder)
    shown = [unseen.captions[unseen.first[i]] for i in torch.linspace(0, len(unseen) - 1, side).long()]
    grid = noise(side, args.seed).repeat(side, 1).to(args.device), encoder.encode(shown).repeat_interleave(side, 0)
    average = (ema, None) if stage == 1 else (G1, ema)

    def paint(t, seed):
        return draw(*average, noise(len(t), seed).to(args.device), t, args.no_ca)[-1]

    def keep(name="last.pt"):
        common.save(args.run / name, {
            "kind": "stackgan", "args": common.plain(args), "stage": stage, "step": step, "rows": rows, "total": total,
            "random": common.random_state(), "pictures": dataset.key, "text_note": note, "text_encoder": encoder.state_dict(),
            "G1": G1 and G1.state_dict(), **{name: part.state_dict() for name, part in parts.items()}})

    def one_step(G, D):      # the networks, or torch.compile of them
        real, wrong, captions, _ = batches(step)
        t = sentences[captions].mean(1)              # TensorFlow code: the mean of 4 captions' embeddings
        z, *eps = torch.randn(among, len(t), NZ + 2 * NC, device=args.device)[number].split((NZ, NC, NC), 1)
        eps = (None, None) if args.no_ca else eps
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            if G1:
                with torch.no_grad():
                    z = G1(z, eps[0], t)[0]
            fake, mu, log_sigma = G(z, eps[stage - 1], t)                   # one fake serves both steps, as released
            kl = torch.zeros((), device=args.device) if args.no_ca else kl_loss(mu.float(), log_sigma.float())
            of_d = d_step(D, opt_d, real, wrong, fake, t)
            return torch.stack((g_step(D, opt_g, fake, t, kl), kl.detach(), *of_d))

    print(f"stackgan, Stage {'I' * stage} on {args.data}: {len(dataset)} pictures at {size} px, ngf {args.ngf}, ndf {args.ndf}, "
          f"batch {args.batch_size}, {args.epochs} epochs of {len(batches)} steps, {args.device}, in {args.run}")
    count, last = args.batch_size, max(args.epochs * len(batches), step)
    functions = common.compiled((G, D), one_step, parts) if args.compile and step < last else (G, D)
    with common.Stop() as stop, data.Progress(last * count, "", done=step * count) as bar:
        while not stop.asked() and step < last:
            epoch = step // len(batches)
            for group in (*opt_g.param_groups, *opt_d.param_groups):
                group["lr"] = args.lr * 0.5 ** (epoch // 100)      # section 3.5; TensorFlow code: every 50 in Stage I
            total += common.mean(one_step(*functions))
            # a decay of (1 + t) / (10 + t), up to ema: else G's first weights blur its average for epochs
            ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            ema.update_parameters(G)
            step += 1
            ended = step % len(batches) == 0
            if ended or stop.code or step % 10 == 0:
                now = (total / (step % len(batches) or len(batches))).tolist()
                common.finite(now[:3], step, args.run)
                bar.note = "G {:.2f} KL {:.3f} D {:.2f}  D(real) {:.2f} D(wrong) {:.2f} D(fake) {:.2f}".format(*now)
            bar.label = f"Stage {'I' * stage} epoch {epoch + 1}/{args.epochs}"
            bar.step(count)
            if ended:
                rows.append(dict(stage=stage, epoch=epoch + 1, step=step, **{k: round(v, 4) for k, v in zip(
                    ("loss_g", "kl", "loss_d", "d_real", "d_wrong", "d_fake"), now)}, **watch(epoch + 1, paint)))
                total.zero_()
                common.epoch_done(args.run, rows, keep, f"stage{stage}_epoch_{epoch + 1:04}.png", draw(*average, *grid, args.no_ca)[-1],
                                  side, shown)
                if step < last:
                    bar.show()
        if stop.code:
            keep()
            print(f"saved {args.run / 'last.pt'} at step {step} of Stage {'I' * stage}; the same command continues", file=sys.stderr)
            return stop.code
    print(f"Stage {'I' * stage}, {step // len(batches)} epochs done: {args.run / 'last.pt'}, grids beside it"
          f"{'; more with --epochs' if stage == (args.stage or 2) else ''}")
    if unseen.traits:
        common.traits_follow(unseen, encoder, paint)
    return 0


def noise(n, seed):
    """z and the eps of both stages, (n, 100 + 128 + 128)."""
    return torch.randn(n, NZ + 2 * NC, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(G1, G2, noise, t, no_ca=False, batch=32):
    """Both stages in eval mode, in bounded memory: noise (N, 356), t (N, 1024) -> [(N, 3, 64, 64), (N, 3, S, S)] in [-1, 1] on
    the CPU; without the second where G2 is None."""
    out = []
    for n, some in zip(noise.split(batch), t.split(batch)):
        z, *eps = n.split((NZ, NC, NC), 1)
        eps = (None, None) if no_ca else eps
        x = [G1.eval()(z, eps[0], some)[0]]
        if G2 is not None:
            x.append(G2.eval()(x[0], eps[1], some)[0])
        out.append([pictures.float().cpu() for pictures in x])
    return [torch.cat(stage) for stage in zip(*out)]


# ---------------------------------------------------------------------------------------------------- sample

def first_stage(state, device):
    """Stage I's generator of a checkpoint, averaged, frozen."""
    G1 = AveragedModel(Stage1(state["args"]["ngf"]), use_buffers=True)
    if state["stage"] == 1:
        G1.load_state_dict(state["ema"])
    else:
        G1.module.load_state_dict(state["G1"])
    return G1.module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def steps(state, stage):
    """How long a stage of a checkpoint was trained; once Stage II has begun, the log knows it of Stage I."""
    return state["step"] if stage >= state["stage"] else max((row["step"] for row in state["rows"] if row["stage"] == 1), default=0)


def finished(state, device="cpu", stage=2):
    """A painter (noise, t) -> pictures of each stage, and the text encoder, of a checkpoint; prints where they come from."""
    import common
    print(f"trained on {state['args']['data']}, {steps(state, stage)} steps of Stage {'I' * min(stage, state['stage'])}; "
          f"text encoder: {state['text_note']}")
    G1, G2 = first_stage(state, device), None
    if stage == state["stage"] == 2:
        G2 = AveragedModel(Stage2(state["args"]["ngf"], state["args"]["size"]), use_buffers=True)
        G2.load_state_dict(state["ema"])
        G2.to(device, memory_format=torch.channels_last)
    return lambda n, t: draw(G1, G2, n.to(device), t, state["args"]["no_ca"]), common.rebuild(state["text_encoder"]).to(device)


def rows_of(stages, columns):
    """Pictures of each stage, rows of `columns` -> one tensor at the size of the last, each row of Stage I above its row of Stage II."""
    size = stages[-1].shape[-1]
    rows = [F.interpolate(x, size=(size, size)).unflatten(0, (-1, columns)) for x in stages]      # nearest: pixels stay pixels
    return torch.stack(rows, 1).flatten(0, 2)


def sample(args, state):
    """A grid: for each caption a row of Stage I above its row of Stage II; the columns share their noise. --images: as many
    files for each caption instead."""
    import common
    paint, encoder = finished(state, args.device, args.stage or 2)
    t = encoder.ask(args.sample)
    if args.images:
        # noise of 64 always: a shorter draw has other numbers
        common.save_images(args.run, args.sample, args.images, args.seed, lambda i, seed, n: paint(
            noise(64, seed)[:n], t[i].expand(n, -1))[-1])
        return
    stages = paint(noise(args.columns, args.seed).repeat(len(t), 1), t.repeat_interleave(args.columns, 0))
    print(common.save_grid(args.run / f"sample-{common.slug(args.sample)}-{args.seed}.png", rows_of(stages, args.columns), args.columns,
                           args.sample))


def interpolate(args, state):
    """Sentence A to B over the columns, each row one noise, z and eps fixed (figure 8); --noise: noise to noise, a row for
    each of the sentences. Stage I above Stage II."""
    import common
    paint, encoder = finished(state, args.device, args.stage or 2)
    a, b = encoder.ask(args.interpolate)
    way = torch.linspace(0, 1, args.columns)[:, None]
    if args.noise:
        n, t = torch.lerp(*noise(2, args.seed), way).repeat(2, 1), torch.stack((a, b)).repeat_interleave(args.columns, 0)
    else:
        n, t = noise(4, args.seed).repeat_interleave(args.columns, 0), torch.lerp(a, b, way.to(a.device)).repeat(4, 1)
    kind = "noise" if args.noise else "sentence"
    print(common.save_grid(args.run / f"{kind}-{common.slug(args.interpolate)}-{args.seed}.png", rows_of(paint(n, t), args.columns),
                           args.columns, args.interpolate))


def evaluate(args, state):
    """FID, R-precision and diversity of the last stage trained, or of Stage I with --stage 1; common.evaluate prints how they are measured."""
    import common
    has, stage = state["args"], args.stage or state["stage"]
    if stage > state["stage"]:
        raise common.UserError(f"the run in {args.run} has no Stage II yet; leave out --stage 2, or train it first")
    state = {**state, "step": steps(state, stage)}
    paint, encoder = finished(state, args.device, stage)
    size = 64 if stage == 1 else has["size"]
    with torch.device("meta"):                                     # to be counted, not to be run
        nets = [Stage1(has["ngf"]), Stage2(has["ngf"], has["size"])][:stage]
        D = Discriminator(has["ndf"], size)
    count = lambda net: sum(p.numel() for p in net.parameters())
    common.evaluate(args, state, encoder, size, lambda t, seed: paint(noise(len(t), seed), t)[stage - 1],
                    stage=stage, parameters_G=sum(map(count, nets)), parameters_D=count(D))


# ---------------------------------------------------------------------------------------------------- command line

TOY = dict(epochs=12, size=128, ngf=16, ndf=16, batch_size=16, captions_per_image=1, ema=0.99)      # so that a CPU is enough
FIXED = ("data", "size", "ngf", "ndf", "batch_size", "lr", "ema", "captions_per_image", "no_ca", "seed", "text_encoder")   # what a run is


def main(argv=None):
    import common
    from common import number
    p, g, _ = common.parser("stackgan", __doc__, TOY)
    g.add_argument("--stage", type=int, choices=[1, 2], help="one stage alone (default: Stage I, then Stage II)")
    g.add_argument("--epochs", type=number(int, 1), metavar="N", default=600, help="of each stage (default: 600, section 3.5)")
    g.add_argument("--batch-size", type=number(int, 2), metavar="N", default=64, help="default: 64 (section 3.5)")
    g.add_argument("--size", type=int, choices=[128, 256], default=256, help="pixels of Stage II (default: 256, section 3.5)")
    g.add_argument("--lr", type=number(float, 0, 1), metavar="X", default=2e-4, help="default: 0.0002, halved every 100 epochs (section 3.5)")
    g.add_argument("--ngf", type=number(int, 4), metavar="N", default=128, help="width of both G (default: 128, released code)")
    g.add_argument("--ndf", type=number(int, 1), metavar="N", default=64, help="width of both D (default: 64, released code)")
    g.add_argument("--captions-per-image", type=number(int, 1), metavar="N", default=4, help="captions averaged (default: 4, TensorFlow code)")
    g.add_argument("--no-ca", action="store_true", help="ablation: no conditioning augmentation, c = mu(t)")
    args, state = common.parse(p, TOY, FIXED, argv)
    does = sample if args.sample else interpolate if args.interpolate else evaluate if args.evaluate else train
    return does(args, state)


if __name__ == "__main__":
    from common import guard
    sys.exit(guard(main))
