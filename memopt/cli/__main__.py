"""``python -m memopt.cli``, the form torchrun can start."""

import sys

from memopt.cli import main

sys.exit(main())
