"""Build the packed training data from the emoji packages: `python -m pipelines.emoji.data`.

The concepts of `concepts.txt`, drawn in the Fluent 3D style on white at 128 x 128 pixels. A picture of one
strong colour is there in other colours, too, by a turn of its hues. The pack is one npz file of WebP bytes,
names and colour words.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.emoji.captions import dominant_colour, held_out, recolourings, turn_hue

WORK = Path(__file__).parent / ".work"
CONCEPTS = Path(__file__).parent / "concepts.txt"
PACKAGES = {"pictures": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emojilib@4.0.3"}
SIZE = 128
LIMIT_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Emoji:
    """The data set, one row a picture.

    images: uint8 [I, 128, 128, 3]; names: what captions call it, the most usual first; colours: the colour
    word of most of its pixels, if there is one; recoloured: bool [I], whether its hues were turned.
    """

    images: np.ndarray
    names: list[list[str]]
    colours: list[str | None]
    recoloured: np.ndarray

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over all of it."""
        said = json.dumps([self.names, self.colours, self.recoloured.tolist()]).encode()
        return hashlib.sha256(said + self.images.tobytes()).hexdigest()[:16]

    @property
    def concepts(self) -> list[str]:
        """The most usual name of each row."""
        return [names[0] for names in self.names]

    @property
    def described(self) -> list[str]:
        """What each picture shows in the fewest words: its concept, of a recoloured one with its colour."""
        rows = zip(self.concepts, self.colours, self.recoloured, strict=True)
        return [f"{colour} {name}" if turned else name for name, colour, turned in rows]

    @property
    def held_out(self) -> np.ndarray:
        """Whether the concept is kept from training.  bool [I]."""
        return np.array([held_out(name) for name in self.concepts], bool)

    @property
    def held_pair(self) -> np.ndarray:
        """Whether a known concept is kept from training in this colour.  bool [I]."""
        rows = zip(self.described, self.recoloured, strict=True)
        return np.array([turned and held_out(words) for words, turned in rows])

    @property
    def trained(self) -> np.ndarray:
        """Whether training sees the picture.  bool [I]."""
        return ~(self.held_out | self.held_pair)


@dataclass(frozen=True)
class Concept:
    """A line of `concepts.txt`.  source: its name in emojilib; any_colour: whether it may be recoloured."""

    source: str
    names: list[str]
    any_colour: bool


def concepts(path: Path = CONCEPTS) -> Iterator[Concept]:
    """Read the list; a heading in brackets says whether what follows may be recoloured."""
    any_colour = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            any_colour = line.endswith("any colour]")
        elif line and not line.startswith("#"):
            source, _, names = (part.strip() for part in line.partition("="))
            names = names or source.replace("_", " ").lower()
            yield Concept(source, [name.strip() for name in names.split(",")], any_colour)


def fetch(spec: str, folder: Path) -> tarfile.TarFile:
    """Open a package's tarball, asking npm for it when it is not in the folder."""
    stem, version = spec.removeprefix("@").replace("/", "-").rsplit("@", 1)
    path = folder / f"{stem}-{version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{path.name} is not in {folder} and npm is not installed; get either")
        folder.mkdir(parents=True, exist_ok=True)
        # Moved when it is whole: a kill leaves no half of an archive behind.
        with tempfile.TemporaryDirectory(dir=folder) as part:
            subprocess.run(["npm", "pack", "--silent", spec], cwd=part, check=True)
            (Path(part) / path.name).replace(path)
    return tarfile.open(path)


def _read(archive: tarfile.TarFile, member: str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member
    return file.read()


def _codepoints(text: str) -> str:
    """The identity of an emoji: its code points without the presentation selector."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _on_white(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The picture on white, uint8 [128, 128, 3], and where its foreground is, bool [128, 128]."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    return np.asarray(flat), np.asarray(image)[..., 3] > 127


def webp(picture: Image.Image) -> bytes:
    """Encode a picture as the pack keeps it, a little lossy."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90, method=4)
    return buffer.getvalue()


def pack(out: Path, blobs: Sequence[bytes], records: object) -> None:
    """Encoded pictures of one size in one file, with what is said of them."""
    np.savez(
        out,
        bytes=np.frombuffer(b"".join(blobs), np.uint8),
        ends=np.cumsum([len(blob) for blob in blobs]),
        records=np.frombuffer(json.dumps(records).encode(), np.uint8),
    )


def read_pack(path: Path) -> tuple[list[bytes], Any]:
    """What `pack` was given."""
    with np.load(path) as packed:
        raw, ends, records = packed["bytes"].tobytes(), packed["ends"], packed["records"].tobytes()
    return [raw[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)], json.loads(records)


def decoded(blobs: Sequence[bytes]) -> np.ndarray:
    """Encoded pictures of one size.  uint8 [I, H, W, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")) for blob in blobs])


def unpack(path: Path) -> tuple[np.ndarray, Any]:
    """What `pack` wrote: pictures uint8 [I, H, W, 3], records."""
    blobs, records = read_pack(path)
    return decoded(blobs), records


def build(packages: Path, out: Path) -> None:
    """Write the pack.  Every concept must have its picture: SystemExit names those that have none."""
    pictures = fetch(PACKAGES["pictures"], packages)
    lib = json.loads(_read(fetch(PACKAGES["names"], packages), "package/dist/emoji-en-US.json"))
    keys: dict[str, str] = {}
    for emoji, (name, *_) in lib.items():
        keys.setdefault(name, _codepoints("-".join(f"{ord(char):04x}" for char in emoji)))
    drawings = {
        _codepoints(Path(name).stem): name for name in pictures.getnames() if name.endswith(".webp")
    }
    wanted = list(concepts())
    missing = [c.source for c in wanted if keys.get(c.source) not in drawings]
    if missing:
        raise SystemExit(f"no picture of {', '.join(missing)}; take them out of {CONCEPTS.name}")

    blobs: list[bytes] = []
    records: list[dict[str, object]] = []
    for concept in wanted:
        picture, inside = _on_white(_read(pictures, drawings[keys[concept.source]]))
        colour = dominant_colour(picture[inside] / 255)
        variants = [(picture, colour, False)]
        if concept.any_colour and not held_out(concept.names[0]):
            for new, degrees in recolourings(picture[inside], colour).items():
                variants.append((turn_hue(picture, degrees), new, True))
        for pixels, word, recoloured in variants:
            blobs.append(webp(Image.fromarray(pixels)))
            record = {"names": concept.names, "colour": word, "recoloured": recoloured}
            records.append(record)

    out.parent.mkdir(parents=True, exist_ok=True)
    pack(out, blobs, records)
    size = out.stat().st_size
    print(f"{len(blobs)} images of {len(wanted)} concepts, {size / 2**20:.1f} MiB in {out}")
    if size > LIMIT_BYTES:
        raise SystemExit(f"the pack has {size} bytes, more than {LIMIT_BYTES}; lower the quality")


def load(path: Path = WORK / "emoji.npz") -> Emoji:
    """Read the packed data; without it the command that builds it is named."""
    if not path.exists():
        raise SystemExit(f"no training data at {path}; build it: python -m pipelines.emoji.data")
    images, rows = unpack(path)
    return Emoji(
        images=images,
        names=[row["names"] for row in rows],
        colours=[row["colour"] for row in rows],
        recoloured=np.array([row["recoloured"] for row in rows], bool),
    )


def main() -> None:
    """Build the pack from npm's tarballs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=WORK / "packages", help="npm tarballs")
    parser.add_argument("--out", type=Path, default=WORK / "emoji.npz")
    args = parser.parse_args()
    build(args.packages, args.out)


if __name__ == "__main__":
    main()
