"""A labelled grid of pictures, such as one row a prompt and one column a way of making it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP, LINE, FONT_SIZE = 8, 22, 15


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[Sequence[str]],
    column_labels: Sequence[str] = (),
    cell: int = 192,
) -> Image.Image:
    """Column labels stand on top, each picture's label under it, of one line or more.

    A line may be longer than the picture.
    """
    font = ImageFont.load_default(FONT_SIZE)
    under = LINE * max(text.count("\n") + 1 for row in labels for text in row)
    top = LINE if column_labels else 0
    step = max(cell, *(int(font.getlength(label)) for label in column_labels), 0) + GAP
    ends = [
        x * step + font.getlength(line)
        for row in labels
        for x, text in enumerate(row)
        for line in text.split("\n")
    ]
    columns = max(len(row) for row in rows)
    width = int(max(columns * step, *ends)) + 2 * GAP
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + under + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for x, label in enumerate(column_labels):
        draw.text((GAP + x * step, GAP // 2), label, fill="black", font=font)
    for y, (row, texts) in enumerate(zip(rows, labels, strict=True)):
        upper = top + GAP + y * (cell + under + GAP)
        for x, (picture, text) in enumerate(zip(row, texts, strict=True)):
            resized = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            canvas.paste(resized, (GAP + x * step, upper))
            draw.text((GAP + x * step, upper + cell + 2), text, fill="black", font=font)
    return canvas
