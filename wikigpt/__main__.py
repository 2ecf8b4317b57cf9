"""Entry point of the `wikigpt` command: user errors end in one line and exit status 2."""

from __future__ import annotations

import sys

from .errors import UserError


def main() -> None:
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "wikigpt":
            raise
        print(f"error: {error.name} is not installed; pip install 'wikigpt[train]'", file=sys.stderr)
        sys.exit(2)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: this command needs {error.name}; pip install 'wikigpt[train]'", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone.
        sys.stderr.close()


if __name__ == "__main__":
    main()
