"""A run's numbers: a line on the console, a line of JSON, TensorBoard's events, and at the end a picture of the curves."""

import json
from collections.abc import Mapping
from pathlib import Path

CURVES = ("loss", "grad_norm", "rate", "tokens_per_second")


class Log:
    """Writes into a run's folder: metrics.jsonl, tensorboard/, curves.png. A run that goes on appends."""

    def __init__(self, folder: str | Path, steps: int, start: int = 0):
        """`steps`: of the whole run; `start`: done already. Lines past it, of a run that was broken off, are dropped."""
        from tensorboardX import SummaryWriter  # here, so that the library's steps need none of it

        self.folder, self.steps = Path(folder), steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        earlier = [line for line in read_metrics(self.path) if line["step"] <= start]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One step's numbers."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        print(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), flush=True)

    def close(self) -> None:
        """Ends the files and draws the curves."""
        self.board.close()
        draw_curves(self.path, self.folder / "curves.png")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """A metrics.jsonl's lines; none where there is no such file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def draw_curves(metrics: str | Path, out: str | Path) -> None:
    """The curves of a metrics.jsonl as a picture."""
    from matplotlib.figure import Figure  # the figure alone: no window system

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
