"""`python -m moespan` is `moespan`."""

from moespan.cli import main

if __name__ == "__main__":
    main()
