"""A labelled grid of pictures: one row a prompt, one column a way of making it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE, FONT_SIZE = 8, 22, 15


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    cell: int = 192,
) -> Image.Image:
    """Column labels stand on top, a row's label under its pictures."""
    font = ImageFont.load_default(FONT_SIZE)
    top = LINE if column_labels else 0
    columns = max(len(row) for row in rows)
    labels_width = max((font.getlength(label) for label in row_labels), default=0)
    step = max(cell, *(int(font.getlength(label)) for label in column_labels), 0) + GAP
    width = max(columns * step, int(labels_width) + GAP) + GAP
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for x, label in enumerate(column_labels):
        draw.text((GAP + x * step, GAP // 2), label, fill="black", font=font)
    for y, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        upper = top + GAP + y * (cell + LINE + GAP)
        for x, picture in enumerate(row):
            resized = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(resized, (GAP + x * step, upper))
        draw.text((GAP, upper + cell + 2), label, fill="black", font=font)
    return canvas
