"""How a sample of a data set is shown: as a picture, as text, as a waveform, or as its values."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from lightning_slt.warned import warn

Kind = Literal["image", "text", "audio", "values"]
MAX_TEXT = 200
MIN_SIDE = 64
"""Pixels: smaller pictures are enlarged."""
MAX_SIDE = 512
"""Pixels: larger pictures are reduced, since twenty of them are kept at a firing."""
MIN_FLAT = 64
"""A vector of a square number of values from here on is a flattened picture (scikit-learn's digits have 64)."""
MIN_AUDIO = 4000
INPUT_KEYS = ("image", "images", "pixel_values", "text", "sentence", "input_ids", "audio", "x", "input", "inputs")


@dataclass(frozen=True, eq=False)
class Rendered:
    """A sample, ready to be shown.

    Attributes:
        kind: what it is shown as.
        image: ``[height, width]`` or ``[height, width, 3]`` uint8; None for text and values.
        text: what is said of it; empty for a picture.
    """

    kind: Kind
    image: Optional[npt.NDArray[np.uint8]]
    text: str

    def picture(self) -> Image.Image:
        """The picture.

        Raises:
            ValueError: where it is shown as text.
        """
        if self.image is None:
            raise ValueError(f"a sample shown as {self.kind} has no picture.")
        return Image.fromarray(self.image)

    def png(self) -> bytes:
        """The picture as a PNG file; raises as :meth:`picture`."""
        out = io.BytesIO()
        self.picture().save(out, format="png")
        return out.getvalue()


def render_sample(sample: Any, tokenizer: Any = None) -> Rendered:
    """The default way to show a sample, found from its shape.

    Args:
        sample: an item of a dataset: a tensor, ``(input, label)``, or a dict with the input under a usual name.
        tokenizer: with a ``decode`` method, for token ids; None shows the ids.

    Returns:
        A picture for ``[H, W]``, ``[1, 3 or 4, H, W]`` and ``[H, W, 1, 3 or 4]`` numbers and for flattened squares,
        text for strings and token ids (vectors of integers, bytes apart), a waveform for long vectors, and else the
        values. Never raises.

    Example:
        >>> import torch
        >>> shown = render_sample((torch.rand(64), 3))
        >>> shown.kind, shown.image.shape
        ('image', (64, 64))
        >>> render_sample(torch.tensor([5, 7, 9])).text
        'tokens 5 7 9'
    """
    try:
        return _render(_input_of(sample), tokenizer)
    except Exception:
        try:
            return Rendered("values", None, short(repr(sample)))
        except Exception:
            return Rendered("values", None, type(sample).__name__)


_warned: set[str] = set()


def rendered_by(hook: Callable[[Any], Any], sample: Any, tokenizer: Any = None) -> Rendered:
    """What a user's ``render`` hook makes of a sample: a :class:`Rendered`, a picture, an array, a tensor or a text.

    Where the hook fails, that is said once and the default is used.
    """
    try:
        made = hook(sample)
        if made is None:
            raise TypeError("it returned None")
        if isinstance(made, Rendered):
            return made
        if isinstance(made, str):
            return Rendered("text", None, short(made))
        if isinstance(made, Image.Image):
            return Rendered("image", _reduced(np.asarray(made.convert("RGB"))), "")
        array = _array(made)
        picture = _as_picture(array)
        return Rendered("image", picture, "") if picture is not None else _render(made, None)
    except Exception as error:
        if "hook" not in _warned:
            _warned.add("hook")
            warn(
                f"render failed ({type(error).__name__}: {error}): samples are shown the default way. It is called "
                "with one item of the dataset and returns a picture (array, tensor, PIL image) or a text."
            )
        return render_sample(sample, tokenizer)


def _input_of(sample: Any) -> Any:
    if isinstance(sample, Mapping):  # a tokenizer's BatchEncoding is no dict
        return next((sample[k] for k in INPUT_KEYS if k in sample), next(iter(sample.values())))
    if isinstance(sample, (tuple, list)) and len(sample) and not isinstance(sample[0], (int, float)):
        return sample[0]
    return sample


def _render(value: Any, tokenizer: Any) -> Rendered:
    if isinstance(value, str):
        return Rendered("text", None, short(value))
    if isinstance(value, Image.Image):
        return Rendered("image", _enlarge(np.asarray(value.convert("RGB"))), "")
    array = _array(value)
    if array.ndim == 1 and np.issubdtype(array.dtype, np.integer):
        ids = array.tolist()
        if tokenizer is not None:
            return Rendered("text", None, short(_decoded(tokenizer, ids)))
        # 64 or 256 tokens are no picture: only bytes are pixels; and PCM audio has 16 bits
        if array.dtype not in (np.uint8, np.int16):
            return Rendered("text", None, short("tokens " + " ".join(map(str, ids))))
    picture = _as_picture(array)
    if picture is not None:
        return Rendered("image", picture, "")
    sound = array
    if array.ndim == 2 and min(array.shape) <= 2:
        sound = array.mean(axis=int(np.argmin(array.shape)))  # one or two channels, before or after time
    if sound.ndim == 1 and len(sound) >= MIN_AUDIO:
        return Rendered("audio", _waveform(sound), f"{len(sound)} values")
    return Rendered("values", None, _values(array))


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    # labels of -100 and the like stand for no token
    known = [i for i in ids if i >= 0]
    try:
        return str(tokenizer.decode(known))
    except Exception:
        return "tokens " + " ".join(map(str, ids))


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float().numpy() if value.is_floating_point() else value.numpy()  # NumPy has no bfloat16
    return np.asarray(value)


def _as_picture(array: npt.NDArray[Any]) -> Optional[npt.NDArray[np.uint8]]:
    """``[H, W]`` or ``[H, W, 3]`` bytes; None where the shape is not that of a picture."""
    if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
        return None
    if array.ndim == 1 and len(array) >= MIN_FLAT and math.isqrt(len(array)) ** 2 == len(array):
        array = array.reshape(math.isqrt(len(array)), -1)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and min(array.shape[1:]) > 4:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[2] in (1, 3, 4) and min(array.shape[:2]) > 4:
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    elif array.ndim != 2 or min(array.shape) < 5:
        return None
    if array.dtype != np.uint8:
        values = np.nan_to_num(array.astype(np.float64))
        # a few stray values must not make the rest grey
        low, high = np.percentile(values, [0.5, 99.5])
        if high <= low:
            low, high = float(values.min()), float(values.max())
        array = np.clip(255 * (values - low) / (high - low if high > low else 1.0), 0, 255).round().astype(np.uint8)
    return _enlarge(array)


def _enlarge(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Sides of a size that can be looked at."""
    picture = _reduced(picture)
    # a long one is enlarged no further than a large one is reduced to
    times = max(1, min(-(-MIN_SIDE // max(min(picture.shape[:2]), 1)), MAX_SIDE // max(*picture.shape[:2], 1)))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _reduced(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if max(picture.shape[:2]) <= MAX_SIDE:
        return picture
    reduced = Image.fromarray(picture)
    reduced.thumbnail((MAX_SIDE, MAX_SIDE))
    return np.asarray(reduced)


def _waveform(values: npt.NDArray[Any], width: int = 256, height: int = 64) -> npt.NDArray[np.uint8]:
    """The range of the values in each of ``width`` stretches."""
    values = np.nan_to_num(values.astype(np.float64))
    scale = max(float(np.abs(values).max()), 1e-12)
    picture = np.full((height, width), 255, dtype=np.uint8)
    for column, part in enumerate(np.array_split(values / scale, width)):
        top = round((1 - float(part.max())) / 2 * (height - 1))
        picture[top : round((1 - float(part.min())) / 2 * (height - 1)) + 1, column] = 40
    return picture


def _values(array: npt.NDArray[Any]) -> str:
    first = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in array.reshape(-1)[:8].tolist())
    more = ", ..." if array.size > 8 else ""
    shape = "x".join(map(str, array.shape))
    return short(f"[{shape}] {first}{more}" if array.ndim else first)


def clean(text: str) -> str:
    """One line without half characters and control characters, which not every file and font takes."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return "".join("�" if unicodedata.category(c) == "Cc" else c for c in text)


def short(text: str, width: int = MAX_TEXT) -> str:
    """One line of at most ``width`` characters."""
    text = clean(text)
    return text if len(text) <= width else text[: width - 1] + "…"
