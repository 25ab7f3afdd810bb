"""Volumes with and without faults, made from fixed seeds by hand-set header fields. All synthetic."""

import gzip
import zlib
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (24, 26, 28)
SPACING_MM = (1.0, 1.2, 0.9)
_HEADERS = {1: nib.Nifti1Header, 2: nib.Nifti2Header}
_MAGIC = {1: b"n+1\0", 2: b"n+2\0\r\n\x1a\n"}


def phantom(shape=SHAPE, seed: int = 0, dtype: str = "i2") -> np.ndarray:
    """An off-centre ellipsoid with a brighter side and noise: no two orientations of it are alike."""
    grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    head = (grid[0] / 0.7) ** 2 + (grid[1] / 0.8) ** 2 + ((grid[2] - 0.1) / 0.6) ** 2 < 1
    noise = np.random.default_rng(seed).integers(0, 20, shape)
    return (head * (60 + 20 * grid[0] + 10 * grid[1]) + noise).astype(dtype)


def rotation(degrees: float, axis: int = 2) -> np.ndarray:
    """Turn about one axis, as [4, 4]."""
    turn, (i, j) = np.eye(4), [k for k in range(3) if k != axis]
    angle = np.radians(degrees)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
    return turn


def oblique_affine(shape=SHAPE) -> np.ndarray:
    """A scan tilted by 8 and 5 degrees about the middle of the box, first voxel left, back and down."""
    centre = np.eye(4)
    centre[:3, 3] = -(np.array(shape) - 1) / 2
    return rotation(8) @ rotation(5, axis=0) @ np.diag([*SPACING_MM, 1]) @ centre


def sform(affine: np.ndarray) -> dict[str, Any]:
    return {"srow_x": affine[0], "srow_y": affine[1], "srow_z": affine[2]}


def nifti(voxels: np.ndarray, affine=None, *, version: int = 1, endian: str = "<", extension: bytes = b"", **fields):
    """Bytes of a NIfTI file: a header with both forms set, then ``fields`` put over it, then the voxels."""
    header = _HEADERS[version](endianness=endian)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    affine = oblique_affine(voxels.shape) if affine is None else affine
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    header["magic"] = _MAGIC[version][:4]
    header["vox_offset"] = header.sizeof_hdr + 4 + len(extension)
    for field, value in fields.items():
        header[field] = value
    follows = b"\1\0\0\0" if extension else bytes(4)
    stored = voxels.astype(voxels.dtype.newbyteorder(endian)).tobytes(order="F")
    return header.binaryblock + follows + extension + stored


def packed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=6, mtime=0)


def flip_bit(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def long_stream(head: bytes, num_zeros: int) -> bytes:
    """A gzip stream of ``head`` and then zeros, 240 times smaller than what it inflates to.

    One flushed block is repeated, so that 4 GB take no time to make. The checksum is not computed: a reader
    that gets as far has failed already.
    """
    compressor = zlib.compressobj(1, wbits=-15)
    start = compressor.compress(head) + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + start + block * (num_zeros >> 20) + compressor.flush() + bytes(8)


def bombs() -> dict[str, tuple[bytes, str]]:
    """File name: content, code of the refusal."""
    whole = nifti(phantom())
    giant = nifti(phantom(), dim=[3, 2048, 1024, 1024, 1, 1, 1, 1])
    cube = nifti(phantom((64, 64, 64)))
    ordinary = nifti(phantom(), dim=[3, 512, 512, 512, 1, 1, 1, 1], datatype=64, bitpix=64)
    extended = nifti(phantom(), vox_offset=(1 << 30) + 352)
    return {
        "32767.nii": (nifti(phantom(), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "VOL-SIZE"),
        "header-4GB.nii.gz": (packed(giant[:352]), "VOL-SIZE"),
        "header-1GB-within-limits.nii.gz": (packed(ordinary[:352]), "VOL-TRUNC"),
        "header-1GB-within-limits.nii": (ordinary, "VOL-TRUNC"),
        "4GB-in-17MB.nii.gz": (long_stream(giant[:352], 1 << 32), "VOL-SIZE"),
        "4GB-behind-64-cubed.nii.gz": (long_stream(cube, 1 << 32), "VOL-SIZE"),
        "gzip-in-gzip.nii.gz": (packed(packed(whole)), "VOL-SIZE"),
        "extension-1GB.nii.gz": (
            long_stream(extended, 1 << 30),
            "VOL-SIZE",
        ),
    }


def _moved(dx_mm: float) -> dict[str, Any]:
    affine = oblique_affine()
    affine[0, 3] += dx_mm
    return sform(affine)


def _scaled(*factors: float) -> dict[str, Any]:
    affine = oblique_affine() @ np.diag([*factors, 1])
    return sform(affine) | {"qform_code": 0}


def _sheared(cosine: float) -> dict[str, Any]:
    shear = np.eye(4)
    shear[0, 1] = cosine / np.sqrt(1 - cosine**2)
    return sform(shear) | {"qform_code": 0}


_NAN, _INF = float("nan"), float("inf")
HEADER_FAULTS: dict[str, tuple[dict[str, Any], str | None]] = {  # fields put over a sound header, code or None
    "no axes": ({"dim": [0, 24, 26, 28, 1, 1, 1, 1]}, "VOL-DIM"),
    "eight axes": ({"dim": [8, 24, 26, 28, 1, 1, 1, 1]}, "VOL-DIM"),
    "negative axis count": ({"dim": [-3, 24, 26, 28, 1, 1, 1, 1]}, "VOL-DIM"),
    "two axes": ({"dim": [2, 24, 728, 1, 1, 1, 1, 1]}, "VOL-DIM"),
    "one slice": ({"dim": [3, 24, 728, 1, 1, 1, 1, 1]}, "VOL-DIM"),
    "empty axis": ({"dim": [3, 24, 0, 28, 1, 1, 1, 1]}, "VOL-DIM"),
    "negative axis": ({"dim": [3, 24, -26, 28, 1, 1, 1, 1]}, "VOL-DIM"),
    "two negative axes": ({"dim": [3, -24, -26, 28, 1, 1, 1, 1]}, "VOL-DIM"),
    "two volumes": ({"dim": [4, 24, 26, 14, 2, 1, 1, 1]}, "VOL-DIM"),
    "vector voxels": ({"dim": [5, 24, 26, 14, 1, 2, 1, 1]}, "VOL-DIM"),
    "4-D of one volume": ({"dim": [4, 24, 26, 28, 1, 1, 1, 1]}, None),
    "5-D of one volume": ({"dim": [5, 24, 26, 28, 1, 1, 1, 1]}, None),
    "above the limit": ({"dim": [3, 1024, 1024, 1024, 1, 1, 1, 1]}, "VOL-SIZE"),
    "a slice too many": ({"dim": [3, 24, 26, 29, 1, 1, 1, 1]}, "VOL-TRUNC"),
    "a slice too few": ({"dim": [3, 24, 26, 27, 1, 1, 1, 1]}, "VOL-TRAIL"),
    "RGB": ({"datatype": 128, "bitpix": 24}, "VOL-DTYPE"),
    "complex": ({"datatype": 32, "bitpix": 64}, "VOL-DTYPE"),
    "one bit": ({"datatype": 1, "bitpix": 1}, "VOL-DTYPE"),
    "long double": ({"datatype": 1536, "bitpix": 128}, "VOL-DTYPE"),
    "unknown type": ({"datatype": 5}, "VOL-DTYPE"),
    "bits against type": ({"bitpix": 8}, "VOL-DTYPE"),
    "offset zero": ({"vox_offset": 0}, "VOL-FORMAT"),
    "offset in the header": ({"vox_offset": 348}, "VOL-FORMAT"),
    "offset negative": ({"vox_offset": -352}, "VOL-FORMAT"),
    "extension of 1 GB": ({"vox_offset": 1 << 30}, "VOL-SIZE"),
    "slope negative": ({"scl_slope": -1, "scl_inter": 0}, "VOL-SCALE"),
    "slope huge": ({"scl_slope": 1e7, "scl_inter": 0}, "VOL-SCALE"),
    "slope infinite": ({"scl_slope": _INF, "scl_inter": 0}, "VOL-SCALE"),
    "intercept NaN": ({"scl_slope": 1, "scl_inter": _NAN}, "VOL-SCALE"),
    "intercept infinite": ({"scl_slope": 1, "scl_inter": -_INF}, "VOL-SCALE"),
    "intercept that swallows the voxels": ({"scl_slope": 1, "scl_inter": 3e38}, "VOL-CONST"),
    "slope zero": ({"scl_slope": 0, "scl_inter": 7}, None),
    "slope NaN": ({"scl_slope": _NAN, "scl_inter": _NAN}, None),
    "no form": ({"sform_code": 0, "qform_code": 0}, "VOL-AFFINE"),
    "negative form codes": ({"sform_code": -1, "qform_code": -1}, "VOL-AFFINE"),
    "sform zero": (sform(np.zeros((4, 4))), "VOL-AFFINE"),
    "sform NaN": (sform(np.full((4, 4), _NAN)), "VOL-AFFINE"),
    "sform infinite": (_moved(_INF), "VOL-AFFINE"),
    "sform singular": (sform(np.ones((4, 4))), "VOL-AFFINE"),
    "sform one axis zero": (_scaled(1, 0, 1), "VOL-AFFINE"),
    "forms 2 mm apart": (_moved(2), "VOL-AFFINE"),
    "forms 0.5 mm apart": (_moved(0.5), None),
    "forms 2 degrees apart": (sform(rotation(2) @ oblique_affine()), "VOL-AFFINE"),
    "forms 0.5 degrees apart": (sform(rotation(0.5) @ oblique_affine()), None),
    "forms mirrored": (sform(np.diag([-1, 1, 1, 1]) @ oblique_affine()), "VOL-AFFINE"),
    "quaternion too long": ({"quatern_b": 1, "quatern_c": 1, "sform_code": 0}, "VOL-AFFINE"),
    "quaternion NaN": ({"quatern_b": _NAN, "sform_code": 0}, "VOL-AFFINE"),
    "pixdim negative": ({"pixdim": [1, -1, 1, 1, 1, 1, 1, 1], "sform_code": 0}, "VOL-AFFINE"),
    "pixdim zero": ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1], "sform_code": 0}, "VOL-AFFINE"),
    "qfac 0.5": ({"pixdim": [0.5, 1, 1, 1, 1, 1, 1, 1], "sform_code": 0}, "VOL-AFFINE"),
    "20 m away": (_moved(2e4) | {"qform_code": 0}, "VOL-AFFINE"),
    "spacing in metres": (_scaled(1e-3, 1e-3, 1e-3), "VOL-SPACING"),
    "spacing in microns": (_scaled(1e3, 1e3, 1e3), "VOL-SPACING"),
    "one thick axis": (_scaled(1, 1, 20), "VOL-SPACING"),
    "unit metre": ({"xyzt_units": 1}, "VOL-SPACING"),
    "unit micron": ({"xyzt_units": 3}, "VOL-SPACING"),
    "unit unknown to NIfTI": ({"xyzt_units": 7}, "VOL-SPACING"),
    "unit not told": ({"xyzt_units": 0}, None),
    "shear 0.2": (_sheared(0.2), "VOL-SPACING"),
    "shear 0.05": (_sheared(0.05), None),
}


def bad_voxels() -> dict[str, tuple[np.ndarray, str]]:
    """Voxels that a sound header goes before, and the code of the refusal."""
    one_nan, one_inf, too_wide = (phantom(dtype="f8") for _ in range(3))
    one_nan[3, 4, 5], one_inf[3, 4, 5], too_wide[3, 4, 5] = _NAN, -_INF, 1e300
    return {
        "one NaN": (one_nan, "VOL-NONFINITE"),
        "one Inf": (one_inf, "VOL-NONFINITE"),
        "beyond float32": (too_wide, "VOL-NONFINITE"),
        "all zero": (np.zeros(SHAPE, "i2"), "VOL-CONST"),
        "all seven": (np.full(SHAPE, 7, "f4"), "VOL-CONST"),
    }
