"""Writes every generated file of `docs/`: `python -m tools.write`."""

from pathlib import Path

from tools import api_reference, configuration, pictures

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    "api.md": api_reference.page,
    "configuration.md": configuration.page,
    "pictures/architecture.svg": pictures.architecture,
    "pictures/blocks.svg": pictures.blocks,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


if __name__ == "__main__":
    main()
