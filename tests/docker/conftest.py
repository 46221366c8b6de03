"""Tests of `running/` need the image and an engine: `make image-test` has both, and names the image here."""

import os

collect_ignore = [] if os.environ.get("HMMD_IMAGE") else ["running"]
