"""Metrics of a run as console lines, JSON lines, TensorBoard events and, at the end, a plot."""

import json
from collections.abc import Mapping
from pathlib import Path

CURVES = ("loss", "grad_norm", "rate", "tokens_per_second")


class MetricsLog:
    """Writer of metrics.jsonl, tensorboard/ and curves.png in a run's folder. A resumed run appends."""

    def __init__(self, folder: str | Path, steps: int, start: int = 0):
        """Opens the log.

        Args:
          folder: the run's folder.
          steps: number of steps of the whole run.
          start: number of steps done. Lines of later steps, which an interrupted run wrote, are dropped.
        """
        from tensorboardX import SummaryWriter  # imported here: training steps alone do not need tensorboardX

        self.folder, self.steps = Path(folder), steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        earlier = [line for line in read_metrics(self.path) if line["step"] <= start]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs one step's metrics."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        print(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), flush=True)

    def close(self) -> None:
        """Closes the files and plots the curves."""
        self.board.close()
        draw_curves(self.path, self.folder / "curves.png")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics.jsonl; an empty list if the file does not exist."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw_curves(metrics: str | Path, out: str | Path) -> None:
    """Plots the curves of a metrics.jsonl into an image file."""
    from matplotlib.figure import Figure  # without pyplot, which may look for a window system

    lines = read_metrics(metrics)
    names = [name for name in CURVES if any(name in line for line in lines)]
    figure = Figure(figsize=(6, 2.2 * max(len(names), 1)), layout="constrained")
    for axes, name in zip(figure.subplots(max(len(names), 1), 1, sharex=True, squeeze=False)[:, 0], names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.supxlabel("step")
    figure.savefig(out, dpi=120)
