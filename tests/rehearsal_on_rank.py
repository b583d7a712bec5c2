"""One rehearsal in this process, which warm.py forks: `python rehearsal_on_rank.py REQUEST.json ANSWER.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fullft import rehearsal
from fullft.recipe import parse_recipe

request = json.loads(Path(sys.argv[1]).read_text())
setting = rehearsal.setting_to_rehearse(parse_recipe(request["recipe"]), request["world_size"], request["device"])
planned = rehearsal.planned(setting, request["device"])
measured = rehearsal.perform(**request)
Path(sys.argv[2]).write_text(json.dumps({"measured": measured, "planned": planned}))
