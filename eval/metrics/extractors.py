"""Features of pictures by a network with a name.

>>> extractor = load_extractor("effnetlite0")
>>> distance = frechet_distance(features(extractor, mine), features(extractor, others))  # of `frechet`

Distances of EfficientNet-Lite0's features are called fd-effnetlite0 and kid-effnetlite0; only those of
the published Inception weights are called fid and kid.
"""

from __future__ import annotations

import hashlib
import mimetypes
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchmetrics.image import fid
from tqdm import tqdm

from eval.files import write_whole
from pipelines.emoji.scorer import EmojiScorer

EXTRACTORS = ("effnetlite0", "inception")
# bilinear: with antialiasing, in float; bicubic: with antialiasing, rounded to uint8; tf1: TensorFlow 1's
# bilinear without antialiasing, as in the published FID.
RESIZES = ("bilinear", "bicubic", "tf1")
# The file that pytorch-fid and torch-fidelity publish; its name ends in -6726825d.pth.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHOWN = 5  # files named in one message
# What readers of pictures and arrays raise on files that are cut off, damaged or of another form.
UNREADABLE = (
    OSError, EOFError, ValueError, LookupError, SyntaxError, NotImplementedError, struct.error, zlib.error,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip


class Pictures:
    """Pictures in a fixed order, from files or from an array uint8 [N, H, W, 3].

    Args:
        source: The files in that order, or the array.
        cache: Where features lie: features-<extractor>.safetensors in this folder.
        about: What else they depend on, such as a manifest.
    """

    def __init__(
        self, source: Sequence[Path] | np.ndarray, cache: Path, about: bytes = b""
    ) -> None:
        self.source, self.cache = source, cache
        digest = hashlib.sha256(about)
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
                raise ValueError(
                    f"an array of pictures is uint8 [N, H, W, 3], not {source.dtype} {list(source.shape)}"
                )
            digest.update(str(source.shape).encode() + np.ascontiguousarray(source).tobytes())
        else:
            for path in source:
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        """Read one picture.  uint8 [3, H, W]."""
        one = self.source[index]
        if isinstance(one, Path):
            try:
                with Image.open(one) as image:
                    mode, pixels = image.mode, np.array(image.convert("RGB"))
            except UNREADABLE as error:
                raise ValueError(
                    f"{one} cannot be read ({error}); replace it, or remove it (what a run lacks, the "
                    "command that made it makes again)"
                ) from error
            if mode not in ("RGB", "L"):
                raise ValueError(
                    f"{one} is {mode}, not RGB; convert it, and put transparency on a background"
                )
            one = pixels
        return torch.from_numpy(one).permute(2, 0, 1)

    def batches(self, size: int = 32) -> Iterator[Tensor]:
        """Yield them in order, each batch of one picture size.  uint8 [B, 3, H, W] with B up to `size`."""
        batch: list[Tensor] = []
        for index in range(len(self)):
            picture = self[index]
            if batch and (len(batch) == size or picture.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(picture)
        if batch:
            yield torch.stack(batch)


def read_pictures(path: str | Path, cache: str | Path) -> Pictures:
    """A folder of pictures in the order of their names, a .npy, or a .npz with one array or `images`.

    Args:
        cache: Folder where their features are kept.

    Raises:
        ValueError: if it cannot be read, holds pictures in other forms than `SUFFIXES`, or less than two, of
            which no distance can be taken.
    """
    found = _read_pictures(Path(path), Path(cache))
    if len(found) < 2:
        raise ValueError(f"{path} holds {len(found)} pictures; a distance needs 2 or more")
    return found


def _read_pictures(path: Path, cache: Path) -> Pictures:
    if path.is_dir():
        held = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
        files = [entry for entry in held if entry.suffix.lower() in SUFFIXES and entry.is_file()]
        others = sorted({*held} - {*files})
        if pictures := [entry for entry in others if _is_picture(entry)]:
            raise ValueError(
                f"{path} holds {_named(pictures)}, and only {', '.join(SUFFIXES)} are read; convert or "
                "remove them"
            )
        if files and others:
            warnings.warn(
                f"{path} holds {_named(others)}, which are passed over: only its pictures count, not those "
                "of folders inside of it",
                stacklevel=3,
            )
        if not files:
            raise ValueError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
        return Pictures(files, cache)
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a folder of pictures, a .npy or a .npz file")
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise ValueError(f"{path} is neither a folder of pictures nor a .npy or .npz file")
    try:
        array = np.load(path, allow_pickle=False)
        names = [] if isinstance(array, np.ndarray) else array.files
        if len(names) == 1 or "images" in names:
            array = array["images" if "images" in names else names[0]]
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read ({error}); write it again with numpy.save or numpy.savez"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{path} has {', '.join(names) or 'no arrays'}; call the pictures `images`"
        )
    try:
        return Pictures(array, cache, path.name.encode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_picture(path: Path) -> bool:
    """By its name."""
    form = Image.registered_extensions().get(path.suffix.lower(), "")
    kind = Image.MIME.get(form) or mimetypes.guess_type(path.name)[0] or ""
    return kind.startswith("image/")


def _named(paths: Sequence[Path]) -> str:
    """Name the first few of these files, such as: a.gif, b.tiff and 3 more."""
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(path.name for path in paths[:SHOWN]) + more


class Extractor(nn.Module):
    """A network with a name: uint8 [B, 3, H, W] -> float32 [B, num_features].

    Args:
        name: Of its distances.
        net: The same, resizing bilinearly to its size unless pictures are of it.
        size: Of the square pictures that it sees.
        resize: "bicubic" does so before; otherwise what `net` does is only recorded.
    """

    def __init__(
        self, name: str, net: nn.Module, size: int, num_features: int, resize: str = "bilinear"
    ) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"unknown resize {resize!r}; choose one of {', '.join(RESIZES)}")
        self.name, self.size, self.num_features, self.resize = name, size, num_features, resize
        self.net = net.eval().requires_grad_(False)
        self.identity = {"name": name, "size": size, "resize": resize, "weights": weights_of(net)}
        self.names = ("fid", "kid") if name == "inception" else (f"fd-{name}", f"kid-{name}")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of pictures of one size, resampled to the network's.  uint8 [B, 3, H, W] -> [B, D]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 [B, 3, H, W], not {images.dtype} {list(images.shape)}"
            )
        if self.resize == "bicubic":
            side = (self.size, self.size)
            images = F.interpolate(images.float(), side, mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255).byte()
        out: Tensor = self.net(images).float()
        if out.shape != (len(images), self.num_features):
            raise ValueError(
                f"{self.name} gives {list(out.shape)} for {len(images)} pictures; "
                f"it should be [{len(images)}, {self.num_features}]"
            )
        return out


class _Lite0(nn.Module):
    def __init__(self, scorer: EmojiScorer) -> None:
        super().__init__()
        self.lite0, self.features = scorer.lite0, scorer.image_features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def load_extractor(
    name: str = "effnetlite0", *, resize: str = "bilinear", path: str | Path | None = None
) -> Extractor:
    """One of `EXTRACTORS`, with the weights at `path`, or those of its package or (inception) a download.

    Raises:
        ValueError: on a name or resize that there is not, or Inception weights that are not the published.
    """
    if name == "effnetlite0":
        if resize == "tf1":
            raise ValueError("effnetlite0 resizes bilinear or bicubic; tf1 is for inception")
        try:
            scorer = EmojiScorer.load(lite0_path=path)
        except (*UNREADABLE, RuntimeError, UnpicklingError) as error:
            if path is None:
                raise
            raise ValueError(
                f"{path} holds no weights of EfficientNet-Lite0 ({error}); leave --features-path out for "
                "those of the package, or give their file"
            ) from error
        return Extractor(name, _Lite0(scorer), 224, 1280, resize)
    if name != "inception":
        raise ValueError(f"unknown features {name!r}; choose one of {', '.join(EXTRACTORS)}")
    if path is not None:
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if found != INCEPTION_SHA256:
            raise ValueError(
                f"{path} is not the published Inception of FID: its SHA-256 starts with {found[:8]}, not "
                f"{INCEPTION_SHA256[:8]}; take pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
            )
    try:
        net = fid.NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=["2048"],
            feature_extractor_weights_path=None if path is None else str(path),
            antialias=resize != "tf1",
        )
    except ModuleNotFoundError as error:
        raise ImportError(
            "inception needs torch-fidelity and the torchvision that fits your torch; install them, or use "
            "effnetlite0"
        ) from error
    except URLError as error:
        raise OSError(
            f"cannot download the Inception weights ({error.reason}); give their file by --features-path, "
            "or use effnetlite0, which needs no network"
        ) from error
    return Extractor(name, net, 299, 2048, resize)


def weights_of(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + str(value.dtype).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def features(extractor: Extractor, pictures: Pictures) -> Tensor:
    """Extract the features of every picture, or read them if nothing changed.  [N, D]."""
    pictures.cache.mkdir(parents=True, exist_ok=True)
    file = pictures.cache / f"features-{extractor.name}.safetensors"
    key = hashlib.sha256(f"{pictures.digest} {extractor.identity}".encode()).hexdigest()
    if file.exists():
        with safe_open(file, "pt") as cached:
            if (cached.metadata() or {}).get("key") == key:
                return cached.get_tensor("features")
    found = []
    with tqdm(total=len(pictures), desc=f"{extractor.name} features", disable=None) as bar:
        for batch in pictures.batches():
            found.append(extractor(batch))
            bar.update(len(batch))
    result = torch.cat(found)
    write_whole(file, save({"features": result}, metadata={"key": key}))
    return result
