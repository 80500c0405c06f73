"""Pictures side by side, where people would rather look than read."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP_PX = 8
LABEL_PX = 18


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
