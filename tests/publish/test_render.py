"""Samples of every usual shape, and of unusual ones, as something to look at."""

import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_slt.publish import render
from lightning_slt.publish.render import MAX_SIDE, MAX_TEXT, Rendered, render_sample, rendered_by


@pytest.fixture(autouse=True)
def _nothing_said_before(monkeypatch):
    monkeypatch.setattr(render, "_warned", set())


def ramp(*shape):
    """Numbers from 0 to 1, rising along the last axis only."""
    return torch.linspace(0, 1, shape[-1]).expand(*shape).clone()


def assert_ramp(picture):
    """Dark on the left and light on the right, the same in every row."""
    rows = picture.reshape(picture.shape[0], picture.shape[1], -1)
    assert picture.dtype == np.uint8
    assert (rows == rows[:1]).all()
    assert (np.diff(rows[0].astype(int), axis=0) >= 0).all()
    assert rows.min() == 0 and rows.max() == 255


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("sample", "shape"),
    [
        (ramp(100, 80), (100, 80)),
        (ramp(1, 100, 80), (100, 80)),
        (ramp(3, 100, 80), (100, 80, 3)),
        (ramp(4, 100, 80), (100, 80, 3)),
        (ramp(3, 80, 100).permute(1, 2, 0), (80, 100, 3)),
        (ramp(1, 80, 100).permute(1, 2, 0), (80, 100)),
        (ramp(8, 8), (64, 64)),
        (ramp(1, 28, 28), (84, 84)),
        (ramp(28, 28).reshape(-1), (84, 84)),
        (ramp(8, 8).reshape(-1).double(), (64, 64)),
        (ramp(3, 32, 32).bfloat16(), (64, 64, 3)),
        (5 - 10 * ramp(3, 64, 64).flip(-1), (64, 64, 3)),
        (ramp(3, 64, 64).numpy(), (64, 64, 3)),
        ((255 * ramp(64, 64)).byte(), (64, 64)),
        ((255 * ramp(64, 64)).byte().reshape(-1), (64, 64)),
        ((255 * ramp(64, 64)).long(), (64, 64)),
    ],
    ids=[
        "height and width",
        "one channel first",
        "three channels first",
        "alpha left out",
        "three channels last",
        "one channel last",
        "small ones are enlarged",
        "MNIST",
        "MNIST, flattened",
        "digits, flattened",
        "bfloat16",
        "standardised values",
        "NumPy",
        "bytes",
        "bytes, flattened",
        "whole numbers",
    ],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 3), lambda x: {"id": 5, "image": x, "label": 1}])
def test_tensors_shaped_like_images_are_pictures(sample, shape, wrap):
    shown = render_sample(wrap(sample))
    assert (shown.kind, shown.text) == ("image", "")
    assert shown.image.shape == shape
    assert_ramp(shown.image)


def test_pixels_that_are_true_or_false():
    shown = render_sample(torch.eye(64).bool())
    assert (shown.image == 255 * np.eye(64)).all()


def test_a_stray_value_does_not_make_the_rest_grey():
    picture = ramp(100, 100)
    picture[0, 0] = 1e6
    shown = render_sample(picture).image
    assert (shown[1:, -1] == 255).all() and (shown[1:, 0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 7.0, float("nan"), float("inf")])
def test_a_picture_of_one_value_only(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = render_sample(torch.full((16, 16), value))
    assert shown.kind == "image" and len(np.unique(shown.image)) == 1


def test_large_pictures_are_reduced():
    shown = render_sample(ramp(3, 1000, 2000))
    assert shown.image.shape == (MAX_SIDE // 2, MAX_SIDE, 3)
    tall = render_sample(Image.new("L", (100, 4000), 128))
    assert tall.image.shape[0] == MAX_SIDE and int(tall.image[0, 0, 0]) == 128


def test_a_pil_image_with_a_palette():
    shown = render_sample((Image.new("P", (70, 90)), 3))
    assert shown.kind == "image" and shown.image.shape == (90, 70, 3)


def test_a_picture_as_a_file():
    shown = render_sample(ramp(3, 64, 64))
    assert shown.png().startswith(b"\x89PNG")
    assert (np.asarray(shown.picture()) == shown.image).all()
    with pytest.raises(ValueError, match="a sample shown as text has no picture"):
        render_sample("words").png()


# ---------------------------------------------------------------------------------------------------- text and tokens


class Letters:
    """A tokenizer whose tokens are letters; it knows 26 of them."""

    def decode(self, ids):
        return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("count", [3, 64, 256])
def test_token_ids_without_a_tokenizer_are_numbers_however_many(dtype, count):
    """64 and 256 are squares, and yet no pictures."""
    ids = torch.arange(count).to(dtype)
    shown = render_sample((ids, ids))
    assert (shown.kind, shown.image) == ("text", None)
    assert shown.text.startswith("tokens 0 1 2")
    assert len(shown.text) <= MAX_TEXT


def test_token_ids_with_a_tokenizer_are_its_text():
    ids = torch.tensor([7, 4, 11, 11, 14])
    assert render_sample(ids, Letters()).text == "hello"
    assert render_sample((ids[:-1], ids[1:]), Letters()).text == "hell"
    encoding = {"attention_mask": torch.ones(5), "input_ids": ids, "labels": ids}
    assert render_sample(encoding, Letters()).text == "hello"
    assert render_sample(UserDict(encoding), Letters()).text == "hello"  # what tokenizers give is no dict
    assert render_sample([7, 8], Letters()).text == "hi"
    # marks of what is to be left out are no tokens
    assert render_sample(torch.tensor([7, 8, -100, -100]), Letters()).text == "hi"


def test_a_tokenizer_that_fails_leaves_the_numbers():
    assert render_sample(torch.tensor([7, 99]), Letters()).text == "tokens 7 99"


def test_a_tokenizer_changes_nothing_for_what_is_no_token():
    assert render_sample(ramp(8, 8), Letters()).kind == "image"
    assert render_sample(torch.tensor([0.5, 2.0]), Letters()).text == "[2] 0.5, 2"


def test_text_is_one_line_of_bounded_length():
    assert render_sample("one\n\ttwo   three ").text == "one two three"
    assert render_sample(("a review", 1)).text == "a review"
    assert render_sample({"label": 1, "text": "a review"}).text == "a review"
    long = render_sample("x" * 10_000)
    assert long.text == "x" * (MAX_TEXT - 1) + "…"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("bell\x07 and \x1b[31mred", "bell� and �[31mred"),
        ("nul\x00l", "nul�l"),
        ("half \ud83d a character", "half ? a character"),
        ("日本語 🙂 ‏עברית", "日本語 🙂 ‏עברית"),
        ("$\\frac{1}{$", "$\\frac{1}{$"),
        ("", ""),
    ],
)
def test_hostile_text_is_shown_as_it_is_but_for_what_no_file_takes(text, shown):
    assert render_sample(text).text == shown
    assert render_sample(text).text.encode().decode() == shown


# ----------------------------------------------------------------------------------------------------- sound and values


@pytest.mark.parametrize("form", ["vector", "one channel", "two channels", "time first", "16 bits", "16 bits, channel"])
def test_sound_is_a_waveform(form):
    """Silence, then a loud stretch: a thin line, then a broad band."""
    wave = torch.zeros(8000)
    wave[4000:] = torch.sin(torch.arange(4000) / 5.0)
    pcm = (32767 * wave).short()
    sample = {
        "vector": wave,
        "one channel": wave[None],
        "two channels": torch.stack([wave, wave]),
        "time first": wave[:, None].numpy(),
        "16 bits": pcm,
        "16 bits, channel": pcm[None],
    }[form]
    shown = render_sample((sample, 16000, "yes"))
    assert (shown.kind, shown.text, shown.image.shape) == ("audio", "8000 values", (64, 256))
    dark = (shown.image == 40).sum(axis=0)
    assert (dark[:127] == 1).all() and (dark[130:250] > 60).all()


def test_silence_is_a_line():
    assert ((render_sample(torch.zeros(5000)).image == 40).sum(axis=0) == 1).all()


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (torch.tensor([0.5, 1.25, -3.0]), "[3] 0.5, 1.25, -3"),
        ((torch.arange(12.0).reshape(3, 4), 1), "[3x4] 0, 1, 2, 3, 4, 5, 6, 7, ..."),
        (torch.tensor(2.5), "2.5"),
        ((1.5, 2.5), "[2] 1.5, 2.5"),
        (torch.full((2,), float("nan")), "[2] nan, nan"),
        (torch.rand(50, 3, 4, 4), None),
        (np.array(["a", "b"]), "[2] a, b"),
    ],
)
def test_anything_else_is_its_shape_and_first_values(sample, text):
    shown = render_sample(sample)
    assert (shown.kind, shown.image) == ("values", None)
    assert shown.text == text if text is not None else shown.text.startswith("[50x3x4x4] ")


class Odd:
    def __repr__(self):
        return "an odd\nthing"


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("sample", [Odd(), {}, (), [], None, {"a": None}, {"x": Odd()}, [torch.rand(2), [1, [2]]]])
def test_samples_of_no_known_form_do_not_raise(sample):
    shown = render_sample(sample)
    assert shown.kind == "values" and shown.image is None


def test_an_object_shows_its_own_description():
    assert render_sample(Odd()).text == "an odd thing"


def test_an_object_without_a_description_does_not_raise():
    assert render_sample(Unspeakable()).text == "Unspeakable"


# --------------------------------------------------------------------------------------------------------- user's hook


def test_a_hook_makes_pictures_or_text():
    sample = (torch.rand(5), 3)
    assert rendered_by(lambda s: f"label {s[1]}", sample).text == "label 3"
    picture = rendered_by(lambda s: ramp(3, 100, 90), sample)
    assert picture.kind == "image" and picture.image.shape == (100, 90, 3)
    drawn = rendered_by(lambda s: Image.new("RGB", (20, 10), (255, 0, 0)), sample)
    assert drawn.image.shape == (10, 20, 3) and (drawn.image[..., 0] == 255).all() and (drawn.image[..., 1] == 0).all()
    own = Rendered("audio", None, "a voice")
    assert rendered_by(lambda s: own, sample) is own
    assert rendered_by(lambda s: 3.5, sample).text == "3.5"
    assert rendered_by(lambda s: "half \ud83d", sample).text == "half ?"


@pytest.mark.parametrize("hook", [lambda s: s["no such key"], lambda s: None], ids=["raises", "forgets to return"])
def test_a_hook_that_fails_is_told_of_once_and_the_default_shown(hook):
    with pytest.warns(UserWarning, match=r"render failed \((KeyError|TypeError)") as caught:
        shown = [rendered_by(hook, {"x": torch.tensor([7, 8])}, Letters()) for _ in range(3)]
    assert len(caught) == 1
    assert [s.text for s in shown] == ["hi"] * 3


def test_no_picture_is_larger_than_the_largest():
    """Twenty are kept at a firing: a long one is not enlarged beyond, and what a hook draws is reduced as well."""
    assert render_sample(torch.rand(5, 500)).image.shape == (5, 500)
    assert render_sample(torch.rand(20, 120)).image.shape == (80, 480)
    drawn = rendered_by(lambda sample: Image.new("RGB", (4000, 1000), "red"), None)
    assert drawn.image.shape == (MAX_SIDE // 4, MAX_SIDE, 3)
    assert drawn.image[0, 0].tolist() == [255, 0, 0]
