"""What a FreeSurfer header (.mgh, .mgz) says of its voxels, judged before memory is taken for them."""

from __future__ import annotations

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

from emoe_med.data.files import refuse
from emoe_med.data.limits import VolumeLimits, check_affine, check_size
from emoe_med.data.nifti import Layout

MGH_HEADER_BYTES = 284
MGH_MAGIC = b"\0\0\0\1"  # version 1, big-endian
_MAX_TAIL_BYTES = 16 << 20  # scan parameters and tags: skipped, never parsed
_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}


def mgh_layout(head: bytes, limits: VolumeLimits) -> Layout:
    """Say where the voxels lie and where they stand in RAS mm.

    Args:
        head: The first `MGH_HEADER_BYTES` of the file.
        limits: Largest size and spacing range in mm.

    Raises:
        VolumeError: VOL-TRUNC, VOL-DIM, VOL-SIZE, VOL-DTYPE, VOL-AFFINE (also where the header says that its
            directions mean nothing) or VOL-SPACING.

    Source: https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat
    """
    if len(head) < MGH_HEADER_BYTES:
        refuse("VOL-TRUNC", f"ends within the header, after {len(head)} bytes", "copy the file again")
    header = MGHHeader(head, check=False)
    shape = check_size([int(size) for size in header["dims"]], limits)  # the fourth counts volumes
    code = int(header["type"])
    if code not in _TYPES:
        refuse("VOL-DTYPE", f"data type {code} is not one real number per voxel")
    if int.from_bytes(head[28:30], "big") != 1:  # nibabel would assume a coronal scan
        refuse("VOL-AFFINE", "header gives no directions, so left and right are unknown")
    with np.errstate(all="ignore"):
        affine = header.get_affine()
    check_affine("vox2ras", affine, limits)
    return Layout(
        shape=shape,
        dtype=np.dtype(_TYPES[code]),
        offset=MGH_HEADER_BYTES,
        slope=1.0,
        intercept=0.0,
        affine=affine,
        sizes_mm=tuple(float(size) for size in header["delta"]),
        notes=(),
        tail_bytes=_MAX_TAIL_BYTES,
    )
