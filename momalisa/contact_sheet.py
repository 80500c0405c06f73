"""Pictures side by side, where people would rather look than read."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP_PX = 8
LABEL_PX = 18
SHEET = "evaluation.png"  # of a run: the evaluation prompts over time


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], side_px: int = 128) -> Image.Image:
    """Rows of (label, pictures), each picture fitted into a square of `side_px`, on white."""
    columns = max(len(pictures) for _, pictures in rows)
    width = GAP_PX + columns * (side_px + GAP_PX)
    height = GAP_PX + len(rows) * (LABEL_PX + side_px + GAP_PX)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for index, (label, pictures) in enumerate(rows):
        top = GAP_PX + index * (LABEL_PX + side_px + GAP_PX)
        draw.text((GAP_PX, top), label, fill=(60, 60, 60), font=font)
        for column, picture in enumerate(pictures):
            fitted = picture.convert("RGB")
            fitted.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            if fitted.width < side_px and fitted.height < side_px:
                fitted = picture.convert("RGB").resize((side_px, side_px), Image.Resampling.LANCZOS)
            left = GAP_PX + column * (side_px + GAP_PX) + (side_px - fitted.width) // 2
            sheet.paste(fitted, (left, top + LABEL_PX + (side_px - fitted.height) // 2))
    return sheet


def column(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size below each other, nothing between them: so that each can be cut out again."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width, height * len(pictures)))
    for index, picture in enumerate(pictures):
        strip.paste(picture.convert("RGB"), (0, index * height))
    return strip


def timeline(labels: Sequence[str], columns: Sequence[tuple[str, Image.Image]], side_px: int = 128) -> Image.Image:
    """A row for each label, a column for each (name, strip of `column`), in their order, on white."""
    width = GAP_PX + max(len(columns), 1) * (side_px + GAP_PX)
    sheet = Image.new("RGB", (width, 2 * GAP_PX + LABEL_PX + len(labels) * (LABEL_PX + side_px + GAP_PX)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (name, strip) in enumerate(columns):
        left, side = GAP_PX + place * (side_px + GAP_PX), strip.height // len(labels)
        draw.text((left, GAP_PX), name, fill=(60, 60, 60), font=font)
        for row in range(len(labels)):
            picture = strip.crop((0, row * side, strip.width, (row + 1) * side)).resize(
                (side_px, side_px), Image.Resampling.LANCZOS
            )
            sheet.paste(picture, (left, row_top(row, side_px) + LABEL_PX))
    for row, label in enumerate(labels):
        draw.text((GAP_PX, row_top(row, side_px)), label, fill=(60, 60, 60), font=font)
    return sheet


def row_top(row: int, side_px: int) -> int:
    """Where a row of a timeline begins, its label first."""
    return 2 * GAP_PX + LABEL_PX + row * (LABEL_PX + side_px + GAP_PX)
