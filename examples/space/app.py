"""A Hugging Face Space that shows one chain: the one that the variable CBD_CHAIN names."""

import os
import sys

from cbd_hub.app.page import launch
from cbd_hub.hub.read import Location

if not os.environ.get("CBD_CHAIN"):
    sys.exit("set the variable CBD_CHAIN to the repo id of a chain (Space settings, Variables and secrets)")
launch(Location(os.environ["CBD_CHAIN"], os.environ.get("CBD_REVISION")), browser=False)
