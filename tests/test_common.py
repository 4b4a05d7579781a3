"""Test common.py: text encoders, their losses and training, files, flags, metrics."""
import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
from conftest import load_module, shared

CODE = b"cbuiltins\nopen\n(S'ran'\nS'w'\ntR."    # a pickle that creates the file "ran"
WORDS = ["<end>", *(f"w{i}" for i in range(1, 49)), "café"]
RELEASED = {"char_cnn_rnn": ("char_cnn_rnn_names", "char_cnn_rnn", {}),
            "damsm_text": ("damsm_released_names", "text_encoder", {"encoder.weight": (50, 300)})}

def save_released(name):
    """Save an encoder of golden figures as released; captions.pickle is one of Python 2."""
    file, prefix, more = RELEASED[name]
    shapes = next(iter(json.loads(shared("golden", f"{file}.json").read_text()).values()))
    state = load_module(shared("golden", "golden_weights.py")).fill(prefix, {**shapes, **more})
    path = Path("root/cub/damsm/text_encoder200.pth")
    path.parent.mkdir(parents=True)
    torch.save({k: v.float() for k, v in state.items()}, path, _use_new_zipfile_serialization=False)
    words = "".join(f"I{i}\nS'{word}'\np{i + 9}\ns" for i, word in enumerate(WORDS))
    path.with_name("captions.pickle").write_text(f"(lp0\n(lp1\na(lp2\na(dp3\n{words}a.", "latin1")
    return path

@pytest.mark.parametrize("name, key", [("char_cnn_rnn", "embeddings"), ("damsm_text", "sentences")])
def test_released_encoders(name, key):
    golden = np.load(shared("golden", f"{name}.npz"))
    encoder, captions = common.load_text_encoder(save_released(name)), golden["captions"]
    if name == "damsm_text":
        encoder = common.get_text_encoder("damsm", SimpleNamespace(name="cub"), "root", "cpu")
        words, _ = encoder(torch.from_numpy(captions))
        np.testing.assert_allclose(words, golden["words"], atol=1e-5, rtol=0)
        captions = [" ".join(WORDS[i] for i in row if i) for row in captions]
    for x in (encoder.encode(captions), torch.cat([encoder.encode([c]) for c in captions])):
        np.testing.assert_allclose(x, golden[key], atol=1e-5, rtol=0)

def test_tokens_of_characters_and_words():
    tokens = common.CharCNNRNN((8, 8, 8)).tokenize(["A-b é", "x" * 300])
    assert tokens.tolist() == [[1, 60, 2, 70] + [0] * 197, [24] * 201]    # "-": the second of two
    torch.save(common.DAMSMTextEncoder(WORDS).state_dict(), "damsm.pt")
    encoder = common.text_encoder_from_state_dict(torch.load("damsm.pt", weights_only=True))
    tokens = encoder.tokenize(["W3, unheard-of CAFÉ!", "w1", "unheard"])
    assert tokens.tolist() == [[3, 49], [1, 0], [0, 0]] and encoder.encode(["of"]).isfinite().all()
    rows = [encoder.tokenize([" ".join(WORDS[1:41])], torch.Generator().manual_seed(seed))[0]
            for seed in (7, 7, 8)]
    assert len(rows[0]) == 18 and (rows[0].diff() > 0).all() and rows[0].max() <= 40
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])

def test_prompts(capsys):
    damsm = common.DAMSMTextEncoder(["<end>", "a", "pink", "flower"])
    assert torch.equal(damsm.encode_prompts("a zyzzyva flower"), damsm.encode(["a flower"]))
    assert "unknown to the encoder: zyzzyva" in "".join(capsys.readouterr())
    char = common.CharCNNRNN((8, 8, 8))
    char.config["min_prompt_length"] = 38
    char = common.text_encoder_from_state_dict(char.state_dict())
    x = char.encode_prompts(["pink flower", "this flower is pink"])    # 3 x 12 - 1 fit into 38
    repeated = ["pink flower pink flower pink flower", "this flower is pink"]
    assert torch.equal(x, char.encode(repeated)) and "unknown" not in "".join(capsys.readouterr())
    char.encode_prompts("花")
    assert "unknown to the encoder: 花" in "".join(capsys.readouterr())

def test_unusable_encoders_are_user_errors():
    path = save_released("damsm_text")
    captions = path.with_name("captions.pickle")
    captions.write_bytes(CODE)
    torch.save({k: v for k, v in common.CharCNNRNN((8, 8, 8)).state_dict().items()
                if "update" not in k and "reset" not in k}, "flowers.pth")    # Reed's has no gates
    Path("cut.pth").write_bytes(path.read_bytes()[:5000])
    for name in (path, captions, "flowers.pth", "cut.pth", "none.pth"):
        with pytest.raises(data.UserError, match="Reed's|cannot load the text encoder"):
            common.load_text_encoder(name)
    assert not Path("ran").exists()

def test_text_encoders_are_trained_and_chosen(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    name = data.dataset_id("own")
    own = data.load_dataset(name, size=64)
    captions = own.captions
    for kind, dim, iterations in (("char-cnn-rnn", 1024, 5), ("damsm", 256, 20)):
        path = tmp_path / f"{kind}.pt"
        common.train_text_encoder(kind, name, "datasets", "cpu", path, iterations, "small")
        encoder = common.load_text_encoder(path)
        x = encoder.encode(captions)
        assert x.shape == (44, dim) and x.isfinite().all() and x.std(0).max() > 1e-4
        assert torch.load(path)["iterations"] == iterations
        assert torch.load(path)["image_encoder"]["global_proj.weight"].any()    # of SJE: 0 before
        assert encoder.config.get("min_prompt_length") == {1024: len("it is red")}.get(dim)
    red, green, same = encoder.encode(["a red picture", "a green picture", "it is red"])
    assert torch.cosine_similarity(red, same, 0) > torch.cosine_similarity(red, green, 0) + 0.5
    trained, dataset = [], SimpleNamespace(name=name)
    monkeypatch.setattr(common, "train_text_encoder", lambda *a: trained.append(a))
    for kind, dim in (("char-cnn-rnn", 1024), ("damsm", 256)):    # those of runs/ are found
        encoder = common.get_text_encoder(kind, dataset, "", "cpu", rms=7)
        assert encoder.dim == dim and not trained
        for scale in (1, 1, 2):    # the second is read from the cache
            encoder.config["scale"] *= scale
            x = common.embed_captions(encoder, own)
            assert x.norm() / 44 ** 0.5 == pytest.approx(7 * scale)
    dataset.name += "/../other/own"    # a folder of the same name: trained anew
    common.get_text_encoder("damsm", dataset, "", "cpu")
    path = Path("runs/damsm-own/encoder.pt")
    assert trained == [("damsm", dataset.name, "", "cpu", path)]

def test_joint_embedding_loss():
    (image, text), expect = np.random.default_rng(0).standard_normal((2, 7, 5)), 0
    classes = [0, 1, 2, 1, 3, 4, 0]
    for i, j in np.ndindex(7, 7):
        if classes[i] != classes[j]:
            for wrong in (image[i] @ text[j], image[j] @ text[i]):    # text, image
                expect += max(0, 1 + wrong - image[i] @ text[i]) / 49
    loss = common.joint_embedding_loss(*map(torch.tensor, (image, text, classes)))
    assert loss.item() == pytest.approx(expect, rel=1e-12)

def test_damsm_losses():
    rng, classes, lengths = np.random.default_rng(2), [0, 1, 1, 2, 0], [3, 1, 2, 3, 2]
    regions, words = rng.standard_normal((5, 6, 4)), rng.standard_normal((5, 6, 3))
    image, sentence = rng.standard_normal((2, 5, 6))
    score, expect = np.zeros((2, 5, 5)), np.zeros(2)
    for i, j in np.ndindex(5, 5):
        e = words[j, :, :lengths[j]]                        # (6, T)
        s = np.exp(e.T @ regions[i])                        # (T, 4)
        a = np.exp(4 * s / s.sum(0))                        # s is normalised over the words
        c = regions[i] @ (a / a.sum(1, keepdims=True)).T    # (6, T)
        cosine = (c * e).sum(0) / np.linalg.norm(c, axis=0) / np.linalg.norm(e, axis=0)
        score[0, i, j] = 10 * math.log(np.exp(5 * cosine).sum())
        norms = np.linalg.norm(image[i]) * np.linalg.norm(sentence[j])
        score[1, i, j] = 10 * image[i] @ sentence[j] / norms
    for k, i in np.ndindex(2, 5):
        others = [j for j in range(5) if j == i or classes[j] != classes[i]]
        for s in (score[k], score[k].T):
            expect[k] += (math.log(sum(math.exp(s[i, j]) for j in others)) - s[i, i]) / 5
    loss = common.word_loss(*map(torch.tensor, (regions, words, lengths, classes)))
    assert loss.item() == pytest.approx(expect[0], rel=1e-10)
    loss = common.sentence_loss(*map(torch.tensor, (image, sentence, classes)))
    assert loss.item() == pytest.approx(expect[1], rel=1e-10)

def test_checkpoints():
    path = Path("run/last.pt")
    common.save_checkpoint(path, {"kind": "x", "net": torch.nn.Linear(2, 1), "n": 1})
    with pytest.raises(AttributeError):    # a function of a function cannot be pickled
        common.save_checkpoint(path, {"kind": "x", "n": torch.zeros(9), "bad": lambda: None})
    assert list(path.parent.iterdir()) == [path]
    state = common.load_checkpoint(path, "x")
    assert state["n"] == 1 and state["net"].keys() == {"weight", "bias"}
    for name, content in (("cut", path.read_bytes()[:600]), ("code", CODE), ("text", b"hello")):
        Path(name).write_bytes(content)
    for name, kind in ((path, "z"), ("cut", "x"), ("code", "x"), ("text", "x"), ("none", "x")):
        with pytest.raises(data.UserError, match=f"{name} is no {kind} checkpoint"):
            common.load_checkpoint(name, kind)
    assert not Path("ran").exists()

def parse(line):
    parser = argparse.ArgumentParser("tiny")
    parser.add_argument("--ngf", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    presets, fixed = {"toy": {"batch_size": 16}, "flowers": {"ngf": 5}}, ("data", "ngf", "seed")
    return common.parse_args(parser, presets, fixed, line.split())

def test_flags(capsys):
    state = {"kind": "tiny", "G": {}, "step": 7, "args": {"data": "flowers", "ngf": 6, "seed": 3}}
    common.save_checkpoint(Path("runs/a/last.pt"), state)
    for line, expect in (
            ("", ("toy", 128, 16, 0, "runs/tiny-toy")),
            ("--data flowers --seed 1", ("flowers", 5, 64, 1, "runs/tiny-flowers")),
            ("--out-dir runs/a --batch-size 9", ("flowers", 6, 9, 3, "runs/a")),
            ("--out-dir runs/a --seed 9 --sample red", ("flowers", 6, 64, 9, "runs/a"))):
        args, checkpoint = parse(line)
        found = args.data, args.ngf, args.batch_size, args.seed, str(args.out_dir)
        assert found == expect and (checkpoint is not None) == ("runs/a" in line)
    for line, message in (("--ngf 5", "ngf 5 contradicts"), ("--data toy", "data toy contradicts"),
                          ("--seed 1", "seed 1"), ("--evaluate --out-dir runs/b", "b/last.pt")):
        with pytest.raises((SystemExit, data.UserError)) as error:    # both end with status 2
            parse(f"--out-dir runs/a {line}")
        assert message in capsys.readouterr().err + str(error.value)
        assert getattr(error.value, "code", 2) == 2

def test_frechet_distance():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 5)), rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5))
    expect = x.var(0, ddof=1).sum()    # against a point: |m1 - m2|^2 + tr(C1)
    expect += ((x.mean(0) - y[0]) ** 2).sum()
    points = torch.from_numpy(y[:1]).expand(9, -1)
    assert common.frechet_distance(torch.from_numpy(x), points) == pytest.approx(expect, rel=1e-7)
    (value, vector), c2 = np.linalg.eigh(np.cov(x.T)), np.cov(y.T)    # they do not commute
    root = vector * np.sqrt(value) @ vector.T    # C1^(1/2): the other formula of the trace
    expect = ((x.mean(0) - y.mean(0)) ** 2).sum() + value.sum() + np.trace(c2)
    expect -= 2 * np.sqrt(np.linalg.eigvalsh(root @ c2 @ root)).sum()
    distance = common.frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert distance == pytest.approx(expect, rel=1e-10)

def test_golden_inception(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared("weights")))
    golden = np.load(shared("golden", "fid_flowers.npz"))
    images = torch.from_numpy(golden["images_a"]).permute(0, 3, 1, 2) / 127.5 - 1
    pooled, regions = common.FIDInception()(images)
    np.testing.assert_allclose(pooled, golden["features_a"], atol=1e-4, rtol=0)
    assert regions.shape == (8, 768, 36)

@pytest.mark.slow
def test_golden_fid(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared("weights")))
    golden, net, sets = np.load(shared("golden", "fid_flowers.npz")), common.FIDInception(), []
    for ids in (golden["ids_a"], golden["ids_b"]):
        records = [data.Record(shared("data", f"flowers/jpg/image_{i:05}.jpg"), [], 0) for i in ids]
        features = torch.cat([net(torch.from_numpy(x) / 127.5 - 1)[0]
                              for x in data.load_images(records, 64, "golden FID")])
        sets.append(features)
    assert common.frechet_distance(*sets) == pytest.approx(float(golden["fid"]), rel=0.005)

def test_r_precision(monkeypatch):
    captions = torch.arange(3000)
    classes, rng = captions % 7, torch.Generator().manual_seed(0)
    axis, noise = torch.eye(7)[classes], torch.randn(2, 3000, 7, generator=rng)
    assert 0 < common.r_precision(noise[0], captions, noise[1], classes) < 0.02    # 1 of 100
    text = axis + noise[0] / 100    # only classes differ; other captions of the own do not count
    assert common.r_precision(axis, captions, text, classes) == 1
    assert common.r_precision(axis.roll(1, 1), captions, text, classes) == 0
    numbers = torch.randint(3000, (3000, 100), generator=rng)
    monkeypatch.setattr(data, "sample_other_class", lambda *_: numbers[:, 1:])
    image, hits = noise[0, numbers[:, 0]] + noise[1], 0
    for x, row in zip(image, numbers):
        cosine = (noise[0, row] @ x / noise[0, row].norm(dim=1)).tolist()
        hits += cosine[0] == max(cosine)
    assert 0.2 < common.r_precision(image, numbers[:, 0], noise[0], classes) == hits / 3000 < 0.8

def test_order_of_captions_and_toy_metric():
    dataset = data.load_dataset("toy", "test", 64)
    captions, n = common.evaluation_captions(dataset, 6000), len(dataset.captions)
    order = torch.cat(captions)
    assert torch.equal(order[:n].sort().values, torch.arange(n)) and len(order) == 6000
    assert torch.equal(order[n:], order[:6000 - n]) and order[:9].max() > 9
    captions = torch.cat(captions[:5])
    images = dataset.center_crop(dataset.caption_owners[captions])
    assert min(data.attribute_accuracy(images, captions, dataset).values()) > 0.98
    # Of other captions
    assert max(data.attribute_accuracy(images.flip(0), captions, dataset).values()) < 0.6
