"""`python -m lm` is `lm`."""

import sys

from lm.cli import main

sys.exit(main())
