"""Image files that are not read here: what they are, and one command that converts each kind."""

from collections import Counter
from pathlib import Path

# Each command runs in the folder of the files, with the library that it names.
CONVERT = {
    ".nii": (
        "NIfTI", "nibabel",
        "import nibabel, numpy, glob; [numpy.save(f'{f.split(chr(46))[0]}_{i:04d}.npy', v[..., i]) "
        "for f in glob.glob('*.nii*') for v in [numpy.asarray(nibabel.load(f).dataobj)] for i in range(v.shape[2])]",
    ),
    ".mat": (
        "MATLAB", "scipy",
        "import scipy.io, numpy, glob; [numpy.save(f[:-4] + '.npy', max((v for k, v in scipy.io.loadmat(f).items() "
        "if k[0] != '_'), key=numpy.size)) for f in glob.glob('*.mat')]",
    ),
    ".h5": (
        "HDF5", "h5py",
        "import h5py, numpy, glob; [numpy.save(f.rsplit('.', 1)[0] + '_' + k + '.npy', v[()]) "
        "for f in glob.glob('*.h*5*') for k, v in h5py.File(f).items() if hasattr(v, 'shape')]",
    ),
    ".hdr": (
        "ENVI", "spectral",
        "import spectral, numpy, glob; [numpy.save(f[:-4] + '.npy', numpy.asarray(spectral.open_image(f).load())) "
        "for f in glob.glob('*.hdr')]",
    ),
}  # fmt: skip
ALIKE = {".gz": ".nii", ".hdf5": ".h5", ".hdf": ".h5", ".he5": ".h5", ".img": ".hdr", ".dat": ".hdr", ".bil": ".hdr"}
# Formats that Pillow opens.
PICTURES = (".webp", ".jp2", ".heic", ".ppm", ".pgm", ".tga", ".avif")


def kind_of(path: Path) -> str:
    """Return what an unread path is: its extension, "hidden files" or "folders"."""
    if path.name.startswith("."):
        return "hidden files"
    if path.is_dir():
        return f"folders ({path.suffix})" if path.suffix == ".zarr" else "folders"
    return (
        "".join(path.suffixes[-2:]).lower()
        if path.name.endswith(".nii.gz")
        else path.suffix.lower() or "without extension"
    )


def how_to_convert(others: Counter[str], folder: Path) -> str:
    """Return how to convert the most frequent known kind of unread files, as text for a message; empty without one.

    Args:
        others: Number of unread files of each kind.
        folder: Folder of the files.
    """
    for kind, count in others.most_common():
        ending = "." + kind.rsplit(".", 1)[-1]
        known = CONVERT.get(ALIKE.get(ending, ending))
        if known is not None:
            name, library, code = known
            return (
                f"\nits {count} {kind} files may be {name}. To convert them to .npy (height, width, bands): "
                f'pip install {library}; cd {folder} && python -c "{code}"'
            )
        if ending in PICTURES:
            return (
                f'\nto convert its {count} {kind} files to PNG: cd {folder} && python -c "from PIL import Image; import glob; '
                f"[Image.open(f).save(f.rsplit('.', 1)[0] + '.png') for f in glob.glob('*{ending}')]\""
            )
    return ""
