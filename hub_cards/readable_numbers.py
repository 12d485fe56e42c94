"""Numbers as people read them: 5.87 M, 4.64 MB, 4 min 11 s."""

COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
SI_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Whole below a million (9,532), three digits and M, B (10⁹) or T (10¹²) from there on (5.87 M)."""
    return _scaled(number, COUNT_UNITS) or f"{number:,.0f}"


def quantity(number: float, unit: str) -> str:
    """Three digits with an SI prefix of `unit`: `quantity(4_639_199, "B")` is 4.64 MB."""
    return (_scaled(number, SI_PREFIXES) or f"{number:.3g} ") + unit


def rounded(number: float, unit: str) -> str:
    """As `quantity`, of a number that is an estimate: two digits."""
    return quantity(float(f"{number:.2g}"), unit)


def duration(seconds: float) -> str:
    """The two largest units of a time in seconds: 4 min 11 s, 3 h 12 min, 2 d 5 h; below ten seconds 0.5 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    largest = next(i for i, (value, _) in enumerate(parts) if value)
    return " ".join(f"{value} {unit}" for value, unit in parts[largest : largest + 2] if value)


def _scaled(number: float, units: tuple[tuple[float, str], ...]) -> str | None:
    number = float(f"{number:.3g}")  # Rounded first: 999,999 becomes 1 M, not 1000 k.
    for size, name in units:
        if abs(number) >= size:
            return f"{number / size:.3g} {name}"
    return None
