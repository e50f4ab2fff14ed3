"""Build the packed training data from the emoji packages: `python -m pipelines.emoji.data`.

Two styles of one concept: Noto (SVG, drawn at 128 pixels) and Fluent 3D (WebP, reduced to 128
pixels), both on white. Concepts are the emoji of emojilib that both styles have, without flags
and skin variants. The pack is one npz file of WebP bytes, names, keywords and colour words.
"""

import argparse
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.emoji.captions import STYLES, dominant_colour, held_out

WORK = Path(__file__).parent / ".work"
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "names": "emojilib@4.0.3",
}
SIZE = 128
LIMIT_BYTES = 12 * 2**20


@dataclass(frozen=True)
class Emoji:
    """The data set.  images: uint8 [I, 128, 128, 3]; the lists have one entry an image."""

    images: np.ndarray
    names: list[str]
    keywords: list[list[str]]
    styles: list[str]
    colours: list[str | None]

    @property
    def held_out(self) -> np.ndarray:
        return np.array([held_out(name) for name in self.names])


def fetch(spec: str, folder: Path) -> tarfile.TarFile:
    """Open a package's tarball, asking npm for it when it is not in the folder."""
    stem, version = spec.removeprefix("@").replace("/", "-").rsplit("@", 1)
    path = folder / f"{stem}-{version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{path.name} is not in {folder} and npm is not installed; get either")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True)
    return tarfile.open(path)


def _read(archive: tarfile.TarFile, member: str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member
    return file.read()


def _codepoints(text: str) -> str:
    """The identity of an emoji: its code points without the presentation selector."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _is_flag(key: str) -> bool:
    return any(0x1F1E6 <= int(p, 16) <= 0x1F1FF or p.startswith("e00") for p in key.split("-"))


def _on_white(data: bytes) -> tuple[Image.Image, np.ndarray]:
    """The picture on white at 128 pixels, and its foreground pixels as floats [P, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32) / 255
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    return flat, pixels[pixels[..., 3] > 0.5][:, :3]


def webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88, method=6)
    return buffer.getvalue()


def pack(out: Path, blobs: Sequence[bytes], records: object) -> None:
    """Encoded pictures of one size in one file, with what is said of them."""
    np.savez(
        out,
        bytes=np.frombuffer(b"".join(blobs), np.uint8),
        ends=np.cumsum([len(blob) for blob in blobs]),
        records=np.frombuffer(json.dumps(records).encode(), np.uint8),
    )


def unpack(path: Path) -> tuple[np.ndarray, Any]:
    """What `pack` wrote: pictures uint8 [I, H, W, 3], records."""
    with np.load(path) as packed:
        raw, ends, records = packed["bytes"].tobytes(), packed["ends"], packed["records"].tobytes()
    images = [
        np.asarray(Image.open(io.BytesIO(raw[a:b])).convert("RGB"))
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return np.stack(images), json.loads(records)


def build(packages: Path, out: Path) -> None:
    import resvg_py  # only needed here

    noto, fluent = fetch(PACKAGES["noto"], packages), fetch(PACKAGES["fluent"], packages)
    lib = json.loads(
        _read(fetch(PACKAGES["names"], packages), "package/dist/emoji-en-US.json"),
    )
    icons = json.loads(_read(noto, "package/icons.json"))["icons"]
    chars = {_codepoints(k): v for k, v in json.loads(_read(noto, "package/chars.json")).items()}
    drawings = {
        _codepoints(Path(name).stem): name for name in fluent.getnames() if name.endswith(".webp")
    }

    blobs: list[bytes] = []
    records: list[dict[str, object]] = []
    for emoji, (name, *keywords) in lib.items():
        key = _codepoints("-".join(f"{ord(char):04x}" for char in emoji))
        if key not in chars or key not in drawings or _is_flag(key):
            continue
        name = name.replace("_", " ").replace("’", "'").lower()
        words = [k.replace("_", " ").lower() for k in keywords]
        words = [k for k in words if k.replace(" ", "").isalpha() and k.isascii() and k != name]
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}">'
            f"{icons[chars[key]]['body']}</svg>"
        )
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
        for style, data in zip(STYLES, (drawn, _read(fluent, drawings[key])), strict=True):
            picture, foreground = _on_white(data)
            blobs.append(webp(picture))
            colour = dominant_colour(foreground)
            records.append({"name": name, "keywords": words, "style": style, "colour": colour})
        if len(blobs) % 400 == 0:
            print(f"{len(blobs)} images", flush=True)

    out.parent.mkdir(parents=True, exist_ok=True)
    pack(out, blobs, records)
    size = out.stat().st_size
    print(f"{len(blobs)} images of {len(blobs) // 2} concepts, {size / 2**20:.1f} MiB in {out}")
    if size > LIMIT_BYTES:
        raise SystemExit(f"the pack has {size} bytes, more than {LIMIT_BYTES}; lower the quality")


def load(path: Path = WORK / "emoji.npz") -> Emoji:
    if not path.exists():
        raise SystemExit(f"no training data at {path}; build it: python -m pipelines.emoji.data")
    images, rows = unpack(path)
    return Emoji(
        images=images,
        names=[row["name"] for row in rows],
        keywords=[row["keywords"] for row in rows],
        styles=[row["style"] for row in rows],
        colours=[row["colour"] for row in rows],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=WORK / "packages", help="npm tarballs")
    parser.add_argument("--out", type=Path, default=WORK / "emoji.npz")
    args = parser.parse_args()
    build(args.packages, args.out)


if __name__ == "__main__":
    main()
