"""launch/train.py where whole weights never fit, so that every layer is gathered for every forward of an evaluation."""

import runpy
from pathlib import Path

from fullft.retention import run

run._MEMORY_SHARE = -1.0
runpy.run_path(str(Path(__file__).parent.parent / "launch" / "train.py"), run_name="__main__")
