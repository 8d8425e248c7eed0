"""Decoding of image files to 8 bits, whatever the file stores."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError

_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_FLOAT_TOLERANCE = 1e-3  # a quarter of an 8-bit step

_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_UPRIGHT = {  # value of the tag: operation that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of _PHOTOMETRIC and of _SAMPLE_FORMAT

_COMMON = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # first bytes of JPEG and PNG
_STRIP = 2**22  # floating-point pixels converted at a time


def decode(path: str | Path, mode: str) -> Image.Image:
    """Decode an image file: its first frame, upright, in 8 bits.

    Args:
        path: a file in any format that Pillow reads.
        mode: ``"L"`` or ``"RGB"``.

    Raises:
        DataError: the file is missing, unreadable, damaged, larger than ``PIL.Image.MAX_IMAGE_PIXELS``, or its values
            have no defined black and white (see :func:`to_8_bits`).
    """
    with _open(path) as image:
        image.load()
        return to_8_bits(image, mode, name=str(path))


def check_header(path: str | Path) -> None:
    """Check without decoding that a file can be read and begins like an image.

    Raises:
        DataError: it does not.
    """
    _check_file(path)
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not start.startswith(_COMMON):
        with _open(path):
            pass


def to_8_bits(image: Image.Image, mode: str, *, name: str = "image") -> Image.Image:
    """Convert an image to grey or RGB with 8 bits.

    - Values of 16 bits, and of 9 to 15 bits in formats that state the number, are scaled: the largest becomes 255.
    - Floating-point values from 0 to 1 are scaled by 255.
    - Transparent images are laid on white.
    - An image with an EXIF orientation is turned upright.

    Args:
        image: of any mode.
        mode: ``"L"`` or ``"RGB"``.
        name: of the file, for the error text.

    Raises:
        DataError: black and white are not defined for the values: signed or 32-bit integers, floating-point values
            outside [0, 1], or an unknown mode. A colour space cannot be converted.
    """
    image.load()
    orientation = _orientation(image)
    tags = getattr(image, "tag_v2", {})
    sixteen_bits = image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))
    # 16-bit values in FITS are signed, with an offset that Pillow does not apply.
    if _SIGNED in _values(tags.get(_SAMPLE_FORMAT)) or (sixteen_bits and image.format == "FITS"):
        raise _refusal(name, image.mode, "signed integers")
    if sixteen_bits:
        image = _scale_integers(image, tags)
    elif image.mode == "F":
        image = _scale_floats(image, tags, name)
    elif image.mode in _ALPHA or _has_transparency(image):
        image = _on_white(image)
    elif image.mode not in _EIGHT_BITS:
        raise _refusal(name, image.mode, "integers of 32 bits" if image.mode == "I" else "unknown values")
    if image.mode not in ("1", "L"):  # not every colour space can be converted to grey at once
        image = _convert(image, "RGB")
    image = _convert(image, mode)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


@contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, and turn all errors of Pillow, in the block too, into errors that name the file."""
    _check_file(path)
    size = ""
    try:
        with Image.open(path) as image:
            size = f"{image.width} x {image.height} "
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{size}pixels, the limit is {Image.MAX_IMAGE_PIXELS}")
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: too large an image ({_one_line(error)}); scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a complete image (in no format that Pillow knows)") from error
    except MemoryError as error:
        raise DataError(f"{path}: too little memory for the {size}pixels of the image") from error
    except Exception as error:  # on damaged files Pillow raises errors of nearly any type
        raise DataError(f"{path}: not a complete image ({_one_line(error)})") from error


def _check_file(path: str | Path) -> None:
    """Check that ``path`` is a regular file with content; opening a pipe would wait forever."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        problem = "a link to a file that does not exist" if os.path.islink(path) else "no such file"
        raise DataError(f"{path}: {problem}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: expected an image file, found a folder")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: expected an image file, found a pipe, socket or device")
    if found.st_size == 0:
        raise DataError(f"{path}: the file is empty")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata do not make the pixels unreadable
        return 1


def _values(tag: Any) -> tuple[Any, ...]:
    return tag if isinstance(tag, tuple) else () if tag is None else (tag,)


def _has_transparency(image: Image.Image) -> bool:
    palette = image.palette if image.mode == "P" else None
    return "transparency" in image.info or (palette is not None and palette.mode.endswith("A"))


def _on_white(image: Image.Image) -> Image.Image:
    """Lay a transparent image on white. Its hidden colours are arbitrary, often black as the visible shape."""
    if image.mode == "La":
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _scale_integers(image: Image.Image, tags: Any) -> Image.Image:
    """Scale unsigned values of up to 16 bits to 8 bits."""
    bits = _values(tags.get(_BITS)) or (16,)
    largest = 2 ** bits[0] - 1 if bits[0] in range(9, 17) else 65535
    scaled = (np.arange(65536) * 255 + largest // 2) // largest
    table = np.minimum(scaled, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8-bit images only
        table = 255 - table
    if isinstance(image.info.get("transparency"), int):
        table[image.info["transparency"]] = 255
    return Image.fromarray(table[np.asarray(image)])


def _scale_floats(image: Image.Image, tags: Any, name: str) -> Image.Image:
    """Scale values in [0, 1] to 8 bits."""
    values = np.asarray(image)
    result = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP // values.shape[1])
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        if not (part.min() >= -_FLOAT_TOLERANCE and part.max() <= 1 + _FLOAT_TOLERANCE):  # NaN is refused, too
            raise _refusal(name, "F", f"floating-point values from {np.min(values):g} to {np.max(values):g}")
        result[start : start + rows] = np.rint(part.clip(0, 1) * 255)
    return Image.fromarray(255 - result if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else result)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _refusal(name: str, mode: str, found: str) -> DataError:
    return DataError(
        f"{name}: expected 8 bits, unsigned 16 bits or floating-point values from 0 to 1, found {found} "
        f"(Pillow mode {mode}), whose black and white are not defined; convert the file"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
