"""`python -m onestage.synthesize CONFIG [key=value ...]`, the same as `zsqdet synthesize`."""

import sys

from zsqdet import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
