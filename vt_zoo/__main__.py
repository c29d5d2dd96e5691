import sys

from vt_zoo.cli import main

sys.exit(main())
