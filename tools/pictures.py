"""The pictures of docs/pictures, drawn."""

from tools.drawing import Drawing

_ROOMS = [
    # title, what it is, its boxes
    (
        "Clients",
        "any language; no torch",
        ["keypast|Python client, CLI", "curl|JSON, safetensors", "openai|chat, completions", "tritonclient|/v2 infer"],
    ),
    (
        "service/",
        "the only HTTP",
        ["keys, bounds|who, how much", "routes|parse, submit, reply", "text|ids, chat templates", "worker|one thread"],
    ),
    (
        "engine/",
        "decides; no tensors",
        ["sessions|names, versions", "admission|may it start", "scheduler|rows of a batch", "blocks|holders, tenants"],
    ),
    (
        "engine/",
        "computes; tensors only",
        [
            "runner|a batch to the device",
            "models|embed, layers, head",
            "attention|C++, Triton, SDPA",
            "KV pool|the past",
        ],
    ),
]
_BETWEEN = ["HTTP: a body", "an Append, and a future for its result", "a Batch: rows, positions, block tables"]
_BLOCK, _GAP = 42, 6  # pixels of a block, and between two


def architecture() -> str:
    """Clients, the service, what decides, what computes; and what goes from one to the next."""
    drawing = Drawing(880, 576, "The rooms of keypast, and what goes between them")
    for number, (title, what, boxes) in enumerate(_ROOMS):
        y = 24 + number * 144
        drawing.box("room", 24, y, 832, 96, 10)
        drawing.text(title, 44, y + 38, size=16, at="start", bold=True)
        drawing.text(what, 44, y + 60, size=12, kind="faint", at="start")
        for column, words in enumerate(boxes):
            drawing.labelled("box", words, 200 + column * 162, y + 20, 148, 56)
        if number < len(_BETWEEN):
            drawing.arrow(440, y + 100, 440, y + 140, both=True)
            drawing.text(_BETWEEN[number], 454, y + 120, size=12, kind="faint", at="start")
    return drawing.svg()


def blocks() -> str:
    """A session of three blocks, its fork, and the fork after it has written."""
    drawing = Drawing(880, 330, "A session's blocks, its fork, and copy-on-write")
    child = ("child", [1, 2, 3])
    _panel(
        drawing,
        24,
        "1  a session of 40 positions",
        [("parent", [1, 2, 3])],
        {},
        "green: its own; the third holds 8 of 16",
    )
    _panel(drawing, 308, "2  fork", [("parent", [1, 2, 3]), child], {}, "blue: held by both; nothing is copied")
    tables = [("parent", [1, 2, 3]), ("child", [1, 2, 4])]
    _panel(drawing, 592, "3  the child appends one", tables, {4: 9}, "orange: the one block that is copied")
    return drawing.svg()


def _panel(
    drawing: Drawing, x: float, title: str, tables: list[tuple[str, list[int]]], filled: dict[int, int], told: str
) -> None:
    """`tables`: who holds which blocks; `filled`: of a block that is a copy, its positions."""
    drawing.box("room", x, 24, 264, 282, 10)
    drawing.text(title, x + 16, 48, size=14, at="start", bold=True)
    held = [block for _, table in tables for block in table]
    for block in range(1, 5):
        left, used = _left(x, block), filled.get(block, 8 if block == 3 else 16)
        kind = "box" if block not in held else "shared" if held.count(block) > 1 else "own"
        kind = "copied" if block in filled else kind
        drawing.box("box", left, 148, _BLOCK, _BLOCK, 0)
        if block in held:
            drawing.box(kind, left + 0.5, 148.5, (_BLOCK - 1) * used / 16, _BLOCK - 1, 0)
        drawing.text(str(block), left + _BLOCK / 2, 166, bold=True, kind="text" if block in held else "faint")
        drawing.text(f"{used}/16" if block in held else "free", left + _BLOCK / 2, 183, size=10, kind="faint")
    for (who, table), (top, edge, end) in zip(tables, ((80, 105, 145), (236, 235, 193)), strict=False):
        drawing.text(who, x + 16, top + 12, size=12, at="start")
        for place, block in enumerate(table):
            left = _left(x, place + 1)
            drawing.box("box", left + 4, top, _BLOCK - 8, 24, 4)
            drawing.text(str(block), left + _BLOCK / 2, top + 12, size=12)
            drawing.arrow(left + _BLOCK / 2, edge, _left(x, block) + _BLOCK / 2, end)
    drawing.text(told, x + 16, 286, size=11, kind="faint", at="start")


def _left(x: float, block: int) -> float:
    return x + 64 + (block - 1) * (_BLOCK + _GAP)
