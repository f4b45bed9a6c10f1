"""``python -m l4convert``."""

from l4convert.cli import main

if __name__ == "__main__":
    main()
