"""Tables of figures in Markdown."""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])
