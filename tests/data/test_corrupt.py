"""Changed test images: which ones, how, and always the same."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from bnexp.data.corrupt import DEFAULTS, corrupt
from bnexp.data.digits import Digits
from bnexp.errors import UserError

IMAGES = torch.randint(40, 200, (6, 2, 12, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_only_test_images_change_and_every_time_in_the_same_way(kind):
    plain, changed, again = (Digits(**options).load() for options in ({}, {"corrupt": kind}, {"corrupt": kind}))
    for split in ("train", "valid"):
        assert torch.equal(getattr(plain, split).images, getattr(changed, split).images)
    assert torch.equal(plain.mean, changed.mean) and torch.equal(plain.std, changed.std)
    assert torch.equal(plain.test.labels, changed.test.labels)
    moved = (plain.test.images.int() - changed.test.images.int()).abs().float().flatten(1).mean(1)
    assert moved.min() > 5, "every test image changes by more than 5 of 255 grey levels"
    assert changed.fingerprint == again.fingerprint != plain.fingerprint


def test_contrast_and_brightness_by_their_formulas():
    x = IMAGES.double().numpy() / 255
    mean = x.mean((2, 3), keepdims=True)
    for kind, expected in (("contrast", mean + 0.4 * (x - mean)), ("brightness", (x + 0.4).clip(0, 1))):
        found = corrupt(IMAGES, kind, 0.4).numpy()
        assert abs(found - 255 * expected).max() <= 0.501, kind  # rounded to whole grey levels


def test_blur_is_the_gaussian_of_scipy_with_repeated_edges():
    expected = gaussian_filter(IMAGES.double().numpy(), 1.5, axes=(2, 3), mode="nearest", truncate=10 / 3)
    found = corrupt(IMAGES, "blur", 1.5).numpy()  # cut off at 5 pixels, as there
    assert found.shape == IMAGES.shape
    assert abs(found - expected).max() <= 0.51


def test_noise_has_its_deviation_and_is_another_one_in_every_pixel():
    grey = torch.full((2500, 1, 8, 8), 128, dtype=torch.uint8)
    noise = corrupt(grey, "noise", 0.1).double().numpy() / 255 - 128 / 255
    assert noise.std() == pytest.approx(0.1, rel=0.02) and abs(noise.mean()) < 0.002
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.5
    assert not np.array_equal(noise[0], noise[1024]), "nor does it repeat from chunk to chunk"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corrupt": "fog"}, r"data\.corrupt=fog: .*choose one of none, contrast, blur, noise, brightness"),
        ({"corrupt": "blur", "strength": 0}, r"data\.strength=0: give a number above 0"),
        ({"corrupt": "blur", "strength": float("nan")}, r"data\.strength=nan: give a number"),
        ({"corrupt": "noise", "strength": "much"}, r"data\.strength=much: give a number"),
        ({"corrupt": "blur", "strength": 1e9}, r"data\.strength=1000000000\.0: give a number .* up to 100"),
        ({"strength": 0.3}, r"data\.strength=0\.3: nothing is changed; give data\.corrupt="),
    ],
)
def test_what_cannot_be_is_refused_before_files_are_read(options, words):
    with pytest.raises(UserError, match=words):
        Digits(**options)


def test_a_dataset_without_test_images_has_nothing_to_change(tmp_path, bnexp, capsys):
    from PIL import Image

    for name in "ab":
        (tmp_path / "own" / "train" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), 10 * i).save(tmp_path / "own" / "train" / name / f"{i}.png")
    words = ("data=folder", "data.root=own", "data.size=8", "data.valid=4", "batch_size=8", "steps=1", "model=mlp")
    assert bnexp("train", *words, "data.corrupt=noise", "quiet=true", "out=r") == 2
    assert "data.corrupt=noise: there are no test images" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
