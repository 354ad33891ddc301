"""`python -m onestage.train CONFIG [key=value ...]`, the same as `zsqdet train`."""

import sys

from zsqdet import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
