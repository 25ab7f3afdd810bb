import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from emoe_med.data.image_augment import ImageAugmentOptions, augment, middle, normalised, recolour

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
ALL = ImageAugmentOptions("pad", 2, flip=0.5, operations=2, mixup=0.5, cutmix=0.5, erase=0.5)


def batch(count=6, edge=8):
    return torch.randint(0, 256, (count, 3, edge, edge), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def changed(options, images=None, keys=None, size=8):
    images = batch() if images is None else images
    keys = torch.arange(len(images)) if keys is None else keys
    return augment(images, keys, options, size, MEAN, STD)


def test_the_defaults_change_nothing():
    found = changed(ImageAugmentOptions())
    torch.testing.assert_close(found.image, normalised(batch().float() / 255, MEAN, STD))
    assert torch.equal(found.share, torch.ones(6))
    assert torch.equal(changed(ImageAugmentOptions(), size=4).image, middle(found.image, 4))


def test_a_sample_depends_on_its_key_alone():
    options = ImageAugmentOptions("resized", flip=0.5, operations=2, erase=0.5)
    keys = torch.tensor([11, 12, 13, 14, 15, 16])
    whole = changed(options, keys=keys).image
    order = torch.tensor([4, 0, 2])
    torch.testing.assert_close(changed(options, batch()[order], keys[order]).image, whole[order])
    assert not torch.allclose(changed(options, keys=keys + 1).image, whole)


def test_pad_crop_and_flip_give_shifted_copies_and_only_these():
    image = batch(1)
    seen = set()
    padded = torch.nn.functional.pad(normalised(image.float() / 255, MEAN, STD), (2, 2, 2, 2))
    windows = {(top, left): padded[:, :, top : top + 8, left : left + 8] for top in range(5) for left in range(5)}
    copies = {(*place, mirror): w.flip(3) if mirror else w for place, w in windows.items() for mirror in (0, 1)}
    for key in range(600):
        found = changed(ImageAugmentOptions("pad", 2, flip=0.5), image, torch.tensor([key])).image
        where = [place for place, copy in copies.items() if torch.allclose(copy, found, atol=1e-4)]
        assert len(where) == 1
        seen.add(where[0])
    assert len(seen) == 50


def test_a_resized_crop_is_a_box_of_the_image():
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8)
    image = ramp.expand(1, 3, 64, 64).contiguous()
    spans = []
    for key in range(200):
        row = changed(ImageAugmentOptions("resized", smallest=0.25), image, torch.tensor([key]), size=32).image[0, 0]
        value = row * STD[0] + MEAN[0]
        assert value.min() >= -1e-5
        assert value.max() <= 1 + 1e-5
        assert (value.diff(dim=1) > -1e-4).all()
        spans.append(float(value[0, -1] - value[0, 0]) * 32 / 31)
    assert 0.40 < min(spans) < 0.55  # sqrt(0.25 * 3/4) = 0.43
    assert 0.93 < max(spans) <= 1.03


@pytest.mark.parametrize("strength", [-0.7, 0.4])
def test_colour_operations_are_those_of_pillow(strength):
    image = Image.fromarray(batch(1, 12)[0].permute(1, 2, 0).numpy())
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    factor = 1 + 0.9 * strength
    bits = 8 - round(4 * abs(strength))
    smooth = image.filter(ImageFilter.SMOOTH)
    expected = {
        "brightness": ImageEnhance.Brightness(image).enhance(factor),
        "posterize": ImageOps.posterize(image, bits),
        "solarize": ImageOps.solarize(image, round(255 * (1 - abs(strength)))),
        "autocontrast": ImageOps.autocontrast(image),
        "sharpness": Image.blend(smooth, image, factor),
    }
    for name, picture in expected.items():
        found = recolour(x, name, torch.tensor(strength).view(1, 1, 1, 1)).clamp(0, 1) * 255
        other = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        inner = (..., slice(1, -1), slice(1, -1))  # Pillow leaves the border of a filtered image alone
        assert (found[inner] - other[inner]).abs().max() <= 2, name


def test_grey_images_have_no_colour_to_change():
    grey = batch()[:, :1]
    found = augment(grey, torch.arange(6), ALL, 8, MEAN[:1], STD[:1])
    assert found.image.shape == (6, 1, 8, 8)
    assert torch.isfinite(found.image).all()


def test_mixup_blends_opposite_samples_by_the_share_it_tells():
    images = batch()
    plain = normalised(images.float() / 255, MEAN, STD)
    found = changed(ImageAugmentOptions(mixup=0.4), images)
    share = found.share.view(-1, 1, 1, 1)
    assert found.partner.tolist() == [5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(found.image, share * plain + (1 - share) * plain.flip(0))
    assert found.share.min() >= 0
    assert len(found.share.unique()) == 6


def test_cutmix_tells_the_share_of_pixels_that_stayed():
    images = batch(8, 16)
    plain = normalised(images.float() / 255, MEAN, STD)
    found = changed(ImageAugmentOptions(cutmix=1.0), images, size=16)
    own = (found.image == plain).all(1)
    other = (found.image == plain.flip(0)).all(1)
    assert (own | other).all()
    torch.testing.assert_close(own.float().mean((1, 2)), found.share)
    assert 0.2 < found.share.mean() < 0.95


def test_shares_follow_the_beta_distribution():
    black, options = torch.zeros(2000, 1, 2, 2, dtype=torch.uint8), ImageAugmentOptions(mixup=2.0)
    shares = augment(black, torch.arange(2000), options, 2, MEAN[:1], STD[:1]).share
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares.var()) == pytest.approx(1 / 20, abs=0.005)  # Beta(2, 2)


def test_erasing_puts_the_mean_into_one_box():
    images = batch(200, 16)
    plain = normalised(images.float() / 255, MEAN, STD)
    found = changed(ImageAugmentOptions(erase=0.5), images, size=16).image
    gone = (found == 0).all(1)
    torch.testing.assert_close(torch.where(gone.unsqueeze(1), 0.0, plain), found)
    shares = gone.float().mean((1, 2))
    assert 0.35 < (shares > 0).float().mean() < 0.65
    assert shares.max() <= 0.36


def test_rotation_turns_about_the_middle():
    image = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    image[:, :, 16, 16] = 255
    options = ImageAugmentOptions(operations=1, magnitude=10)
    moved = 0
    for key in range(60):
        found = augment(image, torch.tensor([key]), options, 33, torch.zeros(3), torch.ones(3)).image
        brightest = found.mean(1).flatten().argmax()
        moved += int(brightest != 16 * 33 + 16)
    assert 2 <= moved <= 25  # only the two translations, of 13 operations, move the middle
