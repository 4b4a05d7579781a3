"""Test common.py: text encoders, their losses and training, files, flags, metrics, evaluation."""
import argparse
import functools
import json
import math
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor

import common
import data
from conftest import GOLDEN, load_module, shared

CODE = b"cbuiltins\nopen\n(S'ran'\nS'w'\ntR."  # a pickle that creates the file "ran"
WORDS = ["<end>", *(f"w{i}" for i in range(1, 49)), "café"]  # of the golden DAMSM encoder
CHINESE = "一朵粉红色的花有五片花瓣"


def make_folder(path, captions):
    """Write one small image per caption. Return the training set: all images, if below 20."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for number, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(caption, encoding="utf-8")
    return data.load_dataset(str(path.resolve()), size=64)


def tiny_char_encoder():
    return common.CharCNNRNN((8, 8, 8))


def user_error(message):
    """Expect a UserError whose text contains a regular expression."""
    return pytest.raises(data.UserError, match=message)


# ---- Released text encoders


def save_released(name):
    """Save the encoder of golden figures as its authors did. Return its path."""
    if name == "char_cnn_rnn":
        names_file, prefix = "char_cnn_rnn_names.json", "char_cnn_rnn"
    else:
        names_file, prefix = "damsm_released_names.json", "text_encoder"
    tables = json.loads((GOLDEN / names_file).read_text())
    shapes = next(iter(tables.values()))
    if name == "damsm_text":
        shapes["encoder.weight"] = (len(WORDS), 300)
    weights = load_module(GOLDEN / "golden_weights.py").fill(prefix, shapes)
    state = {key: value.float() for key, value in weights.items()}

    path = Path("root/cub/damsm/text_encoder200.pth")
    path.parent.mkdir(parents=True)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    # A pickle of Python 2: a list of two empty lists and a dict from number to word
    pickled_words = "".join(f"I{i}\nS'{word}'\np{i + 9}\ns" for i, word in enumerate(WORDS))
    pickled = f"(lp0\n(lp1\na(lp2\na(dp3\n{pickled_words}a."
    path.with_name("captions.pickle").write_text(pickled, "latin1")
    return path


def check_golden_embeddings(encoder, captions, expected):
    """Compare with golden figures, in one batch and one caption at a time."""
    together = encoder.encode(captions)
    np.testing.assert_allclose(together, expected, atol=1e-5, rtol=0)
    for caption, row in zip(captions, expected, strict=True):
        np.testing.assert_allclose(encoder.encode([caption])[0], row, atol=1e-5, rtol=0)


def test_released_char_cnn_rnn():
    golden = np.load(GOLDEN / "char_cnn_rnn.npz")
    encoder = common.load_text_encoder(save_released("char_cnn_rnn"))
    check_golden_embeddings(encoder, golden["captions"], golden["embeddings"])


def test_released_damsm():
    """The encoder of cub is found below --root, and its embeddings are not rescaled."""
    golden = np.load(GOLDEN / "damsm_text.npz")
    save_released("damsm_text")
    args = SimpleNamespace(text_encoder=None, root="root", device="cpu", embedding_rms=7)
    encoder = common.get_text_encoder("damsm", SimpleNamespace(name="cub"), args)
    words, _ = encoder(torch.from_numpy(golden["captions"]))
    np.testing.assert_allclose(words, golden["words"], atol=1e-5, rtol=0)
    captions = [" ".join(WORDS[i] for i in row if i) for row in golden["captions"]]
    check_golden_embeddings(encoder, captions, golden["sentences"])


def test_unusable_encoders_are_user_errors():
    damsm = save_released("damsm_text")
    pickled_words = damsm.with_name("captions.pickle")
    pickled_words.write_bytes(CODE)
    without_gates = tiny_char_encoder().state_dict()
    for key in list(without_gates):
        if "update" in key or "reset" in key:
            del without_gates[key]
    torch.save(without_gates, "flowers.pth")  # Reed's encoder of flowers is such a file
    Path("cut.pth").write_bytes(damsm.read_bytes()[:5000])
    for name in (damsm, pickled_words, "flowers.pth", "cut.pth", "none.pth"):
        with user_error(f"cannot load the text encoder {name}"):
            common.load_text_encoder(name)
    assert not Path("ran").exists()


# ---- Tokens and prompts


def test_tokens_of_characters():
    tokens = tiny_char_encoder().tokenize(["A-b é", "x" * 300])
    # "-" occurs twice in the alphabet, and its second place counts; "é" is a blank
    assert tokens[0].tolist() == [1, 60, 2, 70] + [0] * 197
    assert tokens[1].tolist() == [24] * 201


def test_tokens_of_words():
    torch.save(common.DAMSMTextEncoder(WORDS).state_dict(), "damsm.pt")
    state = torch.load("damsm.pt", weights_only=True)
    encoder = common.text_encoder_from_state_dict(state)
    tokens = encoder.tokenize(["W3, unheard-of CAFÉ!", "w1", "unheard"])
    assert tokens.tolist() == [[3, 49], [1, 0], [0, 0]]
    assert encoder.encode(["of"]).isfinite().all()

    def tokens_of_forty_words(seed):
        rng = torch.Generator().manual_seed(seed)
        return encoder.tokenize([" ".join(WORDS[1:41])], rng)[0]

    row = tokens_of_forty_words(7)
    assert len(row) == 18 and (row.diff() > 0).all() and row.max() <= 40
    assert torch.equal(row, tokens_of_forty_words(7))
    assert not torch.equal(row, tokens_of_forty_words(8))


def test_chinese_and_japanese_characters_are_words():
    """Their texts have no blanks, so that a word of a whole caption would occur only once."""
    split = common.DAMSMTextEncoder.split
    assert split("一朵红花, 3 petals") == ["一", "朵", "红", "花", "3", "petals"]
    assert split("あかいバラ") == ["あ", "か", "い", "バ", "ラ"]
    assert split("Café-Rose") == ["café", "rose"]


def test_unknown_words_of_a_prompt_are_printed(capsys):
    encoder = common.DAMSMTextEncoder(["<end>", "a", "pink", "flower"])
    x = encoder.encode_prompts("a zyzzyva flower")
    assert torch.equal(x, encoder.encode(["a flower"]))
    assert "warning: unknown to the text encoder: zyzzyva\n" in capsys.readouterr().out


def test_short_prompts_are_repeated(capsys):
    """The length to reach, min_prompt_length, is part of the state dict."""
    encoder = tiny_char_encoder()
    encoder.config["min_prompt_length"] = 38
    encoder = common.text_encoder_from_state_dict(encoder.state_dict())
    x = encoder.encode_prompts(["pink flower", "this flower is pink"])
    repeated = ["pink flower pink flower pink flower", "this flower is pink"]  # 35, 19 characters
    assert torch.equal(x, encoder.encode(repeated))
    assert "unknown" not in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["zyzzyva", "...", ""])
def test_prompt_without_a_known_word(prompt):
    encoder = common.DAMSMTextEncoder(["<end>", "a", "pink", "flower"])
    with user_error("the text encoder knows nothing of"):
        encoder.encode_prompts(["a flower", prompt])


def test_prompt_without_a_known_character():
    with user_error("the text encoder knows nothing of '花'"):
        tiny_char_encoder().encode_prompts("花")


# ---- Captions that a text encoder cannot read


def read_line(encoder, captions, capsys):
    """Return the line that check_captions prints."""
    encoder.check_captions(captions)
    line = capsys.readouterr().out
    assert line.endswith(" of the captions\n") and line.count("\n") == 1
    return line.removesuffix(" of the captions\n")


@pytest.mark.parametrize("captions, share", [
    (["red", "a red flower, 2 petals"], 100.0),
    (["x" * 24 + "é", "y" * 25], 98.0),
    (["xx" + CHINESE[:2], "yyyy"], 75.0),
    (["x" * 402, "y" * 402], 50.0),
    (["é" * 150 + "x" * 150, "y" * 300], 42.0)])  # 51 and 201 of 600
def test_share_of_characters(captions, share, capsys):
    """Unknown characters and those beyond the 201st are not read. Shares below 95% are warnings."""
    line = read_line(tiny_char_encoder(), captions, capsys)
    start = "warning: " if share < 95 else ""
    assert line == f"{start}the text encoder reads {share}% of the characters"


@pytest.mark.parametrize("captions, share", [
    (["w1, w2!", "w3"], 100.0),
    (["w1 w2 unheard", "w3"], 75.0),
    ([" ".join(WORDS[1:37]), "w1"], 51.4)])  # 18 and 1 of 37
def test_share_of_words(captions, share, capsys):
    """Unknown words and those beyond 18 are not read."""
    line = read_line(common.DAMSMTextEncoder(WORDS), captions, capsys)
    start = "warning: " if share < 95 else ""
    assert line == f"{start}the text encoder reads {share}% of the words"


def test_captions_that_read_alike_are_an_error():
    captions = [CHINESE[i:i + 6] for i in range(5)]
    with user_error("all captions alike; it knows the characters a b.*train dfgan.py"):
        tiny_char_encoder().check_captions(captions)
    with user_error("all captions alike; it knows the words .*w1"):
        common.DAMSMTextEncoder(WORDS).check_captions(captions)
    tiny_char_encoder().check_captions(["one caption"] * 3)  # equal captions read alike


def test_chinese_folder_needs_another_encoder():
    """Training stops before its first step. The cache of embeddings is not written."""
    dataset = make_folder("own", [CHINESE[i:] for i in range(4)])
    with user_error("reads all captions alike"):
        common.train_text_encoder(
            "char-cnn-rnn", dataset.name, "", "cpu", Path("x.pt"), 1, "small")
    with user_error("reads all captions alike"):
        common.embed_captions(tiny_char_encoder(), dataset)
    assert not list(Path().rglob("*.pt"))


# ---- Training and choice of text encoders


def train_in(home, kind, iterations, path):
    """Train a text encoder on images of `home`. Return its file, itself and its embeddings."""
    name = str(home / "own")
    common.train_text_encoder(kind, name, "", "cpu", path, iterations, "small")
    state = torch.load(path, weights_only=True)
    assert state["iterations"] == iterations
    encoder = common.load_text_encoder(path)
    dataset = data.load_dataset(name, size=64)
    x = encoder.encode(dataset.captions)
    assert x.isfinite().all() and x.std(0).max() > 1e-4
    rms = math.sqrt(x.double().square().sum(1).mean())
    assert encoder.config["rms"] == pytest.approx(rms, rel=1e-5)
    return state, encoder, x


def test_char_cnn_rnn_is_trained(home, monkeypatch, capsys):
    """The last layer holds the batch norm of training: embeddings have mean 0 and variance 1."""
    build = common.CharCNNRNN

    def build_small(widths):
        encoder = build([min(width, 16) for width in widths])
        for weight in encoder.parameters():  # large weights tell captions apart at once
            weight.data *= 4
        return encoder

    monkeypatch.setattr(common, "CharCNNRNN", build_small)
    state, encoder, x = train_in(home, "char-cnn-rnn", 50, Path("encoder.pt"))
    assert "it is not saved before it ends" in capsys.readouterr().out
    assert x.shape == (44, 1024)
    assert x.mean(0).abs().mean() < 0.2
    assert x.std(0).mean().item() == pytest.approx(1, abs=0.3)
    assert encoder.config["min_prompt_length"] == len("it is red")
    # The projection of images starts at 0
    assert state["image_encoder"]["global_proj.weight"].any()


def test_damsm_is_trained(home):
    """After 20 iterations, captions of one colour are alike."""
    _, encoder, x = train_in(home, "damsm", 20, Path("encoder.pt"))
    assert x.shape == (44, 256)
    assert "min_prompt_length" not in encoder.config
    red = encoder.encode(["a red picture"])
    also_red = encoder.encode(["it is red"])
    green = encoder.encode(["a green picture"])
    same_colour = torch.cosine_similarity(red, also_red)
    other_colour = torch.cosine_similarity(red, green)
    assert same_colour > other_colour + 0.5


def encoder_args(**changes):
    defaults = dict(text_encoder=None, root="datasets", device="cpu", embedding_rms=7)
    return SimpleNamespace(**(defaults | changes))


@pytest.mark.parametrize("kind, dim", [("char-cnn-rnn", 1024), ("damsm", 256)])
def test_encoder_of_the_run_is_used_and_rescaled(kind, dim, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(common, "train_text_encoder", None)  # is not called
    own = data.load_dataset(data.dataset_id("own"), size=64)
    encoder = common.get_text_encoder(kind, own, encoder_args())
    assert encoder.dim == dim
    capsys.readouterr()
    for scale in (1, 1, 2):  # the second is read from the cache
        encoder.config["scale"] *= scale
        x = common.embed_captions(encoder, own)
        assert x.square().sum(1).mean().sqrt().item() == pytest.approx(7 * scale)
        assert torch.equal(x, encoder.encode(own.captions))
    printed = capsys.readouterr().out
    assert printed.count("RMS length of the embeddings: 7.00") == 2


def test_encoder_of_a_checkpoint_and_of_a_file(home, monkeypatch):
    monkeypatch.chdir(home)
    path = "runs/damsm-own/encoder.pt"
    state = torch.load(path, weights_only=True)["text_encoder"]
    dataset = SimpleNamespace(name="own")
    args = encoder_args(text_encoder=path)
    encoder = common.get_text_encoder("damsm", dataset, args)
    assert encoder.config["scale"] == 7 / state["_extra_state"]["rms"]
    # The encoder of a checkpoint was rescaled when its run began
    args = encoder_args(text_encoder="none.pt")
    encoder = common.get_text_encoder("damsm", dataset, args, {"text_encoder": state})
    assert "scale" not in encoder.config
    assert not any(p.requires_grad for p in encoder.parameters())
    args = encoder_args(text_encoder=path)
    with user_error("is not an encoder of the kind char-cnn-rnn"):
        common.get_text_encoder("char-cnn-rnn", dataset, args)


def test_encoder_follows_the_captions(monkeypatch, capsys):
    """After a rewrite of the captions the encoder is trained anew. After a few more, it is kept."""
    train = common.train_text_encoder
    chosen_features = []

    def train_briefly(*arguments, features):
        chosen_features.append(features)
        train(*arguments, iterations=1, features="small")

    monkeypatch.setattr(common, "train_text_encoder", train_briefly)
    path = common.encoder_path("damsm", "own")
    captions = [f"a red flower {i}" for i in range(10)]

    def encoder_of(captions):
        """Return the vocabulary of the encoder for a folder, and what is printed about it."""
        dataset = make_folder("own", captions)
        capsys.readouterr()
        encoder = common.get_text_encoder("damsm", dataset, encoder_args())
        printed = capsys.readouterr().out.splitlines()
        lines = [line for line in printed if str(path) in line]
        return encoder.config["vocabulary"], lines

    vocabulary, lines = encoder_of(captions)
    assert "red" in vocabulary and len(lines) == 1
    assert lines[0].startswith(f"training the text encoder {path}: 1 iterations")
    vocabulary, lines = encoder_of(captions)
    assert lines == []

    vocabulary, lines = encoder_of([*captions, "a red flower of another size"])
    assert "another" not in vocabulary
    share = f"{path} was trained with 91% of these captions"
    assert lines == [f"{share}; it is kept"]

    vocabulary, lines = encoder_of([f"une fleur rouge {i}" for i in range(11)])
    assert "fleur" in vocabulary and "flower" not in vocabulary
    share = f"{path} was trained with 0% of these captions"
    assert lines[0] == f"{share}; it is trained anew" and len(lines) == 2

    # A folder of the same name elsewhere, with other captions
    shutil.move("own", "old")
    vocabulary, lines = encoder_of([f"ein blaues Haus {i}" for i in range(10)])
    assert "haus" in vocabulary

    # A file of the code before does not hold the captions
    state = torch.load(path, weights_only=True)
    del state["caption_hashes"]
    torch.save(state, path)
    vocabulary, lines = encoder_of([f"a red flower {i}" for i in range(10)])
    assert "flower" in vocabulary

    # A new encoder has the image features of the older one
    assert chosen_features == [None, "small", "small", "small"]


def test_missing_inception_network_names_the_file(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(data.UserError) as error:
        common.FIDInception()
    for part in ("no route to host", common.INCEPTION, "checkpoints",
                 "--image-features small"):
        assert part in str(error.value)


# ---- Losses of the text encoders


def test_joint_embedding_loss():
    """The mean over pairs of margins of other classes, with texts and with images."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((7, 5))
    text = rng.standard_normal((7, 5))
    classes = [0, 1, 2, 1, 3, 4, 0]
    expected = 0
    for i, j in np.ndindex(7, 7):
        if classes[i] != classes[j]:
            right = image[i] @ text[i]
            expected += max(0, 1 + image[i] @ text[j] - right) / 49
            expected += max(0, 1 + image[j] @ text[i] - right) / 49
    loss = common.joint_embedding_loss(
        torch.tensor(image), torch.tensor(text), torch.tensor(classes))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def damsm_loss_of_scores(score, classes):
    """Return the mean of -log P of the right pairs over rows, plus over columns (eq. 11, 12)."""
    loss = 0
    for s in (score, score.T):
        for i in range(len(s)):
            others = [j for j in range(len(s)) if j == i or classes[j] != classes[i]]
            total = sum(math.exp(s[i, j]) for j in others)
            loss += (math.log(total) - s[i, i]) / len(s)
    return loss


def test_sentence_loss():
    rng = np.random.default_rng(2)
    image = rng.standard_normal((5, 6))
    sentence = rng.standard_normal((5, 6))
    classes = [0, 1, 1, 2, 0]
    score = np.zeros((5, 5))
    for i, j in np.ndindex(5, 5):
        norms = np.linalg.norm(image[i]) * np.linalg.norm(sentence[j])
        score[i, j] = 10 * image[i] @ sentence[j] / norms
    loss = common.sentence_loss(
        torch.tensor(image), torch.tensor(sentence), torch.tensor(classes))
    assert loss.item() == pytest.approx(damsm_loss_of_scores(score, classes), rel=1e-10)


def word_score(regions, words):
    """Return the match of regions (D, N) and words (D, T) (AttnGAN, eq. 7 to 10)."""
    similarity = np.exp(words.T @ regions)  # (T, N)
    similarity = similarity / similarity.sum(0)  # eq. 8: over the words
    attention = np.exp(4 * similarity)
    attention = attention / attention.sum(1, keepdims=True)  # eq. 9: over the regions
    context = regions @ attention.T  # (D, T)
    norms = np.linalg.norm(context, axis=0) * np.linalg.norm(words, axis=0)
    cosine = (context * words).sum(0) / norms
    return 10 * math.log(np.exp(5 * cosine).sum())


def test_word_loss():
    rng = np.random.default_rng(2)
    regions = rng.standard_normal((5, 6, 4))
    words = rng.standard_normal((5, 6, 3))
    lengths = [3, 1, 2, 3, 2]
    classes = [0, 1, 1, 2, 0]
    score = np.zeros((5, 5))
    for i, j in np.ndindex(5, 5):
        score[i, j] = word_score(regions[i], words[j, :, :lengths[j]])
    loss = common.word_loss(
        torch.tensor(regions), torch.tensor(words), torch.tensor(lengths), torch.tensor(classes))
    assert loss.item() == pytest.approx(damsm_loss_of_scores(score, classes), rel=1e-10)


# ---- Files


def test_checkpoint_is_written_whole_or_not_at_all():
    path = Path("run/last.pt")
    common.save_checkpoint(path, {"kind": "x", "net": torch.nn.Linear(2, 1), "n": 1})
    unusable = {"kind": "x", "n": torch.zeros(9), "bad": lambda: None}
    with pytest.raises(AttributeError):  # a function cannot be pickled
        common.save_checkpoint(path, unusable)
    assert list(path.parent.iterdir()) == [path]
    state = common.load_checkpoint(path, "x")
    assert state["n"] == 1
    assert state["net"].keys() == {"weight", "bias"}


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 109 vs 98"),
    OSError(28, "No space left on device")])
def test_full_disk_keeps_the_older_checkpoint(error, monkeypatch):
    path = Path("run/last.pt")
    common.save_checkpoint(path, {"kind": "x", "step": 1})

    def save_a_part(state, part):
        part.write_bytes(b"half of the file")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_a_part)
        with user_error("cannot write run/last.pt, an older file is kept .*(pos|space)"):
            common.save_checkpoint(path, {"kind": "x", "step": 2})
    assert common.load_checkpoint(path, "x")["step"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_unusable_checkpoints_are_user_errors():
    path = Path("last.pt")
    common.save_checkpoint(path, {"kind": "x", "n": torch.zeros(100)})
    Path("cut").write_bytes(path.read_bytes()[:600])
    Path("code").write_bytes(CODE)
    Path("text").write_bytes(b"hello")
    for name in ("cut", "code", "text", "none"):
        with user_error(f"{name} is not a checkpoint of x"):
            common.load_checkpoint(name, "x")
    with user_error("last.pt is not a checkpoint of z"):
        common.load_checkpoint(path, "z")
    assert not Path("ran").exists()


def test_check_writable():
    """The tests may run as root, who may write everywhere: a path below a file stays refused."""
    common.check_writable(Path("runs/new"))
    assert list(Path("runs/new").iterdir()) == []
    Path("file").write_text("")
    with user_error("cannot write to file/run .*--out-dir"):
        common.check_writable(Path("file/run"))


def test_log_has_all_columns():
    history = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "fid": 9.25}]
    common.save_log(Path("log.csv"), history)
    rows = Path("log.csv").read_text().split()
    assert rows == ["epoch,loss,fid", "1,0.5,", "2,,9.25"]


def test_names_of_samples_differ_where_the_pictures_differ():
    two_prompts = common.sample_name(["pink", "flower"], "sample", 100, 8)
    one_prompt = common.sample_name(["pink flower"], "sample", 100, 8)
    other_step = common.sample_name(["pink flower"], "sample", 101, 8)
    names = [two_prompts, one_prompt, other_step]
    for caption in ("very " * 30 + "red", "very " * 30 + "blue", CHINESE, CHINESE[:3]):
        names.append(common.sample_name([caption]))
    assert len(set(names)) == 7
    assert one_prompt == common.sample_name(["pink flower"], "sample", 100, 8)
    for name in names:
        assert re.fullmatch(r"[a-z0-9-]{1,90}", name)
    assert one_prompt.startswith("pink-flower-")


def test_short_hash_depends_on_every_byte():
    x = torch.arange(5000.0)
    changed = x.clone()
    changed[2500] += 1e-3  # in the middle, which repr leaves out
    assert common.short_hash(x, "a") == common.short_hash(x.clone(), "a")
    assert common.short_hash(x, "a") != common.short_hash(changed, "a")
    assert common.short_hash(x, "a") != common.short_hash(x, "b")
    assert re.fullmatch("[0-9a-f]{12}", common.short_hash(x))


def test_grid_with_its_captions_beside():
    images = torch.rand(4, 3, 5, 5) * 2 - 1
    common.save_grid(Path("run/grid.png"), images, 2, ["a pink flower", CHINESE])
    captions = Path("run/grid.txt").read_text(encoding="utf-8")
    assert captions == f"a pink flower\n{CHINESE}\n"
    grid = to_tensor(Image.open("run/grid.png"))
    assert grid.shape == (3, 16, 16)  # two pixels around each image
    for number in range(4):
        top = 2 + 7 * (number // 2)
        left = 2 + 7 * (number % 2)
        image = grid[:, top:top + 5, left:left + 5]
        assert (image - (images[number] / 2 + 0.5)).abs().max() < 0.003


def draw_grey(noise, embeddings):
    """A stand-in for a generator: the grey of an image is its embedding plus its noise."""
    return (embeddings + noise)[:, :, None, None].expand(-1, 3, 6, 6)


def sample_args(num_images, captions):
    return SimpleNamespace(
        num_images=num_images, samples_per_caption=2, captions=captions)


def test_samples_as_a_grid(capsys):
    args = sample_args(None, ["red", "blue"])
    noise = torch.tensor([[0.0], [0.1], [0.0], [0.1]])
    embeddings = torch.tensor([[0.2], [0.2], [-0.5], [-0.5]])
    common.save_samples(Path("run/sample-0.5"), draw_grey, noise, embeddings, args)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["red", "blue"]
    grid = to_tensor(Image.open(printed[2]))
    assert grid.shape == (3, 18, 18)
    assert grid[0, 4, 12].item() == pytest.approx((0.2 + 0.1) / 2 + 0.5, abs=0.003)
    assert grid[0, 12, 4].item() == pytest.approx(-0.5 / 2 + 0.5, abs=0.003)
    assert Path(printed[2]).with_suffix(".txt").read_text() == "red\nblue\n"


def test_numbered_samples_replace_older_ones():
    """An FID over the folder would count images of an earlier call."""
    folder = Path("run/sample")
    noise = torch.zeros(6, 1)
    embeddings = torch.tensor([0.2, 0.2, 0.2, -0.5, -0.5, -0.5])[:, None]
    args = sample_args(3, ["red", "blue"])
    common.save_samples(folder, draw_grey, noise, embeddings, args)
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == [f"{number:05}.png" for number in range(6)]
    assert (folder / "00002.txt").read_text() == "red\n"
    assert (folder / "00003.txt").read_text() == "blue\n"

    (folder / "notes.txt").write_text("of the user")
    embeddings = torch.tensor([[0.0], [0.8]])
    args = sample_args(1, ["green", "white"])
    common.save_samples(folder, draw_grey, noise[:2], embeddings, args)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000.png", "00000.txt", "00001.png", "00001.txt", "notes.txt"]
    assert (folder / "00001.txt").read_text() == "white\n"
    image = to_tensor(Image.open(folder / "00001.png"))[:, 2:-2, 2:-2]
    assert image.min().item() == pytest.approx(0.8 / 2 + 0.5, abs=0.003)


# ---- Runs


def test_errors_of_the_user_are_one_line(capsys):
    def fail(error):
        raise error

    assert common.run(lambda: None) is None
    for error in (data.UserError("wrong folder"), OSError("wrong folder")):
        assert common.run(functools.partial(fail, error)) == 2
        assert capsys.readouterr().err == "error: wrong folder\n"
    assert common.run(functools.partial(fail, KeyboardInterrupt())) == 130
    assert "encoder in training is not saved" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)


def test_graceful_stop(monkeypatch, capsys):
    """A second Ctrl-C ends the program. finish() brings the handlers of before back."""
    handlers = {signal.SIGINT: "before", signal.SIGTERM: "before"}

    def set_handler(number, handler):
        before = handlers[number]
        handlers[number] = handler
        return before

    monkeypatch.setattr(signal, "signal", set_handler)
    stop = common.GracefulStop()
    assert not stop.requested()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert stop.requested() and stop.signal == signal.SIGTERM
    assert "run the same command to resume" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        handlers[signal.SIGINT](signal.SIGINT, None)
    assert end.value.code == 130
    stop.finish()
    assert handlers == {signal.SIGINT: "before", signal.SIGTERM: "before"}


def test_means_of_losses_over_batches():
    """The values are copied, because a CUDA graph overwrites them."""
    means = common.Means()
    values = {"loss_d": torch.zeros(()), "loss_g": torch.zeros(())}
    for loss_d, loss_g in ((0.5, 3.0), (1.5, -1.0), (0.25, 4.0)):
        values["loss_d"].fill_(loss_d)
        values["loss_g"].fill_(loss_g)
        means.add(values)
    assert means.means() == {"loss_d": 0.75, "loss_g": 2.0}
    assert means.summary() == "loss_d 0.75  loss_g 2.00"


def test_means_of_losses_in_bfloat16():
    """A sum in bfloat16 would stop at 256: the next number that it can hold is 258."""
    means = common.Means()
    loss_d = torch.ones(())
    d_real = loss_d.bfloat16()
    for _ in range(1000):
        means.add({"loss_d": loss_d, "d_real": d_real})
    assert means.means() == {"loss_d": 1.0, "d_real": 1.0}


def test_means_of_losses_over_ranks(monkeypatch):
    """Each rank counts its own batches, and the means are averaged."""
    other_rank = torch.tensor([3.0, 5.0])
    monkeypatch.setattr(common, "reduce_mean", lambda x: (x + other_rank) / 2)
    means = common.Means()
    means.add({"loss_d": torch.tensor(2.0), "loss_g": torch.tensor(0.0)})
    means.add({"loss_d": torch.tensor(4.0), "loss_g": torch.tensor(2.0)})
    assert means.means() == {"loss_d": 3.0, "loss_g": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_training(value):
    means = common.Means()
    means.add({"loss_d": torch.tensor(1.0), "loss_g": torch.tensor(value)})
    with pytest.raises(AssertionError, match="a loss is not finite.*loss_g"):
        means.means()


FLOWERS = [f"flower number {i}" for i in range(36)]


def first_step(dataset, checkpoint, capsys):
    """Return common.first_step at batches of 4, and what it printed."""
    capsys.readouterr()
    step = common.first_step(checkpoint, dataset, data.Batches(dataset, 4))
    return step, capsys.readouterr().out


def test_run_goes_on_where_its_dataset_changed(capsys):
    """Three epochs are done, whatever the number of steps of an epoch is now."""
    dataset = make_folder("own", FLOWERS[:12])
    checkpoint = {"step": 10, "epoch": 3, "caption_hashes": dataset.caption_hashes()}
    assert first_step(dataset, checkpoint, capsys) == (10, "")

    tripled = make_folder("own", FLOWERS)
    step, printed = first_step(tripled, checkpoint, capsys)
    assert 30 < len(tripled) < 36 and step == 3 * (len(tripled) // 4)
    assert printed == (f"the dataset has changed: {len(tripled)} training images now; "
                       "training goes on after epoch 3\n")

    for number in range(5, 36):
        Path(f"own/{number}.png").unlink()
    reduced = data.load_dataset(dataset.name, size=64)
    step, printed = first_step(reduced, checkpoint, capsys)
    assert step == 3 and "5 training images now" in printed


def test_run_knows_its_folder_by_name_and_captions(capsys):
    """The folder may lie elsewhere, but another one of the same name is refused."""
    dataset = make_folder("own", FLOWERS[:12])
    checkpoint = {"step": 10, "epoch": 3, "caption_hashes": dataset.caption_hashes()}
    shutil.copytree("own", "moved/own")
    moved = data.load_dataset(str(Path("moved/own").resolve()), size=64)
    assert first_step(moved, checkpoint, capsys) == (10, "")
    other = make_folder("other/own", [f"bird number {i}" for i in range(12)])
    with user_error("other/own has other captions.*another --out-dir"):
        first_step(other, checkpoint, capsys)
    # Checkpoints of the code before do not hold the captions
    assert first_step(other, {"step": 10, "epoch": 3}, capsys) == (10, "")


def test_announce(capsys):
    args = SimpleNamespace(device="cpu", out_dir="runs/x", epochs=3, eval_every=None)
    G = torch.nn.Linear(9, 100)
    D = torch.nn.Linear(4, 400)
    common.announce(args, G, D, range(20), 10, 15)
    assert capsys.readouterr().out == (
        "parameters: G 1,000, D 2,000\n20 images, 15 steps on cpu, to runs/x\n")
    common.announce(args, G, D, range(20), 15, 15)
    message = "already trained for {} epochs; a larger --epochs trains on"
    assert message.format(3) in capsys.readouterr().out
    args.epochs = 2  # less than before
    common.announce(args, G, D, range(20), 15, 10)
    assert message.format(3) in capsys.readouterr().out


@pytest.mark.parametrize("seconds, lines", [
    (5, ["about 2 minutes"]),
    (5 * 60, ["about 96 minutes"]),
    (5 * 600, ["about 16 hours"]),
    (5 * 3600, ["about 95 hours",
                "warning: on a CPU, a new run with --nf 16 is much faster"])])
def test_duration_of_training_after_five_steps(seconds, lines, capsys):
    """A resumed run does 100 steps; the first five took some seconds."""
    args = SimpleNamespace(batch_size=8, device="cpu")
    bar = common.TrainingProgress(args, "training", 20, 120, "--nf 16")
    bar.start -= seconds
    for _ in range(8):
        bar.update(8)
    assert capsys.readouterr().out.splitlines() == lines


# ---- Flags

PRESETS = {"toy": {"batch_size": 16}, "flowers": {"ngf": 5}}
RESUME_ARGS = ("data", "ngf", "seed")


def tiny_parser():
    parser = argparse.ArgumentParser("tiny.py")
    add = parser.add_argument
    add("--ngf", type=int, default=128, help="width of G")
    add("--batch-size", type=common.positive_int, default=64, help="images")
    common.add_shared_flags(parser)
    return parser


def parse(line):
    """Return the flags of a command line of a script tiny, and its checkpoint."""
    argv = shlex.split(line)
    parser = tiny_parser()
    path = common.find_checkpoint("tiny", parser.parse_args(argv))
    return common.parse_args("tiny", parser, PRESETS, RESUME_ARGS, path, argv)


def save_tiny_run(path, **args):
    """Save a checkpoint of the script tiny."""
    args = {"data": "flowers", "ngf": 6, "seed": 3} | args
    state = {"kind": "tiny", "step": 7, "args": args}
    common.save_checkpoint(Path(path), state)


@pytest.mark.parametrize("line, expected", [
    ("", ("toy", 128, 16, 0, "runs/tiny-toy")),
    ("--data flowers --seed 1", ("flowers", 5, 64, 1, "runs/tiny-flowers")),
    ("--data toy --batch-size 8", ("toy", 128, 8, 0, "runs/tiny-toy")),
    ("--out-dir runs/a --batch-size 9", ("flowers", 6, 9, 3, "runs/a")),
    ("--out-dir runs/a --data flowers --seed 3", ("flowers", 6, 64, 3, "runs/a")),
    ("--out-dir runs/a --seed 9 --sample red", ("flowers", 6, 64, 9, "runs/a"))])
def test_defaults_of_checkpoint_preset_and_parser(line, expected):
    """The seed of samples is their own, not that of the run."""
    save_tiny_run("runs/a/last.pt")
    args, checkpoint = parse(line)
    found = (args.data, args.ngf, args.batch_size, args.seed, str(args.out_dir))
    assert found == expected
    assert (checkpoint is not None) == ("runs/a" in line)
    assert not args.bf16 and not args.cuda_graph and args.device == "cpu"


@pytest.mark.parametrize("line, message", [
    ("--out-dir runs/a --ngf 5", "--ngf 5 contradicts runs/a/last.pt, which has 6"),
    ("--out-dir runs/a --data toy", "--data toy contradicts runs/a/last.pt, which has flowers"),
    ("--out-dir runs/a --data my/flowers", "--data my/flowers contradicts"),
    ("--out-dir runs/a --seed 1", "--seed 1 contradicts"),
    ("--out-dir runs/a --text-encoder x.pt", "--text-encoder is for a new run"),
    ("--batch-size 0", "argument --batch-size: 0 is not a positive whole number"),
    ("--batch-size 1", "--batch-size must be at least 2 per process"),
    ("--num-images -2", "-2 is not a positive whole number"),
    ("--fid-samples 1.5", "1.5 is not a positive whole number"),
    ("--eval-every ''", " is not a positive whole number"),
    ("--sample 'a red flower' ' '", "a caption is blank"),
    ("--sample ''", "a caption is blank"),
    ("--interpolate red ''", "a caption is blank"),
    ("--interpolate-noise ''", "a caption is blank"),
    ("--sample red --evaluate", "not allowed with argument"),
    ("--device gpu", "--device gpu is not one of auto, cpu, cuda, cuda:N, mps"),
    ("--device cuda", "--device cuda: CUDA is not available"),
    ("--device cuda:1", "--device cuda:1: CUDA is not available"),
    ("--device mps", "--device mps: MPS is not available")])
def test_wrong_flags_end_with_status_2(line, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    save_tiny_run("runs/a/last.pt")

    def main():
        parse(line)

    try:
        status = common.run(main)
    except SystemExit as end:  # of argparse
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_batch_is_split_over_the_processes(monkeypatch, capsys):
    monkeypatch.setattr(common, "world_size", lambda: 3)
    for line, message in (("--batch-size 8", "must be a multiple of the 3 processes"),
                          ("--batch-size 3", "must be at least 2 per process")):
        with pytest.raises(SystemExit):
            parse(line)
        assert message in capsys.readouterr().err
    args, _ = parse("--batch-size 9")
    assert args.batch_size == 9


def test_positive_int():
    assert common.positive_int("1") == 1 and common.positive_int("030000") == 30000
    message = "is not a positive whole number"
    for text in ("0", "-1", "+1", "1.0", "1e3", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            common.positive_int(text)


def test_run_may_lie_elsewhere_with_its_folder(capsys):
    """A folder is known by its name: a copied run finds it where --data says."""
    save_tiny_run("runs/tiny-own/last.pt", data="/elsewhere/own")
    args, checkpoint = parse("--data here/own")
    assert args.data == str(Path("here/own").resolve()) and checkpoint["step"] == 7
    args, _ = parse("--out-dir runs/tiny-own --sample red")
    assert args.data == "/elsewhere/own"
    with pytest.raises(SystemExit):
        parse("--out-dir runs/tiny-own --data here/other")
    error = capsys.readouterr().err
    assert "--data here/other contradicts runs/tiny-own/last.pt" in error
    assert "which has /elsewhere/own" in error


WEIGHTS = "clone/weights/tiny-flowers.pt"


@pytest.mark.parametrize("line, expected", [
    ("", None),  # trains anew
    ("--data flowers", None),
    ("--sample red", WEIGHTS),
    ("--interpolate red blue", WEIGHTS),
    ("--evaluate", WEIGHTS),
    ("--data flowers --sample red", WEIGHTS),
    ("--data cub --sample red", None),  # there is no such file
    ("--data my/flowers --sample red", None),  # a folder, not the dataset
    ("--data coco", "runs/tiny-coco/last.pt"),
    ("--data coco --sample red", "runs/tiny-coco/last.pt"),  # not that of weights/
    ("--data here/own --evaluate", "runs/tiny-own/last.pt"),
    ("--out-dir runs/tiny-own --sample red", "runs/tiny-own/last.pt"),
    ("--out-dir runs/none --sample red", None)])
def test_checkpoint_of_the_run_or_of_weights(line, expected, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(Path("clone/common.py").resolve()))
    for path in (WEIGHTS, "clone/weights/tiny-coco.pt",
                 "runs/tiny-coco/last.pt", "runs/tiny-own/last.pt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("")
    args = tiny_parser().parse_args(shlex.split(line))
    path = common.find_checkpoint("tiny", args)
    if expected is None:
        assert path is None
    else:
        assert path.resolve() == Path(expected).resolve()


def test_samples_of_weights_get_a_folder_of_their_own(monkeypatch, capsys):
    """The folder of a later run with these data stays free."""
    monkeypatch.setattr(common, "__file__", str(Path("clone/common.py").resolve()))
    save_tiny_run(WEIGHTS)
    args, _ = parse("--sample red")
    assert args.out_dir == Path("runs/tiny-flowers-weights")
    assert args.captions == ["red"] and args.data == "flowers"
    assert "tiny-flowers.pt: 7 steps on flowers" in capsys.readouterr().out


def test_help_shows_the_defaults():
    parser = tiny_parser()
    common.describe_defaults(parser, PRESETS)
    text = " ".join(parser.format_help().split())
    for part in ("usage: python tiny.py [--help] [flags]",
                 "--ngf NGF width of G (default: 128; flowers: 5)",
                 "images (default: 64; toy: 16)",
                 "seed of a new run, or of samples (default: 0)",
                 "train in bfloat16 (default: on if CUDA supports it)",
                 "folder of the run (default: runs/<script>-<data>)",
                 "--sample CAPTION [CAPTION ...] draw images of captions --interpolate",
                 "--evaluate print the FID and other metrics"):
        assert part in text
    assert "None" not in text and "False" not in text and "SUPPRESS" not in text


# ---- Metrics


def fid_by_symmetric_root(x, y):
    """Return the FID of features in float64, with tr (C1^(1/2) C2 C1^(1/2))^(1/2)."""
    cov1 = np.cov(x.T)
    cov2 = np.cov(y.T)
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ cov2 @ root).clip(0)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return distance + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(eigenvalues).sum()


def test_frechet_distance():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 5))
    y = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5))  # covariances do not commute
    distance = common.frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert distance == pytest.approx(fid_by_symmetric_root(x, y), rel=1e-10)
    # The distance from a point is |m1 - m2|^2 + tr(C1)
    expected = ((x.mean(0) - y[0]) ** 2).sum() + x.var(0, ddof=1).sum()
    point = torch.from_numpy(y[:1]).expand(9, -1)
    distance = common.frechet_distance(torch.from_numpy(x), point)
    assert distance == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frechet_distance_refuses_features_that_are_not_finite(value):
    """The routine for eigenvalues may crash on them."""
    x = torch.randn(9, 4)
    broken = x.clone()
    broken[3, 2] = value
    for first, second in ((x, broken), (broken, x)):
        with pytest.raises(AssertionError, match="features are not finite"):
            common.frechet_distance(first, second)


def inception_score_by_loop(logits, splits):
    """Return exp of the mean KL divergence of p(y|x) from p(y), averaged over the splits."""
    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), splits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        p_y = p.mean(0)
        divergence = 0
        for i, k in np.ndindex(p.shape):
            divergence += p[i, k] * math.log(p[i, k] / p_y[k])
        scores.append(math.exp(divergence / len(p)))
    return np.mean(scores)


def test_inception_score():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((47, 6))
    score = common.inception_score(torch.from_numpy(logits))
    assert score == pytest.approx(inception_score_by_loop(logits, 10), rel=1e-12)
    score = common.inception_score(torch.from_numpy(logits), splits=3)
    assert score == pytest.approx(inception_score_by_loop(logits, 3), rel=1e-12)


def test_inception_score_of_known_cases():
    """The score is 1 if all images are alike, and K for certain images of K classes."""
    alike = torch.randn(1, 6).expand(40, -1)
    assert common.inception_score(alike) == pytest.approx(1)
    certain = 1000 * torch.eye(4).repeat(10, 1)  # each split of 4 rows has all 4 classes
    assert common.inception_score(certain) == pytest.approx(4)
    # Fewer images than splits: one image each
    assert common.inception_score(torch.randn(3, 6)) == pytest.approx(1)


def joint_embedding_accuracy_by_loop(image, text, image_classes, text_classes):
    """Return the accuracies of f_v and f_t (Reed et al., CVPR 2016, eq. 2 and 3)."""
    def best_class(x, others, classes):
        """Return the class whose members have the largest mean inner product with x."""
        products = {y: [] for y in sorted(set(classes))}
        for other, y in zip(others, classes):
            products[y].append(float(x @ other))
        return max(products, key=lambda y: np.mean(products[y]))

    f_v = [best_class(v, text, text_classes) == y for v, y in zip(image, image_classes)]
    f_t = [best_class(t, image, image_classes) == y for t, y in zip(text, text_classes)]
    return sum(f_v) / len(f_v), sum(f_t) / len(f_t)


def test_joint_embedding_accuracy_by_hand():
    """Class 0 has captions (1, 0), (3, 0), with mean (2, 0). Class 1 has (0, 1)."""
    text = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    text_classes = torch.tensor([0, 0, 1])
    image = torch.tensor([[1.0, 1.0], [1.0, 3.0], [0.0, 1.0]])
    image_classes = torch.tensor([0, 0, 1])
    f_v, f_t = common.joint_embedding_accuracy(image, text, image_classes, text_classes)
    # The image (1, 3) has products 2 and 3 with the two means, and is of class 0
    assert f_v == pytest.approx(2 / 3)
    # Images have means (1, 2) and (0, 1). The caption (0, 1) has 2 and 1, and is of class 1
    assert f_t == pytest.approx(2 / 3)


def test_joint_embedding_accuracy_against_a_loop():
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(30, 4, generator=rng, dtype=torch.double)
    text = torch.randn(50, 4, generator=rng, dtype=torch.double)
    image_classes = torch.arange(30) % 5
    text_classes = torch.randint(5, (50,), generator=rng)
    # Class centres make both accuracies neither chance nor 1
    centres = torch.randn(5, 4, generator=rng, dtype=torch.double)
    image += 0.5 * centres[image_classes]
    text += 0.5 * centres[text_classes]
    expected = joint_embedding_accuracy_by_loop(
        image, text, image_classes.tolist(), text_classes.tolist())
    found = common.joint_embedding_accuracy(image, text, image_classes, text_classes)
    assert found == pytest.approx(expected)
    assert 0.25 < min(found) and max(found) < 0.9


def test_r_precision_of_known_cases():
    captions = torch.arange(3000)
    classes = captions % 7
    axis = torch.eye(7)[classes]
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3000, 7, generator=rng)
    at_random = common.r_precision(noise[0], captions, noise[1], classes)
    assert 0 < at_random < 0.02  # 1 of 100
    # Only classes differ; other captions of the same class do not count
    text = axis + noise[0] / 100
    assert common.r_precision(axis, captions, text, classes) == 1
    assert common.r_precision(axis.roll(1, 1), captions, text, classes) == 0


def test_r_precision_against_a_loop(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(3000, 7, generator=rng)
    classes = torch.arange(3000) % 7
    numbers = torch.randint(3000, (3000, 100), generator=rng)  # the first is the right one
    image = text[numbers[:, 0]] + torch.randn(3000, 7, generator=rng)
    monkeypatch.setattr(data, "sample_other_class", lambda *args: numbers[:, 1:])
    hits = 0
    for x, row in zip(image, numbers):
        cosine = (text[row] @ x / text[row].norm(dim=1)).tolist()
        hits += cosine[0] == max(cosine)
    assert 0.2 < hits / 3000 < 0.8
    assert common.r_precision(image, numbers[:, 0], text, classes) == hits / 3000


def test_order_of_evaluation_captions():
    """Every caption occurs once in random order, then again in the same order."""
    dataset = SimpleNamespace(captions=["a caption"] * 1000)
    batches = common.evaluation_captions(dataset, 2500)
    assert [len(batch) for batch in batches] == [64] * 39 + [4]
    order = torch.cat(batches)
    assert torch.equal(order[:1000].sort().values, torch.arange(1000))
    assert not torch.equal(order[:1000], torch.arange(1000))
    assert torch.equal(order[1000:2000], order[:1000])
    assert torch.equal(order[2000:], order[:500])


# ---- The Inception network


def golden_flowers(numbers):
    """Return the images of the golden figures, (N, 3, 64, 64) in [-1, 1]: the central square,
    resized by Pillow's bilinear filter."""
    folder = shared("data", "flowers", "jpg")
    images = []
    for number in numbers:
        image = Image.open(folder / f"image_{number:05}.jpg").convert("RGB")
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        images.append(np.asarray(square.resize((64, 64), Image.BILINEAR)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def test_golden_inception(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared("weights", "hub").parent))
    golden = np.load(GOLDEN / "fid_flowers.npz")
    net = common.FIDInception()
    pooled, regions = net(golden_flowers(golden["ids_a"][:8]))
    np.testing.assert_allclose(pooled, golden["features_a"], atol=1e-4, rtol=0)
    assert regions.shape == (8, 768, 36)


@pytest.mark.parametrize("weights", [{}, {"fc.weight": torch.ones(1008, 2048)}])
def test_head_of_inception(weights, monkeypatch):
    """The released file has class scores; a copy of it may lack them."""
    monkeypatch.setattr(common, "load_inception_weights", lambda: weights)
    net = common.FIDInception()
    pooled, _ = net(torch.zeros(1, 3, 8, 8))
    assert pooled.shape == (1, 2048)  # not the class scores
    if weights:
        assert torch.equal(net.head, weights["fc.weight"])
    else:
        assert net.head is None


@pytest.mark.slow
def test_golden_fid(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared("weights", "hub").parent))
    golden = np.load(GOLDEN / "fid_flowers.npz")
    net = common.FIDInception()

    def features(numbers):
        images = golden_flowers(numbers)
        return torch.cat([net(block)[0] for block in images.split(50)])

    features_a = features(golden["ids_a"])
    features_b = features(golden["ids_b"])
    distance = common.frechet_distance(features_a, features_b)
    assert distance == pytest.approx(float(golden["fid"]), rel=1e-3)


# ---- Evaluation of a text encoder


def embeddings_of_test_set(kind):
    """Return the embeddings of the two test images of `home` and of their four captions.

    The score of char-cnn-rnn is the inner product, that of DAMSM is the cosine."""
    path = f"runs/{kind}-own/encoder.pt"
    encoder = common.load_text_encoder(path)
    image_encoder = common.ImageEncoder(encoder.dim, small=True).eval()
    image_encoder.load_state_dict(torch.load(path)["image_encoder"])
    images = []
    captions = []
    for colour, number in (("green", 19), ("red", 9)):
        image = to_tensor(Image.open(f"own/{colour}/{number}.png")) * 2 - 1
        images.append(image[:, :64, :64])  # of one colour: all crops are equal
        captions += [f"a {colour} picture", f"it is {colour}"]
    with torch.no_grad():
        image, _ = image_encoder(torch.stack(images))
    text = encoder.encode(captions)
    if kind == "damsm":
        return F.normalize(image), F.normalize(text)
    return image, text


@pytest.mark.parametrize("kind", ["char-cnn-rnn", "damsm"])
def test_evaluate_text_encoder(kind, home, monkeypatch, capsys):
    """The command prints the accuracies on the test classes, and chance."""
    found = []
    accuracy = common.joint_embedding_accuracy

    def joint_embedding_accuracy(image, text, image_classes, text_classes):
        found.append((image, text))
        return accuracy(image, text, image_classes, text_classes)

    monkeypatch.setattr(common, "joint_embedding_accuracy", joint_embedding_accuracy)
    monkeypatch.chdir(home)
    command = f"common.py --encoder {kind} --data own --device cpu --evaluate"
    monkeypatch.setattr(sys, "argv", command.split())
    assert common.main() is None

    image, text = embeddings_of_test_set(kind)
    torch.testing.assert_close(found, [(image, text)])
    f_v, f_t = joint_embedding_accuracy_by_loop(image, text, [0, 1], [0, 0, 1, 1])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == (
        f"2 test images of 2 classes; image to class (f_v) {f_v:.1%}, "
        f"caption to class (f_t) {f_t:.1%}, chance 50.0%")


def test_evaluation_of_an_encoder_needs_its_training():
    with pytest.raises(data.UserError) as error:
        common.evaluate_text_encoder("damsm", "cub", "datasets", "cpu")
    assert str(error.value) == ("runs/damsm-cub/encoder.pt does not exist; "
                                "python common.py --encoder damsm --data cub trains it")


# ---- Evaluation of a generator


class StandInInception(torch.nn.Module):
    """The features of an image are its mean colours."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return x.mean((2, 3)), None


class Colours:
    """A stand-in for a dataset: images of one colour each, with one caption each."""

    name, size = "colours", 4

    def __init__(self, number):
        rng = torch.Generator().manual_seed(0)
        self.colours = torch.rand(number, 3, generator=rng) * 2 - 1
        self.captions = [f"colour {i}" for i in range(number)]

    def __len__(self):
        return len(self.colours)

    def center_crop(self, index):
        return images_of(self.colours[index])


def images_of(colours):
    return colours[:, :, None, None].expand(-1, 3, 4, 4)


def sample_noise(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def draw_noise(noise, embeddings):
    """A stand-in for a generator: the colours of an image are tanh of its noise."""
    assert len(noise) == len(embeddings) <= 64
    return images_of(noise.tanh())


@pytest.fixture
def evaluate(monkeypatch):
    """Return a function that evaluates a generator of colours with a head of the classifier."""
    def evaluate(dataset, fid_samples, head=None, draw=draw_noise):
        net = StandInInception(head)
        monkeypatch.setattr(common, "FIDInception", lambda: net)
        args = SimpleNamespace(
            fid_samples=fid_samples, device="cpu", r_precision_encoder=None)
        return common.evaluate(draw, sample_noise, None, dataset, args)

    def embed_captions(encoder, dataset):
        """Return the number of each caption as its embedding."""
        return torch.arange(len(dataset.captions))[:, None]

    monkeypatch.setattr(common, "embed_captions", embed_captions)
    return evaluate


def test_metrics_of_a_generator(evaluate, capsys):
    """130 images are drawn as 64, 64 and 2, each batch with a noise of its own."""
    dataset = Colours(100)
    head = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    metrics = evaluate(dataset, 130, head)
    noise = torch.cat([sample_noise(64, 0), sample_noise(64, 1), sample_noise(2, 2)])
    fake = ((noise.tanh() + 1) * 127.5).round() / 127.5 - 1  # 8 bits, as in a file
    fid = fid_by_symmetric_root(dataset.colours.double().numpy(), fake.double().numpy())
    assert metrics["fid"] == pytest.approx(fid, rel=1e-4)
    score = inception_score_by_loop(fake @ head.T, 10)
    assert metrics["inception_score"] == pytest.approx(score, rel=1e-5)

    # Diversity: the mean distance between 8 images of one caption, for 50 captions
    distances = []
    for caption in common.evaluation_captions(dataset, 130)[0][:50]:
        colours = sample_noise(8, int(caption)).tanh()
        distances.append(torch.pdist(colours).mean().item())
    assert metrics["diversity"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert "r_precision" not in metrics

    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines == [
        f"FID {fid:.2f} of 130 images against 100 real test images of 4 px "
        "(below 2,048: not comparable with other numbers)",
        f"Inception Score {score:.2f} (ten splits)",
        f"diversity {metrics['diversity']:.2f}",
        "no R-precision: it needs runs/damsm-colours/encoder.pt with Inception features; "
        "python common.py --encoder damsm --data colours trains it"]
    for label in ("generated images 100%", "real images 100%", "diversity 100%"):
        assert label in printed.err


@pytest.mark.parametrize("generated, real, comparable", [
    (2048, 2048, True), (2047, 2048, False), (2048, 2047, False)])
def test_fid_of_few_images_is_marked(generated, real, comparable, evaluate, capsys):
    evaluate(Colours(real), generated)
    printed = capsys.readouterr().out
    assert ("not comparable" in printed) == (not comparable)
    assert "no Inception Score: the file of the FID network has no" in printed


@pytest.mark.parametrize("generated, real", [(1, 9), (9, 1)])
def test_fid_needs_two_images(generated, real, evaluate):
    with user_error("at least 2 generated and 2 real images"):
        evaluate(Colours(real), generated)


def test_metrics_of_toy_need_no_network(evaluate, capsys):
    """The true images have nearly all attributes of their captions, those of others do not."""
    dataset = data.load_dataset("toy", "test", 64)

    def draw_true(noise, numbers):
        return dataset.center_crop(dataset.caption_owners[numbers[:, 0]])

    def draw_other(noise, numbers):
        return draw_true(noise, (numbers + 1000) % len(dataset.captions))

    metrics = evaluate(dataset, 320, None, draw_true)
    assert metrics.keys() == {"petal", "centre", "count"}
    assert min(metrics.values()) > 0.98
    line = "  ".join(f"{name} {value:.1%}" for name, value in metrics.items())
    assert capsys.readouterr().out == line + "\n"
    assert max(evaluate(dataset, 320, None, draw_other).values()) < 0.6
