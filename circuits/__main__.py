"""`python -m circuits` is the command `circuits`."""

from circuits.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
