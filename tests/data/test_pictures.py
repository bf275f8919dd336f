"""From file bytes to RGB pixels."""

import hashlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from distill.data.pictures import (
    DataError,
    UnreadableImageError,
    count_pixels,
    decode_image,
    pictures_of_bytes,
    pictures_of_paths,
)

from .making import bomb, encoded, pixels


def saved(image, kind="PNG", **keywords):
    target = BytesIO()
    image.save(target, format=kind, **keywords)
    return target.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_exact_formats_keep_their_pixels(kind):
    image = decode_image(encoded(3, kind=kind))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels(3))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a, 1))],
)
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(pixels(1)), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(content)), turn(pixels(1)))


def test_what_is_transparent_shows_white():
    layer = np.zeros((1, 3, 4), np.uint8)
    layer[0, :, 0], layer[0, :, 3] = 200, [0, 255, 51]  # red 200 at alpha 0, 1 and 0.2
    shown = np.asarray(decode_image(saved(Image.fromarray(layer))))[0]
    assert shown.tolist() == [[255, 255, 255], [200, 0, 0], [244, 204, 204]]


def test_palettes_with_transparency_show_white():
    image = Image.fromarray(np.asarray([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    shown = np.asarray(decode_image(saved(image, "GIF", transparency=1)))[0]
    assert shown.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_grey_cmyk_and_sixteen_bits():
    grey = Image.fromarray(np.asarray([[0, 128, 255]], np.uint8))
    assert np.asarray(decode_image(saved(grey)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    deep = Image.fromarray(np.asarray([[0, 256 * 100 + 7, 65535]], np.uint16))
    assert np.asarray(decode_image(saved(deep)))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    assert np.asarray(decode_image(saved(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF"))).max() == 0


def test_floating_point_pixels_are_refused():
    content = saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(UnreadableImageError, match="floating-point numbers without a stated range"):
        decode_image(content)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("side", "pixel_count"), [(8_000, "64,000,000"), (10_000, "100,000,000"), (30_000, "900000000")]
)
def test_bombs_are_refused_from_the_header(side, pixel_count):
    if side == 10_000:  # beyond Pillow's own limit, below twice that: Pillow only warns
        with pytest.warns(Image.DecompressionBombWarning), pytest.raises(UnreadableImageError, match=pixel_count):
            decode_image(bomb(side, side))
        return
    with pytest.raises(UnreadableImageError, match=rf"too large to decode safely: .*{pixel_count} pixels"):
        decode_image(bomb(side, side))


@pytest.mark.parametrize("size", [(257, 1), (1, 257), (65_535, 10)])
def test_pictures_of_which_a_model_would_make_huge_ones_are_refused_from_the_header(size):
    """CLIP's processor makes 224 x 57,568 pixels of 257 x 1, and of 65,535 x 1 more than fit into memory."""
    content = saved(Image.new("L", size))
    for look in (decode_image, count_pixels):
        with pytest.raises(UnreadableImageError, match=f"too narrow: {size[0]} x {size[1]} pixels"):
            look(content)
    assert decode_image(saved(Image.new("L", (256, 1)))).size == (256, 1)


def test_pixels_are_counted_without_being_decoded():
    content = saved(Image.new("L", (70, 30)))
    assert count_pixels(content) == 2100
    assert count_pixels(content[:45]) == 2100  # the header is whole
    with pytest.raises(UnreadableImageError):
        decode_image(content[:45])
    with pytest.raises(UnreadableImageError, match="too large"):
        count_pixels(content, max_pixels=2099)
    with pytest.raises(UnreadableImageError, match="0 bytes"):
        count_pixels(b"")


def test_pillows_warning_is_an_error_when_warnings_are():
    with pytest.raises(UnreadableImageError, match="could be decompression bomb"):
        decode_image(bomb(10_000, 10_000), max_pixels=200_000_000)


def test_unknown_formats_are_refused():
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        decode_image(saved(Image.fromarray(pixels(0)), "ICO"))


def test_rows_are_decoded_on_demand_and_in_order(tmp_path):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(encoded(number))
    names, prints = ["a", "b", "c"], [hashlib.sha256(encoded(n)).hexdigest() for n in range(3)]
    for made in (
        pictures_of_paths(paths, names=names, fingerprints=prints),
        pictures_of_bytes((encoded(n) for n in range(3)), names=names, fingerprints=prints),
    ):
        for image, number in zip(made.load(np.asarray([2, 0, 2])), (2, 0, 2), strict=True):
            np.testing.assert_array_equal(np.asarray(image), pixels(number))
        assert made.load(np.asarray([], np.int64)) == []
        for wrong in (-1, 3):
            with pytest.raises(IndexError, match=r"must lie in 0\.\.2"):
                made.load(np.asarray([0, wrong]))


def test_a_file_that_changes_later_is_named(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(0))
    made = pictures_of_paths([path], names=["first"], fingerprints=[hashlib.sha256(encoded(0)).hexdigest()])
    for content, said in (
        (b"", "0 bytes"),
        (b"junk", "not an image"),
        (encoded(1), "another picture"),
        (None, "No such"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"image 'first' \(row 0, .*a.png\) is not what it was .*{said}.*Put the file"
        ):
            made.load(np.asarray([0]))
    path.write_bytes(encoded(0))
    assert len(made.load(np.asarray([0]))) == 1


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"equally long, got \(1, 2, 1\)"):
        pictures_of_bytes([encoded(0)], names=["a", "b"], fingerprints=["x"])
