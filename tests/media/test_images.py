"""Still pictures of every kind, resizing and cropping."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ltx2_tuner.media.errors import MediaError
from ltx2_tuner.media.images import image_size, read_image
from ltx2_tuner.media.resize import cover_crop, cover_size

RED_LEFT = np.zeros((8, 12, 3), np.uint8)
RED_LEFT[:, :6] = (200, 10, 10)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg"])
def test_formats(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.repeat(np.repeat(RED_LEFT, 4, 0), 4, 1)).save(path, quality=95)
    assert np.abs(read_image(path).astype(int)[::4, ::4] - RED_LEFT).mean() < 3


def test_kinds_of_pixels(tmp_path):
    alpha = np.dstack([RED_LEFT, np.zeros((8, 12), np.uint8)])  # fully transparent, colours kept
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png"), RED_LEFT)

    Image.fromarray(RED_LEFT).convert("L").save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    assert grey.shape == RED_LEFT.shape
    assert np.array_equal(grey[..., 0], grey[..., 2])

    Image.fromarray(RED_LEFT).convert("P").save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == RED_LEFT.shape

    Image.fromarray(RED_LEFT).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "print.jpg").astype(int) - RED_LEFT).mean() < 12

    Image.fromarray(RED_LEFT[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png")[..., 0], RED_LEFT[..., 0])

    first, second = Image.fromarray(RED_LEFT), Image.fromarray(255 - RED_LEFT)
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(read_image(tmp_path / "moving.webp"), RED_LEFT)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "camera.png"
    Image.fromarray(RED_LEFT).save(path, exif=exif)
    turned = np.rot90(RED_LEFT, {3: 2, 6: -1, 8: 1}[orientation])
    assert np.array_equal(read_image(path), turned)
    assert image_size(path) == (turned.shape[1], turned.shape[0])


def test_damaged_pictures_are_named(tmp_path):
    for name in ("whole.png", "whole.jpg"):
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for number in range(20):
            path = tmp_path / f"cut{number}-{name}"
            path.write_bytes(data[: round(len(data) * 0.9 * number / 19)])
            with pytest.raises(MediaError, match=path.name):
                read_image(path)


def test_equal_size_is_untouched_and_covering_crops_the_centre():
    frames = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), np.uint8)
    assert np.array_equal(cover_crop(frames, 60, 40), frames)
    assert cover_size(1920, 1080, 960, 544) == (967, 544)
    # Same height, so nothing is scaled and columns 14 to 46 remain.
    assert np.array_equal(cover_crop(frames, 32, 40), frames[:, :, 14:46])


def test_shrinking_averages_areas():
    frame = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    halves = frame.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
    assert np.abs(cover_crop(frame, 48, 32) - halves).max() <= 0.5
    # 3 pixels into 2 cells: weights 2/3, 1/3 | 1/3, 2/3.
    row = np.tile(np.array([[30, 60, 240]], np.uint8)[..., None], (3, 1, 3))
    assert cover_crop(row, 2, 2)[0, :, 0].tolist() == [40, 180]


def test_enlarging_is_lanczos():
    frame = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    expected = Image.fromarray(frame).resize((60, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(cover_crop(frame, 60, 40), np.asarray(expected))
