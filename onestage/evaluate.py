"""`python -m onestage.evaluate CONFIG [key=value ...]`, the same as `zsqdet evaluate`."""

import sys

from zsqdet import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
