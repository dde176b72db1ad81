"""A Hugging Face Space that shows one chain: the one that the variable CBD_CHAIN names."""

import os
import sys

from cbd_hub.app.page import launch

if not os.environ.get("CBD_CHAIN"):
    sys.exit("set the variable CBD_CHAIN to the repo id of a chain (Space settings, Variables and secrets)")
launch(os.environ["CBD_CHAIN"], revision=os.environ.get("CBD_REVISION"), browser=False)
