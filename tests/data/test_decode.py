"""Image files of every mode and format, whole and damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import image_bytes
from PIL import Image

from hne.data import InputFormat
from hne.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),  # about damaged metadata
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

GREY16 = np.linspace(0, 65535, 5041).astype(np.uint16).reshape(71, 71)
GREY8 = np.rint(GREY16 / 257).astype(np.uint8)  # 65535 becomes 255


def read(path: Path, channels: int = 1) -> np.ndarray:
    """Read an image in its own size."""
    with Image.open(path) as image:
        size = image.height, image.width
    values = InputFormat(channels, size, (0.0,) * channels, (1.0,) * channels).read(path)
    return values[..., 0] if channels == 1 else values


def netpbm(magic: str, maximum: int, values: np.ndarray) -> bytes:
    height, width = values.shape[:2]
    header = f"{magic}\n# comment\n{width} {height}\n{maximum}\n".encode()
    if magic in ("P2", "P3"):
        return header + " ".join(map(str, values.ravel())).encode()
    return header + values.astype(">u2" if maximum > 255 else np.uint8).tobytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grey.png", lambda: image_bytes(GREY16, "PNG")),
        ("grey.tif", lambda: image_bytes(GREY16, "TIFF")),
        ("compressed.tif", lambda: image_bytes(GREY16, "TIFF", compression="tiff_lzw")),
        ("big_endian.tif", lambda: image_bytes(GREY16.astype(">u2"), "TIFF")),
        ("white_is_zero.tif", lambda: image_bytes(65535 - GREY16, "TIFF", tiffinfo={262: 0})),
        ("grey.pgm", lambda: netpbm("P5", 65535, GREY16)),
        ("text.pgm", lambda: netpbm("P2", 65535, GREY16)),
        ("float.tif", lambda: image_bytes((GREY16 / 65535).astype(np.float32), "TIFF")),
        (
            "float_white_is_zero.tif",
            lambda: image_bytes((1 - GREY16 / 65535).astype(np.float32), "TIFF", tiffinfo={262: 0}),
        ),
        ("float.pfm", lambda: image_bytes((GREY16 / 65535).astype(np.float32), "PPM")),
    ],
)
def test_deep_grey_images_are_scaled(name: str, content: Callable[[], bytes], channels: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content())
    expected = GREY8 if channels == 1 else np.repeat(GREY8[..., None], 3, 2)
    difference = read(tmp_path / name, channels).astype(int) - expected
    assert np.abs(difference).max() <= ("float" in name), "floating-point values may round the other way"


@pytest.mark.parametrize("maximum", [1, 15, 100, 255, 1000, 4095, 65535])
@pytest.mark.parametrize("magic", ["P2", "P5", "P3", "P6"])
def test_netpbm_is_scaled_by_its_maximum(magic: str, maximum: int, tmp_path: Path) -> None:
    channels = 1 if magic in ("P2", "P5") else 3
    values = np.linspace(0, maximum, 60 * channels).round().astype(int).reshape(6, 10, channels).squeeze()
    (tmp_path / "image").write_bytes(netpbm(magic, maximum, values))
    assert np.abs(read(tmp_path / "image", channels) - np.rint(values / maximum * 255)).max() <= 1


def test_twelve_bits_are_scaled(tmp_path: Path) -> None:
    """TIFF states 12 bits; each pair of pixels has three bytes."""
    values = np.linspace(0, 4095, 64).round().astype(int)
    first, second = values[::2], values[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    image = image_bytes(np.zeros((1, 64), np.uint16), "TIFF")
    path = tmp_path / "twelve.tif"
    path.write_bytes(_patch_tiff(image, {258: 12, 279: len(packed)}, packed))
    with Image.open(path) as opened:
        assert opened.mode == "I;16"
    np.testing.assert_array_equal(read(path)[0], np.rint(values / 4095 * 255))


def _patch_tiff(raw: bytes, tags: dict[int, int], pixels: bytes) -> bytes:
    """Replace values of tags (2 bytes) in a little-endian TIFF, and the pixels."""
    image = bytearray(raw)
    start = int.from_bytes(image[4:8], "little")
    for entry in range(int.from_bytes(image[start : start + 2], "little")):
        at = start + 2 + 12 * entry
        tag = int.from_bytes(image[at : at + 2], "little")
        if tag in tags:
            image[at + 8 : at + 12] = tags[tag].to_bytes(4, "little")
        if tag == 273:
            offset = int.from_bytes(image[at + 8 : at + 12], "little")
    image[offset : offset + len(pixels)] = pixels
    return bytes(image)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.full((4, 4), 40, np.int32), "integers"),
        (np.full((4, 4), 70.0, np.float32), "floating-point values from 70 to 70"),
        (np.array([[0.2, -3.5]], np.float32), "floating-point values from -3.5 to 0.2"),
        (np.array([[0.2, np.nan]], np.float32), "floating-point values from nan"),
    ],
)
def test_values_without_black_and_white_are_refused(values: np.ndarray, found: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(image_bytes(values, "TIFF"))
    with pytest.raises(DataError, match=rf"{path}: expected 8 bits, .*found .*{found}.*\(Pillow mode [IF]\)"):
        read(path)


def test_signed_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "signed.tif"
    path.write_bytes(_signed(image_bytes(np.zeros((4, 4), np.int32), "TIFF")))
    with Image.open(path) as opened:
        assert opened.mode == "L"
    with pytest.raises(DataError, match=rf"{path}: .*found signed integers \(Pillow mode L\)"):
        read(path)


def _signed(raw: bytes) -> bytes:
    return _patch_tiff(raw, {258: 8, 279: 16}, bytes(range(16)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "pixel", "colour"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (100, 51), (224, 224, 224)),  # one fifth of 100 on white
        ("La", (20, 51), (224, 224, 224)),
        ("RGB", (10, 20, 200), (10, 20, 200)),
        ("RGBX", (10, 20, 200, 0), (10, 20, 200)),
        ("RGBA", (10, 20, 200, 255), (10, 20, 200)),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBa", (0, 20, 40, 51), (204, 224, 244)),
        ("CMYK", (245, 235, 55, 0), (10, 20, 200)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 0, 90), (90, 90, 90)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16L", 257 * 40, (40, 40, 40)),
        ("I;16B", 257 * 40, (40, 40, 40)),
        ("F", 0.2, (51, 51, 51)),
    ],
)
def test_modes(mode: str, pixel: object, colour: tuple[int, int, int], channels: int) -> None:
    image = Image.new(mode, (5, 4))
    image.putdata([pixel] * 20)
    found = InputFormat(channels, (4, 5), (0.0,) * channels, (1.0,) * channels).fit(image)
    luma = np.array([0.299, 0.587, 0.114]) @ np.array(colour)  # ITU-R 601
    assert np.abs(found - (np.array(colour) if channels == 3 else luma)).max() <= 1


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 200, 40, 50, 60, 0, 0, 0])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "plain.gif")
    image.save(tmp_path / "transparent.gif", transparency=2)
    image.save(tmp_path / "alphas.png", transparency=bytes([255, 255, 0]))
    opaque, transparent = [[[10, 20, 200], [40, 50, 60], [0, 0, 0]]], [[[10, 20, 200], [40, 50, 60], [255, 255, 255]]]
    np.testing.assert_array_equal(read(tmp_path / "plain.png", 3), opaque)
    np.testing.assert_array_equal(read(tmp_path / "plain.gif", 3), opaque)
    np.testing.assert_array_equal(read(tmp_path / "transparent.gif", 3), transparent)
    np.testing.assert_array_equal(read(tmp_path / "alphas.png", 3), transparent)


@pytest.mark.parametrize(
    ("values", "key"),
    [(np.uint8([[0, 90]]), 0), (np.uint16([[0, 90 * 257]]), 0), (np.uint8([[[0] * 3, [90] * 3]]), (0,) * 3)],
)
def test_a_transparent_colour_becomes_white(values: np.ndarray, key: object, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(image_bytes(values, "PNG", transparency=key))
    assert read(tmp_path / "image.png").tolist() == [[255, 90]]


@pytest.mark.parametrize("format_name", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_is_read(format_name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in (200, 20, 90)]
    options = {"lossless": True} if format_name == "WEBP" else {}
    frames[0].save(tmp_path / "frames", format_name, save_all=True, append_images=frames[1:], **options)
    assert (read(tmp_path / "frames") == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP"])
def test_the_orientation_of_cameras_is_undone(format_name: str, orientation: int, tmp_path: Path) -> None:
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    stored = {  # how each value of the EXIF tag stores the upright picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.repeat(stored[..., None], 3, 2))
    image.save(tmp_path / "image", format_name, exif=exif, **({"lossless": True} if format_name == "WEBP" else {}))
    found = InputFormat(1, (4, 6), (0.0,), (1.0,)).read(tmp_path / "image")
    np.testing.assert_array_equal(found[..., 0], upright)


def test_damaged_metadata_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(
        image_bytes(np.full((8, 8), 50, np.uint8), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff")
    )
    assert (read(tmp_path / "image.jpg") == 50).all()


FORMATS = {
    "jpeg": lambda: image_bytes(GREY8, "JPEG"),
    "progressive": lambda: image_bytes(GREY8, "JPEG", progressive=True),
    "png": lambda: image_bytes(GREY8, "PNG"),
    "png16": lambda: image_bytes(GREY16, "PNG"),
    "gif": lambda: image_bytes(GREY8, "GIF"),
    "bmp": lambda: image_bytes(GREY8, "BMP"),
    "webp": lambda: image_bytes(GREY8, "WEBP"),
    "tiff": lambda: image_bytes(GREY8, "TIFF"),
    "lzw": lambda: image_bytes(GREY8, "TIFF", compression="tiff_lzw"),
    "pgm": lambda: netpbm("P5", 255, GREY8),
    "pgm16": lambda: netpbm("P5", 65535, GREY16),
    "pgm12": lambda: netpbm("P5", 4095, GREY16 // 16),
    "text": lambda: netpbm("P2", 255, GREY8),
    "pfm": lambda: image_bytes((GREY16 / 65535).astype(np.float32), "PPM"),
}


@pytest.mark.parametrize("share", [0.002, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files_are_named(name: str, share: float, tmp_path: Path) -> None:
    raw = FORMATS[name]()
    path = tmp_path / "image"
    path.write_bytes(raw[: max(1, int(len(raw) * share))])
    with pytest.raises(DataError, match=f"^{path}: [^\n]*$"):
        InputFormat(1, (8, 8), (0.0,), (1.0,)).read(path)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_raise_nothing_else(name: str, tmp_path: Path, rng: torch.Generator) -> None:
    raw = torch.frombuffer(bytearray(FORMATS[name]()), dtype=torch.uint8)
    path = tmp_path / "image"
    errors = []
    for limit in [30, 300] * 15:
        damaged = raw.clone()
        places = torch.randint(min(limit, len(raw)), (3,), generator=rng)
        damaged[places] = torch.randint(256, (3,), generator=rng, dtype=torch.uint8)
        path.write_bytes(damaged.numpy().tobytes())
        try:
            InputFormat(1, (8, 8), (0.0,), (1.0,)).read(path)
        except DataError as error:
            errors.append(str(error))
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in errors)


@pytest.mark.parametrize(
    "raw",
    [
        b"P5\n-3 4\n255\n",
        b"P5\n99999999999 1\n255\n",
        b"P5\n4 4\n0\n",
        b"P5\n4 4\n70000\n",
        b"P2\n2 1\n255\n7 x",
        b"P2\n2 1\n255\n7 999",
        b"P6\n",
        b"P7\n4 4\n",
        b"<html>404</html>",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xd9",
        b"GIF89a",
    ],
)
def test_damaged_headers_are_named(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"^{path}: [^\n]*$"):
        InputFormat(1, (8, 8), (0.0,), (1.0,)).read(path)


def test_paths_that_are_no_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    input_format = InputFormat(1, (8, 8), (0.0,), (1.0,))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "locked.png").write_bytes(FORMATS["png"]())
    monkeypatch.setattr(Image, "open", _locked)
    for name, problem in {
        "folder": "found a folder",
        "empty": "the file is empty",
        "pipe": "found a pipe, socket or device",
        "dangling": "a link to a file that does not exist",
        "self": "cannot be read",
        "locked": "not a complete image .*Permission denied",
        "missing": "no such file",
    }.items():
        with pytest.raises(DataError, match=rf"{tmp_path / name}\.png: .*{problem}"):
            input_format.read(tmp_path / f"{name}.png")


def _locked(path: object) -> None:
    """Stand in for a file without permission, which the superuser would read."""
    raise PermissionError(13, "Permission denied")


def test_images_above_the_limit_of_pillow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(FORMATS["png"]())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY8.size)
    read(path)
    for limit in (GREY8.size - 1, GREY8.size // 3):  # Pillow only warns up to twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=rf"{path}: too large an image .*PIL\.Image\.MAX_IMAGE_PIXELS"):
            InputFormat(1, (8, 8), (0.0,), (1.0,)).read(path)


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(FORMATS["png"]())

    def load(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=rf"{path}: too little memory for the 71 x 71 pixels"):
        InputFormat(1, (8, 8), (0.0,), (1.0,)).read(path)
