"""Compare tools for brain mask, bias field and affine registration on real heads with label maps.

    python benchmarks/preprocessing.py --data IXI_FOLDER --templates TEMPLATE_FOLDER [--heads 12]

The folder holds `t1/*.nii.gz` and `dlmuse/*.nii.gz` (MUSE codes), the templates the MNI152 2009a tissue maps. A tool
that is not installed is left out. Prints for each tool the mean and the worst head, and process CPU seconds a head at
one thread:

- mask: Dice with the label map above 0;
- bias field: coefficient of joint variation (sd WM + sd GM) / (mean WM - mean GM) within the labels' cerebral tissue,
  which a flat field makes small. The labels see the raw image alone, so no tool is favoured;
- registration: soft Dice of the labels' WM and GM, carried to MNI, with the template's tissue probabilities.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")

import numpy as np
import torch

from emoe_med.data.bias_field import flatten
from emoe_med.data.grid import resample, template
from emoe_med.data.register import align_affine
from emoe_med.data.volume import Volume, read_volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world
WM = (44, 45, *range(81, 96))
GM = (*range(100, 208),)
DEEP_GM = (23, 30, 31, 32, 36, 37, 47, 48, 55, 56, 57, 58, 59, 60)
Head = tuple[np.ndarray, np.ndarray]  # voxels, affine


def have(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Soft Dice of two maps in [0, 1]."""
    return float(2 * np.minimum(a, b).sum() / (a.sum(dtype=float) + b.sum(dtype=float)))


# Masks


def deepbet_mask(edge: int) -> Callable[[Head], np.ndarray]:
    from deepbet import BrainExtraction

    tool = BrainExtraction(no_gpu=True)

    def mask(head: Head) -> np.ndarray:
        return tool.postprocess(tool.run_model(head[0].copy(), shape=(edge, edge, edge)) > 0.5) > 0

    return mask


# Bias fields: corrected voxels of a head inside a mask


def ants_image(voxels: np.ndarray, affine: np.ndarray):
    import ants

    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    lps = LPS @ affine
    return ants.from_numpy(
        voxels.astype(np.float32), origin=list(lps[:3, 3]), spacing=list(spacing), direction=lps[:3, :3] / spacing
    )


def ants_n4(shrink: int, tolerance: float) -> Callable[[Head, np.ndarray], np.ndarray]:
    import ants

    def correct(head: Head, mask: np.ndarray) -> np.ndarray:
        image, inside = ants_image(*head), ants_image(mask, head[1])
        until = {"iters": [50, 50, 50, 50], "tol": tolerance}
        field = ants.n4_bias_field_correction(
            image, mask=inside, shrink_factor=shrink, convergence=until, return_bias_field=True
        )
        return head[0] / field.numpy()

    return correct


def itk_image(voxels: np.ndarray, affine: np.ndarray):
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    spacing, lps = np.linalg.norm(affine[:3, :3], axis=0), LPS @ affine
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(x) for x in lps[:3, 3]])
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def itk_n4(shrink: int) -> Callable[[Head, np.ndarray], np.ndarray]:
    import SimpleITK as sitk  # noqa: N813

    def correct(head: Head, mask: np.ndarray) -> np.ndarray:
        image, inside = itk_image(head[0], head[1]), itk_image(mask.astype(np.uint8), head[1])
        n4 = sitk.N4BiasFieldCorrectionImageFilter()
        n4.SetMaximumNumberOfIterations([50, 50, 50, 50])
        n4.Execute(sitk.Shrink(image, [shrink] * 3), sitk.Shrink(inside, [shrink] * 3))
        return head[0] / np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T)

    return correct


def dipy_bias(method: str) -> Callable[[Head, np.ndarray], np.ndarray]:
    from dipy.core.gradients import gradient_table
    from dipy.denoise.bias_correction import bias_field_correction

    table = gradient_table(np.zeros(1), bvecs=np.zeros((1, 3)))

    def correct(head: Head, mask: np.ndarray) -> np.ndarray:
        return bias_field_correction(head[0][..., None].astype(float), table, mask=mask, method=method)[..., 0]

    return correct


# Registrations: matrix from template RAS mm to subject RAS mm


def centred(head: Head, mask: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    fixed, affine = template(2.0)
    matrix[:3, 3] = centre(mask, head[1]) - centre(fixed > 0.1, affine)
    return matrix


def centre(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]


def ours(head: Head, mask: np.ndarray) -> np.ndarray:
    return align_affine(*head, mask).matrix


def ants_affine(kind: str) -> Callable[[Head, np.ndarray], np.ndarray]:
    import ants

    def align(head: Head, mask: np.ndarray) -> np.ndarray:
        moving = ants_image(np.where(mask, head[0], 0), head[1])
        fixed = ants_image(*template(2.0))
        result = ants.registration(fixed, moving, type_of_transform=kind, random_seed=1)
        found = ants.read_transform(result["fwdtransforms"][0])
        for file in {*result["fwdtransforms"], *result["invtransforms"]}:
            Path(file).unlink(missing_ok=True)
        matrix = np.eye(4)
        values = np.asarray(found.parameters)
        about = np.asarray(found.fixed_parameters)
        matrix[:3, :3] = values[:9].reshape(3, 3)
        matrix[:3, 3] = values[9:] + about - matrix[:3, :3] @ about
        return LPS @ matrix @ LPS

    return align


def itk_affine(head: Head, mask: np.ndarray) -> np.ndarray:
    import SimpleITK as sitk  # noqa: N813

    moving = itk_image(np.where(mask, head[0], 0).astype(np.float32), head[1])
    fixed = itk_image(template(2.0)[0].copy(), template(2.0)[1])
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.2)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsGradientDescent(1.0, 200, 1e-6, 10)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([4, 2, 0])
    method.SetInitialTransform(start, inPlace=False)
    found = method.Execute(fixed, moving)
    matrix = np.eye(4)
    origin = np.asarray(found.TransformPoint((0.0, 0.0, 0.0)))
    for axis in range(3):
        matrix[:3, axis] = np.asarray(found.TransformPoint(tuple(np.eye(3)[axis]))) - origin
    matrix[:3, 3] = origin
    return LPS @ matrix @ LPS


def dipy_affine(head: Head, mask: np.ndarray) -> np.ndarray:
    from dipy.align import affine_registration

    fixed, affine = template(2.0)
    _, matrix = affine_registration(
        np.where(mask, head[0], 0).astype(float),
        fixed.astype(float),
        moving_affine=head[1],
        static_affine=affine,
        level_iters=[1000, 100],
        sigmas=[3.0, 1.0],
        factors=[4, 2],
    )
    return matrix


def joint_variation(voxels: np.ndarray, labels: np.ndarray) -> float:
    white, grey = (voxels[np.isin(labels, codes)] for codes in (WM, GM))
    return float((white.std() + grey.std()) / (white.mean() - grey.mean()))


class Scores:
    """Times and scores by tool."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def add(self, name: str, work: Callable[[], np.ndarray], judge: Callable[[np.ndarray], tuple[float, ...]]):
        start = time.process_time()
        result = work()
        seconds = time.process_time() - start
        self.found[name].append((seconds, *judge(result)))
        print(name, self.found[name][-1], file=sys.stderr, flush=True)
        return result

    def show(self) -> None:
        for name, rows in self.found.items():
            seconds, *scores = np.array(rows).T
            text = "   ".join(f"{s.mean():.4f} (min {s.min():.4f}, max {s.max():.4f})" for s in scores)
            print(f"{name:24} {len(rows):3d} heads  {np.mean(seconds):6.2f} s CPU   {text}", flush=True)


def tools() -> tuple[dict[str, Callable], dict[str, Callable], dict[str, Callable]]:
    """Return what is installed: masks, bias fields, registrations."""
    masks, fields = {}, {"no correction": lambda head, mask: head[0]}
    maps = {"scanner position": lambda head, mask: np.eye(4), "centred": centred, "this package": ours}
    if have("deepbet"):
        masks |= {f"deepbet {edge}": deepbet_mask(edge) for edge in (192, 256)}
    if have("ants"):
        fields["ANTs N4, shrink 4"] = ants_n4(4, 1e-3)
        maps |= {"ANTs Affine": ants_affine("Affine"), "ANTs AffineFast": ants_affine("AffineFast")}
    if have("SimpleITK"):
        fields["SimpleITK N4, shrink 4"] = itk_n4(4)
        fields["this package"] = lambda head, mask: flatten(*head, mask)
        maps |= {"SimpleITK affine": itk_affine}
    if have("dipy"):
        fields |= {f"dipy {method}": dipy_bias(method) for method in ("bspline", "poly")}
        maps |= {"dipy affine": dipy_affine}
    return masks, fields, maps


def overlap(labels: np.ndarray, affine: np.ndarray, matrix: np.ndarray, tissue: dict[str, Volume]) -> Iterator[float]:
    for name, codes in (("wm", WM), ("gm", GM + DEEP_GM)):
        own, target = np.isin(labels, codes).astype(np.float32), tissue[name]
        carried = resample(own, affine, matrix, target.affine, target.voxels.shape)
        yield dice(carried, target.voxels / 255)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    masks, fields, maps = tools()
    tissue = {name: read_volume(options.templates / f"mni2009a_sym_{name}_1mm.nii.gz") for name in ("wm", "gm")}
    scores = Scores()
    files = sorted((options.data / "t1").glob("*.nii.gz"))
    for file in files[:: len(files) // options.heads][: options.heads]:
        head = read_volume(file)
        labels = read_volume(options.data / "dlmuse" / file.name.replace("_T1w", "_dlmuse")).voxels
        pair, mask, flat = (head.voxels, head.affine), labels > 0, {}
        for name, tool in masks.items():
            mask = scores.add(f"mask: {name}", partial(tool, pair), lambda m, y=labels > 0: (dice(m, y),))
        for name, tool in fields.items():
            judge = partial(joint_variation, labels=labels)
            flat[name] = scores.add(f"field: {name}", partial(tool, pair, mask), lambda v, j=judge: (j(v),))
        flat_head = (flat.get("this package", head.voxels), head.affine)
        for name, tool in maps.items():
            judge = partial(overlap, labels, head.affine, tissue=tissue)
            scores.add(f"affine: {name}", partial(tool, flat_head, mask), lambda m, j=judge: tuple(j(m)))
        print(file.name, file=sys.stderr, flush=True)
    scores.show()


if __name__ == "__main__":
    main()
