"""The small model that comes with the package: the family's architecture, trained on the project's own scenes.

`FOLDER` is a checkpoint like any other, for `MiniCPMV.from_pretrained` and for transformers; its README.md says what it can do.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("demo_model")
