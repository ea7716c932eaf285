"""Numbers and errors as people read them."""

from __future__ import annotations

from .ir.plan import Buffer, Step


def first_line(error: BaseException, limit: int = 200) -> str:
    """What an error says, in a line of at most ``limit`` characters; the name of its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:limit] if text else type(error).__name__


def bytes_text(count: float) -> str:
    """``8.00 GiB``; whole bytes below a KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.{2 if abs(value) < 100 else 0}f} {unit}"
        value /= 1024
    raise AssertionError


def seconds_text(seconds: float) -> str:
    """``12.3 ms``, ``4.56 s``, ``870 µs``, ``2 min 5 s``."""
    if seconds >= 120:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    raise AssertionError


def count_text(count: float, unit: str = "") -> str:
    """``1.23 TFLOP`` for unit FLOP: thousands with SI prefixes."""
    value = float(count)
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000 or prefix == "E":
            number = f"{value:.0f}" if prefix == "" else f"{value:.3g}"
            return f"{number} {prefix}{unit}".rstrip()
        value /= 1000
    raise AssertionError


def type_text(buffer: Buffer) -> str:
    """``bf16[8,2048]`` or nothing where the plan does not say."""
    return f"{buffer.dtype}[{','.join(map(str, buffer.shape))}]" if buffer.dtype else ""


def place_text(item: Buffer | Step) -> str:
    """The user's source line, and the module it runs in."""
    return " in ".join(part for part in (item.source, item.module) if part)
