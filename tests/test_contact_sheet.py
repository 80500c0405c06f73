"""Pictures side by side, each whole and where it belongs."""

from __future__ import annotations

from PIL import Image

from momalisa.contact_sheet import GAP_PX, LABEL_PX, contact_sheet


def test_every_picture_has_its_place() -> None:
    colours = [["red", "lime"], ["blue"]]
    rows = [(f"row {index}", [Image.new("RGB", (64, 64), colour) for colour in row]) for index, row in enumerate(colours)]
    sheet = contact_sheet(rows, side_px=32)
    assert sheet.size == (GAP_PX + 2 * (32 + GAP_PX), GAP_PX + 2 * (LABEL_PX + 32 + GAP_PX))
    x, y = GAP_PX + 16, GAP_PX + LABEL_PX + 16
    assert sheet.getpixel((x, y)) == (255, 0, 0)
    assert sheet.getpixel((x + 32 + GAP_PX, y)) == (0, 255, 0)
    assert sheet.getpixel((x, y + LABEL_PX + 32 + GAP_PX)) == (0, 0, 255)
    assert sheet.getpixel((x + 32 + GAP_PX, y + LABEL_PX + 32 + GAP_PX)) == (255, 255, 255)


def test_pictures_keep_their_proportions_and_are_not_changed() -> None:
    wide, small = Image.new("RGB", (200, 50), "red"), Image.new("L", (4, 4), 0)
    sheet = contact_sheet([("", [wide, small])], side_px=32)
    assert (wide.size, small.size) == ((200, 50), (4, 4))
    top, middle = GAP_PX + LABEL_PX, GAP_PX + LABEL_PX + 16
    assert sheet.getpixel((GAP_PX + 16, middle)) == (255, 0, 0)
    assert sheet.getpixel((GAP_PX + 16, top + 4)) == (255, 255, 255)  # above the wide one
    assert sheet.getpixel((2 * GAP_PX + 32 + 2, top + 2)) == (0, 0, 0)  # the small one fills its square


def test_labels_are_drawn() -> None:
    picture = [Image.new("RGB", (64, 64), "white")]
    assert contact_sheet([("Ünïcode · a label", picture)]).tobytes() != contact_sheet([("", picture)]).tobytes()
