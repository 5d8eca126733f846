"""Converts checkpoints between the released and the converted format, and writes a small demo checkpoint.

python -m convert --hf openbmb/MiniCPM-V-4_6 --out minicpmv46-jax
python -m convert --export-hf released-again --model minicpmv46-jax
python -m convert --demo demo
"""

from convert.convert import convert
from convert.demo.random_checkpoint import write_demo_checkpoint
from convert.export import export_converted, export_hf, export_run

__all__ = ["convert", "export_converted", "export_hf", "export_run", "write_demo_checkpoint"]
