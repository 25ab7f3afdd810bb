import torch

from emoe_med.data.augment import AugmentOptions, augment, phases, shift, to_model_grid

KEYS = torch.tensor([5, 11, 99])
ALL = AugmentOptions(flip=0.5, shift_voxels=2, gain=0.2)


def heads():
    image = torch.rand(3, 1, 10, 12, 8) + 1
    image[:, :, :3] = 0
    return image


def test_a_sample_depends_on_its_key_alone():
    images = heads()
    out = augment(images, KEYS, ALL, 2)
    assert out.shape == (3, 1, 5, 6, 4)
    torch.testing.assert_close(out, augment(images.flip(0), KEYS.flip(0), ALL, 2).flip(0))
    assert not torch.equal(augment(images[:1], KEYS[:1], ALL), augment(images[:1], KEYS[1:2], ALL))


def test_every_view_is_an_area_average_of_cached_voxels():
    images = heads()
    out = augment(images, KEYS, AugmentOptions(flip=0, shift_voxels=2), 2)
    places = [(a, b, c) for a in range(-2, 3) for b in range(-2, 3) for c in range(-2, 3)]
    for image, view in zip(images, out, strict=True):
        assert any(torch.equal(to_model_grid(shift(image, place), 2), view) for place in places)


def test_both_sides_are_used_and_flip_mirrors_left_and_right():
    images = heads()
    assert torch.equal(augment(images, KEYS, AugmentOptions(flip=1)), images.flip(2))
    assert torch.equal(augment(images, KEYS, AugmentOptions(flip=0)), images)
    flips = [torch.equal(augment(images[:1], torch.tensor([k]), AugmentOptions()), images[:1]) for k in range(100)]
    assert 25 < sum(flips) < 75


def test_shift_moves_by_whole_voxels_and_fills_with_background():
    image = torch.arange(1.0, 61).view(1, 3, 4, 5)
    moved = shift(image, [1, -2, 0])
    assert moved.shape == image.shape
    assert torch.equal(moved[0, 1:, :2], image[0, :-1, 2:])
    assert not moved[0, 0].any()
    assert not moved[0, :, 2:].any()


def test_phases_are_the_shifts_below_one_voxel_of_the_model():
    image = heads()[0]
    found = phases(image, 2)
    assert found.shape == (8, 1, 5, 6, 4)
    assert torch.equal(found[0], to_model_grid(image, 2))
    assert torch.equal(found[5], to_model_grid(shift(image, (1, 0, 1)), 2))
    assert torch.equal(phases(image, 1)[0], image)


def test_gain_scales_each_head_by_one_factor():
    images = heads()
    ratio = augment(images, KEYS, AugmentOptions(flip=0, gain=0.3))[:, :, 3:] / images[:, :, 3:]
    assert all(0.7 <= r.mean() <= 1.3 and r.std() < 1e-6 for r in ratio)
