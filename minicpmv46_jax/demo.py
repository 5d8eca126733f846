"""The small model that comes with the package: the family's architecture, trained on the project's own
scenes.

`FOLDER` is an ordinary checkpoint for `MiniCPMV.from_pretrained` and for transformers. Its README.md gives
its abilities.
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("demo_model")
