"""Plots as PNG files, for papers and slides; the report draws its own charts.

matplotlib is the extra ``plots``.  Only its object interface is used: no window,
no global figure, so it is safe in a server and beside a user's own plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lorakeet.base.errors import MachineError
from lorakeet.base.run_folder import to_disk_error
from lorakeet.base.units import to_percent

MAX_NUMBERED_LABELS = 20
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "PingFang SC", "SimHei", "Noto Sans CJK JP", "Hiragino Sans GB",
)  # fmt: skip


def has_matplotlib() -> bool:
    """Whether the extra ``plots`` is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def write_confusion_picture(path: Path, report: Any) -> Path:
    """The confusion matrix as a picture: a row for each true label, shares of the row as shades.

    Args:
        path: a ``.png``; its folder is made.
        report: a ``ClassificationReport``, or its dictionary.

    Raises:
        MachineError: matplotlib is not installed.
    """
    content = asdict(report) if is_dataclass(report) else report
    matrix, names = content["confusion"], [str(name) for name in content["label_names"]]
    size = max(4.0, min(16.0, 0.62 * len(names) + 2.4))
    with _fonts():
        figure, axes = _new_figure(size, size)
        shares = [[cell / max(1, sum(row)) for cell in row] for row in matrix]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= MAX_NUMBERED_LABELS:
            for i, row in enumerate(matrix):
                for j, count in enumerate(row):
                    color = "white" if shares[i][j] > 0.55 else "#1c2b3a"
                    axes.text(j, i, f"{count:,}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        accuracy, macro_f1 = to_percent(content["accuracy"]), to_percent(content["macro_f1"])
        axes.set_title(f"accuracy {accuracy}, macro F1 {macro_f1}")
        return _write_figure(figure, path)


def write_curves_picture(path: Path, events: Sequence[Mapping[str, Any]]) -> Path:
    """Training loss of every step and validation loss of every look.

    Args:
        events: as ``base.events.read_events`` gives them.

    Raises:
        MachineError: matplotlib is not installed.
    """
    steps = [e for e in events if e["kind"] == "step" and e.get("loss") is not None]
    looks = [
        (e["step"], e["values"]["loss"])
        for e in events
        if e["kind"] == "evaluation" and (e.get("values") or {}).get("loss") is not None
    ]
    with _fonts():
        figure, axes = _new_figure(7.0, 4.2)
        axes.plot([e["step"] for e in steps], [e["loss"] for e in steps], label="training", lw=1.2)
        if looks:
            axes.plot(*zip(*looks, strict=True), "o-", label="validation", lw=1.6, ms=4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return _write_figure(figure, path)


def write_rates_picture(
    path: Path, points: Sequence[tuple[float, float]], best: float, first_loss: float
) -> Path:
    """The loss that each learning rate led to, the best one marked.

    Args:
        points: (rate, loss), by rising rate.
        first_loss: before any step.

    Raises:
        MachineError: matplotlib is not installed.
    """
    with _fonts():
        figure, axes = _new_figure(6.0, 4.0)
        axes.semilogx(*zip(*points, strict=True), "o-", lw=1.6, ms=5)
        axes.axvline(best, ls="--", lw=1.0, color="gray", label=f"best: {best:.2g}")
        axes.axhline(first_loss, ls=":", lw=1.0, color="gray", label="before training")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss on unseen rows (nats)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return _write_figure(figure, path)


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _fonts() -> Any:
    """matplotlib's settings with the installed fonts that know Chinese.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError as error:
        raise MachineError(
            "Pictures need matplotlib, which is not installed. "
            "Install it with: pip install 'lorakeet[plots]'"
        ) from error
    installed = {font.name for font in font_manager.fontManager.ttflist}
    names = [name for name in _CJK_FONTS if name in installed]
    return matplotlib.rc_context(
        {"font.family": ["DejaVu Sans", *names], "axes.unicode_minus": False}
    )


def _write_figure(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(beside, format="png", dpi=144)
        beside.replace(path)
    except OSError as error:
        raise to_disk_error(error, path, 0) from error
    return path
