"""Real heads broken on purpose, one way each: what users hand to a model by mistake.

Every function takes a head (voxels [X, Y, Z], affine, brain mask; RAS) and returns one that is broken. `BREAKS`
says for each which words of the refusal or of the flag must name the step; any one of them will do.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from emoe_med.data.cohort import draw_person, scan_person
from emoe_med.data.grid import resample, template
from emoe_med.data.register import align_affine
from emoe_med.data.volume import write_volume

Head = tuple[np.ndarray, np.ndarray, np.ndarray]


def whole_head_as_mask(v, a, k):
    return v, a, ndimage.binary_fill_holes(v > v.mean())


def no_mask(v, a, k):
    return v, a, None


def dilated_mask(v, a, k):
    return v, a, ndimage.binary_dilation(k, iterations=3)


def eroded_mask(v, a, k):
    return v, a, ndimage.binary_erosion(k, iterations=3)


def shifted_mask(v, a, k):
    return v, a, np.roll(k, 5, axis=2)


def half_a_mask(v, a, k):
    k = k.copy()
    k[: int(np.argwhere(k)[:, 0].mean())] = False
    return v, a, k


def zscored(v, a, k):
    inside = v[k]
    return (v - inside.mean()) / inside.std(), a, k


def zscored_over_the_volume(v, a, k):
    return (v - v.mean()) / v.std(), a, k


def with_an_offset(v, a, k):
    return v + 1000, a, k


def inverted_contrast(v, a, k):
    return np.where(v > 0.05 * v.max(), v.max() - v, 0), a, k


def saturated(v, a, k):
    return np.minimum(v, np.percentile(v[k], 60)), a, k


def square_root(v, a, k):
    return np.sqrt(np.maximum(v, 0)), a, k


def mask_as_image(v, a, k):
    return 100.0 * k, a, k


def tissue_classes(v, a, k):
    return np.digitize(v, np.percentile(v[k], (20, 55))) * 100.0 * k, a, k


def cut_at_the_top(v, a, k):
    end = np.flatnonzero(k.any((0, 1)))[-1] - 9
    return v[:, :, :end], a, k[:, :, :end]


def cut_at_the_front_and_padded(v, a, k):
    end = np.flatnonzero(k.any((0, 2)))[-1] - 11
    v, k = v.copy(), k.copy()
    v[:, end:], k[:, end:] = 0, False
    return v, a, k


def centimetres(v, a, k):
    return v, a @ np.diag([0.15, 0.15, 0.15, 1]), k


def axes_swapped(v, a, k):
    return np.swapaxes(v, 1, 2), a, np.swapaxes(k, 1, 2)


def upside_down(v, a, k):
    return v[:, :, ::-1], a, k[:, :, ::-1]


def thick_slices(v, a, k):
    z = v.shape[2] // 3 * 3
    scale = np.diag([1, 1, 3.0, 1])
    scale[2, 3] = 1
    return v[:, :, :z].reshape(*v.shape[:2], -1, 3).mean(-1), a @ scale, k[:, :, 1:z:3]


def thick_slices_repeated(v, a, k):
    thick, _, _ = thick_slices(v, a, k)
    return np.repeat(thick, 3, axis=2), a, k[:, :, : 3 * thick.shape[2]]


def blurred(v, a, k):
    return ndimage.gaussian_filter(v, 1.5), a, k


def noisy(v, a, k):
    parts = np.random.default_rng(0).normal(0, 0.25 * v[k].mean(), (2, *v.shape))
    return np.hypot(v + parts[0], parts[1]), a, k


def shaded(v, a, k):
    return v * np.exp(0.8 * np.linspace(-1, 1, v.shape[1]))[None, :, None], a, k


def pure_noise(v, a, k):
    return np.random.default_rng(0).rayleigh(50, v.shape), a, k


def a_ball(v, a, k):
    r = np.linalg.norm(np.indices(v.shape).T - np.array(v.shape) / 2, axis=-1).T
    return np.where(r < 33, 100 + 10 * np.sin(r / 3), 0), a, r < 33


def one_slice_repeated(v, a, k):
    z = v.shape[2] // 2
    return np.repeat(v[:, :, z : z + 1], v.shape[2], 2), a, np.repeat(k[:, :, z : z + 1], v.shape[2], 2)


def registered_to_the_template(v, a, k):
    target, grid = template(2.0)
    matrix = align_affine(v, a, k).matrix
    inside = resample(k.astype(np.float32), a, matrix, grid, target.shape) >= 0.5
    return resample(v, a, matrix, grid, target.shape), grid.copy(), inside


def warped_to_the_template(v, a, k):
    """Warp nonlinearly (demons, Thirion 1998) and shrink to the head's own size again."""
    v, grid, k = registered_to_the_template(v, a, k)
    target = template(2.0)[0]
    fixed = target / target[target > 0.1].mean()
    moving = np.where(k, v, 0) / v[k].mean()
    gradient = np.stack(np.gradient(fixed))
    places = np.indices(fixed.shape).astype(np.float32)
    move = np.zeros_like(places)
    for _ in range(40):
        away = ndimage.map_coordinates(moving, places + move, order=1) - fixed
        step = -away * gradient / (np.square(gradient).sum(0) + away**2 + 1e-6)
        move = ndimage.gaussian_filter(move + 2 * step, (0, 1.2, 1.2, 1.2))
    warped = ndimage.map_coordinates(v, places + move, order=1)
    return warped, grid @ np.diag([0.9, 0.9, 0.9, 1]), target > 0.1


def synthetic(v, a, k):
    person = draw_person(3, seed=1)
    _, affine, head = scan_person(person, 50.0, np.random.default_rng(0), planted=True, spacing_mm=2.0)
    return head.image.astype(np.float32), affine, head.brain


STRIP, MASK, FIELD = "skull strip", "brain mask", "field of view"
SCALE, PLACE, SHARP = "intensity scale", "registration", "resolution"
BREAKS = {
    whole_head_as_mask: (STRIP,),
    no_mask: ("VOL-MASK",),
    dilated_mask: (MASK, STRIP),
    eroded_mask: (MASK,),
    shifted_mask: (MASK, PLACE),
    half_a_mask: (STRIP, FIELD, PLACE),
    zscored: (SCALE, "VOL-MASK"),
    zscored_over_the_volume: (SCALE,),
    with_an_offset: (SCALE,),
    inverted_contrast: (SCALE,),
    saturated: (SCALE,),
    square_root: (SCALE,),
    mask_as_image: ("VOL-MASK",),
    tissue_classes: (SCALE,),
    cut_at_the_top: (FIELD,),
    cut_at_the_front_and_padded: (FIELD,),
    centimetres: (STRIP,),
    axes_swapped: (PLACE,),
    upside_down: (PLACE,),
    thick_slices: (SHARP,),
    thick_slices_repeated: (SHARP,),
    blurred: (SHARP,),
    noisy: ("noise",),
    shaded: (SCALE,),
    pure_noise: ("noise", PLACE),
    a_ball: (PLACE, SCALE),
    one_slice_repeated: (PLACE,),
    registered_to_the_template: (SHARP, PLACE, STRIP),  # harmless but for the second interpolation
    warped_to_the_template: (PLACE, SHARP),
    synthetic: (PLACE, SCALE, MASK),
}

OF_THE_MASK = (whole_head_as_mask, no_mask, dilated_mask, eroded_mask, shifted_mask, half_a_mask)  # the image is whole


def write_head(folder: Path, name: str, head: Head) -> dict[str, str]:
    """Write a head and its mask; the columns image and mask of a manifest."""
    voxels, affine, mask = head
    write_volume(folder / f"{name}.nii.gz", np.asarray(voxels, np.float32), affine)
    if mask is None:
        return {"image": f"{name}.nii.gz", "mask": ""}
    write_volume(folder / f"{name}_brain.nii.gz", np.asarray(mask, np.uint8), affine)
    return {"image": f"{name}.nii.gz", "mask": f"{name}_brain.nii.gz"}


def oppose_handedness(file: Path) -> None:
    """Mirror the sform of a file and leave its qform as it is."""
    image = nib.load(file)
    mirrored = image.affine @ np.diag([-1.0, 1, 1, 1])
    mirrored[:3, 3] += image.affine[:3, 0] * (image.shape[0] - 1)
    image.set_sform(mirrored, 1)
    image.set_qform(image.get_qform(), 1)
    file.write_bytes(gzip.compress(image.to_bytes()))
