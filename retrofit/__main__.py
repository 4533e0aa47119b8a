"""`python -m retrofit`: the command line."""

from retrofit.cli.main import main

if __name__ == "__main__":
    main(prog_name="retrofit")
