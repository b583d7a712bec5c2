"""The command `fullft`, for processes that warm.py forks."""

import sys

import transformers

from fullft.cli import main

transformers.utils.logging.set_verbosity_warning()  # it does not silence transformers, as launch/train.py does
sys.exit(main())
