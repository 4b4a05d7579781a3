"""common.py: encoders against the golden figures, losses against plain loops in float64, files, choice of encoder."""
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
from conftest import ROOT, call, run, shared


def golden(name):
    """An .npz of golden figures, and a state dict filled by its formula."""
    sys.path.insert(0, str(shared("golden")))
    from golden_weights import fill
    return np.load(shared("golden", name)), fill


def char_weights(fill):
    shapes = next(iter(json.loads(shared("golden", "char_cnn_rnn_names.json").read_text()).values()))
    return {k: v.float() for k, v in fill("char_cnn_rnn", shapes).items()}


def damsm_weights(fill, words=50):
    shapes = dict(next(iter(json.loads(shared("golden", "damsm_released_names.json").read_text()).values())))
    return {k: v.float() for k, v in fill("text_encoder", {**shapes, "encoder.weight": (words, 300)}).items()}


# ---- encoders

def test_char_cnn_rnn_equals_the_released_one_alone_and_in_a_batch():
    figures, fill = golden("char_cnn_rnn.npz")
    encoder = common.rebuild(char_weights(fill))
    captions = [str(c) for c in figures["captions"]]
    together = encoder.encode(captions).numpy()
    alone = np.concatenate([encoder.encode([c]).numpy() for c in captions])
    for ours in (together, alone):
        np.testing.assert_allclose(ours, figures["embeddings"], atol=1e-5, rtol=0)


def test_damsm_equals_the_released_one_alone_and_in_a_batch():
    figures, fill = golden("damsm_text.npz")
    encoder = common.rebuild({**damsm_weights(fill), "_extra_state": [f"w{i}" for i in range(50)]})
    tokens = torch.from_numpy(figures["captions"])
    words, sentences = encoder(tokens)
    np.testing.assert_allclose(words.numpy(), figures["words"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(sentences.numpy(), figures["sentences"], atol=1e-5, rtol=0)
    for i, n in enumerate(figures["lengths"]):
        np.testing.assert_allclose(encoder(tokens[i:i + 1, :n])[1][0].numpy(), figures["sentences"][i], atol=1e-5, rtol=0)
    assert ((tokens != 0).sum(1).numpy() == figures["lengths"]).all()


def test_character_positions():
    tokens = common.CharCnnRnn().tokens(["A-b é", "x" * 300])
    assert tokens.shape == (2, 201)
    assert tokens[0, :5].tolist() == [1, 60, 2, 70, 0] and not tokens[0, 5:].any()     # "-" is the second of two; é is blank
    assert tokens[1].tolist() == [24] * 201


def test_damsm_carries_its_vocabulary(tmp_path):
    words = ["<end>", "a", "pink", "flower"]
    torch.save(common.Damsm(words).state_dict(), tmp_path / "d.pt")
    encoder = common.rebuild(torch.load(tmp_path / "d.pt", weights_only=True))
    assert encoder.tokens(["A pink, unheard-of FLOWER!"]).tolist() == [[1, 2, 3]]


def test_long_captions_keep_18_words_in_order():
    encoder = common.Damsm(["<end>", *(f"w{i}" for i in range(1, 60))])
    caption = " ".join(f"w{i}" for i in range(1, 41))
    row = encoder.tokens([caption])[0]
    assert len(row) == 18 and (row.diff() > 0).all() and torch.equal(row, encoder.tokens([caption])[0])
    assert not torch.equal(row, encoder.tokens([caption], torch.Generator().manual_seed(1))[0])


def test_unknown_words_are_named_and_nothing_left_is_an_error(capsys):
    damsm = common.Damsm(["<end>", "a", "pink", "flower"])
    assert damsm.ask(["a pink zyzzyva flower"]).shape == (1, 256)
    assert "left out: zyzzyva" in capsys.readouterr().err
    char = common.CharCnnRnn((8, 8, 8))
    assert char.ask(["une fleur à pétales"]).shape == (1, 1024)
    assert "left out: à é" in capsys.readouterr().err
    for encoder, caption in ((damsm, "zyzzyva"), (damsm, ""), (char, "花"), (char, " \t")):
        with pytest.raises(data.UserError, match="say it in other words"):
            encoder.ask(["a flower", caption])


def test_a_short_caption_is_said_as_often_as_it_fits_into_those_of_training(tmp_path):
    char = common.CharCnnRnn((8, 8, 8))
    char.shortest = 38
    torch.save(char.state_dict(), tmp_path / "e.pt")
    encoder = common.rebuild(torch.load(tmp_path / "e.pt", weights_only=True))
    assert torch.equal(encoder.ask(["pink flower", "this flower is pink"]), encoder.encode(["pink flower " * 2 + "pink flower", "this flower is pink"]))
    char.shortest = 10**12                                        # a damaged file
    assert common.rebuild(char.state_dict()).ask(["a"]).shape == (1, 1024)
    del (released := char.state_dict())["_extra_state"]
    assert common.rebuild(released).said("a") == "a" == common.Damsm(["<end>", "a"]).said("a")


@pytest.mark.parametrize("caption", ["花 🌸 a flower", "\0a\0", "ورد a", "a\ud800", "a " + "a" * 2_000_000, "a flower " * 100_000, "İ a"])
def test_any_text_is_safe(caption):
    for encoder in (common.CharCnnRnn((8, 8, 8)), common.Damsm(["<end>", "a", "flower"])):
        assert encoder.ask([caption]).isfinite().all()


# ---- losses, each against a loop in float64

def test_joint_embedding_loss():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, 7, 5))
    expect = 0
    for i in range(7):
        for j in range(7):
            if i != j:
                expect += max(0, 1 + image[i] @ text[j] - image[i] @ text[i]) / 49     # a wrong text for picture i
                expect += max(0, 1 + image[j] @ text[i] - image[i] @ text[i]) / 49     # a wrong picture for text i
    assert common.joint_embedding_loss(*map(torch.from_numpy, (image, text))).item() == pytest.approx(expect, rel=1e-12)


def cross_entropy_both_ways(score, classes):
    total = 0
    for s in (score, score.T):
        for i in range(len(s)):
            others = [s[i, j] for j in range(len(s)) if j == i or classes[j] != classes[i]]
            total += (math.log(sum(math.exp(o) for o in others)) - s[i, i]) / len(s)
    return total


CLASSES = [0, 1, 1, 2, 0]


def test_sentence_loss():
    image, sentence = np.random.default_rng(1).standard_normal((2, 5, 6))
    score = np.array([[10 * i @ s / np.linalg.norm(i) / np.linalg.norm(s) for s in sentence] for i in image])
    ours = common.sentence_loss(*map(torch.from_numpy, (image, sentence)), torch.tensor(CLASSES))
    assert ours.item() == pytest.approx(cross_entropy_both_ways(score, CLASSES), rel=1e-10)


def test_word_loss():
    rng = np.random.default_rng(2)
    regions, words, lengths = rng.standard_normal((5, 6, 4)), rng.standard_normal((5, 6, 3)), [3, 1, 2, 3, 2]
    score = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            e = words[j, :, :lengths[j]]                           # (6, T)
            s = np.exp(e.T @ regions[i])                           # (T, N)
            s = s / s.sum(0)                                       # over the words
            a = np.exp(4 * s) / np.exp(4 * s).sum(1, keepdims=True)
            c = regions[i] @ a.T                                   # (6, T)
            cos = (c * e).sum(0) / np.linalg.norm(c, axis=0) / np.linalg.norm(e, axis=0)
            score[i, j] = 10 * math.log(np.exp(5 * cos).sum())
    ours = common.word_loss(torch.from_numpy(regions), torch.from_numpy(words), torch.tensor(lengths), torch.tensor(CLASSES))
    assert ours.item() == pytest.approx(cross_entropy_both_ways(score, CLASSES), rel=1e-10)


def test_retrieval_by_hand():
    image, text = torch.tensor([[1., 0], [0, 1], [0, 3]]), torch.tensor([[3., 1], [0, 1], [1, 0], [5, 4]])
    # means of pictures: (1, 0), (0, 2); of texts: (1.5, 1), (3, 2)
    scores = common.retrieval(image, text, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert scores == (0.5, pytest.approx(2 / 3))


# ---- image side

def test_inception_equals_the_fid_network(inception_file):
    figures, _ = golden("fid_flowers.npz")
    images = torch.from_numpy(figures["images_a"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    pooled, regions = common.inception()(images)
    np.testing.assert_allclose(pooled.numpy(), figures["features_a"], atol=1e-4, rtol=0)
    assert regions.shape == (8, 768, 36)


def test_no_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(data.UserError, match="no route.*image-features small"):
        common.inception()


def test_inception_features_are_cached_in_order(tmp_path, inception_file):
    from PIL import Image
    for i, colour in enumerate(((250, 0, 0), (0, 250, 0), (0, 0, 250))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("one colour\n")
    dataset = data.load(str(tmp_path), size=64)
    pooled, regions = common.inception_features(dataset, "cpu")
    images = torch.stack([torch.from_numpy(data.decode(p, 299).copy()) for p in dataset.pictures]).float() / 127.5 - 1
    torch.testing.assert_close(pooled, common.inception()(images)[0], atol=1e-4, rtol=0)
    assert pooled.shape == (3, 2048) and regions.shape == (3, 768, 36) and regions.dtype == torch.float16
    assert not [p for p in data.CACHE.iterdir() if ".part" in p.name]


# ---- files

def test_save_never_costs_the_last_good_file(tmp_path):
    common.save(tmp_path / "a.pt", {"kind": "x", "n": 1})

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("no")
    with pytest.raises(data.UserError, match="what was there before is intact"):
        common.save(tmp_path / "a.pt", {"kind": "x", "n": Unpicklable()})
    assert common.load(tmp_path / "a.pt", "x")["n"] == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("script, flags", [("gan_cls", "--ngf 4 --ndf 4"), ("dfgan", "--size 32 --nf 2"),
                                           ("stackgan", "--size 128 --ngf 4 --ndf 2 --captions-per-image 1")])
def test_an_exported_model_draws_as_the_whole_checkpoint(home, tmp_path, monkeypatch, script, flags):
    use = lambda *flags: call(ROOT / f"{script}.py", "--device", "cpu", *flags, cwd=home)
    encoder = home / "runs" / f"{'damsm' if script == 'dfgan' else 'char-cnn-rnn'}-own" / "encoder.pt"
    done = use("--data", "own", "--run", f"whole-{script}", "--epochs", 1, "--batch-size", 4, "--text-encoder", encoder, *flags.split())
    assert done.returncode == 0, done.stderr
    small, said = tmp_path / "weights" / f"{script}.pt", ("--sample", "a red picture", "it is blue")
    monkeypatch.setattr(sys, "argv", ["common.py", "--export", str(home / f"whole-{script}" / "last.pt"), "--out", str(small)])
    common.main()
    assert small.stat().st_size < (home / f"whole-{script}" / "last.pt").stat().st_size * 0.7
    kept = common.load(small, script)
    assert kept["args"]["data"] == "own" and str(home) not in f"{kept['args']} {kept['text_note']}" and not {"G", "D", "opt_g", "opt_d"} & set(kept)
    whole = use("--data", "own", "--run", f"whole-{script}", *said)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    alone = use(*said)                                             # neither --run nor --data: the model in weights/
    assert f"this is weights/{script}.pt" in alone.stdout and f"runs/{script}-weights/sample-" in alone.stdout, alone.stderr
    seen = [np.asarray(Image.open(home / done.stdout.split()[-1])).astype(int) for done in (whole, alone)]
    assert seen[0].shape == seen[1].shape and 0 <= abs(seen[0] - seen[1]).max() <= 2 and seen[0].std() > 1
    other = use("--data", "own/red", *said)
    assert other.returncode == 2 and "train one first" in other.stderr and "leave out --run and --data" in other.stderr
    (home / "small").mkdir(exist_ok=True)
    small.rename(home / "small" / "last.pt")
    assert use("--data", "own", "--run", "small", *said).returncode == 0
    again = use("--data", "own", "--run", "small", "--epochs", 2)
    assert again.returncode == 2 and "exported for drawing alone" in again.stderr
    (home / "small" / "last.pt").unlink()


def test_export_without_a_place_or_a_checkpoint(tmp_path):
    torch.save({"kind": "text encoder"}, "encoder.pt")
    for flags, words in ((("encoder.pt",), "--export needs --out"), (("encoder.pt", "--out", "small.pt"), "holds no gan_cls or stackgan or dfgan"),
                         (("none.pt", "--out", "small.pt"), "none.pt does not exist")):
        done = run(ROOT / "common.py", "--export", *flags, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "small.pt").exists()


def test_files_that_are_no_checkpoints(tmp_path):
    common.save(tmp_path / "good.pt", {"kind": "x", "n": torch.zeros(1000)})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:600])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    with open(tmp_path / "code.pt", "wb") as file:
        pickle.dump(Evil(), file)
    for name in ("cut", "text", "empty", "code"):
        with pytest.raises(data.UserError, match="is no checkpoint, or is damaged"):
            common.load(tmp_path / f"{name}.pt", "x")
    with pytest.raises(data.UserError, match="holds no y checkpoint"):
        common.load(tmp_path / "good.pt", "y")
    with pytest.raises(data.UserError, match="does not exist"):
        common.load(tmp_path / "none.pt", "x")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_pickles_build_plain_data_only(tmp_path):
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(data.UserError, match="is no pickle of plain data"):
        common.read_pickle(tmp_path / "evil.pickle")
    assert not (tmp_path / "ran").exists()
    # numpy's dtype and array, called from a pickle, could be made to read memory that is not theirs
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps(np.arange(3)))
    with pytest.raises(data.UserError, match="it asks for numpy"):
        common.read_pickle(tmp_path / "evil.pickle")
    for protocol in (0, 2, 4):
        (tmp_path / "plain.pickle").write_bytes(pickle.dumps([{1: "a"}, [0, 1, 2], 2.5, "ü"], protocol))
        assert common.read_pickle(tmp_path / "plain.pickle") == [{1: "a"}, [0, 1, 2], 2.5, "ü"]


def test_published_python_2_pickles():
    names = common.read_pickle(shared("reference", "lists", "cub_pickles") / "train_filenames.pickle")
    assert len(names) == 8855 and names[0].startswith("002.Laysan_Albatross/")


# ---- choice of encoder

def released(folder, fill, words=50):
    """A released DAMSM encoder with its captions.pickle, as AttnGAN's authors publish them."""
    torch.save(damsm_weights(fill, words), folder / "text_encoder200.pth", _use_new_zipfile_serialization=False)
    names = {i: "<end>" if i == 0 else f"w{i}" for i in range(words)}
    (folder / "captions.pickle").write_bytes(pickle.dumps([[[1, 2]], [[3]], names, {w: i for i, w in names.items()}], 2))
    return folder / "text_encoder200.pth"


def test_released_encoders_load(tmp_path):
    figures, fill = golden("damsm_text.npz")
    encoder, note = common.read_encoder(released(tmp_path, fill))
    captions = [" ".join(f"w{i}" for i in row if i) for row in figures["captions"]]
    np.testing.assert_allclose(encoder.encode(captions).numpy(), figures["sentences"], atol=1e-5, rtol=0)
    torch.save(char_weights(fill), tmp_path / "char.pth")
    encoder, note = common.read_encoder(tmp_path / "char.pth")
    assert isinstance(encoder, common.CharCnnRnn) and "char.pth" in note


def test_released_encoder_without_or_with_another_vocabulary(tmp_path):
    _, fill = golden("damsm_text.npz")
    path = released(tmp_path, fill)
    (tmp_path / "captions.pickle").write_bytes(pickle.dumps([[], [], {0: "<end>", 1: "a"}, {}], 2))
    with pytest.raises(data.UserError, match="has 2 words but .* 50; they do not belong together"):
        common.read_encoder(path)
    (tmp_path / "captions.pickle").unlink()
    with pytest.raises(data.UserError, match="put captions.pickle beside it"):
        common.read_encoder(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(data.UserError, match="is no text encoder, or is damaged"):
        common.read_encoder(path)


def test_published_damsm_is_the_default_of_cub(tmp_path, monkeypatch, capsys):
    import hashlib
    import pathlib
    _, fill = golden("damsm_text.npz")
    (tmp_path / "web").mkdir()
    released(tmp_path / "web", fill)
    table = [((tmp_path / "web" / name).as_uri(), name, hashlib.sha256((tmp_path / "web" / name).read_bytes()).hexdigest())
             for name in ("text_encoder200.pth", "captions.pickle")]
    monkeypatch.setitem(common.PUBLISHED, "cub", table)
    download = data.download

    def copy(url, path, sha256):                                   # urllib's file:// knows no Range and no status
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_bytes(pathlib.Path(url[7:]).read_bytes())
        return download(url, path, sha256=sha256)
    monkeypatch.setattr(data, "download", copy)
    assert len(common.text_encoder("damsm", "cub", tmp_path, "cpu")[0].number) == 50
    assert capsys.readouterr().out.startswith("text encoder: published DAMSM encoder of cub, file://")
    # where it cannot be had, or has another checksum, one is trained here and the line says so
    monkeypatch.setitem(common.PUBLISHED, "cub", [(*table[0][:2], "0" * 64)])
    trained = []
    monkeypatch.setattr(common, "train_text_encoder", lambda kind, name, root, device, path, **_: trained.append(kind) or common.save(
        path, {"kind": "text encoder", "encoder": common.Damsm(["<end>", "a"]).state_dict(), "note": "trained here",
               "about": {"data": "cub"}}))
    common.text_encoder("damsm", "cub", tmp_path, "cpu")
    out = capsys.readouterr().out
    assert trained == ["damsm"] and "no published encoder" in out and "published sha256" in out and "text encoder: trained here" in out


def test_encoders_are_trained_and_reported(tmp_path):
    """The real command, a few batches long, on toy: it prints its retrieval; a finished encoder is not trained over."""
    for kind in ("char-cnn-rnn", "damsm"):
        command = ROOT / "common.py", "--encoder", kind, "--data", "toy", "--iterations", 3
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "image side a small network trained along" in done.stdout
        assert "3 iterations" in done.stdout and "chance 3.1%" in done.stdout
        encoder, note = common.read_encoder(tmp_path / "runs" / f"{kind}-toy" / "encoder.pt")
        assert kind in note and encoder.encode(["a pink flower"]).isfinite().all()
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 2 and "is finished; remove it to train anew" in again.stderr


def colours(folder):
    from PIL import Image
    for i, (name, colour) in enumerate(dict(red=(250, 0, 0), green=(0, 250, 0), blue=(0, 0, 250), white=(250,) * 3).items()):
        Image.new("RGB", (80, 80), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"it is {name}\n")


@pytest.mark.parametrize("kind", ["char-cnn-rnn", "damsm"])
def test_an_interrupted_training_continues_to_the_same_encoder(tmp_path, monkeypatch, kind):
    colours(tmp_path)
    train = lambda path, **how: common.train_text_encoder(kind, str(tmp_path), ".", "cpu", path, 6, "small", **how)
    train(tmp_path / "straight.pt")
    step, steps = torch.optim.Adam.step, []

    def interrupted(self, *rest):
        steps.append(1)
        if len(steps) == 3:
            import os, signal
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *rest)
    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        train(tmp_path / "resumed.pt")
    with pytest.raises(data.UserError, match="is not trained to the end"):
        common.read_encoder(tmp_path / "resumed.pt")
    with pytest.raises(data.UserError, match="of other pictures or settings"):
        train(tmp_path / "resumed.pt", seed=1)
    train(tmp_path / "resumed.pt")
    a, b = (common.load(tmp_path / f"{name}.pt", "text encoder")["encoder"] for name in ("straight", "resumed"))
    assert all(torch.equal(a[k], b[k]) for k in a if k != "_extra_state") and a["_extra_state"] == b["_extra_state"]


def test_training_lowers_the_losses(tmp_path, capsys):
    """Both encoders learn to tell four captions apart on a folder of four colours."""
    colours(tmp_path)
    for kind in ("char-cnn-rnn", "damsm"):
        note = common.train_text_encoder(kind, str(tmp_path), ".", "cpu", tmp_path / f"{kind}.pt", 60, "small")
        assert "caption to class 100.0%, picture to class 100.0%, chance 25.0%" in note, note
    written = [len(line) for file in tmp_path.rglob("*.txt") for line in file.read_text().splitlines()]
    assert common.read_encoder(tmp_path / "char-cnn-rnn.pt")[0].shortest == min(written) > 0


def test_common_copied_with_wrong_flags():
    assert run(ROOT / "common.py", "--encoder", "clip", cwd=".").returncode == 2
    missing = run(ROOT / "common.py", "--data", "no/such/folder", cwd=".")
    assert missing.returncode == 2 and "is no folder" in missing.stderr and "Traceback" not in missing.stderr
